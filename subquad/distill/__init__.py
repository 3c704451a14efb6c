"""Training: what to minimise (objectives), how fast (schedule), and the one loop that does it (loop)."""
