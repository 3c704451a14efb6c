"""Losses at the output head: the divergence from the teacher's next token, and the cross-entropy of the real one.

Notable:
- No (B, T, V) tensor of logits is ever held. Models are asked for their last hidden states (`heads.final_hidden`), and
  the head is applied to a chunk of positions at a time, with the scale or soft-cap of some families.
- `chunked_loss` computes the loss and its gradients in the same sweep over the chunks: the softmax that gives the loss
  gives the gradient too, so nothing is computed again in backward, and only (N, M) and (V, M) gradients are stored.
- The teacher's side is either its own head on its hidden states, or the top-k log-probabilities that were written down
  earlier (`FromTopK`).
- Losses are computed in float32 at least, whatever the models run in.

Legend of tensor suffixes: B batch, T positions, N = B x T, M model width, V vocabulary, C positions of one chunk, K the
likeliest tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.model.output_head import OutputHead
from subquad.ops.common import wide
from subquad.recipes.stage import Divergence

CHUNK_ELEMENTS = 2**24  # logits of one chunk: 64 MiB in float32, enough to keep a matrix product busy


class TeacherLogits(Protocol):
    """The teacher's next-token distribution at N positions."""

    def log_probs(self, rows: slice, student_CV: Tensor, temperature: float) -> Tensor:
        """Its log-probabilities (C, V) at the positions `rows`, where the student's are `student_CV`; a new tensor."""
        ...


@dataclass(frozen=True)
class FromHidden:
    """The teacher's head on its last hidden states (B, T, M)."""

    hidden_BTM: Tensor
    head: OutputHead

    def log_probs(self, rows: slice, student_CV: Tensor, temperature: float) -> Tensor:
        logits_CV = wide(self.head(self.hidden_BTM.detach().flatten(0, -2)[rows])).to(student_CV)
        return F.log_softmax(logits_CV if temperature == 1.0 else logits_CV / temperature, dim=-1)


class FromTopK(NamedTuple):
    """The teacher's K likeliest tokens (B, T, K), their log-probabilities, and the log of the mass of all others.

    That mass is spread over the others as the student spreads its own. A divergence from this distribution is the one
    of K + 1 outcomes, "another token" being the last: never more than the divergence from the whole distribution, and
    its gradient is as if the spread mass were constant.
    """

    ids_BTK: Tensor
    log_probs_BTK: Tensor
    log_rest_BT: Tensor

    def log_probs(self, rows: slice, student_CV: Tensor, temperature: float) -> Tensor:
        if temperature != 1.0:
            raise ValueError("top-k log-probabilities are at temperature 1")
        ids_CK, log_probs_CK = (x.flatten(0, 1)[rows] for x in (self.ids_BTK, self.log_probs_BTK))
        others_CV = student_CV.scatter(1, ids_CK, -math.inf)
        log_rest_C1 = self.log_rest_BT.flatten()[rows, None].to(student_CV)
        others_CV += log_rest_C1 - others_CV.logsumexp(1, keepdim=True)
        return others_CV.scatter_(1, ids_CK, log_probs_CK.to(student_CV))


