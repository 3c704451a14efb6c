"""Registration of Subquad's students with transformers' auto classes, before or after transformers is imported.

Importing the auto classes takes seconds, which `subquad --help` and `subquad.Plan` do not need. So `install` registers
the students immediately if the auto classes are loaded, and otherwise adds an import hook that registers them later:

- Students can be imported only when no module of transformers or Subquad is partly executed, and transformers loads the
  auto classes from within other modules. The hook therefore counts nested imports of both packages. It registers the
  students when the outermost import ends, if the auto classes were loaded during it.
- The hook wraps `exec_module` of each loader and leaves specs, loaders and files otherwise unchanged.
- It removes itself after registration.
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
    """Registers the students: now if transformers' auto classes are loaded, otherwise after they are imported."""
    if AUTO_CLASSES in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watch())


def _register() -> None:
    for module in ("subquad.model.student", "subquad.model.image_student", "subquad.model.saliency"):
        importlib.import_module(module).register()


class _Watch(importlib.abc.MetaPathFinder):
    """Import hook: delegates to the other finders, and counts nested imports of the `WATCHED` packages."""

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
        """Wraps a loader, so that its import is counted and may end with the registration."""
        exec_module = loader.exec_module

        def exec_and_count(module: ModuleType) -> None:
            depth = self.importing.__dict__.setdefault("depth", 0)
            self.importing.depth = depth + 1
            try:
                exec_module(module)
            finally:
                self.importing.depth = depth
            if depth == 0 and AUTO_CLASSES in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                _register()

        loader.exec_module = exec_and_count  # type: ignore[method-assign]
