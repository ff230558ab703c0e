"""The GEMM itself against cuBLAS: csrc/'s and Triton's, alone and with a rank-16 update whose S is there already."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from clock import quantile
from timing import DEVICE, INTERPRETING, Step, copies_of, interleaved

from fused_peft.backends.triton import kernels
from fused_peft.core.dispatch import backends

COLUMNS = "M K N contender ms_p20 ms_p50 ms_p80 tflops ratio_p20 ratio_p50 ratio_p80 gpu driver torch triton commit"
SHAPES = ((4096, 4096, 4096), (8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096))  # M, K, N
if INTERPRETING:
    SHAPES = ((70, 72, 64),)
DTYPE = torch.float16 if INTERPRETING else torch.bfloat16
R = 16


def contenders(M: int, K: int, N: int, left: list[str]) -> dict[str, Step]:
    """{name: step}; what cannot run here is told in ``left``."""
    k, copies = kernels(), copies_of((M * (K + N) + K * N) * DTYPE.itemsize)
    draw = lambda *shape: [torch.randn(*shape, device=DEVICE, dtype=DTYPE) for _ in range(copies)]  # noqa: E731
    xs, ws, ss, bs = draw(M, K), draw(N, K), draw(M, R), draw(N, R)

    def own(name: str, updated: bool) -> Callable[[int], None]:
        def step(i: int) -> None:
            i %= copies
            update = k.gemm_lowrank.Update(ss[i], bs[i], 1.0) if updated else None
            backends()[name].gemm(xs[i], ws[i], (M, N), update)

        return step

    steps = {"cublas": lambda i: torch.mm(xs[i % copies], ws[i % copies].t())}
    for name in ("cuda", "triton"):
        for suffix, updated in (("", False), ("+update", True)):
            try:
                if missing := backends()[name].available():
                    raise RuntimeError(missing[0])
                own(name, updated)(0)
                steps[name + suffix] = own(name, updated)
            except Exception as e:
                left.append(f"gemm {name}{suffix}: {e}"[:200])
    return steps


def rows(M: int, K: int, N: int) -> tuple[list[dict], list[str]]:
    """The rows of one shape, and what was left out."""
    left: list[str] = []
    found, times = [], interleaved(contenders(M, K, N, left))
    for name, seconds in times.items():
        relative = [s / c for s, c in zip(seconds, times["cublas"], strict=True)]
        spread = {f"ms_p{q}": 1e3 * quantile(seconds, q / 100) for q in (20, 50, 80)}
        spread |= {f"ratio_p{q}": quantile(relative, q / 100) for q in (20, 50, 80)}
        rate = 2 * M * N * K / statistics.median(seconds) / 1e12
        found.append({"M": M, "K": K, "N": N, "contender": name, "tflops": rate, **spread})
    return found, left
