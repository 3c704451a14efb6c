"""Linear attention: the exponential of softmax replaced by a product of positive features, normalised.

Legend: B batch, H query heads, G state heads, T new tokens, D head width, N width before the features, F features.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from subquad.mixers.base import HeadGroup, MixerInputs, State
from subquad.mixers.parts import FeatureMap, Scale, masked
from subquad.mixers.recurrent import Recurrent, RecurrentOptions
from subquad.ops import decay_chunk, decay_step
from subquad.ops.common import wide


class LinearOptions(RecurrentOptions):
    feature: Literal["elu", "softmax", "hedgehog"] = Field(
        "hedgehog", description="elu + 1, softmax over the channels, or Hedgehog's learned pair of softmaxes"
    )


class Linear(Recurrent):
    """y_i = sum_{j<=i} phi(q_i) phi(k_j) v_j / sum_{j<=i} phi(q_i) phi(k_j), times a learned scale per channel.

    Values are extended by a one, so the last column of the state (F, D + 1) is the denominator. The scale is fitted to
    the teacher.
    Sources: arXiv 2006.16236, eq. 12 (elu + 1); Liger, arXiv 2503.01496 (softmax); Hedgehog, arXiv 2402.04347, eq. 6.
    """

    options_class = LinearOptions
    options: LinearOptions
    forms = decay_chunk, decay_step
    averages = True

    def __init__(self, group: HeadGroup, options: LinearOptions) -> None:
        super().__init__(group, options)
        if options.feature == "hedgehog":
            self.query_features = FeatureMap(len(group.heads), self.state_dim, self.state_dim)
            self.key_features = FeatureMap(self.states, self.state_dim, self.state_dim)
        self.output = Scale(len(group.heads), group.head_dim)

    def features(self, x_BHTN: Tensor, feature_map: str) -> Tensor:
        """Map queries or keys to features (B, H, T, F). `feature_map` names the attribute with the learned map."""
        if self.options.feature == "hedgehog":
            features_BHTF: Tensor = getattr(self, feature_map)(x_BHTN)
            return features_BHTF
        x_BHTN = wide(x_BHTN) * self.group.head_dim**-0.25
        return x_BHTN.softmax(-1) if self.options.feature == "softmax" else nn.functional.elu(x_BHTN) + 1

    def queries_and_keys(self, inputs: MixerInputs) -> tuple[Tensor, Tensor]:
        q_BHTN, k_BGTN = super().queries_and_keys(inputs)
        return self.features(q_BHTN, "query_features"), self.features(k_BGTN, "key_features")

    def terms(self, inputs: MixerInputs) -> tuple[Tensor | None, ...]:
        q_BHTF, k_BGTF = self.features(inputs.q_BHTD, "query_features"), self.features(inputs.k_BGTD, "key_features")
        ones_BGT1 = torch.ones_like(inputs.v_BGTD[..., :1])
        return q_BHTF, masked(k_BGTF, inputs.real_BT), wide(torch.cat([inputs.v_BGTD, ones_BGT1], -1)), None

    def mix(self, inputs: MixerInputs, state: State) -> tuple[Tensor, State]:
        sums_BHTP, new_state = super().mix(inputs, state)
        y_BHTD = sums_BHTP[..., :-1] / sums_BHTP[..., -1:].clamp_min(1e-20)  # zero only at pads, which see no key
        return y_BHTD.to(inputs.v_BGTD.dtype), new_state

    @classmethod
    def state_shape(cls, group: HeadGroup, options: RecurrentOptions) -> tuple[int, int, int]:
        assert isinstance(options, LinearOptions)
        states, channels, width = super().state_shape(group, options)
        return states, channels * (2 if options.feature == "hedgehog" else 1), width + 1
