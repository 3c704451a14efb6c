"""Transformers' own model tests, run on students.

The source distribution of transformers has the tests that each of its models must pass (`ModelTesterMixin`). It is
downloaded once for the installed version, by pip and as pip is set up, into Subquad's cache folder; where that cannot
be had, the tests are skipped.

Notable:
- Tests of exporting and of generation are not in the distribution, so empty classes stand in for these two imports.
- A test that cannot hold for a student is in `EXCEPTIONS`, with the reason. All others pass or skip themselves.
"""

import importlib
import importlib.util
import re
import subprocess
import sys
import tarfile
import types
import unittest
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
import transformers.testing_utils
from transformers import AutoModelForImageClassification

from subquad.model.image_student import ImageStudent
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.utils.files import build_once, cache_dir
from tests.helpers import encoder, tiny

PACKAGE = "transformers_suite"  # name under which the downloaded tests are imported
STAND_INS = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
FILE = "test_modeling_common.py"
LAYERS = 2

# name of a test -> why it cannot hold for a student, or for one of images
EXCEPTIONS = {
    "test_generation_tester_mixin_inheritance": "asks for the tests of generation, which are not in the distribution",
}
EAGER_EXCEPTIONS = {
    "test_sdpa_can_dispatch_non_composite_models": "asks for sdpa; this student was saved with its teacher's eager",
}
REPLACED_EXCEPTIONS = {
    "test_capture_outputs_decorator": "asks for attention weights, which a student refuses where it has mixers",
}
IMAGE_EXCEPTIONS = {
    "test_model_get_set_embeddings": "asks for a token embedding, which an image encoder does not have",
}


def mixed_plan(shapes, names=("attention", "hedgehog", "gla"), **options):
    """One layer divided by heads between attention and two mixers, and one that has a mixer only."""
    first = {name: [*range(start, 6, 3)] for start, name in enumerate(names)}
    mixers = {"attention": {}, **dict.fromkeys(names[1:], options)}
    return Plan(shapes=shapes, mixers=mixers, layers=[first, {names[1]: [*range(6)]}])


TEXT_PLANS = {
    "attention": Plan.all_attention,
    "mixed": mixed_plan,
    "discrete_mamba2": partial(Plan.by_layer, attention_layers=[], mixer="discrete_mamba2"),
    "gated_deltanet": partial(Plan.by_layer, attention_layers=[], mixer="gated_deltanet"),
}


def make_student(name):
    """A student of two layers, as many as these tests allow."""
    if name == "images":
        teacher = encoder("vit", AutoModelForImageClassification, num_hidden_layers=LAYERS, num_labels=4)
        names = ("attention", "discrete_mamba2", "gated_deltanet")
        return ImageStudent.from_teacher(teacher, mixed_plan(shapes_of(teacher), names, bidirectional=True))
    teacher = tiny("llama", num_hidden_layers=LAYERS)
    if name == "attention":
        teacher.set_attn_implementation("eager")  # which computes attention weights, as some tests ask
    return Student.from_teacher(teacher, TEXT_PLANS[name](shapes_of(teacher)))


class Inputs:
    """Model tester, as transformers' tests call it: a student's configuration, and small inputs."""

    batch_size, num_hidden_layers, hidden_size, num_attention_heads = 3, LAYERS, 48, 6
    is_training = True

    def __init__(self, student):
        self.student = student
        self.seq_length = 17 if isinstance(student, ImageStudent) else 7  # 17: 16 patches and a class token

    def prepare_config_and_inputs_for_common(self):
        config = type(self.student.config).from_dict(self.student.config.to_dict())  # as it is read from a file
        if isinstance(self.student, ImageStudent):
            return config, {"pixel_values": torch.randn(self.batch_size, 3, 32, 32)}
        input_ids = torch.randint(3, 97, (self.batch_size, self.seq_length))
        return config, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def download(folder: Path) -> None:
    """Puts the tests of the installed version of transformers into `folder`."""
    isolation = (
        ["--no-build-isolation"] if importlib.util.find_spec("setuptools") else []
    )  # else pip fetches it as well
    wanted = f"transformers=={transformers.__version__}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers", *isolation]
    patience = ["--retries", "1", "--timeout", "20", "--quiet"]
    subprocess.run(
        [*command, *patience, "--dest", str(folder), wanted], check=True, capture_output=True, text=True, timeout=300
    )
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            _, _, inside = member.name.partition("/")
            if member.isfile() and inside.startswith("tests/") and inside.endswith(".py"):
                member.name = inside
                tar.extract(member, folder, filter="data")
    archive.unlink()
    assert (folder / "tests" / FILE).is_file(), f"{wanted} has no {FILE}"


@pytest.fixture(scope="module")
def model_tester_mixin(pytestconfig):
    """Class with transformers' tests of every model."""
    pytest.importorskip("parameterized", reason="parameterized, which these tests import, is not installed")
    try:
        folder = build_once(cache_dir() / f"transformers-tests-{transformers.__version__}", download)
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        pytest.skip(f"the source of transformers {transformers.__version__} cannot be downloaded: {lines[-1]}")
    for file in (folder / "tests" / FILE, Path(transformers.testing_utils.__file__)):
        for mark in {*re.findall(r"\bmark\.(\w+)", file.read_text(encoding="utf-8"))}:
            pytestconfig.addinivalue_line("markers", f"{mark}: of transformers")  # pytest knows ours only
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder / "tests")]
    sys.modules[PACKAGE] = package
    for name, stand_in in STAND_INS.items():
        module = types.ModuleType(f"{PACKAGE}.{name}")
        setattr(module, stand_in, type(stand_in, (), {}))
        sys.modules[f"{PACKAGE}.{name.partition('.')[0]}"] = types.ModuleType(name)
        sys.modules[module.__name__] = module
    return importlib.import_module(f"{PACKAGE}.{Path(FILE).stem}").ModelTesterMixin


def student_tests(mixin, student):
    """Test case of transformers for this student."""

    class StudentTests(mixin, unittest.TestCase):
        all_model_classes = (type(student),)
        model_tester = Inputs(student)
        has_attentions = not student.replaced_layers()  # mixers have no attention weights to return
        test_resize_embeddings = isinstance(student, Student)

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=False)
            if (
                return_labels
            ):  # the lists of classes from which these tests know the kind of labels are transformers' own
                inputs["labels"] = inputs["input_ids"] if "input_ids" in inputs else torch.arange(Inputs.batch_size)
            return inputs

    return StudentTests


@pytest.mark.parametrize(
    "name",
    [
        "attention",
        "mixed",
        pytest.param("discrete_mamba2", marks=pytest.mark.slow),
        pytest.param("gated_deltanet", marks=pytest.mark.slow),
        "images",
    ],
)
def test_a_student_passes_the_tests_of_transformers(name, model_tester_mixin):
    student = make_student(name)
    cases = student_tests(model_tester_mixin, student)
    names = unittest.TestLoader().getTestCaseNames(cases)
    exceptions = EXCEPTIONS | (REPLACED_EXCEPTIONS if student.replaced_layers() else EAGER_EXCEPTIONS)
    exceptions |= IMAGE_EXCEPTIONS if name == "images" else {}
    unknown = exceptions.keys() - {*names}
    assert not unknown, f"transformers has no such tests: {sorted(unknown)}"
    result = unittest.TestResult()
    unittest.TestSuite(cases(test) for test in names if test not in exceptions).run(result)
    assert all(reason for _, reason in result.skipped)
    failures = [f"{test}: {text.splitlines()[-1]}" for test, text in result.failures + result.errors]
    assert result.testsRun > 100
    assert not failures, "\n".join(failures)
