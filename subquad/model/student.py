"""Student: a causal language model whose attention is replaced by a plan's mixers, as a transformers model.

`Student.from_teacher` creates one that shares every tensor with its teacher. It generates with a cache of the plan's
states, saves as safetensors (the teacher's state dict plus `...<attention module>.mixer.*`) and loads through the auto
classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast

from subquad.errors import UserError
from subquad.model.base import BaseStudent, BaseStudentConfig, auto_map
from subquad.model.cache import CACHE, StudentCache
from subquad.model.interface import shapes_of
from subquad.model.layer_call import ForwardContext
from subquad.model.teacher_check import check_causal
from subquad.plan import AttentionShape, Plan


class StudentConfig(BaseStudentConfig):
    """Teacher's configuration, plan, and paths of the attention modules."""

    model_type = "subquad"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    text_config: dict | PreTrainedConfig | None = None
    tie_word_embeddings: bool = False


class Student(BaseStudent, GenerationMixin):
    """Causal language model with the plan's mixers in place of attention. Create one with `from_teacher`."""

    config_class = StudentConfig
    main_input_name = "input_ids"
    backbone_field = "text_config"
    _is_stateful = True  # a recurrent state cannot be rolled back, as assisted decoding would need

    @classmethod
    def make_backbone(cls, config: StudentConfig, attention: str) -> PreTrainedModel:
        backbone: PreTrainedModel = AutoModelForCausalLM.from_config(config.text_config, attn_implementation=attention)
        return backbone

    @classmethod
    def describe(cls, teacher: PreTrainedModel, plan: Plan) -> dict[str, Any]:
        family = type(teacher).__name__
        if teacher.get_output_embeddings() is None:
            raise UserError(f"{family} predicts no next token: a Student is made of a causal language model")
        check_causal(teacher)
        for name, options in plan.mixers.items():
            if options.get("bidirectional"):
                raise UserError(f"mixer '{name}' is bidirectional, and {family} predicts the next token")
        return {
            "tie_word_embeddings": teacher.config.get_text_config().tie_word_embeddings,
            "auto_map": auto_map(StudentConfig, cls, ["AutoModelForCausalLM"]),
        }

    @classmethod
    def from_config(
        cls,
        config: PreTrainedConfig,
        plan_of: Callable[[list[AttentionShape]], Plan],
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> Student:
        """Student whose model has this configuration and random weights: smaller than a teacher, or another family.

        `plan_of`: function from the shapes of the model's layers to the student's plan, as in
        `lambda shapes: Plan.by_layer(shapes, [], "gla")`. Raises UserError as `from_teacher` does.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            return cls.from_teacher(model, plan_of(shapes_of(model)))

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
        cache: StudentCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Output of a causal language model of transformers; `attention_mask` is (B, past + new), 0 at pads.

        `cache` is the name of `past_key_values` since transformers 5.24; both names are accepted in every release.

        Raises ValueError for a cache that is not a `StudentCache` (see `new_cache`).
        """
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = cache is not None or (not self.training and labels is None)
        if use_cache and cache is None:
            cache = self.new_cache()
        return self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            forward_context=self._forward_context(attention_mask, cache),
            **{CACHE: cache},
            **kwargs,
        )

    def final_hidden(
        self, inputs: Tensor, attention_mask: Tensor | None = None, forward_context: ForwardContext | None = None
    ) -> Tensor:
        """Hidden states that the output head reads, (B, T, M), without computing the head."""
        return self.backbone.base_model(
            input_ids=inputs,
            attention_mask=attention_mask,
            use_cache=False,
            forward_context=forward_context or self._forward_context(attention_mask, None),
        ).last_hidden_state

    def _forward_context(self, attention_mask: Tensor | None, cache: StudentCache | None) -> ForwardContext:
        if cache is not None and not isinstance(cache, StudentCache):
            raise ValueError(f"a student needs its own cache (student.new_cache()), not a {type(cache).__name__}")
        if attention_mask is None or bool(attention_mask.all()):
            return ForwardContext(None, cache)
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be (batch, tokens), not {tuple(attention_mask.shape)}")
        return ForwardContext(attention_mask.bool(), cache)

    def new_cache(self) -> StudentCache:
        """Empty cache for this student's plan."""
        return StudentCache(self.plan)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` leaves the cache to `forward`

    @torch.no_grad()
    def untie(self) -> None:
        """Gives the output head its own weights, if it is tied to the input embedding."""
        if tied(self):
            head: Any = self.get_output_embeddings()
            head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
            self._set_tied(False)

    @torch.no_grad()
    def retie(self) -> None:
        """Ties output head and input embedding again, with the mean of their weights."""
        embedding: Any = self.get_input_embeddings()
        head: Any = self.get_output_embeddings()
        embedding.weight.data = (embedding.weight + head.weight) / 2
        head.weight = embedding.weight
        self._set_tied(True)

    def _set_tied(self, tied: bool) -> None:
        for config in (self.config, self.backbone.config, self.backbone.config.get_text_config()):
            config.tie_word_embeddings = tied

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()


def tied(model: PreTrainedModel) -> bool:
    """Whether the output head of a causal language model is tied to its input embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def register() -> None:
    """Registers students with transformers' auto classes; called by registration.py."""
    AutoConfig.register(StudentConfig.model_type, StudentConfig, exist_ok=True)
    AutoModelForCausalLM.register(StudentConfig, Student, exist_ok=True)
