"""Rows of several documents, and pads anywhere: each document becomes a row of its own for the mixers.

`Layout.of` reads padding and documents from the arguments of a forward pass, once for all layers. Documents are given
by `seq_idx`, by `cu_seq_lens_q` (both as in `DataCollatorWithFlattening`), or by `position_ids` that start over.

A mixer continues a state over the tokens of a row, and takes pads in front of them only. So the tokens of a document
are gathered, and the outputs are scattered back. Documents of similar lengths form one batch, which limits the pads in
it. The state of a row is that of its last document. The heads that keep attention get a mask in which a document sees
itself only.

Legend: B batch, T new tokens, L past and new tokens, H heads, D head width, M hidden width, S tokens without the pads,
N documents, U tokens of the longest document of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

from subquad.mixers import Mixer, MixerInputs, State
from subquad.model.cache import StudentCache
from subquad.model.masks import padding_mask
from subquad.ops.padding import Padding

SHORTEST = 32  # documents up to this length form one batch


@dataclass(frozen=True)
class Layout:
    """Real tokens of a forward pass.

    `attention_mask` is that of the model itself. `padding` has its pads in front of the new tokens; with `documents`
    in its place, the tokens must be gathered.
    """

    attention_mask: Tensor | None = None
    padding: Padding | None = None
    documents: Documents | None = None

    @classmethod
    def of(
        cls,
        attention_mask: Any,
        cache: StudentCache | None,
        tokens: Tensor,
        position_ids: Tensor | None = None,
        packing: Mapping[str, Any] | None = None,
    ) -> Layout:
        """Layout of new `tokens` (B, T) or (B, T, M) behind those in the cache.

        `packing`: keyword arguments of the model, of which `seq_idx` and `cu_seq_lens_q` are read. After documents in
        one row, the cache keeps where the last one starts: older documents are pads from then on. Raises ValueError
        for a mask that `padding_mask` does not take, and for `seq_idx` or `cu_seq_lens_q` of another length.
        """
        (B, T), device = tokens.shape[:2], tokens.device
        past = 0 if cache is None else cache.get_seq_length()
        padding_BL = None if attention_mask is None else padding_mask(attention_mask, B, past, T)
        may_skip = attention_mask is None and cache is None
        if attention_mask is not None and attention_mask.dim() == 4:
            attention_mask = None if padding_BL is None else padding_BL.long()
        if cache is not None and cache.start_B is not None:
            own_BL = torch.arange(past + T, device=device) >= cache.start_B[:, None]
            padding_BL = own_BL if padding_BL is None else padding_BL & own_BL
            attention_mask = padding_BL.long()
        real_BT = None if padding_BL is None else padding_BL[:, past:]
        border_BT = _borders((B, T), real_BT, position_ids, packing or {}, may_skip) if T > 1 else None

        # Without documents, most masks need no gathering
        if border_BT is None or not bool(border_BT.any()):
            if padding_BL is None:
                return cls(attention_mask)
            padding = Padding.of(padding_BL, past)
            if bool(padding_BL[:, past:].all()):
                return cls(attention_mask, replace(padding, real_BT=None))
            if T == 1 or bool((padding_BL[:, past + 1 :] >= padding_BL[:, past:-1]).all()):
                return cls(attention_mask, padding)
            border_BT = torch.zeros(B, T, dtype=torch.bool, device=device)
        if padding_BL is None:
            padding_BL = torch.ones(B, past + T, dtype=torch.bool, device=device)
        documents = Documents.of(padding_BL.to(device), border_BT, past)
        if cache is not None and documents.packed:
            start_B = documents.start_B
            cache.start_B = start_B if cache.start_B is None else start_B.maximum(cache.start_B)
        return cls(attention_mask, None, documents)


def _borders(
    shape: tuple[int, int], real_BT: Tensor | None, positions: Tensor | None, packing: Mapping[str, Any], may_skip: bool
) -> Tensor | None:
    """Tokens that begin another document of their row, (B, T); None if the arguments name no documents.

    As in transformers, any step of the positions but 1 is a border where neither mask nor cache is given (`may_skip`).
    Elsewhere only positions that start over are, since positions may skip ahead within a document.
    """
    B, T = shape
    if (documents := packing.get("seq_idx")) is not None:
        if documents.shape[-1] != T:
            raise ValueError(f"seq_idx must be (batch, tokens), here {(B, T)}, not {tuple(documents.shape)}")
        return _step(documents.expand(B, T), real_BT, first=0) != 0
    if (ends := packing.get("cu_seq_lens_q")) is not None:
        if int(ends[-1]) != B * T:
            raise ValueError(f"cu_seq_lens_q ends at {int(ends[-1])}, and the batch has {B * T} tokens")
        flat = torch.searchsorted(ends, torch.arange(B * T, dtype=ends.dtype, device=ends.device), right=True)
        return _step(flat.view(B, T), real_BT, first=0) != 0
    if positions is not None and positions.dim() == 3 and len(positions) == 4:
        positions = positions[0]  # text positions in front of those of time, height and width, as in transformers
    if positions is None or positions.dim() > 2 or positions.shape[-1] != T:
        return None
    step_BT = _step(positions.expand(B, T), real_BT, first=1)
    return step_BT != 1 if may_skip else step_BT <= 0


def _step(number_BT: Tensor, real_BT: Tensor | None, first: int) -> Tensor:
    """Differences between a row's real tokens, each with the real token before it; `first` at pads and without one."""
    if real_BT is None:
        return pad(number_BT.diff(dim=-1), (1, 0), value=first)
    real_BT = real_BT.to(number_BT.device)
    column_T = torch.arange(number_BT.shape[1], device=number_BT.device)
    latest_BT = torch.where(real_BT, column_T, -1).cummax(-1).values
    before_BT = pad(latest_BT[:, :-1], (1, 0), value=-1)
    step_BT = number_BT - number_BT.gather(1, before_BT.clamp_min(0))
    return torch.where(real_BT & (before_BT >= 0), step_BT, first)


