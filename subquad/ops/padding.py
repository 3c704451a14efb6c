"""Padding of a batch, as the operators take it: in every row, the pads stand in front of the new tokens.

Operators count the tokens of a row, never its columns. So a state holds real tokens only, and pads between a state and
the new tokens move in front of the state.

Legend: B batch, L past and new columns, T new columns, S columns of a state, E = S + T, G heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from subquad.ops.common import joined


@dataclass(frozen=True)
class Padding:
    """Real tokens of each row: how many came before, and which of the new columns hold one.

    `real_BT` is False at pads, which precede the real tokens of their row; None means that no new column is a pad.
    """

    past_B: Tensor
    real_BT: Tensor | None

    @classmethod
    def of(cls, padding_BL: Tensor, past: int) -> Padding:
        """Make it from a mask of all columns, True at real tokens, of which the first `past` are old."""
        return cls(padding_BL[:, :past].sum(-1), padding_BL[:, past:])

    @cached_property
    def pads_B(self) -> Tensor:
        """Pads among each row's new columns."""
        return torch.zeros_like(self.past_B) if self.real_BT is None else (~self.real_BT).sum(-1)

    @cached_property
    def first_B(self) -> Tensor:
        """Number of the token in the first new column, as if the row's pads were tokens: negative where it has none."""
        return self.past_B - self.pads_B

    def extend(self, state_BGSD: Tensor, x_BGTD: Tensor) -> Tensor:
        """Concatenate a state and the new columns along time, (B, G, E, D), with the pads in front of the state."""
        x_BGED = joined(state_BGSD, x_BGTD)
        if self.real_BT is None:
            return x_BGED
        B, G, E, D = x_BGED.shape
        S, pads_B1, column_E = state_BGSD.shape[2], self.pads_B[:, None], torch.arange(E, device=x_BGED.device)
        moved_BE = torch.where(column_E < pads_B1, column_E + S, column_E - pads_B1)
        index_BE = torch.where(column_E < pads_B1 + S, moved_BE, column_E)
        return x_BGED.gather(2, index_BE[:, None, :, None].expand(B, G, E, D))
