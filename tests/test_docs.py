"""The Python examples of the documentation run, in order, page by page."""

import re
import shutil
from pathlib import Path
from typing import get_args
from unittest.mock import patch

import pytest

from subquad.data.probes import PROBE_TASKS
from subquad.jobs.convert import convert
from subquad.mixers import MIXERS
from subquad.recipes.load import load_recipe, recipe_names
from subquad.recipes.schema import ProbeTask, Recipe
from subquad.recipes.stage import Objective
from subquad.select import SELECTORS
from tests.helpers import RECIPE, converted_classifier, make_teacher, make_text

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def examples(page: Path) -> str:
    """All Python blocks of a page, as one program."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The folder that `make convert` leaves, here a tiny one."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("teacher", "text"):
        (folder / name).mkdir()
    teacher, text = make_teacher(folder / "teacher"), make_text(folder / "text")
    convert(teacher, Recipe(**RECIPE), folder / "run", data=text)
    return folder / "run"


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)], ids=lambda page: page.name)
def test_examples_run(page, tiny_run, tmp_path, monkeypatch):
    program = examples(page)
    if "harness(" in program:
        pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install -e '.[eval]'")
    if "runs/quick" in program:
        shutil.copytree(tiny_run, tmp_path / "runs" / "quick")
    if "runs/cab-vision-quick" in program:
        converted_classifier(tmp_path / "runs" / "cab-vision-quick")
    monkeypatch.chdir(tmp_path)
    with patch.dict(MIXERS):  # an example may add one
        exec(compile(program, str(page), "exec"), {"__name__": "__main__"})


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_index_has_every_page():
    index = ROOT / "docs" / "README.md"
    links = re.findall(r"\]\(([^)#]+)", index.read_text(encoding="utf-8"))
    linked = {(index.parent / link).resolve() for link in links}
    assert {*index.parent.rglob("*.md")} - {index} <= linked
    assert ROOT / "examples" / "README.md" in linked and ROOT / "CONTRIBUTING.md" in linked


def test_the_tree_of_the_documentation_is_the_package():
    tree = (ROOT / "docs" / "README.md").read_text(encoding="utf-8").split("```")[1]
    package, _, _ = tree.partition("\nexamples/")
    folders = set(re.findall(r"^  (\w+)/", package, re.MULTILINE))
    assert folders == {path.parent.name for path in (ROOT / "subquad").glob("*/__init__.py")}
    named, folder = set(), ""
    for line in package.splitlines()[2:]:
        folder = match[1] if (match := re.match(r"  (\w+)/", line)) else "" if re.match(r"  \w", line) else folder
        entries = re.match(r"\s+((?:\w+\.py(?:, )?)*)", line)[1]
        named |= {Path(folder) / name for name in entries.split(", ") if name}
    assert len(named) > 12 and all((ROOT / "subquad" / name).is_file() for name in named), sorted(named)
    assert set(re.findall(r"^(\w+)/", tree, re.MULTILINE)) == {"subquad", "examples", "benchmarks", "tests"}


def test_recipes_of_the_documentation(tmp_path):
    pages = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("recipes.md", "select.md")]
    page, blocks = pages[0], re.findall(r"^```yaml\n(.*?)^```", "\n".join(pages), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 5
    for number, block in enumerate(blocks):
        (tmp_path / f"{number}.yaml").write_text(block, encoding="utf-8")
        assert load_recipe(tmp_path / f"{number}.yaml").stages
    assert all(f"`{name}`" in page for name in recipe_names() if not name.startswith("quick") and "-quick" not in name)
    assert all(f"| `{name}` |" in page for name in get_args(Objective))


def test_every_selector_is_in_the_documentation():
    page = (ROOT / "docs" / "select.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in SELECTORS)
    options = {name for selector in SELECTORS.values() for name in selector.model_fields}
    assert all(f"`{name}`" in page for name in options - {"layers"})


def test_every_retrieval_task_is_in_the_documentation():
    page = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")
    assert set(get_args(ProbeTask)) == set(PROBE_TASKS)
    assert all(f"| `{task}` |" in page for task in PROBE_TASKS)
