"""`subquad bench`: its arithmetic, its order, what it measures and what it extrapolates, in miniature."""

import itertools
import json
import math
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from subquad import Plan, Student, UserError
from subquad.bench import measure, models, roofline
from subquad.bench.extrapolate import (
    Forecast,
    Overtaking,
    Point,
    Spread,
    expected,
    fit,
    forecast,
    forecast_beside,
    overtaking,
    spread,
)
from subquad.bench.models import BenchModel, within_positions
from subquad.bench.roofline import Costs, PassCost, Roof, mixing_flops
from subquad.cli.app import app
from subquad.cli.bench import numbers
from subquad.evaluate import held_cache_bytes
from subquad.model.cache import CACHE
from subquad.model.interface import shapes_of
from subquad.model.random_cache import random_cache
from subquad.report import draw_bench, print_bench
from subquad.report.bench_tables import findings
from subquad.results.bench import Bench
from subquad.results.record import check_written
from subquad.utils import memory, timing
from subquad.utils.files import make_room, write_json
from tests.helpers import make_teacher, tiny

CONTEXTS = [8, 16, 32, 64]


def subject_of(model, plan=None, name="model"):
    return BenchModel(name, name, model, plan or Plan.all_attention(shapes_of(model)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher's folder and that of a student with one layer of attention left, which names it in its recipe."""
    teacher, student = tmp_path_factory.mktemp("teacher"), tmp_path_factory.mktemp("student")
    make_teacher(teacher)
    make_teacher(student)  # for the tokenizer
    model = tiny("llama")
    Student.from_teacher(model, Plan.by_layer(shapes_of(model), [1], "gla")).save_pretrained(student)
    (student / "recipe.yaml").write_text(f"{{extends: quick, teacher: {teacher}}}")
    return str(teacher), str(student)


def make_small(monkeypatch):
    """Few rounds, and a roofline that needs no copy of 256 MiB."""
    monkeypatch.setattr(measure, "ROUNDS", (2, 2))
    monkeypatch.setattr(measure, "measure_roof", lambda *_: Roof(1e12, 1e12))


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def report(folders):
    """Of both models, where nothing longer than 32 tokens is expected to fit into the time."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_small(monkeypatch)
        monkeypatch.setattr(measure, "expected", lambda costs, context: math.inf if context > 32 else 0.0)
        return measure.bench(
            folders[1], contexts=CONTEXTS, batches=[2, 1, 2], seconds=60, command="subquad bench it", seed=3
        )


def rows_of(report, **wanted):
    return [row for row in report["cells"] if all(row[key] == value for key, value in wanted.items())]


def test_a_report_has_every_cell(report):
    cells = [(row["measure"], row["model"], row["context"], row["batch"]) for row in report["cells"]]
    assert sorted(cells) == sorted(
        (measure, model, context, batch)
        for measure in ("decode", "prefill", "first_token", "generate")
        for model in ("student", "teacher")
        for context in CONTEXTS
        for batch in (1, 2)
    )
    assert {row["context"]: row["measured"] for row in report["cells"]} == {8: True, 16: True, 32: True, 64: False}
    for row in report["cells"]:
        assert 0 < row["low"] <= row["seconds"] <= row["high"]
        assert row["roofline"]["share"] == pytest.approx(row["roofline"]["seconds"] / row["seconds"])
        assert row["peak_bytes"] > row["cache_bytes"] > 0
        if row["measure"] != "first_token":
            tokens = row["batch"] * (row["context"] if row["measure"] == "prefill" else 1)
            assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])


def test_a_report_says_where_and_how_it_was_made(report):
    assert report["command"] == "subquad bench it" and report["seed"] == 3
    assert report["machine"]["threads"] == 1 and report["versions"]["torch"] == torch.__version__
    assert {"date", "commit", "settings"} <= report.keys()
    assert report["settings"]["dtype"] == "float32" and report["models"]["student"]["plan_pattern"] == "GAG"
    json.dumps(report, allow_nan=False)


def test_models_take_turns_and_each_goes_first(report):
    for row in rows_of(report, measured=True):
        assert row["order"] == [["student", "teacher"], ["teacher", "student"]]
        assert row["samples"] == 2


def test_the_order_is_that_of_the_turns():
    taken = []

    def turn_of(name):
        return lambda: (taken.append(name), ({"decode": float(len(taken))}, None))[1]

    order, samples = measure.race({"a": turn_of("a"), "b": turn_of("b")}, (3, 9), 0)
    assert [name for names in order for name in names] == taken == ["a", "b", "b", "a", "a", "b"]
    assert samples == {("a", "decode"): [1, 4, 5], ("b", "decode"): [2, 3, 6]}
    assert len(measure.race({"a": turn_of("a")}, (3, 9), 60)[0]) == 9


def test_a_cache_holds_what_the_plan_says(report):
    prefills = rows_of(report, measure="prefill", measured=True)
    assert len(prefills) == 12 and all(row["held_bytes"] == row["cache_bytes"] for row in prefills)
    teacher = {row["context"]: row["cache_bytes"] for row in rows_of(report, model="teacher", batch=2)}
    assert teacher == {context: 2 * context * 3 * 2 * 2 * 8 * 4 for context in CONTEXTS}


def test_extrapolated_rows_say_from_what_and_how(report):
    for row in rows_of(report, measured=False):
        assert (row["samples"], row["too_little"], row["fitted_to"]) == (0, "time", [8, 16, 32])
    formulas = {row["formula"] for row in rows_of(report, measured=False, measure="generate")}
    assert formulas <= {"decode", "decode + a"}
    assert not any("formula" in row for row in rows_of(report, measured=True))


def test_the_two_shortest_are_measured_whatever_they_take(folders, small):
    report = measure.bench(folders[0], against="none", contexts=[64, 8, 32], seconds=1e-9)
    assert {row["model"] for row in report["cells"]} == {"model"}
    assert {row["context"]: row["measured"] for row in report["cells"]} == {8: True, 32: True, 64: False}
    assert report["overtakes"] == []


def test_what_does_not_fit_into_memory_is_not_tried(folders, small, monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda _: 3 * 16 * 3 * 2 * 2 * 8 * 4 / 0.9)
    report = measure.bench(folders[0], against=folders[0], contexts=[8, 16, 32], seconds=60)
    decoding = {row["context"]: row for row in rows_of(report, measure="decode", model="teacher")}
    assert [row["measured"] for row in decoding.values()] == [True, True, False]
    assert decoding[32]["too_little"] == "memory"


def test_where_nothing_is_known_nothing_is_claimed(folders, small, monkeypatch):
    monkeypatch.setattr(measure, "available_bytes", lambda _: 0)
    report = measure.bench(folders[1], contexts=[8, 16], seconds=60)
    assert all(row["seconds"] is None and row["peak_bytes"] is None for row in report["cells"])
    assert report["overtakes"] == []
    assert printed(report).count("–") == 2 * 2 * 5


def printed(report):
    console = Console(width=200, record=True, file=open("/dev/null", "w"))
    print_bench(report, console)
    return console.export_text()


def test_the_table_marks_what_is_extrapolated(report):
    text = printed(report)
    lines = [line.split() for line in text.splitlines() if line.split()[:1] in (["64"], ["32"])]
    assert [line[0] for line in lines] == ["32", "64", "32", "64"]
    assert all(("~" in "".join(line)) == (line[0] == "64") for line in lines)
    assert text.count("~ extrapolated") >= 3 and "beyond 32 tokens (too little time;" in text
    assert "the student overtakes the teacher, batch 2: decoding" in text


def test_findings_say_where_the_student_overtakes():
    report = {
        "settings": {"batches": [1], "dtype": "float32"},
        "models": {"student": {}, "teacher": {}},
        "machine": {"processor": "a processor", "threads": 2, "device": "cpu"},
        "roof": {"bytes_per_second": 2e10, "flops_per_second": 1.5e11},
        "notes": [],
        "cells": [],
        "overtakes": [
            {"measure": "decode", "batch": 1, "where": "from", "context": 5431.2, "extrapolated": True},
            {"measure": "prefill", "batch": 1, "where": "always", "context": None, "extrapolated": False},
            {"measure": "generate", "batch": 1, "where": "never", "context": None, "extrapolated": False},
        ],
    }
    first, machine = findings(report)
    assert first == (
        "the student overtakes the teacher, batch 1: decoding from 5,431 tokens on (extrapolated), prefill always, "
        "generate never"
    )
    assert "a processor, 2 threads" in machine and "20.0 GB/s" in machine and "150 GFLOP/s" in machine


def test_a_picture_is_drawn(report, tmp_path):
    draw_bench(report, tmp_path / "new" / "bench.png")
    assert (tmp_path / "new" / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["bench.png"]


def test_json_is_written_aside_and_renamed(tmp_path, monkeypatch):
    import os

    moves, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (moves.append((a.name, b.name)), replace(a, b)))
    write_json(tmp_path / "bench.json", {"a": "é"})
    assert moves == [("bench.json.tmp", "bench.json")]
    assert json.loads((tmp_path / "bench.json").read_text()) == {"a": "é"}
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["subquad", "bench", *map(str, arguments)])
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, sys.argv[1:], prog_name="subquad")


def test_the_command_prints_and_writes(folders, small, tmp_path, monkeypatch):
    files = ["--json", tmp_path / "there" / "b.json", "--plot", tmp_path / "b.png"]
    result = command(monkeypatch, folders[1], "--contexts", "8,16", "--batch", "1", "--seconds", "5", *files)
    assert result.exit_code == 0, result.output
    assert "the student overtakes the teacher" in result.stdout and "prefill at 16 tokens" in result.stderr
    report = json.loads((tmp_path / "there" / "b.json").read_text())
    check_written(Bench, report)
    assert report["command"].startswith("subquad bench ") and report["settings"]["contexts"] == [8, 16]
    assert (tmp_path / "b.png").is_file()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--contexts", "1k,many"], "--contexts has 'many': give context lengths with commas between them"),
        (["--contexts", "0"], "--contexts has '0': give"),
        (["--contexts", ""], "--contexts has '': give"),
        (["--batch", "0"], "--batch has '0': give numbers of sequences"),
        (["--seconds", "0"], "contexts, batches and seconds must be above 0"),
        (["--against", "no/such/teacher"], "no teacher at 'no/such/teacher'"),
        (["--dtype", "float31"], "unknown dtype 'float31'"),
        (["--json", "/dev/null/b.json"], "the file /dev/null/b.json cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, folders, monkeypatch):
    result = command(monkeypatch, folders[1], *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"subquad: {sentence}") and result.stderr.count("\n") == 1


def test_numbers():
    assert numbers("1k, 500,2K", "--contexts", "") == [1024, 500, 2048]


def test_a_place_that_cannot_be_written_is_found_first(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        make_room(tmp_path)
    make_room(tmp_path / "new" / "file.json")
    assert (tmp_path / "new").is_dir()


def test_models_of_other_vocabularies_are_refused(folders, tmp_path):
    make_teacher(tmp_path)
    tiny("llama", vocab_size=101).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has a vocabulary of 97 tokens and .* one of 101"):
        measure.bench(folders[1], against=str(tmp_path), contexts=[8])


def test_without_a_recipe_there_is_no_other_model(folders):
    opened, dtype = models.open_subjects(folders[0], None, None, "cpu")
    assert [subject.name for subject in opened] == ["model"] and dtype == "float32"
    opened, dtype = models.open_subjects(folders[1], None, "bfloat16", "cpu")
    assert [subject.name for subject in opened] == ["student", "teacher"] and dtype == "bfloat16"
    assert {subject.model.dtype for subject in opened} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mistral"])
@pytest.mark.parametrize("context", [9, 40])
@torch.no_grad()
def test_a_made_cache_is_like_one_that_was_read(family, context):
    subject = subject_of(tiny(family))
    tokens = torch.zeros(2, context, dtype=torch.long)
    read, made = subject.model(tokens, use_cache=True)[CACHE], random_cache(subject.model, context, 2)
    for cache in (read, made):
        subject.model(tokens[:, :1], use_cache=True, **{CACHE: cache})
    assert made.get_seq_length() == read.get_seq_length() == context + 1
    assert [layer.keys.shape for layer in made.layers] == [layer.keys.shape for layer in read.layers]
    assert [layer.get_mask_sizes(1) for layer in made.layers] == [layer.get_mask_sizes(1) for layer in read.layers]


@torch.no_grad()
def test_a_made_cache_of_a_student_is_like_one_that_was_read():
    teacher = tiny("llama")
    plan = Plan.by_layer(shapes_of(teacher), [0], "hedgehog", {"window": 8})
    subject = subject_of(Student.from_teacher(teacher, plan), plan)
    made = random_cache(subject.model, 20, 2)
    assert held_cache_bytes(made) == subject.costs.cache_bytes(20, 2)
    subject.model(torch.zeros(2, 1, dtype=torch.long), past_key_values=made, use_cache=True)
    assert made.get_seq_length() == 21 and made.nbytes() == subject.costs.cache_bytes(21, 2)


def test_learned_positions_end_and_rotary_ones_run_on():
    learned, rotary = subject_of(tiny("gpt2")), subject_of(tiny("llama"))
    assert within_positions([learned], [64, 200], 20) == ([64, 200], [])
    assert within_positions([learned], [64, 250], 20)[0] == [64]
    with pytest.raises(UserError, match="no context is left, for the model has 256 positions"):
        within_positions([learned], [250, 512], 20)
    kept, (note,) = within_positions([rotary, rotary], [64, 512], 20)
    assert kept == [64, 512] and note.startswith("model and model were made for 256 tokens")


def test_what_the_seconds_of_a_model_are_made_of():
    teacher = tiny("llama")
    windows = subject_of(tiny("mistral"))  # whose attention sees 24 tokens
    linear = subject_of(teacher, Plan.by_layer(shapes_of(teacher), [], "gla"))
    assert subject_of(teacher).powers("prefill", 2) == (1, 2) and subject_of(teacher).powers("prefill", 4) == (0, 1, 2)
    assert subject_of(teacher).powers("decode", 4) == (0, 1)
    for subject in (windows, linear):
        assert (subject.powers("prefill", 4), subject.powers("decode", 4)) == ((0, 1), (0,))
    eager = tiny("llama")
    eager.set_attn_implementation("eager")
    assert subject_of(eager).memory_powers == (0, 2) and subject_of(teacher).memory_powers == (0, 1)


def quadratic(n):
    return 2e-3 * n + 3e-7 * n * n


def test_a_fit_is_exact_where_the_powers_are_right():
    at, powers = fit({n: quadratic(n) for n in (1024, 2048, 4096)}, (1, 2))
    assert powers == [1, 2] and at(131072) == pytest.approx(quadratic(131072), rel=1e-9)
    at, powers = fit({n: 0.05 + 1e-6 * n for n in (1024, 4096, 16384)}, (0, 1))
    assert powers == [0, 1] and at(131072) == pytest.approx(0.05 + 0.131072, rel=1e-9)
    at, _ = fit({n: 7.0 for n in (1024, 4096)}, (0,))
    assert at(131072) == pytest.approx(7.0)
    at, powers = fit({n: 0.5 + quadratic(n) for n in (1024, 2048, 4096, 8192)}, (0, 1, 2))
    assert at(131072) == pytest.approx(0.5 + quadratic(131072), rel=1e-6)


def test_a_fit_has_no_negative_parts_and_needs_enough_points():
    at, powers = fit({1024: 1.0, 2048: 1.9}, (1, 2))  # grows less than linearly
    assert powers == [1] and 1.9 / 2 < at(1024) < 1.0 and at(4096) == pytest.approx(4 * at(1024))
    assert fit({1024: 1.0}, (1, 2)) is None


def test_a_forecast_lies_between_tilted_fits():
    exact = {n: Spread(quadratic(n), quadratic(n), quadratic(n)) for n in (1024, 4096)}
    found = forecast(exact, (1, 2))
    assert found.formula == "a N + b N²"
    assert found.at(65536) == pytest.approx([quadratic(65536)] * 3, rel=1e-9)
    unsure = {n: Spread(0.9 * quadratic(n), quadratic(n), 1.1 * quadratic(n)) for n in (1024, 4096)}
    low, median, high = forecast(unsure, (1, 2)).at(65536)
    assert low < 0.9 * quadratic(65536) and high > 1.1 * quadratic(65536)
    assert median == pytest.approx(quadratic(65536), rel=1e-9)
    assert forecast({1024: Spread(1, 1, 1)}, (1, 2)) is None


def test_generate_is_forecast_as_decoding_and_a_constant():
    base = {8: Spread(1.0, 2.0, 3.0), 16: Spread(3.0, 4.0, 6.0), 64: Spread(9.0, 10.0, 11.0)}
    found = forecast_beside({8: spread([2.5, 2.5]), 16: spread([4.5, 4.5])}, base.__getitem__, "decode")
    assert found.formula == "decode + a" and found.at(64) == pytest.approx((9.5, 10.5, 11.5))
    faster = forecast_beside({8: spread([1.5, 1.5])}, base.__getitem__, "decode")
    assert isinstance(faster, Forecast) and faster.formula == "decode" and faster.at(64) == base[64]
    assert forecast_beside({}, base.__getitem__, "prefill").at(16) == base[16]


@pytest.mark.parametrize(
    "known, context, seconds",
    [({512: 1.0}, 1024, 2.0), ({256: 1.0, 512: 4.0}, 1024, 16.0), ({256: 1.0, 512: 1.0}, 1024, 2.0)],
)
def test_what_another_cell_is_expected_to_take(known, context, seconds):
    assert expected(known, context) == pytest.approx(seconds)


def curve(seconds_of, measured_to=math.inf):
    return {n: Point(seconds_of(n), n <= measured_to) for n in (1024, 4096, 16384)}


def test_overtaking_between_two_points():
    teacher, student = curve(lambda n: n / 4096), curve(lambda n: 2.0)
    found = overtaking(student, teacher)
    assert (found.where, found.extrapolated) == ("from", False)
    assert found.context == pytest.approx(8192)  # power laws cross where log scales say
    assert overtaking(curve(lambda n: 2.0, 4096), teacher).extrapolated
    assert not overtaking(curve(lambda n: n / 1024 - 0.5, 4096), curve(lambda n: n / 2048, 4096)).context


def test_overtaking_always_and_never():
    slow, fast = curve(lambda n: 2.0 * n, 4096), curve(lambda n: 1.0 * n)
    assert overtaking(fast, curve(lambda n: 2.0 * n)) == Overtaking("always", None, False)
    assert overtaking(fast, slow) == Overtaking("always", None, True)
    assert overtaking(slow, fast) == Overtaking("never", None, True)
    assert overtaking(fast, fast) == Overtaking("never", None, False)
    assert overtaking({}, fast) is None


def test_overtaking_counts_from_where_it_stays():
    student = {1: Point(1, True), 2: Point(4, True), 4: Point(1, True)}
    teacher = {1: Point(2, True), 2: Point(2, True), 4: Point(2, True)}
    assert overtaking(student, teacher).context == pytest.approx(2 * 2**0.5)


def test_spread_is_median_and_quartiles():
    assert spread([1, 2, 3, 4, 50]) == (2, 3, 4)


def test_the_roof_is_the_slower_of_moving_and_computing():
    roof = Roof(bytes_per_second=100.0, flops_per_second=1000.0)
    assert roof.seconds(PassCost(bytes=200, flops=1000)) == 2.0
    assert roof.seconds(PassCost(bytes=200, flops=5000)) == 5.0


@pytest.mark.parametrize("tied", [True, False])
def test_what_passes_move_and_compute_at_least(tied):
    model = tiny("llama", tie_word_embeddings=tied)
    costs = subject_of(model).costs
    attention, mlp = 48 * (48 + 16 + 16) + 48 * 48, 3 * 48 * 64
    matrices, norms, head = 3 * (attention + mlp), 7 * 48, 97 * 48
    assert costs.weight_bytes == 4 * (matrices + norms + head)  # of an embedding only rows are looked up
    assert (costs.token_flops, costs.head_flops) == (2 * matrices, 2 * head)
    keys_and_values, mixing = 3 * 2 * 2 * 8 * 4, 3 * 4 * 48  # bytes and operations a token of context
    assert costs.decode(100, 2) == (
        costs.weight_bytes + 2 * 100 * keys_and_values,
        2 * (2 * matrices + 2 * head + 100 * mixing),
    )
    bytes_, flops = costs.prefill(6400, 2)
    assert bytes_ == costs.weight_bytes + 2 * 6400 * keys_and_values
    assert flops == pytest.approx(2 * (6400 * (2 * matrices + 3200 * mixing) + 2 * head))


def test_mixing_by_states_costs_the_same_at_every_context():
    shapes = shapes_of(tiny("llama"))
    linear = Plan.by_layer(shapes, [], "linear")
    assert mixing_flops(linear, 100) == mixing_flops(linear, 10**6) > 0
    half = Plan.by_layer(shapes, [0], "linear")
    assert mixing_flops(half, 10**6) - mixing_flops(half, 10**6 - 1) == 4 * 48


def test_the_machine_is_measured(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(timing, "clock", lambda _: next(ticks))  # every copy and product takes a second
    roof = roofline.measure_roof(torch.device("cpu"), torch.float32)
    assert (roof.bytes_per_second, roof.flops_per_second) == (2 * 2**28, 2 * 1024**3)


def test_available_memory_is_within_the_limit_of_the_container(monkeypatch, tmp_path):
    machine, limit, use = (tmp_path / name for name in ("meminfo", "memory.max", "memory.stat"))
    for name, file in (("_MACHINE", machine), ("_LIMIT", limit), ("_USE", use)):
        monkeypatch.setattr(memory, name, file)
    cpu = torch.device("cpu")
    assert memory.available_bytes(cpu) == math.inf
    machine.write_text("MemTotal:  9 kB\nMemAvailable:  5 kB\n")
    assert memory.available_bytes(cpu) == 5120
    limit.write_text("max\n")
    assert memory.available_bytes(cpu) == 5120
    limit.write_text("4000\n")
    use.write_text("anon 1000\nfile 2000\n")
    assert memory.available_bytes(cpu) == 3000


def test_a_model_counts_what_it_reads_not_what_it_holds():
    model = tiny("llama", tie_word_embeddings=False)
    subject = subject_of(model)
    assert subject.weight_bytes - Costs.of(model, subject.plan).weight_bytes == 4 * 97 * 48
