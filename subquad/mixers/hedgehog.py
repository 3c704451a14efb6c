"""Hedgehog: softmax over a near window and linear attention over all older tokens, with one denominator.

Legend: B batch, H query heads, G state heads, T new tokens, D head width, F features, W window.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.mixers.base import HeadGroup, Held, Mixer, MixerInputs, State
from subquad.mixers.parts import FeatureMap
from subquad.mixers.sliding_window import WindowOptions, window_held, window_of
from subquad.ops import WindowSum, decay_chunk, decay_read
from subquad.ops.common import joined, wide

CAUTION = 2.0  # subtracted from the fitted log c, see `Hedgehog.calibrate`


class HedgehogOptions(WindowOptions):
    feature_dim: int | None = Field(None, ge=1, description="half the number of features; default: the head width")


class Hedgehog(Mixer):
    """o_i = (sum_near e^{q k scale} v + c sum_far phi(q) phi(k) v) / (the same without v).

    Near keys are the last `window` and the first `sinks`; all others are far. c > 0 is one learned factor per head. The
    far sum's state is one F x (D + 1) matrix per key/value head. Values are extended by a one, so its last column is
    the far part of the denominator.
    Source: LoLCATs (arXiv 2410.10254, eq. 6: its gamma is 1 / c), with sinks added. Raises UserError for a
    `feature_dim` above the head width.
    """

    options_class = HedgehogOptions
    options: HedgehogOptions

    def __init__(self, group: HeadGroup, options: HedgehogOptions) -> None:
        super().__init__(group, options)
        features = options.feature_dim or group.head_dim
        if features > group.head_dim:
            raise UserError(f"hedgehog's feature_dim of {features} is above the head width of {group.head_dim}")
        self.query_map = FeatureMap(len(group.heads), group.head_dim, features)
        self.key_map = FeatureMap(group.states(share=True), group.head_dim, features)
        self.log_far_H = nn.Parameter(torch.zeros(len(group.heads)))

    def queries_and_keys(self, inputs: MixerInputs) -> tuple[Tensor, Tensor]:
        inputs = self.match_states(inputs, share=True)
        return self.query_map(inputs.q_BHTD), self.key_map(inputs.k_BGTD)

    def mix(self, inputs: MixerInputs, state: State) -> tuple[Tensor, State]:
        inputs = self.match_states(inputs, share=True)
        near_sum = window_of(inputs, {name: x for name, x in state.items() if name != "far"}, self.options)
        far_BHTP, far_state = self.far_sums(inputs, state)
        return self.combine(near_sum, far_BHTP), near_sum.state | {"far": far_state}

    def far_sums(self, inputs: MixerInputs, state: State) -> tuple[Tensor, Tensor]:
        """Compute the sums [far numerator, far denominator] (B, H, T, D + 1) and their state after the new tokens.

        Between calls the state holds every token that the *next* query no longer sees in its window. The first new
        query therefore reads the state unchanged. Before each later query, one more token leaves the window.
        """
        T, padding = inputs.k_BGTD.shape[2], inputs.padding
        window = self.options.window - 1
        # Keys and values of the T columns that leave the window, one for each new query.
        if state and padding is not None and padding.real_BT is not None:
            k = padding.extend(state["window_k"], inputs.k_BGTD)[:, :, :T]
            v = padding.extend(state["window_v"], inputs.v_BGTD)[:, :, :T]
        elif state and window >= T:
            k, v = state["window_k"][:, :, :T], state["window_v"][:, :, :T]
        elif state:
            k = joined(state["window_k"], inputs.k_BGTD)[:, :, :T]
            v = joined(state["window_v"], inputs.v_BGTD)[:, :, :T]
        else:
            k, v = (nn.functional.pad(x, (0, 0, window, 0))[:, :, :T] for x in (inputs.k_BGTD, inputs.v_BGTD))
        k_BGTF = self.key_map(k)
        # Sinks, pads and positions before the sequence never enter the far sum.
        if padding is not None or inputs.past < window + self.options.sinks:
            column_T = torch.arange(T, device=k.device)
            first_B1 = inputs.past if padding is None else padding.first_B[:, None]
            leaving_BT = column_T + (first_B1 - window) >= self.options.sinks
            if inputs.real_BT is not None:
                leaving_BT = leaving_BT & inputs.real_BT
            k_BGTF = k_BGTF * leaving_BT.view(-1, 1, T, 1)
        v_BGTP = nn.functional.pad(wide(v), (0, 1), value=1.0)
        q_BHTF = self.query_map(inputs.q_BHTD)

        # Each query reads the state before its own token enters, so keys and values are shifted by one.
        last_k, last_v = k_BGTF[:, :, -1:], v_BGTP[:, :, -1:]
        if state and T == 1:
            y_BHTP, far_state = decay_read(q_BHTF, state["far"]), state["far"]
        else:
            k_BGTF, v_BGTP = (nn.functional.pad(x, (0, 0, 1, -1)) for x in (k_BGTF, v_BGTP))
            y_BHTP, far_state = decay_chunk(q_BHTF, k_BGTF, v_BGTP, None, state.get("far"))
        return y_BHTP, torch.addcmul(far_state, last_k.transpose(-1, -2), last_v)

    def combine(self, near_sum: WindowSum, far_BHTP: Tensor) -> Tensor:
        """Combine both sums under one denominator, dividing by the larger scale to avoid over- and underflow."""
        log_far_H11 = wide(self.log_far_H)[:, None, None]
        far_size = far_BHTP[..., -1:].detach().log() + log_far_H11.detach()  # -inf if no token is far
        peak = torch.maximum(near_sum.peak_BHT1, far_size)
        near_weight = (near_sum.peak_BHT1 - peak).exp()
        far_weight = (log_far_H11 - peak).clamp_max(80.0).exp()  # the bound applies only if the far sum is zero
        numerator = near_weight * near_sum.numerator_BHTD + far_weight * far_BHTP[..., :-1]
        denominator = near_weight * near_sum.denominator_BHT1 + far_weight * far_BHTP[..., -1:]
        return (numerator / denominator).to(near_sum.numerator_BHTD.dtype)

    @classmethod
    def held(cls, group: HeadGroup, options: HedgehogOptions, context: int) -> dict[str, Held]:
        states, features = group.states(share=True), 2 * (options.feature_dim or group.head_dim)
        far_state = Held((states, features, group.head_dim + 1), wide=True)
        return window_held(states, group.head_dim, options) | {"far": far_state}

    @torch.no_grad()
    def calibrate(self, inputs: MixerInputs, target_BHTD: Tensor) -> None:
        """Grid-search the sharpness of the features and c, by the norm of the output error on every eighth token.

        c is then divided by e^CAUTION. Untrained features select keys poorly, and the c with the smallest local error
        disturbs the following layers. On SmolLM2-135M with every second layer replaced (window 128, length 1,024), the
        KL to the teacher was 0.071 with that c, 0.043 with e^-2 of it, and 0.045 with the window alone.
        """
        # The near sum is the same for every candidate.
        inputs = self.match_states(inputs, share=True)
        near_sum = window_of(inputs, {}, self.options)
        token_slice = slice(None, None, 8)
        near_sum = WindowSum(
            near_sum.numerator_BHTD[:, :, token_slice],
            near_sum.denominator_BHT1[:, :, token_slice],
            near_sum.peak_BHT1[:, :, token_slice],
            state={},
        )
        # Error of every pair of sharpness and c, per head.
        maps = (self.query_map.weight_HDF, self.key_map.weight_HDF)
        starts = [weight.clone() for weight in maps]
        sharpness = torch.tensor([0.25, 0.5, 1.0, 2.0]).to(self.log_far_H)
        factors = torch.arange(-12.0, 9.0).to(self.log_far_H)
        errors = []
        for scale in sharpness:
            for weight, start in zip(maps, starts, strict=True):
                weight.copy_(start * scale)
            far_BHTP = self.far_sums(inputs, {})[0][:, :, token_slice]
            for factor in factors:
                self.log_far_H.fill_(factor)
                error_BHTD = wide(self.combine(near_sum, far_BHTP) - target_BHTD[:, :, token_slice])
                errors.append(error_BHTD.norm(dim=-1).sum((0, 2)))
        least_SH, factor_SH = torch.stack(errors).unflatten(0, (len(sharpness), -1)).min(1)
        # The best pair of each head; heads that share a state share its sharpness.
        sharp_G = least_SH.unflatten(1, (len(starts[1]), -1)).sum(-1).argmin(0)
        sharp_H = sharp_G.repeat_interleave(len(starts[0]) // len(starts[1]))
        for weight, start, best in zip(maps, starts, (sharp_H, sharp_G), strict=True):
            weight.copy_(start * sharpness[best][:, None, None])
        self.log_far_H.copy_(factors[factor_SH.gather(0, sharp_H[None])[0]] - CAUTION)
