"""Measuring: a package beside what the machine's memory allows, and any OpenAI-compatible server under load."""
