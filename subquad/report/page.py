"""report.html: one file that holds the whole run, opened from disk on any machine, years later.

Nothing is loaded from elsewhere: no script, no font, no image; the pictures are SVG elements in the page. It follows
the reader's light or dark mode, and folds to one column on a phone. What a model or a user wrote is escaped by jinja.
"""

import math
import os
from pathlib import Path

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from subquad.report import format as fmt
from subquad.report import plots, score_plots
from subquad.report.number import NAN
from subquad.report.run import VARIANTS, Metrics, Run, read_run
from subquad.report.scores import Scores


def write_report(run_dir: Path | str) -> Path:
    """Reads a run folder and writes its report.html. Parts whose files or numbers are missing are left out.

    Raises `UserError` when the folder holds no run, or one of its files is damaged.
    """
    run = read_run(run_dir)
    page = templates(autoescape=True).get_template("report.html.j2").render(
        run=run,
        metrics=run.metrics,
        variants=VARIANTS,
        plan_svg=_svg(plots.plan_picture(run.plan), "plan") if run.plan else None,
        scores_svg=_scores(run),
        path_svg=_path(run.scores),
        front_svg=_front(run),
        kl_svg=_kl(run.metrics),
        cache_svg=_cache(run.metrics),
        curves=_curves(run),
        facts=facts(run),
        best=best(run.metrics),
    )  # fmt: skip
    return write_text(run.folder / "report.html", page)


def facts(run: Run) -> dict[str, str]:
    """The few numbers that stand at the top, as label -> text."""
    metrics, context = run.metrics, run.metrics.headline_context
    found: dict[str, str] = {}
    student, teacher = metrics.student, metrics.teacher
    if student and context:
        kl, top1, ppl = (table.get(context, NAN) for table in (student.kl, student.top1, student.perplexity))
        if math.isfinite(kl):
            found[f"KL to the teacher at {context}, nats"] = fmt.nats(kl)
        if math.isfinite(top1):
            found[f"same next token as the teacher at {context}"] = fmt.percent(top1)
        if math.isfinite(ppl):
            against = f", teacher {fmt.perplexity(teacher.perplexity.get(context, NAN))}" if teacher else ""
            found[f"perplexity at {context}{against}"] = fmt.perplexity(ppl)
    longest = max(metrics.cache_contexts, default=0)
    if math.isfinite(metrics.cache_ratio(longest)):
        found[f"of the teacher’s cache at {fmt.context(longest)}"] = fmt.percent(metrics.cache_ratio(longest))
    total = metrics.seconds.get("total", NAN)
    if math.isfinite(total):
        found["for the whole run"] = fmt.duration(total)
    return found


def best(metrics: Metrics) -> dict[tuple[str, int], float]:
    """The best value of each held-out column, the teacher apart, so that the table can mark it."""
    found: dict[tuple[str, int], float] = {}
    for column, choose in (("kl", min), ("perplexity", min), ("top1", max)):
        for context in metrics.contexts:
            values = [getattr(v, column).get(context, NAN) for name, v in metrics.variants.items() if name != "teacher"]
            finite = [value for value in values if math.isfinite(value)]
            if len(finite) > 1:
                found[column, context] = choose(finite)
    return found


def templates(*, autoescape: bool) -> jinja2.Environment:
    """The templates beside this file, with the number formats as filters."""
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
    environment.globals |= {"NAN": NAN, "fmt": fmt}
    return environment


def write_text(path: Path, text: str) -> Path:
    """Writes aside, then renames. A model can write half a surrogate pair, which no file can hold: it becomes `?`."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8", errors="replace")
    os.replace(aside, path)
    return path


def _svg(figure: Figure, name: str) -> Markup:
    return Markup(plots.svg(figure, name))


def _scores(run: Run) -> Markup | None:
    scores = run.scores
    if scores is None or not any(math.isfinite(score) for row in scores.rows for score in row):
        return None
    return _svg(score_plots.scores_picture(scores), "scores")


def _path(scores: Scores | None) -> Markup | None:
    if scores is None or scores.path is None:
        return None
    path, unit = scores.path, scores.unit
    return _svg(plots.picture(lambda ax: score_plots.draw_path(ax, path, unit)), "path")


def _front(run: Run) -> Markup | None:
    scores = run.scores
    if scores is None or len(scores.front) < 2:  # nothing is of worth: the plan without attention is alone
        return None
    return _svg(plots.picture(lambda ax: score_plots.draw_front(ax, scores, run.front_cost)), "front")


def _kl(metrics: Metrics) -> Markup | None:
    context = metrics.headline_context
    if context is None or not any(math.isfinite(v.kl.get(context, NAN)) for v in metrics.variants.values()):
        return None
    return _svg(plots.picture(lambda ax: plots.draw_kl(ax, metrics, context)), "kl")


def _cache(metrics: Metrics) -> Markup | None:
    if not metrics.cache_contexts:
        return None
    return _svg(plots.picture(lambda ax: plots.draw_cache(ax, metrics)), "cache")


def _curves(run: Run) -> list[tuple[str, Markup]]:
    drawn = []
    for number, ((_, name), points) in enumerate(run.curves.items()):
        if any(math.isfinite(point.loss) for point in points):
            figure = plots.picture(lambda ax, points=points: plots.draw_loss(ax, points), height=2.1)  # type: ignore[misc]
            drawn.append((name, _svg(figure, f"loss{number}")))
    return drawn
