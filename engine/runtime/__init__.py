"""What computes logits: the executor over TVM, and a fake one that needs nothing."""
