"""Budgets, and what is best within them: the knapsack, what units cost, how fast plans decode."""

import itertools
import random
from functools import partial

import pytest
import torch

from subquad.errors import UserError
from subquad.model.interface import shapes_of
from subquad.model.random_cache import random_cache
from subquad.model.student import Student
from subquad.plan import AttentionShape, Plan
from subquad.select.budget import Budget, largest_within
from subquad.select.cost import best_units, by_layers, front, groups_of
from subquad.select.knapsack import CELLS, solve
from subquad.select.speed import DecodeCost, decode_cost, layer_seconds
from subquad.select.units import units_of
from tests.helpers import FAMILIES, tiny

SHAPES = [AttentionShape(heads=9, kv_heads=3, head_dim=64, hidden_size=576)] * 30
GROUPED = [AttentionShape(heads=4, kv_heads=2, head_dim=8, hidden_size=32)] * 2


def plan_of(count):
    return Plan.by_layer(SHAPES, range(count), "hedgehog")


def keeping(shapes, heads, mixer="gla", options=None, join="split"):
    return Plan.by_head(shapes, heads, mixer, options, join)


def cache_bytes(plan, context=64):
    return plan.cache_bytes(context)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("15", 15), ("50%", 15), ("0.5", 15), ("12.5%", 4), ("0", 0), ("100%", 30)],
)
def test_budgets_in_layers(text, layers):
    assert Budget.parse(text).largest(30, plan_of, "float32") == layers


def test_budget_in_bytes():
    """256 MiB at 32k tokens: the largest plan that fits, and one layer more does not."""
    count = Budget.parse("256MiB@32k").largest(30, plan_of, "float32")
    assert plan_of(count).cache_bytes(32768) <= 256 * 2**20 < plan_of(count + 1).cache_bytes(32768)
    assert Budget.parse("256 mib @ 32768").context == Budget.parse("256MiB@32k").context == 32768
    assert Budget.parse("1MB@1000").size == 10**6


def test_budget_of_speed():
    """With attention at 3 ms a layer, the mixer at 1 ms and 10 ms for the rest, the teacher's step takes 100 ms."""
    budget = Budget.parse("1.25x@32k")
    assert (budget.speedup, budget.context) == (1.25, 32768)
    seconds = DecodeCost([0.003] * 30, [0.001] * 30, 0.01)
    assert budget.largest(30, plan_of, "float32", seconds=seconds) == 20
    assert Budget.parse("1x@32k").largest(30, plan_of, "float32", seconds=seconds) == 30
    with pytest.raises(UserError, match="impossible: without any attention layer decoding is 2.50 times as fast"):
        Budget.parse("2.6x@32k").largest(30, plan_of, "float32", seconds=seconds)


@pytest.mark.parametrize("word", ["opt", "best"])
def test_words_are_for_the_selector_that_finds_out(word):
    budget = Budget.parse(word.upper())
    assert budget.word == word
    with pytest.raises(UserError, match=f"'{word}' is for the greedy selector"):
        budget.largest(30, plan_of, "float32")


@pytest.mark.parametrize(
    "text", ["", "many", "-3", "150%", "64MiB", "64XB@32k", "@32k", "1.5x", "x@32k", "0.9x@32k", "optimal"]
)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(UserError, match="budget"):
        Budget.parse(text)


def test_impossible_budgets_are_refused():
    with pytest.raises(UserError, match="more than the teacher's 30"):
        Budget.parse("31").largest(30, plan_of, "float32")
    with pytest.raises(UserError, match="impossible: without any attention layer the cache takes"):
        Budget.parse("1KiB@32k").largest(30, plan_of, "float32")


def test_the_largest_plan_within_a_limit():
    def kept(plan):
        return len(plan.attention_layers)

    assert largest_within(30, plan_of, kept, 7.5) == 7
    assert largest_within(30, plan_of, kept, 100) == 30
    assert largest_within(30, plan_of, kept, -1) is None


def brute_force(items, limit):
    """The greatest value within the limit, and its least cost; None where nothing is."""
    sums = [tuple(map(sum, zip(*options, strict=True))) for options in itertools.product(*items)]
    return max(((value, -cost) for value, cost in sums if cost <= limit), default=None)


def random_items(draw, number):
    return [[(0, 0), *((number(0, 9), number(-2, 12)) for _ in range(draw.randint(1, 3)))] for _ in range(6)]


@pytest.mark.parametrize("seed", range(40))
def test_whole_costs_are_solved_exactly(seed):
    draw = random.Random(seed)
    items, limit = random_items(draw, draw.randint), draw.randint(-6, 50)
    chosen, best = solve(items, limit), brute_force(items, limit)
    if best is None:
        assert chosen is None
    else:
        value, cost = (sum(item[o][i] for item, o in zip(items, chosen, strict=True)) for i in (0, 1))
        assert (value, -cost) == best


