"""Ahead-of-time compilation of every kernel on a machine without a GPU: what a launch would compile, what came out.

The launches are those the backend makes, recorded on meta tensors; registers and spills are what ptxas says of the
machine code, instructions are counted in the PTX that it takes.
"""

from __future__ import annotations

import importlib.metadata
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, combinations, product, repeat
from pathlib import Path

import torch

from ..backends import decode
from ..backends.cuda import GEMM, Cuda
from ..backends.triton import Triton, _missing, kernels
from ..core.frozen import Coded
from ..core.groups import Groups
from ..core.operands import TENSORS, Operands
from . import compile_gluon

ARCHES = {
    "sm_80": (8, 0), "sm_86": (8, 6), "sm_89": (8, 9), "sm_90": (9, 0), "sm_100": (10, 0), "sm_120": (12, 0),
}  # fmt: skip
COUNTED = {  # in PTX
    "wgmma": r"\bwgmma\.mma_async", "mma": r"\bmma\.sync", "tcgen05": r"\btcgen05\.mma",
    "tma_load": r"\bcp\.async\.bulk\.tensor\.\dd\.shared", "tma_store": r"\bcp\.async\.bulk\.tensor\.\dd\.global",
}  # fmt: skip
USED = {  # in ptxas's log
    "registers": r"Used (\d+) registers", "stack": r"(\d+) bytes stack frame",
    "spilled": r"(\d+) bytes spill stores",
}  # fmt: skip


@dataclass(frozen=True)
class Report:
    """One compiled kernel: bytes of stack, spilled and of shared memory, instruction counts; multiplies: it has matrix
    products."""

    name: str
    kernel: str
    arch: str
    dtype: str
    config: str
    registers: int
    stack: int
    spilled: int
    shared: int
    wgmma: int
    mma: int
    tma_load: int
    tma_store: int
    tcgen05: int = 0
    multiplies: bool = True
    serialised: int = 0  # ptxas warnings C75xx: wgmma that waits for the one before
    nested: bool = False  # a loop inside a loop, where FLATTEN asks for one

    def faults(self) -> list[str]:
        """What the gate refuses: spills, too much shared memory, a half-precision product without tensor cores."""
        limit = kernels().configs.shared_kib(ARCHES[self.arch]) * 1024
        found = []
        if self.stack or self.spilled:
            found.append(f"{self.stack} bytes of stack, {self.spilled} spilled: the registers do not suffice")
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, {limit} are there")
        if self.serialised and self.kernel.startswith("gemm"):  # the others wait for memory, not for wgmma
            found.append("ptxas serialises its wgmma (C75xx)")
        if self.nested:
            found.append("its tile loop and K loop were not flattened into one")
        if self.multiplies and self.dtype != "fp32" and not self.wgmma + self.mma + self.tcgen05:
            found.append("no tensor-core instruction")
        if self.kernel == "gemm_gluon" and not min(self.wgmma, self.tma_load, self.tma_store):
            found.append("not wgmma on what TMA loads, stored through TMA")
        return found


def _operands(M: int, K: int, N: int, r: int, dtype, wide, names: str, **options) -> Operands:
    """Meta operands of the named tensors. G: vector, M: a matrix G, seed: dropout."""
    empty = lambda *shape, dtype=wide: torch.empty(shape, device="meta", dtype=dtype)  # noqa: E731
    made = {
        "w": empty(N, K, dtype=dtype), "bias": empty(N, dtype=dtype), "d_in": empty(K), "d_out": empty(N),
        "A": empty(r, K), "a": empty(r), "G": empty(r), "M": empty(r, r), "B": empty(N, r),
        "seed": empty(2, dtype=torch.int32), "c": empty(M, N, dtype=dtype),
    }  # fmt: skip
    chosen = {"G" if n == "M" else n: made[n] for n in names.split()}
    x = empty(M, K, dtype=dtype)
    return Operands(x=x, **chosen, p=0.1 if "seed" in chosen else 0.0, s=2.0, **options)


