"""Losses layer by layer: the distance of hidden states, and of the mixing matrices behind them.

Legend: B batch, H query heads of a mixer, G key/value heads, T tokens, D head width, M model width, R rows and C
columns of a block.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from subquad.mixers import Mixer, MixerInputs
from subquad.model.interface import AttentionCall
from subquad.ops.common import wide

BLOCK_ELEMENTS = 2**25  # of one block of all heads' matrices: 128 MiB in float32


def output_distance(student_BTM: Tensor, teacher_BTM: Tensor, kind: Literal["norm", "squared"] = "norm") -> Tensor:
    """Distance of a student's hidden states from the teacher's: of an attention module, or of a whole block.

    "norm": mean over tokens of |s - t|_2 / sqrt(M), the form that MOHAWK (arXiv 2408.10189, stage 2), RADLADS
    (2505.03005, step 1) and KL-guided selection (2512.20569) train with. "squared": mean over tokens and width of
    (s - t)^2 (LoLCATs, HALO, Distill-then-Replace). Both in the units of the activations (or their square), independent
    of the width.
    """
    difference_BTM = wide(student_BTM) - wide(teacher_BTM)
    if kind == "squared":
        return difference_BTM.square().mean()
    return torch.linalg.vector_norm(difference_BTM, dim=-1).mean() / math.sqrt(student_BTM.shape[-1])


def attention_scores(
    call: AttentionCall,
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    window: int | None,
    rows: slice = slice(None),
    columns: slice = slice(None),
) -> Tensor:
    """What `call` takes the softmax of, for these rows (queries) and columns (keys): (B, H, R, C), -inf where unseen.

    `q_BHTD` and `k_BHTD` are those of some heads, a key head for each query head; `window` is the layer's, in tokens.
    """
    scores_BHRC = call.scale * q_BHTD[:, :, rows] @ k_BHTD[:, :, columns].transpose(-1, -2)
    if call.softcap is not None:
        scores_BHRC = call.softcap * torch.tanh(scores_BHRC / call.softcap)
    if not call.causal:
        return scores_BHRC
    T = q_BHTD.shape[2]
    position_T = torch.arange(T, device=q_BHTD.device)
    ahead_RC = position_T[rows, None] - position_T[None, columns]  # of the key, in tokens
    seen_RC = (ahead_RC >= 0) & (ahead_RC < (window or T))
    return scores_BHRC.masked_fill(~seen_RC, -math.inf)


def attention_probabilities(call: AttentionCall, window: int | None) -> Tensor:
    """What an attention function computed with this call: the softmax over its keys, (B, H, T, T)."""
    group = call.q_BHTD.shape[1] // call.k_BGTD.shape[1]
    return attention_scores(call, call.q_BHTD, call.k_BGTD.repeat_interleave(group, 1), window).softmax(-1)


def matrix_distance(mixer: Mixer, inputs: MixerInputs, call: AttentionCall, *, block: int | None = None) -> Tensor:
    """Mean over rows and heads of |M - A|_F, the mixer's matrix from the softmax of the teacher's heads.

    `inputs` are the mixer's, `call` what the whole layer's attention function got. The matrices are made in blocks of
    `block` columns (default: about `BLOCK_ELEMENTS` numbers); where there are several, each is made again in the
    backward pass, so that never more than one is held.
    Source: MOHAWK (arXiv 2408.10189, eq. 9: matrix orientation; not squared, as in its code).
    """
    group = mixer.group
    heads, kv_heads = list(group.heads), list(group.kv_heads)
    q_BHTD, k_BHTD = wide(call.q_BHTD[:, heads]), wide(mixer.spread(call.k_BGTD[:, kv_heads]))
    B, H, T, _ = q_BHTD.shape
    size = block or max(16, BLOCK_ELEMENTS // (B * H * T))
    blocks = [slice(start, min(start + size, T)) for start in range(0, T, size)]

    def scores(rows: slice, columns: slice) -> Tensor:
        return attention_scores(call, q_BHTD, k_BHTD, group.window, rows, columns)

    with torch.no_grad():
        everything = slice(0, T)
        log_sum_BHT1 = torch.cat([scores(rows, everything).logsumexp(-1, keepdim=True) for rows in blocks], 2)

    def squares(columns: slice) -> Tensor:
        with torch.no_grad():
            teacher_BHTC = (scores(everything, columns) - log_sum_BHT1).exp()
        return (wide(mixer.matrix(inputs, columns)) - teacher_BHTC).square().sum((-1, -2))

    if len(blocks) == 1:
        total_BH = squares(blocks[0])
    else:
        parts: list[Any] = [checkpoint(squares, columns, use_reentrant=False) for columns in blocks]
        total_BH = torch.stack(parts).sum(0)
    return total_BH.clamp_min(torch.finfo(total_BH.dtype).tiny).sqrt().mean()
