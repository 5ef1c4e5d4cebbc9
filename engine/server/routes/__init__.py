"""The routes, one resource per file; each holds a `router`."""
