"""The scripts behind docs/claims: what they compute, and that they go on where they were stopped."""

import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks.claims import cab, cab_vision, matrices, mohawk, retrieval_aware, selection
from benchmarks.claims.bench import SMALL_TEACHER
from benchmarks.claims.rankings import overlap, spearman
from benchmarks.claims.runs import Mean, Store
from benchmarks.claims.tuning import Tuned, lowest
from subquad.jobs.train_vit import train_vit
from tests.helpers import write_pictures


def test_finished_runs_are_not_run_again(tmp_path):
    store, asked = Store(tmp_path, Console(quiet=True)), []

    def job(settings):
        asked.append(settings["seed"])
        return {"kl": settings["seed"] / 2}

    for seed in (1, 2, 1, 2):
        result = store.run({"seed": seed, "way": "a"}, job)
        assert result["kl"] == seed / 2 and result["settings"] == {"seed": seed, "way": "a"}
    assert asked == [1, 2]
    assert store.run({"timed": True}, lambda settings: {"seconds": 7.0})["seconds"] == 7.0  # and not of the whole run
    another = Store(tmp_path / "another", Console(quiet=True))
    another.adopt({"settings": {"seeds": [1]}, "cells": [{"runs": [store.run({"seed": 1, "way": "a"}, job)]}]})
    assert another.run({"seed": 1, "way": "a"}, job)["kl"] == 0.5 and asked == [1, 2], "it is known from the report"
    assert Mean.of([1.0, 3.0]).text(1) == "2.0 ± 1.4" and Mean.of([1.0]).text(1, signed=True) == "+1.0"


def attention(count=3, T=24, N=4):
    torch.manual_seed(0)
    scores = torch.randn(count, T, N) @ torch.randn(count, N, T)
    return scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def test_toeplitz_is_the_nearest():
    a_XTT = attention()
    nearest = matrices.toeplitz(a_XTT)
    torch.testing.assert_close(matrices.toeplitz(nearest), nearest)
    assert torch.equal(nearest, nearest.tril()) and torch.equal(nearest[:, 1:, 1:], nearest[:, :-1, :-1])
    residual = a_XTT - nearest  # is orthogonal to all Toeplitz matrices: every diagonal sums to zero
    for lag in range(24):
        assert residual.diagonal(-lag, 1, 2).sum(-1).abs().max() < 1e-5


def test_families_hold_what_is_of_them():
    torch.manual_seed(1)
    T, N = 24, 3
    gate = torch.rand(2, T).sub(0.5).mul(0.4).exp().clamp_max(1.0).log().cumsum(1)
    low = (torch.randn(2, T, N) @ torch.randn(2, N, T)).tril()
    decayed = low * (gate[:, :, None] - gate[:, None]).clamp_max(0).exp()
    assert max(matrices.error(matrices.fitted(low, N, decay=False), low)) < 0.05 * float(low.norm())
    with_decay, without = (matrices.error(matrices.fitted(decayed, N, decay=d), decayed) for d in (True, False))
    assert max(with_decay) < 0.1 * float(decayed.norm()) and sum(with_decay) < sum(without)
    a_XTT = attention()
    errors = [sum(matrices.error(matrices.fitted(a_XTT, columns, decay=True), a_XTT)) for columns in (1, 4, 12)]
    assert errors == sorted(errors, reverse=True)


@pytest.fixture
def tiny_runs(monkeypatch):
    changes = {"budgets": (2048,), "batch": 2, "rows": 2, "probe_rows": 2, "matrix_tokens": 1024, "matrix_count": 4}
    monkeypatch.setitem(mohawk.__dict__, "QUICK", {**mohawk.QUICK, **changes, "matrix_length": 64, "state_dims": (4,)})
    monkeypatch.setattr(matrices, "STEPS", 5)
    monkeypatch.setattr(mohawk, "TRAINED", {"gla": {}, "discrete_mamba2": {"conv": 1}})


def test_rates_are_walked_to():
    ladder, asked = (1.0, 2.0, 3.0, 4.0, 5.0), []

    def trial(best):
        return lambda rate: asked.append(rate) or abs(rate - best)

    assert [lowest(ladder, 3.0, trial(best)) for best in (1.0, 2.2, 3.0, 4.9)] == [1.0, 2.0, 3.0, 5.0]
    assert asked[:4] == [3.0, 4.0, 2.0, 1.0], "from the middle, the other way when the first is worse"
    assert lowest((7.0,), 7.0, trial(0.0)) == 7.0


