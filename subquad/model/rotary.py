"""Rotary embedding outside a model's own code, for layers in which only some heads use it.

In such a layer the module gets cosines of 1 and sines of 0, so its queries and keys have no rotary embedding. The
attention function then rotates those of the heads that use it. The convention is determined by trial: of the
conventions in use, it is the one that reproduces the module's own queries and keys.

Legend: B batch, H heads, T tokens, D head width, R rotated channels, M hidden width, K columns of the tables.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product, starmap
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from subquad.errors import UserError

Tables: TypeAlias = tuple[Tensor, Tensor]  # cosines and sines, (B, T, K)
Pairs: TypeAlias = Literal["halves", "neighbours"]
Columns: TypeAlias = Literal["all", "first", "pairs"]
Trace: TypeAlias = Callable[[nn.Module, Tensor, Tables], tuple[Tensor, Tensor]]  # module, hidden, tables -> q, k

TRIAL_TOKENS = 8


@dataclass(frozen=True)
class Rotation:
    """Rotary convention: x cos + x' sin on the first R channels, with x' each pair of channels rotated by 90 degrees.

    `pairs`: channels (d, d + R / 2), or neighbours (2 d, 2 d + 1). `columns` of the tables: "all" has one per channel,
    "first" repeats the first half of them per pair, and "pairs" has one per pair of channels.
    """

    pairs: Pairs
    columns: Columns

    def tables(self, cos_BTK: Tensor, sin_BTK: Tensor) -> Tables:
        """Tables with one column per channel."""
        if self.columns == "all":
            return cos_BTK, sin_BTK
        pairs = cos_BTK.shape[-1] // 2 if self.columns == "first" else cos_BTK.shape[-1]
        if self.pairs == "neighbours":
            return cos_BTK[..., :pairs].repeat_interleave(2, -1), sin_BTK[..., :pairs].repeat_interleave(2, -1)
        return cos_BTK[..., :pairs].repeat(1, 1, 2), sin_BTK[..., :pairs].repeat(1, 1, 2)

    def rotate(self, x_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
        """Rotates queries or keys by tables of one column per channel."""
        R = cos_BTR.shape[-1]
        x_BHTR = x_BHTD[..., :R]
        if self.pairs == "halves":
            first_half, second_half = x_BHTR.chunk(2, -1)
            partner_BHTR = torch.cat([-second_half, first_half], -1)
        else:
            partner_BHTR = torch.stack([-x_BHTR[..., 1::2], x_BHTR[..., ::2]], -1).flatten(-2)
        y_BHTR = (x_BHTR * cos_BTR[:, None] + partner_BHTR * sin_BTR[:, None]).to(x_BHTD.dtype)
        return y_BHTR if x_BHTD.shape[-1] == R else torch.cat([y_BHTR, x_BHTD[..., R:]], -1)


_rotations: dict[tuple[type[nn.Module], int, int], Rotation] = {}


@torch.no_grad()
def rotation_of(module: nn.Module, hidden_BTM: Tensor, cos_BTK: Tensor, trace: Trace) -> Rotation:
    """Convention of an attention module, found by trial; `trace` computes the module's queries and keys.

    Raises UserError, naming the module's class, if no convention reproduces them, as when rotary embedding is not the
    last operation on queries and keys.
    """
    key = type(module), cos_BTK.shape[-1], hidden_BTM.shape[-1]
    if key in _rotations:
        return _rotations[key]
    generator = torch.Generator().manual_seed(0)
    x_1TM = torch.randn(1, TRIAL_TOKENS, hidden_BTM.shape[-1], generator=generator).to(hidden_BTM)
    cos_1TK, sin_1TK = (
        torch.randn(1, TRIAL_TOKENS, cos_BTK.shape[-1], generator=generator).to(cos_BTK) for _ in range(2)
    )
    unrotated_heads = trace(module, x_1TM, (torch.ones_like(cos_1TK), torch.zeros_like(cos_1TK)))
    rotated_heads = trace(module, x_1TM, (cos_1TK, sin_1TK))
    matches = [
        rotation
        for rotation in starmap(Rotation, product(get_args(Pairs), get_args(Columns)))
        if all(
            _reproduces(rotation, x, y, (cos_1TK, sin_1TK)) for x, y in zip(unrotated_heads, rotated_heads, strict=True)
        )
    ]
    if not matches:
        raise UserError(
            f"{type(module).__name__} turns its queries and keys in a way that Subquad does not support, so heads "
            "with and without rotary embedding cannot share a layer: set rotary: true among the mixer's options"
        )
    if len(matches) == 1:  # weights of zero match every convention, so the next call tries again
        _rotations[key] = matches[0]
    return matches[0]


def _reproduces(rotation: Rotation, x_BHTD: Tensor, expected_BHTD: Tensor, tables: Tables) -> bool:
    """Whether a convention turns the unrotated heads `x_BHTD` into the expected ones, up to rounding."""
    cos_BTR, sin_BTR = rotation.tables(*tables)
    if cos_BTR.shape[-1] > x_BHTD.shape[-1] or cos_BTR.shape[-1] % 2:
        return False
    error = (rotation.rotate(x_BHTD, cos_BTR, sin_BTR) - expected_BHTD).abs().max()
    return bool(error <= 8 * torch.finfo(x_BHTD.dtype).eps * expected_BHTD.abs().max())
