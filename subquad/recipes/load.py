"""Loading of recipes from YAML, with their base, overrides and scale.

Notable:
- Unknown keys, unknown recipes and values of a wrong type raise a `UserError` that names the key in one sentence.
- `extends: quick` takes another recipe as the base. Mappings are merged by key. Lists and an `objective` are replaced
  completely. A mapping in place of a list changes the items with these names: `stages: {align: {tokens: 1M}}`.
  A `mixer.name` or `selector.by` that differs from the base's drops the base's options of the mixer or selector.
- Numbers may be written as `1e-3`, token counts also as `50k`, `1.5M` or `2B` (powers of ten).
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from subquad.errors import UserError, nearest
from subquad.recipes.schema import Recipe
from subquad.recipes.stage import scale_stage

RECIPES = Path(__file__).parent


def recipe_names() -> list[str]:
    """Names of the recipes that ship with Subquad."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str | Path, overrides: Iterable[str] = (), tokens_scale: float = 1.0) -> Recipe:
    """Read a recipe, shipped (`quick`) or from a file (`my.yaml`), and apply overrides (`stages.0.tokens=50k`).

    A stage is addressed by its position or its name (`stages.align.tokens=50k`). Values are read as YAML. Then all
    token budgets (of the stages, the selector and the text) are multiplied by `tokens_scale`.
    Raises UserError for an unknown recipe or key, a value of a wrong type, or a scale that is not positive.
    """
    if not 0 < tokens_scale < math.inf:
        raise UserError(f"cannot scale token budgets by {tokens_scale}: give a number above 0, such as 0.01")
    path = _find(name_or_path)
    data = _read(path, parents=())
    for override in sorted(overrides, key=_is_choice, reverse=True):
        _override(data, override)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise UserError(_sentence(error, data, str(name_or_path))) from None
    return recipe if tokens_scale == 1.0 else _scale_recipe(recipe, tokens_scale)


def recipe_of_model(model: str | Path, overrides: Iterable[str] = ()) -> tuple[Recipe, str | None]:
    """Recipe that made the model in a folder, and the teacher it names; without a recipe.yaml, "quick" and None."""
    file = Path(model) / "recipe.yaml"
    if not file.is_file():
        return load_recipe("quick", overrides), None
    recipe = load_recipe(file, overrides)
    return recipe, recipe.teacher


def _scale_recipe(recipe: Recipe, factor: float) -> Recipe:
    def tokens(count: int) -> int:
        return max(1, round(count * factor))

    data, selector = recipe.data, recipe.selector
    if data.max_tokens is not None:
        data = data.model_copy(update={"max_tokens": tokens(data.max_tokens)})
    options = {key: tokens(value) if key.endswith("tokens") else value for key, value in selector.options.items()}
    selector = selector.model_copy(update={"tokens": tokens(selector.tokens), "options": options})
    stages = [scale_stage(stage, factor) for stage in recipe.stages]
    return recipe.model_copy(update={"data": data, "selector": selector, "stages": stages})


class _Loader(yaml.SafeLoader):
    """Loader of YAML 1.1 that also reads `1e-3` as a number."""


_Loader.yaml_implicit_resolvers = {key: [*value] for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), [*"-+0123456789"]
)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _find(name_or_path: str | Path, folder: Path = Path()) -> Path:
    """Find the file of a shipped name, or of a path relative to `folder`."""
    text = str(name_or_path)
    if text in recipe_names():
        return RECIPES / f"{text}.yaml"
    if Path(text).suffix in (".yaml", ".yml") or "/" in text:
        path = folder / text
        if not path.is_file():
            raise UserError(f"recipe file '{path}' does not exist; shipped recipes are {', '.join(recipe_names())}")
        return path
    raise UserError(f"unknown recipe '{text}': {nearest(text, recipe_names())}; a recipe file's name ends in .yaml")