@pytest.mark.parametrize("aligns", [True, False])
def test_tuning_finds_the_deeper_of_two_valleys(aligns):
    """Both rates low is best; with either of them high the other's lowest place is high, too."""
    tuned, asked = Tuned.__new__(Tuned), []
    tuned.setup = SimpleNamespace(
        layer_rates=(1e-4, 1e-3, 1e-2), logit_rates=(1e-4, 1e-3, 1e-2), budgets=(10, 20), tuning_seed=9
    )
    tuned.store = SimpleNamespace(run=lambda settings, job: job(settings))
    tuned.aligns = lambda settings: aligns

    def distilled(settings):
        layers, logits = settings["rates"]
        asked.append((settings["tokens"], layers, logits))
        kept = max(layers, logits) < 2e-4 if settings["tokens"] == 10 else max(layers, logits) < 2e-3 and logits > 2e-4
        return {"kl": 1.0 if kept else 3.0 - 10 * max(layers, logits)}

    tuned.distilled = distilled
    assert tuned.best_rates({"tokens": 10}) == (1e-4, 1e-4)
    assert tuned.best_rates({"tokens": 20}) == (1e-4, 1e-3), "the larger budget walks on from there"
    assert aligns or {layers for _, layers, _ in asked} == {1e-4}


@pytest.mark.slow
def test_mohawk_from_end_to_end(tmp_path, tiny_runs, capsys):
    arguments = ["--quick", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "a.json")]
    mohawk.main([*arguments, "--plot", str(tmp_path / "a.png")])
    report = json.loads((tmp_path / "a.json").read_text())
    assert len(report["stages"]) == 2 * 3 and len(report["mlp"]) == 2 and len(report["matrices"]["trained"]) == 2
    by_way = {(c["settings"]["start"], c["settings"]["way"]): c["runs"][0] for c in report["stages"]}
    stages = by_way["teacher", "matrix + hidden + logits"]["stages"]
    assert [stage["name"] for stage in stages] == ["matrix", "hidden", "logits"]
    assert {"tokens_per_second", "share_of_bare_forward", "peak_memory_bytes"} <= stages[0].keys()
    assert by_way["teacher", "logits"]["kl"] != by_way["fresh", "logits"]["kl"]
    assert all(run["after"] < run["before"] for run in report["matrices"]["trained"])
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert report["command"].endswith("a.png") and report["settings"]["teacher"] == SMALL_TEACHER
    assert all(len(source["sha256"]) == 64 for source in report["sources"]) and len(report["sources"]) >= 2
    shown = capsys.readouterr().out
    assert "matrix + hidden + logits" in shown and "toeplitz" in shown
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    mohawk.main([*arguments, "--known", str(tmp_path / "a.json")])
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}


def test_known_numbers_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no numbers")
    for file, why in (("nowhere.json", "No such file"), ("a.png", "Expecting value")):
        with pytest.raises(SystemExit) as stopped:
            mohawk.main(["--known", str(tmp_path / file)])
        assert stopped.value.code == 2
        assert f"{file} cannot be read" in (said := capsys.readouterr().err) and why in said


@pytest.mark.slow
def test_retrieval_aware_from_end_to_end(tmp_path, monkeypatch, capsys):
    changes = {
        "probe_rows": 8,
        "score_rows": 8,
        "context": 128,
        "hidden_tokens": 1024,
        "logits_tokens": 1024,
        "batch": 2,
    }
    changes |= {"serving": (256,), "serving_steps": 3, "joined": (2,), "states": (8,), "counts": (0, 2), "rows": 2}
    monkeypatch.setitem(retrieval_aware.__dict__, "QUICK", {**retrieval_aware.QUICK, **changes})
    arguments = ["--quick", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "a.json")]
    retrieval_aware.main([*arguments, "--plot", str(tmp_path / "a.png")])
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["measure"] == "accuracy" and report["tasks"][:2] == ["copy", "dictionary"]
    (ablation,) = report["ablation"]
    assert ablation["scored"][0]["mean"] < min(found["mean"] for found in ablation["random"])  # a real small teacher
    families = [(cell["settings"]["family"], cell["settings"]["count"]) for cell in report["heads"]]
    assert families == [("scored", 0), ("scored", 2), ("random", 2), ("uniform layers", 1), ("best layers", 1)]
    kept = report["heads"][1]["runs"][0]
    assert len(kept["settings"]["heads"]) == 2 and kept["coverage"].keys() == {*report["tasks"], "mean"}
    assert {(cell["settings"]["join"], cell["settings"]["join_start"]) for cell in report["join"]} == {
        ("split", "identity"),
        ("parallel", "identity"),
        ("parallel", "random"),
    }
    by_name = {row["plan"]: row for row in report["serving"]}
    assert by_name["heads"]["cache_bytes"] <= by_name["layers"]["cache_bytes"]
    assert (tmp_path / "a.png").stat().st_size > 10_000
    assert "retrieval coverage" in capsys.readouterr().out


