"""The decayed recurrence: S_t = diag(a_t) S_{t-1} + k_t v_t^T,  y_t = q_t S_t.

`log_a` is a logarithm, at most 0:

- None: no decay (plain linear attention)
- (B, G, T): one decay per head (Mamba-2, RetNet)
- (B, G, T, N): one decay per key channel (GLA)

H query heads may share G states. H is then a multiple of G, and neighbouring heads share a state.
States and decays are at least float32, for any dtype of q, k and v. Differences of cumulated log decays are taken
before the exponential, and only where they are not positive. So no decay overflows.

Sources: the chunked form is Mamba-2's SSD for scalar decay (arXiv 2405.21060, section 6) and GLA's for vector decay
(arXiv 2312.06635, section 4), with the products within a chunk as in products.py.

Legend: B batch, H query heads, G state heads, R = H / G, T time, K chunks, C time within a chunk, N key width, P value
width, L = B G K, Q = R C queries of a chunk.
"""

from typing import Any

import torch
from torch import Tensor

from subquad.ops import triton
from subquad.ops.common import (
    decay_state,
    even_chunk,
    full_precision,
    initial_state,
    into_chunks,
    loop,
    pair_decay,
    wide,
)
from subquad.ops.products import decayed_products, gradients

SCALAR_CHUNK = 64
VECTOR_CHUNK = 32  # longer chunks cost more products within a chunk, shorter ones more steps between chunks


