"""Base class of students: a transformers model with a plan's mixers in place of its attention.

The model's own class (`backbone`) does the computing; only its attention function is replaced (mixed_attention.py).
Subclasses define the kind of model: `Student` is a causal language model, `ImageStudent` an image encoder.

Legend: B batch, T tokens, H heads, D head width, M model width.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from typing_extensions import Self

from subquad.errors import UserError
from subquad.mixers import Mixer
from subquad.mixers.base import picked
from subquad.model.interface import block_path, find_attention, shapes_of
from subquad.model.layer_call import ForwardContext, LayerCall
from subquad.model.layer_mixer import layer_mixer
from subquad.model.mixed_attention import attach, attention_base
from subquad.model.placement import alike, attention_placements, is_offloaded, is_quantised, shared_copy
from subquad.plan import ATTENTION, JoinStart, Plan

REMOTE_FILE = "modeling_subquad.py"

# Fields of both a student's configuration and its backbone's that a caller may change
SHARED = {
    "output_hidden_states",
    "_output_attentions",
    "return_dict",
    "chunk_size_feed_forward",
    "tie_word_embeddings",
} | {"id2label", "label2id", "problem_type"}


class BaseStudentConfig(PreTrainedConfig):
    """Configuration of a student; a subclass adds the field that holds its backbone's configuration.

    `plan` is the plan's YAML text. `attention_paths` are module paths in the teacher, one per layer. `attention` is the
    implementation (sdpa, eager, ...) of the heads that keep attention.
    """

    plan: str = ""
    attention_paths: Sequence[str] = ()
    attention: str = "sdpa"

    def __getattr__(self, name: str) -> Any:
        """Attribute of the backbone's configuration, where this one has none: sizes, special tokens, switches."""
        inner = self._inner()
        if inner is None or name.startswith("_"):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        try:
            return getattr(inner, name)
        except RuntimeError as error:  # a size that differs from layer to layer (Gemma 4)
            raise AttributeError(str(error)) from error

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets what the backbone reads there: its own fields, and those of `SHARED` in both configurations."""
        inner = self._inner()
        own = name in vars(self) or hasattr(type(self), name)
        if own or inner is None or name.startswith("_") or not hasattr(inner, name):
            super().__setattr__(name, value)
        if inner is not None and (name in SHARED or (not own and hasattr(inner, name))):
            setattr(inner, name, value)

    def validate(self) -> None:
        """Checks the backbone's configuration, by its own rules: its sizes and layer types are read here, too."""
        inner = self._inner()
        if inner is not None:
            inner.validate()

    def _get_generation_parameters(self) -> dict[str, Any]:
        """Settings of `generate` that stand in this configuration by mistake: none that the backbone's one has."""
        inner, parameters = self._inner(), super()._get_generation_parameters()
        return {name: value for name, value in parameters.items() if not hasattr(inner, name)}

    def _inner(self) -> PreTrainedConfig | None:
        """Backbone's configuration; None before this one is complete."""
        values = vars(self)
        inner = next((values.get(field) for field in self.sub_configs_defaults), None)
        return inner if "_post_init_done" in values and isinstance(inner, PreTrainedConfig) else None


