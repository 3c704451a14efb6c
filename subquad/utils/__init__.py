"""Helpers that know nothing of models: files, formats, memory, time, progress, environment."""
