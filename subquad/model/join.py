"""How attention joins a recurrence that runs on all the heads of a layer: the recolouring adapter.

Under the parallel join a layer is two branches with one output projection: the mixer on every head gives u, and the
retained heads, which attend, give v by their own columns of that projection. The adapter gives v the mean and the
deviation of u, token by token, maps it, and takes the mean of the two. So attention cannot drown a recurrence that has
still to be trained, whatever its size.

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
    """What the retained heads of a layer give, before the output projection: y (B, T, heads of the group, D)."""

    group: HeadGroup
    y_BTHD: Tensor


class RecolouringAdapter(nn.Linear):
    """(u + W v' + b) / 2 with v' = (v - mean v) / (std v + eps) (std u + eps) + mean u over the channels of each token.

    `start`: the map is the identity at first, or random as `nn.Linear`'s (the official code's).
    """

    def __init__(self, hidden_size: int, start: JoinStart = "identity") -> None:
        super().__init__(hidden_size, hidden_size)
        if start == "identity":
            nn.init.eye_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, u_BTM: Tensor, v_BTM: Tensor) -> Tensor:  # type: ignore[override]  # it joins two
        u, v = wide(u_BTM), wide(v_BTM)
        std_u, mean_u = torch.std_mean(u, -1, keepdim=True, correction=0)
        std_v, mean_v = torch.std_mean(v, -1, keepdim=True, correction=0)
        recoloured = (v - mean_v) / (std_v + EPS) * (std_u + EPS) + mean_u
        return (u_BTM + super().forward(recoloured.to(u_BTM.dtype))) / 2


def output_projection(module: nn.Module, width: int, hidden_size: int) -> nn.Module:
    """The output projection of an attention module: the last linear map it has from `width` channels to `hidden_size`.

    Raises UserError, naming the module's class, where it has none.
    """
    for child in reversed([*module.children()]):
        if isinstance(child, nn.Linear | Conv1D):
            shape = tuple(child.weight.shape) if isinstance(child, Conv1D) else (child.in_features, child.out_features)
            if shape == (width, hidden_size):
                return child
    raise UserError(
        f"the parallel join does not find the output projection of {type(module).__name__}: use the split join"
    )


def projected(projection: nn.Module, branch: Branch) -> Tensor:
    """W_o of the branch's heads alone, (B, T, M), without the bias, which the other branch has."""
    weight: Tensor = projection.weight  # type: ignore[assignment]
    weight_XM = weight if isinstance(projection, Conv1D) else weight.T
    width = branch.y_BTHD.shape[-1]
    columns = [weight_XM[head * width : (head + 1) * width] for head in branch.group.heads]  # views: no index to send
    return branch.y_BTHD.flatten(2) @ torch.cat(columns)
