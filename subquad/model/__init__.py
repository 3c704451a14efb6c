"""Models: the student, its attention, its cache, and how it meets a transformers model."""
