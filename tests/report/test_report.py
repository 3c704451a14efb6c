"""The report of a made-up but lifelike run (30 layers, 9 heads): all is shown, nothing is loaded from elsewhere."""

import io
import json
import math
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from rich.console import Console

from subquad.errors import UserError
from subquad.plan import AttentionShape, Plan
from subquad.report import plan_picture, print_table, write_model_card, write_picture, write_report
from subquad.report.plots import picture
from subquad.report.run_files import read_run
from subquad.report.score_plots import draw_front, draw_path, scores_picture
from subquad.results.scores import ReplacementPath, Scores
from subquad.select.budget import Budget
from subquad.utils import format as fmt
from tests.report.made_up import VARIANT_KL, Page, make_metrics, make_plan, make_run

VARIANT_KL["window"] = 0.3127


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "quick")


def rescore(run: Path, *without: str, **changes) -> Scores:
    """Changes keys of scores.json, and takes some away."""
    found = json.loads((run / "scores.json").read_text()) | changes
    (run / "scores.json").write_text(json.dumps({key: found[key] for key in found if key not in without}))
    return read_run(run).scores


def make_path(unit: int = 3) -> dict:
    """Two units replaced; the third one falls below the floor."""
    steps = [{"unit": unit, "score": 0.91}, {"unit": 20, "score": 0.87}, {"unit": 7, "score": 0.61}]
    test = {"base": 0.89, "best": 0.854, "opt": 0.843}
    return {"task": "dictionary", "floor": 0.855, "base": 0.9, "steps": steps, "best": 1, "opt": 2, "test": test}


def make_front(context: int = 32768) -> dict:
    costs = [make_plan().cache_bytes(0) + kept * 2 * 3 * 64 * 4 * context for kept in range(0, 31, 2)]
    points = [{"cost": cost, "value": (i / 15) ** 0.5, "units": [*range(2 * i)]} for i, cost in enumerate(costs)]
    return {"front": points, "front_context": context}


def test_page_shows_what_the_files_hold(run):
    html = write_report(run).read_text(encoding="utf-8")
    text = Page(html).text.replace(fmt.NBSP, " ")
    metrics = make_metrics()
    assert "15 of 30 layers keep attention; the other layers run hedgehog, whose cost per token" in text
    assert "1024 tokens the student is 0.043 nats per token from its teacher" in text
    student, teacher = metrics["student"]["cache_bytes"], metrics["teacher"]["cache_bytes"]
    assert f"at 128k tokens of context its cache takes {100 * student['131072'] / teacher['131072']:.1f}%" in text
    for name, kl in VARIANT_KL.items():
        assert name in text and f"{kl:.3f}" in text
        assert f"{metrics[name]['perplexity']['2048']:.2f}" in text
        assert fmt.logprob(metrics[name]["retrieval"]["copy"]["1024"]["logprob"]) in text
        assert f"{0.5 - kl / 10:.3f} ± 0.020" in text
    assert all(verdict in text for verdict in metrics["verdicts"])
    for words in (
        metrics["command"],
        "0123abc",
        "AMD EPYC 7763",
        "2.13.0+cpu",
        "61,440",
        "44%",
        "logits + 0.1 labels",
        "by kl, budget 50%",
        "8,192",
    ):
        assert words in text
    assert "9 min 37 s in all" in text and "Peak memory 3 GiB" in text and "name: hedgehog" in text
    assert html.count("<svg") == 4 + 2 + 3  # plan, scores, KL, cache; two tasks with a depth; three stages
    assert "0–256" in text and f"{1.3 * VARIANT_KL['window'] * 1.6:.3f}" in text  # by position
    assert "a0b1c2" in text and "d3e4f5" in text and "model.safetensors" in text


def test_page_is_self_contained_and_adapts(run):
    html = write_report(run).read_text(encoding="utf-8")
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "image"}
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), "something is loaded from elsewhere"
    assert "@import" not in html and "http://" not in html and "https://" not in html
    assert not re.search(r"url\((?!#)", html)
    assert "prefers-color-scheme: dark" in html and 'name="viewport"' in html and "currentColor" in html
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', html))
    assert used and used <= set(ids)


def test_text_of_models_is_escaped(run):
    html = write_report(run).read_text(encoding="utf-8")
    assert "<script>alert" not in html and "<b>bold" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;bold&lt;/b&gt; ? half a pair" in html


