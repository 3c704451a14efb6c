"""Scripts that measure claims about speed and memory; each prints tables and writes JSON."""
