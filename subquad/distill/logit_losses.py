"""Losses at the output head: divergence from the teacher's next-token distribution, and cross-entropy of the text.

Notable:
- No (B, T, V) tensor of logits is ever in memory. Models return their last hidden states
  (`output_head.final_hidden`), and the head is applied to a chunk of positions at a time, with the scale or soft-cap of
  some families.
- `chunked_loss` computes the loss and its gradients in one sweep over the chunks. The softmax of the loss also gives
  the gradient, so backward computes nothing again, and only gradients of sizes (N, M) and (V, M) are stored.
- The teacher's distribution comes from its head and hidden states (`FromHidden`) or from stored top-k log-probabilities
  (`FromTopK`).
- Losses are computed in float32 or wider, whatever dtype the models run in.

Legend of tensor suffixes: B batch, T positions, N = B x T, M model width, V vocabulary, C positions of one chunk, K
top-k tokens.
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

CHUNK_ELEMENTS = 2**24  # logits of one chunk: 64 MiB in float32, large enough for an efficient matrix product

FORBIDDEN = -1e30  # a lower log-probability is a mask's: -inf, or the lowest number over a temperature


class TeacherLogits(Protocol):
    """Next-token distribution of the teacher at N positions."""

    def log_probs(self, rows: slice, student_CV: Tensor, temperature: float) -> Tensor:
        """Log-probabilities (C, V) at the positions `rows`, as a new tensor; `student_CV` are the student's."""
        ...


@dataclass(frozen=True)
class FromHidden:
    """Distribution from the teacher's head and its last hidden states (B, T, M)."""

    hidden_BTM: Tensor
    head: OutputHead

    def log_probs(self, rows: slice, student_CV: Tensor, temperature: float) -> Tensor:
        logits_CV = wide(self.head(self.hidden_BTM.detach().flatten(0, -2)[rows])).to(student_CV)
        return F.log_softmax(logits_CV if temperature == 1.0 else logits_CV / temperature, dim=-1)


class FromTopK(NamedTuple):
    """Distribution from stored top-k tokens (B, T, K), their log-probabilities, and the log mass of all other tokens.

    This rest mass is spread over the other tokens in proportion to the student's probabilities. So a divergence from
    this distribution is one between K + 1 outcomes, the last being "any other token". It never exceeds the
    divergence from the whole distribution, and its gradient treats the spread mass as constant.
    """

    ids_BTK: Tensor
    log_probs_BTK: Tensor
    log_rest_BT: Tensor

    def log_probs(self, rows: slice, student_CV: Tensor, temperature: float) -> Tensor:
        if temperature != 1.0:
            raise ValueError("top-k log-probabilities are at temperature 1")
        ids_CK, log_probs_CK = (x.flatten(0, 1)[rows] for x in (self.ids_BTK, self.log_probs_BTK))
        log_p_CV = student_CV.scatter(1, ids_CK, -math.inf)
        log_rest_C1 = self.log_rest_BT.flatten()[rows, None].to(student_CV)
        log_sum_C1 = log_p_CV.logsumexp(1, keepdim=True)
        log_p_CV += log_rest_C1 - log_sum_C1.masked_fill(log_sum_C1 == -math.inf, 0.0)  # the student has no rest
        return log_p_CV.scatter_(1, ids_CK, log_probs_CK.to(student_CV))


def divergence(
    kind: Divergence, teacher_CV: Tensor, student_CV: Tensor, temperature: float, scale: float | None
) -> tuple[Tensor, Tensor | None]:
    """Sum over C positions of a divergence between two distributions, in nats, and its gradient.

    Both are log-probabilities (C, V), and both are overwritten. The gradient (C, V) is that with respect to the
    student's logits, times `scale`; it is None if `scale` is None. With p the teacher's and q the student's
    probabilities at the temperature tau, and m their mean:

    A token that the teacher forbids (a logit of -inf, or of the lowest number) has p = 0, and adds nothing to a sum of
    p log(p / q). KL(q || p) would be infinite, so there q is the student's distribution over the other tokens.

    - forward_kl: tau^2 KL(p || q) (Hinton et al., arXiv 1503.02531; tau^2 keeps the gradient's size)
    - reverse_kl: tau^2 KL(q || p) (MiniLLM, arXiv 2306.08543)
    - jensen_shannon: tau^2 (KL(p || m) + KL(q || m)) / 2 (GKD, arXiv 2306.13649, beta = 1/2)
    - soft_cross_entropy: -sum p log q, q alone at temperature tau, p at 1 (MOHAWK, arXiv 2408.10189, in its code)
    """
    tau = temperature
    if kind in ("forward_kl", "soft_cross_entropy"):
        p_CV = teacher_CV.exp()
        impossible_CV = p_CV == 0  # 0 times the logarithm is 0, infinite or not
        if kind == "forward_kl":
            factor, rate = tau**2, tau
            ratio_CV = teacher_CV.sub_(student_CV).masked_fill_(impossible_CV, 0.0)
            value = torch.einsum("cv,cv->c", p_CV, ratio_CV).sum()
        else:
            factor, rate = 1.0, 1 / tau
            value = -torch.einsum("cv,cv->c", p_CV, student_CV.masked_fill(impossible_CV, 0.0)).sum()
        return factor * value, None if scale is None else student_CV.exp_().sub_(p_CV).mul_(rate * scale)

    if kind == "reverse_kl":
        student_CV = _where_allowed(student_CV, teacher_CV)
    q_CV = student_CV.exp()
    unlikely_CV = q_CV == 0
    if kind == "reverse_kl":
        ratio_CV, half = student_CV.sub_(teacher_CV).masked_fill_(unlikely_CV, 0.0), 1.0
        value = q_CV.mul(ratio_CV).sum()
    else:
        mean_CV = torch.logaddexp(teacher_CV, student_CV).sub_(math.log(2))
        p_CV = teacher_CV.exp()
        ratio_CV, half = student_CV.sub_(mean_CV).masked_fill_(unlikely_CV, 0.0), 0.5
        teacher_ratio_CV = teacher_CV.sub_(mean_CV).masked_fill_(p_CV == 0, 0.0)
        value = half * (q_CV.mul(ratio_CV).sum() + p_CV.mul_(teacher_ratio_CV).sum())
    if scale is None:
        return tau**2 * value, None
    # With logits z: d/dz_j sum q (log q - log p) = q_j (log(q_j / p_j) - its mean under q); half of that with m for p.
    mean_C1 = torch.einsum("cv,cv->c", q_CV, ratio_CV)[:, None]
    return tau**2 * value, ratio_CV.sub_(mean_C1).mul_(q_CV).mul_(half * tau * scale)


