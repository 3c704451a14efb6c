"""Image students: exact where nothing is replaced, and bidirectional where something is."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification

from subquad.errors import UserError
from subquad.mixers import MIXERS, mixer_options
from subquad.model.image_student import ImageStudent
from subquad.model.interface import shapes_of
from subquad.model.layer_call import ForwardContext, attending, to_front, to_middle
from subquad.model.student import Student
from subquad.plan import Plan
from tests.helpers import ENCODERS, encoder, hidden, mixed_plan, tiny

CLASSIFIERS = ["vit", "deit", "dinov2", "dinov2_with_registers"]
BOTH_WAYS = [name for name in MIXERS if "bidirectional" in type(mixer_options(name, {})).model_fields]


def images(*, batch=2, size=(32, 32)):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", ENCODERS)
def test_all_attention_is_the_teacher_exactly(family):
    teacher = encoder(family)
    student = ImageStudent.from_teacher(teacher, Plan.all_attention(shapes_of(teacher)))
    assert student.config.prefix_tokens == ENCODERS[family][1]
    torch.testing.assert_close(hidden(student, images()), hidden(teacher, images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ENCODERS)
def test_saved_is_loaded_and_other_sizes_work(family, tmp_path):
    teacher = encoder(family)
    student = ImageStudent.from_teacher(teacher, mixed_plan(teacher))
    student.calibrate(images())
    student.save_pretrained(tmp_path)
    loaded_student = AutoModel.from_pretrained(tmp_path)
    assert type(loaded_student) is ImageStudent
    assert torch.equal(hidden(loaded_student, images()), hidden(student, images()))
    wide_images = images(size=(48, 64))
    assert hidden(loaded_student, wide_images).shape == (2, ENCODERS[family][1] + 6 * 8, 48)
    assert (hidden(student, images()) - hidden(teacher, images())).abs().max() > 0.01


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_classifier_stays_one(family, tmp_path):
    labels = {"num_labels": 4, "id2label": dict(enumerate("abcd")), "label2id": {c: i for i, c in enumerate("abcd")}}
    teacher = encoder(family, AutoModelForImageClassification, **labels)
    student = ImageStudent.from_teacher(teacher, mixed_plan(teacher))
    student.save_pretrained(tmp_path)
    loaded_student = AutoModelForImageClassification.from_pretrained(tmp_path)
    logits = loaded_student(images()).logits
    assert logits.shape == (2, 4) and torch.equal(logits, student(images()).logits)
    assert loaded_student.config.id2label == labels["id2label"]
    assert loaded_student(images(), labels=torch.tensor([0, 3])).loss > 0


@pytest.mark.slow
def test_a_folder_loads_where_subquad_is_not_imported(tmp_path):
    teacher = encoder("vit")
    ImageStudent.from_teacher(teacher, mixed_plan(teacher)).save_pretrained(tmp_path)
    script = (
        "from transformers import AutoModel; import torch;"
        f"m = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True);"
        "print(type(m).__name__, m(torch.zeros(1, 3, 32, 32)).last_hidden_state.shape[1])"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert process.stdout.split() == ["ImageStudent", "17"], process.stderr


@pytest.mark.parametrize("family", ["vit", "dinov2_with_registers"])
def test_teacher_forced_passes_are_the_teachers(family):
    """Restored and observed layers attend, also where prefix tokens are moved to the middle for their mixers."""
    teacher = encoder(family)
    student = ImageStudent.from_teacher(teacher, mixed_plan(teacher))
    mixer_inputs = []

    def observe(call):
        mixer_inputs.extend(call.inputs(name) for name in call.mixers)
        return call.attention()

    restored_hidden = student.final_hidden(images(), forward_context=attending(range(3)))
    observed_hidden = student.final_hidden(images(), forward_context=ForwardContext(around=observe))
    for student_hidden in (restored_hidden, observed_hidden):
        torch.testing.assert_close(student_hidden, hidden(teacher, images()), rtol=1e-5, atol=1e-5)
    assert len(mixer_inputs) == 4  # a mixer, two in the layer where heads differ, and attention


def test_what_is_no_patch_stands_in_the_middle():
    x_BTM = torch.arange(9.0)[None, :, None]
    assert to_middle(x_BTM, 1, 2).flatten().tolist() == [2, 3, 4, 0, 1, 5, 6, 7, 8]
    assert torch.equal(to_front(to_middle(x_BTM, 1, 2), 1, 2), x_BTM) and torch.equal(to_front(x_BTM, 1, 0), x_BTM)


@pytest.mark.parametrize("mixer", BOTH_WAYS)
def test_mixers_look_both_ways(mixer):
    """Every token depends on every patch; a scan in one direction would leave half of them out."""
    teacher = encoder("vit", num_hidden_layers=1)
    student = ImageStudent.from_teacher(teacher, Plan.by_layer(shapes_of(teacher), [], mixer, {"bidirectional": True}))
    pixels = images(batch=1).requires_grad_()
    for token in (0, 1, 8, 16):
        (gradient,) = torch.autograd.grad(hidden(student, pixels)[0, token].square().sum(), pixels)
        patch_gradients = gradient[0].abs().sum(0).unfold(0, 8, 8).unfold(1, 8, 8).sum((-1, -2))
        assert (patch_gradients > 0).all(), token


def test_what_does_not_fit_is_refused():
    teacher = encoder("vit")
    with pytest.raises(UserError, match="mixer 'gla' looks back only, and ViTModel looks both ways: set bidirectional"):
        ImageStudent.from_teacher(teacher, Plan.by_layer(shapes_of(teacher), [], "gla"))
    text_teacher = tiny("llama")
    with pytest.raises(UserError, match="LlamaForCausalLM does not look at images"):
        ImageStudent.from_teacher(text_teacher, Plan.all_attention(shapes_of(text_teacher)))
    with pytest.raises(UserError, match="ViTModel predicts no next token"):
        Student.from_teacher(teacher, Plan.all_attention(shapes_of(teacher)))
