"""The recurrences beside their rivals: python -m benchmarks.ops."""
