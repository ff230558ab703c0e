"""What csrc/ is instantiated for, plan by plan, and its C structs as ctypes."""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch

from ..core.paths import source_dir

KINDS = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # enum Kind of csrc/gemm.cuh
TILES = ((128, 256), (256, 128), (128, 192))  # rows and columns that csrc/ is compiled for
INNER = (16, 32, 64)  # the most r of an INLINE plan; the second accumulator of 256 x 128 and 64 would spill
CAST = "cast"  # the other kernel, of csrc/cast.cuh
DEFINES = ("-std=c++17", "-DNDEBUG")  # an assert in device code is a call, and ptxas then serialises every wgmma


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
    def instance(self) -> str:
        """A line that makes it callable from C."""
        return f"FUSED_PEFT_INSTANCE({self.name}, {self.template})\n"

    @property
    def kernel(self) -> str:
        """The source of its kernel."""
        return f'#include "gemm.cuh"\nFUSED_PEFT_KERNEL({self.name}, {self.template})\n'


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


def kernel_source(name: str) -> str:
    """The source of the kernel of a plan, or of the cast. Raises StopIteration for another name."""
    return '#include "cast.cuh"\n' if name == CAST else next(p.kernel for p in PLANS if p.name == name)


def headers() -> dict[str, bytes]:
    """{name: text} of what a kernel's source includes."""
    return {file.name: file.read_bytes() for file in sorted(source_dir("csrc").glob("*.cuh"))}


@cache
def fingerprint() -> str:
    """A hash of csrc/'s sources and of the plans."""
    digest = hashlib.sha256("".join((*(plan.template for plan in PLANS), *DEFINES)).encode())
    for name, text in headers().items():
        digest.update(name.encode() + text)
    return digest.hexdigest()[:16]


class Struct(ctypes.Structure):
    """Fields by name; a tensor stands for its address, what is left out for null or zero."""

    def __init__(self, **fields):
        super().__init__()
        for name, value in fields.items():
            if value is not None:
                setattr(self, name, value.data_ptr() if isinstance(value, torch.Tensor) else value)


def _fields(**kinds: str) -> list[tuple[str, type]]:
    made = {"pointers": ctypes.c_void_p, "longs": ctypes.c_int64, "ints": ctypes.c_int, "floats": ctypes.c_float}
    return [(name, made[kind.rstrip("_")]) for kind, names in kinds.items() for name in names.split()]


class Call(Struct):
    """csrc/launch.cuh's Call."""

    _fields_ = _fields(
        pointers="x w s b a d_in d_out bias seed y z t",
        longs="x_stride w_stride s_stride b_stride a_stride",
        ints="M N K R threshold dtype d_in_kind d_out_kind bias_kind bias_inside across cluster_m cluster_n group "
        "processors overlap seed_of_order device",
        pointers_="stream",
    )


class Factor(Struct):
    """csrc/cast.cuh's Factor; ``source`` is its ``from``."""

    _fields_ = _fields(
        pointers="source to", longs="row_stride column_stride", ints="rows columns kind", floats="scale"
    )  # fmt: skip


class Cast(Struct):
    """csrc/cast.cuh's Cast."""

    _fields_ = [("factors", Factor * 2), *_fields(ints="dtype device", pointers="stream")]