class BaseStudent(PreTrainedModel):
    """Base of the students; a subclass defines its configuration and its backbone. Create one with `from_teacher`."""

    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    backbone_field: ClassVar[str]  # field of the student's configuration that holds the backbone's configuration
    new_mixers: set[tuple[int, str]]  # (layer, name) of the mixers that `from_teacher` could not take from a student

    def __init__(
        self, config: Any, backbone: PreTrainedModel | None = None, join_start: JoinStart = "identity"
    ) -> None:
        if backbone is None:
            backbone = self._new_backbone(config)
        config._attn_implementation_internal = attention_base(backbone.config._attn_implementation)
        super().__init__(config)
        self.plan = Plan.from_yaml(config.plan)
        self.backbone = backbone
        self.loss_type = backbone.loss_type  # by which Trainer tells whether labels are shifted
        if hasattr(backbone, "accepts_loss_kwargs"):
            self.accepts_loss_kwargs = backbone.accepts_loss_kwargs
        attach(backbone, config.attention_paths, self.plan, join_start, getattr(config, "prefix_tokens", 0))
        backbone.config.architectures = [type(backbone).__name__]
        setattr(config, self.backbone_field, backbone.config)
        self.post_init()

    @classmethod
    def _new_backbone(cls, config: Any) -> PreTrainedModel:
        """Backbone with the requested attention implementation, or that of the teacher where it is installed."""
        inner = getattr(config, cls.backbone_field)
        requested = inner._attn_implementation or config._attn_implementation
        if requested is not None:
            return cls.make_backbone(config, attention_base(requested))
        try:
            return cls.make_backbone(config, config.attention)
        except (ImportError, ValueError):  # an implementation of the teacher's machine
            return cls.make_backbone(config, None)

    def is_custom_code(self) -> bool:  # type: ignore[override]  # of an instance, as transformers calls it
        """Whether the backbone is: transformers then leaves alone what its modules initialise in other modules."""
        return self.backbone.is_custom_code()

    @classmethod
    def make_backbone(cls, config: Any, attention: str | None) -> PreTrainedModel:
        """Model of a student's configuration, with this attention implementation and freshly initialised weights.

        `attention`: None is the default of the model's class.
        """
        raise NotImplementedError

    @classmethod
    def describe(cls, teacher: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        """Fields of the student's configuration that depend on the kind of teacher.

        Raises UserError for a teacher that this class does not convert, or a mixer that does not suit it.
        """
        raise NotImplementedError

    @classmethod
    def from_teacher(
        cls,
        teacher: PreTrainedModel,
        plan: Plan,
        mixers_from: Self | Iterable[Self] = (),
        join_start: JoinStart = "identity",
    ) -> Self:
        """Student of `teacher` with this plan; every tensor that is not a mixer's shares the teacher's storage.

        `join_start`: initial adapters of the parallel join (join.py).
        `mixers_from`: students of the same teacher whose learned weights are shared. In a layer with the same mixers on
        the same heads, the whole block is taken (only the mixers if one of the teachers is quantised); in any other
        layer, each mixer's weights for the heads it still has.
        `new_mixers` then holds the mixers for which no student had weights.
        Raises UserError where the teacher is unsupported or the plan was made for another shape.
        """
        # Check that the plan fits the teacher
        sites = find_attention(teacher)
        shapes = [site.shape for site in sites]
        if plan.shapes != shapes:
            layer = next((i for i, (a, b) in enumerate(zip(plan.shapes, shapes, strict=False)) if a != b), None)
            counts = f"{plan.num_layers} layers against {len(shapes)}"
            difference = counts if layer is None else f"they differ at layer {layer}"
            raise UserError(
                f"the plan was made for a model of another shape than {type(teacher).__name__}'s ({difference}): "
                "select a plan for this teacher"
            )

        # Build the student on the teacher's tensors
        make_config: Any = cls.config_class  # transformers leaves it open
        config = make_config(
            plan=plan.to_yaml(),
            attention_paths=[site.path for site in sites],
            attention=teacher.config._attn_implementation,
            dtype=teacher.dtype,
            **{cls.backbone_field: teacher.config.to_dict() | {"architectures": [type(teacher).__name__]}},
            **cls.describe(teacher, plan),
        )
        student = cls(config, backbone=shared_copy(teacher), join_start=join_start)
        placements = attention_placements(teacher, config.attention_paths)
        for module, placement in zip(student.attention_modules(), placements, strict=True):
            layer_mixer(module).to(*placement)

        # Take the mixers that the given students have learned
        student.new_mixers = {
            (layer, name) for layer, mixers in enumerate(plan.layers) for name in mixers if name != ATTENTION
        }
        for donor in [mixers_from] if isinstance(mixers_from, BaseStudent) else mixers_from:
            student._take_mixers(donor)
        return student.eval()

    def _take_mixers(self, donor: BaseStudent) -> None:
        """Shares the weights that `donor` has learned, and removes their mixers from `new_mixers`."""
        for layer, (block, donor_block) in enumerate(zip(self.blocks(), donor.blocks(), strict=True)):
            if self.plan.layers[layer] == donor.plan.layers[layer] and self.plan.join == donor.plan.join:
                pair: tuple[nn.Module, nn.Module] = block, donor_block
                if not alike(*pair):  # another form of the teacher, full or quantised, whose own weights stay
                    pair = layer_mixer(self.attention_modules()[layer]), layer_mixer(donor.attention_modules()[layer])
                for parameter, donor_parameter in zip(*(part.parameters() for part in pair), strict=True):
                    parameter.data = donor_parameter.data
                self.new_mixers -= {(layer, name) for name in self.mixers(layer)}
                continue
            donor_mixers = donor.mixers(layer)
            for name, mixer in self.mixers(layer).items():
                if name in donor_mixers and mixer.share(donor_mixers[name]):
                    self.new_mixers.discard((layer, name))

    def save_pretrained(self, save_directory: str | os.PathLike[Any], *args: Any, **kwargs: Any) -> None:
        """Writes config, weights (safetensors), plan, and the code file that `trust_remote_code=True` loads.

        Raises UserError for a student of a quantised teacher.
        """
        if is_quantised(self.backbone):
            raise UserError(
                "a student with its teacher's quantised weights cannot be saved: give its mixers to one of the teacher "
                "in full precision, Student.from_teacher(full, student.plan, mixers_from=student), and save that"
            )
        folder = Path(save_directory)
        type(self)._auto_class = type(self.config)._auto_class = None  # else transformers copies our source into it
        self.config.attention = attention_base(self.backbone.config._attn_implementation)
        if is_offloaded(self) and kwargs.get("state_dict") is None:
            kwargs["state_dict"] = get_state_dict_offloaded_model(self)
        super().save_pretrained(folder, *args, **kwargs)
        self.plan.save(folder / "plan.yaml")
        (folder / REMOTE_FILE).write_text(_remote_code(type(self)), encoding="utf-8")

    @property
    def loss_function(self) -> Any:
        """Backbone's loss."""
        return self.backbone.loss_function

    @loss_function.setter
    def loss_function(self, function: Any) -> None:
        self.backbone.loss_function = function

    def check_outputs(self, output_attentions: bool | None) -> None:
        """Raises UserError if a call asks for attention weights, and not every head computes them."""
        if not (self.config.output_attentions if output_attentions is None else output_attentions):
            return
        base = attention_base(self.backbone.config._attn_implementation)
        if self.replaced_layers():
            raise UserError("output_attentions: a student has no attention weights where mixers replaced attention")
        if base != "eager":
            raise UserError(
                f"output_attentions: {base} computes no attention weights; load the student with "
                "attn_implementation='eager'"
            )

    def recomputes(self) -> bool:
        """Whether the next pass keeps no activations in some block (gradient checkpointing)."""
        return torch.is_grad_enabled() and any(
            isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing and module.training
            for module in self.modules()
        )

    def attention_modules(self) -> list[nn.Module]:
        """Modules that call the attention function, one per layer; each has a `mixer`."""
        return [self.backbone.get_submodule(path) for path in self.config.attention_paths]

    def mixers(self, layer: int) -> dict[str, Mixer]:
        """Mixers of one layer by name."""
        return layer_mixer(self.attention_modules()[layer]).by_name

    def blocks(self) -> list[nn.Module]:
        """Decoder or encoder blocks around the attention modules, one per layer."""
        return [self.backbone.get_submodule(block_path(path)) for path in self.config.attention_paths]

    def mixer_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Weights that the teacher does not have."""
        return ((name, parameter) for name, parameter in self.named_parameters() if ".mixer." in name)

    def replaced_layers(self) -> list[int]:
        """Layers in which at least one head has another mixer than attention."""
        return [index for index, layer in enumerate(self.plan.layers) if list(layer) != [ATTENTION]]

    @torch.no_grad()
    def unshare(self, names: Iterable[str]) -> None:
        """Gives these parameters (by name) their own storage, so that training them leaves the teacher unchanged."""
        names = set(names)
        for name, parameter in self.named_parameters():
            if name in names:
                parameter.data = parameter.data.clone()

    def final_hidden(self, inputs: Tensor, *, forward_context: ForwardContext | None = None) -> Tensor:
        """Hidden states that the model's head reads, (B, T, M), for token ids or images."""
        raise NotImplementedError

    @torch.no_grad()
    def calibrate(self, inputs: Tensor, mixers: Container[tuple[int, str]] | None = None) -> None:
        """Fits the mixers to the teacher's attention, layer by layer, on one teacher-forced batch.

        `mixers`: (layer, name) of the mixers to fit; None fits all.
        """

        def fit(call: LayerCall) -> Tensor:
            y_BHTD = call.attention()
            for name, mixer in call.mixers.items():
                if mixers is None or (call.layer, name) in mixers:
                    mixer.calibrate(call.inputs(name), picked(y_BHTD, mixer.group.heads))
            return y_BHTD

        self.final_hidden(inputs, forward_context=ForwardContext(around=fit))


def auto_map(config: type[PreTrainedConfig], model: type[BaseStudent], auto_classes: Sequence[str]) -> dict[str, str]:
    """Classes in the code file of a saved student, by the auto classes that load them."""
    module = REMOTE_FILE.removesuffix(".py")
    names = {"AutoConfig": config.__name__} | {auto: model.__name__ for auto in auto_classes}
    return {auto: f"{module}.{name}" for auto, name in names.items()}


def _remote_code(model: type[BaseStudent]) -> str:
    """Code file by which a folder loads with trust_remote_code=True where Subquad is installed but not imported."""
    names = f"{model.__name__}, {model.config_class.__name__}"  # type: ignore[union-attr]
    return (
        '"""Loads this model through the installed `subquad` package."""\n\n'
        f"from subquad import {names}  # noqa: F401\n"
    )


def plan_of(model: Any) -> Plan:
    """Plan of a student; for any other model, the plan that is all attention."""
    return model.plan if isinstance(model, BaseStudent) else Plan.all_attention(shapes_of(model))