@dataclass(frozen=True)
class Batch:
    """Documents of similar lengths, with pads in front of the shorter ones."""

    token_NU: Tensor  # index of each token in the flattened (B, T); 0 at pads
    row_N: Tensor
    continues_N: Tensor | None  # True if the document continues the row's state; None: all do
    padding: Padding | None

    def inputs(self, inputs: MixerInputs) -> MixerInputs:
        """Inputs of these documents, from those of the rows."""

        def gather(x_BTH_: Tensor) -> Tensor:
            return x_BTH_.flatten(0, 1).index_select(0, self.token_NU.flatten()).unflatten(0, self.token_NU.shape)

        q, k, v = (gather(x.transpose(1, 2)).transpose(1, 2) for x in (inputs.q_BHTD, inputs.k_BGTD, inputs.v_BGTD))
        return replace(inputs, q_BHTD=q, k_BGTD=k, v_BGTD=v, hidden_BTM=gather(inputs.hidden_BTM), padding=self.padding)

    def state(self, state: State | None) -> State | None:
        """State before each document: that of its row, or zero, which every mixer starts with."""
        if not state:
            return None
        states = {key: x.index_select(0, self.row_N) for key, x in state.items()}
        if self.continues_N is None:
            return states
        return {
            key: torch.where(self.continues_N.view(-1, *[1] * (x.dim() - 1)), x, x.new_zeros(()))
            for key, x in states.items()
        }


