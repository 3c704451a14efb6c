"""Teachers with sliding windows of their own: what budgets in units count, in every selector, baseline and dry run."""

import json

import pytest

from subquad.errors import UserError
from subquad.evaluate.retrieval import FLOORS
from subquad.jobs import convert, dry_run, select
from subquad.jobs.baselines import baseline_plans
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.plan import AttentionShape, Plan
from subquad.recipes.schema import Recipe, SelectorConfig
from subquad.report import saving_warning
from subquad.report.run_files import read_run
from subquad.select import kept_layers
from tests.helpers import RECIPE, STAGE, make_teacher, tiny

WINDOWS, WHOLE = [0, 2, 4], [1, 3, 5]
FULL = AttentionShape(heads=4, kv_heads=1, head_dim=256, hidden_size=640)
GEMMA_3 = [FULL if layer % 6 == 5 else FULL.model_copy(update={"window": 512}) for layer in range(18)]
GEMMA_3_WINDOWS = [layer for layer in range(18) if layer % 6 != 5]


@pytest.fixture(scope="module")
def gemma2(tmp_path_factory):
    """Six layers, of which every other one has a window."""
    folder = make_teacher(tmp_path_factory.mktemp("gemma2"))
    tiny("gemma2", num_hidden_layers=6).save_pretrained(folder)
    return folder


def recipe(budget="2", **settings):
    return Recipe(**RECIPE | {"selector": RECIPE["selector"] | {"budget": budget} | settings})


@pytest.mark.parametrize(
    ("budget", "window_layers", "kept"),
    [
        ("50%", None, GEMMA_3_WINDOWS),
        ("2", None, GEMMA_3_WINDOWS),
        ("opt", None, GEMMA_3_WINDOWS),
        ("64MiB@32k", None, []),
        ("1.5x@32k", None, []),
        ("50%", "replace", []),
        ("64MiB@32k", "keep", GEMMA_3_WINDOWS),
    ],
)
def test_layers_that_are_not_counted(budget, window_layers, kept):
    settings = SelectorConfig(budget=budget, window_layers=window_layers)
    assert kept_layers(settings, GEMMA_3) == kept
    assert kept_layers(settings, [FULL] * 4) == []
    assert kept_layers(settings, GEMMA_3[:5]) == [], "all have windows: there is nothing else to convert"
    given = Plan.by_layer(GEMMA_3, [1, 5], "gla")
    assert kept_layers(settings, GEMMA_3, given) == ([1] if kept else [])


