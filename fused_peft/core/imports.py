"""Acting when a package is imported, be that before this library or after it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder


def after_import(name: str, act: Callable[[], None]) -> None:
    """Call ``act`` once the module ``name`` has been imported: now, where it is already. Imports nothing by itself."""
    if name in sys.modules:
        act()
    else:
        sys.meta_path.insert(0, _Waiting(name, act))


class _Waiting(MetaPathFinder):
    """Finds nothing of its own: has the others' loader of one module act after it, and is gone then."""

    def __init__(self, name: str, act: Callable[[], None]):
        self.name, self.act = name, act

    def find_spec(self, name: str, path=None, target=None):
        if name != self.name or self not in sys.meta_path:
            return None
        after = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in after)), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            self._follow(spec.loader)
        return spec

    def _follow(self, loader) -> None:
        load = loader.exec_module

        def exec_module(module) -> None:
            load(module)
            if module.__name__ == self.name and self in sys.meta_path:
                loader.__dict__.pop("exec_module", None)
                sys.meta_path.remove(self)
                self.act()

        loader.exec_module = exec_module
