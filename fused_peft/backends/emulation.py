"""csrc/ on the CPU: the same sources in csrc/emulator.h, all plans side by side through PyTorch's extension loader.

What was built stays on disk under the hash of its sources; so does a failure, which is reported instead of tried again.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
from contextlib import suppress
from pathlib import Path

from ..core.paths import source_dir
from . import built
from .built import BuildError
from .plans import PLANS, fingerprint

FLAGS = ("-O2", "-std=c++17", "-DFUSED_PEFT_EMULATE")


def _folder() -> Path:
    """Where the library of these sources is, or will be, built."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for name in ("emulator.h", "host.cpp"):
        digest.update((source_dir("csrc") / name).read_bytes())
    return built.root() / f"fused_peft_{fingerprint()}_emulated_{digest.hexdigest()[:8]}"


def _built(folder: Path) -> Path | None:
    """The finished library there."""
    return next(iter(folder.glob("*.so")), None) if (folder / "built").exists() else None


def failure() -> str | None:
    """Why it cannot be built here; None while nothing is known against it."""
    folder = _folder()
    if _built(folder):
        return None
    noted = folder / "failed.txt"
    if noted.exists():
        first = (noted.read_text().splitlines() or ["no reason is noted"])[0]
        return f"csrc/ failed to compile: {first} (delete {noted} to try again)"
    missing = [] if shutil.which("ninja", path=built.path()) else ["ninja is not installed (pip install ninja)"]
    missing += [] if shutil.which("g++") else ["g++ is not on the PATH"]
    return f"csrc/ cannot be compiled: {', '.join(missing)}" if missing else None


def library() -> ctypes.CDLL:
    """It, built if it is not yet. Raises BuildError; the failure is noted on disk where that can be, and ``failure``
    returns it from then on."""
    folder = _folder()
    if not _built(folder):
        with built.alone(folder, "building"):
            if known := failure():  # perhaps of a process that was here first
                raise BuildError(known)
            if not _built(folder):
                _attempt(folder)
    try:
        return ctypes.CDLL(str(_built(folder)))
    except OSError as e:
        raise BuildError(f"csrc/ is built but does not load: {e} (delete {folder} to build it anew)") from e


def _attempt(folder: Path) -> None:
    """Build, and note that it is built, or why not."""
    try:
        _build(folder)
        (folder / "built").touch()
        if not _built(folder):
            raise RuntimeError("error: the build left no library")
    except Exception as e:  # whatever compilers and file systems raise
        first = built.first_error(str(e) or repr(e))
        with suppress(OSError):
            (folder / "failed.txt").write_text(f"{first}\n{e}")
        raise BuildError(failure() or f"csrc/ failed to compile: {first}") from e


def _build(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sources = [built.write(folder / f"{plan.name}.cpp", f'#include "launch.cuh"\n{plan.instance}') for plan in PLANS]
    built.load(
        f"fused_peft_{fingerprint()}",
        [*sources, built.write(folder / "calls.cpp", '#include "host.cpp"\n')],
        folder,
        extra_cflags=list(FLAGS),
        extra_ldflags=["-Wl,--as-needed"],
        extra_include_paths=[str(source_dir("csrc"))],
        is_python_module=False,
    )
