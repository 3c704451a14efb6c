"""The delta recurrence with one decay per key channel: S_t = diag(a_t) S_{t-1} - w_t (e_t S_{t-1}) + k_t v_t^T.

The transition is diagonal plus low rank (DPLR). The erasing key e_t reads the old state, and the result is subtracted
along w_t. RWKV-7 has e = k / |k| and w = a e. The delta rule with vector decay (KDA) has e = diag(a) k, w = b k, and
values b v.
The erased values of a chunk, u_t = e_t S_{t-1}, solve one unit lower triangular system (RWKV-7, arXiv 2503.14456,
section 8; DeltaNet's WY form, arXiv 2406.06484).
`w` is (B, G, T, N), or a factor (B, G, T) of k, which is cheaper.
States and decays are at least float32. A log decay of 0 with zero k and w leaves the state unchanged.

Legend: B batch, H query heads, G state heads, R = H / G, T time, K chunks, C time within a chunk, N key width, P value
width.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from subquad.ops import triton
from subquad.ops.common import decay_state, full_precision, initial_state, into_chunks, loop, wide
from subquad.ops.products import decayed_products

CHUNK = 32  # longer chunks cost more products within a chunk, shorter ones more steps between chunks


@full_precision
def dplr_step(
    q_BH1N: Tensor,
    k_BG1N: Tensor,
    v_BG1P: Tensor,
    log_a_BG1N: Tensor,
    e_BG1N: Tensor,
    w: Tensor,
    state_BGNP: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Advance the recurrence by one token. Returns y (B, H, 1, P) and the new state (B, G, N, P)."""
    state = initial_state(state_BGNP, k_BG1N, v_BG1P)
    u_BG1P = wide(e_BG1N) @ state
    w_BG1N = wide(w) if w.dim() == 4 else wide(w).unsqueeze(-1) * wide(k_BG1N)
    state = decay_state(state, log_a_BG1N)
    state.addcmul_(w_BG1N.transpose(-1, -2), u_BG1P, value=-1)
    state.addcmul_(wide(k_BG1N).transpose(-1, -2), wide(v_BG1P))
    q_BGRN = wide(q_BH1N).squeeze(2).unflatten(1, (k_BG1N.shape[1], -1))
    return (q_BGRN @ state).flatten(1, 2).unsqueeze(2).to(v_BG1P.dtype), state


def dplr_loop(
    q_BHTN: Tensor,
    k_BGTN: Tensor,
    v_BGTP: Tensor,
    log_a_BGTN: Tensor,
    e_BGTN: Tensor,
    w: Tensor,
    state_BGNP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence step by step (the reference). Returns y (B, H, T, P) and the state (B, G, N, P)."""
    start = initial_state(state_BGNP, k_BGTN, v_BGTP)
    return loop(dplr_step, q_BHTN, k_BGTN, v_BGTP, log_a_BGTN, e_BGTN, w, state=start)


@full_precision
def dplr_chunk(
    q_BHTN: Tensor,
    k_BGTN: Tensor,
    v_BGTP: Tensor,
    log_a_BGTN: Tensor,
    e_BGTN: Tensor,
    w: Tensor,
    state_BGNP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence in parallel chunks. Returns y (B, H, T, P) in v's dtype and the state (B, G, N, P)."""
    if triton.serves(q_BHTN):
        return triton.dplr(q_BHTN, k_BGTN, v_BGTP, log_a_BGTN, e_BGTN, w, state_BGNP)
    # Chunks and their cumulated log decays.
    T, G = q_BHTN.shape[2], k_BGTN.shape[1]
    state_BGNP = initial_state(state_BGNP, k_BGTN, v_BGTP)
    q = into_chunks(q_BHTN, CHUNK).unflatten(1, (G, -1)).transpose(2, 3)  # B G K R C N
    k, v, log_a, e = (into_chunks(x, CHUNK) for x in (k_BGTN, v_BGTP, log_a_BGTN, e_BGTN))
    w = into_chunks(w, CHUNK)
    c = log_a.cumsum(-2)
    # Products within each chunk. e_t reads with the same decay as q_{t-1}, so e shifted by one token is one more query.
    reads = torch.cat([q, pad(e, (0, 0, -1, 1)).unsqueeze(3)], 3).flatten(0, 2)
    keys = torch.stack([k, w] if w.dim() == 5 else [k], 3).flatten(0, 2)
    c_LCN, leading_shape = c.flatten(0, 2), c.shape[:3]
    products = decayed_products(reads, c_LCN, keys, c_LCN).unflatten(0, leading_shape)  # B G K R+1 S C C
    if w.dim() == 4:
        products = torch.cat([products, products * w[..., None, None, None, :]], 4)
        w = w.unsqueeze(-1) * k
    qk, qw = products[:, :, :, :-1].unbind(4)
    ek, ew = pad(products[:, :, :, -1], (0, 0, 1, -1)).unbind(3)

    # Solve (I + ew) u = ek v + e^{c - log a} e S_0 for both right-hand sides. S_0 is not known yet.
    right_sides = torch.cat([ek @ v, e * (c - log_a).exp()], -1)
    solutions = torch.linalg.solve_triangular(ew, right_sides, upper=False, unitriangular=True)
    from_v, from_state = solutions.split([v.shape[-1], k.shape[-1]], -1)

    # States, chunk by chunk.
    write_decay = (c[..., -1:, :] - c).exp()
    written_states = (k * write_decay).transpose(-1, -2) @ v
    w_write = (w * write_decay).transpose(-1, -2)
    decay = c[..., -1, :].exp().unsqueeze(-1)
    start_states, erasures = [], []
    for chunk in zip(*(x.unbind(2) for x in (from_v, from_state, decay, written_states, w_write)), strict=True):
        from_v_BGCP, from_state_BGCN, decay_BGN1, written_BGNP, w_BGNC = chunk
        u_BGCP = from_v_BGCP + from_state_BGCN @ state_BGNP
        start_states.append(state_BGNP)
        erasures.append(u_BGCP)
        state_BGNP = state_BGNP * decay_BGN1 + written_BGNP - w_BGNC @ u_BGCP
    # Outputs, from the chunk's own tokens and from the state before it.
    start, u = torch.stack(start_states, 2).unsqueeze(3), torch.stack(erasures, 2).unsqueeze(3)
    y = qk @ v.unsqueeze(3) - qw @ u + (q * c.exp().unsqueeze(3)) @ start  # B G K R C P
    return y.transpose(2, 3).flatten(3, 4)[:, :, :, :T].flatten(1, 2).to(v_BGTP.dtype), state_BGNP
