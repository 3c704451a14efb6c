"""The student: a teacher whose attention is replaced by a plan's mixers, as a transformers model.

`Student.from_teacher` makes one that shares every tensor with its teacher; it generates with a cache that holds what
the plan says, saves as safetensors (the teacher's state dict plus `...<attention module>.mixer.*`) and loads through
the auto classes. The teacher's own class does the computing, inside (`student.backbone`); only its attention function
is ours (attention.py).
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast

from subquad.attention import LayerMixer, Pass, attach, block_path, find_attention, keep_initialised, layer_mixer
from subquad.cache import StudentCache
from subquad.errors import UserError
from subquad.join import JoinStart
from subquad.mixers import Mixer, MixerInputs
from subquad.plan import ATTENTION, AttentionShape, Plan

# Lets a folder load with trust_remote_code=True where Subquad is installed but not imported.
REMOTE_CODE = '''"""Loads this model through the installed `subquad` package."""

from subquad.student import Student, StudentConfig  # noqa: F401
'''
REMOTE_FILE = "modeling_subquad.py"
AUTO_MAP = {
    "AutoConfig": f"{REMOTE_FILE[:-3]}.StudentConfig",
    "AutoModelForCausalLM": f"{REMOTE_FILE[:-3]}.Student",
}


class StudentConfig(PreTrainedConfig):
    """The teacher's configuration, the plan, and where the attention modules are.

    `plan` is the plan's YAML text; `attention_paths` are module paths in the teacher, one a layer; `attention` is the
    implementation (sdpa, eager, ...) of the heads that keep attention.
    """

    model_type = "subquad"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    text_config: dict | PreTrainedConfig | None = None
    plan: str = ""
    attention_paths: Sequence[str] = ()
    attention: str = "sdpa"
    tie_word_embeddings: bool = False


class Student(PreTrainedModel, GenerationMixin):
    """A causal language model with the plan's mixers in place of attention. Make one with `from_teacher`."""

    config_class = StudentConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    new_mixers: set[tuple[int, str]]  # (layer, name): of a student just made, those that have learned nothing yet
    _is_stateful = True  # a recurrent state cannot be rolled back, as assisted decoding would need

    def __init__(
        self, config: StudentConfig, backbone: PreTrainedModel | None = None, join_start: JoinStart = "identity"
    ) -> None:
        super().__init__(config)
        self.plan = Plan.from_yaml(config.plan)
        if backbone is None:
            requested = config._attn_implementation
            base = config.attention if requested in (None, "sdpa") else requested
            backbone = AutoModelForCausalLM.from_config(config.text_config, attn_implementation=base)
        self.backbone = backbone
        attach(backbone, config.attention_paths, self.plan, join_start)
        config.text_config = backbone.config
        self.post_init()

    # ------------------------------------------------------------------ making and saving

    @classmethod
    def from_teacher(
        cls,
        teacher: PreTrainedModel,
        plan: Plan,
        mixers_from: Student | Iterable[Student] = (),
        join_start: JoinStart = "identity",
    ) -> Student:
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
        for name, options in plan.mixers.items():
            if options.get("bidirectional"):
                raise UserError(
                    f"mixer '{name}' is bidirectional, and {type(teacher).__name__} predicts the next token"
                )
        config = StudentConfig(  # type: ignore[call-arg]  # takes any keyword; transformers' types do not say so
            text_config=teacher.config.to_dict(),
            plan=plan.to_yaml(),
            attention_paths=[site.path for site in sites],
            attention=teacher.config._attn_implementation,
            tie_word_embeddings=teacher.config.get_text_config().tie_word_embeddings,
            dtype=teacher.dtype,
            auto_map=dict(AUTO_MAP),
        )
        student = cls(config, backbone=_shared_copy(teacher), join_start=join_start)
        student.generation_config = copy.deepcopy(teacher.generation_config)
        for module, path in zip(student.attention_modules(), config.attention_paths, strict=True):
            place = next(teacher.get_submodule(path).parameters())
            layer_mixer(module).to(place.device, place.dtype)
        student.new_mixers = {
            (layer, name) for layer, mixers in enumerate(plan.layers) for name in mixers if name != ATTENTION
        }
        for other in [mixers_from] if isinstance(mixers_from, Student) else mixers_from:
            student._take_mixers(other)
        return student.eval()

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        plan_of: Callable[[list[AttentionShape]], Plan],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Student:
        """A student whose model has this configuration and random weights: smaller than a teacher, or another family.

        `plan_of`: its plan, given the shapes of its layers, as in `lambda shapes: Plan.by_layer(shapes, [], "gla")`.
        Raises UserError as `from_teacher` does.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            return cls.from_teacher(model, plan_of([site.shape for site in find_attention(model)]))

    def _take_mixers(self, other: Student) -> None:
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
        (folder / REMOTE_FILE).write_text(REMOTE_CODE, encoding="utf-8")

    # ------------------------------------------------------------------ running

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StudentCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Like any causal language model of transformers; `attention_mask` is (B, past + new), 0 at pads.

        Raises ValueError for a cache that is not a `StudentCache` (see `new_cache`).
        """
        if use_cache is None:
            use_cache = past_key_values is not None or (not self.training and labels is None)
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        return self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            student_pass=self._pass(attention_mask, past_key_values),
            **kwargs,
        )

    def final_hidden(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, student_pass: Pass | None = None
    ) -> Tensor:
        """The states that the output head reads, (B, T, M), without the head's own cost."""
        return self.backbone.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=False,
            student_pass=student_pass or self._pass(attention_mask, None),
        ).last_hidden_state

    def _pass(self, attention_mask: Tensor | None, cache: StudentCache | None) -> Pass:
        if cache is not None and not isinstance(cache, StudentCache):
            raise ValueError(f"a student needs its own cache (student.new_cache()), not a {type(cache).__name__}")
        if attention_mask is None or bool(attention_mask.all()):
            return Pass(None, cache)
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be (batch, tokens), not {tuple(attention_mask.shape)}")
        return Pass(attention_mask.bool(), cache)

    def new_cache(self) -> StudentCache:
        """An empty cache for this student's plan."""
        return StudentCache(self.plan)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` leaves the cache to `forward`

    # ------------------------------------------------------------------ for training

    def attention_modules(self) -> list[nn.Module]:
        """The modules that call the attention function, one a layer; each has a `mixer`."""
        return [self.backbone.get_submodule(path) for path in self.config.attention_paths]

    def mixers(self, layer: int) -> dict[str, Mixer]:
        """The mixers of one layer by name."""
        return layer_mixer(self.attention_modules()[layer]).by_name

    def blocks(self) -> list[nn.Module]:
        """The decoder blocks that these modules are in."""
        return [self.backbone.get_submodule(block_path(path)) for path in self.config.attention_paths]

    def mixer_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The weights that the teacher does not have."""
        return ((name, parameter) for name, parameter in self.named_parameters() if ".mixer." in name)

    def replaced_layers(self) -> list[int]:
        """Layers in which at least one head has another mixer than attention."""
        return [index for index, layer in enumerate(self.plan.layers) if list(layer) != [ATTENTION]]

    @torch.no_grad()
    def calibrate(self, input_ids: Tensor, mixers: Container[tuple[int, str]] | None = None) -> None:
        """Starts the mixers near the teacher's attention, layer by layer, from one teacher-forced batch (B, T).

        `mixers`: these only (layer, name); none: all.
        """

        def fit(layer: LayerMixer, name: str, inputs: MixerInputs, target_BHTD: Tensor) -> None:
            if mixers is None or (layer.layer, name) in mixers:
                layer.by_name[name].calibrate(inputs, target_BHTD)

        self.final_hidden(input_ids, student_pass=Pass(observer=fit))

    @torch.no_grad()
    def untie(self) -> None:
        """Gives the output head weights of its own; does nothing where it has them."""
        if tied(self):
            head: Any = self.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            self._set_tied(False)

    @torch.no_grad()
    def retie(self) -> None:
        """Makes input embedding and output head one again: their mean."""
        embedding: Any = self.get_input_embeddings()
        head: Any = self.get_output_embeddings()
        embedding.weight.data = (embedding.weight + head.weight) / 2
        head.weight = embedding.weight
        self._set_tied(True)

    def _set_tied(self, tied: bool) -> None:
        for config in (self.config, self.backbone.config, self.backbone.config.get_text_config()):
            config.tie_word_embeddings = tied

    @torch.no_grad()
    def unshare(self, names: Iterable[str]) -> None:
        """Gives these parameters (by name) storage of their own, so that training them leaves the teacher alone."""
        wanted = set(names)
        for name, parameter in self.named_parameters():
            if name in wanted:
                parameter.data = parameter.data.clone()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()


def tied(model: PreTrainedModel) -> bool:
    """Whether the output head of a causal language model is its input embedding."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _shared_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A second module tree over the same storage: new parameter objects, each side with its own requires_grad."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    twin = copy.deepcopy(model, memo)
    return keep_initialised(twin)


def register() -> None:
    """Makes transformers' auto classes know students; `import subquad` sees to it."""
    AutoConfig.register(StudentConfig.model_type, StudentConfig, exist_ok=True)
    AutoModelForCausalLM.register(StudentConfig, Student, exist_ok=True)
