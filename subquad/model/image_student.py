"""Image students: encoders (ViT, DeiT, DINOv2, SigLIP) whose attention is replaced by mixers.

An encoder reads all patches at once, so its mixers scan in both directions (`bidirectional: true`), with the prefix
tokens (class, registers) in the middle. It generates nothing and has no cache; the mixers save compute and memory on
images of many patches.

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
from subquad.model.interface import image_size, least_inputs, patch_grid, reads_images
from subquad.model.layer_call import ForwardContext, forward_arguments
from subquad.model.saliency import SaliencyModel
from subquad.plan import ATTENTION, Plan


class ImageStudentConfig(BaseStudentConfig):
    """Teacher's configuration, plan, and paths of the attention modules.

    `classifies`: whether the teacher has a classifier on top. `prefix_tokens`: tokens before those of the patches.
    """

    model_type = "subquad_image"
    sub_configs_defaults = {"vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit")}

    vision_config: dict | PreTrainedConfig | None = None
    classifies: bool = False
    prefix_tokens: int = 0


class ImageStudent(BaseStudent):
    """Image encoder, with or without a classifier, with the plan's mixers in place of attention."""

    config_class = ImageStudentConfig
    main_input_name = "pixel_values"
    backbone_field = "vision_config"

    @classmethod
    def make_backbone(cls, config: ImageStudentConfig, attention: str | None) -> PreTrainedModel:
        auto = AutoModelForImageClassification if config.classifies else AutoModel
        backbone: PreTrainedModel = auto.from_config(config.vision_config, attn_implementation=attention)
        return backbone

    @classmethod
    def describe(cls, teacher: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        family = type(teacher).__name__
        if not reads_images(teacher):
            raise UserError(f"{family} does not look at images: make a Student of it, not an ImageStudent")
        for name, options in plan.mixers.items():
            if name != ATTENTION and not options.get("bidirectional"):
                raise UserError(
                    f"mixer '{name}' looks back only, and {family} looks both ways: set bidirectional: true among its "
                    "options, or choose a mixer that has this option"
                )
        classifies = _classifies(teacher)
        auto_classes = ["AutoModelForImageClassification"] if classifies else ["AutoModel"]
        return {
            "classifies": classifies,
            "prefix_tokens": _prefix_tokens(teacher),
            "id2label": teacher.config.id2label,
            "label2id": teacher.config.label2id,
            "auto_map": auto_map(ImageStudentConfig, cls, auto_classes),
        }

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Class logits or hidden states of the backbone, for images (B, channels, height, width) of any size.

        Raises UserError for attention weights of a student that has none.
        """
        self.check_outputs(kwargs.get("output_attentions"))
        if labels is not None:  # which an encoder without a classifier does not take
            kwargs["labels"] = labels
        return self.backbone(pixel_values, **{**_positions(self.backbone, pixel_values), **kwargs})

    def final_hidden(self, inputs: Tensor, *, forward_context: ForwardContext | None = None) -> Tensor:
        """Input of the classifier, (B, 1, M); without a classifier, the states of all tokens, (B, T, M)."""
        with forward_arguments(self.backbone, forward_context or ForwardContext()) as context_arguments:
            return classifier_input(self.backbone, inputs, **context_arguments)


def _positions(model: Any, pixels_BCHW: Tensor) -> dict[str, bool]:
    """Keyword arguments that make a model interpolate its positions for images of another size than its own."""
    if tuple(pixels_BCHW.shape[-2:]) == image_size(model.config):
        return {}
    is_option = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if is_option else {}


@torch.no_grad()
def image_tokens(model: Any, size: tuple[int, int]) -> int:
    """Number of tokens of an image of this height and width in a model: patches and prefix tokens."""
    encoder = _encoder(model)
    empty_BCHW = least_inputs(model)["pixel_values"]
    pixels_BCHW = empty_BCHW.new_zeros(1, empty_BCHW.shape[1], *size)
    return int(encoder(pixels_BCHW, **_positions(encoder, pixels_BCHW)).last_hidden_state.shape[1])


def _prefix_tokens(teacher: PreTrainedModel) -> int:
    """Number of tokens that an encoder puts before the patches: class, distillation, registers."""
    size = image_size(teacher.config)
    rows, columns = patch_grid(teacher.config, size)
    prefix_tokens = image_tokens(teacher, size) - rows * columns
    if prefix_tokens < 0:
        raise UserError(
            f"{type(teacher).__name__} has fewer tokens than patches ({rows} x {columns}): Subquad converts "
            "encoders that keep one token for each patch"
        )
    return prefix_tokens


def classifier(model: Any) -> nn.Module | None:
    """Last linear map of a model for image classification; None for an encoder."""
    linears = [module for module in model.children() if isinstance(module, nn.Linear)]
    return linears[-1] if _classifies(model) and linears else None


def classifier_input(model: Any, pixels_BCHW: Tensor, **kwargs: Any) -> Tensor:
    """Input of a model's classifier, (B, 1, M); for an encoder without one, its last hidden states, (B, T, M).

    `kwargs`: keyword arguments of the model.
    """
    head, kwargs = classifier(model), {**_positions(model, pixels_BCHW), **kwargs}
    if head is None:
        hidden_BTM: Tensor = _encoder(model)(pixels_BCHW, **kwargs).last_hidden_state  # without a saliency decoder
        return hidden_BTM
    head_inputs: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda module, args: head_inputs.append(args[0]))
    try:
        model(pixels_BCHW, **kwargs)
    finally:
        hook.remove()
    return head_inputs[0][:, None]


def _classifies(model: Any) -> bool:
    """Whether a model's class is one of transformers' classes for image classification, one or several per family."""
    names = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES.values()
    return any(type(model).__name__ in ([name] if isinstance(name, str) else name) for name in names)


def _encoder(model: Any) -> Any:
    """Model without its classifier or its saliency decoder."""
    if not _classifies(model) and not isinstance(model, SaliencyModel):
        return model
    if model.base_model is not model:
        return model.base_model
    return next(child for child in model.children() if isinstance(child, PreTrainedModel))  # its class names none


def register() -> None:
    """Registers image students with transformers' auto classes; called by registration.py."""
    AutoConfig.register(ImageStudentConfig.model_type, ImageStudentConfig, exist_ok=True)
    AutoModel.register(ImageStudentConfig, ImageStudent, exist_ok=True)
    AutoModelForImageClassification.register(ImageStudentConfig, ImageStudent, exist_ok=True)
