"""Losses of one layer: distances between hidden states, and between mixing matrices.

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

BLOCK_ELEMENTS = 2**25  # elements of one block of all heads' matrices: 128 MiB in float32


def output_distance(student_BTM: Tensor, teacher_BTM: Tensor, kind: Literal["norm", "squared"] = "norm") -> Tensor:
    """Distance between hidden states of student and teacher, after an attention module or after a whole block.

    - norm: mean over tokens of |s - t|_2 / sqrt(M), the loss of MOHAWK (arXiv 2408.10189, stage 2), RADLADS
      (2505.03005, step 1) and KL-guided selection (2512.20569)
    - squared: mean over tokens and width of (s - t)^2 (LoLCATs, HALO, Distill-then-Replace)

    Units are those of the activations, or their square. The value does not depend on the width.
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
    """Attention scores of `call` before the softmax, (B, H, R, C): -inf where a query does not see a key.

    `rows` select queries and `columns` keys. `q_BHTD` and `k_BHTD` belong to some of the call's heads, with one key
    head for each query head. `window` is the layer's, in tokens.
    """
    scores_BHRC = call.scale * q_BHTD[:, :, rows] @ k_BHTD[:, :, columns].transpose(-1, -2)
    if call.softcap is not None:
        scores_BHRC = call.softcap * torch.tanh(scores_BHRC / call.softcap)
    if not call.causal:
        return scores_BHRC
    T = q_BHTD.shape[2]
    position_T = torch.arange(T, device=q_BHTD.device)
    distance_RC = position_T[rows, None] - position_T[None, columns]  # from the key to the query
    visible_RC = (distance_RC >= 0) & (distance_RC < (window or T))
    return scores_BHRC.masked_fill(~visible_RC, -math.inf)


def attention_probabilities(call: AttentionCall, window: int | None) -> Tensor:
    """Attention probabilities of `call`, the softmax over its keys: (B, H, T, T)."""
    group = call.q_BHTD.shape[1] // call.k_BGTD.shape[1]
    return attention_scores(call, call.q_BHTD, call.k_BGTD.repeat_interleave(group, 1), window).softmax(-1)


def matrix_distance(mixer: Mixer, inputs: MixerInputs, call: AttentionCall, *, block: int | None = None) -> Tensor:
    """Mean over batch and heads of |M - A|_F, with the mixer's matrix M and the teacher's attention matrix A.

    `inputs` are the mixer's; `call` is the call of the teacher's whole layer. The matrices are computed in blocks of
    `block` columns (default: about `BLOCK_ELEMENTS` elements). If there are several, each is computed again in the
    backward pass, so that only one is in memory.
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
        all_rows = all_columns = slice(0, T)
        log_sum_BHT1 = torch.cat([scores(rows, all_columns).logsumexp(-1, keepdim=True) for rows in blocks], 2)

    def squares(columns: slice) -> Tensor:
        with torch.no_grad():
            teacher_BHTC = (scores(all_rows, columns) - log_sum_BHT1).exp()
        return (wide(mixer.matrix(inputs, columns)) - teacher_BHTC).square().sum((-1, -2))

    if len(blocks) == 1:
        total_BH = squares(blocks[0])
    else:
        block_sums: list[Any] = [checkpoint(squares, columns, use_reentrant=False) for columns in blocks]
        total_BH = torch.stack(block_sums).sum(0)
    return total_BH.clamp_min(torch.finfo(total_BH.dtype).tiny).sqrt().mean()
