"""The GEMM itself against cuBLAS: csrc/'s, Gluon's and Triton's, alone and with a rank-16 update, S given."""

from __future__ import annotations

import statistics

import torch
from timing import DEVICE, FACTS, INTERPRETING, copies_of, interleaved, spread

from fused_peft.backends.triton import kernels
from fused_peft.core.dispatch import backends

COLUMNS = f"M K N contender ms_p20 ms_p50 ms_p80 tflops ratio_p20 ratio_p50 ratio_p80 note {FACTS}"
CONTENDERS = ("cublas", "cuda", "cuda+update", "triton", "triton+update")
if not backends()["gluon"].available():
    CONTENDERS += ("gluon", "gluon+update")
SHAPES = ((4096, 4096, 4096), (8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096))  # M, K, N
if INTERPRETING:
    SHAPES = ((70, 72, 64),)
DTYPE = torch.float16 if INTERPRETING else torch.bfloat16
R = 16


def jobs() -> list[tuple]:
    return [({"M": M, "K": K, "N": N, "contender": name},) for M, K, N in SHAPES for name in CONTENDERS]


def rows(about: dict) -> list[dict]:
    """The row of one contender, beside cuBLAS in the same rounds."""
    M, K, N, contender = about.values()
    name, _, update = contender.partition("+")
    k, copies = kernels(), copies_of((M * (K + N) + K * N) * DTYPE.itemsize)
    draw = lambda *shape: [torch.randn(*shape, device=DEVICE, dtype=DTYPE) for _ in range(copies)]  # noqa: E731
    xs, ws, ss, bs = draw(M, K), draw(N, K), draw(M, R), draw(N, R)

    def own(i: int) -> None:
        i %= copies
        extra = k.gemm_lowrank.Update(ss[i], bs[i], 1.0) if update else None
        backends()[name].gemm(xs[i], ws[i], (M, N), extra)

    steps = {"cublas": lambda i: torch.mm(xs[i % copies], ws[i % copies].t())}
    if name != "cublas":
        if missing := backends()[name].available():
            raise RuntimeError(missing[0])
        steps[contender] = own
    times = interleaved(steps)
    seconds, rate = times[contender], 2 * M * N * K / statistics.median(times[contender]) / 1e12
    ratio = [s / c for s, c in zip(seconds, times["cublas"], strict=True)]
    return [{"tflops": rate, **spread("ms", [1e3 * s for s in seconds]), **spread("ratio", ratio)}]
