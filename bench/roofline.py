"""FLOPs and bytes of every launch, and the time they predict as a ratio to the frozen layer: ours, eager's, HF PEFT's.

    python bench/roofline.py [--launch-us 0] [--out roofline.csv] [--choices choices.csv]

--choices: what dispatch prefers on an H200 that nothing was measured on, for 1 to 32768 rows, and what that is
predicted to take, with Triton's GEMM at the share of cuBLAS's rate that ``backends.rates`` assumes: on the GPU alone,
and ("waited") by the GPU's time or the host's.

time = Σ over launches of max(FLOPs / rate, bytes / bandwidth), on an H200: what a layer costs when each launch is as
good as the hardware lets it be. Something to hold measurements against, not a measurement.

The launches are those that the layers make: forward and backward run on meta tensors, our kernels written down by
``kernels.launch.record``, PyTorch's operations by a dispatch mode. Counted are the FLOPs of matrix products, those that
a kernel repeats in every tile included, and every tensor that a launch reads or writes, once. What programs read again
is taken to come from cache: A in every row tile of ``down``, both operands in the tiles of ``hadamard_grads``. x, W and
y are bf16; layers have no bias, except bitfit's. Our adapters are fp32, HF PEFT's bf16, its cheapest
(autocast_adapter_dtype=False). HF PEFT's LieRA is HiRA. "ours" are the kernels even where dispatch would choose eager.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import ceil
from pathlib import Path
from unittest.mock import patch

import tables
import torch
from baselines import TIMED, Shape, config, has_peer, peft_layer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import fused_peft as fp
from fused_peft.backends import rates
from fused_peft.backends.cublas import Cublas
from fused_peft.backends.kernel_modules import gemm_lowrank, launch
from fused_peft.backends.triton import Triton
from fused_peft.core import dispatch
from fused_peft.core.operands import Problem

GEMM, FP32, MEMORY = 790e12, 54e12, 4.3e12  # FLOP/s achieved in bf16, and in fp32 without tf32; bytes/s
IN_PYTHON = {"peft": 100e-6, "frozen": 20e-6}  # seconds of host time beside the launches
ARCH = (9, 0)
ROWS, RANKS = (1, 16, 128, 1024, 8192), (8, 16, 64, 256)
WIDTHS = ((4096, 4096), (4096, 14336), (14336, 4096), (1024, 1024))  # K, N


@dataclass(frozen=True)
class Launch:
    """One kernel: FLOPs of its products, bytes from and to memory, FLOP/s of the units it computes with."""

    name: str
    flops: int
    bytes: int
    rate: float = GEMM

    @property
    def seconds(self) -> float:
        return max(self.flops / self.rate, self.bytes / MEMORY)


def _gate(a: dict) -> int:
    return 2 * a["M"] * a["R"] ** 2 if a.get("GATE") == 2 else 0


def _gemm(a: dict) -> int:
    M, N, R, low = a["M"], a["N"], a["R"], a["b_ptr"] is not None
    inner = ceil(N / a["BN"]) * (2 * M * a["K"] * R + _gate(a)) if a.get("INLINE") else 0  # each column tile makes S
    return 2 * M * N * a["K"] * (1 + a.get("DUAL", 0)) + inner + low * 2 * M * N * R


def _rows(a: dict, index: str, name: str) -> int:
    """Of an operand as a kernel reads it, by an index where one is given."""
    t = a[name] if a[index] is None else a[index]
    return 0 if t is None else t.shape[0]


FLOPS: dict[str, Callable[[dict], int]] = {  # of a kernel's arguments
    "gemm_lowrank": _gemm,
    "gemm_lowrank_tma": _gemm,
    "gemm_gluon": lambda a: 2 * a["M"] * a["N"] * (a["K"] + (a["s_desc"].shape[1] if a["s_desc"] else 0)),
    "down": lambda a: 2 * a["M"] * a["K"] * a["R"] + _gate(a),
    "back": lambda a: 4 * a["M"] * a["N"] * a["R"] + _gate(a),
    "outer": lambda a: 2 * a["M"] * a["R"] * (a["C0"] * a["PRODUCT0"] + a["C1"] * a["PRODUCT1"]),
    "row_norm": lambda a: 2 * a["N"] * a["R"] * (a["K"] + a["R"]),
    "form": lambda a: 2 * a["N"] * a["K"] * a["R"],
    "hadamard": lambda a: 2 * a["N"] * a["K"] * (a["M"] + ceil(a["M"] / a["BM"]) * a["R"]),
    "hadamard_grads": lambda a: 2 * a["N"] * a["K"] * (a["M"] + 2 * a["R"]),
    "finish": _gate,
    "add_up": lambda a: 0,
    "scale": lambda a: 0,
    "decode": lambda a: 0,
    "coded": lambda a: 2 * a["M"] * a["N"] * a["K"],
    "split": lambda a: 0,
    "keep_mask": lambda a: 0,
    "down_grouped": lambda a: 2 * _rows(a, "rows_ptr", "x_ptr") * a["K"] * a["R"],
    "gemm_grouped": lambda a: 2 * a["y_ptr"].shape[0] * a["N"] * (a["K"] + a["R"]),
    "outer_grouped": lambda a: 2 * a["R"] * (_rows(a, "rows0_ptr", "u0_ptr") * a["C0"] * a["PRODUCT0"]
                                             + _rows(a, "rows1_ptr", "u1_ptr") * a["C1"] * a["PRODUCT1"]),
    "add_up_grouped": lambda a: 0,
    "tile_table": lambda a: 0,
}  # fmt: skip
INDEXED = {"rows_ptr": "x_ptr", "rows0_ptr": "u0_ptr", "rows1_ptr": "u1_ptr"}  # an index, and whose rows it names


def _nbytes(values) -> int:
    """Of the tensors among them, one given twice counted once."""
    return sum(t.nbytes for t in {id(v): v for v in values if isinstance(v, Tensor)}.values())


def _kernel(recorded) -> Launch:
    name, args = recorded.kernel.__name__, dict(recorded.args)
    if name == "outer" and not args["tiles_0"]:  # given, not read
        args |= dict.fromkeys(("u0_ptr", "v0_ptr", "d0_ptr", "z0_ptr")) | {"PRODUCT0": False}
    elif name == "outer" and not (args["PRODUCT0"] or args["USUM"]):
        args["d0_ptr"] = None
    elif name == "down" and args["part_ptr"].numel():  # ``finish`` goes on
        args |= dict.fromkeys(("bias_ptr", "g_ptr", "t_ptr", "out_ptr")) | {"GATE": 0}
    moved = _nbytes(getattr(v, "base", v) for v in args.values())
    for index in INDEXED.keys() & {n for n, v in args.items() if v is not None}:  # each time that a row is read
        x = args[INDEXED[index]]
        moved += x.nbytes // len(x) * (len(args[index]) - len(x))
    return Launch(name, FLOPS[name](args), moved)


class Traced(TorchDispatchMode):
    """The launches of PyTorch's operations inside the block: those that move bytes."""

    def __init__(self):
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result, name = func(*args, **(kwargs or {})), func._schema.name.removeprefix("aten::")
        if not name.startswith(("empty", "new_empty", "promote", "_unsafe_view")) and not func.is_view:
            count = flop_registry.get(getattr(torch.ops.aten, name.rstrip("_"), None))  # addmm_ as addmm
            flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
            moved = _nbytes(tree_leaves(args[1:] if name == "copy_" else args)) + _nbytes(tree_leaves(result))
            rate = FP32 if any(getattr(t, "dtype", None) == torch.float32 for t in tree_leaves(result)) else GEMM
            self.launches.append(Launch(name, flops, moved, rate))
        return result


