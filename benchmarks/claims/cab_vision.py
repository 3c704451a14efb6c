"""CAB's claims for vision: does the bridge to queries and keys beat its rivals where there are few images?

    python -m benchmarks.claims.cab_vision [--quick] [--teacher DIR] [--data DIR] [--json FILE] [--plot FILE.png]

The teacher is the small vision transformer that `subquad train-vit --out runs/small-vit` makes, the images are
Fashion-MNIST's.

Parts:
- stages: with 1, 5, 10, 20 and 100% of the images and as many steps, a student that is trained from nothing on labels,
  by soft distillation, by soft distillation from the teacher's weights (weight reuse), with MOHAWK's stages, and with
  the bridge (CAB), from fresh weights and from the teacher's.
- sides: the bridge to queries only, to keys only, to both; decays that begin near 1, or spread as Mamba-2's own.

Notable:
- Rates are tuned for every way alone, with a tenth of the images and the part of them that selection sees; all shares
  use what was found there, and one side and spread decays what was found for the whole bridge. Three tenths of the
  steps go to the stages before the last, as for MOHAWK.
- CAB here is the paper's for vision: soft distillation and three times the bridge, then soft distillation alone.
- The student is Discrete Mamba-2 in all layers, scanning both ways, with the class token in the middle.
- Finished runs are kept under --work: a script that was stopped goes on from there.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.claims.bench import parse, run_parts
from benchmarks.claims.cab import WHOLE
from benchmarks.claims.cab_vision_report import draw, print_report
from benchmarks.claims.runs import Result, Settings, Store
from benchmarks.claims.tuning import Tuned
from benchmarks.common import wide_console
from subquad.data.images import ImageSet, load_images, processed_size
from subquad.evaluate import image_fidelity
from subquad.model.image_student import ImageStudent, image_tokens
from subquad.model.interface import shapes_of
from subquad.plan import Plan
from subquad.recipes.stage import Stage

PARTS = ("stages", "sides")
TEACHER = "runs/small-vit"
DATA = "/usr/share/datasets/fashion-mnist"
TASK = "image-classification"
MIXER = "discrete_mamba2"
WAYS = {  # shares of the steps
    "labels": {"labels": 1.0},
    "soft distillation": {"soft": 1.0},
    "matrix + hidden": {"matrix": 0.1, "hidden": 0.2, "soft": 0.7},
    "bridge": {"bridged": 0.3, "soft": 0.7},
}
RIVALS = (  # way and weights that the student starts with
    ("labels", "fresh"),
    ("soft distillation", "fresh"),
    ("bridge", "fresh"),
    ("soft distillation", "teacher"),
    ("matrix + hidden", "teacher"),
    ("bridge", "teacher"),
)


@dataclass(frozen=True)
class Setup:
    """Settings of the runs; counts in images."""

    teacher: str = TEACHER
    data: str = DATA
    shares: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 1.0)
    tuned_share: float = 0.1
    images: int = 8_000  # seen in a run, at every share: 200 steps
    batch: int = 40
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seed: int = 100
    layer_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    logit_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    test_images: int = 5_000
    budgets: tuple[int, ...] = ()  # tuning knows one
    sequence_length: int = 0  # the teacher's: tokens of an image


QUICK: dict[str, Any] = {
    "shares": (0.1,),
    "images": 2_560,
    "seeds": (0,),
    "layer_rates": (3e-3,),
    "logit_rates": (1e-3,),
    "test_images": 500,
}


class CabVision(Tuned):
    """The runs of these claims."""

    lessons: ImageSet

    def __init__(self, setup: Setup, store: Store) -> None:
        super().__init__(setup.teacher, store, TASK)
        model, reader = self.teacher.model, self.teacher.reader
        tokens = image_tokens(model, processed_size(reader))
        self.setup = replace(setup, sequence_length=tokens)
        self.images = load_images(
            setup.data, reader, channels=model.config.num_channels, tokens=tokens, heldout_fraction=0.02
        )
        self.lessons, self.sources = self.images, self.images.sources
        self.test = [*self.images.heldout_batches(min(setup.test_images, len(self.images.parts["test"])), batch=256)]
        self.tuning = [*self.images.heldout_batches(len(self.images.parts["selection"]), "selection", batch=256)]
        self.accuracy = image_fidelity({}, model, self.test)["teacher"]["accuracy"]

    def fresh(self, settings: Settings) -> ImageStudent:
        """A student of all mixers, with the teacher's weights or with new ones; calibrated in the first case."""
        model, seed = self.teacher.model, settings["seed"]
        torch.manual_seed(seed)
        if settings["start"] == "fresh":
            model = type(model)(model.config).to(self.device).requires_grad_(False)
        plan = Plan.by_layer(shapes_of(model), [], MIXER, {"bidirectional": True, "memory": settings["memory"]})
        student = ImageStudent.from_teacher(model, plan)
        student.calibrate(self.lessons.batch(0, batch=32, seed=seed).pixels_BCHW.to(student.device))
        return student

    def aligns(self, settings: Settings) -> bool:
        return len(WAYS[settings["way"]]) > 1

    def stages_of(self, settings: Settings) -> list[Stage]:
        """Stages that train a student."""
        layers_rate, logits_rate = settings["rates"]
        *before, last = WAYS[settings["way"]].items()
        tokens = self.setup.images * self.setup.sequence_length
        return [
            self.stage(
                kind,
                round(share * tokens),
                rate,
                **({"bridge": {"sides": settings["sides"]}} if kind == "bridged" else {}),
            )
            for (kind, share), rate in [*((one, layers_rate) for one in before), (last, logits_rate)]
        ]

    def distilled(self, settings: Settings) -> Result:
        setup, seed = self.setup, settings["seed"]
        train = self.images.parts["train"]
        image_order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        subset = train.select(image_order[: round(settings["share"] * len(train))].tolist())
        self.lessons = replace(self.images, parts={**self.images.parts, "train": subset})
        student = self.fresh(settings)
        results = self.train(student, self.stages_of(settings), seed)
        shown = self.tuning if seed == setup.tuning_seed else self.test
        fidelity = image_fidelity({"student": student}, self.teacher.model, shown)["student"]
        fidelity.pop("samples")
        return fidelity | {"stages": results}

    def best_rates(self, settings: dict[str, Any]) -> tuple[float, float]:
        """Best rates for the share that is tuned on, and the whole bridge."""
        return super().best_rates(settings | {"share": self.setup.tuned_share} | WHOLE)

    def cells(self, combinations: Sequence[dict[str, Any]]) -> list[Result]:
        return super().cells(
            [{"tokens": self.setup.images * self.setup.sequence_length, **combination} for combination in combinations]
        )

    def stages(self) -> list[Result]:
        return self.cells(
            [
                {"share": share, "way": way, "start": start, **WHOLE}
                for share, (way, start) in itertools.product(self.setup.shares, RIVALS)
            ]
        )

    def sides(self) -> list[Result]:
        common = {"share": self.setup.tuned_share, "way": "bridge", "start": "fresh"}
        variants = [("both", "long"), ("queries", "long"), ("keys", "long"), ("both", "spread")]
        return self.cells([{**common, "sides": sides, "memory": memory} for sides, memory in variants])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is not yet done, prints, and writes what was asked for."""
    about = (__doc__ or "", PARTS, "accuracy over the share of the images")
    arguments = parse(argv, "benchmarks.claims.cab_vision", *about, teacher=TEACHER, data=DATA)
    setup = Setup(teacher=arguments.teacher, data=arguments.data)
    bench = CabVision(replace(setup, **(QUICK if arguments.quick else {})), Store(arguments.work, wide_console()))
    more = {"teacher_accuracy": bench.accuracy, "train_images": len(bench.images.parts["train"])}
    run_parts(bench, arguments, more, print_report, draw, drawn="stages")


if __name__ == "__main__":
    main()
