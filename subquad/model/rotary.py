"""Rotary embedding outside a model's own code, for layers in which some heads want it and others do not.

There the module is given cosines of 1 and sines of 0, so that the attention function gets queries and keys without
rotary embedding, and turns those of the heads that want it itself. How is not read from the model's code but tried: of
the conventions in use, the one that does what the module does.

Legend: B batch, H heads, T tokens, D head width, R channels that turn, M hidden width, K columns of the tables.
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
Look: TypeAlias = Callable[[nn.Module, Tensor, Tables], tuple[Tensor, Tensor]]  # module, hidden, tables -> q, k

TRIED = 8  # tokens


@dataclass(frozen=True)
class Rotation:
    """x cos + x' sin on the first R channels, x' being each pair of channels turned by a right angle.

    `pairs`: channels (d, d + R / 2), or neighbours. `columns` of the tables, one a channel: as they come, the first
    half of them for neighbours, or (tables of one column a pair) all of them for each half.
    """

    pairs: Pairs
    columns: Columns

    def tables(self, cos_BTK: Tensor, sin_BTK: Tensor) -> Tables:
        """The tables with one column a channel."""
        if self.columns == "all":
            return cos_BTK, sin_BTK
        each = cos_BTK.shape[-1] // 2 if self.columns == "first" else cos_BTK.shape[-1]
        if self.pairs == "neighbours":
            return cos_BTK[..., :each].repeat_interleave(2, -1), sin_BTK[..., :each].repeat_interleave(2, -1)
        return cos_BTK[..., :each].repeat(1, 1, 2), sin_BTK[..., :each].repeat(1, 1, 2)

    def turned(self, x_BHTD: Tensor, cos_BTR: Tensor, sin_BTR: Tensor) -> Tensor:
        """Queries or keys with rotary embedding, by `tables`."""
        R = cos_BTR.shape[-1]
        x_BHTR = x_BHTD[..., :R]
        if self.pairs == "halves":
            first, second = x_BHTR.chunk(2, -1)
            partner_BHTR = torch.cat([-second, first], -1)
        else:
            partner_BHTR = torch.stack([-x_BHTR[..., 1::2], x_BHTR[..., ::2]], -1).flatten(-2)
        y_BHTR = (x_BHTR * cos_BTR[:, None] + partner_BHTR * sin_BTR[:, None]).to(x_BHTD.dtype)
        return y_BHTR if x_BHTD.shape[-1] == R else torch.cat([y_BHTR, x_BHTD[..., R:]], -1)


_known: dict[tuple[type[nn.Module], int, int], Rotation] = {}


@torch.no_grad()
def rotation_of(module: nn.Module, hidden_BTM: Tensor, cos_BTK: Tensor, look: Look) -> Rotation:
    """The convention of an attention module, which `look` runs as far as its attention function.

    Raises UserError, naming the module's class, where none fits: rotary embedding is not the last thing that it does to
    its queries and keys.
    """
    known = _known.get((type(module), cos_BTK.shape[-1], hidden_BTM.shape[-1]))
    if known is not None:
        return known
    generator = torch.Generator().manual_seed(0)
    x_1TM = torch.randn(1, TRIED, hidden_BTM.shape[-1], generator=generator).to(hidden_BTM)
    tables = [torch.randn(1, TRIED, cos_BTK.shape[-1], generator=generator).to(cos_BTK) for _ in range(2)]
    plain = look(module, x_1TM, (torch.ones_like(tables[0]), torch.zeros_like(tables[0])))
    wanted = look(module, x_1TM, (tables[0], tables[1]))
    fitting = [
        rotation
        for rotation in starmap(Rotation, product(get_args(Pairs), get_args(Columns)))
        if all(_fits(rotation, x, y, (tables[0], tables[1])) for x, y in zip(plain, wanted, strict=True))
    ]
    if not fitting:
        raise UserError(
            f"{type(module).__name__} turns its queries and keys in a way that Subquad does not know, so that heads "
            "with and without rotary embedding cannot share a layer: set rotary: true among the mixer's options"
        )
    if len(fitting) == 1:  # weights of zero fit all: ask again when they have learned something
        _known[type(module), cos_BTK.shape[-1], hidden_BTM.shape[-1]] = fitting[0]
    return fitting[0]


def _fits(rotation: Rotation, x_BHTD: Tensor, wanted_BHTD: Tensor, tables: Tables) -> bool:
    cos_BTR, sin_BTR = rotation.tables(*tables)
    if cos_BTR.shape[-1] > x_BHTD.shape[-1] or cos_BTR.shape[-1] % 2:
        return False
    error = (rotation.turned(x_BHTD, cos_BTR, sin_BTR) - wanted_BHTD).abs().max()
    return bool(error <= 8 * torch.finfo(x_BHTD.dtype).eps * wanted_BHTD.abs().max())
