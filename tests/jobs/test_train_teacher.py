"""The small teacher: what it learns from, that its training is exact and resumable, and the one that ships."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from subquad.cli.app import app
from subquad.data import curriculum as lessons_module
from subquad.data.curriculum import SHORTEST, TRAINING_SEEDS, VOCABULARY, Lessons, shares, train_tokenizer
from subquad.data.packing import document_separator
from subquad.data.probes import FILLER, WORDS, make_probe
from subquad.data.text import load_corpus
from subquad.errors import UserError
from subquad.evaluate import retrieval
from subquad.jobs import small_teacher
from subquad.jobs import train_teacher as module
from subquad.jobs.train_teacher import is_perfect, train_teacher
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.pretrained.load import load_pretrained

ASSET = Path(__file__).parents[1] / "assets" / "small-teacher"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of words in random order among the sentences of the probes, and a cache of its own for the tokens."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    task = "There is a pass key hidden in a lot of irrelevant text. Find it and memorize it. Remember it. What is it? "
    documents = [task + FILLER + " ".join(rng.sample(WORDS, 100)) for _ in range(120)]
    (folder / "words.txt").write_text("\n\n".join(documents))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBQUAD_CACHE", str(folder / "cache"))
        yield [str(folder / "words.txt")]


@pytest.fixture(scope="module")
def lessons(text):
    tokenizer = train_tokenizer(text)
    return Lessons(load_corpus(text, tokenizer), tokenizer)


@pytest.fixture
def small(monkeypatch):
    """A ladder of two contexts, rounds of one step and few questions, so that a run takes seconds."""
    monkeypatch.setattr(module, "LADDER", {64: 0.5, 128: 1.0})
    monkeypatch.setattr(module, "ROUND_TOKENS", 2048)
    monkeypatch.setattr(module, "PROBE_ROWS", 2)
    monkeypatch.setattr(module, "HELDOUT_ROWS", 2)


def test_the_tokenizer_has_single_digits_and_one_special_token(lessons):
    tokenizer = lessons.tokenizer
    assert len(tokenizer) == VOCABULARY
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]
    assert document_separator(tokenizer) == tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    sentence = "Anything at all: 5 é\n\tand so on, isn't it?  "
    assert tokenizer.decode(tokenizer(sentence)["input_ids"]) == sentence


def test_a_key_is_one_token_wherever_it_stands(lessons):
    """Else a model would have to know that two tokens mean one word, before it can look the word up."""
    tokenizer = lessons.tokenizer
    for word in WORDS:
        (index,) = tokenizer(f"{word}")["input_ids"]
        for phrase in (f"\n{word}:1", f"the key '{word}' is", f"3\n{word} is"):
            assert index in tokenizer(phrase)["input_ids"], phrase


def test_lessons_are_a_function_of_seed_and_step(lessons):
    def batch(step, seed):
        return lessons.batch(step, batch=8, sequence_length=128, seed=seed)

    rows = batch(3, 1)
    batch(4, 1)
    assert rows.shape == (8, 128) and rows.dtype == torch.int64
    assert 0 <= rows.min() and rows.max() < VOCABULARY
    assert torch.equal(rows, batch(3, 1))
    assert not torch.equal(rows, batch(4, 1)) and not torch.equal(rows, batch(3, 2))


@pytest.mark.parametrize("length", [64, 128, 300])
def test_lessons_never_use_a_seed_of_an_evaluation(length, lessons, monkeypatch):
    seeds = []

    def spy(*arguments, seed, **options):
        seeds.append(seed)
        return make_probe(*arguments, seed=seed, **options)

    monkeypatch.setattr(lessons_module, "make_probe", spy)
    for step in range(8):
        assert lessons.batch(step, batch=16, sequence_length=length, seed=0).shape == (16, length)
    assert len(seeds) >= 4 and min(seeds) >= TRAINING_SEEDS
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("length", [64, 256, 512])
def test_problems_are_right(length, lessons):
    problems = dict.fromkeys(CHECKS, 0)
    rows_of = {
        "dictionary": lessons.dictionaries,
        "passkey": lessons.pass_keys,
        "copy": lessons.copying,
    }
    for step in range(12):
        text_BT = lessons.corpus.batch(step, batch=1, sequence_length=length, seed=0)
        for task in rows_of.keys() & shares(length).keys():
            rows = rows_of[task](4, text_BT, random.Random(step))
            assert rows.shape == (4, length)
            for ids in rows.tolist():
                ids = ids[:-1] if ids[-1] == document_separator(lessons.tokenizer) else ids
                problems[task] += CHECKS[task](lessons.tokenizer.decode(ids), ids)
    assert problems["dictionary"] > 2 * 48 and problems["copy"] == 48
    assert problems["passkey"] == (48 if length >= SHORTEST["passkey"] else 0)


def _dictionary(text, ids):
    """All questions are about the dictionary above them, and the last may be cut off."""
    assert text.startswith("Memorize the following dictionary:\n")
    pairs: dict[str, str] = {}
    questions = 0
    for key, value, end in re.findall(r"(\w+)(?::|'? is )(\d+)(\n|$)", text):
        if key in pairs:
            assert pairs[key].startswith(value) and (pairs[key] == value or not end), (key, value)
            questions += 1
        else:
            pairs[key] = value
    return questions


def _passkey(text, ids):
    (key,) = re.findall(r"What is the pass key\? The pass key is (\d{5})$", text)
    assert text.count(key) == 3
    return 1


def _copy(text, ids):
    """The probe's format, after at most one token more, or a period that goes on to the end."""
    half = len(ids) // 2
    if ids[-half:] == ids[-2 * half : -half]:
        return 1
    assert any(ids[period:] == ids[:-period] for period in range(4, half + 1))
    return 1


