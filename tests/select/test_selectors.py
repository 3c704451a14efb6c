"""Selectors: what each measures is what whole students measure, by layer, by head and by group."""

from types import SimpleNamespace

import pytest
import torch

from subquad.errors import UserError
from subquad.evaluate import likelihood
from subquad.model.interface import find_attention, shapes_of
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.recipes.schema import Recipe, SelectorConfig
from subquad.select import (
    SELECTORS,
    Budget,
    SelectionCost,
    SelectionWork,
    SelectorInputs,
    Supernet,
    TokenCost,
    check_alternatives,
    check_selector,
    choose_plan,
    make_selector,
    uniform_layers,
    units_of,
)
from subquad.select import gates as gating
from subquad.select.alignment import alignment_losses
from subquad.select.gates import gated
from subquad.select.greedy import greedy_path
from subquad.select.halo import halo_scores
from subquad.select.kl import candidates, gains_of, kl_without_training, round_tokens
from subquad.select.supernet import first_difference, without
from subquad.select.task import TaskScore, task_score
from subquad.select.units import kind_of
from subquad.select.work import bootstrap
from tests.helpers import FAMILIES, tiny

UNITS = ["layer", "head", 2]
quiet = {"say": lambda text: None}


def linear_student(family="llama", mixer="hedgehog", options=None):
    """A teacher, and its all-linear student with mixers that differ from calibrated and from untouched ones."""
    teacher = tiny(family)
    shapes = shapes_of(teacher)
    student = Student.from_teacher(teacher, Plan.by_layer(shapes, [], mixer, options or {"window": 8, "sinks": 1}))
    torch.manual_seed(1)
    for _, parameter in student.mixer_parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return teacher, student.requires_grad_(False)


def supernet_of(family="llama", **how):
    teacher, student = linear_student(family, **how)
    return Supernet(student, teacher)


def text(rows=2, length=40):
    torch.manual_seed(2)
    return torch.randint(3, 97, (rows, length))


def ruined_layer(layer=1):
    """Layers that are linear for free, and one whose mixer sees next to nothing."""
    teacher = tiny("llama")
    shapes = shapes_of(teacher)
    student = Student.from_teacher(teacher, Plan.by_layer(shapes, [], "hedgehog", {"window": 48, "sinks": 0}))
    mixer = student.attention_modules()[layer].mixer["hedgehog"]
    mixer.options = mixer.options.model_copy(update={"window": 1})
    return teacher, student


def ranking_of(student, teacher, by, budget="1", **options):
    inputs = SelectorInputs(
        student, SimpleNamespace(model=teacher), text(), Budget.parse(budget), work=SelectionWork(**quiet)
    )
    return make_selector(by, options).run(inputs)


def test_units():
    shapes = shapes_of(tiny("llama"))
    assert units_of(shapes, "layer")[1] == [(1, head) for head in range(6)]
    assert units_of(shapes, "head")[7] == [(1, 1)]
    assert [len(unit) for unit in units_of(shapes, 2)] == [12, 6]
    assert units_of(shapes, [[0, 2], [1]])[0] == units_of(shapes, "layer")[0] + units_of(shapes, "layer")[2]
    assert [kind_of(spec) for spec in ("layer", "head", 2, [[0], [1, 2]])] == ["layer", "head", "group", "group"]
    for spec in ("tower", 0, [[0, 1], [1, 2]], [[0, 1], []]):
        with pytest.raises(UserError, match=r"selector\.unit should"):
            units_of(shapes, spec)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_supernet_follows_a_plan_as_its_student_does(family):
    """Heads of a layer, whole layers and nothing at all; and the cache is the plan's."""
    supernet = supernet_of(family)
    tokens = text(rows=1)
    plans = [supernet.plan_with(heads) for heads in ([], [(0, 1), (2, 5)], [(1, head) for head in range(6)])]
    for plan in [*plans, *reversed(plans)]:
        built = Student.from_teacher(supernet.teacher, plan, mixers_from=supernet.student)
        with supernet.activate(plan) as student:
            assert torch.equal(student.final_hidden(tokens), built.final_hidden(tokens))
            cache = student.new_cache()
            student(tokens, past_key_values=cache, use_cache=True)
            assert cache.nbytes() == plan.cache_bytes(tokens.shape[1])
    assert supernet.student.plan == supernet.linear_plan


