"""Measurements that lose nothing but themselves when they fail."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

from subquad.errors import UserError
from subquad.utils.files import first_line

Key = TypeVar("Key")


class Attempts:
    """Runs measurements. One that fails leaves a sentence in `failures`, and an empty result.

    A student was trained for hours before it is measured, so every number that can be had is worth having. Ctrl-C ends
    them all.
    """

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.successes = 0
        self.first_error: Exception | None = None

    def run(self, what: str, measure: Callable[[], dict[Key, Any]]) -> dict[Key, Any]:
        """Result of `measure`; nothing if it fails, which is said of `what`."""
        try:
            result = measure()
        except Exception as error:
            self.first_error = self.first_error or error
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self.failures.append(f"{what} could not be measured ({kind}{first_line(error)})")
            return {}
        self.successes += 1
        return result

    def run_together(
        self, what: str, models: Mapping[str, Any], measure: Callable[[Mapping[str, Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        """Row of the teacher and of each model by `measure`, which compares some models with the teacher.

        It measures all of them in one pass, or each by itself if that fails; the row of a model that fails is empty.
        """
        try:
            rows = measure(models)
        except Exception:
            rows = {name: {} for name in ("teacher", *models)}
            for name in rows:
                some = {} if name == "teacher" else {name: models[name]}
                rows[name] = self.run(f"{name}: {what}", partial(measure, some)).get(name, {})
            return rows
        self.successes += 1
        return rows

    def check_one_succeeded(self) -> None:
        """Raises the first error if every measurement failed: there is nothing to keep."""
        if self.first_error is not None and not self.successes:
            raise self.first_error
