"""Measures of a student compared with its teacher: likelihood, retrieval, tasks, memory, images and samples."""

from subquad.evaluate.footprint import cache_table, held_cache_bytes
from subquad.evaluate.harness import harness
from subquad.evaluate.images import image_fidelity
from subquad.evaluate.likelihood import likelihood, paired_gain
from subquad.evaluate.retrieval import answers, retrieval, usable
from subquad.evaluate.samples import paired_samples, samples

__all__ = [
    "answers",
    "cache_table",
    "harness",
    "held_cache_bytes",
    "likelihood",
    "image_fidelity",
    "paired_gain",
    "paired_samples",
    "retrieval",
    "samples",
    "usable",
]
