"""Families of transformers: a tiny random model of each, and what a student of it can do."""