# variant: (operand names, options)
VARIANTS = {
    "lora": ("w A B", {}),
    "lora-bias-dropout": ("w bias A B seed", {}),
    "adapter": ("w bias A a G B seed", {"h": "gelu"}),
    "tanh": ("w A a B", {"h": "tanh"}),
    "flora": ("w A M B seed", {"h": "silu"}),
    "ssb": ("w bias d_in d_out", {}),
    "ia3": ("w bias d_out", {"scale_bias": True}),
    "dora": ("w bias A B d_out", {}),
    "dora-dropout": ("w A B d_out seed", {"drop_base": True}),
    "bottleneck": ("c bias A a B", {"h": "relu"}),
    "hadamard": ("w bias A B", {"hadamard": True}),
}
SHAPES = ((8192, 4096, 4096), (1024, 1024, 1024), (16, 4096, 4096))  # M, K, N


# rows in groups: operand names, options, and how the stack of weights lies in memory
GROUPED = {
    "experts": ("w A B", {}, "rows"),
    "experts-dropout": ("w bias A B seed", {}, "transposed"),
    "experts-all": ("w bias d_in d_out A a G B seed", {"h": "gelu"}, "rows"),
    "adapters": ("w A M B", {}, "shared"),
}
ROUTINGS = ((8192, 8, 128, 2048, 1536), (64, 4, 32, 2880, 5760))  # M, k, E, K, N


def _grouped(label: str, routing: tuple[int, ...], r: int, dtype, wide) -> tuple[Operands, Groups]:
    """Meta operands and groups; the factors of E groups, and x by an index where each row is read k times."""
    (names, options, stored), (M, k, E, K, N), P = GROUPED[label], routing, routing[0] * routing[1]
    empty = lambda *shape, dtype=wide: torch.empty(shape, device="meta", dtype=dtype)  # noqa: E731
    one = _operands(P, K, N, r, dtype, wide, names, **options)
    apart = {"x": empty(M, K, dtype=dtype), "seed": one.seed, "c": one.c}
    stacks = {n: empty(E, *t.shape, dtype=t.dtype) for n, t in zip(one._fields, one[:TENSORS], strict=False)
              if t is not None and n not in apart}  # fmt: skip
    if stored != "rows":
        stacks["w"] = empty(E, K, N, dtype=dtype).mT if stored == "transposed" else one.w.expand(E, N, K)
    index = lambda *shape: empty(*shape, dtype=torch.int64) if k > 1 else None  # noqa: E731
    return one._replace(**apart, **stacks), Groups(empty(E, dtype=torch.int32), index(P), index(M, k))


def grouped_problems(arch: str) -> Iterator[tuple[str, Operands, Groups]]:
    """(label, operands, groups): the forms that differ most in what is compiled; on sm_90 others and other sizes."""
    bf16, fp32 = torch.bfloat16, torch.float32
    yield "experts-dropout", *_grouped("experts-dropout", ROUTINGS[0], 16, bf16, fp32)
    if arch == "sm_90":
        yield "experts-all", *_grouped("experts-all", ROUTINGS[0], 16, bf16, fp32)
        yield "adapters", *_grouped("adapters", ROUTINGS[1], 16, bf16, fp32)
        yield "experts-r128", *_grouped("experts", ROUTINGS[0], 128, bf16, bf16)


def _variant(label: str, M: int, K: int, N: int, r: int, dtype, wide) -> Operands:
    names, options = VARIANTS[label]
    return _operands(M, K, N, r, dtype, wide, names, **options)


