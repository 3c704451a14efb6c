"""The JSON files of a run: one schema for those who write them and those who read them."""
