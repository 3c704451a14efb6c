"""Claims of papers, measured again: scripts that print tables and write JSON and a picture."""
