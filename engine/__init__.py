"""engine: opens an mlcbuild package and generates text from it, in process or over HTTP."""
