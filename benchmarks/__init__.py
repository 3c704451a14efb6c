"""What is claimed of speed and memory, as scripts that print a table and write JSON."""
