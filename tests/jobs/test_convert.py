"""Whole conversions: from a teacher to a folder that transformers loads, by the same code as `make convert`."""

import io
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from subquad.data.text import load_corpus
from subquad.errors import UserError
from subquad.evaluate import cache_table
from subquad.evaluate.retrieval import FLOORS
from subquad.jobs import convert, evaluate, select, train
from subquad.jobs.baselines import window_plan
from subquad.jobs.conversion import Conversion
from subquad.jobs.generate import generate
from subquad.jobs.run import start_run
from subquad.jobs.train import train_stages
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.plan import AttentionShape, Plan
from subquad.pretrained.load import load_pretrained
from subquad.recipes.load import load_recipe
from subquad.recipes.schema import Recipe
from subquad.results.metrics import Metrics
from subquad.results.record import check_written
from subquad.select import SELECTORS, units_of
from subquad.select.speed import DecodeCost
from tests.helpers import RECIPE, STAGE, tiny

SMALL = [
    "evaluate.contexts=[8]",
    "evaluate.rows=1",
    *(f"evaluate.retrieval.{key}" for key in ("tasks=[copy]", "contexts=[32]", "count=2")),
]
FILES = {"config.json", "model.safetensors", "tokenizer.json", "plan.yaml", "scores.json", "metrics.json", "log.jsonl"}


