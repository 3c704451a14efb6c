"""CAB's claims for language: does the bridge to queries and keys beat its rivals where there is little text?

    python -m benchmarks.claims.cab [--quick] [--teacher DIR] [--json FILE] [--plot FILE.png] [--work DIR]

Parts:
- stages: at equal tokens and three budgets, a student that is trained on labels, distilled, bridged and distilled, from
  fresh weights and from the teacher's (weight reuse), and one with MOHAWK's stages; with as many layers as the teacher,
  and with half of them.
- sides: the bridge to queries only, to keys only, to both; decays that begin near 1, or spread as Mamba-2's own; the
  bridge for a tenth of the tokens, which is the paper's share.
- cost: seconds and activations of a stage with the bridge and of one with matrices, over the length of its sequences.

Notable:
- Rates are tuned for every way, start and budget alone (tuning.py), with all layers and the whole bridge; half of the
  layers, one side, and spread decays use the same. Three tenths of the tokens go to the stages before the last, as for
  MOHAWK; the last is cross-entropy + 0.5 KL, CAB's own.
- The student is Discrete Mamba-2 in all layers, without rotary embedding. The teacher's bytes decide nothing here, so
  the student's width is the teacher's.
- Finished runs are kept under --work: a script that was stopped goes on from there.
"""

import itertools
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.claims.bench import SMALL_TEACHER, parse, run_parts
from benchmarks.claims.cab_report import draw, print_report
from benchmarks.claims.runs import Result, Settings, Store
from benchmarks.claims.tuning import TunedText
from benchmarks.common import wide_console
from subquad.distill.estimate import estimate_stage
from subquad.distill.loop import StageInputs
from subquad.evaluate import likelihood
from subquad.jobs.base_model import take_weights
from subquad.jobs.run import make_accelerator
from subquad.model.interface import shapes_of
from subquad.model.student import Student
from subquad.plan import Plan

PARTS = ("stages", "sides", "cost")
MIXER = "discrete_mamba2"
WAYS = {  # shares of the tokens
    "labels": {"labels": 1.0},
    "distillation": {"distillation": 1.0},
    "matrix + hidden": {"matrix": 0.1, "hidden": 0.2, "distillation": 0.7},
    "bridge": {"bridge": 0.3, "distillation": 0.7},
    "short bridge": {"bridge": 0.1, "distillation": 0.9},
}
RIVALS = (  # way and weights that the student starts with
    ("labels", "fresh"),
    ("distillation", "fresh"),
    ("bridge", "fresh"),
    ("distillation", "teacher"),
    ("matrix + hidden", "teacher"),
    ("bridge", "teacher"),
)
WHOLE = {"sides": "both", "memory": "long"}  # bridge
ALL_LAYERS = ("matrix + hidden",)  # ways that give every layer the teacher's input, so that there must be as many


@dataclass(frozen=True)
class Setup:
    """Settings of the runs; lengths and counts in tokens."""

    teacher: str = SMALL_TEACHER
    layers: tuple[int, ...] = (4, 2)
    sequence_length: int = 256
    batch: int = 8
    budgets: tuple[int, ...] = (20_000, 60_000, 150_000)
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100
    layer_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    logit_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)  # of the sequences whose stages are priced
    rows: int = 24


QUICK: dict[str, Any] = {
    "layers": (4,),
    "budgets": (16_000,),
    "seeds": (0,),
    "layer_rates": (3e-3,),
    "logit_rates": (3e-3,),
    "lengths": (256, 512),
    "rows": 8,
}


