"""Pages as a browser shows them, of one run and of several: every picture is drawn, and nothing complains."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from subquad.errors import UserError
from subquad.plan import Plan
from subquad.report import plots, write_report
from subquad.report.overview import draw_overview, overview
from subquad.report.plots import picture, stage_picture
from subquad.report.retrieval_plots import depth_picture
from subquad.report.run_files import read_run
from subquad.utils import format as fmt
from tests.report.made_up import Page, make_metrics, make_plan, make_run

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def rewrite(run: Path, name: str = "metrics.json", **changes) -> None:
    """Changes keys of a JSON file; the student's through a dictionary of its own."""
    found = json.loads((run / name).read_text())
    found["student"] |= changes.pop("student", {})
    (run / name).write_text(json.dumps(found | changes))


def make_bench() -> dict:
    """Two models, measured up to 4k tokens and extrapolated at 8k; nothing is known of the time to the first token."""
    cells = [
        {"measure": measure, "model": model, "batch": 1, "context": context, "measured": context < 8192}
        | ({} if measure == "first_token" else {"tokens_per_second": rate / (1 + context / scale)})
        for measure, rate in (("decode", 20.0), ("prefill", 900.0), ("first_token", 0.0))
        for model, scale in (("teacher", 4096), ("student", 65536))
        for context in (1024, 2048, 4096, 8192)
    ]
    settings = {"batches": [1], "dtype": "float32", "contexts": [1024]}
    return {"models": {"teacher": {}, "student": {}}, "settings": settings, "cells": cells}


@pytest.fixture
def three(tmp_path):
    """Runs of which one is beaten by another, and one has been measured again and timed since."""
    folders = [make_run(tmp_path / name) for name in ("quick", "beaten", "smaller")]
    rewrite(folders[1], student={"kl": {"1024": 0.06, "2048": 0.1}, "cache_bytes": {"131072": 4 * 2**30}})
    rewrite(folders[2], student={"kl": {"1024": 0.2, "2048": 0.3}, "cache_bytes": {"131072": 2**28}})
    later = {key: value for key, value in make_metrics().items() if key in ("teacher", "student", "samples")}
    (folders[0] / "eval.json").write_text(json.dumps(later | {"command": "subquad eval quick"}))
    (folders[0] / "bench.json").write_text(json.dumps(make_bench()))
    return folders


LOOK = """
<!doctype html><meta charset="utf-8">
<iframe src="PAGE" style="width:1280px;height:900px"></iframe>
<iframe src="PAGE" style="width:390px;height:800px"></iframe>
<script>
const light = colour => colour.match(/[\\d.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part) / 765, 0);
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(({contentDocument: page}) => {
    const style = getComputedStyle(page.body), root = page.documentElement;
    const pictures = [...page.querySelectorAll("svg")].map(svg => {
      const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal, drawn = svg.getBBox();
      return {
        width: box.width, height: box.height, right: box.right,
        covered: drawn.width * drawn.height / (view.width * view.height),
        texts: [...svg.querySelectorAll("text")].filter(text => text.getBBox().width > 0).length,
        marks: svg.querySelectorAll("path, use").length,
        broken: [...svg.querySelectorAll("use")].filter(use => !page.querySelector(use.getAttribute("href"))).length,
      };
    });
    const colours = {paper: light(style.backgroundColor), ink: light(style.color)};
    return {pictures, wide: root.scrollWidth, room: root.clientWidth, ...colours};
  });
  document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").textContent = JSON.stringify(found);
};
</script>
"""


