"""The gated delta rule: S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,  y_t = q_t S_t.

With the correction u_t = b_t (v_t - a_t k_t^T S_{t-1}), this is S_t = a_t S_{t-1} + k_t u_t^T. All corrections of a
chunk solve one unit lower triangular system: the WY form of DeltaNet (arXiv 2406.06484), with the decays of Gated
DeltaNet (arXiv 2412.06464, section 3.3). Keys should have unit length and b should lie in [0, 1]. b = 0 with log_a = 0
leaves the state unchanged.
The decay is (B, G, T), one per head, or (B, G, T, N), one per key channel. The latter is KDA's rule (arXiv 2510.26692)
with diag(a_t) for a_t, a case of the recurrence in dplr.py.
States and decays are at least float32.

Legend: B batch, H query heads, G state heads, T time, K chunks, C time within a chunk, N key width, P value width.
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
from subquad.ops.dplr import dplr_chunk

CHUNK = 64


@full_precision
def delta_step(
    q_BH1N: Tensor, k_BG1N: Tensor, v_BG1P: Tensor, log_a: Tensor, b_BG1: Tensor, state_BGNP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Advance the recurrence by one token. Returns y (B, H, 1, P) and the new state (B, G, N, P)."""
    state = decay_state(initial_state(state_BGNP, k_BG1N, v_BG1P), log_a)
    k = wide(k_BG1N)
    u_BG1P = wide(b_BG1).unsqueeze(-1) * (wide(v_BG1P) - k @ state)
    state = torch.addcmul(state, k.transpose(-1, -2), u_BG1P)
    q_BGRN = wide(q_BH1N).squeeze(2).unflatten(1, (k.shape[1], -1))
    return (q_BGRN @ state).flatten(1, 2).unsqueeze(2).to(v_BG1P.dtype), state


