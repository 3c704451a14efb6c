"""flash-linear-attention's Triton kernels, used when the tensors are on a GPU and the `gpu` extra is installed.

The import is lazy: without a GPU (or without the extra) nothing of flash-linear-attention is touched. Its kernels take
tensors as (B, T, H, D) and, like ours, states as (B, H, N, P); grouped heads are repeated, since they know no groups.

Legend: B batch, T time, H query heads, G state heads, N key width, P value width.
"""

import functools
import importlib.util
import warnings

import torch
from torch import Tensor


@functools.cache
def _installed() -> bool:
    if importlib.util.find_spec("fla") is not None:
        return True
    warnings.warn(
        "flash-linear-attention is not installed, so the PyTorch form of the recurrences runs on the GPU; "
        'install it with: pip install "subquad[gpu]"',
        stacklevel=3,
    )
    return False


def serves(x: Tensor) -> bool:
    """Whether the Triton kernels can run for this tensor."""
    return x.is_cuda and x.dtype != torch.float64 and _installed()


def _time_first(x: Tensor, heads: int) -> Tensor:
    """(B, G, T, ...) -> (B, T, H, ...), groups repeated."""
    x = x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] != heads else x
    return x.transpose(1, 2).contiguous()


def decay(
    q_BHTN: Tensor, k_BGTN: Tensor, v_BGTP: Tensor, log_a: Tensor | None, state_BGNP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`decay_chunk` on Triton; `log_a` (B, G, T) or (B, G, T, N) or None."""
    from fla.ops.gla import chunk_gla
    from fla.ops.simple_gla import chunk_simple_gla

    heads, groups = q_BHTN.shape[1], k_BGTN.shape[1]
    state = None if state_BGNP is None else state_BGNP.repeat_interleave(heads // groups, 1).contiguous()
    gates = None if log_a is None else _time_first(log_a, heads).float()
    kernel = chunk_gla if log_a is not None and log_a.dim() == 4 else chunk_simple_gla
    y_BTHP, state_BHNP = kernel(
        _time_first(q_BHTN, heads),
        _time_first(k_BGTN, heads),
        _time_first(v_BGTP, heads),
        gates,
        scale=1.0,
        initial_state=state,
        output_final_state=True,
    )
    return y_BTHP.transpose(1, 2), state_BHNP[:, :: heads // groups]


def delta(
    q_BHTN: Tensor, k_BGTN: Tensor, v_BGTP: Tensor, log_a: Tensor, b_BGT: Tensor, state_BGNP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`delta_chunk` on Triton; `log_a` (B, G, T) or (B, G, T, N)."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.kda import chunk_kda

    kernel = chunk_kda if log_a.dim() == 4 else chunk_gated_delta_rule
    heads, groups = q_BHTN.shape[1], k_BGTN.shape[1]
    state = None if state_BGNP is None else state_BGNP.repeat_interleave(heads // groups, 1).contiguous()
    y_BTHP, state_BHNP = kernel(
        _time_first(q_BHTN, heads),
        _time_first(k_BGTN, heads),
        _time_first(v_BGTP, heads),
        g=_time_first(log_a, heads).float(),
        beta=_time_first(b_BGT, heads),
        scale=1.0,
        initial_state=state,
        output_final_state=True,
    )
    return y_BTHP.transpose(1, 2), state_BHNP[:, :: heads // groups]


def dplr(
    q_BHTN: Tensor,
    k_BGTN: Tensor,
    v_BGTP: Tensor,
    log_a_BGTN: Tensor,
    e_BGTN: Tensor,
    w: Tensor,
    state_BGNP: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`dplr_chunk` on Triton, whose erasing key has the other sign."""
    from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule

    heads, groups = q_BHTN.shape[1], k_BGTN.shape[1]
    state = None if state_BGNP is None else state_BGNP.repeat_interleave(heads // groups, 1).contiguous()
    y_BTHP, state_BHNP = chunk_dplr_delta_rule(
        _time_first(q_BHTN, heads),
        _time_first(k_BGTN, heads),
        _time_first(v_BGTP, heads),
        _time_first(-e_BGTN, heads),
        _time_first(w if w.dim() == 4 else w.unsqueeze(-1) * k_BGTN, heads),
        _time_first(log_a_BGTN, heads).float(),
        scale=1.0,
        initial_state=state,
        output_final_state=True,
    )
    return y_BTHP.transpose(1, 2), state_BHNP[:, :: heads // groups]
