"""The recurrences compared with their rivals: python -m benchmarks.ops."""
