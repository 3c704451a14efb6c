"""Base of the schemas, and how files are checked against them.

A reader takes a file of any version: unknown keys are ignored, and a missing entry is empty. The tests hold every
writer to the schema with `check_written`: a key that the schema lacks is an error, because no reader would see it. The
jobs themselves do not check, so that no result is lost to a fault in the schema.
"""

from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from subquad.errors import UserError

AGAIN = "run the command that wrote it again."


class Record(BaseModel):
    """Part of a result file; unknown keys are kept apart, in `model_extra`."""

    model_config = ConfigDict(extra="allow")


Model = TypeVar("Model", bound=BaseModel)


def check(model: type[Model], value: Any, source: str) -> Model:
    """Parsed JSON of the file `source` as a record. Raises `UserError` that names the first field that does not fit."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the top level"
        raise UserError(f"{source} cannot be reported: {where}: {first['msg']}; {AGAIN}") from error


def check_written(model: type[Record], value: Any) -> None:
    """Raises ValueError if `value`, as a writer made it, does not fit the schema or has a key that it lacks."""
    unknown = [*_unknown_keys(model.model_validate(value))]
    if unknown:
        raise ValueError(f"{model.__name__} in subquad/results has no {', '.join(unknown)}: add the field there")


def _unknown_keys(value: Any) -> Iterator[str]:
    """Paths of the keys in a record that its schema does not name."""
    if isinstance(value, Record):
        yield from value.model_extra or {}
        parts: dict[Any, Any] = {name: getattr(value, name) for name in type(value).model_fields}
    elif isinstance(value, dict):
        parts = value
    else:
        parts = dict(enumerate(value)) if isinstance(value, list) else {}
    for name, part in parts.items():
        yield from (f"{name}.{path}" for path in _unknown_keys(part))
