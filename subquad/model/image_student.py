"""Students that look at images: encoders (ViT, DeiT, DINOv2, SigLIP) whose attention is replaced by mixers.

An encoder sees all patches at once, so its mixers scan in both directions (`bidirectional: true`), with the tokens that
are no patches (class, registers) in the middle. There is nothing to generate and no cache: what is saved is work and
memory where an image has many patches.

Legend: B images, T tokens, M model width.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from subquad.errors import UserError
from subquad.model.base import BaseStudent, BaseStudentConfig, auto_map
from subquad.model.interface import image_size, least_inputs, patch_grid
from subquad.model.layer_call import ForwardContext
from subquad.model.saliency import SaliencyModel
from subquad.plan import ATTENTION, Plan


class ImageStudentConfig(BaseStudentConfig):
    """The teacher's configuration, the plan, and where the attention modules are.

    `classifies`: whether the teacher has a classifier on top. `prefix_tokens`: tokens before those of the patches.
    """

    model_type = "subquad_image"
    sub_configs_defaults = {"vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit")}

    vision_config: dict | PreTrainedConfig | None = None
    classifies: bool = False
    prefix_tokens: int = 0


class ImageStudent(BaseStudent):
    """An image encoder, with a classifier or without, that has the plan's mixers in place of attention."""

    config_class = ImageStudentConfig
    main_input_name = "pixel_values"
    backbone_field = "vision_config"

    @classmethod
    def make_backbone(cls, config: ImageStudentConfig, attention: str) -> PreTrainedModel:
        auto = AutoModelForImageClassification if config.classifies else AutoModel
        backbone: PreTrainedModel = auto.from_config(config.vision_config, attn_implementation=attention)
        return backbone

    @classmethod
    def describe(cls, teacher: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        family = type(teacher).__name__
        if teacher.main_input_name != "pixel_values":
            raise UserError(f"{family} does not look at images: make a Student of it, not an ImageStudent")
        for name, options in plan.mixers.items():
            if name != ATTENTION and not options.get("bidirectional"):
                raise UserError(
                    f"mixer '{name}' looks back only, and {family} looks both ways: set bidirectional: true among its "
                    "options, or choose a mixer that has this option"
                )
        classifies = _classifies(teacher)
        autos = ["AutoModelForImageClassification"] if classifies else ["AutoModel"]
        return {
            "classifies": classifies,
            "prefix_tokens": _prefix_tokens(teacher),
            "id2label": teacher.config.id2label,
            "label2id": teacher.config.label2id,
            "auto_map": auto_map(ImageStudentConfig, cls, autos),
        }

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """What the teacher returns: class logits, or hidden states. Images (B, channels, height, width) of any size."""
        return self.backbone(pixel_values, **{**_positions(self.backbone, pixel_values), **kwargs})

    def final_hidden(self, inputs: Tensor, *, forward_context: ForwardContext | None = None) -> Tensor:
        """What the classifier reads, (B, 1, M), or, without one, the states of all tokens, (B, T, M)."""
        return read_by_head(self.backbone, inputs, forward_context=forward_context)


def _positions(model: Any, pixels_BCHW: Tensor) -> dict[str, bool]:
    """Asks a model that must be asked to fit its positions to images of another size than it was made for."""
    if tuple(pixels_BCHW.shape[-2:]) == image_size(model.config):
        return {}
    asked = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if asked else {}


@torch.no_grad()
def image_tokens(model: Any, size: tuple[int, int]) -> int:
    """Tokens that an image of this height and width comes to in a model: those of its patches, and the others."""
    encoder = _encoder(model)
    first = least_inputs(model)["pixel_values"]
    pixels_BCHW = first.new_zeros(1, first.shape[1], *size)
    return int(encoder(pixels_BCHW, **_positions(encoder, pixels_BCHW)).last_hidden_state.shape[1])


def _prefix_tokens(teacher: PreTrainedModel) -> int:
    """Tokens that an encoder puts before those of the patches: class, distillation, registers."""
    size = image_size(teacher.config)
    rows, columns = patch_grid(teacher.config, size)
    return image_tokens(teacher, size) - rows * columns


def classifier(model: Any) -> nn.Module | None:
    """The last linear map of a model for image classification; None of an encoder."""
    linears = [module for module in model.children() if isinstance(module, nn.Linear)]
    return linears[-1] if _classifies(model) and linears else None


def read_by_head(model: Any, pixels_BCHW: Tensor, **how: Any) -> Tensor:
    """What the classifier of a model reads, (B, 1, M), or, of an encoder without one, its states, (B, T, M).

    `how`: keyword arguments of the model.
    """
    head, how = classifier(model), {**_positions(model, pixels_BCHW), **how}
    if head is None:
        hidden: Tensor = _encoder(model)(pixels_BCHW, **how).last_hidden_state  # and no decoder on top of it
        return hidden
    read: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    try:
        model(pixels_BCHW, **how)
    finally:
        hook.remove()
    return read[0][:, None]


def _classifies(model: Any) -> bool:
    """Whether a model is one of those that transformers has for image classification, one or several a family."""
    names = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    return any(type(model).__name__ in ([name] if isinstance(name, str) else name) for name in names)


def _encoder(model: Any) -> Any:
    """The model without its classifier or its decoder of saliency."""
    return model.base_model if _classifies(model) or isinstance(model, SaliencyModel) else model


def register() -> None:
    """Makes transformers' auto classes know students of images; `import subquad` sees to it."""
    AutoConfig.register(ImageStudentConfig.model_type, ImageStudentConfig, exist_ok=True)
    AutoModel.register(ImageStudentConfig, ImageStudent, exist_ok=True)
    AutoModelForImageClassification.register(ImageStudentConfig, ImageStudent, exist_ok=True)
