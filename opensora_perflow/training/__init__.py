"""One training step, and what a run remembers. Knows no host."""
