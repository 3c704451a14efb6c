"""What is said to differ between two runs is what was changed in one of them, and nothing else."""

import io
import json

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from subquad.cli.app import app
from subquad.errors import UserError
from subquad.plan import AttentionShape, Plan
from subquad.report.compare import Comparison, Row, compare_runs, differences, print_comparison
from tests.report.made_up import make_plan, make_run

RECIPE = {
    "name": "quick",
    "seed": 0,
    "dtype": "float32",
    "mixer": {"name": "hedgehog", "options": {"window": 64}},
    "stages": [{"name": "align", "tokens": 100, "lr": 0.1}, {"name": "logits", "tokens": 200}],
}


@pytest.fixture
def two(tmp_path):
    """Two runs that are the same, with three rows of KL at each context."""
    folders = [make_run(tmp_path / name) for name in "ab"]
    for folder in folders:
        write(folder, "recipe.yaml", yaml.safe_dump(RECIPE))
        change(folder, lambda metrics: metrics["student"].update(kl_samples={"1024": [0.02, 0.03, 0.07]}))
    return folders


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")


def change(folder, how):
    """Changes metrics.json in place."""
    metrics = json.loads((folder / "metrics.json").read_text())
    how(metrics)
    write(folder, "metrics.json", json.dumps(metrics))


def said(found: Comparison) -> str:
    out = io.StringIO()
    print_comparison(found, Console(file=out, width=250))
    return out.getvalue()


def differing(rows: list[Row] | None) -> dict[str, tuple[float, float]]:
    return {row.name: (row.a, row.b) for row in rows or [] if not row.same}


def test_the_same_says_so_in_one_line(two):
    found = compare_runs(*two)
    assert found.same
    assert said(found) == f"A  {two[0]}\nB  {two[1]}\nThe two runs are the same.\n"


def test_recipes_differ_by_the_keys_that_set_takes(two):
    changed = json.loads(json.dumps(RECIPE))
    changed["stages"][1]["tokens"] = 300
    changed["mixer"] = {"name": "hedgehog", "options": {"sinks": 2}}
    write(two[1], "recipe.yaml", yaml.safe_dump(changed))
    found = compare_runs(*two)
    wanted = {"stages.logits.tokens": (200, 300), "mixer.options.window": (64, None), "mixer.options.sinks": (None, 2)}
    assert found.recipe == wanted and not found.same
    lines = [line.split() for line in said(found).splitlines()]
    assert ["stages.logits.tokens", "200", "300"] in lines and ["mixer.options.window", "64", "–"] in lines
    assert "Plan: the same" in said(found) and "Results: the same" in said(found)


def test_stages_go_by_name_and_their_order_counts():
    stages = [{"name": "x", "lr": 1}, {"name": "y", "lr": 2}]
    assert dict(differences({"stages": stages}, {"stages": stages[::-1]})) == {
        "order of stages": (["x", "y"], ["y", "x"])
    }
    assert dict(differences({"stages": stages}, {"stages": stages[1:]})) == {"stages.x": (stages[0], None)}
    assert dict(differences({"tasks": ["x"]}, {"tasks": ["y"]})) == {"tasks": (["x"], ["y"])}


def test_plans_differ_by_layers_heads_and_bytes(two):
    other = make_plan(mixed=True)
    other.layers[1], other.mixers["hedgehog"] = other.layers[2], {"window": 32, "sinks": 4}
    other.save(two[1] / "plan.yaml")
    found, plan = compare_runs(*two), make_plan()
    mixed = "attention 0, 3; hedgehog 1-2, 5-8; sliding_window 4"
    assert found.layers == [1, 2]
    assert found.heads == 10  # layer 1 attended: 7 heads differ; layer 2 did not: 3
    assert found.plan["layer 1"] == ("attention", mixed) and found.plan["layer 2"] == ("hedgehog", mixed)
    assert found.plan["mixers.hedgehog.window"] == (64, 32)
    assert found.plan["heads with attention"] == (135, 130) and found.plan["heads with sliding_window"] == (0, 2)
    assert [(row.a, row.b) for row in found.cache] == [
        (plan.cache_bytes(c), other.cache_bytes(c)) for c in (2048, 8192, 32768, 131072)
    ]
    assert "Plan: 2 layers and 10 heads differ" in said(found)


def test_options_that_are_left_out_are_no_difference(two):
    text = (two[1] / "plan.yaml").read_text()
    assert "sinks: 4" in text  # which is the default
    write(two[1], "plan.yaml", text.replace(", sinks: 4", ""))
    assert compare_runs(*two).same


