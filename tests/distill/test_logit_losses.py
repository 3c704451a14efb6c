"""The objectives against their plain forms, in float64, value and gradient."""

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig

from subquad.data.batch import next_token_labels
from subquad.distill.layer_losses import output_distance
from subquad.distill.logit_losses import FromHidden, FromTopK, chunked_loss
from subquad.errors import UserError
from subquad.model.output_head import OutputHead, check_head, final_hidden, head_logits
from subquad.recipes.stage import Divergence

SMALL = dict(
    vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, pad_token_id=0,
)  # fmt: skip
HEADS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "gemma2, soft-cap": lambda: Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.3),
    "cohere, scale": lambda: CohereConfig(**SMALL, logit_scale=0.2),
    "granite, divisor": lambda: GraniteConfig(**SMALL, logits_scaling=7.0),
    "gpt2": lambda: GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}


def tiny(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def problem(*, bias=False, scale=1.0, softcap=None, B=2, T=9, M=8, V=23):
    """Random student and teacher states and heads in float64, and labels with some positions unlabelled."""
    torch.manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    student_BTM = draw(B, T, M).requires_grad_()
    weight_VM = draw(V, M).requires_grad_()
    bias_V = draw(V).requires_grad_() if bias else None
    labels_BT = next_token_labels(torch.randint(0, V, (B, T)))
    head = OutputHead(weight_VM, bias_V, scale, softcap)
    return student_BTM, head, draw(B, T, M + 4), OutputHead(draw(V, M + 4)), labels_BT


def plain_divergence(kind, teacher, student):
    """Of log-probabilities, the mean over positions, as it stands in the papers."""
    p, q = teacher.exp(), student.exp()
    kl = lambda x, y: (x * (x.log() - y.log())).sum(-1)  # noqa: E731
    value = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
        "soft_cross_entropy": lambda: -(p * student).sum(-1),
    }[kind]()
    return value.mean()


def plain_loss(student_BTM, head, teacher_BTM, teacher_head, labels_BT, weights, tau, kind="forward_kl"):
    student_BTV, teacher_BTV = head(student_BTM), teacher_head(teacher_BTM)
    soft = kind == "soft_cross_entropy"
    teacher_log = F.log_softmax(teacher_BTV / (1.0 if soft else tau), -1)
    divergence = plain_divergence(kind, teacher_log, F.log_softmax(student_BTV / tau, -1))
    ce = F.cross_entropy(student_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=-100)
    factor = 1.0 if soft else tau**2
    return weights.get("logits", 0.0) * factor * divergence + weights.get("labels", 0.0) * ce


