"""Jobs: one verb of the command line a file, and what they share. Import them from their files."""
