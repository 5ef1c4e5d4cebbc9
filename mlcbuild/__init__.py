"""mlcbuild: a make-style build graph that turns LLM recipes into tested packages."""