def test_same_files_same_page(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert not list(run.glob("*.tmp"))


@pytest.mark.parametrize("keep", ["plan.yaml", "scores.json", "metrics.json", "log.jsonl"])
def test_parts_that_are_missing_are_left_out(run, keep):
    for file in run.iterdir():
        if file.name != keep:
            file.unlink()
    page = Page(write_report(run).read_text(encoding="utf-8"))
    drawings = sum(tag == "svg" for tag, _ in page.tags)
    assert drawings == {"plan.yaml": 1, "scores.json": 1, "metrics.json": 4, "log.jsonl": 3}[keep]
    assert ("Held-out text" in page.text) == (keep == "metrics.json")
    assert ("Plan and selection" in page.text) == (keep in ("plan.yaml", "scores.json"))
    write_model_card(run)


def test_unknown_numbers_are_dashes(run):
    metrics = make_metrics()
    metrics["student"]["kl"] = {"256": None, "1024": math.nan, "2048": math.inf}
    metrics["stages"][0]["share_of_bare_forward"] = None
    del metrics["uniform"], metrics["window"]["retrieval"], metrics["window"]["tasks"], metrics["seconds"]
    (run / "metrics.json").write_text(json.dumps(metrics))
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "–" in text and "∞" in text and not re.search(r"\b(nan|inf|None)\b", text)
    assert "the same budget spread evenly" not in text
    write_model_card(run)
    write_picture(run, run / "picture.png")


def test_torn_last_log_line_is_ignored(run):
    with (run / "log.jsonl").open("a") as log:
        log.write('{"stage": 2, "name": "logi')
    assert [len(points) for points in read_run(run).curves.values()] == [120, 60, 40]


@pytest.mark.parametrize(
    "file, content, words",
    [
        ("metrics.json", "{", "metrics.json is damaged"),
        ("metrics.json", '{"student": {"kl": {"long": 1}}}', "student.kl.long"),
        ("scores.json", '{"by": "kl", "scores": 3}', "scores"),
        ("log.jsonl", "torn\n{}\n", "line 1"),
    ],
)
def test_damaged_files_are_named(run, file, content, words):
    (run / file).write_text(content)
    with pytest.raises(UserError, match=words):
        write_report(run)


def test_no_run_at_all(tmp_path):
    with pytest.raises(UserError, match="no run to report"):
        write_report(tmp_path / "nowhere")


def test_bars_of_layers_and_groups_have_labels_and_whiskers(run):
    groups = [[2 * group, 2 * group + 1] for group in range(14)] + [[28], [29]]
    bounds = {"low": [0.01] * 15 + [math.nan], "high": [0.1] * 15 + [None]}
    scores = rescore(run, unit="group", units=groups, scores=[0.05] * 16, chosen=[0, 3], by="fisher", **bounds)
    axes = scores_picture(scores).axes[0]
    assert axes.xaxis.get_major_formatter()(3.0, None) == "6-7" and axes.xaxis.get_major_formatter()(16.0, None) == ""
    assert len(axes.patches) == 16 and len(axes.collections) == 15  # no whisker where the bounds are unknown
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "Why these groups" in text and "Whiskers: bootstrap intervals" in text and "4-5" in text

    axes = scores_picture(rescore(run, "low", "high", unit="layer", units=None)).axes[0]
    assert axes.xaxis.get_major_formatter()(3.0, None) == "3" and not axes.collections
    assert "Whiskers" not in write_report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "by, measure, label",
    [
        ("kl-removal", "", "KL in nats"),
        ("alignment-loss", "", "distance"),
        ("recall", "accuracy", "accuracy lost without it"),
        ("retrieval-heads", "logprob", "nats lost without it"),
        ("halo", "", "recall lost / rest lost"),
        ("gates", "", "log-odds of the gate"),
        ("mine", "", "score (mine)"),
    ],
)
def test_scores_say_what_they_are(run, by, measure, label):
    assert scores_picture(rescore(run, by=by, measure=measure)).axes[0].get_ylabel() == label
    heads = scores_picture(rescore(run, unit="head", scores=[[0.1 * head - 1 for head in range(9)]] * 30))
    assert heads.axes[1].get_ylabel() == label
    assert heads.axes[0].collections[0].get_clim() == (-1.0, 1e-9)  # log-odds and KL may all be below zero


