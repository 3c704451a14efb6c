"""Retrieval-aware distillation's claims: do a few heads carry retrieval, and what do they save?

    python -m benchmarks.claims.retrieval_aware [--quick] [--teacher DIR|default] [--json FILE] [--plot FILE.png]

Parts:
- ablation: the teacher with its first k heads silenced, by their score, and with as many others, drawn at random.
- heads: students that keep k heads, by score or at random, against students that keep whole layers, spread evenly or
  by their heads' scores.
- join: retained heads beside the others (split) or as a branch (parallel) whose adapter starts at the identity or at
  random.
- state: a smaller state, with retained heads and without.
- serving: tokens/s of decoding, head by head against layer by layer at the same cache bytes.

Notable:
- Retrieval coverage is the paper's measure: accuracy of the student over the teacher's, mean over the tasks. Where the
  teacher fails a task (`usable`) it is left out; a teacher that fails all, and any in little training, is measured by
  log-probability: what the student loses of it, in nats per answer token.
- All students get the same stages: block outputs, then logits. Rates are tuned once, on the student that keeps the
  middle number of heads, on a seed and on probes that nothing is reported of.
- Finished runs are kept under --work: a script that was stopped goes on from there.
"""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import methodcaller
from typing import Any

import torch

from benchmarks.claims.bench import SMALL_TEACHER, Bench, Coverage, parse, run_parts
from benchmarks.claims.retrieval_report import draw, print_report
from benchmarks.claims.runs import Result, Settings, Store
from benchmarks.common import wide_console
from subquad.evaluate import likelihood
from subquad.model.random_cache import random_cache
from subquad.model.student import Student
from subquad.plan import Join, Plan
from subquad.recipes.stage import Stage
from subquad.select import SelectionWork, retrieval_scores, uniform_layers
from subquad.select.ablation import Kind, scaled
from subquad.select.budget import largest_within
from subquad.utils.timing import seconds_of, take_turns

PARTS = ("ablation", "heads", "join", "state", "serving")
Heads = list[tuple[int, int]]


@dataclass(frozen=True)
class Setup:
    """Settings of the runs; lengths and counts in tokens."""

    teacher: str = SMALL_TEACHER
    mixer: str = "discrete_mamba2"
    measure: Kind | None = None  # of coverage; none: accuracy where the teacher has any
    scored: tuple[str, ...] = ("dictionary",)
    tasks: tuple[str, ...] = ("copy", "dictionary", "passkey", "associative")
    context: int = 256  # of the probes
    probe_rows: int = 64
    score_rows: int = 64
    counts: tuple[int, ...] = (0, 1, 3, 5, 8)  # heads kept, of 32: 3% is the least there is, then 10, 16 and 25%
    layers: tuple[int, ...] = (1, 2)  # whole layers kept
    joined: tuple[int, ...] = (5, 8)
    states: tuple[int, ...] = (32, 16, 8, 4)
    state_heads: tuple[int, ...] = (0, 8)
    hidden_tokens: int = 60_000
    logits_tokens: int = 200_000
    sequence_length: int = 256
    batch: int = 8
    rates: tuple[tuple[float, float], ...] = ((1e-3, 3e-3), (4e-3, 3e-3), (4e-3, 1e-2))  # blocks, logits
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100
    random_draws: int = 8
    rows: int = 16
    serving: tuple[int, ...] = (2048, 8192, 32768)
    serving_steps: int = 32


QUICK: dict[str, Any] = {
    "probe_rows": 16,
    "score_rows": 16,
    "counts": (0, 8),
    "layers": (1,),
    "joined": (8,),
    "states": (32, 8),
    "hidden_tokens": 8_000,
    "logits_tokens": 16_000,
    "rates": ((1e-3, 3e-3),),
    "seeds": (0,),
    "random_draws": 2,
    "rows": 4,
    "serving": (2048,),
    "serving_steps": 8,
}
LARGE: dict[str, Any] = {  # SmolLM2 on two cores, where so little training leaves no accuracy to compare
    "measure": "logprob",
    "scored": ("passkey",),
    "tasks": ("copy", "passkey"),
    "probe_rows": 8,
    "score_rows": 4,
    "counts": (0, 5, 27),
    "layers": (3,),
    "joined": (27,),
    "states": (64, 8),
    "state_heads": (27,),
    "hidden_tokens": 4_000,
    "logits_tokens": 8_000,
    "batch": 2,
    "rates": ((1e-3, 3e-4),),
    "seeds": (0,),
    "random_draws": 2,
    "rows": 4,
}


