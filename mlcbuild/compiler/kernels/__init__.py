"""Our own CPU kernels in TIR, one operation per file; each file states its maths, layout and shapes."""
