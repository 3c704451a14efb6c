"""Softmax attention over the last W keys and the first few (sinks), as a sum that can be combined with other sums.

The result is unnormalised: sum e^{s - peak} v, sum e^{s - peak} and the peak. The quotient of the sums is
sliding-window attention with sinks (StreamingLLM, arXiv 2309.17453, without re-indexing of positions). With a linear
sum added to both, it is LoLCATs' attention with one denominator. Work and memory are O(T W): queries in blocks of W see
two blocks of keys. A token in the window is not counted again as a sink.

The state has a fixed size: W - 1 keys and values, and those of the sinks. Windows and sinks count the *real* tokens of
each row (padding.py), so the state holds the last W - 1 of them, wherever the pads were.

Legend: B batch, H query heads, G key/value heads, R = H / G, T new tokens, W window, S sinks, K blocks, D head width,
E = W - 1 + T the window's past and the new tokens.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from subquad.ops.common import Append, joined, wide
from subquad.ops.padding import Padding


@dataclass
class WindowSum:
    """An unnormalised attention with output `numerator` / `denominator`; both are divided by e^`peak`."""

    numerator_BHTD: Tensor
    denominator_BHT1: Tensor
    peak_BHT1: Tensor
    state: dict[str, Tensor]

    def with_sink(self, sink_H: Tensor | None) -> "WindowSum":
        """Add a learned sink to the denominator: a score per head, whose value is zero (gpt-oss)."""
        if sink_H is None:
            return self
        sink_H11 = wide(sink_H)[:, None, None]
        peak_BHT1 = torch.maximum(self.peak_BHT1, sink_H11.detach())
        factor_BHT1 = (self.peak_BHT1 - peak_BHT1).exp()
        return WindowSum(
            self.numerator_BHTD * factor_BHT1.to(self.numerator_BHTD.dtype),
            self.denominator_BHT1 * factor_BHT1 + (sink_H11 - peak_BHT1).exp(),
            peak_BHT1,
            self.state,
        )

    def normalised(self) -> Tensor:
        """Compute the output of sliding-window attention (B, H, T, D)."""
        return (self.numerator_BHTD / self.denominator_BHT1).to(self.numerator_BHTD.dtype)


def _sinks(x_BGTD: Tensor, past_sinks: Tensor | None, visibility: "Visibility") -> Tensor:
    """Collect the sinks' keys or values (B, G, S, D), from the state and from the new tokens."""
    B, G, T, D = x_BGTD.shape
    column_BS = visibility.sink_S - visibility.first_B1
    is_new_BS = (visibility.sink_S >= visibility.past_B1) & (column_BS < T)
    index_BS = column_BS.clamp(0, T - 1)[:, None, :, None].expand(B, G, -1, D)
    old = x_BGTD.new_zeros(()) if past_sinks is None else past_sinks
    return torch.where(is_new_BS[:, None, :, None], x_BGTD.gather(2, index_BS), old)


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
    padding: Padding | None = None,
    append: Append = joined,
) -> WindowSum:
    """Attend from each query to its last `window` keys and the first `sinks`; see the module's docstring.

    `past` is the number of earlier tokens in every row; with `padding`, each row has its own. `append` concatenates the
    state's keys and values with the new ones.
    """

    def extend(x_BGTD: Tensor, past_x: Tensor | None) -> Tensor:
        if past_x is None:
            return pad(x_BGTD, (0, 0, window - 1, 0))
        return append(past_x, x_BGTD) if padding is None or padding.real_BT is None else padding.extend(past_x, x_BGTD)

    T = k_BGTD.shape[2]
    visibility = Visibility(window, sinks, past, padding, k_BGTD.device, scale, softcap)
    past_state: dict[str, Tensor | None] = (
        {**state} if state else dict.fromkeys(("window_k", "window_v", "sink_k", "sink_v"))
    )
    k_BGED, v_BGED = extend(k_BGTD, past_state["window_k"]), extend(v_BGTD, past_state["window_v"])
    new_state = {"window_k": k_BGED[:, :, T:], "window_v": v_BGED[:, :, T:]}
    if state and padding is None and past >= sinks:
        new_state |= {name: state[name] for name in ("sink_k", "sink_v")}
    else:
        sinks_kv = {"sink_k": k_BGTD, "sink_v": v_BGTD}
        new_state |= {name: _sinks(x_BGTD, past_state[name], visibility) for name, x_BGTD in sinks_kv.items()}
    form = _step if T == 1 else _blocks
    return WindowSum(*form(q_BHTD, k_BGED, v_BGED, new_state["sink_k"], new_state["sink_v"], visibility), new_state)