def test_a_plan_that_saves_little_is_said():
    """Half of Gemma 3's layers saved 1% of its cache at 128k; half of those that attend to everything save a third."""
    before = Plan.by_layer(GEMMA_3, [1, 3, 5, 7, 9, 11, 13, 15, 17], "sliding_window")
    now = Plan.by_layer(GEMMA_3, [*GEMMA_3_WINDOWS, 5, 11], "sliding_window")
    size, shares = 131072, []
    for plan in (before, now):
        shares.append(plan.cache_bytes(size) / Plan.all_attention(GEMMA_3).cache_bytes(size))
    assert shares == pytest.approx([0.990, 0.673], abs=5e-4)
    assert saving_warning(before, "float32").endswith("at 128k tokens of context its cache is 99.0% of the teacher's")
    assert saving_warning(now, "float32") == ""
    assert "saves no cache at any context up to 128k" in saving_warning(Plan.all_attention(GEMMA_3), "float32")
    large = Plan.by_layer([FULL] * 4, [], "gla", {"state_dim": 2048})
    assert saving_warning(large, "float32").endswith("saves no cache at 2k tokens of context and below")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "unit", "budget", "options", "count"),
    [
        ("kl", None, "50%", {}, 2),
        ("alignment-loss", "head", "50%", {}, 9),
        ("retrieval-heads", None, "4", {"tasks": ["copy"], "context": 32, "rows": 3}, 4),
        ("gates", None, "2", {"tokens": 64, "sequence_length": 32}, 2),
        ("greedy", None, "1", {"task": "copy", "context": 32, "limit": 2}, 1),
        ("fixed", None, "2", {"layers": [0, 5, 1]}, 2),
    ],
)
def test_every_selector_spends_units_on_what_attends_to_everything(
    by, unit, budget, options, count, gemma2, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(FLOORS, "logprob", -99.0)  # a random teacher answers nothing
    settings = recipe(budget, by=by, unit=unit, options=options)
    plan = select.select(gemma2, settings, tmp_path / "plan.yaml", data=text)
    said = " ".join(capsys.readouterr().out.split())
    assert "3 of 6 layers have the teacher's own sliding window" in said
    assert f"and the budget {budget} is of the other 3" in said
    assert {*WINDOWS} <= {*plan.attention_layers}
    of_whole = [(layer, head) for layer, head in plan.attention_heads if layer in WHOLE]
    heads = unit == "head" or by == "retrieval-heads"
    assert len(of_whole) == (count if heads else 6 * count)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert len(scores["chosen"]) == count and scores["kept_layers"] == WINDOWS
    if by == "fixed":
        assert plan.attention_layers == [0, 1, 2, 4, 5]
    if by not in ("uniform", "fixed"):
        again = select.select(gemma2, settings, tmp_path / "2.yaml", data=text, scores=tmp_path / "scores.json")
        assert again == plan


def test_windows_are_replaced_where_that_is_asked_for(gemma2, text, tmp_path):
    """And the scores of such a selection serve a budget that does not count them."""
    asked = recipe("4", window_layers="replace")
    plan = select.select(gemma2, asked, tmp_path / "plan.yaml", data=text)
    assert len(plan.attention_layers) == 4
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert len(scores["scores"]) == 6 and scores["kept_layers"] == []
    half = select.select(gemma2, recipe("1"), tmp_path / "2.yaml", data=text, scores=tmp_path / "scores.json")
    best = max(WHOLE, key=lambda layer: scores["scores"][layer])
    assert half.attention_layers == sorted([*WINDOWS, best])


@pytest.mark.slow
def test_bytes_are_spent_on_all_layers(gemma2, text, tmp_path):
    settings = recipe("20KiB@4k", by="fixed", options={"layers": [0, 1, 2, 3, 4, 5]})
    plan = select.select(gemma2, settings, tmp_path / "plan.yaml", data=text)
    assert plan.attention_layers == [0] and plan.cache_bytes(4096) <= 20 * 1024


def test_a_teacher_of_windows_alone_is_converted_as_before(text, tmp_path, capsys):
    folder = make_teacher(tmp_path)
    tiny("mistral").save_pretrained(folder)
    plan = select.select(folder, recipe("1", by="uniform"), tmp_path / "plan.yaml", data=text)
    assert plan.attention_layers == [1]
    said = " ".join(capsys.readouterr().out.split())
    assert "every layer has the teacher's own sliding window, so the budget 1 is of all of them" in said


def test_the_stand_in_of_a_dry_run_keeps_windows():
    teacher = tiny("gemma2", num_hidden_layers=6)
    linear = Student.from_teacher(teacher, Plan.by_layer(shapes_of(teacher), WINDOWS, "hedgehog", {"window": 8}))
    assert dry_run._stand_in(linear, recipe("1")).attention_layers == [0, 2, 3, 4]


@pytest.mark.slow
def test_a_conversion_with_windows(gemma2, text, tmp_path):
    """Its training, baselines and report."""
    evaluate = {"contexts": [16], "rows": 2, "retrieval": {"tasks": []}, "prompts": []}
    stages = [{"name": "align", "objective": "mixer_output", "scope": "all-linear", "tokens": 64, **STAGE}]
    settings = recipe("1", by="gradient", options={"points": 1})
    settings = Recipe(**settings.model_dump() | {"stages": stages, "evaluate": evaluate})
    student = convert.convert(gemma2, settings, tmp_path / "run", data=text)
    assert len(student.plan.attention_layers) == 4 and {*WINDOWS} <= {*student.plan.attention_layers}
    uniform = baseline_plans(settings, Plan.by_layer(student.plan.shapes, [0, 1, 2, 4], "hedgehog"))["uniform"].plan
    assert uniform.attention_layers == [0, 2, 3, 4]
    run = read_run(tmp_path / "run")
    assert run.scores.labels == ["1", "3", "5"] and run.unit_name(1) == "layer 3"
    assert (tmp_path / "run" / "report.html").is_file()


def test_more_units_than_attend_to_everything_are_refused(gemma2, text, tmp_path):
    with pytest.raises(UserError, match="4 attention layers is more than the teacher's 3"):
        dry_run.dry_run(gemma2, recipe("4"), tmp_path / "dry", data=text)