def looked_at(page: Path, *flags: str) -> tuple[list[dict], list[str]]:
    """What the page is in a wide window and on a phone, and what the browser said on its console."""
    look = page.with_name("look.html")
    look.write_text(LOOK.replace("PAGE", page.as_uri()), encoding="utf-8")
    ran = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            "--enable-logging=stderr", "--virtual-time-budget=10000", f"--user-data-dir={page.parent / 'profile'}",
            *flags, "--dump-dom", look.as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r"<pre>(.*)</pre>", ran.stdout, re.DOTALL)
    assert found, ran.stderr
    return json.loads(found[1]), [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


def faults(pictures: list[dict], room: float) -> list[dict]:
    """The pictures that are not there, in pieces, or beyond the edge."""
    return [
        one
        for one in pictures
        if one["broken"] or not one["texts"] or not one["marks"] or one["covered"] < 0.5
        or one["width"] < min(250, room - 60) or one["height"] < 80 or one["right"] > room
    ]  # fmt: skip


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_every_picture_is_drawn_in_a_browser(several, three, tmp_path):
    page = write_report(*(three if several else three[:1]), out=tmp_path / "page.html")
    count = page.read_text(encoding="utf-8").count("<svg")
    assert count == (32 if several else 13)
    for flags, is_dark in ((), False), (("--blink-settings=preferredColorScheme=0",), True):
        found, said = looked_at(page, *flags)
        assert not said
        for window in found:
            assert len(window["pictures"]) == count and not faults(window["pictures"], window["room"])
            assert window["wide"] <= window["room"], "the page has to be pushed sideways"
            assert (
                (window["paper"] < 0.2 and window["ink"] > 0.8)
                if is_dark
                else window["paper"] > 0.9 > 0.3 > window["ink"]
            )


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_browser_would_tell(three, tmp_path):
    """The test above can fail: a shape that is missing, one that cannot be drawn, and one that is not to be seen."""
    page = write_report(three[0], out=tmp_path / "page.html")
    html = page.read_text(encoding="utf-8")
    used = re.search(r'href="#(run0-kl-[^"]+)"', html)[1]
    html = html.replace(f'id="{used}"', 'id="gone"').replace('<path d="M ', '<path d="M nan ', 1)
    html = html.replace("</head>", "<style>figure:last-of-type svg { display: none }</style></head>", 1)
    page.write_text(html, encoding="utf-8")
    found, said = looked_at(page)
    bad = faults(found[0]["pictures"], found[0]["room"])
    assert any(one["broken"] for one in bad) and any(one["width"] == 0 for one in bad)
    assert any("attribute d" in line for line in said)


def test_runs_stand_side_by_side(three, tmp_path):
    page = Page(write_report(*three, out=tmp_path / "page.html").read_text(encoding="utf-8"))
    text = page.text.replace(fmt.NBSP, " ")
    assert "quick · beaten · smaller" in text and "15 of 30 layers, hedgehog" in text
    for name in ("quick", "beaten", "smaller"):
        assert len(re.findall(rf"^{name}$", text, re.MULTILINE)) >= 6, "a column in every section"
    assert text.count("teacherthe force that pulls") == 1 and text.count("which pulls objects towards") == 3
    assert text.count("subquad eval quick") == text.count("Later evaluation") == 1
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert "not measured on the same text" not in text
    rewrite(three[1], teacher={**make_metrics()["teacher"], "perplexity": {"2048": 99.0}})
    assert "not measured on the same text" in write_report(*three, out=tmp_path / "page.html").read_text(
        encoding="utf-8"
    )


def test_a_page_of_several_runs_needs_a_place(three):
    with pytest.raises(UserError, match="give the file to write it to"):
        write_report(*three)


def test_runs_of_the_same_name_go_by_their_paths(tmp_path):
    runs = [make_run(tmp_path / part / "quick") for part in "ab"]
    text = write_report(*runs, out=tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"{runs[0]} · {runs[1]}" in text


def test_the_front_has_those_that_no_other_beats(three):
    found = overview([(folder.name, read_run(folder)) for folder in three])
    assert (found.context, found.cache_context, found.same_text) == (2048, 131072, True)
    assert [one.name for one in found.front] == ["smaller", "quick"]
    axes = picture(lambda ax: draw_overview(ax, found)).axes[0]
    joined, best, beaten, teacher = axes.lines
    assert list(joined.get_ydata()) == list(best.get_ydata()) == [0.3, pytest.approx(1.6 * 0.0432)]
    assert list(beaten.get_xdata()) == [4 * 2**30] and list(beaten.get_ydata()) == [0.1]
    assert list(teacher.get_xdata()) == [make_metrics()["teacher"]["cache_bytes"]["131072"]]
    assert [text.get_text() for text in axes.texts] == ["quick", "beaten", "smaller"]


def test_of_two_equals_none_beats_the_other(tmp_path):
    found = overview([(name, read_run(make_run(tmp_path / name))) for name in "ab"])
    assert [one.name for one in found.front] == ["a", "b"]


def test_runs_that_have_nothing_in_common(three, tmp_path):
    (three[1] / "metrics.json").unlink()
    found = overview([(folder.name, read_run(folder)) for folder in three])
    assert (found.context, found.cache_context, found.same_text) == (0, 0, False) and not found.front
    text = Page(write_report(*three, out=tmp_path / "page.html").read_text(encoding="utf-8")).text
    assert "Distance from the teacher over cache size" not in text and "Plan and selection" in text
    assert not re.search(r"\bnan\b", text)


def test_the_map_of_depths_has_a_cell_for_what_was_asked(three):
    metrics = read_run(three[0]).metrics
    teacher, student = depth_picture(metrics, "passkey").axes
    assert (teacher.get_title("left"), student.get_title("left")) == ("teacher", "student")
    cells = {text.get_position(): text.get_text() for text in student.texts}
    assert len(cells) == 14 and (0.5, 0.5) not in cells  # nothing was asked there
    wanted = metrics.student.retrieval["passkey"][1024].by_depth[3].accuracy
    assert cells[1.5, 3.5] == f"{100 * wanted:.0f}" != cells[1.5, 0.5]
    assert [label.get_text() for label in student.get_xticklabels()] == ["256", "1024", "2k"]
    assert teacher.get_ylim() == (5, 0), "the beginning of the text is at the top"
    assert metrics.depth_tasks == {"dictionary": [256, 1024, 2048], "passkey": [256, 1024, 2048]}


def test_learning_rates_stand_below_the_losses(three):
    points = read_run(three[0]).curves[0, "align"]
    loss, rate = stage_picture(points).axes
    assert set(rate.lines[0].get_ydata()) == {1e-3} and len(rate.lines[0].get_xdata()) == len(points) == 120
    assert loss.get_ylabel() == "loss" and rate.get_ylabel() == "rate"
    without = [point.model_copy(update={"lr": math.nan}) for point in points]
    assert len(stage_picture(without).axes) == 1


def test_speed_is_shown_where_it_was_measured(three):
    html = write_report(three[0]).read_text(encoding="utf-8")
    assert "Speed of decode" in html and "Speed of prefill" in html and "student, extrapolated" in html
    assert "Speed of" not in write_report(three[1]).read_text(encoding="utf-8")
    (three[0] / "bench.json").write_text('{"models": {}}')
    with pytest.raises(UserError, match=r"bench.json cannot be reported: settings: Field required"):
        write_report(three[0])


def test_the_ledger_has_the_selection(three):
    rows = {stage.name: stage for stage in read_run(three[0]).metrics.ledger}
    assert list(rows) == ["align", "align uniform", "logits", "selection"]
    assert (rows["selection"].tokens, rows["selection"].tokens_per_second) == (8192, 128)
    Plan.all_attention(make_plan().shapes).save(three[0] / "plan.yaml")
    assert read_run(three[0]).plan_summary() == "30 of 30 layers"


def test_bytes_have_few_ticks_and_none_below_nothing():
    ax = Figure().subplots()
    ax.plot([1, 2, 400], [0, 1, 1])  # most of what is drawn lies far from the rest
    plots.in_bytes(ax)
    low, high = ax.get_xlim()
    assert low == 0 and high > 400
    assert 3 <= len([tick for tick in ax.get_xticks() if low <= tick <= high]) <= 8
