"""Models that are not sound, and measurements that fail: everything else is still measured, said and shown."""

import copy
import io
import json
import math

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from subquad.cli.app import app
from subquad.data.probes import Probe, make_probe
from subquad.data.text import load_corpus
from subquad.errors import UserError
from subquad.evaluate import answers, likelihood, paired_gain, retrieval, samples, suite
from subquad.evaluate.images import _Answer, _compared
from subquad.evaluate.suite import evaluate_models
from subquad.jobs.baselines import verdicts
from subquad.jobs.evaluate import evaluate_model
from subquad.pretrained.load import load_pretrained
from subquad.recipes.schema import Recipe
from subquad.report import print_table, write_report
from subquad.report.compare import compare_runs
from subquad.results.metrics import Metrics
from subquad.results.record import check_written
from tests.helpers import RECIPE, byte_tokenizer, tiny

SMALL = [
    "evaluate.contexts=[8,24]",
    "evaluate.rows=2",
    "evaluate.max_new_tokens=4",
    *(f"evaluate.retrieval.{key}" for key in ("tasks=[copy,associative]", "contexts=[32]", "count=2")),
]


def rows_of(count=3, length=24, tokens=97):
    return torch.randint(3, tokens, (count, length), generator=torch.Generator().manual_seed(0))


def padded(model, tokens):
    """The same model with rows of embedding and head that no token uses, and that are not small."""
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(tokens, mean_resizing=False)
    with torch.no_grad():
        larger.get_output_embeddings().weight[model.config.vocab_size :] = 1.0
    return larger


def without_numbers(model):
    """A model whose logits are NaN."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_output_embeddings().weight[5] = torch.nan
    return broken


@pytest.fixture(scope="module")
def folders(teacher_folder, tmp_path_factory):
    """Folders of models with the teacher's tokenizer, by name."""
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder)
    models = {"padded": padded(teacher, 104), "broken": without_numbers(teacher)}
    paths = {}
    for name, model in models.items():
        paths[name] = str(tmp_path_factory.mktemp(name))
        model.save_pretrained(paths[name])
        AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(paths[name])
    return paths


# Heads of different sizes.


@pytest.mark.parametrize("larger", ["teacher", "student"])
def test_heads_of_other_sizes_are_compared_on_the_rows_that_both_have(larger):
    models = {"teacher": tiny("llama"), "student": tiny("qwen3")}
    heldout = rows_of()
    with torch.no_grad():
        logits = {name: model(heldout).logits.double().log_softmax(-1) for name, model in models.items()}
    models[larger] = padded(models[larger], 104)
    scores = likelihood({"student": models["student"]}, models["teacher"], heldout, [24])
    kl = F.kl_div(logits["student"], logits["teacher"], log_target=True, reduction="none").sum(-1).mean().item()
    assert scores["student"]["kl"][24] == pytest.approx(kl, rel=1e-4)
    for name in models:
        nll = F.nll_loss(logits[name][:, :-1].flatten(0, 1), heldout[:, 1:].flatten()).item()
        assert scores[name]["cross_entropy"][24] == pytest.approx(nll, rel=1e-4)
    same = (logits["student"].argmax(-1) == logits["teacher"].argmax(-1)).double().mean().item()
    assert scores["student"]["top1"][24] == pytest.approx(same)


def test_a_padded_copy_of_the_teacher_is_its_equal(folders, teacher_folder, text):
    for model, teacher in ((folders["padded"], teacher_folder), (teacher_folder, folders["padded"])):
        metrics = evaluate_model(model, teacher=teacher, data=text, changes=SMALL)
        assert metrics["student"]["kl"] == {"8": 0.0, "24": 0.0}
        assert metrics["unmeasured"] == []