@full_precision
def decay_step(
    q_BH1N: Tensor, k_BG1N: Tensor, v_BG1P: Tensor, log_a: Tensor | None, state_BGNP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Advance the recurrence by one token. Returns y (B, H, 1, P) and the new state (B, G, N, P)."""
    state = initial_state(state_BGNP, k_BG1N, v_BG1P)
    state = state.clone() if log_a is None else decay_state(state, log_a)
    state.addcmul_(wide(k_BG1N).transpose(-1, -2), wide(v_BG1P))
    return decay_read(q_BH1N, state).to(v_BG1P.dtype), state


@full_precision
def decay_read(q_BH1N: Tensor, state_BGNP: Tensor) -> Tensor:
    """Read the state with one query: (B, H, 1, P)."""
    q_BGRN = wide(q_BH1N).squeeze(2).unflatten(1, (state_BGNP.shape[1], -1))
    return (q_BGRN @ state_BGNP).flatten(1, 2).unsqueeze(2)


def decay_loop(
    q_BHTN: Tensor, k_BGTN: Tensor, v_BGTP: Tensor, log_a: Tensor | None = None, state_BGNP: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence step by step (the reference). Returns y (B, H, T, P) and the state (B, G, N, P)."""
    return loop(decay_step, q_BHTN, k_BGTN, v_BGTP, log_a, state=initial_state(state_BGNP, k_BGTN, v_BGTP))


@full_precision
def decay_chunk(
    q_BHTN: Tensor, k_BGTN: Tensor, v_BGTP: Tensor, log_a: Tensor | None = None, state_BGNP: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence in parallel chunks. Returns y (B, H, T, P) in v's dtype and the state (B, G, N, P)."""
    if triton.serves(q_BHTN):
        return triton.decay(q_BHTN, k_BGTN, v_BGTP, log_a, state_BGNP)
    T, G = q_BHTN.shape[2], k_BGTN.shape[1]
    C = VECTOR_CHUNK if log_a is not None and log_a.dim() == 4 else even_chunk(T, SCALAR_CHUNK)
    q_BGKRCN = into_chunks(q_BHTN, C).unflatten(1, (G, -1)).transpose(2, 3).contiguous()
    k_BGKCN, v_BGKCP = into_chunks(k_BGTN, C), into_chunks(v_BGTP, C)
    c = None if log_a is None else into_chunks(log_a, C).cumsum(3)
    y_BGKRCP, state = _Decay.apply(q_BGKRCN, k_BGKCN, v_BGKCP, c, initial_state(state_BGNP, k_BGTN, v_BGTP))
    return y_BGKRCP.transpose(2, 3).flatten(3, 4)[:, :, :, :T].flatten(1, 2).to(v_BGTP.dtype), state


class _Decay(torch.autograd.Function):
    """Chunked recurrence with a hand-written gradient: a few more matrix products instead of storing every step.

    c are the chunk's cumulated log decays (None: no decay). The output of a chunk depends on q_i e^{c_i} and
    k_j e^{-c_j}, the state after it on k_j e^{c_C - c_j} and e^{c_C}. So dc = q dq - k dk per channel; the last token
    also gets <state after the chunk, its gradient>.
    """

    @staticmethod
    def forward(
        ctx: Any, q_BGKRCN: Tensor, k_BGKCN: Tensor, v_BGKCP: Tensor, c: Tensor | None, state_BGNP: Tensor
    ) -> tuple[Tensor, Tensor]:
        read_decay, write_decay, total_decay = _decays(c)
        scores_BGKRCC = _scores(q_BGKRCN, k_BGKCN, c)
        written_BGKNP = (k_BGKCN * write_decay).transpose(-1, -2) @ v_BGKCP
        states_BGKNP = _scan(written_BGKNP, total_decay, state_BGNP)  # before each chunk and after the last
        y_BGKQP = scores_BGKRCC.flatten(3, 4) @ v_BGKCP
        y_BGKQP += (q_BGKRCN * _for_queries(read_decay)).flatten(3, 4) @ states_BGKNP[:, :, :-1]
        ctx.save_for_backward(q_BGKRCN, k_BGKCN, v_BGKCP, c, scores_BGKRCC, states_BGKNP)
        return y_BGKQP.unflatten(3, q_BGKRCN.shape[3:5]), states_BGKNP[:, :, -1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_BGKRCN, k_BGKCN, v_BGKCP, c, scores_BGKRCC, states_BGKNP = ctx.saved_tensors
        read_decay, write_decay, total_decay = _decays(c)
        dy_BGKQP, dstate_BGNP = grads[0].flatten(3, 4), grads[1]
        # Gradients of the states, from the last chunk backwards: from the chunk's own reads and from the next state.
        reading_BGKNP = (q_BGKRCN * _for_queries(read_decay)).flatten(3, 4).transpose(-1, -2) @ dy_BGKQP
        total_decay_backwards = total_decay.flip(2) if isinstance(total_decay, Tensor) else total_decay
        dstates_BGKNP = _scan(reading_BGKNP.flip(2), total_decay_backwards, dstate_BGNP).flip(2)
        # Contiguous copies, since matrix products copy a transposed slice slowly.
        before_BGKNP, dafter_BGKNP = states_BGKNP[:, :, :-1].contiguous(), dstates_BGKNP[:, :, 1:].contiguous()

        # Gradients of queries, keys and values, through the scores and through the states.
        dscores_BGKRCC = (dy_BGKQP @ v_BGKCP.transpose(-1, -2)).unflatten(3, q_BGKRCN.shape[3:5])
        dq_BGKRCN, dk_BGKCN = _score_gradients(dscores_BGKRCC, q_BGKRCN, k_BGKCN, c)
        from_state = (dy_BGKQP @ before_BGKNP.transpose(-1, -2)).unflatten(3, q_BGKRCN.shape[3:5])
        dq_BGKRCN += from_state * _for_queries(read_decay)
        dk_BGKCN += (v_BGKCP @ dafter_BGKNP.transpose(-1, -2)) * write_decay
        dv_BGKCP = scores_BGKRCC.flatten(3, 4).transpose(-1, -2) @ dy_BGKQP
        dv_BGKCP += (k_BGKCN * write_decay) @ dafter_BGKNP
        # Gradient of the cumulated log decays.
        dc = None
        if c is not None:
            dc = (q_BGKRCN * dq_BGKRCN).sum(3) - k_BGKCN * dk_BGKCN
            dc[..., -1, :] += (states_BGKNP[:, :, 1:] * dafter_BGKNP).sum(-1)
            dc = dc if c.dim() == 5 else dc.sum(-1)
        return dq_BGKRCN, dk_BGKCN, dv_BGKCP, dc, dstates_BGKNP[:, :, 0]


def _decays(c: Tensor | None) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
    """Compute the decay of reads from the state before the chunk, e^c, of writes to the state after it, e^{c_C - c},
    and of the state over the chunk, e^{c_C}."""
    if c is None:
        return 1.0, 1.0, 1.0
    c_BGKCN = c if c.dim() == 5 else c.unsqueeze(-1)
    return c_BGKCN.exp(), (c_BGKCN[..., -1:, :] - c_BGKCN).exp(), c_BGKCN[..., -1, :, None].exp()


def _for_queries(read_decay: Tensor | float) -> Tensor | float:
    return read_decay.unsqueeze(3) if isinstance(read_decay, Tensor) else read_decay


def _scan(written_BGKNP: Tensor, total_decay: Tensor | float, state_BGNP: Tensor) -> Tensor:
    """Compute the states before each chunk and after the last: state, total_0 state + written_0, ..."""
    states_BGKNP = torch.cat([state_BGNP.unsqueeze(2), written_BGKNP], 2)
    if not isinstance(total_decay, Tensor):
        return states_BGKNP.cumsum(2)
    for previous, current, decay in zip(
        states_BGKNP.unbind(2), states_BGKNP.unbind(2)[1:], total_decay.unbind(2), strict=False
    ):
        current.addcmul_(previous, decay)
    return states_BGKNP


def _scores(q_BGKRCN: Tensor, k_BGKCN: Tensor, c: Tensor | None) -> Tensor:
    """Compute sum_n q_in e^{c_in - c_jn} k_jn for j <= i within each chunk: (B, G, K, R, C, C)."""
    if c is not None and c.dim() == 5:
        scores = decayed_products(*_flat(q_BGKRCN, k_BGKCN, c))
        return scores.squeeze(2).unflatten(0, c.shape[:3])
    scores = (q_BGKRCN.flatten(3, 4) @ k_BGKCN.transpose(-1, -2)).unflatten(3, q_BGKRCN.shape[3:5])
    return scores.mul_(pair_decay(c, k_BGKCN).unsqueeze(-3))


def _score_gradients(
    dscores_BGKRCC: Tensor, q_BGKRCN: Tensor, k_BGKCN: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the gradients of queries and keys from those of the scores."""
    if c is not None and c.dim() == 5:
        dq, dk = gradients(dscores_BGKRCC.flatten(0, 2).unsqueeze(2), *_flat(q_BGKRCN, k_BGKCN, c))
        return dq.unflatten(0, c.shape[:3]), dk.squeeze(1).unflatten(0, c.shape[:3])
    weighted_BGKQC = dscores_BGKRCC.mul_(pair_decay(c, k_BGKCN).unsqueeze(-3)).flatten(3, 4)
    dq_BGKRCN = (weighted_BGKQC @ k_BGKCN).unflatten(3, q_BGKRCN.shape[3:5])
    return dq_BGKRCN, weighted_BGKQC.transpose(-1, -2) @ q_BGKRCN.flatten(3, 4)


def _flat(q_BGKRCN: Tensor, k_BGKCN: Tensor, c_BGKCN: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flatten the arguments for `decayed_products`."""
    c_LCN = c_BGKCN.flatten(0, 2)
    return q_BGKRCN.flatten(0, 2), c_LCN, k_BGKCN.flatten(0, 2).unsqueeze(1), c_LCN
