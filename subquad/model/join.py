"""Recolouring adapter, which joins attention and a recurrence that runs on all heads of a layer.

Under the parallel join, a layer has two branches with one output projection: the mixer on every head gives u, and the
retained attention heads give v through their own columns of that projection. The adapter gives v the mean and the
standard deviation of u, token by token, maps it linearly, and averages the two branches. So attention of any magnitude
cannot drown out a recurrence that is not yet trained.

Source: Retrieval-Aware Distillation (arXiv 2602.11374, section 4.2), as its official code runs it
(`DoubleBlockAdapter`).

Legend: B batch, T tokens, H query heads, D head width, M hidden width of the model.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from subquad.errors import UserError
from subquad.mixers import HeadGroup
from subquad.ops.common import wide
from subquad.plan import JoinStart

EPS = 1e-5


@dataclass(frozen=True)
class Branch:
    """Output of the retained heads of a layer, before the output projection: y (B, T, heads of the group, D)."""

    group: HeadGroup
    y_BTHD: Tensor


class RecolouringAdapter(nn.Module):
    """(u + W v' + b) / 2 with v' = (v - mean v) / (std v + eps) (std u + eps) + mean u over the channels of each token.

    `start`: initial map, the identity or random as in `nn.Linear` (the official code). It is no `nn.Linear` itself: a
    low-rank adapter around it would read u, where the map reads v'.
    """

    def __init__(self, hidden_size: int, start: JoinStart = "identity") -> None:
        super().__init__()
        linear = nn.Linear(hidden_size, hidden_size)
        self.weight, self.bias = linear.weight, linear.bias
        if start == "identity":
            nn.init.eye_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, u_BTM: Tensor, v_BTM: Tensor) -> Tensor:
        u, v = wide(u_BTM), wide(v_BTM)
        std_u, mean_u = torch.std_mean(u, -1, keepdim=True, correction=0)
        std_v, mean_v = torch.std_mean(v, -1, keepdim=True, correction=0)
        recoloured = (v - mean_v) / (std_v + EPS) * (std_u + EPS) + mean_u
        return (u_BTM + F.linear(recoloured.to(u_BTM.dtype), self.weight, self.bias)) / 2


def output_projection(module: nn.Module, width: int, hidden_size: int) -> str:
    """Name of an attention module's output projection: its last linear map from `width` channels to `hidden_size`.

    A wrapped or quantised map is recognised by the sizes that it states. Raises UserError, naming the module's class,
    if there is none.
    """
    for name, child in reversed([*module.named_children()]):
        if _sizes(child) == (width, hidden_size):
            return name
    raise UserError(
        f"the parallel join does not find the output projection of {type(module).__name__}: use the split join"
    )


def _sizes(linear: nn.Module) -> tuple[Any, Any]:
    """Channels that a linear map reads and writes, as `nn.Linear`, transformers' Conv1D and their wrappers state."""
    if isinstance(linear, Conv1D):
        return linear.nx, linear.nf
    return getattr(linear, "in_features", None), getattr(linear, "out_features", None)


def project_branch(projection: nn.Module, branch: Branch, heads: int) -> Tensor:
    """Output projection of the branch's heads alone, (B, T, M), without the bias, which the other branch includes.

    `heads`: number of all heads. The projection is called, with zeros for the other heads: its weight may be
    quantised, on another device, or have a low-rank adapter. A last token of zeros gives the bias.
    """
    B, T, _, D = branch.y_BTHD.shape
    zero_BTD = branch.y_BTHD.new_zeros(1, 1, 1).expand(B, T, D)
    columns = dict(zip(branch.group.heads, branch.y_BTHD.unbind(2), strict=True))
    x_BTX = torch.cat([columns.get(head, zero_BTD) for head in range(heads)], -1)
    v_BTM: Tensor = projection(F.pad(x_BTX, (0, 0, 0, 1)))
    return v_BTM[:, :-1] - v_BTM[:, -1:]