def problems(arch: str) -> Iterator[tuple[str, Operands]]:
    """(label, operands): every variant in bf16, some in other dtypes and ranks, and every shape of the tuned table."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    for label, (M, K, N) in product(VARIANTS, SHAPES):
        yield label, _variant(label, M, K, K if label == "bottleneck" else N, 16, bf16, fp32)
    for label, dtype, wide, r in (
        ("lora", fp16, fp16, 16), ("lora-bias-dropout", fp32, fp32, 16), ("dora-dropout", fp16, fp32, 64),
        ("adapter", bf16, bf16, 64), ("lora", bf16, fp32, 256), ("dora", fp32, fp32, 128), ("lora", bf16, fp32, 512),
        ("hadamard", fp32, fp32, 16), ("ssb", fp32, fp32, 16), ("flora", bf16, fp32, 128),
    ):  # fmt: skip
        for M, K, N in SHAPES[:1] if r > 64 or wide == fp32 == dtype else (SHAPES[0], SHAPES[2]):
            yield f"{label}-r{r}", _variant(label, M, K, N, r, dtype, wide)
    labels = ("lora", "dora", "dora-dropout")
    for (i, r), (j, M) in product(enumerate((8, 24, 64)), enumerate((64, 100, 8192))):  # ranks, rows that fill no tile
        label = labels[(i + j) % 3]  # a Latin square: every two of rank, rows and method meet
        yield f"{label}-r{r}-M{M}", _variant(label, M, 4096, 4096, r, bf16, fp32)
    for label in ("lora", "ssb"):  # what TMA cannot address: the pointer kernel
        yield f"{label}-odd", _variant(label, 1000, 333, 777, 12, bf16, fp32)
    for label in ("lora-bias-dropout", "adapter", "ssb", "dora-dropout", "hadamard"):  # ones become constants
        yield f"{label}-ones", _variant(label, 1, 33, 1, 1, bf16, fp32)
        yield f"{label}-one-in", _variant(label, 70, 1, 33, 1, fp16, fp16)
    yield "lora-tf32", _variant("lora", 8192, 4096, 4096, 16, fp32, fp32)
    made_by = dict.fromkeys(("hadamard", "form", "hadamard_grads"), "hadamard") | {"row_norm": "dora"}
    for entry in kernels().configs.table():
        kind, where, bits, M, N, K, r = entry.split()
        if where == arch and kind != GEMM.__name__:
            label, dtype = made_by.get(kind, "lora"), {"16": bf16, "32": fp32}[bits]
            yield f"{label}-tuned", _variant(label, int(M), int(K) or 4096, int(N), int(r), dtype, fp32)


def weights(N: int, K: int) -> Iterator[tuple[str, Coded]]:
    """(label, weight (N, K)) of every way to read codes and to read scales; N and K multiples of 128."""
    u8, i8 = torch.uint8, torch.int8
    empty = lambda *shape, dtype=torch.float32: torch.empty(shape, device="meta", dtype=dtype)  # noqa: E731
    halves, blocks = empty(N, K // 2, dtype=u8), N * K // 64
    nested = empty(256), empty(blocks // 256), empty(1), 256
    yield "nf4", Coded(halves, empty(blocks), (N, K), 64, empty(16))
    yield "nf4-nested", Coded(halves, empty(blocks, dtype=u8), (N, K), 64, empty(16), nested=nested)
    yield "int8", Coded(empty(N, K, dtype=i8), empty(N), (N, K), (1, K), by=1 / 127)
    yield "fp8", Coded(empty(N, K, dtype=torch.float8_e4m3fn), empty(N // 128, K // 128), (N, K), (128, 128))
    groups = empty(N, K // 32, dtype=torch.bfloat16)
    yield "int4", Coded(halves, groups, (N, K), (1, 32), empty(16), False, groups)
    yield "mxfp4", Coded(halves, empty(N, K // 32, dtype=u8), (N, K), (1, 32), empty(16), False)
    yield "nf4-ragged", Coded(empty(33, dtype=u8), empty(2), (5, 13), 64, empty(16))


def decodings(arch: str) -> Iterator[tuple[str, object]]:
    """(label, Launch) of each of them to bf16; on sm_90 to fp16 and fp32 too."""
    for label, w in weights(4096, 14336):
        for dtype in (torch.bfloat16, torch.float16, torch.float32)[: 3 if arch == "sm_90" else 1]:
            with kernels().launch.record(ARCHES[arch]) as found:
                decode.in_one_launch(w, dtype)
            yield from ((label, launch) for launch in found)


def coded_products(arch: str) -> Iterator[tuple[str, object]]:
    """(label, Launch) of the products of few rows that decode in their loop, in bf16; on sm_90 in fp16 too."""
    for (label, w), M, dtype in product(weights(4096, 14336), (1, 32, 64), (torch.bfloat16, torch.float16)):
        if label == "nf4-ragged" or (arch != "sm_90" and dtype == torch.float16):
            continue
        for back, width in ((False, 14336), (True, 4096)):
            with kernels().launch.record(ARCHES[arch]) as found:
                kernels().coded.multiplied(torch.empty(M, width, device="meta", dtype=dtype), back, *w)
            yield from ((f"{label}-{'backward' if back else 'forward'}", launch) for launch in found)


def launches(arch: str) -> dict[str, object]:
    """{name: Launch} of every distinct kernel that the problems' forward and backward start, named
    kernel-config-dtype-variant."""
    found: dict[str, object] = {}
    seen, backend = set(), Triton()
    asked = [(label, backend, o, None) for label, o in problems(arch)]
    asked += [(label, backend, o, groups) for label, o, groups in grouped_problems(arch)]
    if arch == "sm_90":  # what csrc/'s GEMM overlaps with
        asked += [(f"{n}-overlapped", Cuda(), _variant(n, *SHAPES[0], r, torch.bfloat16, torch.float32), None)
                  for n, r in (("dora", 16), ("lora-bias-dropout", 16), ("lora", 64), ("adapter", 16))]  # fmt: skip
    made = ((f"{label}-{phase}", launch) for label, backend, o, groups in asked
            for phase, launch in _recorded(backend, o, ARCHES[arch], "tf32" in label, groups))  # fmt: skip
    for label, launch in chain(made, decodings(arch), coded_products(arch)):
        if launch.kernel is GEMM:
            continue  # csrc/'s: ``extension`` compiles it
        if (identity := _identity(launch)) in seen:
            continue
        seen.add(identity)
        c = launch.config
        form = "x".join(str(n) for n in (c.BM, c.BN, c.BK)) + f"w{c.warps}s{c.stages}"
        name = f"{launch.kernel.__name__}-{form}-{_dtype(launch)}-{label}"
        found[name if name not in found else f"{name}-{len(found)}"] = launch
    return found | compile_gluon.launches() if arch == "sm_90" else found


def _identity(launch) -> tuple:
    """What is compiled, whatever the architecture."""
    return launch.kernel.__name__, launch.config, repr(_signature(launch))


def covering(found: dict[str, object], together: int) -> dict[str, object]:
    """As few of the launches as show, for each kernel, its configs, flags and operands given: each of them (together =
    1), or every two that meet (2)."""
    constexpr = kernels().triton_internals.is_constexpr
    shown = {}
    for name, launch in found.items():
        signature, constants, _ = _signature(launch)
        traits = [f"config {launch.config}"]
        for arg, value in launch.args.items():
            if constexpr(launch.kernel)[arg]:
                traits.append(f"{arg} = {value}")
            elif arg.endswith(("_ptr", "_desc")) or arg in constants:  # operands, and numbers that are one
                traits.append(f"{arg} {signature[arg]}")
        shown[name] = {(launch.kernel.__name__, *two) for two in combinations(traits, together)}
    chosen, left = {}, set().union(*shown.values())
    while left:
        best = max(shown, key=lambda name: len(shown[name] & left))
        chosen[best], left = found[best], left - shown[best]
    return chosen


def _recorded(
    backend: Triton, o: Operands, arch: tuple[int, int], tf32: bool = False, groups: Groups | None = None
) -> Iterator[tuple[str, object]]:
    k, before = kernels(), torch.backends.cuda.matmul.fp32_precision
    need = tuple(t is not None and n not in ("w", "seed", "c") for n, t in zip(o._fields, o[:TENSORS], strict=False))
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        with k.launch.record(arch) as forward:
            keep_z = o.d_out is not None
            y, T, z = backend.grouped_forward(o, groups, keep_z) if groups else backend.forward(o, keep_z)
            if o.d_out is not None and o.A is not None and not groups:
                backend.row_norm(o.w, torch.empty(o.w.shape[0], device="meta"), o.A, o.B, o.s)
        with k.launch.record(arch) as backward:
            if groups:
                backend.grouped_backward(torch.empty_like(y), o, groups, T, z, need)
            else:
                backend.backward(torch.empty_like(y), o, T, z, need)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    yield from (("forward", found) for found in forward)
    yield from (("backward", found) for found in backward)


_SHORT = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32",
          torch.int64: "i64", torch.int8: "i8", torch.uint8: "u8"}  # fmt: skip


def _dtype(launch) -> str:
    """The dtype of the kernel's main operand."""
    operands = "x_ptr x_desc w_ptr dy_ptr u0_ptr u1_ptr s_ptr c_ptr t_ptr out_ptr part0_ptr offs_ptr"
    for name in operands.split():
        value = launch.args.get(name)
        if value is not None:
            return _SHORT[getattr(value, "base", value).dtype]
    raise ValueError(f"{launch.kernel.__name__} has no operand of a known name")


