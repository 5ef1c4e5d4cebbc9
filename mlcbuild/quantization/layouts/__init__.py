"""Weight layouts: one file per way to lay out a quantized matrix in memory, found by file name."""
