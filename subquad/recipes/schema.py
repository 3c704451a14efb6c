"""A recipe: teacher, data, mixer, selector and budget, training stages and evaluation, as one readable YAML file.

The models below *are* the reference of the file format: every key, its default and its unit stands here.
"""

from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BeforeValidator, Field, field_validator, model_validator

from subquad.plan import Join, JoinStart
from subquad.recipes.stage import Count, Length, Section, Stage, check_order, parse_count

ProbeTask: TypeAlias = Literal["copy", "dictionary", "passkey", "associative", "variables", "questions"]


def _text(value: object) -> object:
    """A bare `15` or `0.5` in YAML is a number; where a text is meant, take it as one."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


class DataConfig(Section):
    """The text, or the images, to train on and to measure with."""

    sources: list[str] | None = None
    """Files (.txt, .jsonl, .jsonl.gz, .parquet), folders of them, or `datasets` ids; none: the default corpora.
    Of images one source: a folder of idx files, a folder with one of images for each class, or a `datasets` id."""
    max_tokens: Count | None = None
    """Tokens to read at most; none: all of a local source."""
    max_images: Count | None = None
    """Images to train on at most, drawn at random; none: all."""
    heldout_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of the tokens or images that training never sees."""


class NamedMixer(Section):
    """A mixer."""

    name: str
    options: dict[str, Any] = {}
    """Keyword arguments of the mixer, such as `window: 64`."""


class StudentModelConfig(Section):
    """The model whose attention is replaced, where that is not the teacher."""

    model: str | None = None
    """A Hub id or folder whose configuration it has; none: the teacher's."""
    changes: dict[str, Any] = {}
    """What is different in that configuration: `num_hidden_layers: 3`."""
    start: Literal["random", "teacher"] = "random"
    """`teacher`: weights of the same name and shape are the teacher's, layer l's from its layer floor(l L_t / L_s)."""


class MixerConfig(NamedMixer):
    """What takes the place of attention."""

    name: str = "hedgehog"
    join: Join = "split"
    """Where only some heads of a layer attend: `split` gives each head one mixer; `parallel` gives this mixer all the
    heads, and attention joins as a branch (subquad/model/join.py)."""
    join_start: JoinStart = "identity"
    """How the adapter of the parallel join begins: `identity`, or `random` (the paper's code)."""
    alternatives: list[NamedMixer] = []
    """Other mixers that the selector kl may give to units that do not keep attention, each where it serves better for
    its bytes. The all-linear stages are run for each of them."""


class SelectorConfig(Section):
    """What keeps attention."""

    by: str = "kl"
    unit: Literal["layer", "head"] | Length | list[list[int]] | None = None
    """What is kept or replaced as a whole: a `layer`, a `head`, that many neighbouring layers, or the layers listed
    together; none: what the selector is for (heads for retrieval-heads, layers for all others)."""
    budget: Annotated[str, BeforeValidator(_text)] = "50%"
    """What may keep attention: units (`15`), a share of them (`50%`), cache bytes (`64MiB@32k`), a decoding speed in
    that of the teacher (`1.5x@32k`), or a plan that the greedy selector finds (`opt`, `best`)."""
    tokens: Count = 8192
    """Tokens that the units are scored on, in whole rows: neither trained nor, later, measured on."""
    sequence_length: Length = 1024
    options: dict[str, Any] = {}
    """Keyword arguments of the selector (docs/select.md); numbers of tokens may be written as everywhere, `50k`."""

    @field_validator("options")
    @classmethod
    def _tokens_as_numbers(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {key: parse_count(value) if key.endswith("tokens") else value for key, value in options.items()}


class RetrievalConfig(Section):
    """Can the student still fetch what stands far back?"""

    tasks: list[ProbeTask] = ["copy", "dictionary", "passkey"]
    contexts: list[Length] = [256, 1024, 2048]
    count: Length = 8
    """Prompts for each task and context length."""


class EvaluateConfig(Section):
    """What is measured at the end; lengths are tokens."""

    contexts: list[Length] = Field(default=[256, 1024, 2048], min_length=1)
    """Context lengths of KL, perplexity and top-1 agreement; one pass at the longest gives all."""
    rows: Length = 8
    """Held-out sequences of the longest of `contexts`, or held-out images."""
    retrieval: RetrievalConfig = RetrievalConfig()
    tasks: list[str] = []
    """Tasks of lm-eval (`arc_easy`), or JSONL files of your own questions; the teacher and every model are measured."""
    task_limit: Length | None = None
    """Documents of a task to measure, its first ones; none: all."""
    cache_contexts: list[Length] = [2048, 4096, 8192, 16384, 32768, 65536, 131072]
    """Context lengths that cache bytes are given for."""
    prompts: list[str] = [
        "The most important thing about the sea is",
        "My fellow citizens, the year that lies behind us",
    ]
    """Prompts of the sample generations."""
    max_new_tokens: Length = 48


class Recipe(Section):
    """A whole conversion. `load_recipe` reads one; `to_yaml` writes it with every default filled in."""

    name: str
    description: str = ""
    task: Literal["text-generation", "image-classification", "image-feature-extraction"] = "text-generation"
    """What the teacher is for: it says how it is loaded, and whether `data` is text or images."""
    teacher: str = "default"
    """Hub id, folder or GGUF file; `default` is SmolLM2-135M-Instruct."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the models; weights in bfloat16 are float32 while they are trained."""
    seed: int = Field(default=0, ge=0)
    tied_embeddings: Literal["keep", "untie", "retie", "refuse"] = "keep"
    """Where the teacher's input embedding is its output head too: `keep` trains the one matrix for both, `untie` gives
    the student two, `retie` trains two and leaves their mean, `refuse` refuses such a teacher."""
    data: DataConfig = DataConfig()
    student: StudentModelConfig | None = None
    """A model of its own for the student, smaller than the teacher; none: the teacher itself, with all its weights."""
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
