"""From a library, weights and a tokenizer to a package folder that the engine opens and MLC's tools can read."""