def delta_loop(
    q_BHTN: Tensor,
    k_BGTN: Tensor,
    v_BGTP: Tensor,
    log_a: Tensor,
    b_BGT: Tensor,
    state_BGNP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence step by step (the reference). Returns y (B, H, T, P) and the state (B, G, N, P)."""
    return loop(delta_step, q_BHTN, k_BGTN, v_BGTP, log_a, b_BGT, state=initial_state(state_BGNP, k_BGTN, v_BGTP))


@full_precision
def delta_chunk(
    q_BHTN: Tensor,
    k_BGTN: Tensor,
    v_BGTP: Tensor,
    log_a: Tensor,
    b_BGT: Tensor,
    state_BGNP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence in parallel chunks. Returns y (B, H, T, P) in v's dtype and the state (B, G, N, P)."""
    if triton.serves(q_BHTN):
        return triton.delta(q_BHTN, k_BGTN, v_BGTP, log_a, b_BGT, state_BGNP)
    if log_a.dim() == 4:
        e_BGTN, v = wide(k_BGTN) * wide(log_a).exp(), wide(v_BGTP) * wide(b_BGT).unsqueeze(-1)
        y_BHTP, state_BGNP = dplr_chunk(q_BHTN, k_BGTN, v, log_a, e_BGTN, b_BGT, state_BGNP)
        return y_BHTP.to(v_BGTP.dtype), state_BGNP
    T, G = q_BHTN.shape[2], k_BGTN.shape[1]
    C = even_chunk(T, CHUNK)
    q_BGKRCN = into_chunks(q_BHTN, C).unflatten(1, (G, -1)).transpose(2, 3).contiguous()
    y_BGKRCP, state = _Delta.apply(
        q_BGKRCN,
        into_chunks(k_BGTN, C),
        into_chunks(v_BGTP, C),
        into_chunks(log_a, C).cumsum(-1),
        into_chunks(b_BGT, C),
        initial_state(state_BGNP, k_BGTN, v_BGTP),
    )
    return y_BGKRCP.transpose(2, 3).flatten(3, 4)[:, :, :, :T].flatten(1, 2).to(v_BGTP.dtype), state


class _Delta(torch.autograd.Function):
    """Chunked recurrence with a hand-written gradient: a few more matrix products instead of storing every step.

    With c the chunk's cumulated log decays, w_ij = e^{c_i - c_j} for j <= i, and S the state before the chunk:

        r_i = b_i (v_i - e^{c_i} k_i S),   u = X r,   X = (I + A)^{-1},   A_ij = b_i w_ij k_i k_j for j < i
        y_i = sum_j w_ij (q_i k_j) u_j + e^{c_i} q_i S,   state after = e^{c_C} S + sum_j e^{c_C - c_j} k_j u_j

    Backwards, dr = X^T du and dA = -dr u^T. Every read (q, and k on the left of A and in r) has a factor e^{c_i}, and
    every write a factor e^{-c_j}. So dc = read * dread - written * dwritten.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BGKRCN: Tensor,
        k_BGKCN: Tensor,
        v_BGKCP: Tensor,
        c_BGKC: Tensor,
        b_BGKC: Tensor,
        state_BGNP: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # Scores and key overlaps under decay, and the inverse X of the triangular system.
        read_BGKC1, b_BGKC1 = c_BGKC.exp().unsqueeze(-1), b_BGKC.unsqueeze(-1)
        k_end_BGKCN = k_BGKCN * (c_BGKC[..., -1:] - c_BGKC).exp().unsqueeze(-1)
        weight_BGKCC = pair_decay(c_BGKC, k_BGKCN)
        scores_BGKRCC = (q_BGKRCN.flatten(3, 4) @ k_BGKCN.transpose(-1, -2)).unflatten(3, q_BGKRCN.shape[3:5])
        scores_BGKRCC *= weight_BGKCC.unsqueeze(3)
        overlap_BGKCC = (k_BGKCN @ k_BGKCN.transpose(-1, -2)).mul_(weight_BGKCC).tril_(-1)
        eye_CC = torch.eye(k_BGKCN.shape[3], dtype=k_BGKCN.dtype, device=k_BGKCN.device)
        x_BGKCC = torch.linalg.solve_triangular(overlap_BGKCC * b_BGKC1, eye_CC, upper=False, unitriangular=True)

        # Corrections and states, chunk by chunk. The loop subtracts the state's part of the corrections.
        u_BGKCP = x_BGKCC @ (v_BGKCP * b_BGKC1)
        from_state_BGKCN = x_BGKCC @ (k_BGKCN * (b_BGKC1 * read_BGKC1))
        chunks = k_BGKCN.shape[2]
        states_BGKNP = state_BGNP.unsqueeze(2).repeat(1, 1, chunks + 1, 1, 1)  # before each chunk and after the last
        total_BGK11 = read_BGKC1[..., -1:, :]
        for i in range(chunks):
            previous_BGNP = states_BGKNP[:, :, i]
            u_BGKCP[:, :, i] -= from_state_BGKCN[:, :, i] @ previous_BGNP
            states_BGKNP[:, :, i + 1] = k_end_BGKCN[:, :, i].transpose(-1, -2) @ u_BGKCP[:, :, i]
            states_BGKNP[:, :, i + 1].addcmul_(previous_BGNP, total_BGK11[:, :, i])

        # Outputs, from the chunk's own tokens and from the state before it.
        y_BGKQP = scores_BGKRCC.flatten(3, 4) @ u_BGKCP
        y_BGKQP += (q_BGKRCN * read_BGKC1.unsqueeze(3)).flatten(3, 4) @ states_BGKNP[:, :, :-1]
        ctx.save_for_backward(
            q_BGKRCN, k_BGKCN, v_BGKCP, c_BGKC, b_BGKC, scores_BGKRCC, overlap_BGKCC, x_BGKCC, u_BGKCP, states_BGKNP
        )
        return y_BGKQP.unflatten(3, q_BGKRCN.shape[3:5]), states_BGKNP[:, :, -1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q_BGKRCN, k_BGKCN, v_BGKCP, c_BGKC, b_BGKC, scores_BGKRCC, overlap_BGKCC, x_BGKCC, u_BGKCP, states_BGKNP = (
            ctx.saved_tensors
        )
        dy_BGKQP, dstate_BGNP = grads[0].flatten(3, 4), grads[1]
        read_BGKC1, b_BGKC1 = c_BGKC.exp().unsqueeze(-1), b_BGKC.unsqueeze(-1)
        rest_BGKC1 = (c_BGKC[..., -1:] - c_BGKC).exp().unsqueeze(-1)
        q_read_BGKQN = (q_BGKRCN * read_BGKC1.unsqueeze(3)).flatten(3, 4)
        before_BGKNP = states_BGKNP[:, :, :-1].contiguous()

        # From the last chunk backwards: dr = X^T (scores^T dy + k_end dS), with dS the gradient of the next state.
        xt_BGKCC = x_BGKCC.transpose(-1, -2)
        dr_BGKCP = xt_BGKCC @ (scores_BGKRCC.flatten(3, 4).transpose(-1, -2) @ dy_BGKQP)
        from_after_BGKCN = xt_BGKCC @ (k_BGKCN * rest_BGKC1)
        erasing_BGKNC = (k_BGKCN * (b_BGKC1 * read_BGKC1)).transpose(-1, -2)
        dstates_BGKNP = torch.empty_like(states_BGKNP)
        dstates_BGKNP[:, :, -1] = dstate_BGNP
        dstates_BGKNP[:, :, :-1] = q_read_BGKQN.transpose(-1, -2) @ dy_BGKQP
        total_BGK11 = read_BGKC1[..., -1:, :]
        for i in reversed(range(k_BGKCN.shape[2])):
            dnext_BGNP = dstates_BGKNP[:, :, i + 1]
            dr_BGKCP[:, :, i] += from_after_BGKCN[:, :, i] @ dnext_BGNP
            dstates_BGKNP[:, :, i].addcmul_(dnext_BGNP, total_BGK11[:, :, i])
            dstates_BGKNP[:, :, i] -= erasing_BGKNC[:, :, i] @ dr_BGKCP[:, :, i]
        dafter_BGKNP = dstates_BGKNP[:, :, 1:].contiguous()

        # Gradients of the scores, of A and of the key overlaps.
        weight_BGKCC = pair_decay(c_BGKC, k_BGKCN)
        dscores_BGKRCC = (dy_BGKQP @ u_BGKCP.transpose(-1, -2)).unflatten(3, q_BGKRCN.shape[3:5])
        dscores_BGKQC = dscores_BGKRCC.mul_(weight_BGKCC.unsqueeze(3)).flatten(3, 4)
        da_BGKCC = (dr_BGKCP @ u_BGKCP.transpose(-1, -2)).neg_()
        doverlap_BGKCC = (da_BGKCC * weight_BGKCC).tril_(-1).mul_(b_BGKC1)
        dr_state_BGKCN = dr_BGKCP @ before_BGKNP.transpose(-1, -2)  # gradient of e^c k in r

        # Gradients of queries and keys.
        dq_BGKQN = dscores_BGKQC @ k_BGKCN
        dq_BGKRCN = dq_BGKQN.unflatten(3, q_BGKRCN.shape[3:5])
        dq_BGKRCN += (dy_BGKQP @ before_BGKNP.transpose(-1, -2)).unflatten(
            3, q_BGKRCN.shape[3:5]
        ) * read_BGKC1.unsqueeze(3)
        dread_BGKCN = doverlap_BGKCC @ k_BGKCN - dr_state_BGKCN * (b_BGKC1 * read_BGKC1)
        dwritten_BGKCN = dscores_BGKQC.transpose(-1, -2) @ q_BGKRCN.flatten(3, 4)
        dwritten_BGKCN += doverlap_BGKCC.transpose(-1, -2) @ k_BGKCN
        dwritten_BGKCN += (u_BGKCP @ dafter_BGKNP.transpose(-1, -2)) * rest_BGKC1

        # Gradients of the cumulated log decays and of b.
        dc_BGKC = (q_BGKRCN * dq_BGKRCN).sum((3, 5)) + (k_BGKCN * (dread_BGKCN - dwritten_BGKCN)).sum(-1)
        dc_BGKC[..., -1] += (states_BGKNP[:, :, 1:] * dafter_BGKNP).sum((-1, -2))
        db_BGKC = (da_BGKCC * overlap_BGKCC).sum(-1) + (dr_BGKCP * v_BGKCP).sum(-1)
        db_BGKC -= (dr_state_BGKCN * k_BGKCN).sum(-1) * read_BGKC1.squeeze(-1)
        dk_BGKCN = dread_BGKCN + dwritten_BGKCN
        return dq_BGKRCN, dk_BGKCN, dr_BGKCP * b_BGKC1, dc_BGKC, db_BGKC, dstates_BGKNP[:, :, 0]
