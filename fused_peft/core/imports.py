"""Acting when a package is imported, be that before this library or after it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder


def after_import(name: str, act: Callable[[], None]) -> None:
    """Call ``act`` once the module ``name`` has been imported: now, where it is already. Imports nothing by itself."""
    if name in sys.modules:
        act()
        return
    _WAITING.acts.setdefault(name, []).append(act)
    if _WAITING not in sys.meta_path:
        sys.meta_path.insert(0, _WAITING)


class _Waiting(MetaPathFinder):
    """Finds nothing of its own: has the others' loaders of some modules act after them, and is gone after the last."""

    def __init__(self):
        self.acts: dict[str, list[Callable[[], None]]] = {}

    def find_spec(self, name: str, path=None, target=None):
        if name not in self.acts or self not in sys.meta_path:
            return None
        after = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in after)), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            self._follow(spec.loader, name)
        return spec

    def _follow(self, loader, name: str) -> None:
        load = loader.exec_module

        def exec_module(module) -> None:
            load(module)
            if module.__name__ != name or name not in self.acts:
                return
            loader.__dict__.pop("exec_module", None)
            acts = self.acts.pop(name)
            if not self.acts:
                sys.meta_path.remove(self)
            for act in acts:
                act()

        loader.exec_module = exec_module


_WAITING = _Waiting()