def test_models_of_other_tokenizers_are_refused_before_anything_is_measured(
    monkeypatch, teacher_folder, text, tmp_path
):
    small = tiny("llama", vocab_size=60)
    small.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(tmp_path)
    monkeypatch.setattr(suite, "likelihood", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(UserError, match=r"the token [89]\d, and the model 'student' knows 60 tokens"):
        evaluate_model(tmp_path, teacher=teacher_folder, data=text, changes=SMALL)


# Logits that are not finite.


def test_a_teacher_that_forbids_tokens_has_a_finite_kl():
    teacher, student, heldout = tiny("llama"), tiny("qwen3"), rows_of(tokens=40)
    teacher.lm_head.bias = torch.nn.Parameter(torch.zeros(97).index_fill(0, torch.arange(40, 60), -torch.inf))
    scores = likelihood({"student": student}, teacher, heldout, [24])["student"]
    with torch.no_grad():
        p, q = (model(heldout).logits.double().log_softmax(-1) for model in (teacher, student))
    kl = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1).mean().item()
    assert scores["kl"][24] == pytest.approx(kl, rel=1e-4) and math.isfinite(scores["kl_stderr"][24])
    forbidding = likelihood({"student": teacher}, student, heldout, [24])["student"]
    assert forbidding["kl"][24] == math.inf and math.isnan(forbidding["kl_stderr"][24])
    assert math.isfinite(forbidding["cross_entropy"][24])
    heads = [_Answer(torch.zeros(3, 1, 2), logits[:, 0].float()) for logits in (q, p)]
    expected = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)[:, 0]
    torch.testing.assert_close(_compared(*heads, torch.zeros(3))["kl"], expected.float(), rtol=1e-4, atol=1e-5)


def test_nan_stays_in_the_row_of_its_model():
    teacher, good, heldout = tiny("llama"), tiny("qwen3"), rows_of()
    scores = likelihood({"broken": without_numbers(good), "good": good}, teacher, heldout, [8, 24])
    alone = likelihood({"good": good}, teacher, heldout, [8, 24])
    assert scores["good"] == alone["good"] and scores["teacher"] == alone["teacher"]
    broken = scores["broken"]
    for measure in ("kl", "kl_stderr", "top1", "cross_entropy", "perplexity"):
        assert math.isnan(broken[measure][24]), measure
    assert math.isnan(broken["buckets"][24]["kl"]) and all(map(math.isnan, broken["kl_samples"][24]))
    gain = paired_gain(broken["kl_samples"][24], alone["good"]["kl_samples"][24])
    assert math.isnan(gain.mean) and math.isnan(gain.stderr)
    samples = {
        name: {"kl_samples": scores[key]["kl_samples"]} for name, key in (("student", "broken"), ("untrained", "good"))
    }
    assert verdicts(samples, [8, 24]) == [
        "training against none: undecided at 8 tokens, as a KL is not finite",
        "training against none: undecided at 24 tokens, as a KL is not finite",
    ]


def test_an_answer_of_no_numbers_is_not_right():
    ids = torch.full((2, 8), 5)  # the token whose logit is NaN, which is the largest to argmax
    mask = torch.zeros(2, 8, dtype=torch.bool).index_fill(1, torch.tensor([7]), True)
    score = answers(without_numbers(tiny("llama")), Probe(ids, mask, torch.tensor([6, 6]))).score()
    assert score["accuracy"] == 0 and math.isnan(score["logprob"])


def test_a_model_of_no_numbers_is_measured_written_and_shown(folders, teacher_folder, text, tmp_path):
    file = tmp_path / "run" / "eval.json"
    metrics = evaluate_model(folders["broken"], teacher=teacher_folder, data=text, changes=SMALL, json_path=file)
    check_written(Metrics, metrics)
    written = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert written == metrics
    assert metrics["student"]["kl"] == {"8": None, "24": None} and metrics["student"]["perplexity"]["24"] is None
    assert all(math.isfinite(value) for value in metrics["teacher"]["perplexity"].values())
    assert metrics["student"]["retrieval"]["copy"]["32"]["accuracy"] == 0
    assert metrics["student"]["cache_bytes"] == metrics["teacher"]["cache_bytes"] and metrics["samples"]
    said = (
        "student: kl at 8 and 7 more numbers are not finite: its logits are no numbers, or forbid a token of the text"
    )
    assert metrics["unmeasured"] == [said]

    # The table, the page and a comparison
    console = Console(file=io.StringIO(), width=200)
    print_table(metrics, console)
    assert said in console.file.getvalue()
    (tmp_path / "run" / "recipe.yaml").write_text(Recipe(**RECIPE).to_yaml())
    (tmp_path / "run" / "metrics.json").write_text(file.read_text())
    assert said in write_report(tmp_path / "run").read_text()
    assert compare_runs(tmp_path / "run", tmp_path / "run").results is not None