def test_the_path_of_the_greedy_selector(run):
    rescore(run, "scores", "order", "kl_all_linear", "tokens", by="greedy", path=make_path(), spent={}, budget="opt")
    html = write_report(run).read_text(encoding="utf-8")
    text = Page(html).text
    assert html.count("<svg") == 4 + 2 + 3 and "Why these" not in text
    for words in (
        "One layer after the other",
        "layers replaced",
        "so those scores are too good",
        "Budget opt. It took",
    ):
        assert words in text
    rows = [re.findall(r">([^<]+)</t[hd]>", row) for row in re.findall(r"<tr.*?</tr>", html)]
    assert ["M_best", "1", "0.910", "0.854"] in rows and ["M_opt", "2", "0.870", "0.843"] in rows
    assert ["1", "layer 3", "0.910"] in rows and ["3", "layer 7", "0.610"] in rows


def test_the_path_names_heads_and_groups(run):
    greedy = {"by": "greedy", "scores": [], "path": make_path(unit=11)}
    rescore(run, unit="head", **greedy)
    assert "head 2 of layer 1" in write_report(run).read_text(encoding="utf-8")
    rescore(run, unit="group", units=[[layer, layer + 30] for layer in range(30)], **greedy)
    assert "layers 11, 41" in write_report(run).read_text(encoding="utf-8")
    (run / "plan.yaml").unlink()  # which says how many heads a layer has
    rescore(run, unit="head", units=None)
    assert ">head 11<" in write_report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "changes, plans",
    [
        ({}, ["teacher", "M_best", "M_opt"]),
        ({"best": 2, "test": {"base": 0.89, "best": 0.843, "opt": 0.843}}, ["teacher", "M_best = M_opt"]),
        ({"best": 0, "opt": 0, "steps": [], "test": {}}, ["teacher = M_best = M_opt"]),
    ],
)
def test_the_path_marks_every_plan_once(changes, plans):
    path = ReplacementPath.model_validate(make_path() | changes)
    axes = picture(lambda ax: draw_path(ax, path, "layer")).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["validation", "floor", *plans, "test"]


def test_the_front_marks_the_plan_chosen(run):
    scores = rescore(run, scores=[1.0] * 30, **make_front())
    axes = picture(lambda ax: draw_front(ax, scores, read_run(run).front_cost)).axes[0]
    line, mark = axes.lines
    assert len(line.get_xdata()) == 16
    assert mark.get_xdata() == [make_plan().cache_bytes(32768)] and mark.get_ydata() == [0.5]  # 15 of 30 equal layers
    text = Page(write_report(run).read_text(encoding="utf-8")).text
    assert "To get a point of the curve" in text and "the plan chosen" in text
    budget = Budget.parse(re.search(r"--budget (\S+)", text)[1])
    assert budget.context == 32768 and 0 <= budget.size - scores.front[8].cost < 2**20 / 100

    rescore(run, front_dtype="bfloat16")
    assert read_run(run).front_cost == make_plan().cache_bytes(32768, dtype="bfloat16")
    rescore(run, front=scores.model_dump()["front"][:1])
    assert "To get a point of the curve" not in write_report(run).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "spent, words",
    [
        ({"tokens": 4096, "seconds": 61.4}, "It took 4,096 tokens of text, in 1 min 01 s."),
        ({"spent": {"forward_tokens": 98304.0, "training_tokens": 0.0}}, "It took 98,304 tokens forward."),
        (
            {"spent": {"forward_tokens": 640.0, "training_tokens": 64.0}, "seconds": 3.2},
            "It took 640 tokens forward and 64 tokens of training, in 3.2 s.",
        ),
        ({}, "Budget 50%."),
    ],
)
def test_what_the_selection_took(run, spent, words):
    rescore(run, "tokens", "seconds")
    rescore(run, **spent)
    text = Page(write_report(run).read_text(encoding="utf-8")).text.replace(fmt.NBSP, " ")
    assert words in text and ("It took" in text) == bool(spent)


@pytest.mark.parametrize("key", ["kl_base", "kl_all_linear"])
def test_the_kl_without_attention(run, key):
    rescore(run, "kl_all_linear")
    rescore(run, **{key: 0.4127})
    assert "With every layer linear the KL is 0.413 nats." in write_report(run).read_text(encoding="utf-8")
    rescore(run, by="kl-removal")  # its base is the teacher
    assert "With every layer linear" not in write_report(run).read_text(encoding="utf-8")


