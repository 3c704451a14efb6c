"""The order in which training reads: a function of (seed, epoch), so that it is the same in a run that goes on."""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers below `count` as one epoch reads them."""
    return np.random.default_rng([seed, epoch]).permutation(count)