@pytest.mark.parametrize("weights", [{"logits": 1.0}, {"labels": 1.0}, {"logits": 0.7, "labels": 0.2}], ids=str)
@pytest.mark.parametrize("form", [{}, {"bias": True}, {"scale": 0.3, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 18, 100])
def test_chunked_loss_equals_the_plain_form(weights, form, chunk):
    student_BTM, head, teacher_BTM, teacher_head, labels_BT = problem(**form)
    leaves = [student_BTM, head.weight_VM] + ([head.bias_V] if head.bias_V is not None else [])
    loss = chunked_loss(
        student_BTM, head, weights=weights, teacher=FromHidden(teacher_BTM, teacher_head),
        labels_BT=labels_BT, temperature=1.7, chunk=chunk,
    )  # fmt: skip
    plain = plain_loss(student_BTM, head, teacher_BTM, teacher_head, labels_BT, weights, 1.7)
    torch.testing.assert_close(loss.total, plain, rtol=1e-12, atol=1e-12)
    assert set(loss.parts()) == set(weights)
    weighted = sum(weights[name] * part for name, part in loss.parts().items())
    torch.testing.assert_close(weighted, plain, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(3.0 * loss.total, leaves)
    for grad, plain_grad in zip(grads, torch.autograd.grad(3.0 * plain, leaves), strict=True):
        torch.testing.assert_close(grad, plain_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", get_args(Divergence))
@pytest.mark.parametrize("tau", [1.0, 1.7])
def test_every_divergence_equals_its_plain_form(kind, tau):
    student_BTM, head, teacher_BTM, teacher_head, labels_BT = problem(bias=True, softcap=2.0)
    leaves, weights = [student_BTM, head.weight_VM, head.bias_V], {"logits": 0.7, "labels": 0.2}
    loss = chunked_loss(
        student_BTM, head, weights=weights, teacher=FromHidden(teacher_BTM, teacher_head), labels_BT=labels_BT,
        kind=kind, temperature=tau, chunk=4,
    )  # fmt: skip
    plain = plain_loss(student_BTM, head, teacher_BTM, teacher_head, labels_BT, weights, tau, kind)
    torch.testing.assert_close(loss.total, plain, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(3.0 * loss.total, leaves)
    for grad, plain_grad in zip(grads, torch.autograd.grad(3.0 * plain, leaves), strict=True):
        torch.testing.assert_close(grad, plain_grad, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        no_grad_loss = chunked_loss(
            student_BTM, head, weights=weights, teacher=FromHidden(teacher_BTM, teacher_head), labels_BT=labels_BT,
            kind=kind, temperature=tau,
        )  # fmt: skip
    torch.testing.assert_close(no_grad_loss.total, plain.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", get_args(Divergence))
@pytest.mark.parametrize("k", [1, 5, 22])
def test_top_k_is_the_divergence_of_k_and_one_outcomes(kind, k):
    student_BTM, head, teacher_BTM, teacher_head, _ = problem()
    teacher_log = F.log_softmax(teacher_head(teacher_BTM), -1)
    top = teacher_log.topk(k)
    log_rest_BT = teacher_log.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    top_k = FromTopK(top.indices, top.values, log_rest_BT)
    loss = chunked_loss(student_BTM, head, weights={"logits": 1.0}, teacher=top_k, kind=kind, chunk=5)

    def outcomes(log_BTV):
        rest_BT1 = log_BTV.exp().scatter(-1, top.indices, 0.0).sum(-1, keepdim=True)
        return torch.cat([log_BTV.gather(-1, top.indices), rest_BT1.log()], -1)

    student_log = F.log_softmax(head(student_BTM), -1)
    plain = plain_divergence(kind, outcomes(teacher_log), outcomes(student_log))
    full_divergence = plain_divergence(kind, teacher_log, student_log)
    if kind != "soft_cross_entropy":  # which counts the spread tokens' entropy too
        torch.testing.assert_close(loss.total, plain, rtol=1e-10, atol=1e-12)
        assert loss.total <= full_divergence + 1e-12 and (k < 22 or torch.allclose(loss.total, full_divergence))
        leaves = [student_BTM, head.weight_VM]
        for grad, plain_grad in zip(
            torch.autograd.grad(loss.total, leaves), torch.autograd.grad(plain, leaves), strict=True
        ):
            torch.testing.assert_close(grad, plain_grad, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="temperature 1"):
        chunked_loss(student_BTM, head, weights={"logits": 1.0}, teacher=top_k, temperature=2.0)


ALLOWED, FORBIDDEN = [token for token in range(23) if token not in (3, 7, 20)], [3, 7, 20]


def forbidding(bias_V, tokens, value=-torch.inf):
    """A bias that forbids these tokens."""
    return bias_V.detach().index_fill(0, torch.tensor(tokens, dtype=torch.int64), value)


def divergence_where_allowed(kind, teacher_BTV, student_BTV, tau):
    """The definitions on the tokens that the teacher allows: the others have p = 0, and 0 log 0 is 0."""
    log_p = F.log_softmax(teacher_BTV[..., ALLOWED] / (1.0 if kind == "soft_cross_entropy" else tau), -1)
    log_q = F.log_softmax(student_BTV / tau, -1)
    p, log_q, lost = log_p.exp(), log_q[..., ALLOWED], log_q[..., FORBIDDEN].exp().sum(-1)
    if kind == "reverse_kl":
        log_q = F.log_softmax(student_BTV[..., ALLOWED] / tau, -1)
    q, log_m = log_q.exp(), ((p + log_q.exp()) / 2).log()
    value = {
        "forward_kl": lambda: (p * (log_p - log_q)).sum(-1),
        "reverse_kl": lambda: (q * (log_q - log_p)).sum(-1),
        "jensen_shannon": lambda: (p * (log_p - log_m) + q * (log_q - log_m)).sum(-1) / 2 + lost * math.log(2) / 2,
        "soft_cross_entropy": lambda: -(p * log_q).sum(-1),
    }[kind]()
    return value.mean() * (1.0 if kind == "soft_cross_entropy" else tau**2)


@pytest.mark.parametrize("kind", get_args(Divergence))
@pytest.mark.parametrize("tau", [1.0, 1.7])
@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float64).min])
@pytest.mark.parametrize("student_forbids", [[], [3], FORBIDDEN], ids=str)
def test_a_forbidden_token_adds_nothing_to_a_divergence(kind, tau, mask, student_forbids):
    student_BTM, head, teacher_BTM, teacher_head, _ = problem(bias=True)
    head = OutputHead(head.weight_VM, forbidding(head.bias_V, student_forbids).requires_grad_())
    teacher_head = OutputHead(teacher_head.weight_VM, forbidding(torch.zeros(23).double(), FORBIDDEN, mask))
    leaves = [student_BTM, head.weight_VM, head.bias_V]
    loss = chunked_loss(
        student_BTM, head, weights={"logits": 0.7}, teacher=FromHidden(teacher_BTM, teacher_head),
        kind=kind, temperature=tau, chunk=4,
    )  # fmt: skip
    plain = 0.7 * divergence_where_allowed(kind, teacher_head(teacher_BTM), head(student_BTM), tau)
    torch.testing.assert_close(loss.total, plain, rtol=1e-12, atol=1e-12)
    for grad, plain_grad in zip(
        torch.autograd.grad(loss.total, leaves), torch.autograd.grad(plain, leaves), strict=True
    ):
        torch.testing.assert_close(grad, plain_grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", get_args(Divergence))
@pytest.mark.parametrize("k", [5, 20, 21, 23])
@pytest.mark.parametrize("student_forbids", [[], FORBIDDEN], ids=str)
def test_top_k_with_forbidden_tokens(kind, k, student_forbids):
    """The teacher allows 20 tokens of 23: beyond these, forbidden ones are stored, and nothing is left for the rest."""
    student_BTM, head, teacher_BTM, teacher_head, _ = problem(bias=True)
    head = OutputHead(head.weight_VM, forbidding(head.bias_V, student_forbids).requires_grad_())
    teacher_BTV = teacher_head(teacher_BTM) + forbidding(torch.zeros(23).double(), FORBIDDEN)
    teacher_log = F.log_softmax(teacher_BTV, -1)
    top = teacher_log.topk(k)
    log_rest_BT = teacher_log.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    stored = FromTopK(top.indices, top.values, log_rest_BT)
    loss = chunked_loss(student_BTM, head, weights={"logits": 1.0}, teacher=stored, kind=kind, chunk=5)
    plain, leaves = divergence_where_allowed(kind, teacher_BTV, head(student_BTM), 1.0), [student_BTM, head.weight_VM]
    grads = torch.autograd.grad(loss.total, leaves)
    assert loss.total.isfinite() and all(grad.isfinite().all() for grad in grads)
    if k >= 20:  # all that the teacher says is stored
        torch.testing.assert_close(loss.total, plain, rtol=1e-10, atol=1e-12)
        for grad, plain_grad in zip(grads, torch.autograd.grad(plain, leaves), strict=True):
            torch.testing.assert_close(grad, plain_grad, rtol=1e-9, atol=1e-12)
    elif kind != "soft_cross_entropy":  # which counts the spread tokens' entropy too
        assert loss.total <= plain + 1e-12


def test_a_student_whose_logits_are_not_numbers_has_no_finite_loss():
    student_BTM, head, teacher_BTM, teacher_head, _ = problem(bias=True)
    broken = OutputHead(head.weight_VM, forbidding(head.bias_V, [5], torch.nan))
    masked = OutputHead(teacher_head.weight_VM, forbidding(torch.zeros(23).double(), [5]))
    for kind in get_args(Divergence):
        loss = chunked_loss(
            student_BTM, broken, weights={"logits": 1.0}, teacher=FromHidden(teacher_BTM, masked), kind=kind
        )
        assert loss.total.isnan(), kind


def test_frozen_head_gets_no_gradient_and_no_grad_mode_computes_none():
    student_BTM, head, teacher_BTM, teacher_head, _ = problem()
    frozen = OutputHead(head.weight_VM.detach())
    inputs = dict(weights={"logits": 1.0}, teacher=FromHidden(teacher_BTM, teacher_head))
    loss = chunked_loss(student_BTM, frozen, **inputs)
    loss.total.backward()
    assert student_BTM.grad is not None and frozen.weight_VM.grad is None
    with torch.no_grad():
        no_grad_loss = chunked_loss(student_BTM, frozen, **inputs)
    assert not no_grad_loss.total.requires_grad
    torch.testing.assert_close(no_grad_loss.total, loss.total.detach(), rtol=0, atol=0)


def test_kl_of_a_model_to_itself_is_zero_and_its_gradient_too():
    student_BTM, head, *_ = problem()
    loss = chunked_loss(
        student_BTM, head, weights={"logits": 1.0}, teacher=FromHidden(student_BTM, OutputHead(head.weight_VM.detach()))
    )
    loss.total.backward()
    assert loss.total.item() == 0.0
    assert student_BTM.grad.abs().max() < 1e-15


def test_half_precision_states_give_a_float32_loss():
    student_BTM, head, teacher_BTM, teacher_head, _ = problem()
    half = OutputHead(head.weight_VM.detach().bfloat16().requires_grad_())
    states_BTM = student_BTM.detach().bfloat16().requires_grad_()
    teacher_float = OutputHead(teacher_head.weight_VM.float())
    loss = chunked_loss(
        states_BTM, half, weights={"logits": 1.0}, teacher=FromHidden(teacher_BTM.float(), teacher_float)
    )
    loss.total.backward()
    exact = plain_loss(student_BTM, head, teacher_BTM, teacher_head, torch.zeros(2, 9).long(), {"logits": 1.0}, 1.0)
    assert loss.total.dtype == torch.float32
    assert states_BTM.grad.dtype == half.weight_VM.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.total.double(), exact, rtol=0.03, atol=0)


@pytest.mark.parametrize("kind, plain", [
    ("norm", lambda s, t: ((s - t).square().sum(-1).sqrt() / s.shape[-1] ** 0.5).mean()),
    ("squared", lambda s, t: (s - t).square().sum() / s.numel()),
])  # fmt: skip
def test_output_distance(kind, plain):
    torch.manual_seed(0)
    student_BTM, teacher_BTM = torch.randn(2, 2, 5, 6, dtype=torch.float64).unbind()
    torch.testing.assert_close(output_distance(student_BTM, teacher_BTM, kind), plain(student_BTM, teacher_BTM))
    equal_BTM = student_BTM.clone().requires_grad_()
    output_distance(equal_BTM, student_BTM, kind).backward()
    assert equal_BTM.grad.abs().max() == 0  # and no NaN at the kink of the norm


@pytest.mark.parametrize("family", HEADS)
def test_head_of_a_family_is_its_logits(family):
    model = tiny(HEADS[family]())
    check_head(model)
    input_ids_BT = torch.randint(1, 61, (2, 7))
    with torch.no_grad():
        logits_BTV = head_logits(model, final_hidden(model, input_ids_BT))
        torch.testing.assert_close(logits_BTV, model(input_ids_BT).logits, rtol=1e-5, atol=1e-6)


def test_a_head_that_does_something_else_is_named():
    model = tiny(HEADS["llama"]())
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.1)
    with pytest.raises(UserError, match="LlamaForCausalLM"):
        check_head(model)
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 61))
    with pytest.raises(UserError, match="LlamaForCausalLM"):
        OutputHead.of(model)


def test_forbidden_tokens_hide_no_other_change_of_the_logits():
    model = tiny(HEADS["llama"]())
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(61).index_fill(0, torch.tensor([3, 5]), -torch.inf))
    check_head(model)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output * 1.1)
    with pytest.raises(UserError, match="LlamaForCausalLM"):
        check_head(model)