@dataclass(frozen=True)
class Documents:
    """Documents of a batch, without pads. Rows without a new token have one that is empty."""

    batches: list[Batch]
    slot_BT: Tensor  # index of each token in the flattened outputs of all batches; 0 at pads
    last_B: Tensor  # index of each row's last document among those of all batches
    document_BL: Tensor  # number of each token's document within its row; past tokens belong to the first
    start_B: Tensor  # first column of each row's last document; 0 if the row has one document
    packed: bool  # False if every row has one document
    masks: dict[tuple[int, int], tuple[Any, Tensor]] = field(default_factory=dict)  # of `attention`, with their source

    @classmethod
    def of(cls, padding_BL: Tensor, border_BT: Tensor, past: int) -> Documents:
        """Documents of rows with this padding; `border_BT` is True at the first token of each but a row's first."""
        (B, T), device, real_BT = border_BT.shape, border_BT.device, padding_BL[:, past:]
        document_BT = border_BT.cumsum(-1)
        count_B = document_BT[:, -1] + 1
        first_B = count_B.cumsum(0) - count_B
        row_N = torch.arange(B, device=device).repeat_interleave(count_B)
        N = len(row_N)
        continues_N = torch.arange(N, device=device) == first_B[row_N]
        past_N = padding_BL[:, :past].sum(-1)[row_N] * continues_N
        # Real tokens in order, with their document and their distance from its end.
        token_S = real_BT.flatten().nonzero()[:, 0]
        owner_S = (first_B[:, None] + document_BT).flatten()[token_S]
        length_N = torch.bincount(owner_S, minlength=N)
        left_S = length_N.cumsum(0)[owner_S] - torch.arange(len(token_S), device=device)
        # One batch for the documents between two powers of two.
        lengths = length_N.tolist()
        classes = [max(SHORTEST, 1 << (length - 1).bit_length()) if length else SHORTEST for length in lengths]
        class_N = torch.tensor(classes, device=device)
        batches: list[Batch] = []
        slot_X = torch.zeros(B * T, dtype=torch.long, device=device)
        place_N, index_N = torch.zeros_like(row_N), torch.zeros_like(row_N)
        slots = places = 0
        for size in sorted({*classes}):
            chosen_N = class_N == size
            rows = [length for length, its_size in zip(lengths, classes, strict=True) if its_size == size]
            n, U = len(rows), max(1, *rows)
            index_N[chosen_N] = torch.arange(n, device=device)
            chosen_S = chosen_N[owner_S]
            target_S = (index_N[owner_S] * U + U - left_S)[chosen_S]
            token_X = slot_X.new_zeros(n * U)
            token_X[target_S] = token_S[chosen_S]
            real_X = torch.zeros(n * U, dtype=torch.bool, device=device)
            real_X[target_S] = True
            slot_X[token_S[chosen_S]] = slots + target_S
            place_N[chosen_N] = places + index_N[chosen_N]
            is_full = sum(rows) == n * U
            padding = Padding(past_N[chosen_N], None if is_full else real_X.view(n, U))
            batches.append(
                Batch(
                    token_X.view(n, U),
                    row_N[chosen_N],
                    None if N == B else continues_N[chosen_N],
                    None if is_full and past == 0 else padding,
                )
            )
            slots, places = slots + n * U, places + n
        start_B = torch.where(border_BT, torch.arange(past, past + T, device=device), 0).amax(-1)
        return cls(
            batches,
            slot_X.view(B, T),
            place_N[first_B + count_B - 1],
            pad(document_BT, (past, 0)),
            start_B,
            packed=N > B,
        )

    def mix(self, mixer: Mixer, inputs: MixerInputs, state: State | None) -> tuple[Tensor, State]:
        """Output of a mixer, (B, H, T, D), and the states of each row's last document."""
        results = [mixer(batch.inputs(inputs), batch.state(state)) for batch in self.batches]
        y_XHD = torch.cat([y_NHUD.transpose(1, 2).flatten(0, 1) for y_NHUD, _ in results])
        y_BTHD = y_XHD.index_select(0, self.slot_BT.flatten()).unflatten(0, self.slot_BT.shape)
        new_state = {key: torch.cat([state[key] for _, state in results])[self.last_B] for key in results[0][1]}
        return y_BTHD.transpose(1, 2), new_state

    def attention(self, base: str, mask: Any, keys: int) -> tuple[Tensor | None, dict[str, Any]]:
        """Mask and keyword arguments with which the attention function `base` keeps the documents apart.

        `mask` is boolean or additive (B, 1, T, L), or None: causal. `keys` is L, or less behind a sliding window.
        Raises ValueError for functions that take no such mask behind pads or a cache.
        """
        if not self.packed:
            return mask, {}
        if _is_flash(base) and mask is None and keys == self.slot_BT.shape[1]:
            return None, self.flash_arguments
        if _is_flash(base) or not (mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)):
            raise ValueError(f"attention heads with '{base}' cannot keep these packed documents apart: use sdpa")
        if (id(mask), keys) not in self.masks:  # made once for all layers
            self.masks[id(mask), keys] = mask, self._mask(mask, keys)
        return self.masks[id(mask), keys][1], {}

    def _mask(self, mask: Tensor | None, keys: int) -> Tensor:
        T = self.slot_BT.shape[1]
        same_B1TK = (self.document_BL[:, -T:, None] == self.document_BL[:, None, -keys:])[:, None]
        if mask is None:
            return same_B1TK & torch.ones(T, keys, dtype=torch.bool, device=same_B1TK.device).tril(keys - T)
        mask = mask[..., :keys]
        return (
            mask & same_B1TK if mask.dtype == torch.bool else mask.masked_fill(~same_B1TK, torch.finfo(mask.dtype).min)
        )

    @cached_property
    def flash_arguments(self) -> dict[str, Any]:
        """Arguments of flash attention over all tokens in one row: where documents end, and the longest one."""
        B, T = self.slot_BT.shape
        starts_BT = pad(self.document_BL[:, -T:].diff(dim=-1) != 0, (1, 0), value=True)
        ends = pad(starts_BT.flatten().nonzero()[:, 0], (0, 1), value=B * T).int()
        longest = int(ends.diff().max())
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _is_flash(base: str) -> bool:
    """Whether an attention function takes cumulative lengths of documents in place of a mask."""
    return base in ALL_MASK_ATTENTION_FUNCTIONS and ALL_MASK_ATTENTION_FUNCTIONS[base] is flash_attention_mask
