"""The build graph: action keys, the content store, the cache-aware runner and doit's command, reporter and database."""
