"""What decides which tokens run next, and where their keys and values live. Plain Python: no tensor library here."""
