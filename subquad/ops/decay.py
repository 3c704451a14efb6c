"""The decayed recurrence: S_t = diag(a_t) S_{t-1} + k_t v_t^T,  y_t = q_t S_t.

`log_a` is None (no decay: plain linear attention), (B, G, T) (one decay a head: Mamba-2, RetNet) or (B, G, T, N) (one a
key channel: GLA); always a logarithm, at most 0. H query heads may share G states (H a multiple of G, neighbours
share).
States and decays are float32 or wider, whatever the dtype of q, k and v. Differences of cumulated log decays are always
taken before the exponential and only where they are not positive, so nothing overflows, however strong the decay.

Sources: the chunked form for scalar decay is Mamba-2's SSD (arXiv 2405.21060, section 6); for vector decay GLA's
(arXiv 2312.06635, section 4), with the within-chunk products taken exactly instead of by secondary chunks.

Legend: B batch, H query heads, G state heads, R = H / G, T time, K chunks, C time within a chunk, N key width, P value
width.
"""

import torch
from torch import Tensor

from subquad.ops import triton
from subquad.ops.common import decayed, full_precision, initial_state, into_chunks, loop, wide
from subquad.ops.products import decayed_products

SCALAR_CHUNK = 64
VECTOR_CHUNK = 16  # the within-chunk products take C * C * N operations for each chunk


@full_precision
def decay_step(
    q_BH1N: Tensor, k_BG1N: Tensor, v_BG1P: Tensor, log_a: Tensor | None, state_BGNP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One token of the recurrence. Returns y (B, H, 1, P) and the new state (B, G, N, P)."""
    state = initial_state(state_BGNP, k_BG1N, v_BG1P)
    if log_a is not None:
        state = decayed(state, log_a)
    state = torch.addcmul(state, wide(k_BG1N).transpose(-1, -2), wide(v_BG1P))
    q_BGRN = wide(q_BH1N).squeeze(2).unflatten(1, (k_BG1N.shape[1], -1))
    y_BGRP = q_BGRN @ state
    return y_BGRP.flatten(1, 2).unsqueeze(2).to(v_BG1P.dtype), state


def decay_loop(
    q_BHTN: Tensor, k_BGTN: Tensor, v_BGTP: Tensor, log_a: Tensor | None = None, state_BGNP: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence step by step: the reference of the tests. Returns y (B, H, T, P) and the state (B, G, N, P)."""
    return loop(decay_step, q_BHTN, k_BGTN, v_BGTP, log_a, state=initial_state(state_BGNP, k_BGTN, v_BGTP))


@full_precision
def decay_chunk(
    q_BHTN: Tensor, k_BGTN: Tensor, v_BGTP: Tensor, log_a: Tensor | None = None, state_BGNP: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence in parallel over chunks. Returns y (B, H, T, P) in v's dtype and the state (B, G, N, P)."""
    if triton.serves(q_BHTN):
        return triton.decay(q_BHTN, k_BGTN, v_BGTP, log_a, state_BGNP)
    vector = log_a is not None and log_a.dim() == 4
    C, T, G = VECTOR_CHUNK if vector else SCALAR_CHUNK, q_BHTN.shape[2], k_BGTN.shape[1]
    state_BGNP = initial_state(state_BGNP, k_BGTN, v_BGTP)
    q = into_chunks(q_BHTN, C).unflatten(1, (G, -1))  # B G R K C N
    k_BGKCN = into_chunks(k_BGTN, C)
    v_BGKCP = into_chunks(v_BGTP, C)

    causal_CC = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    if log_a is None:
        scores = (q @ k_BGKCN.transpose(-1, -2).unsqueeze(2)).masked_fill(~causal_CC, 0.0)
        q_read, k_write, decay_BGK = q, k_BGKCN, None
    elif vector:
        c_BGKCN = into_chunks(log_a, C).cumsum(-2)
        q_LRCN, k_LCN, c_LCN = q.transpose(2, 3).flatten(0, 2), k_BGKCN.flatten(0, 2), c_BGKCN.flatten(0, 2)
        scores = decayed_products(q_LRCN, c_LCN, k_LCN.unsqueeze(1), c_LCN).squeeze(2)
        scores = scores.unflatten(0, c_BGKCN.shape[:3]).transpose(2, 3)  # B G R K C(query) C(key)
        q_read = q * c_BGKCN.exp().unsqueeze(2)
        k_write = k_BGKCN * (c_BGKCN[..., -1:, :] - c_BGKCN).exp()
        decay_BGK = c_BGKCN[..., -1, :].exp().unsqueeze(-1)
    else:
        c_BGKC = into_chunks(log_a, C).cumsum(-1)
        difference = c_BGKC.unsqueeze(-1) - c_BGKC.unsqueeze(-2)
        weight = difference.masked_fill(~causal_CC, -torch.inf).exp()
        scores = (q @ k_BGKCN.transpose(-1, -2).unsqueeze(2)) * weight.unsqueeze(2)
        q_read = q * c_BGKC.exp().unsqueeze(2).unsqueeze(-1)
        k_write = k_BGKCN * (c_BGKC[..., -1:] - c_BGKC).exp().unsqueeze(-1)
        decay_BGK = c_BGKC[..., -1, None, None].exp()

    written_BGKNP = k_write.transpose(-1, -2) @ v_BGKCP
    if decay_BGK is None:
        end_BGKNP = state_BGNP.unsqueeze(2) + written_BGKNP.cumsum(2)
        start_BGKNP, state_BGNP = end_BGKNP - written_BGKNP, end_BGKNP[:, :, -1]
    else:
        starts = []  # the state at the start of each chunk; unbind, for the gradient of indexing fills all with zeros
        for written_BGNP, decay in zip(written_BGKNP.unbind(2), decay_BGK.unbind(2), strict=True):
            starts.append(state_BGNP)
            state_BGNP = state_BGNP * decay + written_BGNP
        start_BGKNP = torch.stack(starts, 2)
    y = scores @ v_BGKCP.unsqueeze(2) + q_read @ start_BGKNP.unsqueeze(2)
    return y.flatten(3, 4)[:, :, :, :T].flatten(1, 2).to(v_BGTP.dtype), state_BGNP
