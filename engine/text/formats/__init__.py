"""Tool-call formats, one per file, named as recipes name them in chat.tool_format; see engine/text/calls.py."""
