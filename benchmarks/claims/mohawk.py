"""MOHAWK's claims: do its three stages, the teacher's weights and a free MLP help, and what do mixing matrices hold?

    python -m benchmarks.claims.mohawk [--quick] [--teacher DIR|default] [--json FILE] [--plot FILE.png] [--work DIR]

Parts:
- stages: at equal tokens, matrix + hidden + logits against hidden + logits against logits alone, for Discrete Mamba-2
  without rotary embedding (the paper's) and with it, from the teacher's projections and from fresh ones, at two
  budgets.
- mlp: the logit stage with the MLPs free or frozen.
- matrices: how well Toeplitz, low-rank and SSD matrices hold the teacher's, each on its own; and how near the mixers
  come that the matrix stage trains, by state size.

Notable:
- All layers are replaced. Rates are tuned for every combination and budget alone, on a seed and on text that nothing is
  reported of: first that of logits, then that of layers, in steps up and down a ladder while it gets better; a larger
  budget starts from the smaller one's best. The table shows other seeds on the test split.
- Of the tokens of three stages a tenth goes to matrices and a fifth to hidden states; of two, three tenths.
- A small teacher is trained on text and retrieval in turns, as it was itself; a large one on text.
- Finished runs are kept under --work: a script that was stopped goes on from there.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from benchmarks.claims import matrices
from benchmarks.claims.bench import SMALL_TEACHER, parse, run_parts
from benchmarks.claims.report import draw, print_report
from benchmarks.claims.runs import Result, Settings, Store
from benchmarks.claims.tuning import TunedText
from benchmarks.common import wide_console
from subquad.data.probes import make_probe
from subquad.distill.layer_losses import attention_probabilities
from subquad.distill.teacher_forced import TeacherForced
from subquad.evaluate import likelihood, retrieval
from subquad.model.interface import watched_attention
from subquad.model.student import Student
from subquad.plan import Plan
from subquad.recipes.stage import Stage

PARTS = ("stages", "mlp", "matrices")
WAYS = {  # shares of the tokens
    "matrix + hidden + logits": {"matrix": 0.1, "hidden": 0.2, "logits": 0.7},
    "hidden + logits": {"hidden": 0.3, "logits": 0.7},
    "logits": {"logits": 1.0},
}
MIXERS = {
    "without rotary": ("discrete_mamba2", {"conv": 4}),
    "with rotary": ("discrete_mamba2", {"conv": 4, "rotary": True}),
}
TRAINED = {  # by the matrix stage alone
    "linear": {},
    "retention": {},
    "gla": {},
    "mamba2": {"conv": 1},
    "discrete_mamba2": {"conv": 1},
    "gated_deltanet": {"conv": 1},
    "kda": {},
    "rwkv7": {},
}


@dataclass(frozen=True)
class Setup:
    """Settings of the runs; lengths and counts in tokens."""

    teacher: str = SMALL_TEACHER
    sequence_length: int = 256
    batch: int = 8
    budgets: tuple[int, ...] = (40_000, 200_000)
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100
    layer_rates: tuple[float, ...] = (1e-3, 5e-3, 2.5e-2, 0.125)
    logit_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    mixers: tuple[str, ...] = tuple(MIXERS)
    starts: tuple[str, ...] = ("teacher", "fresh")
    state_dims: tuple[int, ...] = (4, 8, 16, 32)
    matrix_tokens: int = 30_000
    matrix_length: int = 256
    matrix_count: int = 96
    rows: int = 24
    probe_rows: int = 64
    probe_context: int = 128


QUICK: dict[str, Any] = {
    "budgets": (16_000,),
    "seeds": (0,),
    "layer_rates": (5e-3,),
    "logit_rates": (1e-3,),
    "mixers": ("without rotary",),
    "state_dims": (8, 32),
    "matrix_tokens": 8_000,
    "matrix_count": 16,
    "rows": 8,
    "probe_rows": 16,
}
LARGE: dict[str, Any] = {  # SmolLM2 on two cores
    "sequence_length": 512,
    "batch": 1,
    "budgets": (12_000,),
    "layer_rates": (1e-3,),
    "logit_rates": (1e-4, 3e-4, 1e-3),
    "mixers": ("without rotary",),
    "starts": ("teacher",),
    "seeds": (0,),
    "state_dims": (16, 64),
    "matrix_tokens": 8_000,
    "rows": 3,
    "probe_rows": 4,
    "probe_context": 256,
}


class Mohawk(TunedText):
    """The runs of these claims."""

    def __init__(self, setup: Setup, store: Store) -> None:
        super().__init__(setup, store)
        tokenizer: Any = self.teacher.tokenizer
        self.probes = {
            task: {
                setup.probe_context: make_probe(
                    task, tokenizer, setup.probe_context, setup.probe_rows, haystack_ids=self.test
                )
            }
            for task in ("copy", "dictionary")
        }

    def linear(self, mixer: str, options: dict[str, Any], start: str, seed: int) -> Student:
        """All layers replaced, with the teacher's projections or fresh ones, calibrated."""
        student = self.student(Plan.by_layer(self.shapes, [], mixer, options), seed)
        if start == "fresh":
            _refresh(student)
        self.calibrate(student, self.setup.sequence_length, seed)
        return student

    def distilled(self, settings: Settings) -> Result:
        """One run of `settings`: its stages, and what the student is worth after them."""
        mixer, options = MIXERS[settings["mixer"]]
        student = self.linear(mixer, options, settings["start"], settings["seed"])
        layers_rate, logits_rate = settings["rates"]
        stages = [
            self.stage(
                kind,
                round(share * settings["tokens"]),
                logits_rate if kind == "logits" else layers_rate,
                **({"trainable": settings["trainable"]} if kind == "logits" else {}),
            )
            for kind, share in WAYS[settings["way"]].items()
        ]
        results = self.train(student, stages, settings["seed"])
        text, at = self.tuning if settings["seed"] == self.setup.tuning_seed else self.test, self.setup.sequence_length
        measured = likelihood({"student": student}, self.teacher.model, text, [at])["student"]
        scores = retrieval(student, self.probes)
        return {
            "kl": measured["kl"][at],
            "top1": measured["top1"][at],
            "perplexity": measured["perplexity"][at],
            "copy": scores["copy"][self.setup.probe_context],
            "dictionary": scores["dictionary"][self.setup.probe_context],
            "stages": results,
        }

    def aligns(self, settings: Settings) -> bool:
        return str(settings["way"]) != "logits"

    def stages(self) -> list[Result]:
        setup = self.setup
        product = itertools.product(setup.budgets, setup.mixers, setup.starts, WAYS)
        return self.cells(
            [
                {"trainable": "all", "tokens": tokens, "mixer": mixer, "start": start, "way": way}
                for tokens, mixer, start, way in product
            ]
        )

    def mlp(self) -> list[Result]:
        settings = {"tokens": self.setup.budgets[-1], "mixer": self.setup.mixers[0], "start": "teacher"}
        settings["way"] = "matrix + hidden + logits"
        return self.cells([{**settings, "trainable": trainable} for trainable in ("all", "all but mlp")])

    def matrices(self) -> dict[str, Any]:
        store, teacher = self.store, {"teacher": self.teacher.fingerprint}
        own = store.run(teacher | {"part": "matrices", **self._sizes()}, self.held)
        trained = []
        widest = max(width for width in self.setup.state_dims if width <= self.shapes[0].head_dim)
        for mixer, options in TRAINED.items():
            for width in self.setup.state_dims:
                if width <= self.shapes[0].head_dim and (mixer == "discrete_mamba2" or width == widest):
                    for seed in self.setup.seeds:
                        settings = {"part": "trained matrices", "mixer": mixer, "options": options, "state_dim": width}
                        settings |= {"seed": seed, "tokens": self.setup.matrix_tokens, **self._sizes()}
                        trained.append(store.run(teacher | settings, self.matrix_stage))
        return {"each": own, "trained": trained}

    def _sizes(self) -> dict[str, Any]:
        return {"count": self.setup.matrix_count, "length": self.setup.matrix_length}

    def held(self, settings: Settings) -> Result:
        """Errors of the families on matrices of the teacher, drawn evenly from layers, heads and two rows of text."""
        rows = self.corpus.heldout_batch(2, settings["length"]).to(self.device)
        with watched_attention(self.teacher.model) as calls, torch.no_grad():
            self.teacher.model.base_model(rows, use_cache=False)
        layers = [attention_probabilities(c, s.window) for c, s in zip(calls.values(), self.shapes, strict=True)]
        probabilities = torch.cat([layer_BHTT.flatten(0, 1) for layer_BHTT in layers]).float().cpu()
        chosen = torch.linspace(0, len(probabilities) - 1, settings["count"]).round().long()
        a_XTT = probabilities[chosen]
        errors = {"nothing": torch.linalg.matrix_norm(a_XTT).tolist()}
        errors["toeplitz"] = matrices.error(matrices.toeplitz(a_XTT), a_XTT)
        for columns in self.setup.state_dims:
            for name, decay in (("low_rank", False), ("ssd", True)):
                fit_XTT = matrices.fitted(a_XTT, columns, decay=decay)
                errors[f"{name} {columns}"] = matrices.error(fit_XTT, a_XTT)
        return {"errors": errors}

    def matrix_stage(self, settings: Settings) -> Result:
        """The distance of a mixer's matrices from the teacher's on held-out text, before and after a matrix stage."""
        options = {**settings["options"], "state_dim": settings["state_dim"]}
        student = self.linear(settings["mixer"], options, "teacher", settings["seed"])
        stage = self.stage("matrix", settings["tokens"], 3e-3)
        before = self.distance(student, stage)
        (result,) = self.train(student, [stage], settings["seed"])
        return {"before": before, "after": self.distance(student, stage), "stage": result}

    @torch.no_grad()
    def distance(self, student: Student, stage: Stage) -> float:
        rows = self.corpus.heldout_batch(4, self.setup.matrix_length).to(self.device)
        losses = TeacherForced(stage, student, self.teacher.model)(rows, 1.0)
        return float(torch.stack([loss.cpu() for loss in losses.values()]).mean())


@torch.no_grad()
def _refresh(student: Student) -> None:
    """Projections as a model starts with: random, of the size that keeps the activations'."""
    inside = [
        module
        for attention in student.attention_modules()
        for name, module in attention.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not name.startswith("mixer")
    ]
    parameters = {id(parameter) for module in inside for parameter in module.parameters()}
    student.unshare(name for name, parameter in student.named_parameters() if id(parameter) in parameters)
    for module in inside:
        module.weight.normal_(std=student.config.get_text_config().hidden_size ** -0.5)
        if module.bias is not None:
            module.bias.zero_()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not yet done, prints, and writes what was asked for."""
    arguments = parse(argv, "benchmarks.claims.mohawk", __doc__ or "", PARTS, "the stages over tokens")
    changes = {**(LARGE if arguments.teacher == "default" else {}), **(QUICK if arguments.quick else {})}
    setup = replace(Setup(teacher=arguments.teacher), **changes)
    bench = Mohawk(setup, Store(arguments.work, wide_console()))
    run_parts(bench, arguments, {}, print_report, draw, drawn="stages")


if __name__ == "__main__":
    main()
