"""Budgets and selectors."""

from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, tiny

from subquad.attention import find_attention
from subquad.errors import UserError
from subquad.evaluate import likelihood
from subquad.plan import AttentionShape, Plan
from subquad.select import SELECTORS, Budget, Question, check_selector, choose_plan, kl_scores, uniform_layers
from subquad.student import Student

SHAPES = [AttentionShape(heads=9, kv_heads=3, head_dim=64, hidden_size=576)] * 30


def linear_student(family="llama", mixer="hedgehog", options=None):
    teacher = tiny(family, num_hidden_layers=4) if family == "llama" else tiny(family)
    shapes = [site.shape for site in find_attention(teacher)]
    student = Student.from_teacher(teacher, Plan.by_layer(shapes, [], mixer, options or {"window": 8, "sinks": 1}))
    return teacher, student


def plan_of(count):
    return Plan.by_layer(SHAPES, range(count), "hedgehog")


@pytest.mark.parametrize(
    ("text", "layers"),
    [("15", 15), ("50%", 15), ("0.5", 15), ("12.5%", 4), ("0", 0), ("100%", 30)],
)
def test_budgets_in_layers(text, layers):
    assert Budget.parse(text).largest(30, plan_of, "float32") == layers


def test_budget_in_bytes():
    """64 MiB at 32k tokens: the largest plan that fits, and one layer more does not."""
    count = Budget.parse("256MiB@32k").largest(30, plan_of, "float32")
    assert plan_of(count).cache_bytes(32768) <= 256 * 2**20 < plan_of(count + 1).cache_bytes(32768)
    assert Budget.parse("256 mib @ 32768").context == Budget.parse("256MiB@32k").context == 32768
    assert Budget.parse("1MB@1000").size == 10**6


@pytest.mark.parametrize("text", ["", "many", "-3", "150%", "64MiB", "64XB@32k", "@32k"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(UserError, match="budget"):
        Budget.parse(text)


def test_impossible_budgets_are_refused():
    with pytest.raises(UserError, match="more than the teacher's 30"):
        Budget.parse("31").largest(30, plan_of, "float32")
    with pytest.raises(UserError, match="impossible: without any attention layer"):
        Budget.parse("1KiB@32k").largest(30, plan_of, "float32")


def test_uniform_is_even():
    assert uniform_layers(30, 15) == list(range(1, 30, 2))
    assert uniform_layers(28, 4) == [3, 10, 17, 24]
    for layers in (3, 28, 30):
        for count in range(layers + 1):
            chosen = uniform_layers(layers, count)
            assert len(set(chosen)) == count and all(0 <= layer < layers for layer in chosen)


@pytest.mark.parametrize("family", FAMILIES)
def test_kl_scores_are_those_of_whole_passes(family):
    """Reusing the blocks below changes nothing: the same as building each candidate and measuring it."""
    options = {"window": 8, "sinks": 1}
    teacher, student = linear_student(family)
    tokens = torch.randint(3, 97, (2, 48))
    found = kl_scores(student, teacher, tokens, stride=1)
    candidates = {"none": student} | {
        str(layer): Student.from_teacher(
            teacher, Plan.by_layer(student.plan.shapes, [layer], "hedgehog", options), mixers_from=student
        )
        for layer in range(student.plan.num_layers)
    }
    wanted = likelihood(candidates, teacher, tokens, [48])
    assert found.all_linear == pytest.approx(wanted["none"]["kl"][48], rel=1e-3)
    for layer, restored in enumerate(found.restored):
        assert restored == pytest.approx(wanted[str(layer)]["kl"][48], rel=1e-3)
        assert found.scores[layer] == pytest.approx(found.all_linear - restored)


def test_kl_keeps_the_layer_that_was_broken():
    """Of layers that are linear for free and one whose mixer was ruined, the ruined one must keep attention."""
    teacher, student = linear_student(options={"window": 48, "sinks": 0})  # a window that sees everything
    student.attention_modules()[2].mixer["hedgehog"].options = (
        student.attention_modules()[2].mixer["hedgehog"].options.model_copy(update={"window": 1})
    )
    tokens = torch.randint(3, 97, (1, 48))
    choice = SELECTORS["kl"](Question(student, SimpleNamespace(model=teacher), tokens))
    plan, kept = choose_plan(student, Budget.parse("1"), choice)
    assert kept == [2] == plan.attention_layers
    assert choice.report["order"][0] == 2


def test_unknown_selectors_and_options_are_refused():
    with pytest.raises(UserError, match="did you mean 'uniform'"):
        check_selector("unifrom", {})
    with pytest.raises(UserError, match="no option 'strid'"):
        check_selector("kl", {"strid": 3})
