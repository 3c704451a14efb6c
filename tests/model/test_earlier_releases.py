"""Folders saved by releases before 0.2, whose code file imports students from modules that have moved."""

import subprocess
import sys

import pytest
import torch

from subquad.model.base import REMOTE_FILE
from subquad.model.image_student import ImageStudent
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.plan import Plan
from tests.helpers import encoder, mixed_plan, tiny

PROGRAM = """
import sys, torch
from transformers import {auto_class}
model = {auto_class}.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, model({inputs})[0].sum().item())
"""


def text_student():
    teacher = tiny("llama")
    return Student.from_teacher(teacher, Plan.by_layer(shapes_of(teacher), [1], "gla"))


def image_student():
    teacher = encoder("vit")
    return ImageStudent.from_teacher(teacher, mixed_plan(teacher))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "code", "auto_class", "inputs"),
    [
        (
            text_student,
            "from subquad.student import Student, StudentConfig  # noqa: F401\n",
            "AutoModelForCausalLM",
            "torch.arange(3, 11)[None]",
        ),
        (
            image_student,
            "from subquad.images import ImageStudent, ImageStudentConfig  # noqa: F401\n",
            "AutoModel",
            "torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)",
        ),
    ],
    ids=["text", "images"],
)
def test_a_folder_of_an_earlier_release_loads(make, code, auto_class, inputs, tmp_path):
    """In a new process that does not import Subquad, with trust_remote_code."""
    student = make()
    student.save_pretrained(tmp_path)
    assert (tmp_path / REMOTE_FILE).read_text() != code
    (tmp_path / REMOTE_FILE).write_text(code)
    program = PROGRAM.format(auto_class=auto_class, inputs=inputs)
    process = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    name, total = process.stdout.split()
    with torch.no_grad():
        expected = student(eval(inputs))[0].sum().item()
    assert name == type(student).__name__ and float(total) == pytest.approx(expected, rel=1e-4, abs=1e-3)
