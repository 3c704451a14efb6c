"""Attention masks of any form that transformers takes, read as the padding of a batch.

A mixer has no mask besides causality and padding, so a mask that says anything else is an error.

Legend: B batch, H heads, T new tokens, L past and new tokens.
"""

from typing import Any

import torch
from torch import Tensor

HIDDEN = -1e4  # an additive mask hides a key by this or less


def padding_mask(mask: Any, batch: int, past: int, new: int) -> Tensor | None:
    """Padding of a batch, (B, L), True at real tokens; None if there are no pads.

    `mask`: (B, L), 0 at pads; or (B or 1, H or 1, T, L), boolean (True: visible) or additive (0: visible), which hides
    later tokens and pads, and nothing else. Raises ValueError for any other mask.
    """
    columns = past + new
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        form = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be (batch, tokens), not {form}")
    if mask.dim() == 4:
        return _padding_of_4d(mask, batch, past, new)
    if tuple(mask.shape) != (batch, columns):
        raise ValueError(
            f"attention_mask must be (batch, past and new tokens), here {(batch, columns)}, not {tuple(mask.shape)}"
        )
    if bool(mask.all()):
        return None
    if mask.dtype != torch.bool and bool((mask < 0).any()):
        raise ValueError("attention_mask (batch, tokens) must be 1 at tokens and 0 at pads: it has negative numbers")
    return mask.bool()


def _padding_of_4d(mask: Tensor, batch: int, past: int, new: int) -> Tensor | None:
    """Padding that a mask of each query and key stands for."""
    refusal = (
        "attention_mask of 4 dimensions must hide later tokens and pads, and nothing else, because mixers cannot "
        "obey it otherwise: give a mask (batch, tokens)"
    )
    if mask.shape[0] not in (1, batch) or tuple(mask.shape[2:]) != (new, past + new):
        raise ValueError(
            f"attention_mask of 4 dimensions must be (batch, 1, {new}, {past + new}) here, not {tuple(mask.shape)}"
        )
    visible_BHTL = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not (mask.is_floating_point() and bool((visible_BHTL | (mask <= HIDDEN)).all())):
        raise ValueError(refusal)
    visible_BTL = visible_BHTL[:, 0].expand(batch, -1, -1)
    causal_TL = torch.ones(new, past + new, dtype=torch.bool, device=mask.device).tril(past)
    # A pad's query may see anything: nothing, or every token, where a softmax over nothing was avoided.
    causal_BT = ~(visible_BTL & ~causal_TL).any(-1)
    padding_BL = (visible_BTL & causal_BT[..., None]).any(1)
    wrong_BTL = (visible_BTL != (causal_TL & padding_BL[:, None])) & padding_BL[:, past:, None]
    if bool(wrong_BTL.any() | (visible_BHTL != visible_BHTL[:, :1]).any()):
        raise ValueError(refusal)
    return None if bool(padding_BL.all()) else padding_BL
