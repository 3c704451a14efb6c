"""Models to benchmark, loaded, with the powers of the context that their time and memory grow by.

A student is compared with the teacher that its recipe.yaml names, unless another model is given.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import nn
from transformers import PreTrainedModel

from subquad.bench.roofline import Costs
from subquad.errors import UserError
from subquad.model.base import plan_of
from subquad.model.student import Student
from subquad.plan import ATTENTION, Plan
from subquad.pretrained.load import load_pretrained
from subquad.recipes.load import recipe_of_model


@dataclass(frozen=True)
class BenchModel:
    """A model that is measured: `name` is student, model or teacher; `title` is for people."""

    name: str
    title: str
    model: PreTrainedModel
    plan: Plan

    @cached_property
    def costs(self) -> Costs:
        return Costs.of(self.model, self.plan)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table."""
        return _words(self.model).num_embeddings

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, embedding tables included."""
        return sum(weight.nbytes for weight in self.model.parameters())

    @property
    def attends(self) -> bool:
        """Whether any head attends to all tokens, so that the work of one more grows with the context."""
        layers = zip(self.plan.layers, self.plan.shapes, strict=True)
        return any(ATTENTION in layer and shape.window is None for layer, shape in layers)

    def powers(self, measure: str, points: int) -> tuple[int, ...]:
        """Exponents of the context in the time of `measure`, limited to those that `points` measurements identify.

        A pass over a prompt also takes a constant time, which shows with short prompts or small models.
        """
        if measure == "prefill":
            if not self.attends:
                return (0, 1)
            return (0, 1, 2) if points > 3 else (1, 2)
        return (0, 1) if self.attends else (0,)

    @property
    def memory_powers(self) -> tuple[int, ...]:
        """Exponents of the context in the memory of a pass; eager attention holds all its probabilities."""
        base = self.model.backbone if isinstance(self.model, Student) else self.model
        return (0, 2) if "eager" in base.config._attn_implementation else (0, 1)


def open_subjects(
    model: str, against: str | None, dtype: str | None, device: str | None
) -> tuple[list[BenchModel], str]:
    """The model and the one it is compared with, loaded and once run, and their dtype.

    Raises UserError where one cannot be loaded, or their vocabularies differ.
    """
    recipe, own_teacher = recipe_of_model(model)
    if against is None:
        against = own_teacher
    dtype, device = dtype or recipe.dtype, device or ("cuda" if torch.cuda.is_available() else "cpu")
    sources = {"model": model} | ({} if against in (None, "none") else {"teacher": str(against)})
    subjects = []
    for name, source in sources.items():
        loaded = load_pretrained(source, dtype=dtype, device=device)
        lm = loaded.model
        role = "student" if name == "model" and isinstance(lm, Student) else name
        subjects.append(BenchModel(role, loaded.name, lm, plan_of(lm)))
    sizes = [subject.vocabulary for subject in subjects]
    if len({*sizes}) > 1:
        raise UserError(
            f"'{model}' has a vocabulary of {sizes[0]:,} tokens and '{against}' one of {sizes[1]:,}: "
            "only models that read the same tokens can be compared"
        )
    with torch.no_grad():
        for subject in subjects:  # weights are mapped into memory when they are first read
            subject.model(torch.zeros(1, 2, dtype=torch.long, device=subject.model.device))
    return subjects, dtype


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest context that a model was made for, by its config."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def within_positions(
    subjects: Sequence[BenchModel], contexts: Sequence[int], written: int
) -> tuple[list[int], list[str]]:
    """The contexts that all models can run with `written` tokens after them, and notes for people.

    Rotary positions have no end, so such models run on past the longest context they were made for. Learned ones do.
    """
    usable, notes = [*contexts], []
    outrun: dict[int, list[str]] = {}
    for subject in subjects:
        limit = max_positions(subject.model)
        if limit is None:
            continue
        if learned_positions(subject.model, limit):
            room = limit - written
            usable = [context for context in usable if context <= room]
            if max(contexts) > room:
                notes.append(f"the {subject.name} has {limit:,} positions: contexts above {room:,} are left out")
        elif max(contexts) > limit:
            outrun.setdefault(limit, []).append(subject.name)
    for limit, names in outrun.items():
        models = f"{' and '.join(names)} {'were' if len(names) > 1 else 'was'} made for {limit:,} tokens"
        notes.append(f"{models}: beyond them the speed is real, but the text would not be good")
    if not usable:
        raise UserError(f"no context is left, for {notes[-1]}: give shorter ones with --contexts")
    return usable, notes


def learned_positions(model: PreTrainedModel, limit: int) -> bool:
    """Whether a model looks its positions up in a table (GPT-2, OPT), which ends."""
    tables = [part for part in model.modules() if isinstance(part, nn.Embedding)]
    return any(
        table is not _words(model) and table.num_embeddings in (limit, limit + 2) for table in tables
    )  # + 2: OPT's


def _words(model: PreTrainedModel) -> nn.Embedding:
    return cast(nn.Embedding, model.get_input_embeddings())