class OnPaper:
    """For a backend of a GPU: takes meta tensors for an H200's."""

    def available(self) -> list[str]:
        return []

    def reasons(self, problem: Problem) -> list[str]:
        return super().reasons(replace(problem, device="cuda", arch=ARCH))

    def slower(self, problem: Problem) -> None:
        return None


class TritonOnPaper(OnPaper, Triton):
    name = "triton on paper"


class CublasOnPaper(OnPaper, Cublas):
    name = "cublas on paper"


ON_PAPER = {"ours": TritonOnPaper(), "cublas": CublasOnPaper()}


def _traced(call: Callable[[], object]) -> tuple[list[Launch], object]:
    with launch.record(ARCH) as kernels, Traced() as mode:
        result = call()
    return [*map(_kernel, kernels), *mode.launches], result


def _layer(who: str, method: str, shape: Shape) -> nn.Module:
    linear = nn.Linear(shape.K, shape.N, bias=False, dtype=torch.bfloat16, device="meta").requires_grad_(False)
    if who == "frozen":
        return linear
    if who == "peft":
        layer = peft_layer(method, linear, shape.r or 8, autocast_adapter_dtype=False)
        return layer.to(device="meta", dtype=torch.bfloat16)
    return fp.PeftLinear.from_linear(linear, config(method, shape.r or 8))