@pytest.mark.parametrize("seed", range(20))
def test_other_costs_are_solved_to_a_cell_an_item(seed):
    draw = random.Random(seed)
    items, limit = random_items(draw, draw.uniform), draw.uniform(0, 40)
    chosen = solve(items, limit)
    value, cost = (sum(item[o][i] for item, o in zip(items, chosen, strict=True)) for i in (0, 1))
    above = limit - sum(min(cost for _, cost in item) for item in items)
    assert cost <= limit + 1e-9
    assert value >= brute_force(items, limit - above * len(items) / CELLS)[0] - 1e-9


def test_costs_of_many_cells_are_solved_on_the_grid():
    items = [[(0, 0), (1 + i % 3, 10**6 + i)] for i in range(100)]
    chosen = solve(items, 50 * 10**6 + 5 * 10**5)
    assert sum(chosen) == 50 and chosen[2::3] == [1] * 33  # all of the best, then of the next
    assert solve(items, 10**9) == [1] * 100
    assert solve(items, 0) == [0] * 100
    assert solve([], 3) == []


def best_subset(units, values, limit, total):
    """The greatest value of all subsets within the limit."""
    subsets = itertools.chain(*(itertools.combinations(range(len(units)), n) for n in range(len(units) + 1)))
    within = [kept for kept in subsets if total([head for unit in kept for head in units[unit]]) <= limit]
    return max(sum(values[unit] for unit in kept) for kept in within)


@pytest.mark.parametrize("options", [{}, {"share_state": True}])
@pytest.mark.parametrize("seed", range(5))
def test_heads_that_share_keys_and_values_are_chosen_together(options, seed):
    """As good as the best of all subsets, by the plan's own arithmetic."""
    draw = random.Random(seed)
    units = units_of(GROUPED, "head")
    values = [draw.random() for _ in units]
    plan_of = partial(keeping, GROUPED, options=options)
    total = by_layers(plan_of, cache_bytes)
    least, most = cache_bytes(plan_of([])), cache_bytes(Plan.all_attention(GROUPED))
    for share in (0, 0.2, 0.5, 0.8, 1):
        limit = least + share * (most - least)
        kept = best_units(units, values, GROUPED, plan_of, cache_bytes, limit)
        heads = [head for unit in kept for head in units[unit]]
        assert cache_bytes(plan_of(heads)) == total(heads) <= limit
        if not options:
            assert sum(values[unit] for unit in kept) == pytest.approx(best_subset(units, values, limit, total))
    assert best_units(units, values, GROUPED, plan_of, cache_bytes, least - 1) is None


@pytest.mark.parametrize("spec", ["layer", "head", 2])
def test_units_of_equal_cost_are_chosen_by_value(spec):
    shapes = [AttentionShape(heads=3, kv_heads=3, head_dim=8, hidden_size=24)] * 4
    units = units_of(shapes, spec)
    draw = random.Random(0)
    values = [draw.uniform(-1, 1) for _ in units]
    order = sorted(range(len(units)), key=values.__getitem__, reverse=True)
    plan_of = partial(keeping, shapes)
    for count in range(len(units) + 1):
        limit = cache_bytes(plan_of([head for unit in order[:count] for head in units[unit]]))
        assert best_units(units, values, shapes, plan_of, cache_bytes, limit) == sorted(order[:count])


def test_layers_with_a_window_are_cheap():
    """For what one whole layer takes three of a small window are kept, though each is worth less."""
    whole = AttentionShape(heads=2, kv_heads=2, head_dim=8, hidden_size=16)
    shapes = [whole, *[whole.model_copy(update={"window": 33})] * 3]
    plan_of = partial(keeping, shapes, options={"state_dim": 1})
    limit = cache_bytes(plan_of([(0, 0), (0, 1)]), 4096)
    cost = partial(cache_bytes, context=4096)
    units = units_of(shapes, "layer")
    assert best_units(units, [0.5, 0.2, 0.2, 0.2], shapes, plan_of, cost, limit) == [1, 2, 3]
    assert best_units(units, [0.7, 0.2, 0.2, 0.2], shapes, plan_of, cost, limit) == [0]


def test_items_are_what_shares_keys_and_values():
    assert groups_of(units_of(GROUPED, "head"), GROUPED) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert groups_of(units_of(GROUPED, "layer"), GROUPED) == [[0], [1]]
    assert groups_of(units_of(SHAPES, 15), SHAPES) == [[0], [1]]


