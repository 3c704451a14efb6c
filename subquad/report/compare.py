"""Differences between two runs: recipe, plan, results, stages, time, versions and machine.

Everything is read from the files of the two folders, as the report is, so an unfinished run is compared as far as it
got. Two students that were measured on the same text are compared row by row: rows differ far more than students do, so
the standard error is that of the differences.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from subquad.evaluate import paired_gain
from subquad.mixers import mixer_options
from subquad.plan import Plan
from subquad.report.console import make_table
from subquad.report.plan_table import CONTEXTS
from subquad.report.run_files import RunFiles, read_run
from subquad.results.metrics import Answer, Measure, Metrics, StageRecord, Variant
from subquad.utils import format as fmt
from subquad.utils.files import write_json
from subquad.utils.format import NAN

Pair: TypeAlias = tuple[Any, Any]  # what A has and what B has

FILES = {"recipe.yaml": "recipes", "plan.yaml": "plans", "metrics.json": "results, stages, time and machines"}
"""Parts that are compared, by the file that holds them."""

UNITS: dict[str, Callable[[float], str]] = {
    "nats": fmt.nats,
    "perplexity": fmt.perplexity,
    "share": fmt.percent,
    "log-probability": fmt.logprob,
    "measure": lambda value: fmt.measure(value, NAN),
    "bytes": fmt.size,
    "seconds": fmt.duration,
    "tokens": fmt.integer,
    "tokens/s": fmt.integer,
}
AS_RATIO = ("bytes", "seconds", "tokens", "tokens/s")  # whose change is shown as a ratio


@dataclass
class Row:
    """One number of both runs (NaN where a run lacks it), with standard errors and a verdict where there are any."""

    name: str
    a: float
    b: float
    unit: str  # a key of UNITS
    a_stderr: float = NAN
    b_stderr: float = NAN
    verdict: str = ""

    @property
    def same(self) -> bool:
        return self.a == self.b or (math.isnan(self.a) and math.isnan(self.b))


@dataclass
class Comparison:
    """Differences between the runs in the folders `a` and `b`, by part; None where either lacks the part."""

    a: str
    b: str
    missing: list[str] = field(default_factory=list)
    recipe: dict[str, Pair] | None = None
    plan: dict[str, Pair] | None = None
    layers: list[int] = field(default_factory=list)  # whose heads have other mixers
    heads: int = 0  # that have another mixer
    cache: list[Row] | None = None
    results: list[Row] | None = None
    stages: list[Row] | None = None
    time: list[Row] | None = None
    machine: dict[str, Pair] | None = None

    @property
    def same(self) -> bool:
        """Whether nothing is missing and nothing differs."""
        rows = [row for part in (self.cache, self.results, self.stages, self.time) for row in part or []]
        differ = self.missing or self.recipe or self.plan or self.machine
        return not differ and all(row.same for row in rows)


def compare_runs(a: Path | str, b: Path | str, *, json_path: Path | str | None = None) -> Comparison:
    """Compares two run folders; with `json_path` also writes the comparison as JSON, NaN as null.

    Raises UserError for a folder that holds no run, or a damaged file.
    """
    run_a, run_b = read_run(a), read_run(b)
    comparison = Comparison(str(a), str(b), missing=[*_missing(run_a), *_missing(run_b)])
    if run_a.settings is not None and run_b.settings is not None:
        comparison.recipe = dict(differences(run_a.settings, run_b.settings))
    if run_a.plan is not None and run_b.plan is not None:
        comparison.plan, comparison.layers, comparison.heads = _of_plans(run_a.plan, run_b.plan)
        comparison.cache = _caches(run_a, run_a.plan, run_b, run_b.plan)
    if all((run.folder / "metrics.json").is_file() for run in (run_a, run_b)):
        comparison.results = _results(run_a.metrics, run_b.metrics)
        comparison.stages = _stages(run_a.metrics, run_b.metrics)
        comparison.time = _time(run_a.metrics, run_b.metrics)
        comparison.machine = dict(differences(_machine(run_a.metrics), _machine(run_b.metrics)))
    if json_path is not None:
        write_json(Path(json_path), asdict(comparison) | {"same": comparison.same})
    return comparison


def differences(a: Any, b: Any, at: str = "") -> Iterator[tuple[str, Pair]]:
    """Dotted keys at which two nested values differ, as `--set` takes them, with both values.

    Items of lists that have names go by these, wherever they stand. None stands for a key that one of them lacks.
    """
    if isinstance(a, list) and isinstance(b, list) and all(isinstance(x, dict) and "name" in x for x in a + b):
        a, b = ({item["name"]: item for item in items} for items in (a, b))
        orders = [key for key in a if key in b], [key for key in b if key in a]
        if orders[0] != orders[1]:
            yield f"order of {at}", orders
    if isinstance(a, dict) and isinstance(b, dict):
        for key in {**a, **b}:
            yield from differences(a.get(key), b.get(key), f"{at}.{key}" if at else str(key))
    elif a != b:
        yield at, (a, b)


def _missing(run: RunFiles) -> list[str]:
    sentences = []
    for file, contents in FILES.items():
        if not (run.folder / file).is_file():
            sentences.append(f"{run.folder} has no {file}, so the {contents} are not compared")
            if file == "metrics.json" and run.curves:
                (_, stage), points = [*run.curves.items()][-1]
                so_far = f"{points[-1].tokens:,.0f} tokens at a loss of {fmt.nats(points[-1].loss)}"
                sentences[-1] += f"; its log ends in stage '{stage}' after {so_far}"
    return sentences


def _of_plans(a: Plan, b: Plan) -> tuple[dict[str, Pair], list[int], int]:
    """Differences in words, the layers that differ, and the number of heads that do; none between other shapes."""
    pairs = dict(differences({"join": a.join, "mixers": _mixers(a)}, {"join": b.join, "mixers": _mixers(b)}))
    if a.shapes != b.shapes:
        return {"shape": (_shape(a), _shape(b))} | pairs, [], 0
    by_pair: dict[Pair, list[int]] = {}
    for layer in range(a.num_layers):
        layer_a, layer_b = _layer(a, layer), _layer(b, layer)
        if layer_a != layer_b:
            by_pair.setdefault((layer_a, layer_b), []).append(layer)
    for pair, layers in by_pair.items():
        pairs[f"layer{'s' if len(layers) > 1 else ''} {fmt.ranges(layers)}"] = pair
    counts = [{name: sum(len(layer.get(name, [])) for layer in plan.layers) for name in plan.mixers} for plan in (a, b)]
    for name in {**counts[0], **counts[1]}:
        of_a, of_b = (count.get(name, 0) for count in counts)
        if of_a != of_b:
            pairs[f"heads with {name}"] = (of_a, of_b)
    both = zip(a.head_table(), b.head_table(), strict=True)
    heads = sum(x != y for layer_a, layer_b in both for x, y in zip(layer_a, layer_b, strict=True))
    return pairs, sorted(layer for layers in by_pair.values() for layer in layers), heads


def _mixers(plan: Plan) -> dict[str, dict[str, Any]]:
    """Every option of the mixers that the plan uses."""
    used = {name for layer in plan.layers for name in layer}
    return {name: mixer_options(name, plan.mixers[name]).model_dump() for name in plan.mixers if name in used}


def _shape(plan: Plan) -> str:
    return f"{fmt.count(plan.num_layers, 'layer')}, {fmt.count(sum(shape.heads for shape in plan.shapes), 'head')}"


def _layer(plan: Plan, layer: int) -> str:
    """`attention`, or `attention 0, 3; hedgehog 1-2`."""
    mixers = plan.layers[layer]
    if len(mixers) == 1:
        return next(iter(mixers))
    return "; ".join(f"{name} {fmt.ranges(sorted(mixers[name]))}" for name in sorted(mixers))


def _caches(a: RunFiles, plan_a: Plan, b: RunFiles, plan_b: Plan) -> list[Row]:
    """Bytes of one sequence's cache, each in the precision of its run."""
    dtype_a, dtype_b = ((run.settings or {}).get("dtype", "float32") for run in (a, b))
    return [
        Row(
            f"at {fmt.context(context)}",
            plan_a.cache_bytes(context, dtype=dtype_a),
            plan_b.cache_bytes(context, dtype=dtype_b),
            "bytes",
        )
        for context in CONTEXTS
    ]


