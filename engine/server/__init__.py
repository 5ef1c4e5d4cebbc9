"""The HTTP server: OpenAI's chat protocol over one engine."""
