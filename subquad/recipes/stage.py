"""One phase of training in a recipe: objectives, trainable parameters, tokens and learning rates.

The models below are the reference of a stage's keys, with defaults and units.
"""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from subquad.errors import UserError, nearest

Objective: TypeAlias = Literal[
    "matrix", "mixer_output", "block_output", "bridge", "features", "saliency", "logits", "labels"
]
Divergence: TypeAlias = Literal["forward_kl", "reverse_kl", "jensen_shannon", "soft_cross_entropy"]
OF_TOKENS = ("logits", "labels")  # objectives at the output head
OF_OUTPUTS = (*OF_TOKENS, "features", "saliency")  # and at its input; all other objectives compare layer by layer
SETS = ("mixers", "qkvo", "lora", "all", "all but mlp")


def parse_count(value: object) -> object:
    """Convert a text such as `50k` to 50000. Other values are returned unchanged for pydantic to validate."""
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9.]+)\s*([kKmMbB])", value.strip())):
        number = float(match[1]) * {"k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()]
        return round(number)
    return value


def is_number(value: object) -> bool:
    """True for a number that is not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


Count = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
Length = Annotated[int, Field(gt=0)]
OF_A_ROW = "tokens of a row"
RowLength = Annotated[int, Field(gt=0), OF_A_ROW]  # a model may take no rows as long; jobs/fitting.py shortens them
Rate = Annotated[float, Field(ge=0)]


def count_of(text: int | str, option: str) -> int:
    """Convert a number of tokens as written in a recipe, such as `50k`. Raises UserError naming `option` otherwise."""
    try:
        return int(TypeAdapter(Count).validate_python(text))
    except ValidationError:
        raise UserError(f"{option} is '{text}': give a number of tokens above 0, such as 50000, 50k or 1.5M") from None


class Section(BaseModel):
    """Base class of all parts of a recipe."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class Plateau(Section):
    """Early stopping of a stage when the mean loss over a window stops improving."""

    tokens: Count
    """Tokens of a window."""
    improvement: float = Field(default=0.01, gt=0, lt=1)
    """Share by which the mean loss must be below that of the best window so far."""


class Lora(Section):
    """Low-rank adapters (PEFT), merged into the weights at the end of the stage."""

    rank: Length = 8
    alpha: float = Field(default=16.0, gt=0)
    """Scale of the adapters: their product is multiplied by alpha / rank."""
    targets: Literal["qkvo"] | list[str] = "qkvo"
    """Linear maps of the converted layers' attention modules, or all linear maps whose names match these globs."""


class BridgeConfig(Section):
    """Maps from the student's queries and keys to the teacher's."""

    sides: Literal["both", "queries", "keys"] = "both"
    width: Length | None = None
    """Channels between the two layers of a map; none: the width of the teacher's queries or keys."""
    layers: list[int] | None = None
    """Teacher layer for each student layer; none: floor(l L_t / L_s)."""


class Stage(Section):
    """One phase of training."""

    name: str
    objective: Objective | dict[str, float] = "logits"
    """Loss: `matrix` (mixing matrices), `mixer_output` and `block_output` (hidden states), `bridge` (queries and keys,
    through small maps), `features` (the last hidden states), `saliency` (the map of a saliency model), `logits`
    (divergence from the teacher), `labels` (next token, or class), or a weighted sum: `{logits: 1.0, labels: 0.1}`."""
    teacher_forced: bool | None = None
    """True if every layer gets the teacher's input; none: true unless `bridge`, `features`, `saliency`, `logits` or
    `labels` are among the objectives."""
    scope: Literal["all-linear", "plan"] = "plan"
    """Student to train: the all-linear student that the selector starts from, or the selected plan."""
    replaced: float = Field(default=1.0, gt=0, le=1)
    """Share of the mixer layers that use their mixer in this stage, spread evenly. The others still compute attention
    (stepwise replacement). The share must not decrease from stage to stage."""
    trainable: str | list[str] = "mixers"
    """Parameters to train: `mixers` (weights that the teacher does not have), `qkvo` (projections, biases and norms of
    the attention modules with mixers), `lora`, `all`, `all but mlp`, globs over parameter names, or a list of these."""
    lora: Lora | None = None
    """Adapters, if `lora` is among `trainable`."""
    tokens: Count
    sequence_length: RowLength = 512
    batch: Length = 1
    """Sequences in one optimiser step, over all processes and micro-batches."""
    accumulate: Length = 1
    """Micro-batches of one optimiser step; more of them need less memory for the same result."""
    gradient_checkpointing: bool = False
    """Recompute every block in the backward pass instead of storing activations; less memory, same result."""
    lr: float = Field(default=1e-3, gt=0)
    lr_groups: dict[str, Rate] = {}
    """Other learning rates for sets or globs as in `trainable`; the first match applies."""
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    """Learning rate schedule. `wsd`: warm-up, stable, and a linear decay over the last tenth."""
    warmup: float = Field(default=0.05, ge=0)
    """Warm-up: a share of the steps if below 1, else a number of steps."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the end of the schedule, as a share of `lr`."""
    plateau: Plateau | None = None
    """Early stopping before all tokens are used."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    eps: float = Field(default=1e-8, gt=0)
    clip: float | None = Field(default=1.0, gt=0)
    """Largest norm of the gradient; none: no clipping."""
    divergence: Divergence = "forward_kl"
    """Divergence that the objective `logits` minimises."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the logits in the divergence."""
    loss: Literal["norm", "squared"] = "norm"
    """Distance of hidden states, averaged over tokens: the L2 norm over the model width, or the squared error."""
    bridge: BridgeConfig = BridgeConfig()
    """Settings of the objective `bridge`."""
    gap: Length = 1
    """Consecutive blocks that run free within `block_output`: each group of them gets the teacher's input once."""
    teacher: str | None = None
    """Another teacher for `logits`, with the same vocabulary: a Hub id, a folder, or a GGUF file."""
    teacher_cache: str | None = None
    """Folder of `subquad cache-teacher` with the teacher's logits, used instead of running the teacher."""
    log_every: Length = 1
    """Steps between lines of log.jsonl."""
    checkpoint_every: Length = 100
    """Steps between checkpoints."""

    @property
    def steps(self) -> int:
        """Number of optimiser steps that use up the tokens."""
        return math.ceil(self.tokens / (self.batch * self.sequence_length))

    @property
    def weights(self) -> dict[str, float]:
        """Objectives with their weights."""
        return dict(self.objective) if isinstance(self.objective, dict) else {str(self.objective): 1.0}

    @property
    def forced(self) -> bool:
        """True if every layer gets the teacher's input."""
        if self.teacher_forced is None:
            return self.weights.keys().isdisjoint((*OF_OUTPUTS, "bridge"))
        return self.teacher_forced

    @property
    def trained(self) -> list[str]:
        """Sets and globs of the trained parameters."""
        return [self.trainable] if isinstance(self.trainable, str) else self.trainable

    @field_validator("objective", mode="before")
    @classmethod
    def _known_objective(cls, value: object) -> object:
        names = [*value] if isinstance(value, Mapping) else [value]
        for name in names:
            if name not in get_args(Objective):
                raise ValueError(f"names no objective with '{name}': {nearest(str(name), get_args(Objective))}")
        if not names:
            raise ValueError("should name at least one objective")
        if isinstance(value, Mapping) and not all(is_number(weight) and weight > 0 for weight in value.values()):
            raise ValueError("should give every objective a positive number as its weight")
        return value

    @field_validator("trainable", mode="before")
    @classmethod
    def _known_trainable(cls, value: object) -> object:
        names: list[Any] = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"should be {', '.join(SETS)}, globs over parameter names, or a list of these")
        for name in names:
            if name not in SETS and not any(character in name for character in "*?[."):
                raise ValueError(f"names no set of parameters with '{name}', nor a glob: {nearest(name, SETS)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Stage":
        weights = self.weights
        output_objectives = [name for name in OF_OUTPUTS if name in weights]
        if self.batch % self.accumulate:
            raise ValueError(f"cannot cut a batch of {self.batch} into accumulate = {self.accumulate} equal parts")
        if self.forced and output_objectives:
            raise ValueError(
                f"cannot be teacher_forced with '{output_objectives[0]}', which reads the student's last layer"
            )
        if "matrix" in weights and not self.forced:
            raise ValueError(
                "compares matrices of different inputs: 'matrix' needs teacher_forced, so it cannot be summed with "
                "features, saliency, logits or labels, nor, unless teacher_forced is set, with bridge"
            )
        if "bridge" not in weights and self.bridge != BridgeConfig():
            raise ValueError("has settings under 'bridge', which is not among its objectives")
        if self.gap > 1 and not ("block_output" in weights and self.forced):
            raise ValueError("has a gap, which is for a teacher-forced 'block_output'")
        if ("lora" in self.trained) != (self.lora is not None):
            raise ValueError("needs both 'lora' among its trainable and its settings under 'lora', or neither")
        if self.teacher is not None and self.teacher_cache is not None:
            raise ValueError("has both a teacher and a teacher_cache: give one of them")
        for key in ("teacher", "teacher_cache"):
            if getattr(self, key) is not None and not {"logits"} <= weights.keys() <= {*OF_TOKENS}:
                raise ValueError(f"has a {key}, which has only logits to give, for '{' + '.join(weights)}'")
        if self.teacher_cache is not None and self.temperature != 1.0:
            raise ValueError("has a teacher_cache, which holds logits at temperature 1, and another temperature")
        return self


def check_order(stages: list[Stage]) -> None:
    """Check the order of the stages. Raises ValueError if they cannot follow one another."""
    names = [stage.name for stage in stages]
    if len({*names}) < len(names):
        raise ValueError(f"gives two stages the same name: {', '.join(names)}")
    scopes = [stage.scope for stage in stages]
    if scopes != sorted(scopes):  # "all-linear" < "plan"
        raise ValueError("trains an all-linear stage after a plan stage: put all-linear stages first")
    shares = [stage.replaced for stage in stages if stage.scope == "plan"]
    if shares != sorted(shares) or shares[-1:] not in ([], [1.0]):
        raise ValueError("should replace more layers from stage to stage, and all of them in the last: see 'replaced'")


def scale_stage(stage: Stage, factor: float) -> Stage:
    """Multiply the token counts of a stage by `factor`."""
    update: dict[str, Any] = {"tokens": max(1, round(stage.tokens * factor))}
    if stage.plateau is not None:
        window = max(1, round(stage.plateau.tokens * factor))
        update["plateau"] = stage.plateau.model_copy(update={"tokens": window})
    return stage.model_copy(update=update)
