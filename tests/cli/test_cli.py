"""The command line and the package's front door: what is passed on, how commands end, and what importing costs."""

import errno
import importlib
import subprocess
import sys
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from unittest.mock import ANY, create_autospec

import pytest
import torch
from typer.testing import CliRunner

import subquad
from subquad.cli.app import app
from subquad.errors import UserError
from subquad.recipes.load import load_recipe, recipe_names
from tests.helpers import tiny

ROOT = Path(__file__).parents[2]
COMMANDS = [
    "convert",
    "select",
    "distill",
    "eval",
    "bench",
    "generate",
    "report",
    "cache-teacher",
    "train-teacher",
    "train-vit",
    "plan",
    "compare",
    "recipe",
    "env",
]


def python(code: str, *arguments: object) -> str:
    """Run code in a new interpreter; its output."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def run(monkeypatch):
    """run("convert --seed 3") -> result, with sys.argv as a shell would set it."""

    def run(*arguments: str):
        monkeypatch.setattr(sys, "argv", ["subquad", *arguments])
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments, prog_name="subquad")

    return run


@pytest.fixture
def called(monkeypatch):
    """called("convert") -> a stand-in for the function that a command calls, with the signature of the real one."""

    def called(name: str, module: str = "subquad.jobs.convert"):
        real = importlib.import_module(module)
        stand_in = create_autospec(getattr(real, name))
        monkeypatch.setattr(real, name, stand_in)
        return stand_in

    return called


def test_help_needs_no_heavy_import():
    code = """
import sys
from typer.testing import CliRunner
from subquad.cli.app import app
for command in [[], *([name] for name in sys.argv[1:])]:
    result = CliRunner().invoke(app, [*command, "--help"])
    assert result.exit_code == 0, result.output
