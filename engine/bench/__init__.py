"""Measuring the engine: how fast a package runs on this machine, beside what the machine's memory allows."""