def _results(a: Metrics, b: Metrics) -> list[Row]:
    """The two students: held-out text by context, retrieval, tasks."""
    student_a, student_b = a.student or Variant(), b.student or Variant()
    rows = []
    for context in _keys(student_a.kl, student_b.kl):
        kl = student_a.kl.get(context, NAN), student_b.kl.get(context, NAN)
        errors = student_a.kl_stderr.get(context, NAN), student_b.kl_stderr.get(context, NAN)
        rows.append(Row(f"KL at {context}", *kl, "nats", *errors, _verdict(a, b, context)))
    for context in _keys(student_a.perplexity, student_b.perplexity):
        pair = student_a.perplexity.get(context, NAN), student_b.perplexity.get(context, NAN)
        rows.append(Row(f"perplexity at {context}", *pair, "perplexity"))
    for context in _keys(student_a.top1, student_b.top1):
        pair = student_a.top1.get(context, NAN), student_b.top1.get(context, NAN)
        rows.append(Row(f"top-1 at {context}", *pair, "share"))
    for task in _keys(student_a.retrieval, student_b.retrieval):
        answers_by_context = student_a.retrieval.get(task, {}), student_b.retrieval.get(task, {})
        for context in _keys(*answers_by_context):
            answer_a, answer_b = (answers.get(context, Answer()) for answers in answers_by_context)
            rows.append(Row(f"{task} at {context}", answer_a.accuracy, answer_b.accuracy, "share"))
            rows.append(Row(f"{task} at {context}, log-prob.", answer_a.logprob, answer_b.logprob, "log-probability"))
    for task in _keys(student_a.tasks, student_b.tasks):
        measures = student_a.tasks.get(task, {}), student_b.tasks.get(task, {})
        for metric in _keys(*measures):
            measure_a, measure_b = (measured.get(metric, Measure()) for measured in measures)
            errors = measure_a.stderr, measure_b.stderr
            rows.append(Row(f"{task} {metric}", measure_a.value, measure_b.value, "measure", *errors))
    return rows


