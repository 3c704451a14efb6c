"""The gated delta rule: S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,  y_t = q_t S_t.

Written as S_t = a_t S_{t-1} + k_t u_t^T with the correction u_t = b_t (v_t - a_t k_t^T S_{t-1}), all corrections of a
chunk solve one unit lower triangular system (the WY form of DeltaNet, arXiv 2406.06484, with the decays of Gated
DeltaNet, arXiv 2412.06464, section 3.3). Keys should have unit length and b lie in [0, 1]; b = 0 and log_a = 0 leave
the state as it is.
The decay is one a head, (B, G, T), or one a key channel, (B, G, T, N): then it is KDA's rule (arXiv 2510.26692), with
diag(a_t) for a_t, and a case of the recurrence in dplr.py.
States and decays are float32 or wider.

Legend: B batch, H query heads, G state heads, T time, K chunks, C time within a chunk, N key width, P value width.
"""

import torch
from torch import Tensor

from subquad.ops import triton
from subquad.ops.common import decayed, full_precision, initial_state, into_chunks, loop, wide
from subquad.ops.dplr import dplr_chunk

CHUNK = 64


@full_precision
def delta_step(
    q_BH1N: Tensor, k_BG1N: Tensor, v_BG1P: Tensor, log_a: Tensor, b_BG1: Tensor, state_BGNP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence. Returns y (B, H, 1, P) and the new state (B, G, N, P)."""
    state = decayed(initial_state(state_BGNP, k_BG1N, v_BG1P), log_a)
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
    """The recurrence step by step: the reference of the tests. Returns y (B, H, T, P) and the state (B, G, N, P)."""
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
    """The recurrence in parallel over chunks. Returns y (B, H, T, P) in v's dtype and the state (B, G, N, P)."""
    if triton.serves(q_BHTN):
        return triton.delta(q_BHTN, k_BGTN, v_BGTP, log_a, b_BGT, state_BGNP)
    if log_a.dim() == 4:
        k, b_BGT1 = wide(k_BGTN), wide(b_BGT).unsqueeze(-1)
        erase, write = k * wide(log_a).exp(), k * b_BGT1
        y_BHTP, state_BGNP = dplr_chunk(q_BHTN, k, v_BGTP * b_BGT1, log_a, erase, write, state_BGNP)
        return y_BHTP.to(v_BGTP.dtype), state_BGNP
    C, T, G = CHUNK, q_BHTN.shape[2], k_BGTN.shape[1]
    state_BGNP = initial_state(state_BGNP, k_BGTN, v_BGTP)
    q = into_chunks(q_BHTN, C).unflatten(1, (G, -1))  # B G R K C N
    k_BGKCN = into_chunks(k_BGTN, C)
    v_BGKCP = into_chunks(v_BGTP, C)
    c_BGKC = into_chunks(log_a, C).cumsum(-1)
    b_BGKC1 = into_chunks(b_BGT, C).unsqueeze(-1)

    causal_CC = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    difference = c_BGKC.unsqueeze(-1) - c_BGKC.unsqueeze(-2)
    weight = difference.masked_fill(~causal_CC, -torch.inf).exp()
    kk_BGKCC = b_BGKC1 * weight * (k_BGKCN @ k_BGKCN.transpose(-1, -2))
    # (I + strictly lower part) u = b (v - e^c k S_0): solved for both right-hand sides at once, S_0 being unknown yet
    right = torch.cat([b_BGKC1 * v_BGKCP, b_BGKC1 * c_BGKC.exp().unsqueeze(-1) * k_BGKCN], -1)
    solved = torch.linalg.solve_triangular(kk_BGKCC, right, upper=False, unitriangular=True)
    from_v_BGKCP, from_state_BGKCN = solved.split([v_BGKCP.shape[-1], k_BGKCN.shape[-1]], -1)

    k_write_BGKNC = (k_BGKCN * (c_BGKC[..., -1:] - c_BGKC).exp().unsqueeze(-1)).transpose(-1, -2)
    decay_BGK11 = c_BGKC[..., -1, None, None].exp()
    starts, corrections = [], []
    chunks = (from_v_BGKCP, from_state_BGKCN, decay_BGK11, k_write_BGKNC)
    for from_v, from_state, decay, k_write in zip(*(x.unbind(2) for x in chunks), strict=True):
        u_BGCP = from_v - from_state @ state_BGNP
        starts.append(state_BGNP)
        corrections.append(u_BGCP)
        state_BGNP = state_BGNP * decay + k_write @ u_BGCP
    scores = (q @ k_BGKCN.transpose(-1, -2).unsqueeze(2)) * weight.unsqueeze(2)
    q_read = q * c_BGKC.exp().unsqueeze(2).unsqueeze(-1)
    y = scores @ torch.stack(corrections, 2).unsqueeze(2) + q_read @ torch.stack(starts, 2).unsqueeze(2)
    return y.flatten(3, 4)[:, :, :, :T].flatten(1, 2).to(v_BGTP.dtype), state_BGNP
