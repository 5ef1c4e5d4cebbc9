"""Our own passes over a model's IR, one per file; mlcbuild/compiler/pipeline.py says when each runs.

A pass is a plain function from IRModule to IRModule. It is not wrapped as a TVM pass: TVM's runner turns every
exception into a RuntimeError, and ours carry hints.
"""