def _verdict(a: Metrics, b: Metrics, context: int) -> str:
    """Which of two students is nearer to their teacher at a context length, in nats per token, row by row."""
    if not (a.student and b.student and a.teacher and b.teacher):
        return ""
    samples = [student.kl_samples.get(context, []) for student in (a.student, b.student)]
    if not all(samples):
        return "not paired: no kl_samples"
    if len(samples[0]) != len(samples[1]) or not a.same_text(b, context):
        return "not paired: other text or teacher"
    gain = paired_gain(samples[1], samples[0])
    if not math.isfinite(gain.mean):
        return "not paired: a KL is not finite"
    if gain.mean == 0:
        return "tied"
    nearer = "B" if gain.mean > 0 else "A"
    doubt = ", which may be chance" if gain.may_be_chance else ""
    return f"{nearer} is nearer by {abs(gain.mean):.4f} ± {gain.stderr:.4f} nats{doubt}"


def _stages(a: Metrics, b: Metrics) -> list[Row]:
    stages_a, stages_b = ({stage.name: stage for stage in metrics.stages} for metrics in (a, b))
    rows = []
    for name in {**stages_a, **stages_b}:
        stage_a, stage_b = (stages.get(name, StageRecord(name=name)) for stages in (stages_a, stages_b))
        rows.append(Row(f"{name}: tokens", stage_a.tokens, stage_b.tokens, "tokens"))
        rows.append(Row(f"{name}: tokens/s", stage_a.tokens_per_second, stage_b.tokens_per_second, "tokens/s"))
        rows.append(Row(f"{name}: final loss", stage_a.final_loss, stage_b.final_loss, "nats"))
    return rows