@pytest.fixture(scope="module")
def finished(teacher_folder, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "tiny"
    student = convert.convert(teacher_folder, Recipe(**RECIPE), out, data=text, command="subquad convert ...")
    return out, student


def test_convert_leaves_what_it_promises(finished):
    out, student = finished
    names = {path.name for path in out.iterdir()}
    assert FILES | {"report.html", "README.md", "recipe.yaml"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    metrics = json.loads((out / "metrics.json").read_text())
    check_written(Metrics, metrics)
    for name in ("teacher", "student", "aligned", "uniform", "untrained", "window"):
        row = metrics[name]
        assert row["kl"].keys() == row["perplexity"].keys() == row["top1"].keys() == {"16", "48"}
        assert row["retrieval"]["copy"]["32"].keys() == {"accuracy", "logprob"}
        assert row["cache_bytes"].keys() == {"64", "1024"}
    assert metrics["teacher"]["kl"]["48"] == 0 < metrics["student"]["kl"]["48"] < metrics["untrained"]["kl"]["48"]
    assert [stage["name"] for stage in metrics["stages"]] == ["align", "logits"]
    assert {"align", "logits", "select", "evaluate", "total"} <= metrics["seconds"].keys()
    assert metrics["tokens"] == {"align": 512, "logits": 256}
    assert metrics["peak_rss_bytes"] > 0 and metrics["seed"] == 0 and metrics["versions"]["torch"]
    scores = json.loads((out / "scores.json").read_text())
    assert scores["chosen"] == student.plan.attention_layers and len(scores["chosen"]) == 1


@pytest.mark.slow
def test_the_folder_loads_with_transformers(finished):
    """In a new process: after `import subquad`, and without it by trust_remote_code."""
    out, student = finished
    tokens = torch.tensor([[5, 6, 7, 8]])
    expected_logits = student(tokens, use_cache=False).logits
    loaded_student = Student.from_pretrained(out)
    assert torch.equal(loaded_student(tokens, use_cache=False).logits, expected_logits)
    for line, argument in (("import subquad", ""), ("", ", trust_remote_code=True")):
        program = (
            f"{line}\nimport torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"model = AutoModelForCausalLM.from_pretrained({str(out)!r}{argument})\n"
            f"AutoTokenizer.from_pretrained({str(out)!r}{argument})\n"
            "print(type(model).__name__, model(torch.tensor([[5, 6, 7, 8]]), use_cache=False).logits.sum().item())\n"
        )
        process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
        assert process.returncode == 0, process.stderr
        name, total = process.stdout.split()
        assert name == "Student" and float(total) == pytest.approx(expected_logits.sum().item(), rel=1e-5)


def test_the_teacher_is_left_as_it_was(finished, teacher_folder, text, tmp_path):
    """Training all weights trains the student's own copies."""
    recipe = Recipe(**RECIPE).model_copy(deep=True)
    recipe.stages[1].trainable = "all"
    teacher = load_pretrained(teacher_folder)
    teacher_weights = {name: parameter.clone() for name, parameter in teacher.model.named_parameters()}
    plan = Plan.by_layer(shapes_of(teacher.model), [1], "hedgehog", RECIPE["mixer"]["options"])
    student = Student.from_teacher(teacher.model, plan)
    run = start_run(recipe, tmp_path / "run", resume=False, overwrite=False)
    corpus = load_corpus(text, teacher.tokenizer)
    train_stages(Conversion(recipe, run, teacher, teacher.model, corpus), student, scope="plan")
    student_parameters = dict(student.backbone.named_parameters())
    assert all(torch.equal(parameter, teacher_weights[name]) for name, parameter in teacher.model.named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(student_parameters[name], teacher_weights[name])


def test_an_interrupted_run_ends_the_same(finished, teacher_folder, text, tmp_path, monkeypatch):
    """Stopped after selection and resumed: the same weights, bit for bit, with nothing done twice."""
    out, student = finished
    resumed_out = tmp_path / "again"

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert, "_measure", stop)
        with pytest.raises(KeyboardInterrupt):
            convert.convert(teacher_folder, Recipe(**RECIPE), resumed_out, data=text)
    with monkeypatch.context() as patch:
        patch.setattr(select.SELECTORS["kl"], "choose", stop)
        resumed_student = convert.convert(teacher_folder, Recipe(**RECIPE), resumed_out, data=text, resume=True)
    parameters, resumed_parameters = dict(student.mixer_parameters()), dict(resumed_student.mixer_parameters())
    assert all(torch.equal(parameters[name], resumed_parameters[name]) for name in parameters)


PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background are started to ignore it
from subquad.cli.app import main
main()
"""


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on_and_that_does(teacher_folder, text, tmp_path):
    recipe, out = Recipe(**RECIPE).model_copy(deep=True), tmp_path / "run"
    recipe.stages[0].tokens, recipe.stages[0].log_every = 64 * 300, 1
    (tmp_path / "tiny.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    command = f"convert {teacher_folder} --recipe {tmp_path}/tiny.yaml --data {text[0]} --out {out}".split()
    job = subprocess.Popen([sys.executable, "-c", PROGRAM, *command], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").exists():
        assert job.poll() is None and time.monotonic() < deadline, job.communicate()
        time.sleep(0.01)
    job.send_signal(signal.SIGINT)
    stderr = job.communicate(timeout=60)[1]
    assert job.returncode == 130 and "Traceback" not in stderr
    assert stderr.endswith(
        f"resume from the last checkpoint with:\n  {shlex.join(['subquad', *command, '--resume'])}\n"
    )
    steps_done = len((out / "log.jsonl").read_text().splitlines())
    assert (out / "checkpoints" / f"stage-0-step-{steps_done:06d}").is_dir() and not list(out.rglob("*.tmp"))
    convert.convert(teacher_folder, load_recipe(tmp_path / "tiny.yaml"), out, data=text, resume=True)
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps[:300] == list(range(1, 301))


def test_a_model_that_cannot_be_written_whole_is_not_left_in_halves(finished, tmp_path):
    run = start_run(Recipe(**RECIPE), tmp_path / "run", resume=False, overwrite=False)
    with pytest.raises(OSError, match="full"), run.writing() as folder:
        finished[1].save_pretrained(folder)
        raise OSError("full")
    assert {path.name for path in run.out.iterdir()} == {"recipe.yaml", "tensorboard"}


@pytest.mark.slow
def test_the_command_in_two_processes_gives_the_same_losses(finished, teacher_folder, text, tmp_path):
    (tmp_path / "tiny.yaml").write_text(Recipe(**RECIPE).to_yaml(), encoding="utf-8")
    launch = "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    command = f"convert {teacher_folder} --recipe {tmp_path}/tiny.yaml --data {text[0]} --out {tmp_path}/two"
    process = subprocess.run(
        [sys.executable, "-m", *f"{launch} --dynamo_backend no --main_process_port 0 -m subquad {command}".split()],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    out, student = finished
    one_process, two_processes = (
        [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        for folder in (out, tmp_path / "two")
    )
    steps, expected_steps = ([(line["name"], line["step"]) for line in log] for log in (two_processes, one_process))
    assert steps == expected_steps
    assert [line["loss"] for line in two_processes] == pytest.approx([line["loss"] for line in one_process], rel=1e-4)
    assert json.loads((tmp_path / "two" / "metrics.json").read_text())["machine"]["processes"] == 2
    assert Student.from_pretrained(tmp_path / "two").plan == student.plan
    expected_scores, scores = (json.loads((folder / "scores.json").read_text()) for folder in (out, tmp_path / "two"))
    assert scores["scores"] == pytest.approx(expected_scores["scores"], rel=1e-4), "a row of text went to each"


def test_a_given_plan_is_used(teacher_folder, text, tmp_path):
    shapes = shapes_of(tiny("llama"))
    Plan.by_layer(shapes, [0, 2], "gla").save(tmp_path / "mine.yaml")
    recipe = Recipe(**{**RECIPE, "mixer": {"name": "gla"}, "stages": RECIPE["stages"][1:]})
    student = convert.convert(teacher_folder, recipe, tmp_path / "run", plan=tmp_path / "mine.yaml", data=text)
    assert student.plan.attention_layers == [0, 2]
    assert not (tmp_path / "run" / "scores.json").exists()


def test_select_writes_a_plan(teacher_folder, text, tmp_path):
    plan = select.select(teacher_folder, Recipe(**RECIPE), tmp_path / "plan.yaml", data=text)
    assert Plan.load(tmp_path / "plan.yaml") == plan
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.yaml", "scores.json"]
    with pytest.raises(UserError, match="exists"):
        select.select(teacher_folder, Recipe(**RECIPE), tmp_path / "plan.yaml", data=text)


def retraining(budget="1", unit=None):
    """Selection that trains its candidates: three layers and the all-linear student."""
    settings = {**RECIPE["selector"], "unit": unit, "budget": budget, "options": {"retrain_tokens": 128}}
    return Recipe(**{**RECIPE, "selector": settings})


def test_an_interrupted_selection_goes_on(teacher_folder, text, tmp_path, monkeypatch, capsys):
    """Measured pieces are not measured again, and the scores equal those of an uninterrupted selection."""
    select.select(teacher_folder, retraining(), tmp_path / "whole" / "plan.yaml", data=text)
    folders, run_stage = [], train.run_stage

    def count_and_run(stage, inputs, **options):
        if stage.name == "logits":
            folders.append(options["out"].name)
            if len(folders) == 3:
                raise KeyboardInterrupt
        return run_stage(stage, inputs, **options)

    monkeypatch.setattr(train, "run_stage", count_and_run)
    with pytest.raises(KeyboardInterrupt):
        select.select(teacher_folder, retraining(), tmp_path / "plan.yaml", data=text)
    plan = select.select(teacher_folder, retraining(), tmp_path / "plan.yaml", data=text, resume=True)
    assert folders == [f"candidate-{index}-0" for index in (0, 1, 2, 2, 3)]
    resumed_scores, whole_scores = (
        json.loads((folder / "scores.json").read_text()) for folder in (tmp_path, tmp_path / "whole")
    )
    assert resumed_scores["scores"] == whole_scores["scores"] and resumed_scores["chosen"] == whole_scores["chosen"]
    assert resumed_scores["bill"] == {"forward_tokens": 2 * 4 * 64, "training_tokens": 4 * 128}
    assert resumed_scores["front"][0]["value"] == 0.0 and resumed_scores["front"][-1]["value"] == 1.0
    assert plan.attention_layers == resumed_scores["chosen"] and not (tmp_path / "plan.work").exists()


def test_a_dry_run_says_the_bill_and_leaves_nothing(teacher_folder, text, tmp_path, capsys):
    assert select.select(teacher_folder, retraining(), tmp_path / "plan.yaml", data=text, dry_run=True) is None
    output = capsys.readouterr().out
    assert "align: 512 tokens of training" in output
    assert "kl, 3 units: 512 tokens forward and 512 tokens of training, about" in output
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("by", "unit", "budget", "options"),
    [
        ("kl", "head", "16KiB@64", {}),
        ("kl-removal", 2, "1", {}),
        ("alignment-loss", "head", "20%", {}),
        ("recall", "layer", "1", {"tasks": ["copy"], "context": 32, "rows": 3}),
        ("halo", None, "1", {"recall": ["copy"], "context": 32, "rows": 3}),
        ("gradient", "head", "1.5x@64", {"points": 1}),
        ("fisher", None, "1", {"draws": 1}),
        ("gates", "head", "6", {"tokens": 128, "sequence_length": 32}),
        ("greedy", None, "opt", {"task": "copy", "context": 32, "limit": 3}),
        ("greedy", "head", "best", {"task": "copy", "context": 32, "limit": 2}),
        ("uniform", 2, "1", {}),
        ("fixed", None, "20KiB@64", {"layers": [2, 0]}),
    ],
)
def test_every_selector_gives_a_plan(by, unit, budget, options, teacher_folder, text, tmp_path, monkeypatch):
    """Layers, heads and groups; numbers, shares, bytes and speed."""
    monkeypatch.setitem(FLOORS, "accuracy", -1.0)
    monkeypatch.setitem(FLOORS, "logprob", -99.0)
    seconds = DecodeCost([1.0] * 3, [0.1] * 3, 1.0)  # a real clock would make many plans impossible at this size
    monkeypatch.setattr(select, "decode_cost", lambda *_: seconds)
    settings = {**RECIPE["selector"], "by": by, "unit": unit, "budget": budget, "options": options}
    recipe = Recipe(**{**RECIPE, "selector": settings})
    plan = select.select(teacher_folder, recipe, tmp_path / "plan.yaml", data=text)
    scores = json.loads((tmp_path / "scores.json").read_text())
    units = units_of(plan.shapes, SELECTORS[by].unit if unit is None else unit)
    assert sorted(head for index in scores["chosen"] for head in units[index]) == sorted(plan.attention_heads)
    assert scores["spent"].keys() == scores["bill"].keys() and scores["unit"] in ("layer", "head", "group")
    if by not in ("uniform", "fixed"):
        plan_again = select.select(
            teacher_folder, recipe, tmp_path / "again.yaml", data=text, scores=tmp_path / "scores.json"
        )
        assert plan_again == plan, "another budget asks for no measuring, and the same gives the same"
    if budget.endswith("KiB@64"):
        assert plan.cache_bytes(64) <= 1024 * int(budget[:2])
    if budget.endswith("x@64"):
        assert plan.attention_heads and seconds(plan) <= 4 / 1.5


def test_a_choice_of_mixers_for_every_layer(teacher_folder, text, tmp_path):
    """Aligned, selected and distilled with two mixers; the folder loads."""
    alternatives = [{"name": "sliding_window", "options": {"window": 30, "sinks": 1}}, {"name": "linear"}]
    mixer = {"name": "gla", "options": {"state_dim": 4}, "alternatives": alternatives}
    selector = {**RECIPE["selector"], "budget": "6000B@64"}
    student = convert.convert(
        teacher_folder, Recipe(**{**RECIPE, "mixer": mixer, "selector": selector}), tmp_path / "run", data=text
    )
    mixers = {name for layer in student.plan.layers for name in layer}
    assert mixers & {"sliding_window", "linear"} and student.plan.cache_bytes(64) <= 6000
    assert [*json.loads((tmp_path / "run" / "scores.json").read_text())["alternatives"]] == [
        "sliding_window",
        "linear",
    ]
    assert (tmp_path / "run" / "alternatives" / "linear" / "log.jsonl").is_file()
    loaded_student = Student.from_pretrained(tmp_path / "run")
    assert loaded_student.plan == student.plan


def test_eval_and_generate(finished, teacher_folder, text, tmp_path):
    out, _ = finished
    metrics = evaluate.evaluate_model(out, json_path=tmp_path / "numbers.json")
    check_written(Metrics, metrics)
    run_metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["student"]["kl"] == pytest.approx(run_metrics["student"]["kl"], rel=1e-4)
    assert metrics["samples"] == run_metrics["samples"]
    assert metrics["samples"][0].keys() == {"prompt", "teacher", "student"}
    assert json.loads((tmp_path / "numbers.json").read_text()) == metrics
    console = Console(file=io.StringIO(), width=200)
    small_metrics = evaluate.evaluate_model(out, changes=SMALL, console=console)
    assert small_metrics["student"]["kl"].keys() == {"8"}
    assert f"measure: token {2 * 8 + 2 * 2 * 32}/{2 * 8 + 2 * 2 * 32}" in console.file.getvalue()
    teacher_row = evaluate.evaluate_model(teacher_folder, teacher=teacher_folder, data=text, changes=SMALL)["student"]
    assert teacher_row["kl"] == {"8": 0.0} and teacher_row["plan_pattern"] == "AAA", "any model, as the student"
    continuation = generate(out, "w1 w2 w3", max_new_tokens=5)
    assert continuation == generate(out, "w1 w2 w3", max_new_tokens=5) and continuation
    with pytest.raises(UserError, match="no chat template"):
        generate(out, "w1", chat=True)


def test_folders_of_something_else_are_left_alone(finished, teacher_folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for arguments in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(UserError, match="something other than a run"):
            convert.convert(teacher_folder, Recipe(**RECIPE), tmp_path, **arguments)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    out, _ = finished
    with pytest.raises(UserError, match="earlier run"):
        convert.convert(teacher_folder, Recipe(**RECIPE), out)
    with pytest.raises(UserError, match="other settings"):
        convert.convert(teacher_folder, Recipe(**{**RECIPE, "seed": 1}), out, resume=True)


def test_a_student_is_no_teacher(finished, tmp_path):
    with pytest.raises(UserError, match="student already"):
        convert.convert(str(finished[0]), Recipe(**RECIPE), tmp_path / "run")


def test_a_damaged_student_is_refused(finished, tmp_path):
    broken_folder = tmp_path / "broken"
    shutil.copytree(finished[0], broken_folder)
    weights = (broken_folder / "model.safetensors").read_bytes()
    (broken_folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="damaged or cut short"):
        generate(broken_folder, "w1")


def test_what_only_the_parts_know_is_checked_before_anything_is_loaded(tmp_path):
    for change, message in (
        ({"mixer": {"name": "hegdehog"}}, "did you mean 'hedgehog'"),
        ({"mixer": {"name": "attention"}}, "nothing to convert"),
        ({"selector": {"by": "klm", "budget": "1"}}, "did you mean 'kl'"),
        ({"selector": {"budget": "lots"}}, "not a budget"),
    ):
        with pytest.raises(UserError, match=message):
            convert.convert("nowhere", Recipe(**{**RECIPE, **change}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_window_baseline_takes_the_same_bytes():
    shape = AttentionShape(heads=9, kv_heads=3, head_dim=64, hidden_size=576)
    for mixer in ("hedgehog", "gla", "mamba2"):
        plan = Plan.by_layer([shape] * 6, [1, 4], mixer)
        for dtype in ("float32", "bfloat16"):
            baseline = window_plan(plan, dtype)
            plan_bytes, baseline_bytes = (cache_table(p, [2048], dtype)[2048] for p in (plan, baseline))
            token_bytes = 4 * 2 * 3 * 64 * (4 if dtype == "float32" else 2)
            assert baseline.attention_layers == [1, 4]
            assert baseline_bytes <= plan_bytes < baseline_bytes + token_bytes


@pytest.mark.slow
def test_the_real_teacher_cut_to_its_first_layers(tmp_path):
    """SmolLM2 itself: its tokenizer, its corpora, the shipped recipe, at a hundredth of the tokens."""
    recipe = load_recipe(
        "quick",
        [
            "mixer.options.window=16",
            "selector.tokens=256",
            "selector.sequence_length=256",
            "stages.0.tokens=2k",
            "stages.0.sequence_length=256",
            "stages.1.tokens=8k",
            "stages.1.sequence_length=256",
            "evaluate.contexts=[64, 256]",
            "evaluate.rows=1",
            "evaluate.retrieval.contexts=[256]",
            "evaluate.retrieval.count=1",
            "evaluate.max_new_tokens=4",
        ],
    )
    torch.set_num_threads(2)
    student = convert.convert("default", recipe, tmp_path / "run", layers=4)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(student.plan.attention_layers) == 2
    assert metrics["student"]["kl"]["256"] < metrics["untrained"]["kl"]["256"]
    assert metrics["student"]["cache_bytes"]["131072"] < 0.55 * metrics["teacher"]["cache_bytes"]["131072"]
    assert Path(tmp_path / "run" / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("join", ["split", "parallel"])
def test_heads_that_retrieve_are_kept(teacher_folder, text, tmp_path, monkeypatch, capsys, join):
    """Whole conversion with heads as units: scores, plan, training, baselines, report."""
    monkeypatch.setitem(FLOORS, "logprob", -1e9)  # a random teacher answers nothing
    options = {"tasks": ["copy"], "context": 32, "rows": 4}
    changes = {
        "mixer": {**RECIPE["mixer"], "join": join},
        "selector": {"by": "retrieval-heads", "budget": "3", "tokens": 64, "sequence_length": 32, "options": options},
        "stages": [
            {"name": "hidden", "objective": "block_output", "tokens": 128, **STAGE},
            {"name": "logits", "objective": "logits", "trainable": "all", "tokens": 128, **STAGE},
        ],
    }
    student = convert.convert(teacher_folder, Recipe(**{**RECIPE, **changes}), tmp_path / "run", data=text)
    assert len(student.plan.attention_heads) == 3 and student.plan.join == join
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert scores["unit"] == "head" and scores["measure"] == "logprob" and len(scores["chosen"]) == 3
    flat_scores = [score for row in scores["scores"] for score in row]
    assert sorted(scores["chosen"], key=lambda index: -flat_scores[index]) == scores["order"][:3]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert {"student", "untrained", "window", "uniform"} <= metrics.keys()
    context = "1024"
    assert metrics["uniform"]["cache_bytes"][context] <= metrics["student"]["cache_bytes"][context]
    assert metrics["window"]["cache_bytes"][context] <= metrics["student"]["cache_bytes"][context]
    output = capsys.readouterr().out
    assert "silencing 18 heads on 1 x 4 rows of 32 tokens" in " ".join(output.split())
    page = (tmp_path / "run/report.html").read_text()
    assert "Why these heads" in page and "an aggregate head" in page
    loaded_student = Student.from_pretrained(tmp_path / "run")
    tokens = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded_student(tokens, use_cache=False).logits, student(tokens, use_cache=False).logits)
