"""FLOPs and bytes of every launch, and the time they predict as a ratio to the frozen layer: ours, eager's, HF PEFT's.

    python bench/roofline.py [--launch-us 0] [--out roofline.csv]

time = Σ over launches of max(FLOPs / rate, bytes / bandwidth), on an H200: what a schedule costs when each launch is as
good as the hardware lets it be. Something to hold measurements against, not a measurement.

Counted are the FLOPs of matrix products, those that a kernel repeats in every tile included, and every operand and
result once a launch. What programs read again is taken to come from cache: A in every row tile of ``down``, x in every
rank tile of it above r = 128, both operands in the 64 x 64 tiles of ``hadamard_grads``. Padding to tiles is ignored.
x, W and y are bf16; layers have no bias, except bitfit's. Our adapters are fp32, HF PEFT's bf16, its cheapest
(autocast_adapter_dtype=False). Forward is that of training: what backward needs is written. HF PEFT's LieRA is HiRA.
"ours" are the kernels even where dispatch would choose eager by measurement.

dT and dB share one read of dy where their slots cost less than a second (``back``: ranks up to 16 and many rows); else
each reads it, one pass more than the floor of LoRA's backward, 0.02 of the frozen layer. z, written by a GEMM that
computes for longer than it moves data, costs nothing here.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil, isqrt, prod
from pathlib import Path

import tables
from baselines import Shape

from fused_peft.backends.kernel_modules import configs, gemm_lowrank, hadamard, outer, row_norm

GEMM, FP32, MEMORY = 790e12, 54e12, 4.3e12  # FLOP/s achieved in bf16, and in fp32 without tf32; bytes/s
PROCESSORS, MATRIX_GATE = 132, 128  # streaming multiprocessors; the largest G (r, r) our kernels take
KERNELS = {*configs.CLOSED_FORMS, "add_up", "split"}
ROWS, RANKS = (1, 16, 128, 1024, 8192), (8, 16, 64, 256)
WIDTHS = ((4096, 4096), (4096, 14336), (14336, 4096), (1024, 1024))  # K, N
# method: its operands beside x and W, and options, both as tools.compile_triton writes them
METHODS: dict[str, tuple[str, dict]] = {
    "lora": ("A B", {}),
    "lora_dropout": ("A B seed", {}),
    "dora": ("A B d_out", {}),
    "dora_dropout": ("A B d_out seed", {"drop_base": True}),
    "ia3": ("d_out", {"scale_bias": True}),
    "ssl": ("d_in", {}),
    "ssb": ("d_in d_out", {}),
    "parallel_adapter": ("A a B", {"h": "relu"}),
    "flora": ("A M B", {}),
    "trilora": ("A G B", {}),
    "liera": ("A B", {"hadamard": True}),
    "svdiff": ("k", {}),
    "bitfit": ("bias", {}),
}


@dataclass(frozen=True)
class Launch:
    """One kernel: FLOPs of its products, bytes from and to memory, FLOP/s of the units it computes with."""

    name: str
    flops: int
    bytes_read: int
    bytes_written: int
    rate: float = GEMM

    @property
    def seconds(self) -> float:
        return max(self.flops / self.rate, (self.bytes_read + self.bytes_written) / MEMORY)


class Schedule(list[Launch]):
    """The launches of one call, operands by name, a width in bits behind a name that is not the operand's own (x32)."""

    def __init__(self, s: Shape, names: str = "", options: dict | None = None):
        self.s, self.has, self.parts, options = s, set(names.split()), [], options or {}
        M, K, N, k, r = s.M, s.K, s.N, min(s.K, s.N), s.r if "A" in self.has else 0
        self.relu, self.dual, self.hadamard = (bool(options.get(n)) for n in ("h", "drop_base", "hadamard"))
        self.inline_rows = options.get("inline_rows", gemm_lowrank.INLINE_ROWS)
        self.r, self.low, self.formed = r, r > 0 and not self.hadamard, "k" in self.has
        self.dora = self.low and "d_out" in self.has
        self.S = "S" if self.relu or self.has & {"G", "M"} else "T"  # what B multiplies
        self.base, self.down, self.up = 2 * M * N * K, 2 * M * K * r, 2 * M * N * r  # FLOPs
        self.gate = 2 * M * r * r if "M" in self.has else 0
        bf16 = {"x": M * K, "dx": M * K, "y": M * N, "dy": M * N, "z": M * N, "keep": M * K, "w": N * K, "eye": K * K}
        bf16 |= {"T": M * r, "dT": M * r, "S": M * r, "U": N * k, "V": k * K}
        fp32 = {"A": r * K, "B": N * r, "a": r, "G": r, "M": r * r, "d_in": K, "d_out": N, "bias": N, "seed": 2, "k": k}
        fp32 |= {"AA": r * r, "norm": N}
        owners = {n: n for n in ("a", "G", "M", "d_in", "d_out", "bias", "seed", "k")}
        owners |= {"z": "d_out", "keep": "seed", "U": "k", "V": "k"}
        absent = {n for n, owner in owners.items() if owner not in self.has}
        self.elements = {n: 0 if n in absent else count for n, count in (bf16 | fp32).items()}
        self.bits = dict.fromkeys(bf16, 16) | dict.fromkeys(fp32, 32)

    def parsed(self, operand: str) -> tuple[int, int]:
        """(elements, bits of each)."""
        name = operand.rstrip("0123456789")
        return self.elements[name], int(operand[len(name) :] or self.bits[name])

    def fused(self, name: str, moves: str, flops: int, *parts: tuple[int, int]) -> None:
        """One of our kernels, moves: "read -> written", absent operands free; parts = (p, n): p partial fp32 vectors of
        n that it writes too, for ``add_up``."""
        read, written = (sum(prod(self.parsed(o)) // 8 for o in side.split()) for side in moves.split("->"))
        self.append(Launch(name, flops, read, written + sum(4 * p * n for p, n in parts)))
        self.parts += [(p, n) for p, n in parts if p > 1]

    def product(self, read: str, written: str) -> None:
        """With W ⊙ (1 + s·B A): formed in every row tile where rows are few, once where they are many."""
        M, K, N, form = self.s.M, self.s.K, self.s.N, 2 * self.s.N * self.s.K * self.r
        if M > hadamard.FEW_ROWS:
            self.fused("form", "w A B -> w", form)
            return self.torch(f"mm {read} w -> {written}")
        tiles = ceil(M / self.tile("hadamard", M, N, K).BM)
        self.fused("hadamard", f"{read} w A B -> {written}", self.base + tiles * form)

    def add_up(self) -> None:
        """The partial sums added up, two of them a launch."""
        for pair in (self.parts[i : i + 2] for i in range(0, len(self.parts), 2)):
            self.append(Launch("add_up", 0, sum(4 * p * n for p, n in pair), sum(4 * n for _, n in pair)))

    def torch(self, script: str) -> None:
        """PyTorch's launches, "name[*times] read -> written" between semicolons; those of absent operands fall out."""
        for line in filter(str.strip, script.split(";")):
            name, _, times = line.split()[0].partition("*")
            read, written = (side.split() for side in line.split(maxsplit=1)[1].split("->"))
            found = {o: self.parsed(o) for o in read + written}
            if not all(count for count, _ in found.values()):
                continue
            moved = (sum(prod(found[o]) // 8 for o in side) for side in (read, written))
            factors = [found[o] for o in read[-2:] + written] if name in ("mm", "addmm") else []
            flops = 2 * isqrt(prod(count for count, _ in factors)) if factors else 0  # |mk|·|kn|·|mn| = (mnk)²
            launch = Launch(name, flops, *moved, FP32 if factors and factors[0][1] == 32 else GEMM)
            self += [launch] * int(times or 1)

    def tile(self, kind: str, M: int, N: int, K: int) -> configs.Config:
        return configs.choose(kind, (9, 0), 16, M, N, K, self.r)


def _ours_forward(q: Schedule) -> None:
    M, K, N, r = q.s.M, q.s.K, q.s.N, q.r
    if q.hadamard:
        return q.product("x", "y")
    if q.dora and r <= row_norm.MAX_RANK:
        q.torch("mm A A -> AA")
        q.fused("row_norm", "w norm A B AA -> norm", 2 * N * r * (K + r))
        q.torch("div d_out norm -> d_out")
    elif q.dora:
        q.torch(NORM)
    q.torch("randint -> seed")
    if q.low and not q.dual and q.inline_rows >= M and r <= gemm_lowrank.INLINE_RANK:
        tiles = ceil(N / gemm_lowrank.narrow(q.tile("gemm_lowrank", M, N, K), 64).BN)  # each makes S
        flops = q.base + tiles * (q.down + q.gate) + q.up
        return q.fused("gemm_lowrank", "x w A a G M B d_out seed -> y z T", flops)
    if q.dual:
        q.fused("split", "x seed -> x x", 0)
    if q.low:
        seed = "" if q.dual else "seed"
        q.fused("down", f"x A a G M {seed} -> T {q.S if q.S != 'T' else ''}", q.down + q.gate)
    q.fused("gemm_lowrank", f"x w {q.S} B d_in d_out -> y z", q.base + q.up)
    q.torch("mm x w -> y; add y y -> y" if q.dual else "")


def _ours_backward(q: Schedule) -> None:
    M, K, N, r = q.s.M, q.s.K, q.s.N, q.r
    if q.hadamard:
        grads = q.tile("hadamard_grads", M, N, K)
        q.product("dy", "dx")
        parts = (ceil(N / grads.BN), r * K), (ceil(K / grads.BK), N * r)
        q.fused("hadamard_grads", "dy x w A B ->", q.base + 4 * N * K * r, *parts)
        return q.add_up()
    one_read = q.low and "d_out" not in q.has and outer.one_read(M, N, r, PROCESSORS)
    if one_read:
        q.fused("back", "dy B G M T -> dT", 2 * q.up + q.gate, (ceil(M / q.tile("back", M, N, 0).BM), N * r))
    elif q.low:
        q.fused("down", f"dy B G M d_out {'T' if q.relu else ''} -> dT", q.up + q.gate)
    rows = q.tile("gemm_lowrank_tma" if M >= 64 else "gemm_lowrank", M, K, N).BM
    sums = [(ceil(M / rows), K)] if "d_in" in q.has else []
    operands = f"dy w dT A d_in d_out seed {'x' if sums else ''} -> dx"
    q.fused("gemm_lowrank", operands, q.base * (1 + q.dual) + q.down, *sums)
    if q.low or "d_out" in q.has:
        over_n = 0 if one_read else N
        tile, ranks = q.tile("outer", M, max(over_n, K * q.low), 0), configs.rank_tile(r)
        tiles = ceil(over_n / tile.BN) * max(1, ceil(r / ranks)) + ceil(K / tile.BN) * ceil(r / ranks)
        shares = max(1, min(ceil(M / (4 * tile.BM)), ceil(4 * PROCESSORS / tiles)))
        shares = ceil(M / (ceil(ceil(M / shares) / tile.BM) * tile.BM))
        slot = sum(q.elements[n] for n in ("A", "a", "d_out", *(() if one_read else "B")))
        operands = "x dT seed ->" if one_read else "dy z T x dT d_out seed ->" if q.low else "dy z ->"
        q.fused("outer", operands, q.down + q.up * (not one_read), (shares, slot))
    q.add_up()
    q.torch(GATE_GRADS["G" in q.has])
    if q.dora:
        q.torch("div d_out norm -> d_out")


NORM = """cast A -> A16; mm w A16 -> B16; cast B16 -> B; mm A A -> AA; mm B AA -> B; mul*2 B -> B; add B B -> B;
    mul B B -> B; sum B -> norm; mul norm -> norm; add norm norm -> norm; clamp norm -> norm; sqrt norm -> norm;
    div d_out norm -> d_out"""
GATE_GRADS = ("mm B M -> B; mm B B -> M", "mul B G -> B; mul B B -> B; sum B -> G")
BITS = """arange -> keep; xor*2 keep -> keep; shift*4 keep -> keep; and*4 keep -> keep; xor*4 keep keep -> keep;
    mul*3 keep -> keep"""
MASK = "clone keep -> keep; ge keep -> keep; neg keep -> keep; and keep x -> x"
LIERA = "cast w -> w32; mm B A -> w32; addcmul w32 w32 -> w32; cast w32 -> w"
LIERA_GRADS = "mm dy x -> w; cast w -> w32; mul w32 w -> w32; mul w32 -> w32; mm B w32 -> A; mm w32 A -> B"
SVDIFF = "add k k -> k; relu k -> k; sub k k -> k; mul U k -> U32; cast U32 -> U; addmm w U V -> w"
SVDIFF_GRADS = "mm dy x -> w; mm w V -> U; cast U -> U32; mul U32 U -> U32; sum U32 -> k; relu k k -> k"
SUM_DY_Z = "cast dy -> y32; mul y32 z -> y32; sum y32 -> d_out; zeros -> d_out; add d_out d_out -> d_out"
SUM_X_DX = "cast x -> x32; mul x32 dx -> x32; sum x32 -> d_in; zeros -> d_in; add d_in d_in -> d_in"


def _eager_forward(q: Schedule) -> None:
    q.torch(NORM if q.dora else LIERA if q.hadamard else SVDIFF if q.formed else "")
    q.torch("cast d_in -> d_in16; mul x d_in16 -> x; randint -> seed")
    q.torch(f"{BITS}; {MASK}")
    q.torch("mul x -> x; sub x x -> x; mm x w -> y" if q.dual else "")
    q.torch("cast bias -> bias16; addmm bias16 x w -> y" if "bias" in q.has else "mm x w -> y")
    if q.low:
        q.torch(f"cast A -> A16; cast B -> B16; mm x A16 -> T; add T a -> T; {'relu T -> S' if q.relu else ''}")
        q.torch(f"cast G -> G16; mul T G16 -> S; cast M -> M16; mm T M16 -> S; addmm y {q.S} B16 -> y")
    q.torch("cast d_out -> d_out16; mul y d_out16 -> y" if not q.dora else "mul y d_out -> y32")
    q.torch("add y32 y -> y32" if q.dual else "")
    q.torch("copy y32 -> y" if q.dora else "")


def _eager_backward(q: Schedule) -> None:
    q.torch(SUM_DY_Z if "d_out" in q.has else "")
    q.torch("mul y32 d_out -> y32; copy y32 -> dy" if q.dora else "cast d_out -> d_out16; mul dy d_out16 -> dy")
    q.torch("sum dy -> bias")
    q.torch(f"{LIERA_GRADS}; {LIERA}" if q.hadamard else f"{SVDIFF}; {SVDIFF_GRADS}" if q.formed else "")
    if q.low:
        q.torch(f"{BITS}; {'relu T -> S' if q.relu else ''}; mm dy {'S' if q.relu else 'T'} -> B16; cast B16 -> B")
        q.torch(GATE_GRADS["G" in q.has])
        q.torch("cast B -> B16; mm dy B16 -> dT; cast G -> G16; mul dT G16 -> dT; cast M -> M16; mm dT M16 -> dT")
        q.torch(f"{'relu dT S -> dT' if q.relu else ''}; sum dT -> a; {MASK}; mm dT x -> A16; cast A16 -> A")
    q.torch("mm dy w -> dx")
    if q.low:
        q.torch("cast A -> A16")
        if q.dual:
            q.torch(f"mm dy w -> dx; addmm dx dT A16 -> dx; sub dx dx -> dx; {MASK}; add dx dx -> dx")
        elif "seed" in q.has:
            q.torch(f"mm dT A16 -> dx; {MASK}; add dx dx -> dx")
        else:
            q.torch("addmm dx dT A16 -> dx")
    q.torch(f"{SUM_X_DX}; cast d_in -> d_in16; mul dx d_in16 -> dx" if "d_in" in q.has else "")
    q.torch("div d_out norm -> d_out" if q.dora else "")


# HF PEFT's layers, and what autograd makes of them; BASE: what DoRA does about the frozen product
ADDED = "mul y -> y; add y y -> y"
LORA = f"mm x w -> y; dropout x -> x keep8; mm x A16 -> T; mm T B16 -> y; {ADDED}"
LORA_GRADS = "mm dy T -> B16; mm dy B16 -> dT; mm dT x -> A16; mm dT A16 -> dx"
INTO_X = "dropout dx keep8 -> dx; mm dy w -> dx; add dx dx -> dx"
DORA = f"""mm x w -> y; dropout x -> x keep8; eye -> eye; mm eye A16 -> A16; mm A16 B16 -> w; mul w -> w; add w w -> w;
    norm w -> norm16; div d_out16 norm16 -> d_out16; mm x A16 -> T; mm T B16 -> y; sub d_out16 -> d_out16; BASE;
    mul*2 y d_out16 -> y; {ADDED}; add y y -> y"""
DORA_GRADS = f"""mul dy -> dy; mul*2 dy d_out16 -> dy; mul*2 dy y -> y; sum*2 y -> d_out16; {LORA_GRADS}; BASE;
    {INTO_X}; add d_out16 d_out16 -> d_out16; div d_out16 norm16 -> d_out16"""
PEFT = {
    "lora": (LORA, f"mul dy -> dy; {LORA_GRADS}; {INTO_X}"),
    "dora": (DORA.replace("BASE;", ""), DORA_GRADS.replace("BASE", "add dy dy -> dy")),
    "dora_dropout": (DORA.replace("BASE", "mm x w -> y"), DORA_GRADS.replace("BASE", "mm dy w -> dx; add dx dx -> dx")),
    "ia3": ("mul d_out16 -> d_out16; mm x w -> y; mul y d_out16 -> y",
            "mul dy y -> y; sum y -> d_out16; mul dy d_out16 -> dy; mul d_out16 -> d_out16; mm dy w -> dx"),
    "liera": ("mm x w -> y; mm B16 A16 -> w; mul w w -> w; mm x w -> y; add y y -> y",
              "mm dy w -> dx; mm dy x -> w; mul w w -> w; mm w A16 -> B16; mm B16 w -> A16; mm dy w -> dx; "
              "add dx dx -> dx"),
}  # fmt: skip
PEFT["lora_dropout"] = PEFT["lora"]


def schedule(who: str, method: str, shape: Shape, backward: bool) -> list[Launch]:
    """The launches of a forward, and of the backward after it if wanted; who: ours, eager, peft or frozen.

    Raises ValueError for an unknown name, and for a method that HF PEFT does not have.
    """
    if who not in ("ours", "eager", "peft", "frozen") or method not in METHODS:
        raise ValueError(f"who={who!r}, method={method!r}: known are ours, eager, peft, frozen; {', '.join(METHODS)}")
    q = Schedule(shape, *(METHODS[method] if who != "frozen" else ()))
    if who == "peft":
        if method not in PEFT:
            raise ValueError(f"HF PEFT has no method {method!r}")
        for script in PEFT[method][: 1 + backward]:
            q.torch(script)
        return q
    fused = who == "ours" and q.has & {"A", "d_in", "d_out"} and not ("M" in q.has and shape.r > MATRIX_GATE)
    (_ours_forward if fused else _eager_forward)(q)
    if backward:
        (_ours_backward if fused else _eager_backward)(q)
    return q


def lora_forward(shape: Shape, one_launch: bool) -> list[Launch]:
    """Our LoRA's forward in one launch or in two, whatever the kernels would choose."""
    q = Schedule(shape, "A B", {"inline_rows": shape.M if one_launch else 0})
    _ours_forward(q)
    return q


def predict(who: str, method: str, shape: Shape, backward: bool, launch_us: float = 0.0) -> float:
    """Predicted time as a multiple of the frozen layer's; launch_us is added for every launch."""

    def seconds(launches: list[Launch]) -> float:
        return sum(launch.seconds for launch in launches) + 1e-6 * launch_us * len(launches)

    return seconds(schedule(who, method, shape, backward)) / seconds(schedule("frozen", method, shape, backward))


def rows(launch_us: float) -> Iterator[dict[str, str | int | float]]:
    for method, (K, N), M, backward in product(METHODS, WIDTHS, ROWS, (False, True)):
        for r in RANKS if "A" in METHODS[method][0] else (0,):
            shape = Shape(M, K, N, r)
            ratios = {w: predict(w, method, shape, backward, launch_us) for w in ("ours", "eager", "peft")
                      if w != "peft" or method in PEFT}  # fmt: skip
            launches = schedule("ours", method, shape, backward)
            moved = sum(launch.bytes_read + launch.bytes_written for launch in launches)
            yield {
                "method": method, "M": M, "K": K, "N": N, "r": r or "",
                "step": "forward + backward" if backward else "forward",
                **{w: f"{ratios[w]:.3f}" if w in ratios else "" for w in ("ours", "eager", "peft")},
                "gflop_ours": round(sum(launch.flops for launch in launches) / 1e9, 3),
                "mbytes_ours": round(moved / 1e6, 3), "launches_ours": len(launches),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launch-us", type=float, default=0.0, help="overhead of a launch")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = list(rows(args.launch_us))
    line = "{:<17}" + "{:>6}" * 3 + "{:>5}  {:<18}" + "{:>8}" * 3 + "{:>12}{:>13}{:>15}"
    for values in (found[0], *(row.values() for row in found)):
        print(line.format(*values))
    tables.write(args.out, found)


if __name__ == "__main__":
    main()
