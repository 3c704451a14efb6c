"""Rotary embedding outside a model's own code, for layers in which only some heads use it.

In such a layer the module gets cosines of 1 and sines of 0, so its queries and keys have no rotary embedding. The
attention function then rotates those of the heads that use it. The convention is determined by trial: of the
conventions in use, it is the one that reproduces the module's own queries and keys. Where none does (norms after
rotary embedding, complex tables), the module's own code computes queries and keys a second time, with the tables.

Legend: B batch, H heads, T tokens, D head width, R rotated channels, M hidden width, K columns of the tables.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product, starmap
from typing import Literal, TypeAlias, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Tables: TypeAlias = tuple[Tensor, Tensor]  # cosines and sines, (B, T, K)
AnyTables: TypeAlias = Tables | Tensor  # or complex numbers (Llama 4)
Pairs: TypeAlias = Literal["halves", "neighbours", "none"]
Columns: TypeAlias = Literal["all", "first", "pairs"]
Trace: TypeAlias = Callable[[AnyTables], tuple[Tensor, ...]]  # tables -> q, k of the module


@dataclass(frozen=True)
class Rotation:
    """Rotary convention: x cos + x' sin on the first R channels, with x' each pair of channels rotated by 90 degrees.

    `pairs`: channels (d, d + R / 2), or neighbours (2 d, 2 d + 1); "none" is a layer without rotary embedding.
    `columns` of the tables: "all" has one per channel, "first" repeats the first half of them per pair, and "pairs" has
    one per pair of channels.
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
        if self.pairs == "none":
            return x_BHTD
        R = cos_BTR.shape[-1]
        x_BHTR = x_BHTD[..., :R]
        if self.pairs == "halves":
            first_half, second_half = x_BHTR.chunk(2, -1)
            partner_BHTR = torch.cat([-second_half, first_half], -1)
        else:
            partner_BHTR = torch.stack([-x_BHTR[..., 1::2], x_BHTR[..., ::2]], -1).flatten(-2)
        y_BHTR = (x_BHTR * cos_BTR[:, None] + partner_BHTR * sin_BTR[:, None]).to(x_BHTD.dtype)
        return y_BHTR if x_BHTD.shape[-1] == R else torch.cat([y_BHTR, x_BHTD[..., R:]], -1)


_rotations: WeakKeyDictionary[nn.Module, Rotation | None] = WeakKeyDictionary()


def identity_of(tables: AnyTables) -> AnyTables:
    """Tables that rotate nothing."""
    if isinstance(tables, Tensor):
        return torch.ones_like(tables)
    cos, sin = tables
    return torch.ones_like(cos), torch.zeros_like(sin)


@torch.no_grad()
def rotation_of(module: nn.Module, tables: Tables, trace: Trace) -> Rotation | None:
    """Convention of an attention module, found by trial on random tables; None if no known convention is its own.

    `trace` computes the module's queries and keys with other tables, or its queries alone.
    """
    if module in _rotations:
        return _rotations[module]
    generator = torch.Generator().manual_seed(0)
    cos, sin = (torch.randn(table.shape, generator=generator).to(table) for table in tables)
    random_tables = cos, sin
    unrotated_heads, rotated_heads = trace(identity_of(tables)), trace(random_tables)
    conventions = [Rotation("none", "all"), *starmap(Rotation, product(("halves", "neighbours"), get_args(Columns)))]
    matches = [
        rotation
        for rotation in conventions
        if all(_reproduces(rotation, x, y, random_tables) for x, y in zip(unrotated_heads, rotated_heads, strict=True))
    ]
    if len(matches) > 1:  # weights of zero match every convention, so the next call tries again
        return matches[0]
    _rotations[module] = matches[0] if matches else None
    return _rotations[module]


def _reproduces(rotation: Rotation, x_BHTD: Tensor, expected_BHTD: Tensor, tables: Tables) -> bool:
    """Whether a convention turns the unrotated heads `x_BHTD` into the expected ones, up to rounding."""
    if rotation.pairs == "none":
        return torch.equal(x_BHTD, expected_BHTD)
    if tables[0].dim() != 3 or tables[0].shape[1] != x_BHTD.shape[2]:
        return False
    cos_BTR, sin_BTR = rotation.tables(*tables)
    if cos_BTR.shape[-1] > x_BHTD.shape[-1] or cos_BTR.shape[-1] % 2:
        return False
    error = (rotation.rotate(x_BHTD, cos_BTR, sin_BTR) - expected_BHTD).abs().max()
    return bool(error <= 8 * torch.finfo(x_BHTD.dtype).eps * expected_BHTD.abs().max())
