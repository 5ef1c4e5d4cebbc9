"""How far a package is from the unquantized model: reference logits, KL divergence, top-1 agreement, the gate."""
