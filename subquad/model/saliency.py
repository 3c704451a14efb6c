"""An image encoder with a decoder on top that says how much each pixel matters: a saliency map.

transformers has no such model, so that this one is Subquad's own: any encoder of its auto classes, and transposed
convolutions that double the grid of patches again and again, as saliency models on ViTs are commonly built. Its student
keeps the decoder, and can learn from the teacher's map (objective `saliency`).

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
    """The encoder's configuration, and the channels of the decoder's steps."""

    model_type = "saliency_encoder"
    sub_configs_defaults = {"encoder_config": SubConfigSpec(config_class=AutoConfig, model_type="dinov2")}

    encoder_config: dict | PreTrainedConfig | None = None
    widths: Sequence[int] = (256, 128, 64)

    def __getattr__(self, name: str) -> Any:
        if name in ("image_size", "patch_size", "num_channels", "hidden_size"):  # what the encoder says of itself
            return getattr(self.encoder_config, name)
        raise AttributeError(name)


@dataclass
class SaliencyOutput(BaseModelOutput):
    """The encoder's last hidden states, and the map: logits (B, H, W) of every pixel."""

    saliency: Tensor | None = None


class SaliencyModel(PreTrainedModel):
    """An encoder and its decoder; `forward` takes images (B, channels, H, W) and returns a `SaliencyOutput`."""

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
        """The map (B, H, W), as logits, from the last hidden states for images of this height and width."""
        height, width = patch_grid(self.config, size)
        patches_BTM = hidden_BTM[:, hidden_BTM.shape[1] - height * width :]
        maps = self.decoder(patches_BTM.transpose(1, 2).unflatten(2, (height, width)))
        return F.interpolate(maps, tuple(size), mode="bilinear", align_corners=False)[:, 0]


class _Decoder(nn.Module):
    """Steps that double height and width, and one channel at the end."""

    def __init__(self, width: int, widths: Sequence[int]) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for before, after in zip([width, *widths], widths, strict=False):
            steps += [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.steps = nn.Sequential(*steps)
        self.last = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, maps: Tensor) -> Tensor:
        one: Tensor = self.last(self.steps(maps))
        return one


def saliency_model(model: Any) -> SaliencyModel:
    """The model itself, or the one in a student. Raises TypeError for any other kind."""
    inside = getattr(model, "backbone", model)
    if not isinstance(inside, SaliencyModel):
        raise TypeError(f"{type(inside).__name__} makes no saliency map")
    return inside


def saliency_distance(student_BHW: Tensor, teacher_BHW: Tensor) -> Tensor:
    """Mean over pixels of the KL, in nats, of the student's probability that a pixel matters from the teacher's, ()."""
    wanted_BHW = teacher_BHW.sigmoid()
    cross = F.binary_cross_entropy_with_logits(student_BHW, wanted_BHW)
    return cross - F.binary_cross_entropy_with_logits(teacher_BHW, wanted_BHW)


def register() -> None:
    """Makes transformers' auto classes know this model; `import subquad` sees to it."""
    AutoConfig.register(SaliencyConfig.model_type, SaliencyConfig, exist_ok=True)
    AutoModel.register(SaliencyConfig, SaliencyModel, exist_ok=True)