@cache
def _both(who: str, method: str, shape: Shape) -> tuple[list[Launch], list[Launch]]:
    """The launches of forward, as training makes it, and of backward."""
    layer = _layer(who, method, shape)
    x = torch.empty(shape.M, shape.K, dtype=torch.bfloat16, device="meta", requires_grad=True)
    dy = torch.empty(shape.M, shape.N, dtype=torch.bfloat16, device="meta")
    dropout = lambda t, p, training, inplace=False: torch.native_dropout(t, p, training)[0]  # noqa: E731  as on a GPU
    backend = ON_PAPER.get(who, dispatch.backends()["eager"])
    if who in ON_PAPER:
        dispatch.register(backend)
    try:
        with dispatch.forcing(backend.name), patch.object(nn.functional, "dropout", dropout):
            forward, y = _traced(lambda: layer(x))
            wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
            backward, _ = _traced(lambda: torch.autograd.grad(y, wanted, dy))
    finally:
        if who in ON_PAPER:
            dispatch.unregister(backend.name)
    return forward, backward


def schedule(who: str, method: str, shape: Shape, backward: bool) -> list[Launch]:
    """The launches of a forward, and of the backward after it if wanted; who: ours, cublas, eager, peft or frozen.

    Raises ValueError for an unknown name, and for a method that HF PEFT does not have.
    """
    if who not in ("ours", "cublas", "eager", "peft", "frozen") or method not in TIMED:
        raise ValueError(
            f"who={who!r}, method={method!r}: known are ours, cublas, eager, peft, frozen; {', '.join(TIMED)}"
        )
    if who == "peft" and not has_peer(method):
        raise ValueError(f"HF PEFT has no method {method!r}")
    first, second = _both(who, "lora" if who == "frozen" else method, shape)
    return [*first, *second] if backward else list(first)


def lora_forward(shape: Shape, one_launch: bool) -> list[Launch]:
    """Our LoRA's forward in one launch or in two, whatever the kernels would choose."""
    with patch.object(gemm_lowrank, "INLINE_ROWS", shape.M if one_launch else 0):
        return _both.__wrapped__("ours", "lora", shape)[0]


def predict(who: str, method: str, shape: Shape, backward: bool, launch_us: float = 0.0) -> float:
    """Predicted time as a multiple of the frozen layer's; launch_us is added for every launch."""

    def seconds(launches: list[Launch]) -> float:
        return sum(launch.seconds for launch in launches) + 1e-6 * launch_us * len(launches)

    return seconds(schedule(who, method, shape, backward)) / seconds(schedule("frozen", method, shape, backward))


def _slowed(x: Launch) -> float:
    """Seconds of a launch with Triton's GEMMs at their share of cuBLAS's rate."""
    shares = {"gemm_lowrank": rates.SHARE, "gemm_lowrank_tma": rates.SHARE_TMA} if x.flops else {}
    return x.seconds / shares.get(x.name, 1)