class RetrievalAware(Bench):
    """The runs of these claims."""

    def __init__(self, setup: Setup, store: Store) -> None:
        super().__init__(setup.teacher, store)
        self.setup = setup
        self.text, selection = (self.corpus.heldout_batch(setup.rows, 256, part=part) for part in ("test", "selection"))
        self.everything = self.student(Plan.all_attention(self.shapes), 0)
        self.test = self.coverage(setup.tasks, seed=0, by=setup.measure)
        self.tuning = self.coverage([*self.test.probes], seed=1, by=self.test.by)
        settings = {"teacher": self.teacher.fingerprint, "part": "scores", "tasks": setup.scored}
        settings |= {"context": setup.context, "rows": setup.score_rows}
        self.scores = store.run(settings, lambda _: self.scored(selection))
        order = sorted(self.scores["order"], key=lambda head: head[2:], reverse=True)
        self.order: Heads = [(layer, head) for layer, head, *_ in order]
        by_layer = [sum(score for layer, _, score, _ in order if layer == index) for index in range(len(self.shapes))]
        self.best_layers = sorted(range(len(by_layer)), key=by_layer.__getitem__, reverse=True)

    def coverage(self, tasks: Sequence[str], seed: int, by: Kind | None = None) -> Coverage:
        rows, context = self.setup.probe_rows, self.setup.context
        probes = {task: self.probe(task, context, rows, seed, self.text) for task in tasks}
        return Coverage(self.teacher.model, probes, by)

    def scored(self, text: torch.Tensor) -> Result:
        setup = self.setup
        scores = retrieval_scores(
            self.teacher.model,
            self.teacher.tokenizer,
            text,
            tasks=setup.scored,
            context=setup.context,
            rows=setup.score_rows,
            top=max(setup.counts),
            work=SelectionWork(self.store.console.print),
        )
        by_head = zip(scores.units, scores.scores, scores.logprob_drop, strict=True)
        order = [(layer, head, score, between) for [(layer, head)], score, between in by_head]
        return {"order": order, "found": scores.as_dict()}

    def ablation(self) -> list[Result]:
        results = []
        for count in self.setup.counts[1:]:
            first, rest = self.order[:count], sorted(self.order[count:])
            draws = [random.Random(draw).sample(rest, count) for draw in range(self.setup.random_draws)]
            measured = {"scored": [self.without(first)], "random": [self.without(heads) for heads in draws]}
            results.append({"count": count, **measured})
        return results

    def without(self, heads: Heads) -> dict[str, float]:
        """The teacher's coverage without these heads."""

        def hidden(model: Student, ids_NT: torch.Tensor) -> torch.Tensor:
            gains = {}
            for layer, shape in enumerate(self.shapes):
                gain_H = torch.ones(shape.heads, device=ids_NT.device)
                gain_H[[head for index, head in heads if index == layer]] = 0
                gains[layer] = gain_H.expand(len(ids_NT), -1)
            return model.final_hidden(ids_NT, forward_context=scaled(gains))

        return self.test.of(self.everything, hidden=hidden)

    def kept(self, family: str, count: int, seed: int) -> Heads:
        """The heads that a student of this family keeps; `count`: heads, or layers of the families of layers."""
        if family == "scored":
            return self.order[:count]
        if family == "random":
            return random.Random(f"heads {seed}").sample(sorted(self.order), count)
        chosen = self.best_layers[:count] if family == "best layers" else uniform_layers(len(self.shapes), count)
        return [(layer, head) for layer in chosen for head in range(self.shapes[layer].heads)]

    def plan(self, heads: Heads, join: Join = "split", state_dim: int | None = None) -> Plan:
        options = {} if state_dim is None else {"state_dim": state_dim}
        return Plan.by_head(self.shapes, heads, self.setup.mixer, options, join)

    def distilled(self, settings: Settings) -> Result:
        setup, seed = self.setup, settings["seed"]
        heads = [(layer, head) for layer, head in settings["heads"]]
        plan = self.plan(heads, settings["join"], settings["state_dim"])
        student = self.student(plan, seed, settings["join_start"])
        self.calibrate(student, setup.sequence_length, seed)
        hidden_rate, logits_rate = settings["rates"]
        common: dict[str, Any] = {
            "sequence_length": setup.sequence_length,
            "batch": setup.batch,
            "schedule": "wsd",
            "warmup": 0.1,
            "checkpoint_every": 10**9,
        }
        hidden_tokens, logits_tokens = settings["tokens"]
        blocks: dict[str, Any] = {"objective": "block_output", "trainable": ["mixers", "qkvo"]}
        logits: dict[str, Any] = {"objective": "logits", "trainable": "all"}
        stages = [
            Stage(name="hidden", tokens=hidden_tokens, lr=hidden_rate, **blocks, **common),
            Stage(name="logits", tokens=logits_tokens, lr=logits_rate, **logits, **common),
        ]
        trained = self.train(student, stages, seed) if student.replaced_layers() else []
        text = likelihood({"student": student}, self.teacher.model, self.text, [256])["student"]
        return {
            "coverage": (self.tuning if seed == setup.tuning_seed else self.test).of(student),
            "kl": text["kl"][256],
            "perplexity": text["perplexity"][256],
            "cache_bytes": {str(c): plan.cache_bytes(c) for c in (128, 256, 1024, 2048, 4096, 32768)},
            "stages": trained,
        }

    def run(self, seed: int, family: str, count: int, **more: Any) -> Result:
        settings: dict[str, Any] = {
            "teacher": self.teacher.fingerprint,
            "mixer": self.setup.mixer,
            "family": family,
            "count": count,
            "heads": sorted(self.kept(family, count, seed)),
            "join": "split",
            "join_start": "identity",
            "state_dim": None,
            "tokens": [self.setup.hidden_tokens, self.setup.logits_tokens],
            "seed": seed,
        }
        if self.setup.measure is not None:
            settings["measure"] = self.setup.measure
        if "rates" not in more:
            more["rates"] = self.rates
        if more.get("state_dim") == self.shapes[0].head_dim:  # which is the mixer's own
            more["state_dim"] = None
        return self.store.run(settings | more, self.distilled)

    @property
    def rates(self) -> list[float]:
        """The rates of all runs: best on the tuning seed."""
        setup = self.setup
        if len(setup.rates) == 1:
            return list(setup.rates[0])
        count = setup.counts[len(setup.counts) // 2]
        trials = {pair: self.run(setup.tuning_seed, "scored", count, rates=list(pair)) for pair in setup.rates}
        return list(min(trials, key=lambda pair: trials[pair]["kl"]))

    def heads(self) -> list[Result]:
        setup = self.setup
        cells = [("scored", count) for count in setup.counts] + [("random", count) for count in setup.counts[1:]]
        cells += [(family, count) for family in ("uniform layers", "best layers") for count in setup.layers]
        return self.cells([{"family": family, "count": count} for family, count in cells])

    def join(self) -> list[Result]:
        joins = (("split", "identity"), ("parallel", "identity"), ("parallel", "random"))
        return self.cells(
            [
                {"family": "scored", "count": count, "join": join, "join_start": start}
                for count in self.setup.joined
                for join, start in joins
            ]
        )

    def state(self) -> list[Result]:
        return self.cells(
            [
                {"family": "scored", "count": count, "state_dim": width}
                for count in self.setup.state_heads
                for width in self.setup.states
            ]
        )

    def cells(self, combinations: Sequence[dict[str, Any]]) -> list[Result]:
        runs: list[list[Result]] = [[] for _ in combinations]
        for seed in self.setup.seeds:  # first, so that what is compared was measured in the same stretch of time
            for cell_runs, settings in zip(runs, combinations, strict=True):
                cell_runs.append(self.run(seed, **settings))
        return [{"settings": s, "runs": cell_runs} for s, cell_runs in zip(combinations, runs, strict=True)]

    @torch.no_grad()
    def serving(self) -> list[Result]:
        """Medians of single decoding steps; the two students in turns, at every context."""
        rows = []
        layers = self.setup.layers[0]
        of_layers = self.plan(self.kept("uniform layers", layers, 0))
        for context in self.setup.serving:
            cost = methodcaller("cache_bytes", context)
            count = largest_within(len(self.order), lambda k: self.plan(self.order[:k]), cost, cost(of_layers))
            plans = {"layers": of_layers, "heads": self.plan(self.order[:count])}
            students = {name: self.student(plan, 0) for name, plan in plans.items()}
            caches = {name: random_cache(student, context) for name, student in students.items()}
            token = torch.ones(1, 1, dtype=torch.long, device=self.device)
            steps = {
                name: partial(student, token, past_key_values=caches[name], use_cache=True)
                for name, student in students.items()
            }
            calls = {name: partial(seconds_of, step, token.device) for name, step in steps.items()}
            results = take_turns(calls, (self.setup.serving_steps, self.setup.serving_steps))
            seconds = {name: [result[name] for result in results] for name in students}
            for name, plan in plans.items():
                quartiles = statistics.quantiles(seconds[name], n=4)
                row = {"context": context, "plan": name, "attention_heads": len(plan.attention_heads)}
                row |= {"cache_bytes": plan.cache_bytes(context), "tokens_per_second": 1 / quartiles[1]}
                rows.append(row | {"quartiles": [1 / quartiles[2], 1 / quartiles[0]]})
        return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not yet done, prints, and writes what was asked for."""
    arguments = parse(argv, "benchmarks.claims.retrieval_aware", __doc__ or "", PARTS, "coverage over cache bytes")
    changes = {**(LARGE if arguments.teacher == "default" else {}), **(QUICK if arguments.quick else {})}
    setup = replace(Setup(teacher=arguments.teacher), **changes)
    bench = RetrievalAware(setup, Store(arguments.work, wide_console()))
    more = {
        "measure": bench.test.by,
        "tasks": [*bench.test.probes],
        "scores": bench.scores["found"],
        "teacher_cache_bytes": {str(c): bench.everything.plan.cache_bytes(c) for c in (256, 2048, 32768)},
    }
    run_parts(bench, arguments, more, print_report, draw, drawn="heads")


if __name__ == "__main__":
    main()
