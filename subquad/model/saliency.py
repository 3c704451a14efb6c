"""Saliency model: an image encoder with a decoder that predicts how salient each pixel is.

transformers has no such model, so Subquad defines one: any encoder of the auto classes, and transposed convolutions
that double the resolution of the patch grid step by step, as is common for saliency models on ViTs. A student keeps the
decoder, and can learn from the teacher's map (objective `saliency`).

Legend: B images, T tokens, M model width, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import BaseModelOutput

from subquad.model.interface import patch_grid


class SaliencyConfig(PreTrainedConfig):
    """Configuration of the encoder, and output channels of each decoder step."""

    model_type = "saliency_encoder"
    sub_configs_defaults = {"encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="dinov2")}

    encoder_config: dict | PreTrainedConfig | None = None
    widths: Sequence[int] = (256, 128, 64)

    def __getattr__(self, name: str) -> Any:
        if name in ("image_size", "patch_size", "num_channels", "hidden_size"):  # fields of the encoder's configuration
            return getattr(self.encoder_config, name)
        raise AttributeError(name)


@dataclass
class SaliencyOutput(BaseModelOutput):
    """Encoder's last hidden states, and the saliency map: logits (B, H, W) of every pixel."""

    saliency: Tensor | None = None


class SaliencyModel(PreTrainedModel):
    """Encoder and decoder; `forward` takes images (B, channels, H, W) and returns a `SaliencyOutput`."""

    config_class = SaliencyConfig
    main_input_name = "pixel_values"
    base_model_prefix = "encoder"
    _supports_sdpa = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config)
        self.decoder = _Decoder(config.hidden_size, config.widths)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> SaliencyOutput:
        hidden_BTM = self.encoder(pixel_values, **kwargs).last_hidden_state
        return SaliencyOutput(hidden_BTM, saliency=self.decode(hidden_BTM, pixel_values.shape[-2:]))

    def decode(self, hidden_BTM: Tensor, size: Sequence[int]) -> Tensor:
        """Saliency map (B, H, W), as logits, from the last hidden states of images of this height and width."""
        height, width = patch_grid(self.config, size)
        patches_BTM = hidden_BTM[:, hidden_BTM.shape[1] - height * width :]
        maps = self.decoder(patches_BTM.transpose(1, 2).unflatten(2, (height, width)))
        return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)[:, 0]


class _Decoder(nn.Module):
    """Decoder of a patch grid: steps that double height and width, and a final map to one channel."""

    def __init__(self, width: int, widths: Sequence[int]) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for channels_in, channels_out in zip([width, *widths], widths, strict=False):
            upsample = nn.ConvTranspose2d(channels_in, channels_out, 4, stride=2, padding=1)
            steps += [upsample, nn.BatchNorm2d(channels_out), nn.ReLU()]
        self.steps = nn.Sequential(*steps)
        self.last = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, maps: Tensor) -> Tensor:
        saliency: Tensor = self.last(self.steps(maps))
        return saliency


def saliency_model(model: Any) -> SaliencyModel:
    """Saliency model: the model itself, or a student's backbone. Raises TypeError for any other kind."""
    backbone = getattr(model, "backbone", model)
    if not isinstance(backbone, SaliencyModel):
        raise TypeError(f"{type(backbone).__name__} makes no saliency map")
    return backbone


def saliency_distance(student_BHW: Tensor, teacher_BHW: Tensor) -> Tensor:
    """Mean over pixels of the KL from the teacher's probability of saliency to the student's, in nats, ()."""
    target_BHW = teacher_BHW.sigmoid()
    cross = F.binary_cross_entropy_with_logits(student_BHW, target_BHW)
    return cross - F.binary_cross_entropy_with_logits(teacher_BHW, target_BHW)


def register() -> None:
    """Registers this model with transformers' auto classes; called by registration.py."""
    AutoConfig.register(SaliencyConfig.model_type, SaliencyConfig, exist_ok=True)
    AutoModel.register(SaliencyConfig, SaliencyModel, exist_ok=True)
