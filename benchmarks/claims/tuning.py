"""Shared parts of claims about stages: runs of several seeds, each at the rates that are best for its own settings."""

from collections.abc import Callable, Sequence
from math import log
from typing import Any

from benchmarks.claims.bench import Base, Bench
from benchmarks.claims.runs import Result, Settings, Store
from subquad.recipes.stage import Stage

KINDS: dict[str, dict[str, Any]] = {
    "matrix": {"objective": "matrix", "trainable": ["mixers", "qkvo"]},
    "hidden": {"objective": "mixer_output", "trainable": ["mixers", "qkvo"]},
    "bridge": {"objective": "bridge", "trainable": "all"},
    "logits": {"objective": "logits", "divergence": "soft_cross_entropy", "trainable": "all"},
    "labels": {"objective": "labels", "trainable": "all"},
    "distillation": {"objective": {"labels": 1.0, "logits": 0.5}, "trainable": "all"},
    "soft": {"objective": {"labels": 1.0, "logits": 1.0}, "trainable": "all"},
    "bridged": {"objective": {"labels": 1.0, "logits": 1.0, "bridge": 3.0}, "trainable": "all"},
}


class Tuned(Base):
    """Runs of `distilled`, whose settings name `seed`, `tokens`, and `rates`: of layers, and of logits.

    `setup` has the ladders `layer_rates` and `logit_rates`, `budgets`, `seeds` and the `tuning_seed`, and
    `sequence_length` and `batch` of the stages. With the smallest budget all rates of logits are tried, those of layers
    as near them as their ladder has it, for there can be two valleys: one where the student's first weights are kept,
    and one where they are as good as new. From the best, and for a larger budget from the smaller one's best, the
    ladder of logits is walked, then that of layers, while it gets better.
    """

    setup: Any

    def stage(self, kind: str, tokens: int, rate: float, **more: Any) -> Stage:
        """A stage of `KINDS`; `more`: keys of it that differ."""
        common: dict[str, Any] = {
            "name": kind,
            "tokens": tokens,
            "sequence_length": self.setup.sequence_length,
            "batch": self.setup.batch,
            "schedule": "wsd",
            "warmup": 0.1,
            "checkpoint_every": 10**9,
            "lr": rate,
        }
        return Stage(**{**common, **KINDS[kind], **more})

    def distilled(self, settings: Settings) -> Result:
        """One run; `kl` is what tuning goes by."""
        raise NotImplementedError

    def aligns(self, settings: Settings) -> bool:
        """Whether a stage of these settings goes by the rate of layers."""
        raise NotImplementedError

    def tuned(self, settings: dict[str, Any]) -> list[Result]:
        """The runs of all seeds, at the rates that are best on the tuning seed."""
        rates = [*self.best_rates(settings)]
        return [self.store.run(settings | {"seed": seed, "rates": rates}, self.distilled) for seed in self.setup.seeds]

    def best_rates(self, settings: dict[str, Any]) -> tuple[float, float]:
        """Best rates of layers and of logits, for these settings and their budget."""
        setup = self.setup

        def trial(layers: float, logits: float) -> float:
            tried = settings | {"seed": setup.tuning_seed, "rates": [layers, logits]}
            return float(self.store.run(tried, self.distilled)["kl"])

        ladder = setup.layer_rates if self.aligns(settings) else setup.layer_rates[:1]  # which is not used
        smaller = [tokens for tokens in setup.budgets if tokens < settings["tokens"]]
        if smaller:
            layers, logits = self.best_rates(settings | {"tokens": max(smaller)})
        else:
            pairs = [(min(ladder, key=lambda rung: abs(log(rung / rate))), rate) for rate in setup.logit_rates]
            layers, logits = min(pairs, key=lambda pair: trial(*pair)) if len(pairs) > 1 else pairs[0]
        logits = lowest(setup.logit_rates, logits, lambda rate: trial(layers, rate))
        return lowest(ladder, layers, lambda rate: trial(rate, logits)), logits

    def cells(self, combinations: Sequence[dict[str, Any]]) -> list[Result]:
        """The runs of each of these settings, with what all have in common."""
        cells = []
        for settings in combinations:
            settings = {"teacher": self.teacher.fingerprint, "part": "stages", **settings}
            cells.append({"settings": settings, "runs": self.tuned(settings)})
        return cells


class TunedText(Tuned, Bench):
    """The same of language models, whose `setup` also has the `rows` that are measured, on text for each purpose."""

    def __init__(self, setup: Any, store: Store) -> None:
        super().__init__(setup.teacher, store)
        self.setup = setup
        rows, length = setup.rows, setup.sequence_length
        self.test, self.tuning = (self.corpus.heldout_batch(rows, length, part=part) for part in ("test", "selection"))


def lowest(ladder: Sequence[float], start: float, trial: Callable[[float], float]) -> float:
    """The rung at which a trial is lowest, walking up and down from `start` while it falls."""
    at = ladder.index(start)
    if len(ladder) == 1:
        return start
    best = trial(start)
    for step in (1, -1):
        while 0 <= at + step < len(ladder) and (value := trial(ladder[at + step])) < best:
            at, best = at + step, value
        if ladder[at] != start:
            break
    return ladder[at]
