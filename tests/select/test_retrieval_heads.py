"""The scorer of retrieval heads: exact, cheap where it may be, and right about a model whose heads are known."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from subquad.data.probes import Probe
from subquad.errors import UserError
from subquad.evaluate.retrieval import answers
from subquad.model.interface import find_attention, shapes_of
from subquad.model.join import output_projection
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.select import Budget, Ranking, SelectionWork, choose_plan, retrieval_scores, units_of
from subquad.select.ablation import Ablation, ablation_cost, scaled
from subquad.select.retrieval_heads import _role, _sources
from tests.helpers import FAMILIES, byte_tokenizer, tiny


def probe_of(rows=6, length=24, seed=0, vocabulary=90):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(vocabulary, generator=generator)[: length // 2] + 3 for _ in range(rows)])
    mask = torch.zeros(rows, length, dtype=torch.bool)
    mask[:, length // 2 + 1 :] = True
    return Probe(torch.cat([ids, ids], 1), mask, torch.full((rows,), length // 2), per_token=True)


def ablation_of(teacher, probe, top=1, unit="head", work=None):
    shapes = shapes_of(teacher)
    baseline = {"copy": answers(teacher, probe)}
    return Ablation(
        all_attention(teacher),
        units_of(shapes, unit),
        {"copy": probe},
        baseline,
        "logprob",
        top,
        work or SelectionWork(print),
    )


def all_attention(teacher):
    return Student.from_teacher(teacher, Plan.all_attention(shapes_of(teacher)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_silenced_head_is_one_whose_columns_are_zero(family):
    """Passes that begin in the middle, many heads at a time, give what baseline passes of a cut model give."""
    teacher = tiny(family)
    probe = probe_of()
    baseline = answers(teacher, probe)
    ablation = ablation_of(teacher, probe)
    ablation.step()
    drops = ablation.mean("logprob")
    for layer, site in enumerate(find_attention(teacher)):
        module = teacher.get_submodule(site.path)
        width = site.shape.head_dim
        name = output_projection(module, site.shape.heads * width, site.shape.hidden_size)
        projection = module.get_submodule(name)
        for head in (0, site.shape.heads - 1):
            weights = projection.weight.data.clone()
            columns = slice(head * width, (head + 1) * width)
            if isinstance(projection, nn.Linear):
                projection.weight.data[:, columns] = 0
            else:
                projection.weight.data[columns] = 0
            expected = (baseline.logprob_N - answers(teacher, probe).logprob_N).mean() / baseline.tokens_N[0]
            projection.weight.data = weights
            index = ablation.units.index([(layer, head)])
            assert drops[index] == pytest.approx(float(expected), abs=2e-5)


def test_rounds_leave_out_what_is_settled():
    teacher = tiny("llama")
    probe = probe_of(rows=24)
    ablation = ablation_of(teacher, probe, top=2)
    heads = len(ablation.units)
    drops = torch.randn(24, heads, dtype=torch.float64) * 0.01
    drops[:, 3] += 5.0
    drops[:, 7] += 4.0
    ablation.drops["logprob"][:8] = drops[:8]
    ablation.rows_measured = 8
    assert ablation.open_units() == [] and not ablation.step()
    ablation.drops["logprob"][:8, 9] = torch.tensor([9.0, -1.0] * 4)  # as good as the second, or not
    open_units = ablation.open_units()
    assert 9 in open_units and len(open_units) < heads
    assert ablation.step() and ablation.rows_measured == 16
    assert {int(count) for index, count in enumerate(ablation.rows) if index not in open_units} == {8}
    assert {int(ablation.rows[index]) for index in open_units} == {16}
    low, high = ablation.interval()
    mean = ablation.mean("logprob")
    assert ((low <= mean) & (mean <= high)).all()


def _looking_model():
    """Four heads of a layer in a model of two; all weights zero but those of a few heads, which see something."""
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def test_dead_heads_score_nothing_and_live_ones_something():
    teacher = _looking_model()
    alive = [(0, 1), (1, 2)]
    with torch.no_grad():
        for layer, block in enumerate(teacher.model.layers):
            weight = block.self_attn.o_proj.weight
            for head in range(4):
                if (layer, head) not in alive:
                    weight[:, head * 8 : head * 8 + 8] = 0
                else:
                    weight[:, head * 8 : head * 8 + 8] *= 20
    probe = probe_of(rows=16)
    ablation = ablation_of(teacher, probe, top=2)
    while ablation.step():
        pass
    mean = ablation.mean("logprob").abs()
    scored = {ablation.units[index][0] for index in mean.gt(1e-6).nonzero()[:, 0].tolist()}
    assert scored == set(alive)


def test_a_model_that_answers_nothing_is_refused():
    tokenizer = byte_tokenizer()
    with pytest.raises(UserError, match="no retrieval task tells this model's heads apart .*dictionary is unusable"):
        retrieval_scores(tiny("llama", vocab_size=len(tokenizer)), tokenizer, context=256, rows=4)


def test_where_an_answer_comes_from():
    #               0  1  2  3   4  5  6   7  8  9  | 10 11 12 13
    ids = torch.tensor([[9, 5, 8, 1, 9, 6, 8, 1, 9, 3, 7, 6, 8, 1]])
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[0, 13] = True
    assert _sources(Probe(ids, mask, torch.tensor([10])), 0) == [(13, 7, 1)]  # "6 8 1", and not "5 8 1"
    copy = probe_of(rows=1, length=12)
    assert _sources(copy, 0) == [(place, place - 6, 1) for place in range(7, 12)]


def test_roles():
    assert _role(0.6, 0.2) == "aggregate" and _role(0.1, 0.4) == "gather" and _role(0.05, 0.05) == "neither"


def test_a_plan_of_heads_and_its_budgets():
    teacher = tiny("llama")
    student = Student.from_teacher(teacher, Plan.by_head([s.shape for s in find_attention(teacher)], [], "gla"))
    units = [[(layer, head)] for layer in range(3) for head in range(6)]
    scores = [(0.0, float(index == 4)) for index in range(18)]
    scores[16] = (0.5, 0.0)
    ranking = Ranking.in_order(units, scores, "head", {})
    plan, indices = choose_plan(student, Budget.parse("2"), ranking, "parallel")
    assert plan.attention_heads == [(0, 4), (2, 4)] and indices == [4, 16] and plan.join == "parallel"
    plan, indices = choose_plan(student, Budget.parse("5.6%"), ranking)
    assert plan.attention_heads == [(2, 4)]
    with pytest.raises(UserError, match="19 attention heads is more than the teacher's 18"):
        choose_plan(student, Budget.parse("19"), ranking)


def test_gains_scale_what_heads_put_out():
    teacher = tiny("llama")
    student = all_attention(teacher)
    tokens = torch.randint(3, 97, (2, 9))
    ones = {layer: torch.ones(2, 6) for layer in range(3)}
    plain = student.final_hidden(tokens)
    assert torch.equal(student.final_hidden(tokens, forward_context=scaled(ones)), plain)
    ones[1][1, 3] = 0
    hidden = student.final_hidden(tokens, forward_context=scaled(ones))
    assert torch.equal(hidden[0], plain[0]) and not torch.allclose(hidden[1], plain[1])


@pytest.mark.parametrize("unit", ["layer", 2])
def test_larger_units_are_silenced_as_a_whole(unit):
    """A layer or a group of them: the same as a pass in which all of their heads are silent."""
    teacher, probe = tiny("llama"), probe_of()
    ablation = ablation_of(teacher, probe, unit=unit)
    ablation.step()
    student, baseline = all_attention(teacher), answers(teacher, probe)
    for index, heads in enumerate(ablation.units):
        gains = {layer: torch.zeros(6, 6) for layer, _ in heads}
        ablated = answers(student, probe, lambda m, ids, g=gains: m.final_hidden(ids, forward_context=scaled(g)))
        expected = ((baseline.logprob_N - ablated.logprob_N) / baseline.tokens_N).mean()
        assert ablation.mean("logprob")[index] == pytest.approx(float(expected), abs=2e-5)


def test_the_cost_is_what_a_full_round_takes():
    teacher, probe = tiny("llama"), probe_of(rows=6)
    work = SelectionWork(print)
    ablation = ablation_of(teacher, probe, work=work)
    cost = ablation_cost(ablation.units, 3, {"copy": probe})
    assert cost.forward_tokens == pytest.approx((1 + 6 * (1 + 2 / 3 + 1 / 3)) * probe.input_ids.numel())
    ablation.step()
    assert work.actual_cost.forward_tokens == pytest.approx(cost.forward_tokens)
