"""A plan in the terminal: every head in its place, the mixers with their options, and bytes against the teacher's."""

import io
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from subquad.cli.app import app
from subquad.plan import AttentionShape, Plan
from subquad.report import print_plan
from subquad.report.plots import MIXER_COLOURS
from subquad.utils import format as fmt
from tests.report.made_up import make_plan

SHAPE = AttentionShape(heads=4, kv_heads=2, head_dim=8, hidden_size=32)


def printed(plan: Plan, width: int = 80, **console) -> str:
    out = io.StringIO()
    print_plan(plan, Console(file=out, width=width, **console), "bfloat16")
    return out.getvalue()


def rows(text: str) -> dict[str, str]:
    """The letters of each head, in the order of the layers, over all bands."""
    found: dict[str, str] = {}
    for line in text.split("\n\n")[0].splitlines():
        if not line.startswith("layer"):
            found[line[:8].strip()] = found.get(line[:8].strip(), "") + line[8:].replace(" ", "")
    return found


def show(*arguments: str):
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, ["plan", "show", *arguments])


@pytest.mark.parametrize("width", [80, 45, 20])
def test_every_head_stands_in_its_place(width):
    plan = make_plan(mixed=True)
    letters = {"attention": "A", "hedgehog": "H", "sliding_window": "S"}
    wanted = ["".join(letters[heads[head]] for heads in plan.head_table()) for head in range(9)]
    text = printed(plan, width)
    assert rows(text) == {f"head {head}": row for head, row in enumerate(wanted)}
    assert all(len(line) <= width for line in text.splitlines())
    ticks = [line.split()[1:] for line in text.splitlines() if line.startswith("layer")]
    assert sum(ticks, []) == ["0", "5", "10", "15", "20", "25"]


def test_layers_whose_heads_agree_are_one_line():
    text = printed(make_plan())
    assert rows(text) == {"": make_plan().pattern()}
    assert " A   attention      15 " in text and "window 64, sinks 4" in text


def test_the_legend_counts_layers_and_heads():
    text = printed(make_plan(mixed=True))
    legend = {line.split()[1]: line.split()[2:4] for line in text.split("\n\n")[1].splitlines()[1:]}
    assert legend == {"attention": ["15", "137"], "hedgehog": ["14", "132"], "sliding_window": ["0", "1"]}


def test_mixers_of_one_initial_get_letters_of_their_own():
    plan = Plan.by_layer([SHAPE] * 4, [0], "gla").with_layers("gated_deltanet", {}, [2]).with_layers("linear", {}, [3])
    assert sorted(rows(printed(plan))[""]) == sorted({*rows(printed(plan))[""]})


def test_layers_may_have_other_numbers_of_heads():
    shapes = [SHAPE, AttentionShape(heads=2, kv_heads=2, head_dim=8, hidden_size=32)]
    plan = Plan.by_head(shapes, [(0, 3), (1, 0)], "linear")
    assert rows(printed(plan)) == {"head 0": "LA", "head 1": "LL", "head 2": "L", "head 3": "A"}


def test_a_parallel_join_is_explained():
    kept = [(0, 1)]
    joined = printed(Plan.by_head([SHAPE], kept, "linear", join="parallel"))
    assert "second branch" in joined and "second branch" not in printed(Plan.by_head([SHAPE], kept, "linear"))
    assert rows(joined) == {"head 0": "L", "head 1": "A", "head 2": "L", "head 3": "L"}


def test_colours_are_those_of_the_pictures():
    red, green, blue = (int(MIXER_COLOURS["attention"][at : at + 2], 16) for at in (1, 3, 5))
    text = printed(make_plan(), force_terminal=True, color_system="truecolor")
    assert f"48;2;{red};{green};{blue}" in text


def test_the_command_gives_bytes_against_all_attention(tmp_path):
    plan = make_plan()
    plan.save(tmp_path / "plan.yaml")
    result = show(str(tmp_path), "--dtype", "bfloat16")
    assert result.exit_code == 0 and result.output.isascii() and "\x1b" not in result.output
    assert result.output == show(str(tmp_path / "plan.yaml"), "--dtype", "bfloat16").output
    table = {line[:17].strip(): line for line in result.output.split("\n\n")[-1].splitlines()}
    teacher = Plan.all_attention(plan.shapes)
    for column, context in enumerate((2048, 8192, 32768, 131072)):
        mine, theirs = (one.cache_bytes(context, dtype="bfloat16") for one in (plan, teacher))
        cells = {name: line[17:].split()[2 * column : 2 * column + 2] for name, line in table.items()}
        assert cells["this plan"] == fmt.size(mine).split() and cells["all attention"] == fmt.size(theirs).split()
        assert table["share"][17:].split()[column] == fmt.percent(mine / theirs)


@pytest.mark.parametrize(
    "given, said",
    [
        (["."], "has no plan.yaml: give a plan file"),
        (["none.yaml"], "there is no plan file at none.yaml"),
        (["plan.yaml", "--dtype", "int8"], "not for dtype 'int8'"),
    ],
)
def test_what_cannot_be_shown_is_one_line(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["subquad"])
    make_plan().save(tmp_path / "plan.yaml" if "plan.yaml" in given else tmp_path / "other.yaml")
    result = show(*given)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr and result.stderr.count("\n") == 1