def _time(a: Metrics, b: Metrics) -> list[Row]:
    parts = {**a.seconds, **b.seconds}
    rows = [Row(part, a.seconds.get(part, NAN), b.seconds.get(part, NAN), "seconds") for part in parts]
    return [*rows, Row("peak memory", a.peak_rss_bytes, b.peak_rss_bytes, "bytes")]


def _machine(metrics: Metrics) -> dict[str, Any]:
    return metrics.model_dump(include={"teacher_name", "versions", "machine", "commit", "command"})


def _keys(a: Mapping[Any, Any], b: Mapping[Any, Any]) -> list[Any]:
    """The keys of either, in order."""
    return sorted({*a, *b})


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints what differs, part by part, and in one line each what is the same."""
    console.print(Text(f"A  {comparison.a}\nB  {comparison.b}"))
    for missing in comparison.missing:
        console.print(Text(f"· {missing}"))
    if comparison.same:
        console.print("The two runs are the same.")
        return
    differ = f": {fmt.count(len(comparison.layers), 'layer')} and {fmt.count(comparison.heads, 'head')} differ"
    _print_pairs("Recipe", comparison.recipe, console)
    _print_pairs("Plan", comparison.plan, console, differ if comparison.layers else "")
    _print_rows("Cache of one sequence", comparison.cache, console)
    _print_rows("Results", comparison.results, console)
    differing = [row for row in comparison.results or [] if not row.same]
    for verdict in dict.fromkeys(row.verdict for row in differing if row.verdict):
        names = ", ".join(row.name for row in differing if row.verdict == verdict)
        console.print(Text(f"· {names}: {verdict}"))
    _print_rows("Stages", comparison.stages, console)
    _print_rows("Time and memory", comparison.time, console)
    _print_pairs("Versions and machine", comparison.machine, console)


def _print_pairs(title: str, pairs: dict[str, Pair] | None, console: Console, also: str = "") -> None:
    table = make_table(title + also, ["", "A", "B"], words=(0, 1, 2), fold=True)
    for key, pair in (pairs or {}).items():
        table.add_row(Text(key), *(Text(fmt.DASH if value is None else str(value)) for value in pair))
    _print_part(title, table, pairs is None, console)


def _print_rows(title: str, rows: list[Row] | None, console: Console) -> None:
    table = make_table(title, ["", "A", "B", "change"], fold=True)
    if rows is not None and not all(row.same for row in rows):
        for row in rows:
            table.add_row(Text(row.name), *_cells(row))
    _print_part(title, table, rows is None, console)


def _print_part(title: str, table: Table, missing: bool, console: Console) -> None:
    if not missing:
        console.print()
        console.print(table if table.row_count else Text(f"{title}: the same", style="italic"))


def _cells(row: Row) -> list[str]:
    show = UNITS[row.unit]
    both = ((row.a, row.a_stderr), (row.b, row.b_stderr))
    numbers = [show(value) + (f" ± {show(error)}" if math.isfinite(error) else "") for value, error in both]
    if not (math.isfinite(row.a) and math.isfinite(row.b)):
        return [*numbers, fmt.DASH]
    if row.unit in AS_RATIO:
        return [*numbers, f"× {row.b / row.a:.2f}" if row.a else fmt.DASH]
    change = row.b - row.a
    return [*numbers, ("−" if change < 0 else "+") + show(abs(change)) if change else "="]