class Cab(TunedText):
    """The runs of these claims."""

    def fresh(self, settings: Settings) -> Student:
        """A student with a model of its own: all layers mixed, calibrated where its weights are the teacher's."""
        config = deepcopy(self.teacher.model.config)
        config.num_hidden_layers = settings["layers"]
        torch.manual_seed(settings["seed"])
        model = AutoModelForCausalLM.from_config(config).to(self.device).requires_grad_(False)
        if settings["start"] == "teacher":
            take_weights(model, self.teacher.model)
        student = Student.from_teacher(
            model, Plan.by_layer(shapes_of(model), [], MIXER, {"memory": settings["memory"]})
        )
        self.calibrate(student, self.setup.sequence_length, settings["seed"])
        return student

    def aligns(self, settings: Settings) -> bool:
        return len(WAYS[settings["way"]]) > 1

    def distilled(self, settings: Settings) -> Result:
        student = self.fresh(settings)
        layers_rate, logits_rate = settings["rates"]
        *before, last = WAYS[settings["way"]].items()
        stages = [
            self.stage(
                kind,
                round(share * settings["tokens"]),
                rate,
                **({"bridge": {"sides": settings["sides"]}} if kind == "bridge" else {}),
            )
            for (kind, share), rate in [*((one, layers_rate) for one in before), (last, logits_rate)]
        ]
        results = self.train(student, stages, settings["seed"])
        text, at = self.tuning if settings["seed"] == self.setup.tuning_seed else self.test, self.setup.sequence_length
        measured = likelihood({"student": student}, self.teacher.model, text, [at])
        result = {key: measured["student"][key][at] for key in ("kl", "top1", "perplexity")}
        return result | {"teacher_perplexity": measured["teacher"]["perplexity"][at], "stages": results}

    def best_rates(self, settings: dict[str, Any]) -> tuple[float, float]:
        """Best rates for a student with all layers and the whole bridge."""
        return super().best_rates(settings | {"layers": len(self.shapes)} | WHOLE)

    def stages(self) -> list[Result]:
        setup = self.setup
        whole = len(self.shapes)
        return self.cells(
            [
                {"tokens": tokens, "layers": layers, "way": way, "start": start, **WHOLE}
                for tokens, layers, (way, start) in itertools.product(setup.budgets, setup.layers, RIVALS)
                if layers == whole or way not in ALL_LAYERS
            ]
        )

    def sides(self) -> list[Result]:
        setup = self.setup
        base = {"tokens": setup.budgets[len(setup.budgets) // 2], "layers": len(self.shapes), "way": "bridge"}
        base |= {"start": "fresh", **WHOLE}
        changes = [{}, {"sides": "queries"}, {"sides": "keys"}, {"memory": "spread"}]
        changes += [{"way": "short bridge", "start": start} for start in ("fresh", "teacher")]
        return self.cells([base | change for change in changes])

    def cost(self) -> list[Result]:
        """Cost of a step of `batch` sequences, for as many tokens at every length."""
        settings = {"layers": len(self.shapes), "start": "fresh", "seed": 0, "memory": "long"}
        rows: list[Result] = []
        tokens = max(self.setup.lengths)
        for length, kind in itertools.product(self.setup.lengths, ("bridge", "matrix")):
            stage = self.stage(kind, 2 * tokens, 1e-3, sequence_length=length, batch=tokens // length)
            with TemporaryDirectory() as folder:
                inputs = StageInputs(self.teacher.model, self.corpus, make_accelerator(Path(folder)))
                probe = estimate_stage(stage, inputs, student=self.fresh(settings), tokens=tokens)
            row = {"length": length, "stage": kind, "seconds": probe.pass_seconds + probe.update_seconds}
            rows.append(row | {"tokens": tokens, "activation_bytes": probe.activation_bytes})
        return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not yet done, prints, and writes what was asked for."""
    arguments = parse(argv, "benchmarks.claims.cab", __doc__ or "", PARTS, "perplexity over tokens")
    setup = replace(Setup(teacher=arguments.teacher), **(QUICK if arguments.quick else {}))
    run_parts(Cab(setup, Store(arguments.work, wide_console())), arguments, {}, print_report, draw, drawn="stages")


if __name__ == "__main__":
    main()
