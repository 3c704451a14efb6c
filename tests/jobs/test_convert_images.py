"""Conversions of image models: to a folder that transformers loads, by the same command as for text."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification
from typer.testing import CliRunner

from subquad.cli.app import app
from subquad.data.batch import ImageBatch
from subquad.errors import UserError
from subquad.evaluate import image_fidelity
from subquad.jobs import convert, evaluate
from subquad.jobs.cache_teacher import cache_teacher
from subquad.jobs.conversion import checked_recipe
from subquad.jobs.train_vit import train_vit
from subquad.model.base import plan_of
from subquad.model.image_student import ImageStudent
from subquad.model.saliency import SaliencyConfig, SaliencyModel, saliency_distance
from subquad.plan import Plan
from subquad.pretrained.load import load_pretrained
from subquad.recipes.load import load_recipe, recipe_names
from subquad.report import write_report
from subquad.report.run_files import read_run
from subquad.results.metrics import Metrics
from subquad.results.record import check_written
from tests.helpers import encoder, saved, write_pictures

T = 17  # a class token and 4 x 4 patches
QUICK = [f"stages.{stage}.{key}" for stage in ("bridge", "distill") for key in (f"tokens={8 * 4 * T}", "batch=4")]
QUICK += ["evaluate.rows=20", "data.heldout_fraction=0.1"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    model = encoder("vit", AutoModelForImageClassification, num_labels=4)
    return saved(tmp_path_factory.mktemp("teachers") / "vit", model)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("teachers") / "dinov2", encoder("dinov2_with_registers"))


@pytest.fixture(scope="module")
def converted(classifier_folder, pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "vit"
    changes = [argument for change in QUICK for argument in ("--set", change)]
    arguments = ["convert", classifier_folder, "--task", "image-classification", "--data", pictures, "--out", str(out)]
    result = CliRunner().invoke(app, [*arguments, *changes, "--budget", "1"])
    assert result.exit_code == 0, result.output
    return out


def test_a_classifier_becomes_a_student(converted):
    metrics = json.loads((converted / "metrics.json").read_text())
    check_written(Metrics, metrics)
    student, teacher, untrained = (metrics[name]["images"] for name in ("student", "teacher", "untrained"))
    assert teacher["kl"] == teacher["distance"] == 0 and teacher["agreement"] == 1 and teacher["count"] == 20
    assert 0 < student["kl"] < untrained["kl"] and 0 <= student["accuracy"] <= 1
    assert metrics["stages"][0]["tokens"] == 8 * 4 * T and "window" not in metrics
    assert any(line.startswith("training against none: won on 20 images") for line in metrics["verdicts"])
    assert metrics["text"][0]["sha256"] and metrics["student"]["attention_layers"] == [1]
    card = (converted / "README.md").read_text()
    assert (
        "pipeline_tag: image-classification" in card and "AutoModelForImageClassification, AutoImageProcessor" in card
    )
    page = (converted / "report.html").read_text()
    assert "Held-out images" in page and "same class as the teacher" in page and "Perplexity" not in page


@pytest.mark.slow
def test_the_folder_loads_with_transformers(converted, pictures):
    """In a new process, by the auto classes; and an image of another size works."""
    program = (
        "import torch\nfrom transformers import AutoImageProcessor, AutoModelForImageClassification\n"
        f"model = AutoModelForImageClassification.from_pretrained({str(converted)!r}, trust_remote_code=True)\n"
        f"processor = AutoImageProcessor.from_pretrained({str(converted)!r})\n"
        "torch.manual_seed(0)\npixels = torch.randn(2, 3, 32, 32)\n"
        "print(type(model).__name__, processor.size['height'], *model(pixels).logits.shape,\n"
        "      *model(torch.randn(1, 3, 64, 48)).logits.shape, model(pixels).logits.sum().item())\n"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    name, *numbers, total = process.stdout.split()
    assert name == "ImageStudent" and numbers == ["32", "2", "4", "1", "4"]
    torch.manual_seed(0)
    with torch.no_grad():
        expected = ImageStudent.from_pretrained(converted)(torch.randn(2, 3, 32, 32)).logits.sum().item()
    assert float(total) == pytest.approx(expected, rel=1e-4)


def test_it_is_measured_again(converted, capsys):
    run_metrics = json.loads((converted / "metrics.json").read_text())
    metrics = evaluate.evaluate_model(converted, json_path=converted / "eval.json")
    check_written(Metrics, metrics)
    for measure, value in run_metrics["student"]["images"].items():
        assert metrics["student"]["images"][measure] == pytest.approx(value, rel=1e-4, abs=1e-6)  # float32
    write_report(converted)
    assert read_run(converted).evaluation.student.images.count == 20
    result = CliRunner().invoke(app, ["eval", str(converted)])
    assert result.exit_code == 0 and "20 held-out images" in result.output and "Held-out text" not in result.output


@pytest.mark.parametrize("name", [name for name in recipe_names() if load_recipe(name).task != "text-generation"])
def test_every_recipe_of_images_runs(name, classifier_folder, encoder_folder, pictures, tmp_path):
    recipe = load_recipe(name, [*QUICK, "data.max_images=20"])
    teacher = classifier_folder if recipe.task == "image-classification" else encoder_folder
    convert.convert(teacher, recipe, tmp_path / "run", data=[pictures])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [stage["name"] for stage in metrics["stages"]] == [stage.name for stage in recipe.stages]


def test_an_encoder_becomes_a_student_by_its_features(encoder_folder, pictures, tmp_path):
    recipe = load_recipe("cab-features-quick", QUICK)
    student = convert.convert(encoder_folder, recipe, tmp_path / "run", data=[pictures])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["student"]["images"]["distance"] < metrics["untrained"]["images"]["distance"]
    assert "kl" not in metrics["student"]["images"] and not student.config.classifies
    checkpoint = load_pretrained(str(tmp_path / "run"), task="image-feature-extraction")
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(checkpoint.model(pixels).last_hidden_state, student(pixels).last_hidden_state)
    assert AutoImageProcessor.from_pretrained(tmp_path / "run").size == checkpoint.reader.size


def test_an_interrupted_run_goes_on(classifier_folder, pictures, tmp_path, monkeypatch):
    recipe = load_recipe("cab-vision-quick", QUICK)
    whole_student = convert.convert(classifier_folder, recipe, tmp_path / "whole", data=[pictures])
    stages = convert.train_stages

    def interrupt(*args, scope, **options):
        if scope == "plan":
            stages(*args, scope=scope, **options)
            raise KeyboardInterrupt
        return stages(*args, scope=scope, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert, "train_stages", interrupt)
        convert.convert(classifier_folder, recipe, tmp_path / "cut", data=[pictures])
    resumed_student = convert.convert(classifier_folder, recipe, tmp_path / "cut", data=[pictures], resume=True)
    for parameter, resumed_parameter in zip(whole_student.parameters(), resumed_student.parameters(), strict=True):
        assert torch.equal(parameter, resumed_parameter)


def test_a_dry_run_writes_nothing(classifier_folder, pictures, tmp_path):
    changes = [argument for change in QUICK for argument in ("--set", change)]
    arguments = ["convert", classifier_folder, "--task", "image-classification", "--data", pictures, "--dry-run"]
    result = CliRunner().invoke(app, [*arguments, *changes, "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    assert "36 images of 17 tokens" in result.output and "nothing was written" in result.output
    assert not (tmp_path / "run").exists()


def test_a_smaller_student_of_its_own(classifier_folder, pictures, tmp_path):
    changes = [*QUICK, "student.changes.num_hidden_layers=2", "student.start=teacher"]
    student = convert.convert(
        classifier_folder, load_recipe("cab-vision-quick", changes), tmp_path / "run", data=[pictures]
    )
    assert student.plan.num_layers == 2 and student.config.classifies


REFUSED = {
    "no data": (None, [], "image-classification needs one set of images: name it with --data"),
    "selector": ("pictures", ["selector.by=kl"], "selector 'kl' measures on text, and the recipe is for image"),
    "budget": ("pictures", ["selector.budget=1MiB@1k"], "a model of images has neither: give a number of layers"),
    "tied": ("pictures", ["tied_embeddings=untie"], "tied_embeddings is of language models"),
    "cache": (
        "pictures",
        ["stages.distill.objective=logits", "stages.distill.teacher_cache=x"],
        "teacher_cache, which holds answers to text",
    ),
    "direction": ("pictures", ["mixer.options.bidirectional=false"], "looks back only, and ViTForImageClassification"),
    "task": ("pictures", ["task=image-feature-extraction"], "is no image encoder without a head but a ViTFor"),
    "selector's name": ("pictures", ["selector.by=uniforn"], "unknown selector 'uniforn'"),
    "tokens": ("pictures", ["data.max_tokens=1k"], "data.max_tokens counts text: give data.max_images"),
    "tasks": ("pictures", ["evaluate.tasks=[arc_easy]"], "evaluate.tasks are of language models"),
    "rows": ("pictures", ["evaluate.rows=21"], "21 images are wanted of the part 'test', which has 20"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case, classifier_folder, pictures, tmp_path):
    data, changes, message = REFUSED[case]
    recipe = load_recipe("cab-vision-quick", [*QUICK, *changes])
    with pytest.raises(UserError, match=message):
        convert.convert(classifier_folder, recipe, tmp_path / "run", data=data and [pictures])


def test_teachers_of_images_are_checked(classifier_folder, encoder_folder, tmp_path):
    with pytest.raises(UserError, match="no default teacher for image-classification"):
        load_pretrained(task="image-classification")
    with pytest.raises(UserError, match="is no model for image classification but a Dinov2WithRegistersModel"):
        load_pretrained(encoder_folder, task="image-classification")
    with pytest.raises(UserError, match="is no causal language model but a ViTForImageClassification"):
        load_pretrained(classifier_folder)
    encoder("vit", AutoModelForImageClassification, num_labels=2).save_pretrained(tmp_path)
    assert load_pretrained(str(tmp_path), task="image-classification").reader.size["height"] == 32  # the model's own


def test_too_many_classes(pictures, tmp_path):
    folder = saved(tmp_path / "two", encoder("vit", AutoModelForImageClassification, num_labels=2))
    with pytest.raises(UserError, match="has 4 classes, and two has 2"):
        convert.convert(folder, load_recipe("cab-vision-quick", QUICK), tmp_path / "run", data=[pictures])


def test_likeness_is_what_it_says(pictures, classifier_folder):
    """Against arithmetic on the models' own answers, with one image unlabelled, in batches that do not divide."""
    teacher = load_pretrained(classifier_folder, task="image-classification").model
    shapes = plan_of(teacher).shapes
    plan = Plan.by_layer(shapes, [0], "gla", {"bidirectional": True})
    student = ImageStudent.from_teacher(teacher, plan)
    pixels, labels = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, -100, 3])
    fidelity = image_fidelity(
        {"student": student}, teacher, [ImageBatch(pixels[:3], labels[:3]), ImageBatch(pixels[3:], labels[3:])]
    )["student"]
    with torch.no_grad():
        student_logprobs, teacher_logprobs = (model(pixels).logits.log_softmax(-1) for model in (student, teacher))
    kl = (teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)).sum(-1)
    is_correct = (student_logprobs.argmax(-1) == labels)[labels >= 0].float()
    assert fidelity["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert fidelity["samples"] == pytest.approx(kl.tolist(), rel=1e-3, abs=1e-6)
    assert fidelity["kl_stderr"] == pytest.approx(kl.std().item() / 5**0.5, rel=1e-3)
    assert fidelity["accuracy"] == pytest.approx(is_correct.mean().item()) and fidelity["count"] == 5
    is_same_class = student_logprobs.argmax(-1) == teacher_logprobs.argmax(-1)
    assert fidelity["agreement"] == pytest.approx(is_same_class.float().mean().item())


def test_a_small_vit_learns(pictures, tmp_path):
    metrics = train_vit(pictures, tmp_path / "vit", epochs=60, size=32, patch=8)
    assert metrics["accuracy"] > 0.5 and metrics["train_images"] == 39 and metrics["test_images"] == 20
    teacher = load_pretrained(str(tmp_path / "vit"), task="image-classification")
    assert (
        teacher.model.config.num_labels == 4 and "% on 20 test images" in (tmp_path / "vit" / "README.md").read_text()
    )
    with pytest.raises(UserError, match="32 pixels are not cut into patches of 5"):
        train_vit(pictures, tmp_path / "other", size=32, patch=5)


def saliency_teacher():
    torch.manual_seed(0)
    backbone = encoder("dinov2_with_registers")
    model = SaliencyModel(SaliencyConfig(encoder_config=backbone.config.to_dict(), widths=(8, 4)))
    model.encoder.load_state_dict(backbone.state_dict())
    return model.eval().requires_grad_(False)


def test_a_saliency_model_is_converted_by_its_map(pictures, tmp_path):
    folder = saved(tmp_path / "teacher", saliency_teacher())
    changes = [*QUICK, "stages.distill.objective=saliency", f"stages.distill.tokens={40 * 4 * T}"]
    recipe = load_recipe("cab-features-quick", changes)
    student = convert.convert(folder, recipe, tmp_path / "run", data=[pictures])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["teacher"]["images"]["saliency"] == 0
    assert 0 < metrics["student"]["images"]["saliency"] < metrics["untrained"]["images"]["saliency"]
    loaded_student = AutoModel.from_pretrained(tmp_path / "run")
    pixels = torch.randn(2, 3, 64, 48)  # another size
    with torch.no_grad():
        assert torch.equal(loaded_student(pixels).saliency, student(pixels).saliency)
    assert loaded_student(pixels).saliency.shape == (2, 64, 48)


def test_the_map_is_of_the_pixels_that_the_patches_are_of():
    model = saliency_teacher()
    flat = torch.zeros(1, 3, 32, 32)
    spot = flat.clone()
    spot[..., :8, 24:] = 4.0  # one patch, in the corner
    hidden = [model(pixels).last_hidden_state for pixels in (flat, spot)]
    changed_hidden = hidden[0].clone()
    changed_hidden[:, 5 + 3] = hidden[1][:, 5 + 3]  # five tokens are no patches; the fourth patch of the first row
    change = (model.decode(changed_hidden, (32, 32)) - model.decode(hidden[0], (32, 32)))[0].abs()
    assert change[:8, 24:].mean() > 10 * change[16:, :16].mean()


def test_a_map_is_nothing_away_from_itself():
    map_BHW = torch.randn(2, 5, 5)
    assert saliency_distance(map_BHW, map_BHW).abs() < 1e-6
    other_BHW = torch.randn(2, 5, 5)
    p, q = map_BHW.sigmoid(), other_BHW.sigmoid()
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(saliency_distance(other_BHW, map_BHW), kl.mean())


def test_models_without_a_map_are_refused(encoder_folder, pictures, tmp_path):
    recipe = load_recipe("cab-features-quick", [*QUICK, "stages.distill.objective=saliency"])
    with pytest.raises(
        UserError, match="'saliency', and Dinov2WithRegistersModel makes no saliency map: choose features"
    ):
        convert.convert(encoder_folder, recipe, tmp_path / "run", data=[pictures])


def test_a_recipe_of_images_has_no_logits_to_cache(tmp_path):
    """It is rejected before the teacher is loaded or the folder is claimed."""
    with pytest.raises(UserError, match="only a language model's logits can be cached.* image-classification"):
        cache_teacher("nowhere", load_recipe("cab-vision-quick"), tmp_path / "cache", data=["nothing"])
    assert not (tmp_path / "cache").exists()


def test_text_has_no_images():
    with pytest.raises(UserError, match="data.max_images counts images, and the recipe is for text"):
        checked_recipe(load_recipe("quick", ["data.max_images=5"]), "default", None)