@pytest.mark.slow
def test_selection_from_end_to_end(tmp_path, monkeypatch, capsys):
    changes = {"align_tokens": 1024, "retrain_tokens": 256, "logits_tokens": 512, "batch": 2, "sequence_length": 128}
    changes |= {"unit": "layer", "context": 128, "probe_rows": 4, "score_rows": 1, "greedy_rows": 2, "rows": 2}
    monkeypatch.setitem(selection.__dict__, "QUICK", {**selection.QUICK, **changes, "tasks": ("copy",)})
    arguments = ["--quick", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "a.json")]
    selection.main([*arguments, "--plot", str(tmp_path / "a.png")])
    report = json.loads((tmp_path / "a.json").read_text())
    cells = {cell["name"]: cell for cell in report["estimators"]}
    assert [*cells][0] == selection.FULL and {"kl", "fisher", "gates", "halo", "uniform", "random"} < cells.keys()
    assert cells[selection.FULL]["selections"][0]["spent"]["training_tokens"] == 5 * 256  # with all-linear
    assert len(cells["kl"]["spearman"]) == 1 and -1 <= cells["kl"]["spearman"][0] <= 1
    assert [cell["name"] for cell in report["budgets"]] == [*selection.Setup().rivals]
    (path,) = report["greedy"]
    assert path["counts"] == [1] and path["scores"].keys() >= {"greedy", "random"}
    assert (tmp_path / "a.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "rank correlation" in shown and "less full's" in shown


def test_rankings_are_set_against_the_full_procedures_and_their_own_of_other_seeds():
    claims = selection.Selection.__new__(selection.Selection)
    claims.setup = selection.Setup(seeds=(0, 1))
    claims.units = [[(0, head)] for head in range(8)]
    claims.chosen = lambda by, options, seed, count: [0, 1]
    turned = {0: 1.5, 1: -0.5}  # the seeds rank the units the other way round
    claims.selected = lambda by, options, seed: {"worth": [turned[seed] * unit for unit in range(8)]}
    claims.run = lambda kept, seed: {"kl": 1.0}
    cells = {cell["name"]: cell for cell in claims.estimators()}
    assert cells[selection.FULL]["spearman"] == [] and cells["uniform"]["repeats"] == []
    assert cells["kl"]["spearman"] == [1.0, -1.0] and cells["kl"]["overlap"] == [1.0, 0.0]
    assert all(cells[name]["repeats"] == [-1.0, -1.0] for name in (selection.FULL, "kl"))
    one_seed = {name: {"selections": cell["selections"][:1]} for name, cell in cells.items()}
    selection.compare(one_seed, 2)
    assert one_seed["kl"]["spearman"] == [1.0] and one_seed["kl"]["repeats"] == []


def test_rank_correlation():
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.9486833)
    assert overlap([5, 4, 1, 0], [5, 0, 4, 1], 2) == 0.5


@pytest.mark.slow
def test_cab_from_end_to_end(tmp_path, monkeypatch, capsys):
    changes = {"layers": (4, 2), "budgets": (2048,), "batch": 2, "rows": 2, "sequence_length": 128, "lengths": (32, 64)}
    monkeypatch.setattr(cab, "QUICK", {**cab.QUICK, **changes})
    arguments = ["--quick", "--json", str(tmp_path / "a.json"), "--work", str(tmp_path / "runs")]
    cab.main([*arguments, "--plot", str(tmp_path / "a.png")])
    report = json.loads((tmp_path / "a.json").read_text())
    assert {(cell["settings"]["layers"], cell["settings"]["way"]) for cell in report["stages"]} == {
        *((layers, way) for layers in (4, 2) for way in ("labels", "distillation", "bridge")),
        (4, "matrix + hidden"),
    }
    assert len(report["sides"]) == 6 and len(report["cost"]) == 4 and (tmp_path / "a.png").stat().st_size > 10_000
    reused, fresh = (
        next(c for c in report["stages"] if (c["settings"]["way"], c["settings"]["start"]) == ("distillation", start))
        for start in ("teacher", "fresh")
    )
    assert reused["runs"][0]["perplexity"] < fresh["runs"][0]["perplexity"]
    assert all(row["activation_bytes"] > 0 and row["seconds"] > 0 for row in report["cost"])
    printed = capsys.readouterr().out
    assert "the teacher's perplexity is" in printed and "a step of 64 tokens" in printed
    cab.main(arguments)
    assert " s  stages" not in capsys.readouterr().out, "nothing is run twice"


# CAB on images -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_cab_on_images(monkeypatch, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_pictures(folder)
    teacher = train_vit(str(folder), tmp_path / "vit", epochs=30, size=32, patch=8)
    monkeypatch.setattr(cab_vision, "QUICK", {**cab_vision.QUICK, "images": 16, "batch": 4, "test_images": 20})
    arguments = ["--quick", "--teacher", str(tmp_path / "vit"), "--data", str(folder), "--work", str(tmp_path / "runs")]
    arguments += ["--json", str(tmp_path / "a.json")]
    cab_vision.main([*arguments, "--plot", str(tmp_path / "a.png")])
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["teacher_accuracy"] == teacher["accuracy"] and report["train_images"] == 39
    assert len(report["stages"]) == 6 and len(report["sides"]) == 4 and (tmp_path / "a.png").stat().st_size > 5000
    names = [[stage["name"] for stage in cell["runs"][0]["stages"]] for cell in report["stages"]]
    assert names[0] == ["labels"] and names[4] == ["matrix", "hidden", "soft"] and names[5] == ["bridged", "soft"]
    shared = next(cell for cell in report["stages"] if cell["settings"]["way"] == "bridge")
    assert shared == report["sides"][0] and all("kl" in cell["runs"][0] for cell in report["stages"])
    assert "mean of 1 seeds" in capsys.readouterr().out
