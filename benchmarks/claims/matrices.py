"""Distance of a teacher's attention matrices from families of matrices: each on its own, by the best fit found.

    toeplitz    causal, one value a diagonal: the least squares are the means of the diagonals
    low_rank    the causal part of C B^T with N columns
    ssd         the causal part of C B^T times e^(c_i - c_j), c the cumulated log decays: one decay a token

The latter two have no closed form under a causal mask; they start at the truncated SVD of the matrix and are fitted by
Adam. An error is |M - A|_F, the mean over matrices (MOHAWK, arXiv 2408.10189, table 2: Llama-2-7B, other text).

Legend: X matrices, T tokens, N columns.
"""

import torch
from torch import Tensor

STEPS, RATE = 400, 3e-2


def toeplitz(a_XTT: Tensor) -> Tensor:
    """The nearest causal Toeplitz matrices."""
    T = a_XTT.shape[-1]
    lag_TT = torch.arange(T)[:, None] - torch.arange(T)
    sums_XT = torch.stack([a_XTT.diagonal(-lag, 1, 2).mean(-1) for lag in range(T)], -1)
    return sums_XT[:, lag_TT.clamp_min(0)].tril()


def fitted(a_XTT: Tensor, columns: int, *, decay: bool) -> Tensor:
    """The best causal matrices of this many columns that Adam finds, with a decay a token or without."""
    left, values, right = torch.linalg.svd(a_XTT)
    root_X1N = values[:, None, :columns].sqrt()
    c_XTN = (left[:, :, :columns] * root_X1N).requires_grad_()
    b_XTN = (right.transpose(1, 2)[:, :, :columns] * root_X1N).requires_grad_()
    weights = [c_XTN, b_XTN]
    if decay:
        gate_XT = torch.full(a_XTT.shape[:2], 4.0).requires_grad_()
        weights.append(gate_XT)
    optimizer = torch.optim.Adam(weights, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    best_X = torch.full(a_XTT.shape[:1], torch.inf)
    best_XTT = torch.zeros_like(a_XTT)
    for _ in range(STEPS):
        m_XTT = (c_XTN @ b_XTN.transpose(1, 2)).tril()
        if decay:
            log_XT = torch.nn.functional.logsigmoid(gate_XT).cumsum(1)
            m_XTT = m_XTT * (log_XT[:, :, None] - log_XT[:, None]).clamp_max(0.0).exp()
        error_X = (m_XTT - a_XTT).square().sum((1, 2))
        better = error_X < best_X
        best_X = torch.where(better, error_X.detach(), best_X)
        best_XTT = torch.where(better[:, None, None], m_XTT.detach(), best_XTT)
        optimizer.zero_grad()
        error_X.sum().backward()
        optimizer.step()
        schedule.step()
    return best_XTT


def error(m_XTT: Tensor, a_XTT: Tensor) -> list[float]:
    """Frobenius norm of each difference."""
    return torch.linalg.matrix_norm(m_XTT - a_XTT).tolist()