def test_first_difference():
    supernet = supernet_of()
    plan, second_plan = supernet.plan_with([(1, 0)]), supernet.plan_with([(1, 0), (2, 3)])
    assert first_difference(plan, second_plan) == 2 and first_difference(plan, plan) == 3
    assert without([(0, 0), (0, 1), (1, 0)], [(0, 1), (1, 0)]) == [(0, 0)]


@pytest.mark.parametrize("base", ["restore", "remove"])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_kl_is_that_of_whole_students(family, unit, base):
    """Reusing the blocks below changes nothing: the same as building each candidate and measuring it."""
    supernet = supernet_of(family)
    tokens, units = text(), units_of(supernet.linear_plan.shapes, unit)
    plans = candidates(supernet, units, base)
    kl_NP = kl_without_training(supernet, plans, tokens, 1, SelectionWork(**quiet))
    indices = [0, 1, len(plans) - 1]
    students = {
        str(index): Student.from_teacher(supernet.teacher, plans[index], mixers_from=supernet.student)
        for index in indices
    }
    expected = likelihood(students, supernet.teacher, tokens, [40])
    for index in indices:
        assert kl_NP[:, index].tolist() == pytest.approx(expected[str(index)]["kl_samples"][40], rel=1e-3, abs=1e-6)
    gains_NU = gains_of(kl_NP, base)
    sign = 1 if base == "restore" else -1
    torch.testing.assert_close(gains_NU[:, 0], sign * (kl_NP[:, 0] - kl_NP[:, 1]))
    if base == "remove":
        assert kl_NP[:, 0].abs().max() < 1e-6, "the base is the teacher"


@pytest.mark.parametrize("by", ["kl", "kl-removal", "alignment-loss", "gradient", "fisher"])
def test_the_layer_that_was_ruined_keeps_its_attention(by):
    teacher, student = ruined_layer()
    ranking = ranking_of(student, teacher, by)
    plan, kept = choose_plan(student, Budget.parse("1"), ranking)
    assert kept == [1] == plan.attention_layers
    assert ranking.report["order"][0] == 1
    assert ranking.report["low"][1] <= ranking.report["scores"][1] <= ranking.report["high"][1]


def test_candidates_are_trained_before_they_are_measured():
    """The tokens are the round's, a quarter of the units goes on to the next, and the rest keeps its place."""
    teacher, student = ruined_layer()
    trained = []

    def train(candidate, tokens, name):
        trained.append((candidate.plan.pattern(), tokens))

    work = SelectionWork(**quiet)
    inputs = SelectorInputs(
        student, SimpleNamespace(model=teacher), text(), Budget.parse("1"), "head", train=train, work=work
    )
    ranking = make_selector("kl", {"retrain_tokens": 1600, "rounds": 2}).run(inputs)
    assert round_tokens(1600, 2) == [400, 1600]
    assert [tokens for _, tokens in trained] == [400] * 19 + [1600] * 5  # with all-linear, in each round
    last_round = [number for row in ranking.report["last_round"] for number in row]
    assert last_round.count(1) == 4 and trained[19][0] == "HHH"
    assert work.expected_cost.training_tokens == work.actual_cost.training_tokens == 19 * 400 + 5 * 1600
    inputs.train = None
    with pytest.raises(UserError, match="has no stage on logits"):
        make_selector("kl", {"retrain_tokens": 10}).run(inputs)


