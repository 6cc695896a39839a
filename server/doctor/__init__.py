"""`molex doctor`: what a machine offers, what was chosen for it, whether `molex serve` would work on it."""
