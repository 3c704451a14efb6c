"""The result in the terminal: held-out numbers by variant, tasks, the stages, and what was found."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from subquad.report import format as fmt
from subquad.report.number import NAN
from subquad.report.run import Measure, Metrics, check_metrics


def print_table(metrics: Mapping[str, Any], console: Console) -> None:
    """Prints the main rows of metrics.json. Raises `UserError` if `metrics` is not of that form."""
    checked = check_metrics(dict(metrics))
    for table in (_variants(checked), _tasks(checked), _stages(checked)):
        if table.row_count:
            console.print(table)
    for verdict in checked.verdicts:
        console.print(Text(f"· {verdict}"))


def _variants(metrics: Metrics) -> Table:
    contexts, headline = metrics.contexts, metrics.headline_context or 0
    longest = max(metrics.cache_contexts, default=0)
    table = Table(title=Text("Held-out text"), title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    headings = [f"KL {context}" for context in contexts] + [f"ppl {headline}", f"top-1 {headline}"]
    for heading in headings + ([f"cache {fmt.context(longest)}"] if longest else []):
        table.add_column(heading, justify="right")
    for name, variant in metrics.variants.items():
        cells = [fmt.nats(variant.kl.get(context, NAN)) for context in contexts]
        cells += [fmt.perplexity(variant.perplexity.get(headline, NAN)), fmt.percent(variant.top1.get(headline, NAN))]
        cells += [fmt.size(variant.cache_bytes.get(longest, NAN))] if longest else []
        table.add_row(name, *cells, style="bold" if name == "student" else "")
    return table


def _tasks(metrics: Metrics) -> Table:
    table = Table(title=Text("Tasks"), title_justify="left", box=None, header_style="bold", pad_edge=False)
    for heading in ("", "metric"):
        table.add_column(heading)
    for name in metrics.variants:
        table.add_column(name, justify="right", style="bold" if name == "student" else "")
    for (task, metric), found in metrics.task_rows.items():
        measures = [found.get(name, Measure()) for name in metrics.variants]
        table.add_row(Text(task), Text(metric), *(fmt.measure(one.value, one.stderr) for one in measures))
    return table


def _stages(metrics: Metrics) -> Table:
    table = Table(title=Text("Stages"), title_justify="left", box=None, header_style="bold", pad_edge=False)
    table.add_column("")
    for heading in ("tokens", "time", "tokens/s", "of bare forward", "final loss"):
        table.add_column(heading, justify="right")
    for stage in metrics.stages:
        table.add_row(
            Text(stage.name),
            fmt.integer(stage.tokens),
            fmt.duration(stage.seconds),
            fmt.integer(stage.tokens_per_second),
            fmt.percent(stage.share_of_bare_forward, 0),
            fmt.nats(stage.final_loss),
        )
    return table