def test_units_get_the_mixer_that_is_worth_its_bytes():
    """One layer is ruined in the first mixer and a window serves it; elsewhere a window sees less than the first."""
    teacher, student = ruined_layer(1)
    plan = Plan.by_layer(student.plan.shapes, [], "sliding_window", {"window": 16, "sinks": 0})  # of 40 tokens
    window = Student.from_teacher(teacher, plan)
    inputs = SelectorInputs(
        student,
        SimpleNamespace(model=teacher),
        text(),
        Budget.parse("0"),
        work=SelectionWork(**quiet),
        alternatives={"sliding_window": window},
    )
    ranking = make_selector("kl", {}).run(inputs)
    gains = ranking.alternatives["sliding_window"]
    assert ranking.worth[1] > gains[1] > 0.1 * ranking.worth[1] and gains[0] < 0 and gains[2] < 0
    built = Student.from_teacher(
        teacher, student.plan.with_layers("sliding_window", plan.mixers["sliding_window"], [1]), [student, window]
    )
    with inputs.supernet().activate(built.plan) as activated:
        assert torch.equal(activated.final_hidden(text()), built.final_hidden(text()))

    def chosen(budget):
        alternatives = {"sliding_window": window}
        return choose_plan(student, Budget.parse(budget), ranking, alternatives=alternatives)[0]

    assert [layer for layer in range(3) if "sliding_window" in chosen("0").layers[layer]] == [1]
    assert [*chosen("1").layers[1]] == ["attention"]
    min_bytes, max_bytes = student.plan.cache_bytes(4096), Plan.all_attention(plan.shapes).cache_bytes(4096)
    for share in (0.0, 0.3, 0.6, 1.0):
        limit = round(min_bytes + share * (max_bytes - min_bytes))
        assert chosen(f"{limit}B@4096").cache_bytes(4096) <= limit
    assert chosen(f"{max_bytes}B@4096").layers[1] == {"attention": [*range(6)]}
    with pytest.raises(UserError, match="impossible"):
        chosen("1KiB@4096")


