"""Recipe fitted to its teacher: no row is longer than the model takes, as where its table of positions ends.

The model is asked once, when it is opened, for the longest row of the recipe. What is too long for it is cut then, and
said in one sentence.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from subquad.data.probes import ContextTooShort, make_probe
from subquad.errors import UserError
from subquad.model.teacher_check import longest_input, takes_position
from subquad.pretrained.load import Teacher
from subquad.recipes.schema import EvaluateConfig, Recipe, SelectorConfig
from subquad.recipes.stage import OF_A_ROW, Section
from subquad.select import SELECTORS, Budget

S = TypeVar("S", bound=Section)


def fitted(
    recipe: Recipe,
    teacher: Teacher,
    other_models: Iterable[PreTrainedModel] = (),
    more_rows: Mapping[str, int] | None = None,
) -> tuple[Recipe, int, str]:
    """Recipe whose rows the models take; the longest row, in tokens; and a sentence on what was cut, if anything was.

    `other_models`: models that read the same rows as the teacher. `more_rows`: lengths of rows that the recipe does not
    set, by name. Raises UserError for a budget of decoding after more tokens than the models take.
    """
    # The longest row that is wanted, and that the models take
    models = [teacher.model, *other_models]
    lengths = {**(more_rows or {}), **_prompt_lengths(recipe.evaluate, teacher.tokenizer)}
    _limited(recipe, None, "", lengths)
    lengths |= {f"selector.options.{name}": length for name, length in _row_options(recipe.selector).items()}
    wanted = longest = max(lengths.values())
    for model in models:
        longest = longest_input(model, longest)
    budget = Budget.parse(recipe.selector.budget)
    if budget.speedup is not None and not all(takes_position(model, budget.context or 0) for model in models):
        raise UserError(
            f"the budget '{budget.text}' is of decoding after {budget.context:,} tokens, more than {teacher.name} "
            "takes: give a shorter context, or another kind of budget"
        )
    if longest == wanted:
        return recipe, longest, ""

    # Cut what is longer
    too_long = [f"{name} ({length:,})" for name, length in lengths.items() if length > longest]
    retrieval_is_cut = max(recipe.evaluate.retrieval.contexts, default=0) > longest
    recipe = _limited(recipe, longest, "", {})
    options = {name: min(length, longest) for name, length in _row_options(recipe.selector).items() if length > longest}
    selector = recipe.selector.model_copy(update={"options": recipe.selector.options | options})
    evaluate = _with_short_prompts(recipe.evaluate, teacher.tokenizer, longest)
    sentence = f"{teacher.name} takes rows of at most {longest:,} tokens, to which are cut: {', '.join(too_long)}"
    if retrieval_is_cut:
        tasks = [task for task in evaluate.retrieval.tasks if _has_room(task, teacher.tokenizer, longest)]
        if left_out := [task for task in evaluate.retrieval.tasks if task not in tasks]:
            sentence += f"; left out, because they need longer ones: the retrieval tasks {', '.join(left_out)}"
        evaluate.retrieval = evaluate.retrieval.model_copy(update={"tasks": tasks})
    return recipe.model_copy(update={"selector": selector, "evaluate": evaluate}), longest, sentence


def _limited(section: S, longest: int | None, path: str, lengths: dict[str, int]) -> S:
    """Copy of a part of a recipe with no row above `longest` tokens; adds the lengths before that to `lengths`."""

    def limit(length: int) -> int:
        return length if longest is None else min(length, longest)

    updates: dict[str, object] = {}
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{path}{name}"
        if isinstance(value, Section):
            updates[name] = _limited(value, longest, f"{key}.", lengths)
        elif isinstance(value, list) and all(isinstance(item, Section) for item in value):
            updates[name] = [_limited(item, longest, f"{key}.{item.name}.", lengths) for item in value]
        elif OF_A_ROW in field.metadata:
            lengths[key], updates[name] = value, limit(value)
        elif any(OF_A_ROW in getattr(item, "__metadata__", ()) for item in get_args(field.annotation)) and value:
            lengths[key], updates[name] = max(value), [*dict.fromkeys(map(limit, value))]
    return section.model_copy(update=updates)


def _row_options(settings: SelectorConfig) -> dict[str, int]:
    """Lengths of rows among the selector's options, given or by default."""
    fields = SELECTORS[settings.by].model_fields
    return {
        name: settings.options.get(name, field.default) for name, field in fields.items() if OF_A_ROW in field.metadata
    }


def _prompt_lengths(settings: EvaluateConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens of the longest prompt with its continuation."""
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in settings.prompts]
    return {"evaluate.prompts with their continuations": max(lengths) + settings.max_new_tokens} if lengths else {}


def _with_short_prompts(settings: EvaluateConfig, tokenizer: PreTrainedTokenizerBase, longest: int) -> EvaluateConfig:
    """Settings in which every prompt and its continuation have at most `longest` tokens; half are for the latter."""
    if max(_prompt_lengths(settings, tokenizer).values(), default=0) <= longest:
        return settings
    new_tokens = min(settings.max_new_tokens, longest // 2)
    prompts = [_first_tokens(prompt, tokenizer, longest - new_tokens) for prompt in settings.prompts]
    return settings.model_copy(update={"prompts": prompts, "max_new_tokens": new_tokens})


def _first_tokens(text: str, tokenizer: PreTrainedTokenizerBase, count: int) -> str:
    """Beginning of a text, of at most `count` tokens."""
    while len(tokenizer(text)["input_ids"]) > count and text:
        text = text[: len(text) * count // (count + 1)]
    return text


def _has_room(task: str, tokenizer: PreTrainedTokenizerBase, context: int) -> bool:
    """Whether rows of a retrieval task can be as short as this."""
    try:
        make_probe(task, tokenizer, context, 1)
    except ContextTooShort:
        return False
    except UserError:  # another reason, which the evaluation gives
        return True
    return True
