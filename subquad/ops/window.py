"""Softmax attention over the last W keys and the first few (sinks), as a sum that other sums can join.

The result is the unnormalised pair of an attention: sum e^{s - peak} v and sum e^{s - peak}, with the peak that was
taken out. Alone, their quotient is sliding-window attention with sinks (StreamingLLM, arXiv 2309.17453, without
re-indexing of positions); together with a linear sum it is LoLCATs' shared denominator. Work and memory are O(T W):
queries in blocks of W see two blocks of keys. A token that is in the window is not counted again as a sink.

The state has a fixed size: W - 1 keys and values, and the sinks'. `padding_BL` marks the real tokens (True) of all L =
past + T columns; sinks are the first *real* tokens of each row, so left padding moves them.

Legend: B batch, H query heads, G key/value heads, R = H / G, T new tokens, L past and new tokens, W window, S sinks,
K blocks, D head width, E = W - 1 + T the window's past and the new tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from subquad.ops.common import wide


@dataclass
class WindowSum:
    """An unnormalised attention: `numerator` / `denominator` is the output; both were divided by e^`peak`."""

    numerator_BHTD: Tensor
    denominator_BHT1: Tensor
    peak_BHT1: Tensor
    state: dict[str, Tensor]

    def normalised(self) -> Tensor:
        """Sliding-window attention itself, (B, H, T, D)."""
        return (self.numerator_BHTD / self.denominator_BHT1).to(self.numerator_BHTD.dtype)


def first_real(padding_BL: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """The column of each row's first real token, (B,)."""
    if padding_BL is None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    return padding_BL.int().argmax(-1)


def _valid(padding_BL: Tensor | None, columns: Tensor) -> Tensor:
    """Which columns hold a real token: (B or 1, number of columns)."""
    inside = columns >= 0
    if padding_BL is None:
        return inside[None]
    return inside[None] & padding_BL[:, columns.clamp(0, padding_BL.shape[1] - 1)]


def _extended(new: Tensor, old: Tensor | None, window: int) -> Tensor:
    """The new keys or values behind the window's, zeros at the start of a sequence."""
    return pad(new, (0, 0, window - 1, 0)) if old is None else torch.cat([old, new], 2)


def _sinks(new: Tensor, old: Tensor | None, index_BS: Tensor) -> Tensor:
    """The sinks' keys or values (B, G, S, D), with those that are among the new tokens written in."""
    B, G, T, D = new.shape
    among_new = (index_BS >= 0) & (index_BS < T)
    gathered = new.gather(2, index_BS.clamp(0, T - 1)[:, None, :, None].expand(B, G, -1, D))
    return torch.where(among_new[:, None, :, None], gathered, gathered.new_zeros(()) if old is None else old)


def window_sum(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    *,
    window: int,
    sinks: int,
    scale: float,
    softcap: float | None = None,
    state: dict[str, Tensor] | None = None,
    past: int = 0,
    padding_BL: Tensor | None = None,
) -> WindowSum:
    """Attention of each query to its last `window` keys and the first `sinks`; see the module's docstring."""
    B, G, T, _ = k_BGTD.shape
    device = k_BGTD.device
    start_B = first_real(padding_BL, B, device)
    sink_columns_BS = start_B[:, None] + torch.arange(sinks, device=device)
    old: dict[str, Tensor | None] = {**state} if state else dict.fromkeys(("window_k", "window_v", "sink_k", "sink_v"))
    k_BGED, v_BGED = _extended(k_BGTD, old["window_k"], window), _extended(v_BGTD, old["window_v"], window)
    new_state = {
        "window_k": k_BGED[:, :, T:],
        "window_v": v_BGED[:, :, T:],
        "sink_k": _sinks(k_BGTD, old["sink_k"], sink_columns_BS - past),
        "sink_v": _sinks(v_BGTD, old["sink_v"], sink_columns_BS - past),
    }

    # One block of one query when decoding, else blocks of W queries; each block sees its own and the W - 1 keys before.
    rows = 1 if T == 1 else window
    blocks = -(-T // rows)
    span = window - 1 + rows
    end = blocks * rows - T
    q_BGRKQD = pad(q_BHTD, (0, 0, 0, end)).unflatten(2, (blocks, rows)).unflatten(1, (G, -1))
    k_BGKUD, v_BGKUD = (
        pad(x, (0, 0, 0, end)).unfold(2, span, rows).transpose(-1, -2) for x in (k_BGED, v_BGED)
    )  # views: overlapping spans of keys
    row, seen = torch.arange(rows, device=device), torch.arange(span, device=device)
    in_window_QU = (seen >= row[:, None]) & (seen < row[:, None] + window)
    columns_KU = past - (window - 1) + torch.arange(blocks, device=device)[:, None] * rows + seen
    valid_BKU = _valid(padding_BL, columns_KU.flatten().clamp(max=past + T - 1)).unflatten(1, (blocks, span))
    visible = (in_window_QU & valid_BKU[:, :, None])[:, None, None]
    query_columns_KQ = past + torch.arange(blocks * rows, device=device).unflatten(0, (blocks, rows))
    sink_visible = (query_columns_KQ[None, :, :, None] - sink_columns_BS[:, None, None] >= window)[:, None, None]

    def scores(keys: Tensor, mask: Tensor) -> Tensor:
        s = wide(q_BGRKQD @ keys.transpose(-1, -2)) * scale
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        return s.masked_fill(~mask, torch.finfo(s.dtype).min)

    # A row that sees nothing (a pad) keeps the finite minimum as its peak: a harmless mean, never a NaN.
    near = scores(k_BGKUD[:, :, None], visible)
    far = scores(new_state["sink_k"][:, :, None, None], sink_visible)
    peak = near.detach().amax(-1, keepdim=True)
    if sinks:
        peak = torch.maximum(peak, far.detach().amax(-1, keepdim=True))
    near, far = (near - peak).exp(), (far - peak).exp()
    numerator = (
        near.to(v_BGTD.dtype) @ v_BGKUD[:, :, None] + far.to(v_BGTD.dtype) @ new_state["sink_v"][:, :, None, None]
    )
    denominator = near.sum(-1, keepdim=True) + far.sum(-1, keepdim=True)

    def per_token(x: Tensor) -> Tensor:
        return x.flatten(3, 4)[:, :, :, :T].flatten(1, 2)

    return WindowSum(per_token(numerator), per_token(denominator), per_token(peak), new_state)
