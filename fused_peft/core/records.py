"""What was tested and measured on a GPU: one JSON file a GPU, driver, torch, Triton and state of the kernels.

    gpu, driver, torch, triton, kernels    what it holds for; ``kernels`` is a hash of their sources
    when       the day
    passed     ["triton low bf16", ...]: backend, kind and dtype whose self-test held
    failed     {"cuda low bf16": "why"}: those that are off on this GPU
    calls      [{kind, dtype, M, N, K, r, ms: {backend: forward + backward, host time included}}]
    tiles      {key of kernels.configs: fields of Config}: tuned tile sizes

Committed ones stand in kernels/records, a user's own in ``$FUSED_PEFT_CACHE``, else the cache folder of the system. A
record counts on the very GPU, driver, versions and kernels it was made with. ``tools.calibrate`` writes them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from math import log2
from pathlib import Path

import torch

from . import dispatch
from .operands import Problem
from .paths import PACKAGE, source_dir

ORDER = ("cuda", "gluon", "triton", "cublas", "eager")  # the order in which dispatch asks
IDENTITY = ("gpu", "driver", "torch", "triton", "kernels")
NEAR = 2.0  # the largest ``distance`` at which a measured call stands for another
NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
INTERPRETER = "interpreter"  # the gpu of records that Triton's interpreter makes on a CPU


@dataclass
class Record:
    """See above. Raises TypeError for an unknown or a missing field."""

    gpu: str
    driver: str
    torch: str
    triton: str
    kernels: str
    when: str = ""
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    calls: list[dict] = field(default_factory=list)
    tiles: dict[str, list] = field(default_factory=dict)

    @property
    def identity(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in IDENTITY}

    @property
    def name(self) -> str:
        """Of its file."""
        words = (self.gpu, self.driver, f"torch{self.torch}", f"triton{self.triton}", self.kernels)
        return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_", word) for word in words if word) + ".json"

    def add(self, other: Record) -> None:
        """Take over what another of the same identity says; its times count where both have some. What failed once, on
        whatever sizes, stays off."""
        self.failed = self.failed | other.failed
        self.passed = sorted({*self.passed, *other.passed} - self.failed.keys())
        measured = {place(call): call for call in (*self.calls, *other.calls)}
        self.calls, self.when = list(measured.values()), other.when or self.when
        self.tiles = {**self.tiles, **other.tiles}


def place(call: dict) -> tuple:
    """What tells one measured call from another."""
    return tuple(call[name] for name in ("kind", "dtype", "M", "N", "K", "r"))


def kind(p: Problem) -> str:
    """The call's operands in words, sizes left out: what decides which kernels and passes run."""
    if p.stored is not None:
        return f"stored in {p.stored}"
    if p.hadamard:
        return "groups+hadamard" if p.groups else "hadamard"
    there = {
        "groups": p.groups > 0,
        "alone": not p.present & {"w", "c"},
        "beside": "c" in p.present,
        "in": "d_in" in p.present,
        "low": p.r > 0,
        "a": "a" in p.present,
        p.h: p.h != "identity",
        f"gate-{p.G}": p.G != "none",
        "dropout": p.p > 0,
        "base": p.drop_base,
        "out": "d_out" in p.present,
        "bias": "bias" in p.present and p.scale_bias,
    }
    return "+".join(name for name, present in there.items() if present) or "plain"


def variant(backend: str, p: Problem) -> str:
    """What a self-test passes or fails: the backend, the kind of call and its dtype."""
    return f"{backend} {kind(p)} {NAMES.get(p.dtype, p.dtype)}"


def described(p: Problem) -> dict:
    """The fields of a measured call beside its times."""
    return {"kind": kind(p), "dtype": NAMES.get(p.dtype, str(p.dtype)), "M": p.M, "N": p.N, "K": p.K, "r": p.r}


@cache
def kernels_hash() -> str:
    """Of what computes: the Triton kernels, csrc/ and the backends that call them."""
    digest = hashlib.sha256()
    folders = [(PACKAGE / "backends", "*.py")]
    for name, pattern in (("kernels", "*.py"), ("csrc", "*.cuh"), ("csrc", "*.cpp"), ("csrc", "driver.h")):
        with suppress(FileNotFoundError):
            folders.append((source_dir(name), pattern))
    for folder, pattern in folders:
        for file in sorted(folder.glob(pattern)):
            if file.name != "rates.py":
                digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


@cache
def _driver() -> str:
    """NVIDIA's driver version; "unknown" where nothing tells."""
    with suppress(OSError):
        if found := re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text()):
            return found.group(1)
    with suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()
        return said[0] if said else "unknown"
    return "unknown"


@cache
def _triton() -> str:
    """Triton's version, from its metadata, which every new size of a call would read again."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def identity(device: torch.device) -> dict[str, str]:
    """What a record of this device holds for; a CPU's stands for Triton's interpreter on it."""
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else INTERPRETER,
        "driver": _driver() if on_gpu else "none",
        "torch": torch.__version__,
        "triton": _triton(),
        "kernels": kernels_hash(),
    }


def cache_dir() -> Path:
    """Where a user's own records are kept."""
    root = os.environ.get("FUSED_PEFT_CACHE")
    if root:
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fused_peft"


def folders() -> list[Path]:
    """Where records are looked for; the last one counts most."""
    found = [cache_dir()]
    with suppress(FileNotFoundError):
        found.insert(0, source_dir("kernels") / "records")
    return found


