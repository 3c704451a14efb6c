"""What every student is: a model with a plan's mixers in place of its attention, as a transformers model.

The model's own class does the computing, inside (`backbone`); only its attention function is ours (attention.py). What
kind of model that is, its subclasses say: `Student` is a causal language model, `ImageStudent` an image encoder.

Legend: B batch, T tokens, H heads, D head width, M model width.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from typing_extensions import Self

from subquad.errors import UserError
from subquad.mixers import Mixer
from subquad.mixers.base import picked
from subquad.model.interface import block_path, find_attention, shapes_of
from subquad.model.layer_call import ForwardContext, LayerCall
from subquad.model.layer_mixer import keep_initialised, layer_mixer
from subquad.model.mixed_attention import attach
from subquad.plan import ATTENTION, JoinStart, Plan

REMOTE_FILE = "modeling_subquad.py"


class BaseStudentConfig(PreTrainedConfig):
    """What a student's configuration says beyond its backbone's, which a subclass names.

    `plan` is the plan's YAML text; `attention_paths` are module paths in the teacher, one a layer; `attention` is the
    implementation (sdpa, eager, ...) of the heads that keep attention.
    """

    plan: str = ""
    attention_paths: Sequence[str] = ()
    attention: str = "sdpa"


class BaseStudent(PreTrainedModel):
    """Base of the students; a subclass names its configuration and makes its backbone. Make one with `from_teacher`."""

    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    inner: ClassVar[str]  # what its configuration calls that of the backbone
    new_mixers: set[tuple[int, str]]  # (layer, name): of a student just made, those that have learned nothing yet

    def __init__(
        self, config: Any, backbone: PreTrainedModel | None = None, join_start: JoinStart = "identity"
    ) -> None:
        super().__init__(config)
        self.plan = Plan.from_yaml(config.plan)
        if backbone is None:
            requested = config._attn_implementation
            base = config.attention if requested in (None, "sdpa") else requested
            backbone = self.make_backbone(config, base)
        self.backbone = backbone
        attach(backbone, config.attention_paths, self.plan, join_start, getattr(config, "prefix_tokens", 0))
        setattr(config, self.inner, backbone.config)
        self.post_init()

    @classmethod
    def make_backbone(cls, config: Any, attention: str) -> PreTrainedModel:
        """The model of a student's configuration, with this attention implementation and no weights yet."""
        raise NotImplementedError

    @classmethod
    def describe(cls, teacher: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        """What a student's configuration says of its teacher beyond where its attention is.

        Raises UserError for a teacher that this class does not convert, or a mixer that does not suit it.
        """
        raise NotImplementedError

    # ------------------------------------------------------------------ making and saving

    @classmethod
    def from_teacher(
        cls,
        teacher: PreTrainedModel,
        plan: Plan,
        mixers_from: Self | Iterable[Self] = (),
        join_start: JoinStart = "identity",
    ) -> Self:
        """A student of `teacher` with this plan; every tensor that is not a mixer's shares the teacher's storage.

        `join_start`: how the adapters of the parallel join begin (join.py).
        `mixers_from`: other students of the same teacher. Where the plan has the same mixers on the same heads of a
        layer, what one learned in that layer's block is taken (shared); elsewhere what its mixers learned for the heads
        that they still have. `new_mixers` are then those that found nothing to take.
        Raises UserError where the teacher is unsupported or the plan was made for another shape.
        """
        sites = find_attention(teacher)
        shapes = [site.shape for site in sites]
        if plan.shapes != shapes:
            wrong = next((i for i, (a, b) in enumerate(zip(plan.shapes, shapes, strict=False)) if a != b), None)
            count = f"{plan.num_layers} layers against {len(shapes)}"
            where = count if wrong is None else f"they differ at layer {wrong}"
            raise UserError(f"the plan was made for a model of another shape than {type(teacher).__name__}'s: {where}")
        make_config: Any = cls.config_class  # transformers leaves it open
        config = make_config(
            plan=plan.to_yaml(),
            attention_paths=[site.path for site in sites],
            attention=teacher.config._attn_implementation,
            dtype=teacher.dtype,
            **{cls.inner: teacher.config.to_dict() | {"architectures": [type(teacher).__name__]}},
            **cls.describe(teacher, plan),
        )
        student = cls(config, backbone=_shared_copy(teacher), join_start=join_start)
        if teacher.can_generate():
            student.generation_config = copy.deepcopy(teacher.generation_config)
        for module, path in zip(student.attention_modules(), config.attention_paths, strict=True):
            place = next(teacher.get_submodule(path).parameters())
            layer_mixer(module).to(place.device, place.dtype)
        student.new_mixers = {
            (layer, name) for layer, mixers in enumerate(plan.layers) for name in mixers if name != ATTENTION
        }
        for other in [mixers_from] if isinstance(mixers_from, BaseStudent) else mixers_from:
            student._take_mixers(other)
        return student.eval()

    def _take_mixers(self, other: BaseStudent) -> None:
        for layer, (mine, theirs) in enumerate(zip(self.blocks(), other.blocks(), strict=True)):
            if self.plan.layers[layer] == other.plan.layers[layer] and self.plan.join == other.plan.join:
                for parameter, source in zip(mine.parameters(), theirs.parameters(), strict=True):
                    parameter.data = source.data
                self.new_mixers -= {(layer, name) for name in self.mixers(layer)}
                continue
            others = other.mixers(layer)
            for name, mixer in self.mixers(layer).items():
                if name in others and mixer.share(others[name]):
                    self.new_mixers.discard((layer, name))

    def save_pretrained(self, save_directory: str | os.PathLike[Any], *args: Any, **kwargs: Any) -> None:
        """Writes config, weights (safetensors), plan, and the file by which `trust_remote_code=True` loads them."""
        folder = Path(save_directory)
        type(self)._auto_class = type(self.config)._auto_class = None  # else transformers copies our source beside it
        super().save_pretrained(folder, *args, **kwargs)
        self.plan.save(folder / "plan.yaml")
        (folder / REMOTE_FILE).write_text(_remote_code(type(self)), encoding="utf-8")

    # ------------------------------------------------------------------ its parts

    def attention_modules(self) -> list[nn.Module]:
        """The modules that call the attention function, one a layer; each has a `mixer`."""
        return [self.backbone.get_submodule(path) for path in self.config.attention_paths]

    def mixers(self, layer: int) -> dict[str, Mixer]:
        """The mixers of one layer by name."""
        return layer_mixer(self.attention_modules()[layer]).by_name

    def blocks(self) -> list[nn.Module]:
        """The blocks that these modules are in."""
        return [self.backbone.get_submodule(block_path(path)) for path in self.config.attention_paths]

    def mixer_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights that the teacher does not have."""
        return ((name, parameter) for name, parameter in self.named_parameters() if ".mixer." in name)

    def replaced_layers(self) -> list[int]:
        """Layers in which at least one head has another mixer than attention."""
        return [index for index, layer in enumerate(self.plan.layers) if list(layer) != [ATTENTION]]

    @torch.no_grad()
    def unshare(self, names: Iterable[str]) -> None:
        """Gives these parameters (by name) storage of their own, so that training them leaves the teacher alone."""
        wanted = set(names)
        for name, parameter in self.named_parameters():
            if name in wanted:
                parameter.data = parameter.data.clone()

    def final_hidden(self, inputs: Tensor, *, forward_context: ForwardContext | None = None) -> Tensor:
        """The hidden states that the model's head reads, (B, T, M), of token ids or of images."""
        raise NotImplementedError

    @torch.no_grad()
    def calibrate(self, inputs: Tensor, mixers: Container[tuple[int, str]] | None = None) -> None:
        """Starts the mixers near the teacher's attention, layer by layer, from one teacher-forced batch.

        `mixers`: these only (layer, name); none: all.
        """

        def fit(call: LayerCall) -> Tensor:
            y_BHTD = call.attention()
            for name, mixer in call.mixers.items():
                if mixers is None or (call.layer, name) in mixers:
                    mixer.calibrate(call.inputs(name), picked(y_BHTD, mixer.group.heads))
            return y_BHTD

        self.final_hidden(inputs, forward_context=ForwardContext(around=fit))


def auto_map(config: type[PreTrainedConfig], model: type[BaseStudent], autos: Sequence[str]) -> dict[str, str]:
    """The classes of the file beside a saved student, by the auto classes that load them."""
    module = REMOTE_FILE.removesuffix(".py")
    names = {"AutoConfig": config.__name__} | {auto: model.__name__ for auto in autos}
    return {auto: f"{module}.{name}" for auto, name in names.items()}


def _remote_code(model: type[BaseStudent]) -> str:
    """Lets a folder load with trust_remote_code=True where Subquad is installed but not imported."""
    names = f"{model.__name__}, {model.config_class.__name__}"  # type: ignore[union-attr]
    return (
        '"""Loads this model through the installed `subquad` package."""\n\n'
        f"from subquad import {names}  # noqa: F401\n"
    )


def _shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same storage: new parameter objects, each side with its own requires_grad."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    twin = copy.deepcopy(model, memo)
    return keep_initialised(twin)


def plan_of(model: Any) -> Plan:
    """A student's own plan; any other model's is all attention."""
    return model.plan if isinstance(model, BaseStudent) else Plan.all_attention(shapes_of(model))