def _signature(launch) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) as a call with these arguments would compile: one becomes a constant,
    multiples of 16 are known as such, unless the kernel says that it does not want to know."""
    signature, constants, attributes = {}, {}, {}
    internals = kernels().triton_internals
    constexpr, unspecialised = internals.is_constexpr(launch.kernel), internals.unspecialised(launch.kernel)
    for i, (name, value) in enumerate(launch.args.items()):
        known = isinstance(value, int) and name not in unspecialised
        if constexpr[name] or value is None or (known and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{_SHORT[value.dtype]}"
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 1 << 31 else "i64"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            block = ",".join(str(n) for n in value.block_shape)
            layout = f",{value.layout!r}" if hasattr(value, "layout") else ""  # Gluon's say how a tile lies
            signature[name] = f"tensordesc<{_SHORT[value.base.dtype]}[{block}]{layout}>"
        if isinstance(value, torch.Tensor) or (known and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _multiplies(launch) -> bool:
    """Whether the launch takes matrix products: not when only slots, columns or single elements are computed."""
    kind, args = launch.kernel.__name__, launch.args
    if (
        kind in ("add_up", "add_up_grouped", "split", "finish", "tile_table", "scale", "decode")
        and args.get("GATE") != 2
    ):
        return False
    if kind == "gemm_lowrank" and args["w_ptr"] is None and args["b_ptr"] is None:
        return False
    return any(args.get(flag, True) for flag in ("PRODUCT0", "PRODUCT1"))


def _nested(ttgir: str) -> bool:
    """Whether a loop stands inside another one."""
    around: list[int] = []  # indentation of the loops that are open
    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        while around and line.lstrip().startswith("}") and indent <= around[-1]:
            around.pop()
        if re.search(r"\bscf\.(for|while)\b", line):
            if around:
                return True
            around.append(indent)
    return False


def compiled(name: str, launch, arch: str, folder: Path | None = None) -> Report:
    """Compile one launch for arch; write NAME.cubin into folder if one is given."""
    signature, constants, attributes = _signature(launch)
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages,
               "enable_fp_fusion": launch.config.fuse}  # fmt: skip
    result, log = kernels().triton_internals.compiled(
        launch.kernel, signature, constants, attributes, ARCHES[arch], options
    )
    if folder:
        (folder / f"{name}.cubin").write_bytes(result.asm["cubin"])
    c, ptx = launch.config, result.asm["ptx"]
    counts = {kind: len(re.findall(pattern, ptx)) for kind, pattern in COUNTED.items()}
    used = {what: int(re.search(pattern, log)[1]) for what, pattern in USED.items()}
    return Report(
        name, launch.kernel.__name__, arch, _dtype(launch), f"{c.BM}x{c.BN}x{c.BK} warps {c.warps} stages {c.stages}",
        **used, shared=result.metadata.shared, **counts, multiplies=_multiplies(launch),
        serialised=len(re.findall(r"C75\d\d", log)),
        nested=bool(launch.args.get("FLATTEN")) and _nested(result.asm["ttgir"]),
    )  # fmt: skip


_pending: dict[str, object] = {}  # what forked workers compile


def _work(name: str, arch: str, folder: Path | None) -> Report:
    return compiled(name, _pending[name], arch, folder)


def compile_all(
    arch: str, folder: Path, jobs: int | None = None, only: str = "", cover: int = 0, beside: str = ""
) -> Iterator[Report]:
    """Compile every kernel for arch into folder, some at a time; ``only``: those whose name contains it; ``cover``: as
    few as ``covering`` finds enough for so many together, 0: all; ``beside``: an architecture whose launches are left
    out where they are the same.

    Raises ValueError for an unknown arch, RuntimeError where Triton is missing or its interpreter is on.
    """
    if arch not in ARCHES:
        raise ValueError(f"arch={arch!r} is not one of {', '.join(ARCHES)}")
    if _missing():
        raise RuntimeError(_missing())
    if kernels().launch.interpreting():
        raise RuntimeError("TRITON_INTERPRET is set, so kernels would be interpreted, not compiled; unset it")
    folder.mkdir(parents=True, exist_ok=True)
    _pending.clear()
    elsewhere = {_identity(launch) for launch in launches(beside).values()} if beside else set()
    found = {name: launch for name, launch in launches(arch).items() if _identity(launch) not in elsewhere}
    found = covering(found, cover) if cover and found else found
    _pending.update({name: launch for name, launch in found.items() if only in name})
    context = multiprocessing.get_context("fork")  # launches hold kernels, which do not pickle
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=context) as pool:
        yield from pool.map(_work, _pending, *(repeat(v) for v in (arch, folder)))


def run(
    arch: str, folder: Path, json_file: Path | None, jobs: int | None = None, only: str = "", cover: int = 0,
    beside: str = "",
) -> int:  # fmt: skip
    """Compile, print one line a kernel, write the JSON report; 1 when the gate refuses one, or there is none."""

    def line(r: Report) -> str:
        counts = f"wgmma {r.wgmma} mma {r.mma} tcgen05 {r.tcgen05} tma {r.tma_load}/{r.tma_store}"
        return f"{r.name:<72} {r.registers:3} regs {r.stack:4} stack {r.shared:6} shared  {counts}"

    about = {"triton": importlib.metadata.version("triton")}
    return judged(arch, "kernels", compile_all(arch, folder, jobs, only, cover, beside), line, about, json_file)


def judged(arch: str, what: str, reports: Iterable, line: Callable, about: dict, json_file: Path | None) -> int:
    """Print a line and the faults of every report as it comes, write them all; 1 when one of ``what`` is refused, or
    there is none."""
    rows = []
    for r in reports:
        rows.append({**asdict(r), "faults": r.faults()})
        print(line(r), *(f" FAULT: {fault}" for fault in rows[-1]["faults"]), flush=True)
    if json_file:
        json_file.write_text(json.dumps({**about, what: rows}, indent=1))
    faulty = sum(bool(row["faults"]) for row in rows)
    print(f"{arch}: {len(rows)} {what} compiled, {faulty or 'none'} refused")
    return int(faulty > 0 or not rows)
