"""What the recurrences share: dtypes, chunks, and the step-by-step reference loop.

Legend: B batch, G state heads, T time, K chunks, C time within a chunk, N key width, P value width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad


def wide(x: Tensor) -> Tensor:
    """At least float32: decays and states lose too much in half precision."""
    return x if x.dtype == torch.float64 else x.float()


def initial_state(state_BGNP: Tensor | None, k_BGTN: Tensor, v_BGTP: Tensor) -> Tensor:
    """The given state in a wide dtype, or zeros."""
    if state_BGNP is not None:
        return wide(state_BGNP)
    B, G, _, N = k_BGTN.shape
    return wide(v_BGTP.new_zeros(B, G, N, v_BGTP.shape[-1]))


def into_chunks(x: Tensor, size: int, dim: int = 2) -> Tensor:
    """Splits time into chunks, (.., T, ..) -> (.., K, C, ..), zeros at the end: these leave every state untouched."""
    extra = -x.shape[dim] % size
    return wide(pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, extra))).unflatten(dim, (-1, size))


def loop(step: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """Runs `step` token by token over inputs with time in dimension 2."""
    length = next(x.shape[2] for x in inputs if x is not None)
    outputs = []
    for t in range(length):
        y, state = step(*(None if x is None else x[:, :, t : t + 1] for x in inputs), state)
        outputs.append(y)
    return torch.cat(outputs, 2), state