def test_units_that_cost_more_together_are_dropped_until_they_fit():
    """A cost that grows with the square of a layer's heads: two heads of different layers cost half as much."""
    shapes = [AttentionShape(heads=2, kv_heads=2, head_dim=8, hidden_size=16)] * 2
    units = units_of(shapes, "head")

    def cost(plan):
        return sum(len(layer.get("attention", [])) ** 2 for layer in plan.layers)

    plan_of = partial(keeping, shapes)
    assert best_units(units, [4.0, 3.0, 1.0, 1.0], shapes, plan_of, cost, 2) == [0, 2]


@pytest.mark.parametrize("options", [{}, {"share_state": True}])
@pytest.mark.parametrize("spec", ["layer", "head"])
def test_the_front_rises_to_all_that_is_of_value(options, spec):
    shapes = [*GROUPED, GROUPED[0].model_copy(update={"window": 16})]
    units = units_of(shapes, spec)
    draw = random.Random(1)
    values = [draw.uniform(-0.3, 1) for _ in units]
    plan_of = partial(keeping, shapes, options=options)
    points = front(units, values, shapes, plan_of, cache_bytes, points=12)
    assert points[0]["value"] >= 0 and points[-1]["value"] == pytest.approx(1)
    assert {unit for unit, value in enumerate(values) if value > 0} <= {*points[-1]["units"]}
    for point, following in itertools.pairwise(points):
        assert point["cost"] < following["cost"] and point["value"] < following["value"]
    for point in points:
        heads = [head for unit in point["units"] for head in units[unit]]
        assert cache_bytes(plan_of(heads)) == point["cost"]
    assert len(front(units, [0.0] * len(units), shapes, plan_of, cache_bytes)) == 1


def student_of(teacher, layers, mixer="gla"):
    shapes = shapes_of(teacher)
    return Student.from_teacher(teacher, Plan.by_layer(shapes, layers, mixer))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cache_of_nothing_in_particular_is_like_a_real_one(family):
    """The same tensors as after reading a text; layers of attention, of a mixer, and of a window."""
    student = student_of(tiny(family), [1, 2], "gated_deltanet")
    read, made, read_on = student.new_cache(), *(random_cache(student, 40) for _ in range(2))
    with torch.no_grad():
        student(torch.randint(3, 97, (1, 40)), past_key_values=read, use_cache=True)
        student(torch.ones(1, 1, dtype=torch.long), past_key_values=read_on, use_cache=True)
    for layer, wanted in zip(made.layers, read.layers, strict=True):
        assert layer.tokens == wanted.tokens and layer.is_initialized == wanted.is_initialized
        assert layer.states.keys() == wanted.states.keys()
        for name, state in wanted.states.items():
            kinds = {key: (tensor.shape, tensor.dtype) for key, tensor in state.items()}
            assert {key: (tensor.shape, tensor.dtype) for key, tensor in layer.states[name].items()} == kinds


def test_decoding_is_timed_by_layer():
    teacher = tiny("llama")
    mixing, rest = layer_seconds(student_of(teacher, [1]), context=100, steps=2)
    assert len(mixing) == 3 and min(*mixing, rest) > 0
    cost = decode_cost(student_of(teacher, [0, 1, 2]), student_of(teacher, []), context=100, steps=2)
    assert len(cost.attention) == len(cost.mixer) == 3 and min(*cost.attention, *cost.mixer, cost.rest) > 0


def test_the_estimate_adds_up_the_layers():
    cost = DecodeCost([4.0, 8.0], [1.0, 2.0], 10.0)
    assert cost(keeping(GROUPED, [])) == 10 + 1 + 2
    assert cost(Plan.all_attention(GROUPED)) == 10 + 4 + 8
    assert cost(keeping(GROUPED, [(1, 2)])) == 10 + 1 + (8 / 2 + 2)
    assert cost(keeping(GROUPED, [(1, 2), (1, 3)])) == 10 + 1 + (8 / 2 + 2)
    assert cost(keeping(GROUPED, [(1, 2), (1, 0)])) == 10 + 1 + (8 + 2)


def test_a_budget_of_speed_counts_key_value_heads():
    """Half of the mixing's time is saved by four heads of two key/value heads, not by four of four."""
    cost, units = DecodeCost([4.0, 4.0], [0.0, 0.0], 0.0), units_of(GROUPED, "head")
    values = [1.0, 0.2, 0.9, 0.2, 0.5, 0.5, 0.1, 0.1]
    price, limit = Budget.parse("2x@32k").cost_and_limit(GROUPED, "float32", cost)
    assert limit == 4
    assert best_units(units, values, GROUPED, partial(keeping, GROUPED), price, limit) == [0, 1, 2, 3]
    price, limit = Budget.parse("1x@32k").cost_and_limit(GROUPED, "float32", cost)
    assert best_units(units, values, GROUPED, partial(keeping, GROUPED), price, limit) == [*range(8)]
