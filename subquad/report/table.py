"""Results in the terminal: held-out text, retrieval, tasks, stages, samples and verdicts."""

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from subquad.report.console import make_table, style_of
from subquad.results.metrics import Answer, Band, ImageFidelity, Measure, Metrics, Sample, Variant, check_metrics
from subquad.utils import format as fmt
from subquad.utils.format import NAN


def print_table(metrics: Mapping[str, Any], console: Console) -> None:
    """Prints the main rows of metrics.json. Raises `UserError` if `metrics` is not of that form."""
    checked = check_metrics(dict(metrics))
    for make in (_images, _variants, _buckets, _retrieval, _depths, _tasks, _stages):
        if (table := make(checked)).row_count:
            console.print(table)
    for sample in checked.samples:
        console.print(_sample(sample))
    for sentence in (*checked.verdicts, *checked.unmeasured):
        console.print(Text(f"· {sentence}"))


def _images(metrics: Metrics) -> Table:
    measures = metrics.image_measures
    table = make_table(f"{metrics.image_count:,} held-out images", ["", *measures.values()])
    for name, variant in metrics.variants.items():
        if variant.images:
            cells = (_with_error(variant.images, measure) for measure in measures)
            table.add_row(name, *cells, style=style_of(name))
    return table


def _with_error(images: ImageFidelity, measure: str) -> str:
    value, error = getattr(images, measure), getattr(images, f"{measure}_stderr")
    text = fmt.of_image(measure, value)
    return f"{text} ± {fmt.of_image(measure, error)}" if math.isfinite(value) and error > 0 else text


def _variants(metrics: Metrics) -> Table:
    if not metrics.contexts:
        return Table()
    contexts, headline = metrics.contexts, metrics.headline_context or 0
    longest = max(metrics.cache_contexts, default=0)
    headings = [*(f"KL {context}" for context in contexts), f"ppl {headline}", f"top-1 {headline}"]
    table = make_table("Held-out text", ["", *headings, *([f"cache {fmt.context(longest)}"] if longest else [])])
    for name, variant in metrics.variants.items():
        cells = [fmt.nats(variant.kl.get(context, NAN)) for context in contexts]
        cells += [fmt.perplexity(variant.perplexity.get(headline, NAN)), fmt.percent(variant.top1.get(headline, NAN))]
        cells += [fmt.size(variant.cache_bytes.get(longest, NAN))] if longest else []
        table.add_row(name, *cells, style=style_of(name))
    return table


def _buckets(metrics: Metrics) -> Table:
    """Measures by position: a mean over the whole text hides those at its end."""
    table = make_table("By position in the text", ["", "", *metrics.buckets.values()], words=(0, 1))
    for label, measure, text in (("KL", "kl", fmt.nats), ("ppl", "perplexity", fmt.perplexity)):
        for name, variant in metrics.variants.items():
            buckets = [variant.buckets.get(end) for end in metrics.buckets]
            if any(buckets) and (measure, name) != ("kl", "teacher"):
                cells = (text(getattr(bucket, measure)) if bucket else fmt.DASH for bucket in buckets)
                table.add_row(label, name, *cells, style=style_of(name))
    return table


def _retrieval(metrics: Metrics) -> Table:
    title = "Retrieval: share of answers right, log-probability of an answer token"
    table = make_table(title, ["", "context", *metrics.variants])
    for task, contexts in metrics.retrieval_tasks.items():
        for context in contexts:
            answers = [variant.retrieval.get(task, {}).get(context, Answer()) for variant in metrics.variants.values()]
            cells = (f"{fmt.percent(answer.accuracy, 0)} {fmt.logprob(answer.logprob):>6}" for answer in answers)
            table.add_row(Text(task), fmt.context(context), *cells)
    return table


def _depths(metrics: Metrics) -> Table:
    """The student's accuracy by depth of the fact, with the teacher's in brackets."""
    contexts = sorted({context for task_contexts in metrics.depth_tasks.values() for context in task_contexts})
    title = "Retrieval by depth of the fact: the student (the teacher)"
    table = make_table(title, ["", "depth", *map(fmt.context, contexts)], words=(0, 1))
    for task in metrics.depth_tasks:
        student, teacher = (
            [variant.retrieval.get(task, {}).get(context, Answer()).by_depth for context in contexts]
            for variant in (metrics.student or Variant(), metrics.teacher or Variant())
        )
        depths = max(map(len, student + teacher))
        for depth in range(depths):
            cells = (
                f"{_accuracy(student_bands, depth)} ({_accuracy(teacher_bands, depth)})"
                for student_bands, teacher_bands in zip(student, teacher, strict=True)
            )
            table.add_row(Text(task), fmt.band(depth, depths), *cells)
    return table


def _accuracy(bands: list[Band], depth: int) -> str:
    return fmt.percent(bands[depth].accuracy, 0) if bands else fmt.DASH


def _tasks(metrics: Metrics) -> Table:
    table = make_table("Tasks", ["", "metric", *metrics.variants], words=(0, 1))
    for (task, metric), by_model in metrics.task_rows.items():
        measures = [by_model.get(name, Measure()) for name in metrics.variants]
        table.add_row(Text(task), Text(metric), *(fmt.measure(measure.value, measure.stderr) for measure in measures))
    return table


def _stages(metrics: Metrics) -> Table:
    table = make_table("Stages", ["", "tokens", "time", "tokens/s", "of bare forward", "final loss"])
    for stage in metrics.ledger:
        table.add_row(
            Text(stage.name),
            fmt.integer(stage.tokens),
            fmt.duration(stage.seconds),
            fmt.integer(stage.tokens_per_second),
            fmt.percent(stage.share_of_bare_forward, 0),
            fmt.nats(stage.final_loss),
        )
    return table


def _sample(sample: Sample) -> Table:
    """Continuations of one prompt by both models, side by side."""
    table = Table(title=Text(sample.prompt, "italic"), title_justify="left", box=None, pad_edge=False, expand=True)
    for name in ("teacher", "student"):
        table.add_column(name, ratio=1, overflow="fold", header_style=style_of(name))
    # A model can write half a surrogate pair, which no terminal can show.
    table.add_row(*(Text(text.encode(errors="replace").decode()) for text in (sample.teacher, sample.student)))
    return table