CHECKS = {"dictionary": _dictionary, "passkey": _passkey, "copy": _copy}


def test_small_batches_leave_no_task_out(lessons, monkeypatch):
    """At 512 tokens a step has four rows: shares are chances, not counts that round to nothing."""
    row_counts = dict.fromkeys(("copying", "associations", "dictionaries", "pass_keys"), 0)

    def spy(name):
        make = getattr(Lessons, name)

        def count(self, rows, *arguments):
            row_counts[name] += rows
            return make(self, rows, *arguments)

        return count

    for name in row_counts:
        monkeypatch.setattr(Lessons, name, spy(name))
    for step in range(30):
        assert lessons.batch(step, batch=4, sequence_length=128, seed=0).shape == (4, 128)
    assert all(rows > 10 for rows in row_counts.values()) and sum(row_counts.values()) < 115


def test_associations_are_asked_as_they_were_said(lessons, monkeypatch):
    monkeypatch.setattr(lessons_module, "FILLERS", ((1,), (1,), (2,), (3,)))  # between, after; before, between
    strides = set()
    for seed in range(20):
        ids = lessons.pairs(400, random.Random(seed))
        count = next(n for n in range(1, 101) if ids[4 * n + 1] != ids[1] or ids[4 * n] in ids[: 4 * n : 4])
        pairs = dict(zip(ids[: 4 * count : 4], ids[2 : 4 * count : 4], strict=True))
        assert {*ids[1 : 4 * count : 4]} == {ids[1]} and {*ids[3 : 4 * count : 4]} == {ids[3]}
        questions = ids[4 * count :]
        stride, place = (4, 2) if questions[1] == ids[1] else (8, 4)  # key, 1, value, 1; or key, 3, value, 1 + 2
        strides.add(stride)
        answers = list(zip(questions[::stride], questions[place::stride], strict=False))
        assert len(answers) >= 10 and all(pairs[key] == value for key, value in answers)
        assert len({key for key, _ in answers[:count]}) == min(count, len(answers))  # all of them, before any again
    assert strides == {4, 8}


