"""Products of queries and keys with one decay per key channel: s_ij = sum_n x_in e^{c_in - d_jn} y_jn for j <= i.

The exponents are never positive, so no decay overflows. e^{c_i - d_j} cannot be split into a factor of i and a factor
of j for all pairs, because one of them would overflow. It can be split for queries and keys on two sides of a boundary
r, where e^{c_i - r} and e^{r - d_j} are both at most 1. So a chunk is halved recursively: the products across the
halves are one matrix product, and each half is a smaller chunk. Only blocks of a few tokens compute the (C, C, N)
exponentials. This is GLA's secondary chunking (arXiv 2312.06635, section 4.3), applied recursively. The gradients use
the same scheme:

    dx_in = sum_j ds_ij e^{..} y_jn,   dy_jn = sum_i ds_ij e^{..} x_in,   dc = x dx,   dd = -y dy.

Legend: L all leading dimensions flattened (batch, heads, chunks), R queries that share a decay, S keys that share a
decay, C time within a chunk, A the half of C, N key width.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK = 4  # tokens of a block that is not halved further
AT_ONCE = 1 << 20  # elements of the (C, C, N) products computed together, which should fit a processor's cache


def decayed_products(x_LRCN: Tensor, c_LCN: Tensor, y_LSCN: Tensor, d_LCN: Tensor) -> Tensor:
    """Compute s (L, R, S, C, C), zero for j > i.

    `c` and `d` are cumulated log decays. c_i - d_j must not be positive for j <= i.
    """
    result: Tensor = _DecayedProducts.apply(x_LRCN, c_LCN, y_LSCN, d_LCN)
    return result


class _DecayedProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_LRCN: Tensor, c_LCN: Tensor, y_LSCN: Tensor, d_LCN: Tensor) -> Tensor:
        ctx.save_for_backward(x_LRCN, c_LCN, y_LSCN, d_LCN)
        return _products(x_LRCN, c_LCN, y_LSCN, d_LCN)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x_LRCN, c_LCN, y_LSCN, d_LCN = ctx.saved_tensors
        dx, dy = gradients(grads[0], x_LRCN, c_LCN, y_LSCN, d_LCN)
        return dx, (x_LRCN * dx).sum(1), dy, -(y_LSCN * dy).sum(1)


def _products(x_LRCN: Tensor, c_LCN: Tensor, y_LSCN: Tensor, d_LCN: Tensor) -> Tensor:
    L, R, C, _ = x_LRCN.shape
    if C <= BLOCK or C % 2:
        return _exact(x_LRCN, c_LCN, y_LSCN, d_LCN)
    A, S = C // 2, y_LSCN.shape[1]
    late_decay, early_decay = _boundary_decays(c_LCN, d_LCN)
    reads_LQN, keys_LKN = (x_LRCN[:, :, A:] * late_decay).flatten(1, 2), (y_LSCN[:, :, :A] * early_decay).flatten(1, 2)
    half_products = _products(*(_halve(z) for z in (x_LRCN, c_LCN, y_LSCN, d_LCN))).unflatten(0, (L, 2))
    s_LRSCC = x_LRCN.new_zeros(L, R, S, C, C)
    s_LRSCC[..., :A, :A], s_LRSCC[..., A:, A:] = half_products.unbind(1)
    s_LRSCC[..., A:, :A] = (reads_LQN @ keys_LKN.transpose(-1, -2)).view(L, R, A, S, A).transpose(2, 3)
    return s_LRSCC


def gradients(ds_LRSCC: Tensor, x_LRCN: Tensor, c_LCN: Tensor, y_LSCN: Tensor, d_LCN: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of x and y from those of the products."""
    L, R, C, _ = x_LRCN.shape
    if C <= BLOCK or C % 2:
        return _exact_gradients(ds_LRSCC, x_LRCN, c_LCN, y_LSCN, d_LCN)
    A, S = C // 2, y_LSCN.shape[1]
    late_decay, early_decay = _boundary_decays(c_LCN, d_LCN)
    reads_LQN, keys_LKN = (x_LRCN[:, :, A:] * late_decay).flatten(1, 2), (y_LSCN[:, :, :A] * early_decay).flatten(1, 2)
    half_gradients = torch.stack([ds_LRSCC[..., :A, :A], ds_LRSCC[..., A:, A:]], 1).flatten(0, 1)
    dx, dy = gradients(half_gradients, *(_halve(z) for z in (x_LRCN, c_LCN, y_LSCN, d_LCN)))
    dx_LRCN, dy_LSCN = (z.unflatten(0, (L, 2)).transpose(1, 2).flatten(2, 3) for z in (dx, dy))
    across_LQK = ds_LRSCC[..., A:, :A].transpose(2, 3).reshape(L, R * A, S * A)
    dx_LRCN[:, :, A:] += (across_LQK @ keys_LKN).unflatten(1, (R, A)) * late_decay
    dy_LSCN[:, :, :A] += (across_LQK.transpose(-1, -2) @ reads_LQN).unflatten(1, (S, A)) * early_decay
    return dx_LRCN, dy_LSCN


