"""csrc/ as a library: compiled on first use, loaded with ctypes, checked without a GPU.

Every plan of the GEMM is a source file of one line, compiled side by side by ninja. What was built stays in
``TORCH_EXTENSIONS_DIR`` under the hash of its sources; so does a failure, which is reported instead of tried again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch

from ..core.paths import source_dir

KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # enum Kind of csrc/gemm.cuh
TILES = ((128, 256), (256, 128), (128, 192))  # rows and columns that csrc/ is compiled for
INNER = (16, 32, 64)  # the most r of an INLINE plan; the second accumulator of 256 x 128 and 64 would spill
ARCH = "-gencode=arch=compute_90a,code=sm_90a"
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG")  # an assert in device code is a call, and ptxas then serialises every wgmma
EMULATED = ("-O2", "-std=c++17", "-DFUSED_PEFT_EMULATE")


@dataclass(frozen=True)
class Plan:
    """One instantiation. across: w is stored (K, N). form: of csrc/gemm.cuh; inner: of INLINE, else 0."""

    dtype: str
    BM: int
    BN: int
    across: bool
    form: str
    inner: int = 0

    @property
    def name(self) -> str:
        layout = "across" if self.across else "rows"
        return f"{self.dtype}_{self.BM}x{self.BN}_{layout}_{self.form.lower()}{self.inner or ''}"

    @property
    def template(self) -> str:
        return f"{self.dtype}, {self.BM}, {self.BN}, {int(self.across)}, {self.form}, {self.inner}"

    @property
    def source(self) -> str:
        return f'#include "launch.cuh"\nFUSED_PEFT_INSTANCE({self.name}, {self.template})\n'


FORMS = [("LATE", across, 0) for across in (False, True)] + [("SCALED", across, 0) for across in (False, True)]
FORMS += [("MASKED", True, 0), *(("INLINE", False, inner) for inner in INNER)]
PLANS = [
    Plan(dtype, *tile, across, form, inner)
    for dtype, tile, (form, across, inner) in product(("bf16", "fp16"), TILES, FORMS)
    if (tile, inner) != ((256, 128), 64)
]


@cache
def tile_for(BM: int, BN: int, inner: int) -> tuple[int, int]:
    """The tile itself, or the first of all where no plan of that tile and ``inner`` is compiled."""
    compiled = {(p.BM, p.BN, p.inner) for p in PLANS}
    return (BM, BN) if (BM, BN, inner) in compiled else TILES[0]


class _Struct(ctypes.Structure):
    """Fields by name; a tensor stands for its address, what is left out for null or zero."""

    def __init__(self, **fields):
        super().__init__()
        for name, value in fields.items():
            if value is not None:
                setattr(self, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)


def _fields(**kinds: str) -> list[tuple[str, type]]:
    made = {"pointers": ctypes.c_void_p, "longs": ctypes.c_int64, "ints": ctypes.c_int, "floats": ctypes.c_float}
    return [(name, made[kind.rstrip("_")]) for kind, names in kinds.items() for name in names.split()]


class Call(_Struct):
    """csrc/launch.cuh's Call."""

    _fields_ = _fields(
        pointers="x w s b a d_in d_out bias seed y z t",
        longs="x_stride w_stride s_stride b_stride a_stride",
        ints="M N K R threshold dtype d_in_kind d_out_kind bias_kind bias_inside across cluster_m cluster_n group "
        "processors overlap seed_of_order",
        pointers_="stream",
    )


class Factor(_Struct):
    """csrc/cast.cuh's Factor; ``source`` is its ``from``."""

    _fields_ = _fields(
        pointers="source to", longs="row_stride column_stride", ints="rows columns kind", floats="scale"
    )  # fmt: skip


class Cast(_Struct):
    """csrc/cast.cuh's Cast."""

    _fields_ = [("factors", Factor * 2), *_fields(ints="dtype", pointers="stream")]


class BuildError(RuntimeError):
    """csrc/ did not compile or load; the message says why and what to do."""