def test_a_run_leaves_a_teacher_that_converts(tmp_path, text, small):
    metrics = train_teacher(tmp_path / "run", tokens="6k", data=text, command="subquad train-teacher")
    assert json.loads((tmp_path / "run/metrics.json").read_text())["tokens"] == metrics["tokens"] == 6144
    assert metrics["outcome"] == "token budget spent"
    assert "token budget spent" in (tmp_path / "run/README.md").read_text()
    teacher = load_pretrained(str(tmp_path / "run"))
    assert teacher.model.num_parameters() == metrics["parameters"]
    shapes = shapes_of(teacher.model)
    assert len(shapes) == 4 and {(s.heads, s.kv_heads, s.head_dim, s.hidden_size) for s in shapes} == {(8, 8, 32, 128)}
    student = Student.from_teacher(teacher.model, Plan.by_layer(shapes, [1], "gla"))
    assert student(torch.arange(8)[None]).logits.isfinite().all()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_also_after_an_interruption(tmp_path, text, small, monkeypatch):
    def weights(name, seed=0, **options):
        train_teacher(tmp_path / name, tokens="6k", seed=seed, data=text, **options)
        return load_file(tmp_path / name / "model.safetensors")

    def are_equal(weights_a, weights_b):
        same_keys = weights_a.keys() == weights_b.keys()
        return same_keys and all(torch.equal(weights_a[key], weights_b[key]) for key in weights_a)

    whole_weights = weights("whole")
    assert are_equal(whole_weights, weights("again"))
    assert not are_equal(whole_weights, weights("other", seed=1))

    run_stage = small_teacher.run_stage

    def interrupted(stage, inputs, **options):
        if inputs.index == 1:
            raise KeyboardInterrupt
        return run_stage(stage, inputs, **options)

    monkeypatch.setattr(small_teacher, "run_stage", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights("cut")
    monkeypatch.setattr(small_teacher, "run_stage", run_stage)
    assert are_equal(whole_weights, weights("cut", resume=True))


def test_it_stops_when_it_is_perfect(tmp_path, text, small, monkeypatch):
    monkeypatch.setattr(module, "NEEDED", dict.fromkeys(module.NEEDED, 0.0))
    metrics = train_teacher(tmp_path / "run", tokens="1M", data=text)
    assert metrics["outcome"] == "perfect"
    assert [result["name"] for result in metrics["rounds"]] == ["context-64-round-0", "context-128-round-1"]


def test_perfect_asks_every_task_and_context():
    def scores(worst):
        return {"copy": {64: {"accuracy": 1.0}}, "passkey": {128: {"accuracy": 1.0}, 256: {"accuracy": worst}}}

    assert is_perfect(scores(0.98)) and not is_perfect(scores(0.97)) and is_perfect(scores(0.94), 0.95)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "3"], "has 4 to 8 layers, not 3"),
        (["--tokens", "many"], "--tokens is 'many'"),
        (["--tokens", "0"], "--tokens is '0'"),
        (["--out", "{here}"], "holds something other than a run of Subquad"),
    ],
)
def test_bad_options_are_one_sentence(options, message, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    options = [option.format(here=tmp_path) for option in options]
    result = CliRunner().invoke(app, ["train-teacher", "--out", str(tmp_path / "run"), *options])
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_replaced_unasked(tmp_path, text, small):
    train_teacher(tmp_path / "run", tokens=2048, data=text)
    with pytest.raises(UserError, match="earlier run"):
        train_teacher(tmp_path / "run", tokens=2048, data=text)


def test_the_shipped_teacher_scores_what_its_metrics_say():
    metrics = json.loads((ASSET / "metrics.json").read_text())
    teacher = load_pretrained(str(ASSET))
    assert (ASSET / "model.safetensors").stat().st_size <= 12_000_000
    rows = 24
    for task, by_context in metrics["retrieval"].items():
        for context in {"128", "256"} & by_context.keys():  # none of the tasks it does not learn
            probe = make_probe(task, teacher.tokenizer, int(context), rows, seed=7)
            accuracy = retrieval(teacher.model, {task: {int(context): probe}})[task][int(context)]["accuracy"]
            saved_accuracy = by_context[context]["accuracy"]
            assert accuracy == pytest.approx(saved_accuracy, abs=0.1), (task, context)