def _halve(z: Tensor) -> Tensor:
    """Split every chunk into two chunks: (L, .., C, N) -> (2 L, .., A, N)."""
    return z.unflatten(-2, (2, -1)).movedim(-3, 1).flatten(0, 1)


def _boundary_decays(c_LCN: Tensor, d_LCN: Tensor) -> tuple[Tensor, Tensor]:
    """Compute e^{c_i - r} of the later half and e^{r - d_j} of the earlier: (L, 1, A, N) each.

    The boundary r is d at the end of the earlier half.
    """
    A = c_LCN.shape[1] // 2
    boundary_L1N = d_LCN[:, A - 1 : A]
    return (c_LCN[:, A:] - boundary_L1N).exp().unsqueeze(1), (boundary_L1N - d_LCN[:, :A]).exp().unsqueeze(1)


def _exact(x_LRCN: Tensor, c_LCN: Tensor, y_LSCN: Tensor, d_LCN: Tensor) -> Tensor:
    parts = []
    for x, c, y, d in _slices(x_LRCN, c_LCN, y_LSCN, d_LCN):
        # Matrix products over n, one for each query position: (R, N) with (S C, N).
        keys = (_decay(c, d).unsqueeze(2) * y.transpose(1, 2).unsqueeze(1).transpose(2, 3)).flatten(2, 3)
        scores = x.transpose(1, 2) @ keys.transpose(-1, -2)
        parts.append(scores.unflatten(-1, (y.shape[1], -1)).permute(0, 2, 3, 1, 4))
    return torch.cat(parts)


def _exact_gradients(
    ds_LRSCC: Tensor, x_LRCN: Tensor, c_LCN: Tensor, y_LSCN: Tensor, d_LCN: Tensor
) -> tuple[Tensor, Tensor]:
    parts = []
    for x, c, y, d, ds in _slices(x_LRCN, c_LCN, y_LSCN, d_LCN, ds_LRSCC):
        decay_LCCN = _decay(c, d)
        dx, dy = torch.zeros_like(x), torch.zeros_like(y)
        for s in range(y.shape[1]):  # at each query position i: (R, C) with (C, N)
            dx += (ds[:, :, s].transpose(1, 2) @ (decay_LCCN * y[:, s].unsqueeze(1))).transpose(1, 2)
        for r in range(x.shape[1]):  # at each key position j: (S, C) with (C, N)
            decayed_x = (decay_LCCN * x[:, r].unsqueeze(2)).transpose(1, 2)
            dy += (ds[:, r].permute(0, 3, 1, 2) @ decayed_x).transpose(1, 2)
        parts.append((dx, dy))
    dx_LRCN, dy_LSCN = (torch.cat(part) for part in zip(*parts, strict=True))
    return dx_LRCN, dy_LSCN


def _decay(c_LCN: Tensor, d_LCN: Tensor) -> Tensor:
    """Compute e^{c_i - d_j} for j <= i, else 0: (L, C, C, N)."""
    C = c_LCN.shape[1]
    causal_CC = torch.ones(C, C, dtype=torch.bool, device=c_LCN.device).tril()
    return (c_LCN.unsqueeze(2) - d_LCN.unsqueeze(1)).masked_fill_(~causal_CC.unsqueeze(-1), -torch.inf).exp_()


def _slices(*tensors: Tensor) -> Any:
    """Split the tensors along their first dimension into slices of at most AT_ONCE products."""
    C, N = tensors[1].shape[-2:]
    size = max(1, AT_ONCE // (C * C * N))
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)
