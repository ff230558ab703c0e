"""csrc/ as something to call: its kernels compiled by NVRTC, its host side by a C++ compiler, loaded with ctypes.

A kernel is compiled when it is first asked for, in a second or two; what was compiled stays on disk (``built``) under
the hash of its sources. Neither nvcc nor CUDA's headers are needed, nor ninja. emulated: the same sources on the CPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..core.paths import source_dir
from . import built, emulation, nvrtc
from .built import BuildError
from .plans import CAST, PLANS, Call, Cast, Struct, fingerprint, headers, kernel_source

DRIVER = "libcuda.so.1"
HOST = ("-O2", "-std=c++17", "-fPIC", "-shared")
OLDEST_DRIVER = 12, 0  # of CUDA, whose tensor maps and libraries of kernels are used


def cxx() -> list[str] | None:
    """The command of a C++ compiler: CXX, or what is on the PATH."""
    asked = os.environ.get("CXX")
    names = [shlex.split(asked)] if asked and asked.strip() else [["c++"], ["g++"], ["clang++"]]
    return next((name for name in names if shutil.which(name[0])), None)


@cache
def driver_version() -> tuple[int, int]:
    """The CUDA that the driver is of. Raises BuildError where there is none, or it is too old."""
    version = ctypes.c_int()
    try:
        wrong = ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError) as e:
        raise BuildError(f"the CUDA driver cannot be opened: {e}") from e
    found = version.value // 1000, version.value % 1000 // 10
    if wrong or found < OLDEST_DRIVER:
        raise BuildError(
            f"the CUDA driver is of CUDA {found[0]}.{found[1]}, and {OLDEST_DRIVER[0]}.{OLDEST_DRIVER[1]} is needed"
        )
    return found


def _file() -> Path:
    """Where the host side of these sources is, or will be."""
    digest = hashlib.sha256(" ".join((*HOST, platform.machine())).encode())
    for name in ("driver.h", "host.cpp"):
        digest.update((source_dir("csrc") / name).read_bytes())
    return built.root() / f"fused_peft_{fingerprint()}" / f"host_{digest.hexdigest()[:16]}.so"


def failure(on_cpu: bool = False) -> str | None:
    """Why csrc/ cannot be built here; None while nothing is known against it."""
    if on_cpu:
        return emulation.failure()
    missing = []
    try:
        nvrtc.find(driver_version()[0])
    except BuildError as e:
        missing.append(str(e))
    if not cxx() and built.read(_file()) is None:
        missing.append(f"there is no C++ compiler ({os.environ.get('CXX') or 'apt install g++'})")
    return f"csrc/ cannot be compiled: {'; '.join(missing)}" if missing else None


@cache
def library(on_cpu: bool = False) -> ctypes.CDLL:
    """The library of functions, built if it is not yet. Raises BuildError."""
    loaded = emulation.library() if on_cpu else _host()
    sizes = [loaded.fused_peft_sizes(which) for which in (0, 1)]
    if sizes != [ctypes.sizeof(Call), ctypes.sizeof(Cast)]:
        raise BuildError(f"csrc/ and fused_peft/backends/plans.py disagree on {sizes} bytes of arguments")
    return loaded


def _host() -> ctypes.CDLL:
    if known := failure():
        raise BuildError(known)
    file = _file()
    built.kept(file, _compiled)
    try:
        loaded = ctypes.CDLL(str(file))
    except OSError as e:
        raise BuildError(f"csrc/ is built but does not load: {e} (delete {file} to build it anew)") from e
    _check(loaded.fused_peft_open, DRIVER.encode())
    return loaded


def _compiled() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        source, made = Path(folder) / "plans.cpp", Path(folder) / "host.so"
        source.write_text('#include "host.cpp"\n' + "".join(plan.instance for plan in PLANS))
        command = [*cxx(), *HOST, f"-I{source_dir('csrc')}", str(source), "-o", str(made), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BuildError(f"csrc/ failed to compile: {built.first_error(done.stderr)}")
        return made.read_bytes()


def _check(start, *args) -> None:
    """Call a function that returns what went wrong, or None. Raises BuildError with that."""
    start.restype = ctypes.c_char_p
    if wrong := start(*args):
        raise BuildError(f"csrc/ does not load: {wrong.decode()}")


def cubin(name: str) -> bytes:
    """The machine code of a plan's kernel, or of the cast's, from disk or compiled now. Raises BuildError."""
    compiler = nvrtc.find(driver_version()[0])
    kind = hashlib.sha256(" ".join((str(compiler), *nvrtc.OPTIONS)).encode()).hexdigest()[:8]
    file = built.root() / f"fused_peft_{fingerprint()}" / f"{name}_{kind}.cubin"
    return built.kept(file, lambda: compiler.compile(kernel_source(name), headers())[0])


def prepare() -> None:
    """Compile every kernel now, on all cores. Raises BuildError."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(cubin, (CAST, *(plan.name for plan in PLANS))):
            pass


@cache
def function(name: str, on_cpu: bool):
    """A function of the library that takes one struct and returns what went wrong, or None; its kernel is loaded.
    Raises BuildError."""
    loaded = library(on_cpu)
    if not on_cpu:
        _check(getattr(loaded, f"fused_peft_load_{name}"), cubin(name))
    found = getattr(loaded, f"fused_peft_{name}")
    found.argtypes, found.restype = [ctypes.c_void_p], ctypes.c_char_p
    return found


class Started(NamedTuple):
    """A call that was made: all that it takes to make it again. pointers: by their places in the struct."""

    name: str
    struct: Struct
    on_cpu: bool
    pointers: dict[int, Tensor]

    def address(self) -> int:
        """Of the function in C."""
        return ctypes.cast(function(self.name, self.on_cpu), ctypes.c_void_p).value


def probe(on_cpu: bool) -> None:
    """Build, compile and load what every call needs. Raises BuildError."""
    function(CAST, on_cpu)


def call(name: str, struct: Struct, on_cpu: bool) -> None:
    """Start a plan or the cast. Raises RuntimeError with what CUDA, or the emulator, says; BuildError."""
    wrong = function(name, on_cpu)(ctypes.addressof(struct))
    if wrong is not None:
        raise RuntimeError(f"csrc/ {name}: {wrong.decode()}")
