"""Student: a causal language model whose attention is replaced by a plan's mixers, as a transformers model.

`Student.from_teacher` creates one that shares every tensor with its teacher. It generates with a cache of the plan's
states, saves as safetensors (the teacher's state dict plus `...<attention module>.mixer.*`) and loads through the auto
classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from subquad.errors import UserError
from subquad.model.base import BaseStudent, BaseStudentConfig, auto_map
from subquad.model.cache import CACHE, StudentCache
from subquad.model.generation import StudentGenerationMixin
from subquad.model.interface import decoder_of, input_device, shapes_of
from subquad.model.layer_call import ForwardContext, forward_arguments
from subquad.model.packing import Layout
from subquad.model.teacher_check import check_causal
from subquad.plan import AttentionShape, Plan

logger = logging.get_logger(__name__)  # transformers' own, as the warnings are


class StudentConfig(BaseStudentConfig):
    """Teacher's configuration, plan, and paths of the attention modules."""

    model_type = "subquad"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}

    text_config: dict | PreTrainedConfig | None = None
    tie_word_embeddings: bool = False

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """Configuration of the backbone's text part."""
        inner = self.text_config
        return inner.get_text_config(*args, **kwargs) if isinstance(inner, PreTrainedConfig) else self


class Student(StudentGenerationMixin, BaseStudent):
    """Causal language model with the plan's mixers in place of attention. Create one with `from_teacher`."""

    config_class = StudentConfig
    main_input_name = "input_ids"
    backbone_field = "text_config"

    @classmethod
    def make_backbone(cls, config: StudentConfig, attention: str | None) -> PreTrainedModel:
        text_config: Any = config.text_config
        options = {"attn_implementation": attention}
        backbone: PreTrainedModel
        if type(text_config) in MODEL_FOR_CAUSAL_LM_MAPPING or not text_config.architectures:
            backbone = AutoModelForCausalLM.from_config(text_config, **options)
        else:  # a text part whose configuration is of no auto class (Mllama)
            backbone = getattr(transformers, text_config.architectures[0])._from_config(text_config, **options)
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
            "tie_word_embeddings": getattr(teacher.config.get_text_config(), "tie_word_embeddings", False),
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
        Documents that are packed into one row do not see each other (packing.py).

        Raises ValueError for a cache that is not a `StudentCache` (see `new_cache`), and for a mask that hides more
        than pads and later tokens; UserError for attention weights of a student that has none.
        """
        self.check_outputs(kwargs.get("output_attentions"))
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            by_default = getattr(self.config.get_text_config(), "use_cache", True)
            use_cache = cache is not None or (by_default and not self.training and labels is None)
        if use_cache and self.recomputes():
            switch_off(cache)
            use_cache, cache = False, None
        if use_cache and cache is None:
            cache = self.new_cache()
        tokens = inputs_embeds if input_ids is None else input_ids
        context = self._forward_context(attention_mask, cache, tokens, position_ids, kwargs)
        if isinstance(logits_to_keep, int) and logits_to_keep and any(shape.kv_from for shape in self.plan.shapes):
            # Given a number, Gemma 4 leaves out the other tokens in layers that share keys; their mixers need them.
            logits_to_keep = torch.arange(-logits_to_keep, 0, device=input_device(self.backbone))
        with forward_arguments(self.backbone, context) as context_arguments:
            return self.backbone(
                input_ids=input_ids,
                attention_mask=context.layout.attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                **context_arguments,
                **{CACHE: cache},
                **kwargs,
            )

    def final_hidden(
        self, inputs: Tensor, attention_mask: Tensor | None = None, forward_context: ForwardContext | None = None
    ) -> Tensor:
        """Hidden states that the output head reads, (B, T, M), without computing the head."""
        context = forward_context or self._forward_context(attention_mask, None, inputs)
        mask = context.layout.attention_mask if forward_context is None else attention_mask
        with forward_arguments(decoder_of(self.backbone), context) as context_arguments:
            return decoder_of(self.backbone)(
                input_ids=inputs, attention_mask=mask, use_cache=False, **context_arguments
            ).last_hidden_state

    def _forward_context(
        self,
        attention_mask: Tensor | None,
        cache: StudentCache | None,
        tokens: Tensor | None,
        position_ids: Tensor | None = None,
        packing: Mapping[str, Any] | None = None,
    ) -> ForwardContext:
        if cache is not None and not isinstance(cache, StudentCache):
            raise ValueError(f"a student needs its own cache (student.new_cache()), not a {type(cache).__name__}")
        if tokens is None:  # which the backbone's own error says
            return ForwardContext(cache=cache)
        return ForwardContext(Layout.of(attention_mask, cache, tokens, position_ids, packing), cache)

    def new_cache(self) -> StudentCache:
        """Empty cache for this student."""
        return StudentCache(self.backbone.config)

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

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.backbone.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Input embedding of another number of tokens, with the output head, as the backbone's class does it."""
        embedding = self.backbone.resize_token_embeddings(*args, **kwargs)
        self.vocab_size = self.config.get_text_config().vocab_size
        return embedding


def switch_off(cache: StudentCache | None) -> None:
    """Warns that a pass goes without a cache because its blocks are recomputed: they would read its new states.

    Raises UserError for a cache that holds tokens, which the pass cannot leave out.
    """
    if cache is not None and cache.get_seq_length() > 0:
        raise UserError(
            f"gradient checkpointing cannot continue a cache of {cache.get_seq_length()} tokens: run this pass under "
            "torch.no_grad(), or disable gradient checkpointing"
        )
    logger.warning_once("`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`.")


def tied(model: PreTrainedModel) -> bool:
    """Whether the output head of a causal language model is tied to its input embedding."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def register() -> None:
    """Registers students with transformers' auto classes; called by registration.py."""
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[StudentConfig.model_type] = Student.__name__  # whose labels Trainer shifts
    AutoConfig.register(StudentConfig.model_type, StudentConfig, exist_ok=True)
    AutoModelForCausalLM.register(StudentConfig, Student, exist_ok=True)
