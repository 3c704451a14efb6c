"""Products of queries and keys under a decay of every key channel: s_ij = sum_n x_in e^{c_in - d_jn} y_jn for j <= i.

The exponents are never positive, so nothing overflows, however strong the decay; that is why the exponential cannot be
split into a factor of i and one of j and made a matrix product. The (C, C, N) products exist only a few chunks at a
time, in the forward pass and again in the backward, which needs no more than them:

    dx_in = sum_j ds_ij e^{..} y_jn,   dy_jn = sum_i ds_ij e^{..} x_in,   dc = x dx,   dd = -y dy.

Legend: L all leading dimensions at once (batch, heads, chunks), R queries that share a decay, S keys that share a
decay, C time within a chunk, N key width.
"""

from typing import Any

import torch
from torch import Tensor

AT_ONCE = 1 << 20  # elements of the (C, C, N) products that exist together: they should stay in a processor's cache


def decayed_products(x_LRCN: Tensor, c_LCN: Tensor, y_LSCN: Tensor, d_LCN: Tensor) -> Tensor:
    """s (L, R, S, C, C), zero where j > i.

    Where an entry counts, c_i - d_j must not be positive: `c` and `d` are cumulated log decays.
    """
    result: Tensor = _DecayedProducts.apply(x_LRCN, c_LCN, y_LSCN, d_LCN)
    return result


def _decay(c_LCN: Tensor, d_LCN: Tensor) -> Tensor:
    """e^{c_i - d_j} where j <= i, else 0: (L, C, C, N)."""
    C = c_LCN.shape[1]
    seen_CC = torch.ones(C, C, dtype=torch.bool, device=c_LCN.device).tril()
    return (c_LCN.unsqueeze(2) - d_LCN.unsqueeze(1)).masked_fill_(~seen_CC.unsqueeze(-1), -torch.inf).exp_()


class _DecayedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_LRCN: Tensor, c_LCN: Tensor, y_LSCN: Tensor, d_LCN: Tensor) -> Tensor:
        ctx.save_for_backward(x_LRCN, c_LCN, y_LSCN, d_LCN)
        parts = []
        for x, c, y, d in _slices(x_LRCN, c_LCN, y_LSCN, d_LCN):
            decay = _decay(c, d)
            # matrix products over n, one for each query position: (R, N) with (S C, N)
            keys = (decay.unsqueeze(2) * y.transpose(1, 2).unsqueeze(1).transpose(2, 3)).flatten(2, 3)
            scores = x.transpose(1, 2) @ keys.transpose(-1, -2)
            parts.append(scores.unflatten(-1, (y.shape[1], -1)).permute(0, 2, 3, 1, 4))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_LRCN, c_LCN, y_LSCN, d_LCN = ctx.saved_tensors
        dx, dy = gradients(grads[0], x_LRCN, c_LCN, y_LSCN, d_LCN)
        return dx, (x_LRCN * dx).sum(1), dy, -(y_LSCN * dy).sum(1)


def gradients(ds_LRSCC: Tensor, x_LRCN: Tensor, c_LCN: Tensor, y_LSCN: Tensor, d_LCN: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the products' arguments x and y, from the products' own."""
    parts = []
    for x, c, y, d, ds in _slices(x_LRCN, c_LCN, y_LSCN, d_LCN, ds_LRSCC):
        decay_LCCN = _decay(c, d)
        dx, dy = torch.zeros_like(x), torch.zeros_like(y)
        for s in range(y.shape[1]):  # at each query position i: (R, C) with (C, N)
            dx += (ds[:, :, s].transpose(1, 2) @ (decay_LCCN * y[:, s].unsqueeze(1))).transpose(1, 2)
        for r in range(x.shape[1]):  # at each key position j: (S, C) with (C, N)
            seen_by = (decay_LCCN * x[:, r].unsqueeze(2)).transpose(1, 2)
            dy += (ds[:, r].permute(0, 3, 1, 2) @ seen_by).transpose(1, 2)
        parts.append((dx, dy))
    dx_LRCN, dy_LSCN = (torch.cat(part) for part in zip(*parts, strict=True))
    return dx_LRCN, dy_LSCN


def _slices(*tensors: Tensor) -> Any:
    """The tensors in slices of their first dimension."""
    C, N = tensors[1].shape[-2:]
    size = max(1, AT_ONCE // (C * C * N))
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)