def test_plans_of_other_shapes_are_not_laid_beside_each_other(two):
    shape = AttentionShape(heads=4, kv_heads=2, head_dim=8, hidden_size=32)
    Plan.by_layer([shape] * 3, [0], "hedgehog", {"window": 64, "sinks": 4}).save(two[1] / "plan.yaml")
    found = compare_runs(*two)
    assert found.plan["shape"] == ("30 layers, 270 heads", "3 layers, 12 heads") and found.layers == []


@pytest.mark.parametrize(
    "samples, verdict",
    [
        ([0.01, 0.02, 0.06], "B is nearer by 0.0100 ± 0.0000 nats"),
        ([0.03, 0.04, 0.08], "A is nearer by 0.0100 ± 0.0000 nats"),
        ([0.02, 0.03, 0.01], "B is nearer by 0.0200 ± 0.0200 nats, which may be chance"),
        ([0.02, 0.03], "not paired: other text or teacher"),
        ([], "not paired: no kl_samples"),
    ],
)
def test_kl_is_paired_over_the_rows(samples, verdict, two):
    """The spread of the rows, 0.015, is far more than what they differ by."""

    def better(metrics):
        metrics["student"]["kl_samples"]["1024"] = samples
        metrics["student"]["kl"]["1024"] = 0.01

    change(two[1], better)
    found = compare_runs(*two)
    row = next(row for row in found.results if row.name == "KL at 1024")
    assert (row.a, row.b) == (0.0432, 0.01) and row.a_stderr == pytest.approx(0.04 * 0.0432)
    assert row.verdict == verdict and f"KL at 1024: {verdict}\n" in said(found)


def test_rows_of_another_text_are_not_paired(two):
    """The teacher tells: its perplexity on the same text would be the same."""
    change(two[1], lambda metrics: metrics["teacher"]["perplexity"].update({"1024": 30.0}))
    found = compare_runs(*two)
    assert {row.verdict for row in found.results if row.name == "KL at 1024"} == {"not paired: other text or teacher"}


def test_numbers_that_differ_are_set_side_by_side(two):
    def slower(metrics):
        metrics["student"]["retrieval"]["copy"]["256"] = {"accuracy": 0.5, "logprob": -0.25}
        metrics["student"]["top1"]["256"] = 0.75
        metrics["student"]["tasks"]["arc_easy"]["acc"]["value"] = 0.25
        metrics["stages"][2]["tokens_per_second"] *= 2
        metrics["stages"][2]["final_loss"] = None
        metrics["seconds"]["total"] = 1154.0
        metrics["commit"], metrics["machine"]["cores"] = "fedcba9", 4

    change(two[1], slower)
    found, mine = compare_runs(*two), json.loads((two[0] / "metrics.json").read_text())
    student = mine["student"]
    assert differing(found.results) == {
        "top-1 at 256": (student["top1"]["256"], 0.75),
        "copy at 256": (student["retrieval"]["copy"]["256"]["accuracy"], 0.5),
        "copy at 256, log-prob.": (student["retrieval"]["copy"]["256"]["logprob"], -0.25),
        "arc_easy acc": (student["tasks"]["arc_easy"]["acc"]["value"], 0.25),
    }
    assert differing(found.stages).keys() == {"logits: tokens/s", "logits: final loss"}
    assert differing(found.time) == {"total": (577.0, 1154.0)}
    assert found.machine == {"commit": ("0123abc", "fedcba9"), "machine.cores": (2, 4)}
    text = said(found)
    assert "× 2.00" in text and "fedcba9" in text and "−17.2" in text  # points of top-1


def test_an_unfinished_run_is_compared_as_far_as_it_got(two, tmp_path):
    (two[1] / "metrics.json").unlink()
    write(two[1], "recipe.yaml", yaml.safe_dump(RECIPE | {"seed": 5}))
    found = compare_runs(*two, json_path=tmp_path / "found.json")
    assert found.recipe == {"seed": (0, 5)} and found.plan == {} and found.results is None is found.stages
    assert len(found.missing) == 1 and "b has no metrics.json" in found.missing[0]
    assert "its log ends in stage 'logits' after 20,480 tokens at a loss of 0.0" in said(found)
    assert "Results" not in said(found)
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["results"] is None and written["recipe"] == {"seed": [0, 5]} and written["same"] is False


def test_the_command_writes_json(two, tmp_path):
    change(two[1], lambda metrics: metrics["student"]["perplexity"].update({"256": None}))
    file = tmp_path / "found.json"
    result = CliRunner().invoke(app, ["compare", *map(str, two), "--json", str(file)])
    assert result.exit_code == 0 and "perplexity at 256" in result.output
    written = json.loads(file.read_text(), parse_constant=pytest.fail)  # no NaN
    row = next(row for row in written["results"] if row["name"] == "perplexity at 256")
    assert row["b"] is None and row["a"] > 0


def test_a_folder_without_a_run_is_refused(two, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no run to report in '.*empty'"):
        compare_runs(two[0], tmp_path / "empty")
