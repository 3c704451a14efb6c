"""Final hidden states and output head of a model, separated so that logits can be computed in chunks.

Legend of tensor suffixes: B batch, T positions, M model width, V vocabulary.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from subquad.errors import UserError
from subquad.model.base import BaseStudent
from subquad.model.image_student import ImageStudent, classifier, classifier_input
from subquad.model.interface import decoder_of, least_inputs, reads_images
from subquad.model.student import Student


def causal_lm(model: PreTrainedModel) -> PreTrainedModel:
    """Model with the output head: the model itself, or a student's backbone."""
    return model.backbone if isinstance(model, BaseStudent) else model


def final_hidden(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Hidden states that the output head reads (after the final norm); no (B, T, V) tensor is made.

    `input_ids` (B, T) token ids, `attention_mask` (B, T) of 1 and 0 or None -> (B, T, M). For images (B, channels,
    height, width): the input of the classifier, (B, 1, M), or the states of an encoder without one, (B, T, M).
    """
    if isinstance(model, Student):
        return model.final_hidden(input_ids, attention_mask)
    if isinstance(model, ImageStudent):
        return model.final_hidden(input_ids)
    if reads_images(model):
        return classifier_input(model, input_ids)
    return decoder_of(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


@dataclass(frozen=True)
class OutputHead:
    """Output head: `softcap(scale * (hidden @ weight.T + bias))`, the soft-cap being `cap * tanh(x / cap)`."""

    weight_VM: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "OutputHead":
        """Output head of a causal LM or a classifier. Raises `UserError` if the model has no plain linear one."""
        model = causal_lm(model)
        head = classifier(model) if reads_images(model) else model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UserError(f"{type(model).__name__} has no plain linear output head (found {type(head).__name__})")
        config = model.config.get_text_config().to_dict()
        # Cohere multiplies its logits, Granite divides them, Gemma 2 caps them; `check_head` rejects any other change.
        scale = (config.get("logit_scale") or 1.0) / (config.get("logits_scaling") or 1.0)
        return cls(head.weight, head.bias, float(scale), config.get("final_logit_softcapping"))

    def first(self, tokens: int) -> "OutputHead":
        """Same head for the first `tokens` of the vocabulary."""
        bias_V = None if self.bias_V is None else self.bias_V[:tokens]
        return replace(self, weight_VM=self.weight_VM[:tokens], bias_V=bias_V)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., M)."""
        return self.shape(F.linear(hidden, self.weight_VM, self.bias_V))

    def shape(self, logits: Tensor) -> Tensor:
        """Scale and soft-cap of the output of the linear map."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    def shape_gradient(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient at the input of `shape`, from the gradient at its output `logits` (overwrites `grad`)."""
        if self.softcap is not None:
            grad = grad.mul_(1.0 - (logits / self.softcap).square())
        return grad.mul_(self.scale) if self.scale != 1.0 else grad


def has_head(model: PreTrainedModel) -> bool:
    """Whether a model has an output head; an image encoder may have none."""
    model = causal_lm(model)
    return not reads_images(model) or classifier(model) is not None


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Next-token logits (..., V) from the `final_hidden` states (..., M) of `model`: a few positions at a time."""
    return OutputHead.of(model)(hidden)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Checks that `head_logits(final_hidden(...))` equals the model's own logits, on four tokens or an image.

    Raises `UserError`, naming the model's class, if they differ.
    """
    backbone = causal_lm(model)
    if reads_images(backbone):
        if classifier(backbone) is None:
            return
        inputs = least_inputs(backbone)["pixel_values"]
        model_logits = model(inputs).logits.float()[:, None]
    else:
        embedding_VM: Tensor = backbone.get_input_embeddings().weight  # type: ignore[assignment]
        inputs = torch.arange(4, device=embedding_VM.device)[None] % embedding_VM.shape[0]
        model_logits = model(input_ids=inputs, use_cache=False).logits.float()
    chunk_logits = head_logits(model, final_hidden(model, inputs)).float()
    tolerance = 1e-4 if backbone.dtype in (torch.float32, torch.float64) else 3e-2
    limit = tolerance * model_logits.masked_fill(~model_logits.isfinite(), 0.0).abs().max().clamp_min(1e-6)
    if model_logits.shape != chunk_logits.shape or _distance(model_logits, chunk_logits) > limit:
        raise UserError(
            f"{type(backbone).__name__} does something to its logits that is not a linear head with a scale or a "
            "soft-cap, so its likelihoods cannot be computed in chunks: this model is not supported"
        )


def _distance(logits: Tensor, other_logits: Tensor) -> Tensor:
    """Largest difference of two tensors of one shape; a token that both forbid (-inf), or a NaN in both, is none."""
    same = (logits == other_logits) | (logits.isnan() & other_logits.isnan())
    return (logits - other_logits).masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf).abs().max()
