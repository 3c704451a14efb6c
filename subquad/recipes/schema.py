"""A recipe: teacher, data, mixer, selector and budget, training stages and evaluation, as one readable YAML file.

The models below are the reference of the file format, with every key, default and unit.
"""

from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from subquad.plan import Join, JoinStart
from subquad.recipes.stage import Count, Length, RowLength, Section, Stage, check_order, parse_count

ProbeTask: TypeAlias = Literal["copy", "dictionary", "passkey", "associative", "variables", "questions"]


def _text(value: object) -> object:
    """Convert a bare YAML number such as `15` or `0.5` to text."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class DataConfig(Section):
    """Text or images for training and evaluation."""

    sources: list[str] | None = None
    """Files (.txt, .jsonl, .jsonl.gz, .parquet), folders of them, or `datasets` ids; none: the default corpora.
    For images, exactly one source: a folder of idx files, a folder with a subfolder per class, or a `datasets` id."""
    max_tokens: Count | None = None
    """Largest number of training tokens; none: all of a local source."""
    max_images: Count | None = None
    """Largest number of training images, drawn at random; none: all."""
    heldout_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of the tokens or images that training never sees."""


class NamedMixer(Section):
    """A mixer with its options."""

    name: str
    options: dict[str, Any] = {}
    """Keyword arguments of the mixer, such as `window: 64`."""


class StudentModelConfig(Section):
    """The model whose attention is replaced, if it is not the teacher."""

    model: str | None = None
    """Hub id or folder of its configuration; none: the teacher's."""
    changes: dict[str, Any] = {}
    """Changes to that configuration, such as `num_hidden_layers: 3`."""
    start: Literal["random", "teacher"] = "random"
    """Initial weights. `teacher` copies those of the same name and shape, for layer l from layer floor(l L_t / L_s)."""


class MixerConfig(NamedMixer):
    """The mixer that replaces attention."""

    name: str = "hedgehog"
    join: Join = "split"
    """Join in layers where only some heads keep attention: `split` gives each head one mixer; `parallel` gives this
    mixer all heads, and attention joins as a branch (subquad/model/join.py)."""
    join_start: JoinStart = "identity"
    """Initial adapter of the parallel join: `identity`, or `random` (the paper's code)."""
    alternatives: list[NamedMixer] = []
    """More mixers that the selector kl may use in units without attention, where they are better for their bytes. The
    all-linear stages are run for each of them."""


class SelectorConfig(Section):
    """The selector of the units that keep attention, and its budget."""

    by: str = "kl"
    unit: Literal["layer", "head"] | Length | list[list[int]] | None = None
    """Unit that is kept or replaced together: a `layer`, a `head`, a number of neighbouring layers, or lists of layers;
    none: the selector's default (heads for retrieval-heads, layers for all others)."""
    budget: Annotated[str, BeforeValidator(_text)] = "50%"
    """Amount that keeps attention: units (`15`), a share of them (`50%`), cache bytes (`64MiB@32k`), a decoding speed
    relative to the teacher (`1.5x@32k`), or a plan that the greedy selector finds (`opt`, `best`)."""
    window_layers: Literal["keep", "replace"] | None = None
    """Layers in which the teacher itself has a sliding window, beside others that attend to everything: `keep` leaves
    them as they are, `replace` makes them units like the others; none: keep if the budget is a number or a share of
    units, since their cache does not grow with the context."""
    tokens: Count = 8192
    """Tokens that the units are scored on, in complete rows. They are used neither for training nor for evaluation."""
    sequence_length: RowLength = 1024
    options: dict[str, Any] = {}
    """Keyword arguments of the selector (docs/select.md). Numbers of tokens may be written as `50k`."""

    @field_validator("options")
    @classmethod
    def _tokens_as_numbers(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {key: parse_count(value) if key.endswith("tokens") else value for key, value in options.items()}


class RetrievalConfig(Section):
    """Retrieval probes: recall of tokens from far back in the context."""

    tasks: list[ProbeTask] = ["copy", "dictionary", "passkey"]
    contexts: list[RowLength] = [256, 1024, 2048]
    count: Length = 8
    """Prompts per task and context length."""


class EvaluateConfig(Section):
    """Measurements at the end of a run. Lengths are in tokens."""

    contexts: list[RowLength] = Field(default=[256, 1024, 2048], min_length=1)
    """Context lengths of KL, perplexity and top-1 agreement. One pass at the longest measures all."""
    rows: Length = 8
    """Number of held-out sequences of the longest context, or of held-out images."""
    retrieval: RetrievalConfig = RetrievalConfig()
    tasks: list[str] = []
    """Tasks of lm-eval (`arc_easy`), or JSONL files of your own questions; the teacher and every model are measured."""
    task_limit: Length | None = None
    """Number of documents of a task to measure, from the first; none: all."""
    cache_contexts: list[Length] = [2048, 4096, 8192, 16384, 32768, 65536, 131072]
    """Context lengths at which cache bytes are reported."""
    prompts: list[str] = [
        "The most important thing about the sea is",
        "My fellow citizens, the year that lies behind us",
    ]
    """Prompts of the sample generations."""
    max_new_tokens: Length = 48


class Recipe(Section):
    """A complete conversion. `load_recipe` reads a recipe; `to_yaml` writes it with all defaults filled in."""

    name: str
    description: str = ""
    task: Literal["text-generation", "image-classification", "image-feature-extraction"] = "text-generation"
    """Task of the teacher. It determines how the teacher is loaded, and whether `data` is text or images."""
    teacher: str = "default"
    """Hub id, folder or GGUF file; `default` is SmolLM2-135M-Instruct."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the models. With bfloat16, weights are float32 while they are trained."""
    seed: int = Field(default=0, ge=0)
    tied_embeddings: Literal["keep", "untie", "retie", "refuse"] = "keep"
    """Treatment of an input embedding that is also the output head: `keep` trains the shared matrix, `untie` gives the
    student two matrices, `retie` trains two and then uses their mean, `refuse` rejects such a teacher."""
    data: DataConfig = DataConfig()
    student: StudentModelConfig | None = None
    """A separate model for the student, such as a smaller one; none: the teacher with all its weights."""
    mixer: MixerConfig = MixerConfig()
    selector: SelectorConfig = SelectorConfig()
    stages: list[Stage] = []
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _stages_in_order(self) -> "Recipe":
        check_order(self.stages)
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
