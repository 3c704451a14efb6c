"""Subquad: replace attention by linear-time mixers, head by head or layer by layer, and distill the teacher into them.

Notable:
- `import subquad` is fast: the names below are imported from their modules at their first use, so `subquad --help`
  responds immediately.
- With `import subquad`, before or after `import transformers`, transformers' auto classes load a student's folder:
  `AutoModelForCausalLM.from_pretrained(folder)` (registration.py).
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from subquad import registration
from subquad.errors import UserError
from subquad.version import __version__ as __version__

if TYPE_CHECKING:
    from subquad.jobs.convert import convert
    from subquad.model.conformance import check_student
    from subquad.model.image_student import ImageStudent, ImageStudentConfig
    from subquad.model.student import Student, StudentConfig
    from subquad.model.text_part import text_part
    from subquad.plan import Plan
    from subquad.recipes.load import load_recipe
    from subquad.recipes.schema import Recipe

__all__ = [
    "ImageStudent",
    "ImageStudentConfig",
    "Plan",
    "Recipe",
    "Student",
    "StudentConfig",
    "UserError",
    "check_student",
    "convert",
    "load_recipe",
    "text_part",
]

_HOME = {
    "ImageStudent": "subquad.model.image_student",
    "ImageStudentConfig": "subquad.model.image_student",
    "Plan": "subquad.plan",
    "Recipe": "subquad.recipes.schema",
    "Student": "subquad.model.student",
    "StudentConfig": "subquad.model.student",
    "check_student": "subquad.model.conformance",
    "convert": "subquad.jobs.convert",
    "load_recipe": "subquad.recipes.load",
    "text_part": "subquad.model.text_part",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'subquad' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Folders saved before 0.2 contain a modeling_subquad.py that imports from these two modules.
for _name in ("subquad.student", "subquad.images"):
    sys.modules[_name] = ModuleType(_name, "Names that moved to `subquad`.")
    sys.modules[_name].__getattr__ = __getattr__  # type: ignore[method-assign]

registration.install()
