"""The interface of a token mixer: y = M(x) v with a causal T x T matrix M, in three equivalent forms.

A mixer receives the teacher's queries, keys and values (after projections, norms and rotary embedding) and returns one
output per query head. The teacher's output projection follows. Mixing has three steps, which isolate the linear part:

- `prepare`: short convolutions
- `mix`: linear in the values; `chunk` for many tokens, `step` for one
- `finish`: norms and gates

`matrix` is `mix` applied to the identity. A mixer depends on its head group only, not on any model.

Legend: B batch, H query heads of this mixer, G key/value heads, T new tokens, D head width,
M hidden width of the model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.ops.common import Append, joined
from subquad.ops.padding import Padding

State = dict[str, Tensor]


class Options(BaseModel):
    """The options of a mixer, as written in a plan. Unknown keys are rejected."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class HeadGroup:
    """The query heads of one layer that share a mixer, with their key/value heads."""

    heads: tuple[int, ...]  # indices of query heads in the layer, ascending
    queries_per_kv: int  # query heads that share one key/value head in the layer
    head_dim: int
    hidden_size: int
    window: int | None = None  # the teacher's own sliding window in this layer
    value_dim: int | None = None  # width of values, if less than `head_dim`: they end in zeros up to that width
    layer_heads: int | None = None  # query heads of the layer, for mixers whose heads differ by position

    @cached_property
    def kv_heads(self) -> tuple[int, ...]:
        """The key/value heads in use, ascending."""
        return tuple(sorted({head // self.queries_per_kv for head in self.heads}))

    @cached_property
    def kv_positions(self) -> tuple[int, ...]:
        """Position of each head's key/value head within `kv_heads`."""
        return tuple(self.kv_heads.index(head // self.queries_per_kv) for head in self.heads)

    @cached_property
    def even(self) -> bool:
        """True if all key/value heads serve the same number of these heads, as grouped computation needs."""
        counts = {sum(h // self.queries_per_kv == kv for h in self.heads) for kv in self.kv_heads}
        return len(counts) == 1

    def is_subset(self, group: "HeadGroup") -> bool:
        """True if `group` is of the same layer and contains all of these heads."""
        return replace(self, heads=()) == replace(group, heads=()) and {*self.heads} <= {*group.heads}

    def states(self, share: bool) -> int:
        """Number of recurrent states: one per key/value head if they are shared, else one per query head."""
        return len(self.kv_heads) if share and self.even else len(self.heads)


def picked(x_BH_: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Select `heads` (dimension 1): a view if they are contiguous, else a copy by an index cached on the device."""
    if heads == tuple(range(heads[0], heads[0] + len(heads))):
        return x_BH_[:, heads[0] : heads[0] + len(heads)]
    return x_BH_.index_select(1, _index(heads, x_BH_.device))


@cache
def _index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # training cannot use an inference tensor
        return torch.tensor(heads, device=device)


class Held(NamedTuple):
    """Shape and precision of one tensor of a state, for one row of the batch."""

    shape: tuple[int, ...]  # heads, rows, columns
    wide: bool = False  # float32 or wider, whatever the model's dtype


@dataclass
class MixerInputs:
    """The inputs of a mixer for T new tokens."""

    q_BHTD: Tensor
    k_BGTD: Tensor
    v_BGTD: Tensor
    hidden_BTM: Tensor  # the attention module's input: gates are computed from it
    scale: float  # the teacher's factor on q k^T
    softcap: float | None = None  # the teacher's cap on attention scores (Gemma-2)
    sink_H: Tensor | None = None  # the teacher's learned sinks: a score that takes weight and has no value (gpt-oss)
    padding: Padding | None = None  # of the rows; pads stand in front of the new tokens of a row; None: no padding
    past: int = 0  # columns before the new ones: tokens, where there is no padding
    attend: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # the teacher's own attention (q, k, v) -> y
    append: Append = joined  # appends new keys or values to cached ones

    @property
    def real_BT(self) -> Tensor | None:
        """The padding mask of the new tokens; None if all are real."""
        return None if self.padding is None else self.padding.real_BT


class Mixer(nn.Module):
    """Base class of all mixers.

    A subclass sets `options_class` and implements `mix` and `held`. It overrides the other methods where needed.
    """

    options_class: ClassVar[type[Options]] = Options

    def __init__(self, group: HeadGroup, options: Options) -> None:
        super().__init__()
        self.group = group
        self.options = options

    @property
    def rotary(self) -> bool:
        """True if the mixer takes queries and keys with the teacher's rotary embedding applied."""
        return True

    def prepare(self, inputs: MixerInputs, state: State) -> tuple[MixerInputs, State]:
        """Transform the inputs before mixing. Returns the inputs of `mix` and this step's part of the new state."""
        return inputs, {}

    def mix(self, inputs: MixerInputs, state: State) -> tuple[Tensor, State]:
        """Compute M(x) v for the new tokens, linear in the values.

        Returns the result (B, H, T, D) and this step's part of the new state.
        """
        raise NotImplementedError

    def finish(self, y_BHTD: Tensor, inputs: MixerInputs) -> Tensor:
        """Apply norms and gates after mixing."""
        return y_BHTD

    def queries_and_keys(self, inputs: MixerInputs) -> tuple[Tensor, Tensor]:
        """Return the vectors that read the state (B, H, T, N) and write to it (B, G, T, N), before any gate.

        In an SSM these are C and B.
        """
        prepared, _ = self.prepare(inputs, {})
        return prepared.q_BHTD, prepared.k_BGTD

    def forward(self, inputs: MixerInputs, state: State | None = None) -> tuple[Tensor, State]:
        """Compute the mixer's output (B, H, T, D) and its new state; `state` is None at the start of a sequence.

        Raises ValueError for inputs of a wrong shape or the state of another mixer, UserError if float16 overflows.
        """
        self._check(inputs, state)
        prepared, prepared_state = self.prepare(inputs, state or {})
        y_BHTD, mixed_state = self.mix(prepared, state or {})
        y_BHTD = self.finish(y_BHTD, prepared)
        if y_BHTD.dtype == torch.float16 and not y_BHTD.isfinite().all():
            raise UserError(f"{type(self).__name__} overflows in float16: use bfloat16 or float32")
        return y_BHTD, prepared_state | mixed_state

    def _check(self, inputs: MixerInputs, state: State | None) -> None:
        B, _, T, _ = inputs.q_BHTD.shape
        group, name = self.group, type(self).__name__
        kv_shape = (B, len(group.kv_heads), T, group.head_dim)
        for label, tensor, expected_shape in (
            ("queries", inputs.q_BHTD, (B, len(group.heads), T, group.head_dim)),
            ("keys", inputs.k_BGTD, kv_shape),
            ("values", inputs.v_BGTD, kv_shape),
            ("hidden states", inputs.hidden_BTM, (B, T, group.hidden_size)),
        ):
            if tensor.shape != expected_shape:
                raise ValueError(f"{name} was given {label} of shape {tuple(tensor.shape)}, and takes {expected_shape}")
        if state:
            shapes = {key: tuple(tensor.shape[1:]) for key, tensor in state.items()}
            expected_shapes = {key: tensor.shape for key, tensor in self.held(group, self.options, inputs.past).items()}
            if shapes != expected_shapes:
                raise ValueError(f"{name} was given the state of another mixer: {shapes}, and keeps {expected_shapes}")

    def matrix(self, inputs: MixerInputs, columns: slice = slice(None)) -> Tensor:
        """Compute the mixing matrix M (B, H, T, T) by applying `mix` to the identity. Row: query, column: key.

        `columns` restricts the result to these columns, which reduces memory in proportion.
        """
        inputs, _ = self.prepare(inputs, {})
        B, G, T, _ = inputs.v_BGTD.shape
        identity_TC = torch.eye(T, dtype=inputs.v_BGTD.dtype, device=inputs.v_BGTD.device)[:, columns]
        return self.mix(replace(inputs, v_BGTD=identity_TC.expand(B, G, -1, -1)), {})[0]

    @classmethod
    def held(cls, group: HeadGroup, options: Any, context: int) -> dict[str, Held]:
        """Describe the state's tensors for one row of the batch after `context` tokens.

        `options` is an instance of `options_class`.
        """
        raise NotImplementedError

    @classmethod
    def state_bytes(cls, group: HeadGroup, options: Any, context: int, size: int, wide_size: int) -> int:
        """Bytes of the state for one row of the batch after `context` tokens.

        `size` is the bytes of an element, `wide_size` those of an element of a wide tensor.
        """
        return sum(
            math.prod(tensor.shape) * (wide_size if tensor.wide else size)
            for tensor in cls.held(group, options, context).values()
        )

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target_BHTD: Tensor) -> None:
        """Fit the mixer's free scales to the teacher's attention output, in closed form on one batch."""

    def share(self, source: "Mixer") -> bool:
        """Take the weights of a trained mixer of the same class. Returns True if that was possible.

        If both have the same heads, all weights share storage afterwards. If `source` has more heads, the rows of these
        heads are copied. Impossible if `source` lacks a head or has different options.
        """
        if type(self) is not type(source) or self.options != source.options or not self.group.is_subset(source.group):
            return False
        same_heads = self.group == source.group
        if not same_heads and not self.group.even and len(self.group.heads) == len(source.group.kv_heads):
            return False  # rows of key/value heads could not be told from a weight without heads
        for parameter, source_parameter in zip(self.parameters(), source.parameters(), strict=True):
            shape = tuple(parameter.shape)
            parameter.data = (
                source_parameter.data
                if same_heads
                else _rows_of(source_parameter.data, shape, source.group, self.group)
            )
        return True

    def match_states(self, inputs: MixerInputs, share: bool) -> MixerInputs:
        """Give each state its keys and values: one per key/value head if shared, else one per query head."""
        if share and self.group.even:
            return inputs
        return replace(inputs, k_BGTD=self.spread(inputs.k_BGTD), v_BGTD=self.spread(inputs.v_BGTD))

    def spread(self, x_BGTD: Tensor) -> Tensor:
        """Repeat (or select) key/value heads so that each query head has its own."""
        if x_BGTD.shape[1] == len(self.group.heads):
            return x_BGTD
        return picked(x_BGTD, self.group.kv_positions)


def _rows_of(weight: Tensor, shape: tuple[int, ...], source: HeadGroup, target: HeadGroup) -> Tensor:
    """Select the rows of a weight of group `source` for the heads of group `target`.

    `shape` is the shape of the target's weight. Rows of a head are contiguous, in the order of the heads. They belong
    to query heads, to key/value heads or, if `target` is uneven, to each query head's key/value head. Weights without
    a head dimension are returned unchanged.
    """
    kv_head_of_query = [head // target.queries_per_kv for head in target.heads]
    for source_heads, target_heads in (
        (source.heads, target.heads),
        (source.kv_heads, target.kv_heads),
        (source.kv_heads, kv_head_of_query),
    ):
        rows, remainder = divmod(len(weight), len(source_heads))
        if remainder == 0 and shape == (rows * len(target_heads), *weight.shape[1:]):
            index = torch.tensor([source_heads.index(head) for head in target_heads], device=weight.device)
            return weight.unflatten(0, (-1, rows))[index].flatten(0, 1)
    return weight
