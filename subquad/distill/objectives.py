"""What a stage minimises: the distance of mixer outputs, the KL to the teacher's next token, and plain cross-entropy.

Notable:
- No (B, T, V) tensor of logits is ever held. Models are asked for their last hidden states (`final_hidden`), and the
  head is applied to a chunk of positions at a time (`head_logits`), with the scale or soft-cap of some families.
- `chunked_loss` computes the loss and its gradients in the same sweep over the chunks: the softmax that gives the loss
  gives the gradient too, so nothing is computed again in backward, and only (N, M) and (V, M) gradients are stored.
- Losses are computed in float32 at least, whatever the models run in.

Legend of tensor suffixes: B batch, T positions, N = B x T, M model width, V vocabulary, C positions of one chunk.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from subquad.errors import UserError
from subquad.student import Student

CHUNK_ELEMENTS = 2**24  # logits of one chunk: 64 MiB in float32, enough to keep a matrix product busy


def causal_lm(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers causal LM that holds the output head: the model itself, or a student's backbone."""
    return model.backbone if isinstance(model, Student) else model


def final_hidden(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The states the output head reads (after the final norm), with no head applied.

    `input_ids` (B, T) token ids, `attention_mask` (B, T) of 1 and 0 or None -> (B, T, M).
    """
    if isinstance(model, Student):
        return model.final_hidden(input_ids, attention_mask)
    return model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


@dataclass(frozen=True)
class Head:
    """An output head: `softcap(scale * (hidden @ weight.T + bias))`, the soft-cap being `cap * tanh(x / cap)`."""

    weight_VM: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """The head of a causal LM. Raises `UserError` where the model has no plain linear one."""
        model = causal_lm(model)
        linear = model.get_output_embeddings()
        if not isinstance(linear, nn.Linear):
            raise UserError(f"{type(model).__name__} has no plain linear output head (found {type(linear).__name__})")
        config = model.config.get_text_config().to_dict()
        # Cohere multiplies its logits, Granite divides them, Gemma 2 squashes them; `check_head` finds who does more.
        scale = (config.get("logit_scale") or 1.0) / (config.get("logits_scaling") or 1.0)
        return cls(linear.weight, linear.bias, float(scale), config.get("final_logit_softcapping"))

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


def head_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Next-token logits (..., V) from the `final_hidden` states (..., M) of `model`: a few positions at a time."""
    return Head.of(model)(hidden)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Make sure that `head_logits(final_hidden(...))` is what the model itself answers, on four tokens.

    Raises `UserError` naming the class of a model that does something else to its logits.
    """
    backbone = causal_lm(model)
    embedding_VM: Tensor = backbone.get_input_embeddings().weight  # type: ignore[assignment]
    input_ids_BT = torch.arange(4, device=embedding_VM.device)[None] % embedding_VM.shape[0]
    own = model(input_ids=input_ids_BT, use_cache=False).logits.float()
    ours = head_logits(model, final_hidden(model, input_ids_BT)).float()
    tolerance = 1e-4 if backbone.dtype in (torch.float32, torch.float64) else 3e-2
    if own.shape != ours.shape or (own - ours).abs().max() > tolerance * own.abs().max().clamp_min(1e-6):
        raise UserError(
            f"{type(backbone).__name__} does something to its logits that is not a linear head with a scale or a "
            "soft-cap, so its likelihoods cannot be computed in chunks: this model is not supported"
        )


def mixer_output(student_BTM: Tensor, teacher_BTM: Tensor, kind: Literal["norm", "squared"] = "norm") -> Tensor:
    """Distance of a student's mixer output from the teacher's attention output (after both output projections).

    "norm": mean over tokens of |s - t|_2 / sqrt(M), the form that MOHAWK (arXiv 2408.10189), RADLADS (2505.03005) and
    KL-guided selection (2512.20569) train with. "squared": mean over tokens and width of (s - t)^2 (LoLCATs, HALO).
    Both in the units of the activations (or their square), independent of the width.
    """
    difference_BTM = promote(student_BTM) - promote(teacher_BTM)
    if kind == "squared":
        return difference_BTM.square().mean()
    return torch.linalg.vector_norm(difference_BTM, dim=-1).mean() / math.sqrt(student_BTM.shape[-1])


class TokenLoss(NamedTuple):
    """The weighted sum to minimise, and its parts for the log (no gradient; None where the weight is zero)."""

    total: Tensor
    kl: Tensor | None
    cross_entropy: Tensor | None

    def parts(self) -> dict[str, Tensor]:
        """The parts under the names that recipes use."""
        named = {"logits": self.kl, "labels": self.cross_entropy}
        return {name: value for name, value in named.items() if value is not None}


def chunked_loss(
    student_BTM: Tensor,
    student_head: Head,
    *,
    weights: Mapping[str, float],
    teacher_BTM: Tensor | None = None,
    teacher_head: Head | None = None,
    labels_BT: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> TokenLoss:
    """`weights["logits"]` x forward KL + `weights["labels"]` x cross-entropy, a chunk of positions at a time.

    KL is tau^2 KL(softmax(z_t / tau) || softmax(z_s / tau)), the mean over all positions, in nats per token; tau^2
    keeps the size of the gradient independent of the temperature (Hinton et al., arXiv 1503.02531). `labels_BT` are the
    token ids that each position should predict, -100 where it predicts none; cross-entropy is the mean over the others,
    at temperature 1. `chunk` is the number of positions at a time. Gradients reach `student_BTM` and the head.
    """
    kl_weight, ce_weight = weights.get("logits", 0.0), weights.get("labels", 0.0)
    student_NM = student_BTM.flatten(0, -2)
    vocabulary = student_head.weight_VM.shape[0]
    if kl_weight and (teacher_BTM is None or teacher_head is None):
        raise ValueError("the KL needs the teacher's hidden states and head")
    if ce_weight and labels_BT is None:
        raise ValueError("the cross-entropy needs labels")
    labels_N = labels_BT.flatten() if ce_weight and labels_BT is not None else None
    task = _Task(
        student_head,
        teacher_BTM.detach().flatten(0, -2) if kl_weight and teacher_BTM is not None else None,
        teacher_head,
        labels_N,
        1 if labels_N is None else max(1, int((labels_N >= 0).sum())),
        kl_weight,
        ce_weight,
        temperature,
        chunk or max(16, CHUNK_ELEMENTS // vocabulary),
        torch.is_grad_enabled(),
    )
    total, kl, cross_entropy = _ChunkedLoss.apply(student_NM, student_head.weight_VM, student_head.bias_V, task)
    return TokenLoss(total, kl if kl_weight else None, cross_entropy if ce_weight else None)


def next_token_labels(input_ids_BT: Tensor) -> Tensor:
    """What every position should predict: the tokens one to the left, -100 (nothing) at the last position."""
    return F.pad(input_ids_BT[:, 1:], (0, 1), value=-100)


def promote(tensor: Tensor) -> Tensor:
    """float32, unless it is float64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


@dataclass(frozen=True)
class _Task:
    """Everything about a chunked loss that takes no gradient."""

    student_head: Head
    teacher_NM: Tensor | None
    teacher_head: Head | None
    labels_N: Tensor | None
    labelled: int  # how many positions have a label
    kl_weight: float
    ce_weight: float
    temperature: float
    chunk: int
    with_grad: bool

    def loss_and_gradient(self, logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sums of KL and cross-entropy over a chunk, and the gradient at the logits of the weighted loss over all N."""
        kl = ce = logits_CV.new_zeros(())
        grad_CV: Tensor | None = None
        if self.teacher_NM is not None and self.teacher_head is not None:
            tau = self.temperature
            teacher_CV = promote(self.teacher_head(self.teacher_NM[rows])).to(logits_CV)
            teacher_CV = F.log_softmax(teacher_CV if tau == 1.0 else teacher_CV / tau, dim=-1)
            student_CV = F.log_softmax(logits_CV if tau == 1.0 else logits_CV / tau, dim=-1)
            p_teacher_CV = teacher_CV.exp()
            kl = tau**2 * torch.einsum("cv,cv->c", p_teacher_CV, teacher_CV.sub_(student_CV)).sum()
            if self.with_grad:
                scale = tau * self.kl_weight / len(self.teacher_NM)
                grad_CV = student_CV.exp_().sub_(p_teacher_CV).mul_(scale)
        if self.labels_N is not None:
            labels_C = self.labels_N[rows]
            counted_C1 = (labels_C >= 0)[:, None].to(logits_CV)
            target_C1 = labels_C.clamp_min(0)[:, None]
            student_CV = F.log_softmax(logits_CV, dim=-1)
            ce = -(student_CV.gather(1, target_C1) * counted_C1).sum()
            if self.with_grad:
                minus_one_C1 = logits_CV.new_full(target_C1.shape, -1.0)
                ce_grad_CV = student_CV.exp_().scatter_add_(1, target_C1, minus_one_C1)
                ce_grad_CV.mul_(counted_C1 * (self.ce_weight / self.labelled))
                grad_CV = ce_grad_CV if grad_CV is None else grad_CV.add_(ce_grad_CV)
        return kl, ce, grad_CV


class _ChunkedLoss(torch.autograd.Function):
    """The loss and, in the same sweep, its gradients at the student's hidden states and head."""

    @staticmethod
    def forward(
        ctx: Any, student_NM: Tensor, weight_VM: Tensor, bias_V: Tensor | None, task: _Task
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs = [needed and task.with_grad for needed in ctx.needs_input_grad[:3]]
        grad_NM = torch.empty_like(student_NM) if needs[0] else None
        grad_VM = torch.zeros_like(weight_VM, dtype=promote(weight_VM).dtype) if needs[1] else None
        grad_V = torch.zeros_like(bias_V, dtype=promote(bias_V).dtype) if needs[2] and bias_V is not None else None
        count = student_NM.shape[0]
        kl = ce = torch.zeros((), dtype=promote(student_NM[:0]).dtype, device=student_NM.device)
        for start in range(0, count, task.chunk):
            rows = slice(start, start + task.chunk)
            hidden_CM = student_NM[rows]
            logits_CV = task.student_head.shape(promote(F.linear(hidden_CM, weight_VM, bias_V)))
            kl_sum, ce_sum, grad_CV = task.loss_and_gradient(logits_CV, rows)
            kl, ce = kl + kl_sum, ce + ce_sum
            if grad_CV is None or not any(needs):
                continue
            grad_CV = task.student_head.shape_gradient(grad_CV, logits_CV).to(weight_VM.dtype)
            if grad_NM is not None:
                grad_NM[rows] = grad_CV @ weight_VM
            if grad_VM is not None:
                grad_VM += grad_CV.T @ hidden_CM.to(grad_CV.dtype)
            if grad_V is not None:
                grad_V += grad_CV.sum(0)
        kl, ce = kl / count, ce / task.labelled
        ctx.save_for_backward(grad_NM, grad_VM, grad_V)
        ctx.mark_non_differentiable(kl, ce)
        return task.kl_weight * kl + task.ce_weight * ce, kl, ce

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_NM, grad_VM, grad_V = ctx.saved_tensors
        return *(None if grad is None else grad * grad_total for grad in (grad_NM, grad_VM, grad_V)), None
