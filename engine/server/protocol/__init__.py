"""What goes over the wire: OpenAI's request and response bodies as pydantic models, one protocol per file."""
