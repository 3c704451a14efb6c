"""Subquad: replace attention by linear-time mixers, head by head or layer by layer, and distill the teacher into them.

Notable:
- `import subquad` is cheap: the names below are imported from their modules when they are first used, so that
  `subquad --help` answers at once.
- After `import subquad`, before or after `import transformers`, transformers' auto classes load a Subquad folder:
  `AutoModelForCausalLM.from_pretrained(folder)` (autoclasses.py).
"""

import importlib
from typing import TYPE_CHECKING, Any

from subquad import autoclasses
from subquad.errors import UserError
from subquad.version import __version__

if TYPE_CHECKING:
    from subquad.images import ImageStudent, ImageStudentConfig
    from subquad.pipeline import convert
    from subquad.plan import Plan
    from subquad.recipe import Recipe, load_recipe
    from subquad.student import Student, StudentConfig
    from subquad.testing import check_student

__all__ = [
    "ImageStudent",
    "ImageStudentConfig",
    "Plan",
    "Recipe",
    "Student",
    "StudentConfig",
    "UserError",
    "__version__",
    "check_student",
    "convert",
    "load_recipe",
]

_HOME = {
    "ImageStudent": "subquad.images",
    "ImageStudentConfig": "subquad.images",
    "Plan": "subquad.plan",
    "Recipe": "subquad.recipe",
    "Student": "subquad.student",
    "StudentConfig": "subquad.student",
    "check_student": "subquad.testing",
    "convert": "subquad.pipeline",
    "load_recipe": "subquad.recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'subquad' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


autoclasses.install()
