"""Weights: download a checkpoint, read it slice by slice, map its names, write quantized shards."""