def divergence(
    kind: Divergence, teacher_CV: Tensor, student_CV: Tensor, temperature: float, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """The sum over C positions of a divergence between two log-probabilities, in nats, and its gradient.

    The gradient (C, V) is the one at the student's logits z, times `scale`; None asks for none. Both inputs are
    overwritten. With p the teacher's and q the student's probabilities at the temperature tau, and m their mean:

    - forward_kl: tau^2 KL(p || q) (Hinton et al., arXiv 1503.02531; tau^2 keeps the gradient's size)
    - reverse_kl: tau^2 KL(q || p) (MiniLLM, arXiv 2306.08543)
    - jensen_shannon: tau^2 (KL(p || m) + KL(q || m)) / 2 (GKD, arXiv 2306.13649, beta = 1/2)
    - soft_cross_entropy: -sum p log q, q alone at temperature tau, p at 1 (MOHAWK, arXiv 2408.10189, in its code)
    """
    tau = temperature
    if kind in ("forward_kl", "soft_cross_entropy"):
        p_CV = teacher_CV.exp()
        if kind == "forward_kl":
            factor, rate = tau**2, tau
            value = torch.einsum("cv,cv->c", p_CV, teacher_CV.sub_(student_CV)).sum()
        else:
            factor, rate = 1.0, 1 / tau
            value = -torch.einsum("cv,cv->c", p_CV, student_CV).sum()
        return factor * value, None if scale is None else student_CV.exp_().sub_(p_CV).mul_(rate * scale)

    q_CV = student_CV.exp()
    if kind == "reverse_kl":
        ratio_CV, half = student_CV.sub_(teacher_CV), 1.0
        value = q_CV.mul(ratio_CV).sum()
    else:
        mean_CV = torch.logaddexp(teacher_CV, student_CV).sub_(math.log(2))
        p_CV = teacher_CV.exp()
        ratio_CV, half = student_CV.sub_(mean_CV), 0.5
        value = half * (q_CV.mul(ratio_CV).sum() + p_CV.mul_(teacher_CV.sub_(mean_CV)).sum())
    if scale is None:
        return tau**2 * value, None
    # d/dz_j sum q (log q - log p) = q_j (log(q_j / p_j) - its mean under q), and half of that with m in p's place.
    mean_C1 = torch.einsum("cv,cv->c", q_CV, ratio_CV)[:, None]
    return tau**2 * value, ratio_CV.sub_(mean_C1).mul_(q_CV).mul_(half * tau * scale)


class TokenLoss(NamedTuple):
    """The weighted sum to minimise, and its parts for the log (no gradient; None where the weight is zero)."""

    total: Tensor
    divergence: Tensor | None
    cross_entropy: Tensor | None

    def parts(self) -> dict[str, Tensor]:
        """The parts under the names that recipes use."""
        named = {"logits": self.divergence, "labels": self.cross_entropy}
        return {name: value for name, value in named.items() if value is not None}


def chunked_loss(
    student_BTM: Tensor,
    student_head: OutputHead,
    *,
    weights: Mapping[str, float],
    teacher: TeacherLogits | None = None,
    labels_BT: Tensor | None = None,
    kind: Divergence = "forward_kl",
    temperature: float = 1.0,
    chunk: int | None = None,
) -> TokenLoss:
    """`weights["logits"]` x divergence + `weights["labels"]` x cross-entropy, a chunk of positions at a time.

    The divergence (see `divergence`) is the mean over all positions, in nats per token. `labels_BT` are the token ids
    that each position should predict, -100 where it predicts none; cross-entropy is the mean over the others, at
    temperature 1. `chunk` is the number of positions at a time. Gradients reach `student_BTM` and the head.
    """
    logits_weight, labels_weight = weights.get("logits", 0.0), weights.get("labels", 0.0)
    vocabulary = student_head.weight_VM.shape[0]
    if logits_weight and teacher is None:
        raise ValueError("the divergence needs the teacher's logits")
    if labels_weight and labels_BT is None:
        raise ValueError("the cross-entropy needs labels")
    labels_N = labels_BT.flatten() if labels_weight and labels_BT is not None else None
    task = _Task(
        student_head,
        teacher if logits_weight else None,
        labels_N,
        student_BTM[..., 0].numel(),
        1 if labels_N is None else max(1, int((labels_N >= 0).sum())),
        logits_weight,
        labels_weight,
        kind,
        temperature,
        chunk or max(16, CHUNK_ELEMENTS // vocabulary),
        torch.is_grad_enabled(),
    )
    total, from_teacher, cross_entropy = _ChunkedLoss.apply(
        student_BTM.flatten(0, -2), student_head.weight_VM, student_head.bias_V, task
    )
    return TokenLoss(total, from_teacher if logits_weight else None, cross_entropy if labels_weight else None)


@dataclass(frozen=True)
class _Task:
    """Everything about a chunked loss that takes no gradient."""

    student_head: OutputHead
    teacher: TeacherLogits | None
    labels_N: Tensor | None
    count: int  # positions
    labelled: int  # how many of them have a label
    logits_weight: float
    labels_weight: float
    kind: Divergence
    temperature: float
    chunk: int
    with_grad: bool

    def loss_and_gradient(self, logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Sums of both losses over a chunk, and the gradient at the logits of the weighted loss over all N."""
        from_teacher = ce = logits_CV.new_zeros(())
        grad_CV: Tensor | None = None
        if self.teacher is not None:
            tau = self.temperature
            student_CV = F.log_softmax(logits_CV if tau == 1.0 else logits_CV / tau, dim=-1)
            teacher_tau = 1.0 if self.kind == "soft_cross_entropy" else tau
            teacher_CV = self.teacher.log_probs(rows, student_CV, teacher_tau)
            scale = self.logits_weight / self.count if self.with_grad else None
            from_teacher, grad_CV = divergence(self.kind, teacher_CV, student_CV, tau, scale)
        if self.labels_N is not None:
            labels_C = self.labels_N[rows]
            counted_C1 = (labels_C >= 0)[:, None].to(logits_CV)
            target_C1 = labels_C.clamp_min(0)[:, None]
            student_CV = F.log_softmax(logits_CV, dim=-1)
            ce = -(student_CV.gather(1, target_C1) * counted_C1).sum()
            if self.with_grad:
                minus_one_C1 = logits_CV.new_full(target_C1.shape, -1.0)
                ce_grad_CV = student_CV.exp_().scatter_add_(1, target_C1, minus_one_C1)
                ce_grad_CV.mul_(counted_C1 * (self.labels_weight / self.labelled))
                grad_CV = ce_grad_CV if grad_CV is None else grad_CV.add_(ce_grad_CV)
        return from_teacher, ce, grad_CV


class _ChunkedLoss(torch.autograd.Function):
    """The loss and, in the same sweep, its gradients at the student's hidden states and head."""

    @staticmethod
    def forward(
        ctx: Any, student_NM: Tensor, weight_VM: Tensor, bias_V: Tensor | None, task: _Task
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs = [needed and task.with_grad for needed in ctx.needs_input_grad[:3]]
        grad_NM = torch.empty_like(student_NM) if needs[0] else None
        grad_VM = torch.zeros_like(weight_VM, dtype=wide(weight_VM).dtype) if needs[1] else None
        grad_V = torch.zeros_like(bias_V, dtype=wide(bias_V).dtype) if needs[2] and bias_V is not None else None
        from_teacher = ce = torch.zeros((), dtype=wide(student_NM[:0]).dtype, device=student_NM.device)
        for start in range(0, task.count, task.chunk):
            rows = slice(start, start + task.chunk)
            hidden_CM = student_NM[rows]
            logits_CV = task.student_head.shape(wide(F.linear(hidden_CM, weight_VM, bias_V)))
            teacher_sum, ce_sum, grad_CV = task.loss_and_gradient(logits_CV, rows)
            from_teacher, ce = from_teacher + teacher_sum, ce + ce_sum
            if grad_CV is None or not any(needs):
                continue
            grad_CV = task.student_head.shape_gradient(grad_CV, logits_CV).to(weight_VM.dtype)
            if grad_NM is not None:
                grad_NM[rows] = grad_CV @ weight_VM
            if grad_VM is not None:
                grad_VM += grad_CV.T @ hidden_CM.to(grad_CV.dtype)
            if grad_V is not None:
                grad_V += grad_CV.sum(0)
        from_teacher, ce = from_teacher / task.count, ce / task.labelled
        ctx.save_for_backward(grad_NM, grad_VM, grad_V)
        ctx.mark_non_differentiable(from_teacher, ce)
        return task.logits_weight * from_teacher + task.labels_weight * ce, from_teacher, ce

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        grad_NM, grad_VM, grad_V = ctx.saved_tensors
        return *(None if grad is None else grad * grad_total for grad in (grad_NM, grad_VM, grad_V)), None
