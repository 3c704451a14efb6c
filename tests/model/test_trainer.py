"""transformers' Trainer on students: the teacher's losses and gradients where nothing is replaced, and resuming."""

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
)

from subquad.model.image_student import ImageStudent
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.plan import Plan
from tests.helpers import GROUPED, encoder, tiny


class Rows(torch.utils.data.Dataset):
    """Rows of 12 random tokens, the first few of which have no label."""

    def __len__(self):
        return 12

    def __getitem__(self, row):
        ids = torch.randint(3, 97, (12,), generator=torch.Generator().manual_seed(row))
        labels = torch.where(torch.arange(12) < row % 5, -100, ids)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class Images(torch.utils.data.Dataset):
    """Images of noise, and their classes."""

    def __len__(self):
        return 4

    def __getitem__(self, row):
        pixels = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(row))
        return {"pixel_values": pixels, "labels": row}


def trainer(model, folder, data=None, **settings):
    settings = {"max_steps": 2, "save_strategy": "no", "learning_rate": 1e-2, **settings}
    args = TrainingArguments(
        folder, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True,
        disable_tqdm=True, **settings,
    )  # fmt: skip
    data = data or Rows()
    return Trainer(copy.deepcopy(model).requires_grad_(True).train(), args, train_dataset=data, eval_dataset=data)


def numbers(model, folder, **settings):
    """Loss and gradient norm of each step, and the loss of the evaluation after them."""
    session = trainer(model, folder, **settings)
    session.train()
    steps = [step[key] for step in session.state.log_history for key in ("loss", "grad_norm") if key in step]
    return [*steps, session.evaluate()["eval_loss"]]


def all_attention(teacher):
    return Student.from_teacher(teacher, Plan.all_attention(shapes_of(teacher)))


@pytest.mark.parametrize(
    "settings",
    [
        {"label_smoothing_factor": 0.1},
        {"gradient_accumulation_steps": 2},
        {"activation_checkpointing": True},
        {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2, "activation_checkpointing": True},
    ],
    ids=lambda settings: ", ".join(settings),
)
def test_an_all_attention_student_trains_as_its_teacher(settings, tmp_path):
    teacher = tiny("llama")
    expected = numbers(teacher, tmp_path, **settings)
    assert len(expected) == 5
    assert numbers(all_attention(teacher), tmp_path, **settings) == pytest.approx(expected, abs=1e-6, rel=0)


def test_an_image_student_trains_as_its_teacher(tmp_path):
    teacher = encoder("vit", AutoModelForImageClassification, num_labels=4)
    student = ImageStudent.from_teacher(teacher, Plan.all_attention(shapes_of(teacher)))
    # The class token is in the middle of its attention, so sums round in another order.
    settings = {"data": Images(), "label_smoothing_factor": 0.1, "learning_rate": 1e-4}
    expected = numbers(teacher, tmp_path, **settings)
    assert numbers(student, tmp_path, **settings) == pytest.approx(expected, abs=1e-6, rel=1e-6)


def test_the_loss_is_the_backbones():
    teacher = tiny("llama")
    student = all_attention(teacher)
    ids = torch.randint(3, 97, (2, 12))
    assert student.loss_type == teacher.loss_type == "ForCausalLM"
    student.loss_function = lambda logits, labels, **kwargs: logits.sum()
    assert student(ids, labels=ids).loss == student(ids).logits.sum()
    teacher.accepts_loss_kwargs = False
    assert all_attention(teacher).accepts_loss_kwargs is False


@torch.no_grad()
def test_a_mixture_of_experts_keeps_its_auxiliary_loss():
    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", **GROUPED, num_local_experts=4, sliding_window=None)
    teacher = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(3, 97, (2, 12))
    student = all_attention(teacher)
    plain_loss = teacher(ids, labels=ids).loss
    teacher.config.output_router_logits = student.config.output_router_logits = True
    expected, output = (model(ids, labels=ids) for model in (teacher, student))
    assert output.loss == expected.loss != plain_loss and output.aux_loss == expected.aux_loss > 0


@pytest.mark.parametrize("tie", [True, False])
def test_a_trainers_checkpoint_resumes_bit_by_bit(tie, tmp_path):
    teacher = tiny("llama", tie_word_embeddings=tie)
    student = Student.from_teacher(teacher, Plan.by_layer(shapes_of(teacher), [1], "gla"))
    sessions = [trainer(student, tmp_path, save_strategy="steps", save_steps=1) for _ in range(2)]
    sessions[0].train()
    sessions[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    expected = sessions[0].model.state_dict()
    assert not torch.equal(expected["backbone.lm_head.weight"], student.state_dict()["backbone.lm_head.weight"])
    for model in (sessions[1].model, loaded):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert (head.weight is embedding.weight) == tie
