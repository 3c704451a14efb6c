"""What every token mixer is: y = M(x) v with a causal T x T matrix M, in three forms that agree.

A mixer gets the teacher's own queries, keys and values (after its projections, norms and rotary embedding) and returns
one output per query head; the teacher's output projection follows. It works in three steps, so that the linear part
stands alone: `prepare` (short convolutions), `mix` (linear in the values: `chunk` for many tokens, `step` for one) and
`finish` (norms and gates). `matrix` is `mix` applied to the identity. A mixer knows its heads and nothing of models.

Legend: B batch, H query heads of this mixer, G key/value heads, T new tokens, L past and new tokens, D head width,
M hidden width of the model.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from subquad.ops.common import wide

State = dict[str, Tensor]


class Options(BaseModel):
    """The options of a mixer, as written in a plan; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class HeadGroup:
    """The heads of one layer that share a mixer, and the key/value heads that these use."""

    heads: tuple[int, ...]  # indices of query heads in the layer, ascending
    queries_per_kv: int  # query heads that share one key/value head in the layer
    head_dim: int
    hidden_size: int
    window: int | None = None  # the teacher's own sliding window in this layer

    @cached_property
    def kv_heads(self) -> tuple[int, ...]:
        """The key/value heads in use, ascending."""
        return tuple(sorted({head // self.queries_per_kv for head in self.heads}))

    @cached_property
    def even(self) -> bool:
        """Whether each key/value head serves equally many of these heads, so that grouped computation works."""
        counts = {sum(h // self.queries_per_kv == kv for h in self.heads) for kv in self.kv_heads}
        return len(counts) == 1

    def states(self, share: bool) -> int:
        """Recurrent states in use: one a key/value head when they are shared, else one a query head."""
        return len(self.kv_heads) if share and self.even else len(self.heads)


@dataclass
class MixerInputs:
    """What a mixer is given for T new tokens."""

    q_BHTD: Tensor
    k_BGTD: Tensor
    v_BGTD: Tensor
    hidden_BTM: Tensor  # the attention module's input: gates are computed from it
    scale: float  # the teacher's factor on q k^T
    softcap: float | None = None  # the teacher's cap on attention scores (Gemma-2)
    padding_BL: Tensor | None = None  # True at real tokens, past and new; None: no padding
    past: int = 0  # tokens before these
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # the teacher's own attention (q, k, v) -> y

    @property
    def real_BT(self) -> Tensor | None:
        """The padding mask of the new tokens alone."""
        return None if self.padding_BL is None else self.padding_BL[:, self.past :]


class Mixer(nn.Module):
    """Base of all mixers; a subclass sets `options_class` and writes `mix` and `state_bytes`, the rest where needed."""

    options_class: ClassVar[type[Options]] = Options

    def __init__(self, group: HeadGroup, options: Options) -> None:
        super().__init__()
        self.group = group
        self.options = options

    def prepare(self, inputs: MixerInputs, state: State) -> tuple[MixerInputs, State]:
        """What comes before mixing; returns the inputs to mix and its own part of the new state."""
        return inputs, {}

    def mix(self, inputs: MixerInputs, state: State) -> tuple[Tensor, State]:
        """M(x) v for the new tokens, (B, H, T, D), and its own part of the new state; linear in the values."""
        raise NotImplementedError

    def finish(self, y_BHTD: Tensor, inputs: MixerInputs) -> Tensor:
        """What comes after mixing: norms and gates."""
        return y_BHTD

    def forward(self, inputs: MixerInputs, state: State | None = None) -> tuple[Tensor, State]:
        """The mixer's output (B, H, T, D) and its new state; `state` is None at the start of a sequence."""
        prepared, prepared_state = self.prepare(inputs, state or {})
        y_BHTD, mixed_state = self.mix(prepared, state or {})
        return self.finish(y_BHTD, prepared), prepared_state | mixed_state

    def matrix(self, inputs: MixerInputs) -> Tensor:
        """The mixing matrix M, (B, H, T, T): what `mix` does to the identity. Row: query, column: key."""
        inputs, _ = self.prepare(inputs, {})
        B, G, T, _ = inputs.v_BGTD.shape
        identity = torch.eye(T, dtype=inputs.v_BGTD.dtype, device=inputs.v_BGTD.device).expand(B, G, T, T)
        return self.mix(replace(inputs, v_BGTD=identity), {})[0]

    @classmethod
    def state_bytes(cls, group: HeadGroup, options: Any, context: int, itemsize: int) -> int:
        """Bytes held for one row of the batch after `context` tokens.

        `options` are of `options_class`; `itemsize` is that of the model's dtype.
        """
        raise NotImplementedError

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target_BHTD: Tensor) -> None:
        """Starts the mixer as near to the teacher's attention as its free scale allows (one batch, closed form)."""

    def shared(self, inputs: MixerInputs, share: bool) -> MixerInputs:
        """Keys and values as the states need them: one a key/value head when shared, else one a query head."""
        if share and self.group.even:
            return inputs
        return replace(inputs, k_BGTD=self.spread(inputs.k_BGTD), v_BGTD=self.spread(inputs.v_BGTD))

    def spread(self, x_BGTD: Tensor) -> Tensor:
        """Key/value heads repeated (or picked) so that each query head has its own."""
        if x_BGTD.shape[1] == len(self.group.heads):
            return x_BGTD
        index = [self.group.kv_heads.index(head // self.group.queries_per_kv) for head in self.group.heads]
        return x_BGTD[:, index]


def masked(x_BGT_: Tensor, real_BT: Tensor | None) -> Tensor:
    """Zeros at pad positions: a zero key, write strength or log decay leaves a recurrent state untouched."""
    if real_BT is None:
        return x_BGT_
    shape = (real_BT.shape[0], 1, real_BT.shape[1]) + (1,) * (x_BGT_.dim() - 3)
    return x_BGT_ * real_BT.view(shape).to(x_BGT_.dtype)


class ScaledNormGate(nn.Module):
    """Per-head RMS norm, a learned scale, and an output gate silu(z) that starts fully open.

    The gate's low-rank weights start at zero and its bias where silu is 1 (Phi-Mamba's open gate), so it changes
    nothing at first.
    """

    OPEN = 1.278464542761  # silu(OPEN) = 1

    def __init__(self, heads: int, head_dim: int, hidden_size: int, rank: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale_HD = nn.Parameter(torch.ones(heads, head_dim))
        self.gate_down = nn.Linear(hidden_size, rank, bias=False)
        self.gate_up = nn.Linear(rank, heads * head_dim)
        nn.init.zeros_(self.gate_up.weight)
        nn.init.constant_(self.gate_up.bias, self.OPEN)

    @staticmethod
    def normalised(y_BHTD: Tensor) -> Tensor:
        return nn.functional.rms_norm(wide(y_BHTD), y_BHTD.shape[-1:], eps=1e-6).to(y_BHTD.dtype)

    def forward(self, y_BHTD: Tensor, hidden_BTM: Tensor) -> Tensor:
        gate_BTHD = nn.functional.silu(self.gate_up(self.gate_down(hidden_BTM))).unflatten(-1, (self.heads, -1))
        return self.normalised(y_BHTD) * self.scale_HD[:, None] * gate_BTHD.transpose(1, 2)

    @torch.no_grad()
    def calibrate(self, y_BHTD: Tensor, target_BHTD: Tensor) -> None:
        """Least squares of the scale, channel by channel, from the normalised output to the target."""
        y, target = wide(self.normalised(y_BHTD)), wide(target_BHTD)
        self.scale_HD.copy_((y * target).sum((0, 2)) / (y * y).sum((0, 2)).clamp_min(1e-6))
