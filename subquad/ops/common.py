"""Helpers shared by the recurrences: dtypes, chunks, and the step-by-step reference loop.

Legend: B batch, G state heads, T time, K chunks, C time within a chunk, N key width, P value width.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

P = ParamSpec("P")
R = TypeVar("R")
Append = Callable[[Tensor, Tensor], Tensor]  # old and new keys or values (B, G, time, D) -> both along time


def wide(x: Tensor) -> Tensor:
    """Convert to at least float32, since decays and states lose too much precision in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def joined(old_BGLD: Tensor, new_BGTD: Tensor) -> Tensor:
    """Concatenate both along time, into a new tensor."""
    return torch.cat([old_BGLD, new_BGTD], 2)


def widened(x: Tensor, width: int) -> Tensor:
    """Append zeros to the last dimension up to a width; a tensor of that width is returned as it is, without a copy."""
    return x if x.shape[-1] == width else pad(x, (0, width - x.shape[-1]))


def full_precision(form: Callable[P, R]) -> Callable[P, R]:
    """Disable autocast inside a form, since it would multiply states and decays in half precision."""

    @functools.wraps(form)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        q = args[0]
        assert isinstance(q, Tensor)
        if not torch.is_autocast_enabled(q.device.type):  # in a step, the context manager costs as much as the products
            return form(*args, **kwargs)
        with torch.autocast(q.device.type, enabled=False):
            return form(*args, **kwargs)

    return run


def initial_state(state_BGNP: Tensor | None, k_BGTN: Tensor, v_BGTP: Tensor) -> Tensor:
    """Convert the state to a wide dtype, or make a zero state for None."""
    if state_BGNP is not None:
        return wide(state_BGNP)
    B, G, _, N = k_BGTN.shape
    return wide(v_BGTP.new_zeros(B, G, N, v_BGTP.shape[-1]))


def decay_state(state_BGNP: Tensor, log_a: Tensor) -> Tensor:
    """Apply one token's decay to the state. `log_a` is (B, G, 1), or (B, G, 1, N) per key channel."""
    a = wide(log_a).exp()
    return state_BGNP * (a.transpose(-1, -2) if log_a.dim() == 4 else a.unsqueeze(-1))


def into_chunks(x: Tensor, size: int, dim: int = 2) -> Tensor:
    """Split time into chunks, (.., T, ..) -> (.., K, C, ..). Zero padding at the end leaves every state unchanged."""
    padding = -x.shape[dim] % size
    return wide(pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, padding))).unflatten(dim, (-1, size))


def even_chunk(length: int, limit: int) -> int:
    """Choose the chunk size, at most `limit`, with the fewest chunks and then the least padding."""
    return -(-length // -(-length // limit))


def pair_decay(c_BGKC: Tensor | None, like: Tensor) -> Tensor:
    """Compute e^{c_i - c_j} for j <= i, else 0, from cumulated log decays: (B, G, K, C, C).

    For None it is the lower triangle of ones (C, C). `like` (.., C, N) sets length, dtype and device.
    """
    C = like.shape[-2]
    if c_BGKC is None:
        return like.new_ones(C, C).tril_()
    later_CC = torch.ones(C, C, dtype=torch.bool, device=like.device).triu_(1)
    difference = c_BGKC.unsqueeze(-1) - c_BGKC.unsqueeze(-2)
    return difference.masked_fill_(later_CC, -torch.inf).exp_()


def loop(step: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run `step` token by token over inputs with time in dimension 2. Returns all outputs and the last state."""
    length = next(x.shape[2] for x in inputs if x is not None)
    outputs = []
    for t in range(length):
        y, state = step(*(None if x is None else x[:, :, t : t + 1] for x in inputs), state)
        outputs.append(y)
    return torch.cat(outputs, 2), state
