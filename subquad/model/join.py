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

import torch
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


class RecolouringAdapter(nn.Linear):
    """(u + W v' + b) / 2 with v' = (v - mean v) / (std v + eps) (std u + eps) + mean u over the channels of each token.

    `start`: initial map, the identity or random as in `nn.Linear` (the official code).
    """

    def __init__(self, hidden_size: int, start: JoinStart = "identity") -> None:
        super().__init__(hidden_size, hidden_size)
        if start == "identity":
            nn.init.eye_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, u_BTM: Tensor, v_BTM: Tensor) -> Tensor:  # type: ignore[override]  # two inputs
        u, v = wide(u_BTM), wide(v_BTM)
        std_u, mean_u = torch.std_mean(u, -1, keepdim=True, correction=0)
        std_v, mean_v = torch.std_mean(v, -1, keepdim=True, correction=0)
        recoloured = (v - mean_v) / (std_v + EPS) * (std_u + EPS) + mean_u
        return (u_BTM + super().forward(recoloured.to(u_BTM.dtype))) / 2


def output_projection(module: nn.Module, width: int, hidden_size: int) -> nn.Module:
    """Output projection of an attention module: its last linear map from `width` channels to `hidden_size`.

    Raises UserError, naming the module's class, if there is none.
    """
    for child in reversed([*module.children()]):
        if isinstance(child, nn.Linear | Conv1D):
            shape = tuple(child.weight.shape) if isinstance(child, Conv1D) else (child.in_features, child.out_features)
            if shape == (width, hidden_size):
                return child
    raise UserError(
        f"the parallel join does not find the output projection of {type(module).__name__}: use the split join"
    )


def project_branch(projection: nn.Module, branch: Branch) -> Tensor:
    """Output projection of the branch's heads alone, (B, T, M), without the bias, which the other branch includes."""
    weight: Tensor = projection.weight  # type: ignore[assignment]
    weight_XM = weight if isinstance(projection, Conv1D) else weight.T
    width = branch.y_BTHD.shape[-1]
    # Slices are views, so no index tensor is copied to the device.
    columns = [weight_XM[head * width : (head + 1) * width] for head in branch.group.heads]
    return branch.y_BTHD.flatten(2) @ torch.cat(columns)
