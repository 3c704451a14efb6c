"""Triton kernels of flash-linear-attention, used if the tensors are on a GPU and the `gpu` extra is installed.

flash-linear-attention is imported lazily: never without a GPU or without the extra. Its kernels take tensors as
(B, T, H, D) and states as (B, H, N, P). They do not support grouped heads, so shared heads are repeated.

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
    """True if the Triton kernels can run on this tensor. Warns once if only the extra is missing."""
    return x.is_cuda and x.dtype != torch.float64 and _installed()


def _time_first(x: Tensor, heads: int) -> Tensor:
    """Move time first and repeat shared heads: (B, G, T, ...) -> (B, T, H, ...)."""
    x = x.repeat_interleave(heads // x.shape[1], 1) if x.shape[1] != heads else x
    return x.transpose(1, 2).contiguous()


def decay(
    q_BHTN: Tensor, k_BGTN: Tensor, v_BGTP: Tensor, log_a: Tensor | None, state_BGNP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute `decay_chunk` with Triton; `log_a` is (B, G, T), (B, G, T, N) or None."""
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
    """Compute `delta_chunk` with Triton; `log_a` is (B, G, T) or (B, G, T, N)."""
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
    """Compute `dplr_chunk` with Triton. The kernel's erasing key has the opposite sign."""
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