def test_alignment_losses_of_heads_and_layers():
    """A layer is worth all of its distance, a head what is nearer with it."""
    supernet = supernet_of()
    tokens = text(rows=1)
    by_layer = alignment_losses(
        supernet, units_of(supernet.linear_plan.shapes, "layer"), tokens, SelectionWork(**quiet)
    )
    both = alignment_losses(supernet, units_of(supernet.linear_plan.shapes, 3), tokens, SelectionWork(**quiet))
    torch.testing.assert_close(by_layer.sum(1, keepdim=True), both)
    heads = units_of(supernet.linear_plan.shapes, "head")
    worth_NU = alignment_losses(supernet, heads, tokens, SelectionWork(**quiet))
    ids, sites = tokens, find_attention(supernet.teacher)
    student = Student.from_teacher(supernet.teacher, supernet.plan_with([(1, 4)]), mixers_from=supernet.student)
    distances = []

    @torch.no_grad()
    def keep(module, args, kwargs, output):
        outputs = [s.attention_modules()[1](*args, **kwargs)[0] for s in (supernet.student, student)]
        distances.extend((mixed - output[0]).square().mean(-1).sqrt().mean() for mixed in outputs)

    hook = supernet.teacher.get_submodule(sites[1].path).register_forward_hook(keep, with_kwargs=True)
    supernet.teacher(ids, use_cache=False)
    hook.remove()
    all_linear, with_head = distances
    assert worth_NU[0, heads.index([(1, 4)])] == pytest.approx(float(all_linear - with_head), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_gates_lead_from_the_student_to_the_teacher(family):
    teacher, student = linear_student(family)
    tokens = text(rows=1)
    shut, open_ = ({layer: torch.full((6,), share) for layer in range(3)} for share in (0.0, 1.0))
    plain = student.final_hidden(tokens)
    torch.testing.assert_close(student.final_hidden(tokens, forward_context=gated(shut)), plain)
    teacher_hidden = teacher.base_model(tokens).last_hidden_state
    torch.testing.assert_close(
        student.final_hidden(tokens, forward_context=gated(open_)), teacher_hidden, rtol=0, atol=1e-5
    )


def test_integrated_gradients_are_complete():
    """The scores of all heads sum to the KL of the all-linear student; groups are worth the sum of their heads."""
    supernet = supernet_of()
    tokens = text()
    heads = units_of(supernet.linear_plan.shapes, "head")
    scores = gating.gradient_scores(supernet, heads, tokens, SelectionWork(**quiet), points=24)
    whole_kl = kl_without_training(supernet, [supernet.linear_plan], tokens, 1, SelectionWork(**quiet))[:, 0]
    torch.testing.assert_close(scores.sum(1), whole_kl, rtol=0.02, atol=0)
    layers = gating.gradient_scores(
        supernet, units_of(supernet.linear_plan.shapes, "layer"), tokens, SelectionWork(**quiet), points=24
    )
    torch.testing.assert_close(layers, scores.unflatten(1, (3, 6)).sum(2), rtol=1e-4, atol=1e-7)


def test_fisher_is_the_curvature_of_the_kl():
    """Half the second derivative at the teacher: the KL of a gate that is shut a little, over its square."""
    supernet = supernet_of()
    tokens = text(rows=1, length=64)
    units = units_of(supernet.linear_plan.shapes, "layer")
    scores = gating.fisher_scores(supernet, units, tokens, SelectionWork(**quiet), draws=400)[0]
    little = 0.03
    for layer in range(3):
        gates = {index: torch.full((6,), 1.0 - little * (index == layer)) for index in range(3)}
        with torch.no_grad():
            curvature = float(gating._kl(supernet, tokens, gates)) / little**2
        assert scores[layer] == pytest.approx(curvature, rel=0.3)


def test_trained_gates_open_where_attention_is_needed():
    teacher, student = ruined_layer()
    supernet, units = Supernet(student, teacher), units_of(student.plan.shapes, "layer")

    def rows(step):
        return torch.randint(3, 97, (2, 32), generator=torch.Generator().manual_seed(step))

    odds = gating.trained_gates(supernet, units, rows, SelectionWork(**quiet), steps=40, share=1 / 3, seed=0)[0]
    assert int(odds.argmax()) == 1
    sampled = gating._sample(torch.tensor([8.0, -8.0]), torch.Generator().manual_seed(0))
    assert sampled.tolist() == [1.0, 0.0]


def worth_of(worths):
    """A task whose score is what the attention layers are worth, and on test documents a little less."""

    def score(model, tokenizer, part):
        layers = model.plan.attention_layers if isinstance(model, Student) else range(3)
        return sum(worths[layer] for layer in layers) - 0.01 * (part == "test")

    return TaskScore("worth", score)


def test_greedy_goes_to_the_floor():
    supernet = supernet_of()
    units = units_of(supernet.linear_plan.shapes, "layer")
    path = greedy_path(supernet, units, worth_of([0.1, -0.2, 1.0]), None, SelectionWork(**quiet), tolerance=0.05)
    assert path.base == pytest.approx(0.9) and path.floor == pytest.approx(0.855)
    assert [step.unit for step in path.steps] == [1, 0]
    assert [step.score for step in path.steps] == pytest.approx([1.1, 1.0])
    assert path.best == 1 and path.opt == 2
    assert path.remaining(3, path.best) == [0, 2] and path.remaining(3, path.opt) == [2]
    assert path.test == pytest.approx({"base": 0.89, "best": 1.09, "opt": 0.99})
    strict = greedy_path(supernet, units, worth_of([0.1, 0.2, 1.0]), None, SelectionWork(**quiet), tolerance=0.0)
    assert strict.steps == [] and strict.best == strict.opt == 0


def test_greedy_with_a_number_of_units_goes_on_below_the_floor():
    teacher, student = linear_student()
    task = worth_of([0.1, 0.2, 1.0]).score
    inputs = SelectorInputs(
        student,
        SimpleNamespace(model=teacher, tokenizer=None),
        text(),
        Budget.parse("1"),
        work=SelectionWork(**quiet),
    )
    ranking = make_selector("greedy", {"task": task}).run(inputs)
    assert choose_plan(student, Budget.parse("1"), ranking)[1] == [2]
    assert ranking.report["order"] == [2, 1, 0] and ranking.named == {"best": [0, 1, 2], "opt": [0, 1, 2]}
    assert choose_plan(student, Budget.parse("best"), ranking)[0].attention_layers == [0, 1, 2]


def test_what_is_no_task_is_refused():
    with pytest.raises(UserError):
        task_score("no-such-task")


def test_halo_is_recall_lost_over_the_rest_lost():
    recall, common = torch.tensor([90.0, 80.0, 60.0]), torch.tensor([50.0, 48.0, 49.0])
    assert halo_scores(recall, common).tolist() == pytest.approx([0.0, 5.0, 30.0])
    assert halo_scores(recall, torch.tensor([50.0, 50.0, 50.0])).tolist() == pytest.approx([0.0, 50.0, 50.0])


def test_finished_items_are_stored(tmp_path):
    measured = []

    def measure(index):
        measured.append(index)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return [index, 0.1 * index]

    work = SelectionWork(file=tmp_path / "selection.jsonl", **quiet)
    with pytest.raises(KeyboardInterrupt):
        work.map("a", 4, measure, item_cost=TokenCost(forward_tokens=10))
    with work.file.open("a") as file:
        file.write('{"key": "a", "piece": 2, "val')  # torn
    resumed_work = SelectionWork(file=work.file, **quiet)
    with pytest.raises(KeyboardInterrupt):
        measured[:] = ["x"] * 2
        resumed_work.map("a", 4, measure, item_cost=TokenCost(forward_tokens=10))
    assert measured[2:] == [2]
    values = SelectionWork(file=work.file, **quiet).map(
        "a", 4, lambda i: [i, 0.1 * i], item_cost=TokenCost(forward_tokens=10)
    )
    assert values.tolist() == [[index, 0.1 * index] for index in range(4)]
    stored = SelectionWork(file=work.file, **quiet).map(
        "a", 4, lambda i: pytest.fail("it is done"), item_cost=TokenCost()
    )
    assert torch.equal(stored, values)


def test_the_cost_is_printed():
    lines = []
    work = SelectionWork(lines.append, speed=lambda: 100.0)
    work.print_cost(SelectionCost("kl", TokenCost(forward_tokens=1000, training_tokens=500)))
    work.print_cost(SelectionCost("uniform"))
    assert lines == [
        "kl: 1,000 tokens forward and 500 tokens of training, about 30\xa0s",
        "uniform: nothing to measure",
    ]


def test_bootstrap():
    low, high = bootstrap(torch.randn(200, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert (low < 0.2).all() and (high > -0.2).all() and (0.2 < high - low).all() and (high - low < 0.4).all()
    assert bootstrap(torch.ones(1, 2))[0].isnan().all()


def test_uniform_is_even():
    assert uniform_layers(30, 15) == list(range(1, 30, 2))
    assert uniform_layers(28, 4) == [3, 10, 17, 24]
    for layers in (3, 28, 30):
        for count in range(layers + 1):
            chosen = uniform_layers(layers, count)
            assert len(set(chosen)) == count and all(0 <= layer < layers for layer in chosen)


def test_unknown_selectors_options_and_budgets_are_refused():
    with pytest.raises(UserError, match="did you mean 'uniform'"):
        check_selector(SelectorConfig(by="unifrom"))
    with pytest.raises(UserError, match="no option 'strid': did you mean 'stride'"):
        check_selector(SelectorConfig(by="kl", options={"strid": 3}))
    with pytest.raises(UserError, match="'kl', option 'stride': input should be a valid integer"):
        check_selector(SelectorConfig(by="kl", options={"stride": "often"}))
    with pytest.raises(UserError, match="'uniform' has no option 'stride': it has none"):
        check_selector(SelectorConfig(by="uniform", options={"stride": 3}))
    with pytest.raises(UserError, match="'fixed' needs the layers to keep"):
        check_selector(SelectorConfig(by="fixed"))
    with pytest.raises(UserError, match="only the selector greedy finds"):
        check_selector(SelectorConfig(by="kl", budget="opt"))
    for by in SELECTORS.keys() - {"fixed"}:
        check_selector(SelectorConfig(by=by))


@pytest.mark.parametrize(
    ("mixer", "selector", "message"),
    [
        ({"name": "gla", "alternatives": [{"name": "gla"}]}, {}, "should be other mixers than 'gla'"),
        ({"alternatives": [{"name": "gla"}]}, {"by": "uniform"}, "are chosen by the selector kl"),
        ({"alternatives": [{"name": "gla"}]}, {"unit": "head"}, "are chosen by the selector kl"),
        ({"alternatives": [{"name": "gla"}], "join": "parallel"}, {}, "are chosen by the selector kl"),
        ({"alternatives": [{"name": "gla"}]}, {"budget": "2x@4k"}, "knows one mixer"),
    ],
)
def test_alternatives_where_they_cannot_be_chosen(mixer, selector, message):
    with pytest.raises(UserError, match=message):
        check_alternatives(Recipe(name="tiny", mixer=mixer, selector=selector))
