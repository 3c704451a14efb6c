"""What is trained is never lost: it is saved before it is measured, and a resumed run measures it again."""

import json

import pytest

from subquad.distill.loop import StageRun
from subquad.errors import UserError
from subquad.jobs import convert, train_vit
from subquad.model.student import Student
from subquad.recipes.schema import Recipe
from subquad.utils.files import sha256_of_file
from tests.helpers import RECIPE, write_pictures

# All weights are trained, and the head is untied and tied again: the saved weights are those of no checkpoint
SETTINGS = RECIPE | {
    "tied_embeddings": "retie",
    "selector": {"by": "fixed", "budget": "1", "options": {"layers": [1]}},
    "stages": [RECIPE["stages"][1] | {"trainable": "all"}],
    "evaluate": {"contexts": [16], "rows": 2, "retrieval": {"tasks": []}, "prompts": []},
}


def fail(error):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "contexts"), [(KeyboardInterrupt(), [16]), (RuntimeError("no memory"), [8])], ids=repr
)
def test_a_student_that_cannot_be_measured_is_saved(
    error, contexts, teacher_folder, text, tmp_path, monkeypatch, capsys
):
    """Resumed, it is measured without a training step; what is measured may change, what is trained may not."""
    out, weights = tmp_path / "run", tmp_path / "run" / "model.safetensors"
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(convert, "evaluate_models", fail(error))
        convert.convert(teacher_folder, Recipe(**SETTINGS), out, data=text)
    said = " ".join(capsys.readouterr().out.split())
    assert f"trained student is saved in {out}: --resume measures it again, without training" in said
    hash_before, log_before = sha256_of_file(weights), (out / "log.jsonl").read_text()
    assert Student.from_pretrained(out).plan.attention_layers == [1]
    assert not (out / "metrics.json").exists() and not [*out.glob("*.tmp")]

    monkeypatch.setattr(StageRun, "step", fail(AssertionError("a training step")))
    with pytest.raises(UserError, match=r"other settings .* \(only 'evaluate' may differ\)"):
        convert.convert(teacher_folder, Recipe(**SETTINGS | {"seed": 1}), out, data=text, resume=True)
    settings = SETTINGS | {"evaluate": SETTINGS["evaluate"] | {"contexts": contexts}}
    convert.convert(teacher_folder, Recipe(**settings), out, data=text, resume=True)
    metrics = json.loads((out / "metrics.json").read_text())
    assert sha256_of_file(weights) == hash_before == metrics["sha256"]["model.safetensors"]
    assert (out / "log.jsonl").read_text() == log_before
    assert metrics["tokens"] == {"logits": 256} and metrics["student"]["kl"].keys() == {str(*contexts)}
    assert (out / "report.html").is_file() and (out / "README.md").is_file()


def test_a_report_that_fails_loses_no_measurement(teacher_folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "write_report", fail(ValueError("no fonts")))
    with pytest.raises(ValueError, match="no fonts"):
        convert.convert(teacher_folder, Recipe(**SETTINGS), tmp_path / "run", data=text)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["student"]["kl"]


def test_a_teacher_trained_from_nothing_is_saved_before_it_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(train_vit.SmallVit, "measure", fail(RuntimeError("no such kernel")))
    with pytest.raises(RuntimeError, match="no such kernel"):
        train_vit.train_vit(write_pictures(tmp_path), tmp_path / "vit", epochs=0.5)
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "vit").iterdir()}


def test_a_held_out_text_that_is_too_short_is_said_before_training(teacher_folder, text, tmp_path):
    settings = SETTINGS | {"evaluate": SETTINGS["evaluate"] | {"contexts": [100_000]}}
    with pytest.raises(UserError, match="held out for test"):
        convert.convert(teacher_folder, Recipe(**settings), tmp_path / "run", data=text)
    assert not (tmp_path / "run" / "log.jsonl").exists()
