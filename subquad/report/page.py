"""report.html: one file that holds a whole run, or several side by side, to be opened from disk on any machine.

Nothing is loaded from elsewhere: no script, no font, no image; the pictures are SVG elements in the page. It follows
the reader's light or dark mode, and folds to one column on a phone. What a model or a user wrote is escaped by jinja.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from subquad.errors import UserError
from subquad.report import plots, score_plots
from subquad.report.bench_tables import draw_speed
from subquad.report.overview import Overview, draw_overview, overview
from subquad.report.retrieval_plots import depth_picture
from subquad.report.run_files import RunFiles, read_run
from subquad.results.metrics import VARIANTS, Metrics
from subquad.results.scores import Scores
from subquad.utils import format as fmt
from subquad.utils.files import write_aside
from subquad.utils.format import NAN


@dataclass
class View:
    """One run as the page shows it: its files and the pictures drawn from them, those that cannot be drawn left out."""

    name: str
    run: RunFiles
    drawn: dict[str, Markup | None]
    curves: list[tuple[str, Markup]]
    maps: list[tuple[str, Markup]]
    later_maps: list[tuple[str, Markup]]

    @property
    def best(self) -> dict[tuple[str, int], float]:
        return best(self.run.metrics)


def write_report(run_dir: Path | str, *others: Path | str, out: Path | str | None = None) -> Path:
    """Reads run folders and writes one page about them: `out`, or else report.html in the folder of the only run.

    Parts whose files or numbers are missing are left out. Raises `UserError` when a folder holds no run, or one of its
    files is damaged, and for several runs without `out`.
    """
    folders = [Path(run_dir), *map(Path, others)]
    if out is None and others:
        raise UserError("a report on several runs belongs to none of their folders: give the file to write it to")
    runs = list(zip(_names(folders), map(read_run, folders), strict=True))
    views = [_view(name, run, f"run{number}") for number, (name, run) in enumerate(runs)]
    together = overview(runs) if others else None
    page = templates(autoescape=True).get_template("report.html.j2").render(
        views=views,
        title=" · ".join(name for name, _ in runs) if others else views[0].run.name,
        run_facts={} if others else run_facts(views[0].run),
        overview=together,
        front_svg=_together(together),
        samples=_samples(runs),
    )  # fmt: skip
    return write_text(folders[0] / "report.html" if out is None else Path(out), page)


def _names(folders: list[Path]) -> list[str]:
    """Names of the runs: those of their folders, or, where two are equal, their paths."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _view(name: str, run: RunFiles, prefix: str) -> View:
    """`prefix`: of the ids of all its drawings, for a page has many."""

    def drawn(part: str, figure: Figure | None) -> Markup | None:
        return None if figure is None else Markup(plots.svg(figure, f"{prefix}-{part}"))

    def maps(metrics: Metrics, part: str) -> list[tuple[str, Markup]]:
        pictures = ((task, depth_picture(metrics, task)) for task in metrics.depth_tasks)
        return [(task, Markup(plots.svg(figure, f"{prefix}-{part}-{task}"))) for task, figure in pictures]

    pictures = {
        "plan": plots.plan_picture(run.plan) if run.plan else None,
        "scores": _scores(run),
        "path": _path(run.scores),
        "front": _front(run),
        "kl": _kl(run.metrics),
        "cache": _cache(run.metrics),
        "decode": _speed(run, "decode"),
        "prefill": _speed(run, "prefill"),
    }
    curves = [
        (stage, Markup(plots.svg(plots.stage_picture(points), f"{prefix}-loss{number}")))
        for number, ((_, stage), points) in enumerate(run.curves.items())
        if any(math.isfinite(point.loss) for point in points)
    ]
    return View(
        name,
        run,
        {part: drawn(part, figure) for part, figure in pictures.items()},
        curves,
        maps(run.metrics, "map"),
        maps(run.evaluation or Metrics(), "later"),
    )


def _samples(runs: list[tuple[str, RunFiles]]) -> dict[str, list[tuple[str, str]]]:
    """Continuations by prompt, each with its author: the teacher's once, then that of each run's student."""
    texts_by_prompt: dict[str, list[tuple[str, str]]] = {}
    for name, run in runs:
        for sample in run.metrics.samples:
            texts = texts_by_prompt.setdefault(sample.prompt, [])
            if ("teacher", sample.teacher) not in texts:
                texts.append(("teacher", sample.teacher))
            texts.append((name if len(runs) > 1 else "student", sample.student))
    return texts_by_prompt