def test_lengths_are_those_of_the_settings():
    """All of a table of 40 positions is measured, and nothing beyond."""
    model, tokenizer = tiny("gpt2", n_positions=40, vocab_size=258), byte_tokenizer()
    scores = likelihood({"student": model}, model, rows_of(length=40), [8, 40])
    assert scores["student"]["kl"] == {8: 0.0, 40: 0.0} and math.isfinite(scores["teacher"]["cross_entropy"][40])
    probes = {"copy": {40: make_probe("copy", tokenizer, 40, 3)}}
    assert math.isfinite(retrieval(model, probes)["copy"][40]["logprob"])
    assert samples(model, tokenizer, ["w" * 30], max_new_tokens=10)[0]["text"] is not None


# Measurements that fail.


@pytest.fixture
def evaluation(teacher_folder, text):
    """Runs the evaluation of a teacher, a student and a baseline."""
    teacher = load_pretrained(teacher_folder)
    models = {"student": copy.deepcopy(teacher.model), "window": copy.deepcopy(teacher.model)}
    config = Recipe(**RECIPE).evaluate.model_copy(deep=True)
    config.retrieval.tasks = ["copy", "associative"]
    corpus = load_corpus(text, teacher.tokenizer)
    return models, lambda: evaluate_models(models, teacher, corpus, config, "float32")


def fail_for(model, plain):
    """`plain`, which fails for calls with this model."""

    def measure(*args, **kwargs):
        given = [value for arg in args for value in (arg.values() if isinstance(arg, dict) else [arg])]
        if any(value is model for value in given):
            raise RuntimeError("out of luck\nand more")
        return plain(*args, **kwargs)

    return measure


@pytest.mark.parametrize("name", ["likelihood", "retrieval", "paired_samples"])
def test_a_measurement_that_fails_loses_no_other(monkeypatch, evaluation, name):
    models, evaluate = evaluation
    whole = evaluate()
    assert whole["unmeasured"] == []
    monkeypatch.setattr(suite, name, fail_for(models["student"], getattr(suite, name)))
    metrics = evaluate()
    check_written(Metrics, json.loads(json.dumps(metrics)))
    lost = {
        "likelihood": ["student: held-out text"],
        "retrieval": [f"student: retrieval of {task} at 32 tokens" for task in ("copy", "associative")],
        "paired_samples": ["samples"],
    }[name]
    assert metrics["unmeasured"] == [f"{what} could not be measured (RuntimeError: out of luck)" for what in lost]
    if name == "likelihood":
        assert "kl" not in metrics["student"] and metrics["student"]["retrieval"] == whole["student"]["retrieval"]
        assert verdicts(metrics, [16, 48]) == []
    elif name == "retrieval":
        assert metrics["student"]["retrieval"] == {"copy": {}, "associative": {}}
        assert metrics["student"]["kl"] == whole["student"]["kl"]
    else:
        assert metrics["samples"] == [] and metrics["student"] == whole["student"]
    assert metrics["teacher"] == whole["teacher"] and metrics["window"] == whole["window"]
    print_table(metrics, Console(file=io.StringIO()))


def test_an_evaluation_that_measures_nothing_fails(monkeypatch, evaluation):
    _, evaluate = evaluation
    for name in ("likelihood", "retrieval", "paired_samples"):
        monkeypatch.setattr(suite, name, lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate()


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_no_failure_of_a_measurement(monkeypatch, evaluation, interrupt):
    def stop(*_, **__):
        raise interrupt

    _, evaluate = evaluation
    monkeypatch.setattr(suite, "retrieval", stop)
    with pytest.raises(interrupt):
        evaluate()


@pytest.mark.parametrize("prompt", ["w1 \ud83d w2", "w1 \udcff w2"], ids=ascii)
def test_a_prompt_with_broken_characters_is_continued(teacher_folder, prompt):
    teacher, fixed = load_pretrained(teacher_folder), "w1 \ufffd w2"
    broken, whole = (samples(teacher.model, teacher.tokenizer, [text], 4) for text in (prompt, fixed))
    assert broken == whole and broken[0]["prompt"] == fixed
    results = [CliRunner().invoke(app, ["generate", teacher_folder, text, "-n", "4"]) for text in (prompt, fixed)]
    assert results[0].exit_code == 0 and results[0].stdout == results[1].stdout
    assert "subquad: the prompt has broken characters, which are read as U+FFFD" in results[0].stderr
    assert "broken" not in results[1].stderr


def test_classifiers_with_other_classes_have_no_kl():
    few, many = (_Answer(torch.randn(4, 1, 3), torch.randn(4, classes).log_softmax(-1)) for classes in (5, 7))
    measures = _compared(few, many, torch.zeros(4))
    assert "kl" not in measures and {"agreement", "distance"} <= measures.keys()