def _read(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    """Read the raw mapping of a recipe file, merged over its base."""
    if path.resolve() in parents:
        raise UserError(f"recipe '{path}' extends itself, through {' -> '.join(p.name for p in parents)}")
    try:
        data = _parse(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"recipe '{path}' is not valid YAML: {' '.join(str(error).split())}") from None
    except OSError as error:
        raise UserError(f"recipe '{path}' cannot be read: {error.strerror}") from None
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise UserError(f"recipe '{path}' should be a mapping of keys to values, not a {type(data).__name__}")
    data.setdefault("name", path.stem)
    base = data.pop("extends", None)
    if base is None:
        return data
    return _merge(_read(_find(base, folder=path.parent), (*parents, path.resolve())), data)


# Section -> key of the choice that its options belong to. Another choice drops the options.
_CHOICES = {"mixer": "name", "selector": "by"}
_ATOMIC = ("objective",)  # mappings that are not merged: a weighted sum of objectives replaces the base's


def _merge(base: dict[str, Any], changes: Mapping[str, Any], section: str = "") -> dict[str, Any]:
    choice = _CHOICES.get(section, "")
    if changes.get(choice, base.get(choice)) != base.get(choice):
        base = {key: value for key, value in base.items() if key != "options"}
    merged = dict(base)
    for key, value in changes.items():
        if isinstance(merged.get(key), dict) and isinstance(value, dict) and key not in _ATOMIC:
            merged[key] = _merge(merged[key], value, section=str(key))
        elif isinstance(merged.get(key), list) and isinstance(value, dict):
            merged[key] = _merge_items(merged[key], value, section=str(key))
        else:
            merged[key] = value
    return merged


def _merge_items(base: list[Any], changes: Mapping[str, Any], section: str) -> list[Any]:
    """Merge a list of named items with changes by name."""
    names = [str(item.get("name")) if isinstance(item, dict) else "" for item in base]
    for name, item_changes in changes.items():
        if name not in names:
            raise UserError(f"'{section}' changes '{name}', which the recipe it extends lacks: {nearest(name, names)}")
        if not isinstance(item_changes, dict):
            raise UserError(f"'{section}.{name}' should be a mapping of what changes there, not {item_changes!r}")
    return [_merge(item, changes.get(name, {})) if name else item for name, item in zip(names, base, strict=True)]


def _is_choice(override: str) -> bool:
    """True if an override sets a choice. Choices are applied first, because they drop options."""
    return override.partition("=")[0].strip() in {f"{section}.{choice}" for section, choice in _CHOICES.items()}


def _override(data: dict[str, Any], override: str) -> None:
    """Set one dotted key of the raw recipe, in place."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"override '{override}' should look like stages.0.tokens=50k")
    try:
        value = _parse(text)
    except yaml.YAMLError:
        value = text
    section: Any = data
    for depth, part in enumerate(path[:-1]):
        if isinstance(section, dict) and section.get(part) is None:
            section[part] = {}
        section = section[_index(section, part, override, path[:depth])]
    if _is_choice(override) and isinstance(section, dict) and section.get(path[-1]) != value:
        section.pop("options", None)
    if isinstance(section, dict):
        section[path[-1]] = value
    else:
        section[_index(section, path[-1], override, path[:-1])] = value


def _index(section: Any, part: str, override: str, path: Sequence[str]) -> Any:
    """Return a mapping's key unchanged, or the position of a list item addressed by number or name."""
    location = ".".join(path)
    if isinstance(section, dict):
        return part
    if not isinstance(section, list):
        raise UserError(f"override '{override}': '{location}' is a single value and has no key '{part}'")
    if part.isdecimal() and int(part) < len(section):
        return int(part)
    names = [item.get("name") if isinstance(item, dict) else None for item in section]
    if part in names:
        return names.index(part)
    valid = ", ".join([str(i) for i in range(len(section))] + [name for name in names if name]) or "none"
    raise UserError(f"override '{override}': '{location}' has no item '{part}' (valid: {valid})")


def _sentence(error: ValidationError, data: Mapping[str, Any], recipe: str) -> str:
    """Describe the first error in one sentence that names the key."""
    details = error.errors()[0]
    loc, kind, value = details["loc"], details["type"], details["input"]
    key = ".".join(map(str, _existing_part(data, loc)))
    if kind == "extra_forbidden":
        valid = _model_at(loc[:-1]).model_fields
        return f"unknown key '{key}' in recipe '{recipe}': {nearest(str(loc[-1]), valid)}"
    if kind == "missing":
        return f"recipe '{recipe}' lacks the key '{'.'.join(map(str, loc))}'"
    if kind == "value_error":
        reason = str(details["ctx"]["error"])
        suffix = f", not {value!r}" if reason.startswith("should") else ""
        return f"'{key}' in recipe '{recipe}' {reason}{suffix}" if key else f"recipe '{recipe}' {reason}"
    if kind == "model_type":
        reason = f"should be a mapping with the keys {', '.join(_model_at(loc).model_fields)}"
    else:
        reason = details["msg"].partition(", unable")[0].replace("Input should", "should")
        reason = reason[0].lower() + reason[1:]
    return f"'{key}' in recipe '{recipe}' {reason}, not {value!r}"


def _existing_part(data: Any, loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Cut an error's location to the part that exists in the data, since pydantic appends branches of a union."""
    for depth, part in enumerate(loc):
        keys = data.keys() if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()
        if part not in keys:
            return loc[:depth]
        data = data[part]
    return loc


def _model_at(loc: tuple[int | str, ...]) -> type[BaseModel]:
    """Find the section class of a location such as ('stages', 0)."""
    model: type[BaseModel] = Recipe
    for part in loc:
        if isinstance(part, str):
            kind = model.model_fields[part].annotation
            model = next(arg for arg in (kind, *get_args(kind)) if isinstance(arg, type) and issubclass(arg, BaseModel))
    return model