def chosen(method: str, shape: Shape) -> tuple[str, float]:
    """(who, time as a multiple of the frozen layer's) of the backend that dispatch prefers on a GPU that nothing was
    measured on, forward and backward; Triton's GEMMs at the share of cuBLAS's rate that ``backends.rates`` assumes."""
    problems = []

    class Asked(CublasOnPaper):
        name = "asked"

        def slower(self, problem: Problem) -> None:
            problems.append(replace(problem, device="cuda", arch=ARCH))

    layer = _layer("ours", method, shape)
    dispatch.register(Asked(), ("meta",))
    try:
        _traced(lambda: layer(torch.empty(shape.M, shape.K, dtype=torch.bfloat16, device="meta")))
    finally:
        dispatch.unregister("asked")
    who = "cublas" if any(map(rates.slower, problems)) else "ours"
    who = "eager" if any(map(rates.slower_than_eager, problems)) else who
    both = sum(_slowed(x) if who == "ours" else x.seconds for x in schedule(who, method, shape, True))
    return who, both / sum(x.seconds for x in schedule("frozen", method, shape, True))


def rows(launch_us: float) -> Iterator[dict[str, str | int | float]]:
    ranked = {m for m in TIMED if hasattr(config(m, 8), "r")}
    for method, (K, N), M, backward in product(TIMED, WIDTHS, ROWS, (False, True)):
        for r in RANKS if method in ranked else (0,):
            shape = Shape(M, K, N, r)
            ratios = {w: predict(w, method, shape, backward, launch_us) for w in ("ours", "eager", "peft")
                      if w != "peft" or has_peer(method)}  # fmt: skip
            launches = schedule("ours", method, shape, backward)
            yield {
                "method": method, "M": M, "K": K, "N": N, "r": r or "",
                "step": "forward + backward" if backward else "forward",
                **{w: f"{ratios[w]:.3f}" if w in ratios else "" for w in ("ours", "eager", "peft")},
                "gflop_ours": round(sum(launch.flops for launch in launches) / 1e9, 3),
                "mbytes_ours": round(sum(launch.bytes for launch in launches) / 1e6, 3), "launches_ours": len(launches),
            }  # fmt: skip


def waited(who: str, method: str, shape: Shape, slowed: bool = False) -> float:
    """Predicted seconds of forward and backward: the GPU's or the host's, whichever are more."""
    launches = schedule(who, method, shape, True)
    host = IN_PYTHON[who] + rates.PLAIN[1] * len(launches) if who in IN_PYTHON else rates.host(len(launches))
    return max(host, sum(_slowed(x) if slowed else x.seconds for x in launches))


def choices() -> Iterator[dict[str, str | int]]:
    """Of what is chosen, of eager and of HF PEFT: the GPU's time, and the GPU's or the host's, as multiples of the
    frozen layer's."""
    for method, M in product(TIMED, (1 << n for n in range(16))):
        shape, peer = Shape(M, 4096, 4096, 16), has_peer(method)
        who, took = chosen(method, shape)
        peft = f"{predict('peft', method, shape, True):.3f}" if peer else ""
        eager = f"{predict('eager', method, shape, True):.3f}"
        frozen = waited("frozen", method, shape)
        both = {w: f"{waited(w, method, shape, True) / frozen:.3f}" for w in (who, "eager", *(["peft"] * peer))}
        yield {
            "method": method, "M": M, "choice": {"ours": "triton"}.get(who, who), "chosen": f"{took:.3f}",
            "eager": eager, "peft": peft, "chosen_waited": both[who], "eager_waited": both["eager"],
            "peft_waited": both.get("peft", ""),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--launch-us", type=float, default=0.0, help="overhead of a launch")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--choices", type=Path)
    args = parser.parse_args()
    if args.choices:
        return tables.write(args.choices, list(choices()))
    found = list(rows(args.launch_us))
    line = "{:<17}" + "{:>6}" * 3 + "{:>5}  {:<18}" + "{:>8}" * 3 + "{:>12}{:>13}{:>15}"
    for values in (found[0], *(row.values() for row in found)):
        print(line.format(*values))
    tables.write(args.out, found)


if __name__ == "__main__":
    main()
