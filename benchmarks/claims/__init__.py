"""What papers claim, measured here: scripts that print tables and write JSON and a picture."""