def run_facts(run: RunFiles) -> dict[str, str]:
    """The few numbers that stand at the top, as label -> text."""
    metrics, context = run.metrics, run.metrics.headline_context
    facts: dict[str, str] = {}
    student, teacher = metrics.student, metrics.teacher
    if student and context:
        kl, top1, ppl = (table.get(context, NAN) for table in (student.kl, student.top1, student.perplexity))
        if math.isfinite(kl):
            facts[f"KL to the teacher at {context}, nats"] = fmt.nats(kl)
        if math.isfinite(top1):
            facts[f"same next token as the teacher at {context}"] = fmt.percent(top1)
        if math.isfinite(ppl):
            against = f", teacher {fmt.perplexity(teacher.perplexity.get(context, NAN))}" if teacher else ""
            facts[f"perplexity at {context}{against}"] = fmt.perplexity(ppl)
    for measure, heading in metrics.image_measures.items():
        if student and student.images:
            value = getattr(student.images, measure)
            images = teacher.images if teacher else None
            accuracy = images.accuracy if images and measure == "accuracy" else NAN
            against = f", teacher {fmt.of_image(measure, accuracy)}" if math.isfinite(accuracy) else ""
            facts[f"{heading}{against}"] = fmt.of_image(measure, value)
    longest = max(metrics.cache_contexts, default=0)
    if math.isfinite(metrics.cache_ratio(longest)):
        facts[f"of the teacher’s cache at {fmt.context(longest)}"] = fmt.percent(metrics.cache_ratio(longest))
    total = metrics.seconds.get("total", NAN)
    if math.isfinite(total):
        facts["for the whole run"] = fmt.duration(total)
    return facts


def best(metrics: Metrics) -> dict[tuple[str, int], float]:
    """The best value of each held-out column, the teacher apart, so that the table can mark it."""
    best_values: dict[tuple[str, int], float] = {}
    for column, choose in (("kl", min), ("perplexity", min), ("top1", max)):
        for context in metrics.contexts:
            values = [getattr(v, column).get(context, NAN) for name, v in metrics.variants.items() if name != "teacher"]
            finite = [value for value in values if math.isfinite(value)]
            if len(finite) > 1:
                best_values[column, context] = choose(finite)
    return best_values


def templates(*, autoescape: bool) -> jinja2.Environment:
    """Environment of the templates in this folder, with the number formats as filters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (fmt.nats, fmt.logprob, fmt.perplexity, fmt.percent, fmt.integer, fmt.size, fmt.context, fmt.duration)
    environment.filters |= {filter.__name__: filter for filter in (*filters, fmt.objective)}
    environment.tests["known"] = math.isfinite
    environment.globals |= {"NAN": NAN, "fmt": fmt, "variants": VARIANTS}
    return environment


def write_text(path: Path, text: str) -> Path:
    """Writes `path` and returns it. Half a surrogate pair, which a model can generate, becomes `?`."""
    with write_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="replace")
    return path


def _scores(run: RunFiles) -> Figure | None:
    scores = run.scores
    if scores is None or not any(math.isfinite(score) for row in scores.rows for score in row):
        return None
    return score_plots.scores_picture(scores)


def _path(scores: Scores | None) -> Figure | None:
    if scores is None or scores.path is None:
        return None
    path, unit = scores.path, scores.unit
    return plots.picture(lambda ax: score_plots.draw_path(ax, path, unit))


def _front(run: RunFiles) -> Figure | None:
    scores = run.scores
    if scores is None or len(scores.front) < 2:  # nothing is of worth: the plan without attention is alone
        return None
    return plots.picture(lambda ax: score_plots.draw_front(ax, scores, run.front_cost))


def _kl(metrics: Metrics) -> Figure | None:
    context = metrics.headline_context
    if context is None or not any(math.isfinite(v.kl.get(context, NAN)) for v in metrics.variants.values()):
        return None
    return plots.picture(lambda ax: plots.draw_kl(ax, metrics, context))


def _cache(metrics: Metrics) -> Figure | None:
    if not metrics.cache_contexts:
        return None
    return plots.picture(lambda ax: plots.draw_cache(ax, metrics))


def _speed(run: RunFiles, measure: str) -> Figure | None:
    bench = run.bench
    if bench is None or not any(cell["measure"] == measure and cell["tokens_per_second"] for cell in bench["cells"]):
        return None

    def draw(ax: Axes) -> None:
        draw_speed(ax, bench, measure)
        plots.legend_above(ax, ax.get_legend_handles_labels()[0])

    return plots.picture(draw)


def _together(comparison: Overview | None) -> Markup | None:
    if comparison is None or len(comparison.comparable) < 2:
        return None
    return Markup(plots.svg(plots.picture(lambda ax: draw_overview(ax, comparison)), "together"))