def read(file: Path) -> Record:
    """The record of a file. Raises ValueError when it is none, OSError when it cannot be read."""
    try:
        found = Record(**json.loads(file.read_text()))
        for call in found.calls:
            place(call)
            if not call["ms"] or not all(ms > 0 for ms in call["ms"].values()):
                raise ValueError("a call without times")
        if not isinstance(found.failed, dict) or not isinstance(found.passed, list):
            raise ValueError("passed or failed is not as written by calibrate")
        return found
    except (ValueError, TypeError, KeyError, AttributeError, UnicodeDecodeError) as e:
        raise ValueError(f"{file} is no record of fused_peft ({type(e).__name__}: {e}); delete it") from e


def every() -> Iterator[tuple[Path, Record]]:
    """The records on disk that can be read; a warning for each that cannot."""
    for folder in folders():
        for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            try:
                yield file, read(file)
            except (OSError, ValueError) as e:
                warnings.warn(f"{e}; which GEMM runs is predicted where no other record tells", stacklevel=2)


_held: dict[str, Record] = {}  # made by this process, perhaps nowhere on disk


@cache
def _found(gpu: str, driver: str, torch: str, triton: str, kernels: str) -> Record | None:
    wanted = {"gpu": gpu, "driver": driver, "torch": torch, "triton": triton, "kernels": kernels}
    total, foreign = Record(**wanted), []
    mine = [(None, _held[total.name])] if total.name in _held else []
    for file, record in (*every(), *mine):
        if record.identity == wanted:
            total.add(record)
        elif record.gpu == gpu:
            differ = [f"{n} {getattr(record, n)}, not {wanted[n]}" for n in IDENTITY if getattr(record, n) != wanted[n]]
            foreign.append(f"{file} ({'; '.join(differ)})")
    if total.when:
        return total
    if foreign:
        warnings.warn(
            f"The record of this {gpu} was made with others: {foreign[-1]}. It is not used, and which GEMM runs is "
            "predicted; fused_peft.calibrate(model) makes a new one",
            stacklevel=2,
        )
    return None


def find(device: torch.device) -> Record | None:
    """What is known of this device, from all records that hold for it; None where none does. UserWarning, once, for
    those of the same GPU made with another driver, version or state of the kernels, and for files that are broken."""
    return _found(**identity(device))


def of(p: Problem) -> Record | None:
    """What is known of the device that a call is on: the first GPU of its architecture."""
    if p.device == "cuda" and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if torch.cuda.get_device_capability(index) == p.arch:
                return find(torch.device("cuda", index))
    return find(torch.device("cpu")) if p.device == "cpu" else None


def keep(record: Record, folder: Path | None = None) -> Path:
    """Add it to its file, in the user's cache or in ``folder``, and to what this process knows. Returns the file.

    Raises OSError where it cannot be written; this process knows it all the same.
    """
    held = _held.setdefault(record.name, Record(**record.identity))
    held.add(record)
    forget()
    file = (folder or cache_dir()) / record.name
    total = Record(**record.identity)
    with suppress(ValueError, OSError):
        total.add(read(file))
    total.add(record)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(asdict(total), indent=1) + "\n")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return file


def forget() -> None:
    """Read the records again when next asked, and choose anew."""
    for cached in (_found, tiles, *ON_FORGET):
        cached.cache_clear()
    dispatch.changed()


ON_FORGET: list = []  # further caches of what follows from records


@cache
def tiles() -> dict[str, list]:
    """The tuned tile sizes of the GPUs of this machine; where there is none, all that are committed."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    known = [find(torch.device("cuda", i)) for i in gpus] if gpus else [record for _, record in every()]
    known = [record for record in known if record and record.gpu != INTERPRETER]
    return {key: sizes for record in known for key, sizes in record.tiles.items()}


def distance(call: dict, p: Problem) -> float:
    """How far a measured call's sizes are from the problem's: powers of two in the rows, a weight's sizes counted
    twice, the rank a quarter."""
    far = lambda a, b: abs(log2(max(a, 1) / max(b, 1)))  # noqa: E731
    return far(call["M"], p.M) + 2 * (far(call["N"], p.N) + far(call["K"], p.K)) + far(call["r"], p.r) / 4


def nearest(p: Problem) -> tuple[dict, Record] | None:
    """The measured call of the problem's kind and dtype whose sizes are nearest, and its record; None where none is
    near."""
    record, about = of(p), described(p)
    alike = [c for c in record.calls if (c["kind"], c["dtype"]) == (about["kind"], about["dtype"])] if record else []
    best = min(alike, key=lambda call: distance(call, p), default=None)
    return (best, record) if best is not None and distance(best, p) <= NEAR else None


def measured(p: Problem, name: str) -> tuple[float, str] | None:
    """A backend's time on the problem as a multiple of the fastest after it in ORDER, and where and when that was
    measured, in words; None where it was not."""
    found = nearest(p)
    if found is None or name not in found[0]["ms"]:
        return None
    call, record = found
    after = [call["ms"][later] for later in ORDER[ORDER.index(name) + 1 :] if later in call["ms"]]
    if not after:
        return None
    return call["ms"][name] / min(after), f"on {call['M']} x {call['K']} x {call['N']}, {record.gpu}, {record.when}"


def failed(p: Problem, name: str) -> str | None:
    """Why a backend is off for such calls: its self-test failed on this GPU. None where it did not."""
    record = of(p)
    why = record.failed.get(variant(name, p)) if record else None
    return why and f"its self-test failed on {record.gpu}, {record.when}: {why}"


def tested(p: Problem, name: str) -> bool:
    """Whether a backend's self-test on such calls passed on this GPU."""
    record = of(p)
    return record is not None and variant(name, p) in record.passed
