"""Images as training data, and the stages that train students on them."""

from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from subquad.data.batch import ImageBatch
from subquad.data.image_sources import InMemoryImages, read_idx
from subquad.data.images import ImageSet, load_images
from subquad.distill import loop
from subquad.distill.loop import StageInputs, make_pass, run_stage
from subquad.distill.throughput import bare_forward_speed
from subquad.errors import UserError
from subquad.model.image_student import ImageStudent
from subquad.model.interface import shapes_of
from subquad.model.output_head import OutputHead, check_head, final_hidden
from subquad.plan import Plan
from subquad.recipes.stage import Stage
from tests.helpers import assert_same_bits, encoder, hidden, mixed_plan, weights, write_idx

T = 17  # a class token and 4 x 4 patches
STAGE = dict(name="images", tokens=6 * 4 * T, sequence_length=T, batch=4, lr=1e-3, trainable="all", checkpoint_every=2)


def processor(size=32, **options):
    return ViTImageProcessorPil(size={"height": size, "width": size}, **options)


@pytest.fixture(autouse=True)
def _one_pass_of_the_bare_teacher(monkeypatch):
    monkeypatch.setattr(loop, "bare_forward_speed", partial(bare_forward_speed, seconds=0.0))


def picture_set(count=24):
    """Images of noise around the colour of their class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    noise = torch.randint(0, 60, (count, 3, 32, 32), generator=generator)
    pixels = (noise + 50 * labels[:, None, None, None]).to(torch.uint8)
    parts = {part: InMemoryImages(pixels, labels) for part in ("train", "selection", "test")}
    return ImageSet(parts, list("abcd"), (32, 32))


def classifier(family="vit"):
    return encoder(family, AutoModelForImageClassification, num_labels=4)


def train(out, objective, teacher, *, corpus=None, student=None, resume=False, **changes):
    plan = Plan.by_layer(shapes_of(teacher), [1], "gated_deltanet", {"bidirectional": True})
    torch.manual_seed(1)
    student = student or ImageStudent.from_teacher(teacher, plan)
    student.calibrate(picture_set().heldout(8).pixels_BCHW)
    stage = Stage(**{**STAGE, "objective": objective, **changes})
    inputs = StageInputs(teacher, corpus or picture_set(), Accelerator(cpu=True))
    result = run_stage(stage, inputs, student=student, out=out, resume=resume)
    return student, result


OBJECTIVES = {
    "matrix": "matrix",
    "mixer_output": "mixer_output",
    "block_output": "block_output",
    "bridge": "bridge",
    "features": "features",
    "sum": {"features": 1.0, "mixer_output": 0.1, "bridge": 0.1},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_encoders_learn(objective, tmp_path):
    teacher = encoder("dinov2_with_registers")
    _, result = train(tmp_path, OBJECTIVES[objective], teacher, tokens=40 * 4 * T, lr=3e-4)
    assert result.final_loss < result.first_loss and result.tokens == 40 * 4 * T


@pytest.mark.parametrize("objective", ["logits", "labels", {"labels": 1.0, "logits": 0.5}], ids=str)
def test_classifiers_learn(objective, tmp_path):
    _, result = train(tmp_path, objective, classifier(), tokens=40 * 4 * T)
    assert result.final_loss < 0.9 * result.first_loss


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2"])
def test_losses_are_those_of_the_models_answers(family):
    teacher = classifier(family)
    check_head(teacher)
    student = ImageStudent.from_teacher(teacher, mixed_plan(teacher))
    batch = picture_set().heldout(6)
    stage = Stage(**{**STAGE, "objective": {"labels": 1.0, "logits": 1.0}})
    parts = make_pass(stage, student, teacher)(batch, 1.0)
    with torch.no_grad():
        student_BV, teacher_BV = student(batch.pixels_BCHW).logits, teacher(batch.pixels_BCHW).logits
        torch.testing.assert_close(OutputHead.of(student)(final_hidden(student, batch.pixels_BCHW))[:, 0], student_BV)
    labels = torch.nn.functional.cross_entropy(student_BV, batch.labels_B)
    kl = (teacher_BV.softmax(-1) * (teacher_BV.log_softmax(-1) - student_BV.log_softmax(-1))).sum(-1).mean()
    torch.testing.assert_close(parts["labels"], labels)
    torch.testing.assert_close(parts["logits"], kl)


def test_features_are_the_last_hidden_states():
    teacher = encoder("vit")
    student = ImageStudent.from_teacher(teacher, mixed_plan(teacher))
    batch = picture_set().heldout(3)
    parts = make_pass(Stage(**STAGE, objective="features", loss="squared"), student, teacher)(batch, 1.0)
    with torch.no_grad():
        distance = (hidden(student, batch.pixels_BCHW) - hidden(teacher, batch.pixels_BCHW)).square().mean()
    torch.testing.assert_close(parts["features"], distance)


def test_an_all_attention_student_has_nothing_to_learn():
    """Of the bridge's sources too: what stands in the middle for the mixers stands there in the teacher's queries."""
    teacher = encoder("dinov2_with_registers")
    student = ImageStudent.from_teacher(teacher, Plan.all_attention(shapes_of(teacher))).requires_grad_(True)
    parts = make_pass(Stage(**STAGE, objective="features"), student, teacher)(picture_set().heldout(3), 1.0)
    assert parts["features"] < 1e-5
    retention = Plan.by_layer(shapes_of(teacher), [], "retention", {"bidirectional": True})
    student = ImageStudent.from_teacher(teacher, retention)
    training_pass = make_pass(Stage(**STAGE, objective="bridge", teacher_forced=True), student, teacher)
    for name, part in training_pass.bridge.maps.items():  # the identity, nearly: silu(x + 100) - 100
        torch.nn.init.eye_(part[0].weight), torch.nn.init.eye_(part[2].weight)
        torch.nn.init.constant_(part[0].bias, 100.0), torch.nn.init.constant_(part[2].bias, -100.0)
        assert name.split("_")[1] in ("queries", "keys")
    parts = training_pass(picture_set().heldout(3), 1.0)
    assert max(parts.values()) < 1e-6


def test_resumed_is_uninterrupted(tmp_path):
    teacher, objective = classifier(), {"labels": 1.0, "bridge": 0.5}
    student, _ = train(tmp_path / "whole", objective, teacher)

    class Stopping:
        def batch(self, step, **kwargs):
            if step == 5:
                raise KeyboardInterrupt
            return picture_set().batch(step, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", objective, teacher, corpus=Stopping())
    resumed, _ = train(tmp_path / "cut", objective, teacher, resume=True)
    assert_same_bits(weights(student), weights(resumed))


def test_objectives_that_have_no_head_are_refused(tmp_path):
    with pytest.raises(UserError, match="'logits', and ViTModel ends with its hidden states: choose features"):
        train(tmp_path, "logits", encoder("vit"))
    with pytest.raises(ValueError, match="cannot be teacher_forced with 'features'"):
        Stage(**STAGE, objective="features", teacher_forced=True)


def test_idx_files(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {part: (rng.integers(0, 256, (20, 28, 28)), np.arange(20) % 5) for part in ("train", "t10k")}
    for part, (pixels, labels) in arrays.items():
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", pixels)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    image_set = load_images(str(tmp_path), processor(28, do_normalize=False), channels=1)
    assert [len(image_set.parts[part]) for part in ("train", "selection", "test")] == [18, 2, 20]
    test = image_set.heldout(20)
    torch.testing.assert_close(test.pixels_BCHW[:, 0] * 255, torch.tensor(arrays["t10k"][0]).float())
    assert test.labels_B.tolist() == arrays["t10k"][1].tolist() and image_set.classes == ["0", "1", "2", "3", "4"]
    labels_N = torch.cat([image_set.batch(step, batch=6).labels_B for step in range(3)])
    assert sorted(labels_N.tolist()) == sorted(image_set.parts["train"].labels_N.tolist())  # each once an epoch
    wide = load_images(str(tmp_path), processor())
    assert wide.heldout(2).pixels_BCHW.shape == (2, 3, 32, 32) and -1.01 < wide.heldout(2).pixels_BCHW.min() < -0.5
    subset, other_subset = (load_images(str(tmp_path), processor(), max_images=9, seed=seed) for seed in (0, 1))
    assert [len(part) for part in subset.parts.values()] == [9, 2, 20] and subset.sha256 == wide.sha256
    pixels = [images.parts["train"].pixels_NCHW for images in (subset, other_subset, wide)]
    assert not torch.equal(pixels[0], pixels[1]) and all(any(torch.equal(x, y) for y in pixels[2]) for x in pixels[0])
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"damaged")
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz is damaged or no idx file"):
        read_idx(tmp_path / "train-images-idx3-ubyte.gz")
    with pytest.raises(UserError, match="21 images are wanted of the part 'test', which has 20"):
        image_set.heldout(21)


def test_folders_by_class(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for label, colour in (("dark", 20), ("light", 220)):
        (tmp_path / "images" / "train" / label).mkdir(parents=True)
        for number in range(10):
            picture = Image.new("RGB", (40 + number, 36), (colour, colour, colour))
            picture.save(tmp_path / "images" / "train" / label / f"{number}.png")
    reader = processor(image_mean=[0.4, 0.5, 0.6])
    image_set = load_images(str(tmp_path / "images"), reader)
    assert image_set.classes == ["dark", "light"] and [len(part) for part in image_set.parts.values()] == [16, 2, 2]
    batch = image_set.batch(0, batch=16)
    assert batch.pixels_BCHW.shape == (16, 3, 32, 32)
    assert torch.equal(batch.pixels_BCHW.mean((1, 2, 3)) > 0, batch.labels_B == 1)
    pictures = [row["image"] for row in image_set.parts["test"].rows]
    expected_BCHW = reader(pictures, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(image_set.heldout(2).pixels_BCHW, expected_BCHW)  # of the processor, stored as bytes
    with pytest.raises(UserError, match="no image set can be read from '.*nothing'"):
        load_images(str(tmp_path / "nothing"), processor())
    with pytest.raises(UserError, match="images of various sizes: give it a height and a width"):
        load_images(str(tmp_path / "images"), ViTImageProcessorPil(size={"shortest_edge": 32}))


def test_a_batch_is_cut_as_a_tensor_is():
    batch = ImageBatch(torch.randn(5, 1, 2, 2), torch.arange(5))
    assert [len(part) for part in batch.chunk(2)] == [3, 2] and batch[1:3].labels_B.tolist() == [1, 2]
    assert batch.to(torch.device("cpu")).tolist() == batch.tolist() and batch.device.type == "cpu"
