"""Where the folders beside this package are: ``kernels`` and ``csrc``, in a wheel or in a checkout."""

from __future__ import annotations

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
