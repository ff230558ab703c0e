"""Where the folders beside this package are: ``kernels`` and ``csrc``, in a wheel or in a checkout."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def source_dir(name: str) -> Path:
    """The folder of ``kernels`` or ``csrc``. Raises FileNotFoundError."""
    for parent in (PACKAGE, PACKAGE.parent):
        if (parent / name).is_dir():
            return parent / name
    raise FileNotFoundError(f"{name}/ is missing from this installation of fused_peft; reinstall it")


def provide_kernels() -> None:
    """Make ``fused_peft.kernels`` importable from a checkout, where the folder stands beside the package, not in it."""
    name, folder = "fused_peft.kernels", PACKAGE.parent / "kernels"
    if (PACKAGE / "kernels").is_dir() or not folder.is_dir() or name in sys.modules:
        return
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = sys.modules["fused_peft"].kernels = module


# where modules stood in 0.1.0's first builds: pickled models name their classes by these
_MOVED = {"linear": "model.layer", "convert": "model.state", "prompt": "model.prompt", "wide": "model.wide"}


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """fused_peft.linear and the like, for unpickling."""

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        package, _, last = name.partition(".")
        return importlib.machinery.ModuleSpec(name, self) if package == "fused_peft" and last in _MOVED else None

    def create_module(self, spec):
        module = importlib.import_module(f"fused_peft.{_MOVED[spec.name.partition('.')[2]]}")
        self.own = module.__spec__
        return module

    def exec_module(self, module) -> None:
        """It has run already; the import machinery has only put another spec on it."""
        module.__spec__, module.__loader__ = self.own, self.own.loader


def provide_moved() -> None:
    """Let pickles of models find classes that have moved since."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())
