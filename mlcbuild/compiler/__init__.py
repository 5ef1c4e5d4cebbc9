"""From a family, a quantization and a target to a library of compiled model functions."""