def test_plan_picture_has_one_square_a_head():
    axes = plan_picture(make_plan(mixed=True)).axes[0]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [f"attention ({15 * 9 + 2} heads)", f"hedgehog ({14 * 9 + 6} heads)", "sliding_window (1 head)"]
    squares = [len(patch.get_path().vertices) / 5 for patch in axes.patches]
    assert squares == [15 * 9 + 2, 14 * 9 + 6, 1]
    assert axes.get_xlim()[1] > 29 and axes.get_ylim()[0] > 8


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layers, heads", [(1, 1), (2, 2), (80, 64)])
def test_plan_picture_fits_any_size(layers, heads):
    names = ["attention", "gated_deltanet", "sliding_window", "mamba2"]
    shape = AttentionShape(heads=heads, kv_heads=1, head_dim=8, hidden_size=8 * heads, window=None)
    rows = [{name: list(range(heads))[i::4] for i, name in enumerate(names) if i < heads} for _ in range(layers)]
    mixers = {"attention": {}, "gated_deltanet": {}, "sliding_window": {"window": 64, "sinks": 4}, "mamba2": {}}
    figure = plan_picture(Plan(shapes=[shape] * layers, mixers=mixers, layers=rows))
    figure.savefig(io.BytesIO(), format="svg")  # warns when the layout collapses
    assert figure.axes[0].get_position().width > 0.8 and figure.axes[0].get_position().height > 0.3


def test_summary_picture(run):
    path = write_picture(run, run / "picture.png")
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(header[16:20], "big") == 1800
    (run / "plan.yaml").unlink()
    with pytest.raises(UserError, match="plan.yaml"):
        write_picture(run, run / "picture.png")


def test_model_card_has_hub_metadata(run):
    card = ModelCard.load(write_model_card(run))
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and card.data.license == "apache-2.0"
    assert {"subquad", "hedgehog"} <= set(card.data.tags)
    assert "import subquad" in card.text and 'from_pretrained("quick")' in card.text and "4-bit" in card.text
    tables = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", card.text, flags=re.MULTILINE)]
    assert [len(table) for table in tables] == [8, 8, 4, 5]
    for table in tables:
        assert len({row.count("|") for row in table}) == 1, "a row has too few or too many cells"


@pytest.mark.parametrize("teacher, base", [("Qwen/Q-1.5B", "Qwen/Q-1.5B"), ("/models/mine", None), ("mine.gguf", None)])
def test_model_card_claims_only_known_base_models(run, teacher, base):
    (run / "recipe.yaml").write_text(yaml.safe_dump({"name": "x", "teacher": teacher}))
    card = ModelCard.load(write_model_card(run))
    assert card.data.base_model == base and card.data.license is None
    assert "4-bit" not in card.text


def test_table_in_the_terminal():
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    print_table(make_metrics(), console)
    text = console.export_text().replace(fmt.NBSP, " ")
    rows = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert [row for row in rows if row in VARIANT_KL][: len(VARIANT_KL)] == list(VARIANT_KL)
    assert "0.496 ± 0.020" in text and "−0.043" in text  # tasks
    assert "0.043" in text and "44%" in text and "beats the uniform plan" in text
    assert [line.split() for line in text.splitlines() if line.startswith("KL  ")][
        0
    ] == "KL student 0.025 0.056 0.090".split()
    passkey = [line for line in text.splitlines() if line.startswith("passkey")]
    assert passkey[0].split()[:5] == ["passkey", "256", "75%", "−0.40", "67%"]
    assert passkey[3].split() == "passkey 0–20% – (–) 0% (0%) 0% (0%)".split()
    assert "force which pulls objects" in text and "Gravity is" in text
    with pytest.raises(UserError, match="stages"):
        print_table({"stages": 3}, console)


@pytest.mark.parametrize(
    "written, expected",
    [
        (fmt.nats(0.00042), "0.0004"),
        (fmt.nats(math.nan), "–"),
        (fmt.logprob(-0.5), "−0.50"),
        (fmt.perplexity(12345.6), "12,346"),
        (fmt.percent(0.5049), "50.5%"),
        (fmt.size(90 * 2**20), "90 MiB"),
        (fmt.size(1.5 * 2**30), "1.5 GiB"),
        (fmt.size(2**50), "1,024 TiB"),
        (fmt.budget(12.3401 * 2**20, 32768), "12.35MiB@32k"),
        (fmt.budget(512, 1000), "512B@1000"),
        (fmt.ranges([0, 1, 2, 5]), "0-2, 5"),
        (fmt.context(131072), "128k"),
        (fmt.context(1024), "1024"),
        (fmt.duration(577), "9 min 37 s"),
        (fmt.duration(7300), "2 h 01 min"),
        (fmt.objective("mixer_output"), "mixer output"),
    ],
)
def test_formats(written, expected):
    assert written.replace(fmt.NBSP, " ") == expected
