"""Selection's claims: which estimators rank units as the full procedure does, what they cost, and whether it pays.

    python -m benchmarks.claims.selection [--quick] [--teacher DIR|default] [--json FILE] [--plot FILE.png] [--work DIR]

Parts:
- estimators: each selector's ranking against that of KL-guided selection in full (every unit restored and retrained):
  rank correlation, overlap of the first quarter, tokens and seconds; and the student that each one's plan gives, after
  the same distillation.
- budgets: KL-guided selection against uniform, alignment loss, recall and HALO at four shares of attention kept.
- greedy: Distill-then-Replace's greedy path against static rankings, on test questions of two tasks.

Notable:
- Units are the heads of the small teacher and the layers of a large one: four layers are too few to rank.
- The aligned all-linear student of a seed is shared by all estimators; what is retrained starts there. Full retraining
  is the reference; how well it agrees with itself over seeds is the most that an estimator can reach.
- What is compared is scored on rows that training does not see: text, and for the small teacher retrieval, as it
  learned both. Plans are measured on other text and other questions.
- Finished runs are kept under --work: a script that was stopped goes on from there.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, get_args

import torch

from benchmarks.claims.bench import SMALL_TEACHER, Bench, Coverage, parse, run_parts
from benchmarks.claims.rankings import overlap, spearman
from benchmarks.claims.runs import Result, Settings, Store
from benchmarks.claims.selection_report import draw, print_report
from benchmarks.common import wide_console
from subquad.evaluate import likelihood
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.recipes.stage import Stage
from subquad.select import Budget, Ranking, SelectionWork, SelectorInputs, Supernet, make_selector
from subquad.select.supernet import without
from subquad.select.task import Part, TaskScore, task_score
from subquad.select.units import UnitSpec, heads_of, units_of

PARTS = ("estimators", "budgets", "greedy")
FULL = "kl, each retrained"


@dataclass(frozen=True)
class Setup:
    """Settings of the runs; lengths and counts in tokens."""

    teacher: str = SMALL_TEACHER
    unit: UnitSpec = "head"
    mixer: str = "discrete_mamba2"
    options: tuple[tuple[str, Any], ...] = ()
    align_tokens: int = 60_000
    align_rate: float = 4e-3
    retrain_tokens: int = 40_000
    logits_tokens: int = 100_000
    rates: tuple[float, ...] = (1e-3, 3e-3)  # of logits
    sequence_length: int = 256
    batch: int = 8
    tasks: tuple[str, ...] = ("copy", "dictionary", "passkey")
    context: int = 256
    probe_rows: int = 64
    score_rows: int = 16  # of text, and of each task
    shares: tuple[float, ...] = (0.125, 0.25, 0.33, 0.5)
    rivals: tuple[str, ...] = ("kl", "uniform", "alignment-loss", "recall", "halo")
    greedy_tasks: tuple[str, ...] = ("dictionary", "passkey")
    greedy_rows: int = 24
    replaced: tuple[float, ...] = (0.33, 0.5, 0.75)
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100
    rows: int = 16


QUICK: dict[str, Any] = {
    "align_tokens": 8_000,
    "retrain_tokens": 1_000,
    "logits_tokens": 8_000,
    "rates": (3e-3,),
    "batch": 2,
    "probe_rows": 16,
    "score_rows": 2,
    "shares": (0.25,),
    "greedy_tasks": ("dictionary",),
    "greedy_rows": 4,
    "replaced": (0.33,),
    "seeds": (0,),
    "rows": 4,
}
LARGE: dict[str, Any] = {  # SmolLM2 on two cores
    "unit": "layer",
    "mixer": "hedgehog",
    "options": (("window", 64), ("sinks", 4), ("feature_dim", 16)),
    "align_tokens": 8_000,
    "align_rate": 1e-2,
    "retrain_tokens": 4_000,
    "logits_tokens": 8_000,
    "rates": (3e-4,),
    "sequence_length": 512,
    "batch": 1,
    "tasks": ("copy", "passkey"),
    "probe_rows": 8,
    "score_rows": 4,
    "greedy_tasks": ("passkey", "copy"),
    "greedy_rows": 4,
    "replaced": (0.33,),
    "rows": 4,
}


def estimators(setup: Setup) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> selector and its options."""
    tokens, rows = setup.retrain_tokens, setup.score_rows
    asked = {"tasks": setup.tasks, "context": setup.context, "rows": rows}
    gates = {"tokens": tokens, "sequence_length": setup.sequence_length, "batch": setup.batch}
    return {
        FULL: ("kl", {"retrain_tokens": tokens}),
        "kl, a quarter of the tokens": ("kl", {"retrain_tokens": tokens // 4}),
        "kl, three rounds": ("kl", {"retrain_tokens": tokens, "rounds": 3}),
        "kl": ("kl", {}),
        "kl-removal": ("kl-removal", {}),
        "gradient, 1 point": ("gradient", {"points": 1}),
        "gradient, 4 points": ("gradient", {"points": 4}),
        "fisher": ("fisher", {"draws": 4}),
        "gates": ("gates", gates),
        "alignment-loss": ("alignment-loss", {}),
        "recall": ("recall", asked),
        "halo": ("halo", {"recall": setup.tasks, "context": setup.context, "rows": rows}),
    }


class Selection(Bench):
    """The runs of these claims."""

    def __init__(self, setup: Setup, store: Store) -> None:
        super().__init__(setup.teacher, store)
        self.setup = setup
        self.units = units_of(self.shapes, setup.unit)
        self.kept: dict[int, Student] = {}
        self.text = self.corpus.heldout_batch(setup.rows, setup.sequence_length)
        scored = self.corpus.heldout_batch(setup.score_rows, setup.sequence_length, part="selection")
        probes = {task: self.probe(task, setup.context, setup.probe_rows, 0, self.text) for task in setup.tasks}
        self.coverage = Coverage(self.teacher.model, probes)
        if self.lessons is not self.corpus:  # a teacher that learned retrieval beside text
            asked = [self.probe(task, setup.sequence_length, setup.score_rows, 77, scored) for task in probes]
            scored = torch.cat([scored, *(probe.input_ids for probe in asked)])
        self.scored_rows = scored
        self.plain_rows = scored[: setup.score_rows]

    def plan(self, kept: Sequence[int]) -> Plan:
        return Plan.by_head(self.shapes, heads_of(self.units, kept), self.setup.mixer, dict(self.setup.options))

    def aligned(self, seed: int) -> Student:
        """The all-linear student of a seed, kept while that seed is worked on."""
        if seed not in self.kept:
            self.kept = {seed: self._align(seed)}
        return self.kept[seed]

    def _align(self, seed: int) -> Student:
        setup = self.setup
        student = self.student(self.plan([]), seed)
        self.calibrate(student, setup.sequence_length, seed)
        align = {"name": "align", "objective": "mixer_output", "scope": "all-linear", "trainable": "mixers"}
        self.train(student, [Stage(**align, tokens=setup.align_tokens, lr=setup.align_rate, **self.common)], seed)
        return student

    @property
    def common(self) -> dict[str, Any]:
        setup = self.setup
        return {
            "sequence_length": setup.sequence_length,
            "batch": setup.batch,
            "schedule": "wsd",
            "warmup": 0.1,
            "checkpoint_every": 10**9,
        }

    def logits(self, student: Student, tokens: int, rate: float, seed: int) -> None:
        stage: dict[str, Any] = {"name": "logits", "objective": "logits", "trainable": "all"}
        self.train(student, [Stage(**stage, tokens=tokens, lr=rate, **self.common)], seed)

    def distilled(self, settings: Settings) -> Result:
        """The student of a plan, after the stage on logits."""
        seed = settings["seed"]
        plan = self.plan(settings["kept"])
        student = Student.from_teacher(self.teacher.model, plan, mixers_from=self.aligned(seed))
        self.logits(student, settings["tokens"], settings["rate"], seed)
        length = self.setup.sequence_length
        text = likelihood({"student": student}, self.teacher.model, self.text, [length])["student"]
        result = {"kl": text["kl"][length], "perplexity": text["perplexity"][length]}
        return result | {"coverage": self.coverage.of(student), "cache_bytes": plan.cache_bytes(2048)}

    def run(self, kept: Sequence[int], seed: int, rate: float | None = None) -> Result:
        settings: dict[str, Any] = self.about(seed) | {"part": "student", "kept": sorted(kept)}
        settings |= {"tokens": self.setup.logits_tokens, "rate": self.rate if rate is None else rate}
        return self.store.run(settings, self.distilled)

    @property
    def rate(self) -> float:
        """Rate of the stage on logits: the best on the tuning seed, for the uniform plan of a quarter."""
        setup = self.setup
        if len(setup.rates) == 1:
            return setup.rates[0]
        kept = self.chosen("uniform", {}, setup.tuning_seed, self.count(0.25))
        return min(setup.rates, key=lambda rate: self.run(kept, setup.tuning_seed, rate)["kl"])

    def about(self, seed: int) -> dict[str, Any]:
        setup = self.setup
        mixer = {"mixer": setup.mixer, "options": dict(setup.options), "align_tokens": setup.align_tokens}
        return {"teacher": self.teacher.fingerprint, "unit": setup.unit, **mixer, "seed": seed}

    def count(self, share: float) -> int:
        return max(1, round(share * len(self.units)))

    def selected(self, by: str, options: dict[str, Any], seed: int) -> Result:
        """Scores of a selector for every unit, and the work that it took."""

        def job(settings: Settings) -> Result:
            student = self.aligned(seed)  # before the clock of the selector starts
            work = SelectionWork(say=lambda text: None)
            choice = self.choice(student, by, options, seed, work)
            order = choice.report["order"]
            worth = choice.worth or [-order.index(unit) for unit in range(len(order))]  # its ranks
            return {"worth": list(worth), "order": order, **work.report()}

        settings = self.about(seed) | {"part": "scores", "by": by, "with": options, "rows": len(self.rows_for(by))}
        if options.get("retrain_tokens"):
            settings["rate"] = self.rate
        return self.store.run(settings, job)

    def rows_for(self, by: str) -> torch.Tensor:
        """Rows that a selector scores on; HALO compares recall with text that needs none, so it gets text alone."""
        return self.plain_rows if by == "halo" else self.scored_rows

    def choice(self, student: Student, by: str, options: dict[str, Any], seed: int, work: SelectionWork) -> Ranking:
        def train(candidate: Student, tokens: int, name: str) -> None:
            self.logits(candidate, tokens, self.rate, seed)

        budget = Budget.parse(str(self.count(0.25)))
        question = SelectorInputs(
            student, self.teacher, self.rows_for(by), budget, self.setup.unit, self.lessons, train, seed, work
        )
        return make_selector(by, options).run(question)

    def chosen(self, by: str, options: dict[str, Any], seed: int, count: int) -> list[int]:
        if by == "random":
            return random.Random(f"units {seed}").sample(range(len(self.units)), count)
        if by == "uniform":
            return self.choice(
                self.student(self.plan([]), seed), by, {}, seed, SelectionWork(say=lambda text: None)
            ).top(count)
        return sorted(self.selected(by, options, seed)["order"][:count])

    def estimators(self) -> list[Result]:
        names = {**estimators(self.setup), "uniform": ("uniform", {}), "random": ("random", {})}
        cells: dict[str, Result] = {name: {"name": name, "selections": [], "runs": []} for name in names}
        count = self.count(0.25)
        for seed in self.setup.seeds:
            for name, (by, options) in names.items():
                if by not in ("uniform", "random"):
                    cells[name]["selections"].append(self.selected(by, options, seed))
                cells[name]["runs"].append(self.run(self.chosen(by, options, seed, count), seed))
        compare(cells, count)
        return [*cells.values()]

    def budgets(self) -> list[Result]:
        known = {**estimators(self.setup), "uniform": ("uniform", {})}
        cells: list[Result] = []
        for share in self.setup.shares:
            for name in self.setup.rivals:
                cells.append({"share": share, "count": self.count(share), "name": name, "runs": []})
        for seed in self.setup.seeds:
            for cell in cells:
                kept = self.chosen(*known[cell["name"]], seed, cell["count"])
                cell["runs"].append(self.run(kept, seed))
        return cells

    def greedy(self) -> list[Result]:
        """Test scores, with no training after alignment, when shares of the units are replaced."""
        path_rows = []
        for seed in self.setup.seeds:
            for task in self.setup.greedy_tasks:
                settings = self.about(seed) | {"task": task, "rows": self.setup.greedy_rows}
                path = self.store.run(settings | {"part": "greedy"}, self.path)
                static = self.store.run(settings | {"part": "static"}, self.static)
                path_rows.append(static | path | {"scores": {"greedy": path["scores"]["greedy"], **static["scores"]}})
        return path_rows

    @property
    def counts(self) -> list[int]:
        return [self.count(share) for share in self.setup.replaced]

    def task(self, name: str) -> TaskScore:
        return task_score(name, limit=self.setup.greedy_rows, context=self.setup.context, text_BT=self.text)

    def scorer(self, settings: Settings) -> Callable[[Sequence[int], Part], float]:
        """The score of the aligned student with these units replaced, on the documents of a part."""
        supernet = Supernet(self.aligned(settings["seed"]), self.teacher.model)
        task = self.task(settings["task"])

        def score(gone: Sequence[int], part: Part) -> float:
            remaining = without(supernet.all_heads, heads_of(self.units, gone))
            with supernet.activate(supernet.plan_with(remaining)) as following:
                return task.score(following, self.teacher.tokenizer, part)

        return score

    def scored(self, orders: Mapping[str, Sequence[int]], score: Callable[[Sequence[int], Part], float]) -> Result:
        return {
            way: [{part: score(order[:count], part) for part in get_args(Part)} for count in self.counts]
            for way, order in orders.items()
        }

    def path(self, settings: Settings) -> Result:
        """Distill-then-Replace's path, to the largest count."""
        setup, score = self.setup, self.scorer(settings)
        budget = Budget.parse(str(len(self.units) - max(self.counts)))
        work = SelectionWork(say=lambda text: None)
        question = SelectorInputs(
            self.aligned(settings["seed"]), self.teacher, self.text, budget, setup.unit, work=work
        )
        options = {"task": settings["task"], "limit": setup.greedy_rows, "context": setup.context}
        path = make_selector("greedy", options).run(question).report["path"]
        order = [step["unit"] for step in path["steps"]]
        return {"scores": self.scored({"greedy": order}, score), "path": path}

    def static(self, settings: Settings) -> Result:
        """Orders that are found once. By the task: each unit replaced alone; equals as in the path, the later first."""
        seed, score = settings["seed"], self.scorer(settings)
        units = range(len(self.units))
        alone = [score([unit], "validation") for unit in units]
        by_kl = self.choice(self.aligned(seed), "kl-removal", {}, seed, SelectionWork(say=lambda text: None)).report[
            "order"
        ]
        orders = {
            "static, by the task": sorted(units, key=lambda unit: (alone[unit], unit), reverse=True),
            "static, by kl-removal": by_kl[::-1],
            "random": random.Random(f"gone {seed}").sample(units, len(units)),
        }
        return {
            "counts": self.counts,
            "base": score([], "test"),
            "alone": alone,
            "scores": self.scored(orders, score),
        }


def compare(cells: dict[str, Result], count: int) -> None:
    """Adds to each cell how its ranking of each seed agrees with the full procedure's (the mean of its seeds), and with
    its own of the other seeds."""
    worths = {name: [selection["worth"] for selection in cell["selections"]] for name, cell in cells.items()}
    full = mean_of(worths[FULL])
    for name, cell in cells.items():
        seed_worths = worths[name]
        compared = [] if name == FULL else seed_worths
        cell["spearman"] = [spearman(worth, full) for worth in compared]
        cell["overlap"] = [overlap(worth, full, count) for worth in compared]
        repeated = seed_worths if len(seed_worths) > 1 else []
        cell["repeats"] = [
            spearman(worth, mean_of(repeated[:seed] + repeated[seed + 1 :])) for seed, worth in enumerate(repeated)
        ]


def mean_of(worths: Sequence[Sequence[float]]) -> list[float]:
    """Worth of the units, in the mean of several seeds."""
    return [fmean(values) for values in zip(*worths, strict=True)]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not yet done, prints, and writes what was asked for."""
    arguments = parse(argv, "benchmarks.claims.selection", __doc__ or "", PARTS, "agreement over cost, KL over share")
    changes = {**(LARGE if arguments.teacher == "default" else {}), **(QUICK if arguments.quick else {})}
    setup = replace(Setup(teacher=arguments.teacher), **changes)
    bench = Selection(setup, Store(arguments.work, wide_console()))
    more = {"measure": bench.coverage.by, "tasks": [*bench.coverage.probes], "units": len(bench.units)}
    run_parts(bench, arguments, more, print_report, draw, drawn="estimators")


if __name__ == "__main__":
    main()
