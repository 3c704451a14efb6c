"""Shared parts of the mixers: pad masks, short convolutions, feature maps, and the output's norm and gate.

Legend: B batch, H heads, T new tokens, D head width, F features, M hidden width of the model, W convolution width.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from subquad.ops.common import joined, wide
from subquad.ops.padding import Padding

OPEN = 1.278464542761  # silu(OPEN) = 1, a gate without effect (from Phi-Mamba)


def masked(x_BGT_: Tensor, real_BT: Tensor | None) -> Tensor:
    """Zero the pad positions. A zero key, write strength or log decay leaves a recurrent state unchanged."""
    if real_BT is None:
        return x_BGT_
    shape = (real_BT.shape[0], 1, real_BT.shape[1]) + (1,) * (x_BGT_.dim() - 3)
    return x_BGT_ * real_BT.view(shape).to(x_BGT_.dtype)


def unit(x_BHTD: Tensor) -> Tensor:
    """Normalise vectors to length 1.

    As in the kernels of flash-linear-attention, 1e-6 inside the root bounds the gradient near zero.
    """
    wide_BHTD = wide(x_BHTD)
    return (wide_BHTD * (wide_BHTD.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x_BHTD.dtype)


def small_linear(hidden_size: int, out: int, bias: float) -> nn.Linear:
    """Make a gate's projection that starts almost constant: weights of std 0.02 / sqrt(M), and the given bias."""
    linear = nn.Linear(hidden_size, out)
    nn.init.normal_(linear.weight, std=0.02 / hidden_size**0.5)
    nn.init.constant_(linear.bias, bias)
    return linear


def spread_decays(states: int) -> tuple[Tensor, Tensor]:
    """Draw A (uniform in [1, 16]) and dt (log-uniform in [0.001, 0.1]) per state, as Mamba-2 is initialised."""
    return torch.empty(states).uniform_(1, 16), torch.empty(states).uniform_(math.log(1e-3), math.log(1e-1)).exp()


class LowRank(nn.Sequential):
    """A linear map of the hidden states through `rank` channels, or a full-rank one for None. Starts constant."""

    def __init__(self, hidden_size: int, out: int, rank: int | None, bias: float) -> None:
        output_map = nn.Linear(hidden_size if rank is None else rank, out)
        nn.init.zeros_(output_map.weight)
        nn.init.constant_(output_map.bias, bias)
        super().__init__(*([] if rank is None else [nn.Linear(hidden_size, rank, bias=False)]), output_map)


class ShortConv(nn.Module):
    """Causal depthwise convolution over time, initialised to the identity (last tap 1), with silu if `activation`."""

    def __init__(self, heads: int, width: int, head_dim: int, *, activation: bool) -> None:
        super().__init__()
        weight_HWD = torch.zeros(heads, width, head_dim)
        weight_HWD[:, -1] = 1.0
        self.weight_HWD = nn.Parameter(weight_HWD)
        self.bias_HD = nn.Parameter(torch.zeros(heads, head_dim))
        self.activation = activation

    def forward(
        self, x_BHTD: Tensor, before_BHWD: Tensor | None, padding: Padding | None = None
    ) -> tuple[Tensor, Tensor]:
        """Convolve the input, in which pads are zero.

        Also returns the last W - 1 inputs, which the next call takes as `before_BHWD`.
        """
        T, width = x_BHTD.shape[2], self.weight_HWD.shape[1]
        if before_BHWD is None:
            extended = nn.functional.pad(x_BHTD, (0, 0, width - 1, 0))
        else:
            extended = joined(before_BHWD, x_BHTD) if padding is None else padding.extend(before_BHWD, x_BHTD)
        if T == 1:  # decoding: as many inputs as taps
            y_BHTD = (extended * self.weight_HWD).sum(2, keepdim=True) + self.bias_HD[:, None]
            return nn.functional.silu(y_BHTD) if self.activation else y_BHTD, extended[:, :, 1:]
        taps = [extended[:, :, tap : tap + T] * self.weight_HWD[:, tap, None] for tap in range(width)]
        y_BHTD = sum(taps[1:], taps[0]) + self.bias_HD[:, None]
        return nn.functional.silu(y_BHTD) if self.activation else y_BHTD, extended[:, :, T:]


class FeatureMap(nn.Module):
    """phi(x) = [softmax(x W), softmax(-x W)] per head: positive features that can be as peaked as a softmax.

    W starts as the identity (or some of its columns), scaled so that q and k each carry the root of attention's scale.
    Source: Hedgehog (arXiv 2402.04347, eq. 6), in LoLCATs' form.
    """

    def __init__(self, heads: int, head_dim: int, features: int) -> None:
        super().__init__()
        columns = torch.arange(features) * head_dim // features  # spread over all rotary frequencies
        start_DF = torch.eye(head_dim)[:, columns]
        self.weight_HDF = nn.Parameter(start_DF.repeat(heads, 1, 1) * head_dim**-0.25)

    def forward(self, x_BHTD: Tensor) -> Tensor:
        projected = wide(x_BHTD @ self.weight_HDF)
        return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], -1)


class Scale(nn.Module):
    """A learned scale per output channel, fitted to the teacher on a calibration batch."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.scale_HD = nn.Parameter(torch.ones(heads, head_dim))

    def forward(self, y_BHTD: Tensor, hidden_BTM: Tensor) -> Tensor:
        return y_BHTD * self.scale_HD[:, None]

    @torch.no_grad()
    def calibrate(self, y_BHTD: Tensor, hidden_BTM: Tensor, target_BHTD: Tensor) -> None:
        """Fit the scale of each channel from the recurrence's output to the target, by least squares."""
        self.scale_HD.fill_(1.0)
        y, target = wide(self(y_BHTD, hidden_BTM)), wide(target_BHTD)
        self.scale_HD.copy_((y * target).sum((0, 2)) / (y * y).sum((0, 2)).clamp_min(1e-12))


class Output(Scale):
    """The output stage of a recurrence: a norm per head, a gate silu(W x) and a scale. The gate starts open.

    `norm` sets the order:

    - "first": scale * norm(y) * gate (RetNet, GLA, gated DeltaNet)
    - "last": scale * norm(y * gate) (Mamba-2)
    - None: scale * y * gate (Phi-Mamba, RAD-RWKV)
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        hidden_size: int,
        *,
        rank: int | None,
        norm: Literal["first", "last"] | None = "first",
    ) -> None:
        super().__init__(heads, head_dim)
        self.heads = heads
        self.norm = norm
        self.gate = LowRank(hidden_size, heads * head_dim, rank, OPEN)

    def forward(self, y_BHTD: Tensor, hidden_BTM: Tensor) -> Tensor:
        gate_BTHD = nn.functional.silu(self.gate(hidden_BTM)).unflatten(-1, (self.heads, -1))
        y_BHTD = (_normalised(y_BHTD) if self.norm == "first" else y_BHTD) * gate_BTHD.transpose(1, 2)
        return super().forward(_normalised(y_BHTD) if self.norm == "last" else y_BHTD, hidden_BTM)


def _normalised(y_BHTD: Tensor) -> Tensor:
    return nn.functional.rms_norm(wide(y_BHTD), y_BHTD.shape[-1:], eps=1e-6).to(y_BHTD.dtype)
