"""Mamba-2: one input-dependent decay a head, a discretised write, a short convolution.

Legend: B batch, H query heads, G state heads, T new tokens, D head width, M hidden width, W convolution width.
"""

import math
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor, nn

from subquad.mixers.base import HeadGroup, Mixer, MixerInputs, Options, ScaledNormGate, State, masked
from subquad.ops import decay_chunk, decay_step
from subquad.ops.common import wide


class Mamba2Options(Options):
    conv: int = Field(4, ge=1, description="width of the causal convolution on q, k and v; 1: none")
    gate_rank: int = Field(16, ge=1, description="rank of the output gate's projection")
    share_state: bool = Field(False, description="one state a key/value head (smaller) instead of one a query head")


class Mamba2(Mixer):
    """S_t = e^{-A dt_t} S_{t-1} + dt_t k_t v_t^T, y_t = gate * norm(q_t S_t + D v_t), dt = softplus(W x + bias).

    In the names of the paper C = q, B = k, x = v. The convolution starts as the identity, without activation, D at
    zero, memory long (A dt = 0.001), the gate open and the output scale fitted.
    Source: Mamba-2 (arXiv 2405.21060, eq. 16 and section 7).
    """

    options_class = Mamba2Options
    options: Mamba2Options

    def __init__(self, group: HeadGroup, options: Mamba2Options) -> None:
        super().__init__(group, options)
        self.states = group.states(options.share_state)
        kv_heads = self.states
        if options.conv > 1:
            self.conv_q_HWD, self.conv_k_GWD, self.conv_v_GWD = (
                nn.Parameter(self.identity(heads, options.conv, group.head_dim))
                for heads in (len(group.heads), kv_heads, kv_heads)
            )
        self.dt = nn.Linear(group.hidden_size, self.states)
        nn.init.normal_(self.dt.weight, std=0.02 / math.sqrt(group.hidden_size))
        nn.init.constant_(self.dt.bias, math.log(math.expm1(1.0)))  # dt = 1
        self.A_log_G = nn.Parameter(torch.full((self.states,), math.log(1e-3)))
        self.D_H = nn.Parameter(torch.zeros(len(group.heads)))
        self.output = ScaledNormGate(len(group.heads), group.head_dim, group.hidden_size, options.gate_rank)

    @staticmethod
    def identity(heads: int, width: int, head_dim: int) -> Tensor:
        """A causal convolution that passes its input on: the last tap is 1."""
        weight = torch.zeros(heads, width, head_dim)
        weight[:, -1] = 1.0
        return weight

    def prepare(self, inputs: MixerInputs, state: State) -> tuple[MixerInputs, State]:
        inputs = self.shared(inputs, self.options.share_state)
        real = inputs.real_BT
        q, k, v = masked(inputs.q_BHTD, real), masked(inputs.k_BGTD, real), masked(inputs.v_BGTD, real)
        if self.options.conv == 1:
            return replace(inputs, q_BHTD=q, k_BGTD=k, v_BGTD=v), {}
        q, conv_q = self.convolve(q, self.conv_q_HWD, state.get("conv_q"))
        k, conv_k = self.convolve(k, self.conv_k_GWD, state.get("conv_k"))
        v, conv_v = self.convolve(v, self.conv_v_GWD, state.get("conv_v"))
        new = {"conv_q": conv_q, "conv_k": conv_k, "conv_v": conv_v}
        return replace(inputs, q_BHTD=q, k_BGTD=k, v_BGTD=v), new

    @staticmethod
    def convolve(x_BHTD: Tensor, weight_HWD: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Causal depthwise convolution over time, and the last W - 1 inputs."""
        T, width = x_BHTD.shape[2], weight_HWD.shape[1]
        if before is None:
            extended = nn.functional.pad(x_BHTD, (0, 0, width - 1, 0))
        else:
            extended = torch.cat([before, x_BHTD], 2)
        taps = [extended[:, :, tap : tap + T] * weight_HWD[:, tap, None] for tap in range(width)]
        return sum(taps[1:], taps[0]), extended[:, :, T:]

    def mix(self, inputs: MixerInputs, state: State) -> tuple[Tensor, State]:
        dt_BGT = nn.functional.softplus(wide(self.dt(inputs.hidden_BTM))).transpose(1, 2)
        form = decay_step if inputs.q_BHTD.shape[2] == 1 else decay_chunk
        y_BHTD, new = form(
            inputs.q_BHTD * inputs.scale,
            masked(inputs.k_BGTD * dt_BGT.unsqueeze(-1).to(inputs.k_BGTD.dtype), inputs.real_BT),
            inputs.v_BGTD,
            masked(-wide(self.A_log_G).exp()[:, None] * dt_BGT, inputs.real_BT),
            state.get("recurrent"),
        )
        skip = inputs.v_BGTD.repeat_interleave(y_BHTD.shape[1] // inputs.v_BGTD.shape[1], 1)
        return y_BHTD + self.D_H[:, None, None] * skip, {"recurrent": new}

    def finish(self, y_BHTD: Tensor, inputs: MixerInputs) -> Tensor:
        return self.output(y_BHTD, inputs.hidden_BTM)

    @classmethod
    def state_bytes(cls, group: HeadGroup, options: Mamba2Options, context: int, itemsize: int) -> int:
        states = group.states(options.share_state)
        conv = (options.conv - 1) * (len(group.heads) + 2 * states) * group.head_dim * itemsize
        return states * group.head_dim**2 * 4 + conv

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target_BHTD: Tensor) -> None:
        prepared, _ = self.prepare(inputs, {})
        self.output.calibrate(self.mix(prepared, {})[0], target_BHTD)
