"""Makes transformers' auto classes know Subquad's students, without importing transformers before the user does.

Importing transformers' auto classes costs seconds, which neither `subquad --help` nor `subquad.Plan` should pay.
So `install` registers at once where the auto classes are already there, and otherwise watches imports:

- The student can only be imported while no module of transformers or of Subquad is half imported (the auto classes
  are themselves imported from the middle of other modules). So imports of both are counted in and out, and the student
  is registered when the outermost one ends and the auto classes have been loaded on the way.
- The watch wraps `exec_module` of each loader and changes nothing else: specs, loaders and files stay what they were.
- It removes itself when it has done its work.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Sequence
from types import ModuleType

AUTO_CLASSES = "transformers.models.auto.configuration_auto"
WATCHED = ("transformers", "subquad")


def install() -> None:
    """Register the student now if transformers' auto classes are loaded, else as soon as they have been."""
    if AUTO_CLASSES in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    for module in ("subquad.model.student", "subquad.model.image_student", "subquad.model.saliency"):
        importlib.import_module(module).register()


class _Watch(importlib.abc.MetaPathFinder):
    """Finds no module itself: asks the other finders, and counts the imports of `WATCHED` packages in and out."""

    def __init__(self) -> None:
        self.importing = threading.local()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is self or (spec := finder.find_spec(fullname, path, target)) is None:
                continue
            if spec.loader is not None:
                self._count(spec.loader)
            return spec
        return None

    def _count(self, loader: importlib.abc.Loader) -> None:
        exec_module = loader.exec_module

        def counted(module: ModuleType) -> None:
            depth = self.importing.__dict__.setdefault("depth", 0)
            self.importing.depth = depth + 1
            try:
                exec_module(module)
            finally:
                self.importing.depth = depth
            if depth == 0 and AUTO_CLASSES in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        loader.exec_module = counted  # type: ignore[method-assign]
