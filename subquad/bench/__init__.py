"""Speed and memory of models over context length, compared in one run."""

from subquad.bench.measure import bench

__all__ = ["bench"]