print(sorted({"torch", "transformers", "matplotlib", "datasets", "accelerate", "numpy"} & set(sys.modules)))
"""
    assert python(code, *COMMANDS).strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command, run):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"subquad {command} " in result.output.partition("Examples:")[2]


def test_help_names_every_command_and_recipe(run):
    assert all(command in run("--help").output for command in COMMANDS)
    assert all(name.removesuffix("-quick") in run("convert", "--help").output for name in recipe_names())


def test_help_names_every_mixer(run):
    from subquad.mixers import MIXERS

    assert all(name in run("convert", "--help").output for name in MIXERS if name != "attention")


def test_version(run):
    assert run("--version").output == f"subquad {subquad.__version__}\n"


def test_convert_passes_on_what_was_asked(run, called):
    convert = called("convert")
    result = run(
        *"convert some/teacher --data a.txt --data b --budget 25% --mixer gla --set stages.0.tokens=50k".split(),
        *"--seed 3 --out there --resume --allow-pickle".split(),
    )
    assert result.exit_code == 0, result.output
    changes = ["selector.budget=25%", "mixer.name=gla", "stages.0.tokens=50k", "seed=3"]
    convert.assert_called_once_with(
        teacher="some/teacher",
        recipe=load_recipe("quick", changes),
        out=Path("there"),
        resume=True,
        overwrite=False,
        plan=None,
        data=["a.txt", "b"],
        allow_pickle=True,
        trust_remote_code=False,
        command="subquad convert some/teacher --data a.txt --data b --budget 25% --mixer gla "
        "--set stages.0.tokens=50k --seed 3 --out there --resume --allow-pickle",
    )


def test_convert_defaults_to_the_teacher_and_name_of_the_recipe(run, called, tmp_path):
    convert = called("convert")
    (tmp_path / "mine.yaml").write_text("{extends: quick, teacher: some/teacher}")
    assert run("convert", "--recipe", str(tmp_path / "mine.yaml")).exit_code == 0
    assert convert.call_args.kwargs["teacher"] == "some/teacher"
    assert convert.call_args.kwargs["out"] == Path("runs/mine")
    assert convert.call_args.kwargs["data"] is None


def test_distill_is_convert_with_a_plan(run, called):
    convert = called("convert")
    assert run("distill", "--plan", "plan.yaml", "--out", "there").exit_code == 0
    assert convert.call_args.kwargs["plan"] == Path("plan.yaml")
    assert run("distill").exit_code == 2


@pytest.mark.parametrize("command", [["convert"], ["distill", "--plan", "mine.yaml"]])
def test_a_dry_run_is_a_preview(command, run, called):
    convert, dry_run = called("convert"), called("dry_run", "subquad.jobs.dry_run")
    result = run(*command, *"some/teacher --out there --data a.txt --set seed=3 --dry-run".split())
    assert result.exit_code == 0, result.output
    dry_run.assert_called_once_with(
        teacher="some/teacher",
        recipe=load_recipe("quick", ["seed=3"]),
        out=Path("there"),
        plan=Path("mine.yaml") if "--plan" in command else None,
        data=["a.txt"],
        allow_pickle=False,
        trust_remote_code=False,
    )
    convert.assert_not_called()


def test_a_dry_run_that_is_interrupted_has_nothing_to_resume(run, called):
    called("dry_run", "subquad.jobs.dry_run").side_effect = KeyboardInterrupt
    result = run("convert", "--dry-run")
    assert (result.exit_code, result.stderr) == (130, "\nsubquad: stopped\n")


def test_select_passes_on_what_was_asked(run, called):
    select = called("select", "subquad.jobs.select")
    result = run(*"select --by uniform --budget 4 --mixer gla --out here.yaml".split())
    assert result.exit_code == 0, result.output
    recipe = select.call_args.kwargs["recipe"]
    assert (recipe.selector.by, recipe.selector.budget, recipe.mixer.name) == ("uniform", "4", "gla")
    assert select.call_args.kwargs["out"] == Path("here.yaml")


def test_eval_prints_a_table(run, called, tmp_path):
    evaluate, print_table = called("evaluate_model", "subquad.jobs.evaluate"), called("print_table", "subquad.report")
    command = "eval folder --teacher default --data a.txt --tasks arc_easy,my.jsonl --limit 9 --set evaluate.rows=3"
    result = run(*f"{command} --json {tmp_path}/made/numbers.json".split())
    assert result.exit_code == 0, result.output
    evaluate.assert_called_once_with(
        "folder",
        teacher="default",
        data=["a.txt"],
        tasks=["arc_easy", "my.jsonl"],
        limit=9,
        changes=["evaluate.rows=3"],
        json_path=tmp_path / "made/numbers.json",
        console=ANY,
        command=f"subquad {command} --json {tmp_path}/made/numbers.json",
    )
    assert run("eval", "folder", "--json", str(tmp_path)).exit_code == 2, "found out before anything is measured"
    assert print_table.call_args.args[0] is evaluate.return_value


def test_generate_prints_the_text(run, called):
    generate = called("generate", "subquad.jobs.generate")
    generate.return_value = " and so on"
    result = run("generate", "folder", "Once", "-n", "5", "--temperature", "0.5", "--seed", "1", "--chat")
    assert result.output == " and so on\n"
    generate.assert_called_once_with("folder", "Once", max_new_tokens=5, temperature=0.5, seed=1, chat=True)


def test_report_prints_where_it_is(run, called):
    write_report = called("write_report", "subquad.report")
    write_report.return_value = Path("there/report.html")
    assert run("report", "there").output == "there/report.html\n"
    write_report.assert_called_once_with(Path("there"), out=None)
    assert run("report", "one", "other").exit_code == 0
    write_report.assert_called_with(Path("one"), Path("other"), out=Path("report.html"))


def test_env_prints_versions_and_settings_without_secrets(run, monkeypatch):
    def version(package: str) -> str:
        if package in ("lm-eval", "triton", "flash-linear-attention"):
            raise PackageNotFoundError(package)
        return real_version(package)

    real_version = metadata.version
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    result = run("env")
    assert result.exit_code == 0, result.output
    rows = dict(line.split(":", 1) for line in result.output.splitlines())
    values = {label: value.strip() for label, value in rows.items()}
    assert values["subquad"] == subquad.__version__ and values["torch"] == torch.__version__
    assert values["lm-eval"] == values["triton"] == "not installed"
    assert {"commit", "transformers", "Python", "OS", "processor", "cores", "memory", "GPUs"} <= values.keys()
    assert (values["MALLOC_ARENA_MAX"], values["HF_HUB_OFFLINE"]) == ("2", "1")
    assert "secret" not in result.output and "TOKEN" not in result.output


def test_a_users_mistake_is_one_line_and_code_2(run):
    result = run("convert", "--recipe", "quik")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("subquad: unknown recipe 'quik': did you mean 'quick'?")
    assert result.stderr.count("\n") == 1


def test_a_users_mistake_found_deep_inside_is_code_2(run, called):
    called("generate", "subquad.jobs.generate").side_effect = UserError("no such model")
    result = run("generate", "folder", "Once")
    assert (result.exit_code, result.stderr) == (2, "subquad: no such model\n")


def test_our_fault_is_code_1(run, called):
    called("generate", "subquad.jobs.generate").side_effect = ZeroDivisionError
    assert run("generate", "folder", "Once").exit_code == 1


@pytest.mark.parametrize("already", [[], ["--resume"], ["--overwrite"]])
def test_interrupted_says_how_to_go_on(already, run, called):
    called("convert").side_effect = KeyboardInterrupt
    result = run("convert", *already, "--out", "my runs/a")
    assert result.exit_code == 130
    assert "\n  subquad convert --out 'my runs/a' --resume\n" in result.stderr


@pytest.mark.parametrize(
    "command, name, module",
    [
        (["generate", "folder", "Once"], "generate", "subquad.jobs.generate"),
        (["eval", "folder"], "evaluate_model", "subquad.jobs.evaluate"),
        (["bench", "folder"], "bench", "subquad.bench.measure"),
    ],
)
def test_interrupted_where_there_is_nothing_to_go_on_from(command, name, module, run, called):
    called(name, module).side_effect = KeyboardInterrupt
    result = run(*command)
    assert (result.exit_code, result.stderr) == (130, "\nsubquad: stopped\n")


def test_a_full_disk_is_not_our_fault(run, called):
    called("convert").side_effect = OSError(errno.ENOSPC, "No space left on device", "runs/quick/log.jsonl")
    result = run("convert")
    assert result.exit_code == 2
    assert "disk is full" in result.stderr and "runs/quick/log.jsonl" in result.stderr and "--resume" in result.stderr
    assert "Traceback" not in result.stderr


# The front door ------------------------------------------------------------------------------------------------------


def test_every_public_name_is_there():
    for name in subquad.__all__:
        assert getattr(subquad, name).__module__.startswith("subquad"), name
    with pytest.raises(AttributeError, match="no attribute 'student_from'"):
        subquad.student_from  # noqa: B018


def test_importing_subquad_is_light():
    assert python("import sys, subquad; print('torch' in sys.modules or 'transformers' in sys.modules)") == "False\n"


@pytest.fixture(scope="module")
def student_folder(tmp_path_factory):
    from subquad import Plan, Student
    from subquad.model.interface import shapes_of

    teacher = tiny("llama")
    shapes = shapes_of(teacher)
    plan = Plan.by_layer(shapes, attention_layers=[1, 2], mixer="gla", options={})
    folder = tmp_path_factory.mktemp("student")
    student = Student.from_teacher(teacher, plan)
    student.save_pretrained(folder)
    return folder, student(input_ids=torch.arange(8)[None]).logits.sum().item()


@pytest.mark.parametrize(
    "imports",
    [
        "import subquad\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport subquad",
        "import subquad.model.cache\nfrom transformers import AutoModelForCausalLM",
        pytest.param(
            "import transformers, subquad\nfrom transformers import AutoTokenizer, AutoModelForCausalLM",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "import subquad\nfrom transformers.models.llama import LlamaForCausalLM\n"
            "from transformers import AutoModelForCausalLM",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_auto_classes_know_students_in_every_import_order(imports, student_folder):
    folder, total = student_folder
    code = f"""
{imports}
import sys, torch
from subquad import registration
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not any(isinstance(finder, registration._Watch) for finder in sys.meta_path), "still watching"
print(type(model).__name__, model(input_ids=torch.arange(8)[None]).logits.sum().item())
"""
    name, value = python(code, folder).split()
    assert name == "Student"
    assert float(value) == pytest.approx(total, rel=1e-4)