def _where_allowed(student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
    """Log-probabilities of the student among the tokens that the teacher does not forbid; overwrites them."""
    if not teacher_CV.amin() < FORBIDDEN:
        return student_CV
    forbidden_CV = teacher_CV < FORBIDDEN
    return student_CV.masked_fill_(forbidden_CV, -math.inf).log_softmax(-1)


class TokenLoss(NamedTuple):
    """Weighted sum to minimise, and its parts for the log (without gradient; None where the weight is zero)."""

    total: Tensor
    divergence: Tensor | None
    cross_entropy: Tensor | None

    def parts(self) -> dict[str, Tensor]:
        """Returns the parts under the names of the objectives in recipes."""
        parts = {"logits": self.divergence, "labels": self.cross_entropy}
        return {name: value for name, value in parts.items() if value is not None}


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
    """Computes `weights["logits"]` x divergence + `weights["labels"]` x cross-entropy, `chunk` positions at a time.

    The divergence (see `divergence`) is the mean over all positions, in nats per token. `labels_BT` holds the token id
    to predict at each position, or -100 for none. The cross-entropy is the mean over the positions with a label, at
    temperature 1. Gradients reach `student_BTM` and the head.
    """
    logits_weight, labels_weight = weights.get("logits", 0.0), weights.get("labels", 0.0)
    vocabulary = student_head.weight_VM.shape[0]
    if logits_weight and teacher is None:
        raise ValueError("the divergence needs the teacher's logits")
    if labels_weight and labels_BT is None:
        raise ValueError("the cross-entropy needs labels")

    # Collect everything that takes no gradient
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

    # Compute the loss and its gradients
    total, from_teacher, cross_entropy = _ChunkedLoss.apply(
        student_BTM.flatten(0, -2), student_head.weight_VM, student_head.bias_V, task
    )
    return TokenLoss(total, from_teacher if logits_weight else None, cross_entropy if labels_weight else None)


@dataclass(frozen=True)
class _Task:
    """Inputs and settings of a chunked loss that take no gradient."""

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
        """Sums of both losses over a chunk, and the gradient of the whole weighted loss at its logits."""
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
            labelled_C1 = (labels_C >= 0)[:, None].to(logits_CV)
            target_C1 = labels_C.clamp_min(0)[:, None]
            student_CV = F.log_softmax(logits_CV, dim=-1)
            ce = -(student_CV.gather(1, target_C1) * labelled_C1).sum()
            if self.with_grad:
                minus_one_C1 = logits_CV.new_full(target_C1.shape, -1.0)
                ce_grad_CV = student_CV.exp_().scatter_add_(1, target_C1, minus_one_C1)
                ce_grad_CV.mul_(labelled_C1 * (self.labels_weight / self.labelled))
                grad_CV = ce_grad_CV if grad_CV is None else grad_CV.add_(ce_grad_CV)
        return from_teacher, ce, grad_CV


class _ChunkedLoss(torch.autograd.Function):
    """Computes the loss and, in the same sweep, its gradients for the student's hidden states and head."""

    @staticmethod
    def forward(
        ctx: Any, student_NM: Tensor, weight_VM: Tensor, bias_V: Tensor | None, task: _Task
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_grad = [flag and task.with_grad for flag in ctx.needs_input_grad[:3]]
        grad_NM = torch.empty_like(student_NM) if needs_grad[0] else None
        grad_VM = torch.zeros_like(weight_VM, dtype=wide(weight_VM).dtype) if needs_grad[1] else None
        grad_V = torch.zeros_like(bias_V, dtype=wide(bias_V).dtype) if needs_grad[2] and bias_V is not None else None
        from_teacher = ce = torch.zeros((), dtype=wide(student_NM[:0]).dtype, device=student_NM.device)
        for start in range(0, task.count, task.chunk):
            rows = slice(start, start + task.chunk)
            hidden_CM = student_NM[rows]
            logits_CV = task.student_head.shape(wide(F.linear(hidden_CM, weight_VM, bias_V)))
            teacher_sum, ce_sum, grad_CV = task.loss_and_gradient(logits_CV, rows)
            from_teacher, ce = from_teacher + teacher_sum, ce + ce_sum
            if grad_CV is None or not any(needs_grad):
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
