"""A model in two halves: its last hidden states, and the output head that a chunk of them at a time goes through.

Legend of tensor suffixes: B batch, T positions, M model width, V vocabulary.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from subquad.errors import UserError
from subquad.model.base import BaseStudent
from subquad.model.image_student import ImageStudent, classifier, read_by_head
from subquad.model.interface import least_inputs
from subquad.model.student import Student


def causal_lm(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model that holds the output head: the model itself, or a student's backbone."""
    return model.backbone if isinstance(model, BaseStudent) else model


def final_hidden(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The states the output head reads (after the final norm), with no head applied: no (B, T, V) tensor is made.

    `input_ids` (B, T) token ids, `attention_mask` (B, T) of 1 and 0 or None -> (B, T, M). Of images (B, channels,
    height, width): what the classifier reads, (B, 1, M), or, of an encoder without one, its states (B, T, M).
    """
    if isinstance(model, Student):
        return model.final_hidden(input_ids, attention_mask)
    if isinstance(model, ImageStudent):
        return model.final_hidden(input_ids)
    if model.main_input_name == "pixel_values":
        return read_by_head(model, input_ids)
    return model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


@dataclass(frozen=True)
class OutputHead:
    """An output head: `softcap(scale * (hidden @ weight.T + bias))`, the soft-cap being `cap * tanh(x / cap)`."""

    weight_VM: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "OutputHead":
        """The head of a causal LM, or a classifier's. Raises `UserError` where the model has no plain linear one."""
        model = causal_lm(model)
        linear = classifier(model) if model.main_input_name == "pixel_values" else model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise UserError(f"{type(model).__name__} has no plain linear output head (found {type(linear).__name__})")
        config = model.config.get_text_config().to_dict()
        # Cohere multiplies its logits, Granite divides them, Gemma 2 squashes them; `check_head` finds who does more.
        scale = (config.get("logit_scale") or 1.0) / (config.get("logits_scaling") or 1.0)
        return cls(linear.weight, linear.bias, float(scale), config.get("final_logit_softcapping"))

    def first(self, tokens: int) -> "OutputHead":
        """The same head for the first `tokens` of the vocabulary."""
        bias_V = None if self.bias_V is None else self.bias_V[:tokens]
        return replace(self, weight_VM=self.weight_VM[:tokens], bias_V=bias_V)

    def __call__(self, hidden: Tensor) -> Tensor:
        """(..., M) -> logits (..., V)."""
        return self.shape(F.linear(hidden, self.weight_VM, self.bias_V))

    def shape(self, logits: Tensor) -> Tensor:
        """The scale and the soft-cap, on the output of the linear map."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def shape_gradient(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Back through `shape`: the gradient at its input, from the one at its output `logits` (overwrites `grad`)."""
        if self.softcap is not None:
            grad = grad.mul_(1.0 - (logits / self.softcap).square())
        return grad.mul_(self.scale) if self.scale != 1.0 else grad


def has_head(model: PreTrainedModel) -> bool:
    """Whether a model has an output head: an image encoder may end with its states."""
    model = causal_lm(model)
    return model.main_input_name != "pixel_values" or classifier(model) is not None


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Next-token logits (..., V) from the `final_hidden` states (..., M) of `model`: a few positions at a time."""
    return OutputHead.of(model)(hidden)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Make sure that `head_logits(final_hidden(...))` is what the model itself answers, on four tokens or an image.

    Raises `UserError` naming the class of a model that does something else to its logits.
    """
    backbone = causal_lm(model)
    if backbone.main_input_name == "pixel_values":
        if classifier(backbone) is None:
            return
        inputs = least_inputs(backbone)["pixel_values"]
        own = model(inputs).logits.float()[:, None]
    else:
        embedding_VM: Tensor = backbone.get_input_embeddings().weight  # type: ignore[assignment]
        inputs = torch.arange(4, device=embedding_VM.device)[None] % embedding_VM.shape[0]
        own = model(input_ids=inputs, use_cache=False).logits.float()
    ours = head_logits(model, final_hidden(model, inputs)).float()
    tolerance = 1e-4 if backbone.dtype in (torch.float32, torch.float64) else 3e-2
    if own.shape != ours.shape or (own - ours).abs().max() > tolerance * own.abs().max().clamp_min(1e-6):
        raise UserError(
            f"{type(backbone).__name__} does something to its logits that is not a linear head with a scale or a "
            "soft-cap, so its likelihoods cannot be computed in chunks: this model is not supported"
        )