@dataclass
class Visibility:
    """The keys that the queries see, and the scores of these keys."""

    window: int
    sinks: int
    past: int
    padding: Padding | None
    device: torch.device
    scale: float
    softcap: float | None

    @cached_property
    def past_B1(self) -> Tensor:
        """Number of earlier tokens, of each row or of all of them (1, 1)."""
        if self.padding is None:
            return torch.full((1, 1), self.past, device=self.device)
        return self.padding.past_B[:, None]

    @cached_property
    def first_B1(self) -> Tensor:
        """Number of the token in the first new column, of each row or of all of them (1, 1)."""
        return self.past_B1 if self.padding is None else self.padding.first_B[:, None]

    @cached_property
    def sink_S(self) -> Tensor:
        return torch.arange(self.sinks, device=self.device)

    @property
    def sees_everything(self) -> bool:
        """True if every query sees all sinks and all keys of its window."""
        return self.padding is None and self.past >= self.sinks + self.window - 1

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Compute the attention scores of queries (..., D) for keys (..., D)."""
        s = wide(q @ k.transpose(-1, -2)) * self.scale
        return s if self.softcap is None else self.softcap * torch.tanh(s / self.softcap)


def _step(
    q_BH1D: Tensor, k_BGWD: Tensor, v_BGWD: Tensor, sink_k_BGSD: Tensor, sink_v_BGSD: Tensor, visibility: Visibility
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute numerator, denominator and peak for one query."""
    (_, G, W, _), S = k_BGWD.shape, sink_k_BGSD.shape[2]
    q_BGRD = q_BH1D.squeeze(2).unflatten(1, (G, -1))
    s_BGRK = torch.cat([visibility.scores(q_BGRD, sink_k_BGSD), visibility.scores(q_BGRD, k_BGWD)], -1)
    if not visibility.sees_everything:
        far_BS = visibility.first_B1 - visibility.sink_S >= W
        valid_BW = visibility.first_B1 + torch.arange(1 - W, 1, device=k_BGWD.device) >= 0
        visible_BK = torch.cat([far_BS, valid_BW], 1)
        s_BGRK = s_BGRK.masked_fill(~visible_BK[:, None, None], torch.finfo(s_BGRK.dtype).min)
    peak_BGR1 = s_BGRK.detach().amax(-1, keepdim=True)
    weight_BGRK = (s_BGRK - peak_BGR1).exp()
    far_BGRS, near_BGRW = weight_BGRK.to(v_BGWD.dtype).split([S, W], -1)
    numerator_BGRD = near_BGRW @ v_BGWD + far_BGRS @ sink_v_BGSD
    denominator_BGR1 = weight_BGRK.sum(-1, keepdim=True)

    def per_head(x_BGR_: Tensor) -> Tensor:
        return x_BGR_.flatten(1, 2).unsqueeze(2)

    return per_head(numerator_BGRD), per_head(denominator_BGR1), per_head(peak_BGR1)


def _blocks(
    q_BHTD: Tensor, k_BGED: Tensor, v_BGED: Tensor, sink_k_BGSD: Tensor, sink_v_BGSD: Tensor, visibility: Visibility
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute numerator, denominator and peak for blocks of W queries, each with its keys and the W - 1 before."""
    T, G, W, device = q_BHTD.shape[2], k_BGED.shape[1], visibility.window, q_BHTD.device
    # Blocks of queries, and for each an overlapping view of its keys.
    blocks = -(-T // W)
    span = 2 * W - 1
    end = blocks * W - T
    q_BGRKQD = pad(q_BHTD, (0, 0, 0, end)).unflatten(2, (blocks, W)).unflatten(1, (G, -1))
    k_BGKUD, v_BGKUD = (pad(x, (0, 0, 0, end)).unfold(2, span, W).transpose(-1, -2) for x in (k_BGED, v_BGED))
    # Masks: keys in the window, and sinks that have left the window.
    row, key = torch.arange(W, device=device), torch.arange(span, device=device)
    in_window_QU = (key >= row[:, None]) & (key < row[:, None] + W)
    block_K1 = torch.arange(blocks, device=device)[:, None] * W
    valid_BKU = visibility.first_B1[:, :, None] + (block_K1 + key - (W - 1)) >= 0
    window_mask = (in_window_QU & valid_BKU[:, :, None])[:, None, None]
    query_BKQ = visibility.first_B1[:, :, None] + (block_K1 + row)
    sink_mask = (query_BKQ[..., None] - visibility.sink_S >= W)[:, None, None]

    def mask_scores(scores: Tensor, mask: Tensor) -> Tensor:
        # The minimum is finite, so a row that sees no key (a pad) becomes a harmless mean, never NaN.
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)

    # Scores, peaks and sums.
    near_BGRKQU = mask_scores(visibility.scores(q_BGRKQD, k_BGKUD[:, :, None]), window_mask)
    far_BGRKQS = mask_scores(visibility.scores(q_BGRKQD, sink_k_BGSD[:, :, None, None]), sink_mask)
    peak = near_BGRKQU.detach().amax(-1, keepdim=True)
    if sink_k_BGSD.shape[2]:
        peak = torch.maximum(peak, far_BGRKQS.detach().amax(-1, keepdim=True))
    near_BGRKQU, far_BGRKQS = (near_BGRKQU - peak).exp(), (far_BGRKQS - peak).exp()
    numerator = (
        near_BGRKQU.to(v_BGED.dtype) @ v_BGKUD[:, :, None] + far_BGRKQS.to(v_BGED.dtype) @ sink_v_BGSD[:, :, None, None]
    )
    denominator = near_BGRKQU.sum(-1, keepdim=True) + far_BGRKQS.sum(-1, keepdim=True)

    def per_token(x: Tensor) -> Tensor:
        return x.flatten(3, 4)[:, :, :, :T].flatten(1, 2)

    return per_token(numerator), per_token(denominator), per_token(peak)
