"""Base of the mixers with a matrix-valued state: grouped heads, small states, both directions, the output's scale.

A subclass implements `terms`, which computes the queries, keys, values and gates of its recurrence. All share:

- `share_state`: one state per key/value head instead of one per query head, which divides the state by the group size.
- `state_dim`: learned projections of queries and keys to fewer channels. They are initialised to preserve the products
  q k^T of a calibration batch (`low_rank`).
- `gain_H`: a learned factor per head. Sums of q k^T over a context are hundreds of times as large as attention's
  averages. The factor is initialised so that the outputs, and with them the matrices, have the teacher's magnitude.
- `bidirectional`: a second scan runs backwards over the tokens *after* each query, with the same gates. The mixing
  matrix then has both triangles and counts the diagonal once. It has no state: for encoders, not for generation.
- `rotary`: queries and keys with the teacher's rotary embedding.

Legend: B batch, H query heads, G state heads, T new tokens, D head width, N key width of the state, P value width.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.mixers.base import HeadGroup, Held, Mixer, MixerInputs, Options, State
from subquad.mixers.parts import Scale
from subquad.ops.common import wide

Form = Callable[..., tuple[Tensor, Tensor]]


class RecurrentOptions(Options):
    share_state: bool = Field(False, description="one state per key/value head (smaller) instead of one per query head")
    state_dim: int | None = Field(None, ge=1, description="key channels of the state; default: the head width")
    bidirectional: bool = Field(False, description="also scan backwards (encoders and vision; no generation)")
    rotary: bool = Field(True, description="queries and keys with the teacher's rotary embedding")


class Recurrent(Mixer):
    """Base class of the recurrent mixers. A subclass sets `forms`, implements `terms` and builds its `output`.

    Raises UserError for a `state_dim` above the head width.
    """

    options_class = RecurrentOptions
    options: RecurrentOptions
    forms: ClassVar[tuple[Form, Form]]  # chunk and step
    averages: ClassVar[bool] = False  # True if rows of the matrix sum to one and need no gain
    output: Scale

    def __init__(self, group: HeadGroup, options: RecurrentOptions) -> None:
        super().__init__(group, options)
        self.states = group.states(options.share_state)
        self.state_dim = options.state_dim or group.head_dim
        if self.state_dim > group.head_dim:
            raise UserError(f"a state_dim of {self.state_dim} is above the head width of {group.head_dim}")
        if not self.averages:
            self.gain_H = nn.Parameter(torch.ones(len(group.heads)))
        if options.state_dim is not None:
            start_DN = torch.eye(group.head_dim)[:, : self.state_dim]
            self.query_map_HDN = nn.Parameter(start_DN.repeat(len(group.heads), 1, 1))
            self.key_map_GDN = nn.Parameter(start_DN.repeat(self.states, 1, 1))

    @property
    def rotary(self) -> bool:
        return self.options.rotary

    def terms(self, inputs: MixerInputs) -> tuple[Tensor | None, ...]:
        """Compute the recurrence's q (B, H, T, N), k (B, G, T, N), v (B, G, T, P), and gates with time in dimension 2.

        Keys and gates must be masked, so that pads leave the state unchanged. Queries and keys are already projected.
        """
        raise NotImplementedError

    def convolve(self, inputs: MixerInputs, state: State) -> tuple[MixerInputs, State]:
        """Apply short convolutions, in mixers that have them. Returns the inputs and the state of the convolutions."""
        return inputs, {}

    def prepare(self, inputs: MixerInputs, state: State) -> tuple[MixerInputs, State]:
        inputs, conv_state = self.convolve(self.match_states(inputs, self.options.share_state), state)
        return self.project(inputs), conv_state

    def project(self, inputs: MixerInputs) -> MixerInputs:
        """Project queries and keys to `state_dim` channels."""
        if self.options.state_dim is None:
            return inputs
        return replace(inputs, q_BHTD=inputs.q_BHTD @ self.query_map_HDN, k_BGTD=inputs.k_BGTD @ self.key_map_GDN)

    def mix(self, inputs: MixerInputs, state: State) -> tuple[Tensor, State]:
        terms = self.terms(inputs)
        chunk, step = self.forms
        if self.options.bidirectional:
            if state or inputs.past:
                raise ValueError(f"{type(self).__name__} is bidirectional: it cannot continue from a state")
            return self._apply_gain(scan_both_ways(chunk, terms)), {}
        y_BHTP, new_state = (step if inputs.q_BHTD.shape[2] == 1 else chunk)(*terms, state.get("recurrent"))
        return self._apply_gain(y_BHTP), {"recurrent": new_state}

    def _apply_gain(self, y_BHTP: Tensor) -> Tensor:
        return y_BHTP if self.averages else y_BHTP * self.gain_H[:, None, None]

    def finish(self, y_BHTD: Tensor, inputs: MixerInputs) -> Tensor:
        return self.output(y_BHTD, inputs.hidden_BTM)

    @classmethod
    def held(cls, group: HeadGroup, options: RecurrentOptions, context: int) -> dict[str, Held]:
        if options.bidirectional:
            return {}
        return {"recurrent": Held(cls.state_shape(group, options), wide=True)}

    @classmethod
    def state_shape(cls, group: HeadGroup, options: RecurrentOptions) -> tuple[int, int, int]:
        """Shape (G, N, P) of the recurrent state."""
        return group.states(options.share_state), options.state_dim or group.head_dim, group.head_dim

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target_BHTD: Tensor) -> None:
        """Initialise the projections to `state_dim` channels by `low_rank`, then fit the gain and the output scale."""
        if self.options.state_dim is not None:
            conv_inputs, _ = self.convolve(self.match_states(inputs, self.options.share_state), {})
            query_map_GDN, key_map_GDN = low_rank(conv_inputs.q_BHTD, conv_inputs.k_BGTD, self.state_dim)
            self.query_map_HDN.copy_(query_map_GDN.repeat_interleave(len(self.group.heads) // self.states, 0))
            self.key_map_GDN.copy_(key_map_GDN)
        prepared, _ = self.prepare(inputs, {})
        if not self.averages:
            y_BHTD, target = wide(self.mix(prepared, {})[0]), wide(target_BHTD)
            fit_H = (y_BHTD * target).sum((0, 2, 3)) / (y_BHTD * y_BHTD).sum((0, 2, 3)).clamp_min(1e-12)
            size_H = target.square().mean((0, 2, 3)).sqrt() / y_BHTD.square().mean((0, 2, 3)).sqrt().clamp_min(1e-6)
            self.gain_H.mul_(torch.maximum(fit_H, 0.1 * size_H))  # keeps uncorrelated outputs above zero
        self.output.calibrate(self.mix(prepared, {})[0], prepared.hidden_BTM, target_BHTD)


def scan_both_ways(chunk: Form, terms: tuple[Tensor | None, ...]) -> Tensor:
    """Sum a forward scan and a backward scan over the tokens after each query: (B, H, T, P).

    The backward scan shifts queries by one token, so that the state does not contain the query's own token yet.
    """
    y_forwards = chunk(*terms)[0]
    if y_forwards.shape[2] == 1:
        return y_forwards
    q, *keys_values_gates = (None if x is None else x.flip(2) for x in terms)
    assert q is not None
    y_backwards = chunk(q[:, :, 1:], *(None if x is None else x[:, :, :-1] for x in keys_values_gates))[0]
    return y_forwards + nn.functional.pad(y_backwards, (0, 0, 1, 0)).flip(2)


def low_rank(q_BHTD: Tensor, k_BGTD: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute maps (G, D, N) of queries and of keys to `rank` channels that best preserve q k^T (least squares).

    The best approximation of Q K^T is its truncated SVD (Eckart and Young). Q and K are tall matrices, so the SVD is
    taken of the roots of their second moments, which has the same singular values. H / G neighbouring query heads share
    a key head.
    """
    G = k_BGTD.shape[1]
    q_GLD = wide(q_BHTD).unflatten(1, (G, -1)).permute(1, 0, 2, 3, 4).flatten(1, 3)
    k_GLD = wide(k_BGTD).transpose(0, 1).flatten(1, 2)
    (q_root, q_inverse), (k_root, k_inverse) = (_roots(x.transpose(-1, -2) @ x) for x in (q_GLD, k_GLD))
    left_vectors, values, right_vectors = torch.linalg.svd(q_root @ k_root)
    root_values = values[:, None, :rank].sqrt()
    query_map_GDN = q_inverse @ left_vectors[:, :, :rank] * root_values
    key_map_GDN = k_inverse @ right_vectors.transpose(-1, -2)[:, :, :rank] * root_values
    return query_map_GDN, key_map_GDN


def _roots(moment_GDD: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the symmetric square root of positive semidefinite matrices and its (pseudo-)inverse."""
    values, vectors = torch.linalg.eigh(moment_GDD)
    nonzero = values > values[:, -1:] * values.shape[-1] * torch.finfo(values.dtype).eps
    root = values.clamp_min(0).sqrt()
    inverse = torch.where(nonzero, 1 / root.clamp_min(torch.finfo(values.dtype).tiny), 0.0)
    return vectors * root[:, None] @ vectors.transpose(-1, -2), vectors * inverse[:, None] @ vectors.transpose(-1, -2)