@cache
def fingerprint() -> str:
    """A hash of what is compiled for a GPU: csrc/'s sources, the plans, the compiler's flags."""
    digest = hashlib.sha256("".join((*(plan.source for plan in PLANS), *FLAGS, ARCH)).encode())
    for file in sorted(source_dir("csrc").glob("*.cuh")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, on the PATH, or where it is usually installed."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = os.pathsep.join([*([f"{home}/bin"] if home else []), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which("nvcc", path=path)


def toolkit() -> Path:
    """The folder of CUDA's bin/, include/ and lib64/, as nvcc itself sees it."""
    said = subprocess.run(
        [nvcc(), "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.M)
    return Path(top.group(1).strip() if top else Path(nvcc()).parent / "..").resolve()


def path() -> str:
    """The PATH, this Python's own commands first: ninja may be in an environment that is not activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _folder(emulated: bool) -> Path:
    """Where the library of these sources is, or will be, built."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch_extensions"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache_home)
    kind = f"cu{torch.version.cuda}"
    if emulated:
        also = (source_dir("csrc") / "emulator.h").read_bytes() + " ".join(EMULATED).encode()
        kind = f"emulated_{hashlib.sha256(also).hexdigest()[:8]}"
    return root / f"fused_peft_{fingerprint()}_{kind}"


def _built(folder: Path) -> Path | None:
    """The finished library there."""
    return next(iter(folder.glob("*.so")), None) if (folder / "built").exists() else None


def failure(emulated: bool = False) -> str | None:
    """Why the library cannot be built here; None while nothing is known against it."""
    folder = _folder(emulated)
    if _built(folder):
        return None
    noted = folder / "failed.txt"
    if noted.exists():
        first = (noted.read_text().splitlines() or ["no reason is noted"])[0]
        return f"csrc/ failed to compile: {first} (delete {noted} to try again)"
    missing = [] if shutil.which("ninja", path=path()) else ["ninja is not installed (pip install ninja)"]
    if emulated and not shutil.which("g++"):
        missing.append("g++ is not on the PATH")
    if not emulated and not nvcc():
        missing.append("nvcc is not on the PATH (install the CUDA toolkit, or set CUDA_HOME)")
    return f"csrc/ cannot be compiled: {', '.join(missing)}" if missing else None


def _write(file: Path, text: str) -> str:
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    return str(file)


@cache
def library(emulated: bool = False) -> ctypes.CDLL:
    """The library, built if it is not yet. emulated: the same sources on the CPU, in csrc/emulator.h.

    Raises BuildError; the failure is noted on disk where that can be, and ``failure`` returns it from then on.
    """
    folder = _folder(emulated)
    if not _built(folder):
        with _alone(folder):
            if known := failure(emulated):  # perhaps of a process that was here first
                raise BuildError(known)
            if not _built(folder):
                _attempt(folder, emulated)
    try:
        loaded = ctypes.CDLL(str(_built(folder)))
    except OSError as e:
        raise BuildError(f"csrc/ is built but does not load: {e} (delete {folder} to build it anew)") from e
    sizes = [loaded.fused_peft_sizes(which) for which in (0, 1)]
    if sizes != [ctypes.sizeof(Call), ctypes.sizeof(Cast)]:
        raise BuildError(f"csrc/ and fused_peft/backends/extension.py disagree on {sizes} bytes of arguments")
    return loaded


def _attempt(folder: Path, emulated: bool) -> None:
    """Build, and note that it is built, or why not."""
    try:
        _build(folder, emulated)
        (folder / "built").touch()
        if not _built(folder):
            raise RuntimeError("error: the build left no library")
    except Exception as e:  # whatever compilers and file systems raise
        told = str(e).splitlines()
        first = next((line for line in told if re.search(r"error:|fatal", line)), told[0] if told else repr(e))
        with suppress(OSError):
            (folder / "failed.txt").write_text(f"{first}\n{e}")
        raise BuildError(failure(emulated) or f"csrc/ failed to compile: {first}") from e


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time. What a killed process left is no obstacle, as torch's own lock would be."""
    import fcntl

    with ExitStack() as stack:
        with suppress(OSError):  # the build reports a folder that cannot be written; not every file system can lock
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context((folder / "building").open("w")), fcntl.LOCK_EX)
            (folder / "lock").unlink(missing_ok=True)
        yield


def _build(folder: Path, emulated: bool) -> None:
    from torch.utils import cpp_extension

    folder.mkdir(parents=True, exist_ok=True)
    suffix = "cpp" if emulated else "cu"
    sources = [_write(folder / f"{plan.name}.{suffix}", plan.source) for plan in PLANS]
    sources.append(_write(folder / f"cast.{suffix}", '#include "cast.cuh"\n'))
    if not emulated and cpp_extension.CUDA_HOME is None:
        cpp_extension.CUDA_HOME = str(toolkit())
    before, os.environ["PATH"] = os.environ.get("PATH", ""), path()
    try:
        cpp_extension.load(
            f"fused_peft_{fingerprint()}",
            sources,
            extra_cflags=list(EMULATED) if emulated else [],
            extra_cuda_cflags=[*FLAGS, ARCH],
            extra_ldflags=["-Wl,--as-needed"],
            extra_include_paths=[str(source_dir("csrc"))],
            build_directory=str(folder),
            with_cuda=not emulated,
            is_python_module=False,
        )
    finally:
        os.environ["PATH"] = before


@cache
def function(name: str, emulated: bool):
    """A function of the library that takes one struct and returns what went wrong, or None."""
    found = getattr(library(emulated), f"fused_peft_{name}")
    found.argtypes, found.restype = [ctypes.c_void_p], ctypes.c_char_p
    return found


def call(name: str, struct: _Struct, emulated: bool) -> None:
    """Start a plan or the cast. Raises RuntimeError with what CUDA, or the emulator, says."""
    wrong = function(name, emulated)(ctypes.addressof(struct))
    if wrong is not None:
        raise RuntimeError(f"csrc/ {name}: {wrong.decode()}")
