"""Which GEMM is faster where nothing was measured: a slower product against the passes over memory that it saves.

A GEMM takes max(2 M N K / FLOP/s, bytes / bandwidth). Triton's runs at a share of cuBLAS's rate; cuBLAS's is followed,
or preceded, by passes that read and write x or y once more. What both do (the skinny products, the sums over rows) is
left out, so that a ratio is of the GEMMs and their passes alone. The rates are what the hardware was seen to reach in
public measurements, the shares an estimate: neither was measured with this library.
"""

from __future__ import annotations

import torch

from ..core.operands import Problem

# arch: FLOP/s of 16-bit products, of fp32 ones, bytes/s
RATES = {
    (8, 0): (250e12, 17e12, 1.6e12), (8, 6): (65e12, 30e12, 0.7e12), (8, 9): (150e12, 60e12, 0.8e12),
    (9, 0): (700e12, 50e12, 3.0e12), (10, 0): (1500e12, 65e12, 6.5e12), (12, 0): (200e12, 80e12, 1.5e12),
}  # fmt: skip
SHARE, SHARE_FP32 = 0.85, 0.4  # Triton's GEMM, of cuBLAS's rate
FEW_ROWS = 64  # up to which Triton's, without split-K, leaves most processors idle
TIE = 1.03  # up to here the fused kernel runs


def rates(arch: tuple[int, int]) -> tuple[float, float, float]:
    """Those of the newest architecture listed that is not newer."""
    return RATES[max((known for known in RATES if known <= arch), default=min(RATES))]


def passes(problem: Problem) -> int:
    """Elements that cuBLAS's way moves beyond the fused one, forward and backward."""
    x, y = problem.M * problem.K, problem.M * problem.N
    scales_in, scales_out, low = (name in problem.present for name in ("d_in", "d_out", "A"))
    forward = 2 * x * scales_in + 2 * y * (scales_out or low)
    backward = 2 * y * scales_out + (9 * x if problem.drop_base else 2 * x * (scales_in or low))
    return forward + backward


def ratio(problem: Problem) -> float:
    """Predicted time with Triton's GEMM as a multiple of that with cuBLAS's, forward and backward."""
    M, N, K, size = problem.M, problem.N, problem.K, problem.dtype.itemsize
    half, single, bandwidth = rates(problem.arch or (9, 0))
    share, rate = (SHARE_FP32, single) if problem.dtype == torch.float32 else (SHARE, half)
    gemm = 2 * (1 + problem.drop_base) * max(2 * M * N * K / rate, size * (M * K + N * K + M * N) / bandwidth)
    return gemm / share / (gemm + size * passes(problem) / bandwidth)


def slower(problem: Problem) -> str | None:
    """Why cuBLAS's GEMM is to be preferred to Triton's; None where it is not, or where there is no GEMM to choose."""
    if problem.hadamard or "w" not in problem.present:
        return None
    if problem.M <= FEW_ROWS:
        return f"predicted slower than cuBLAS on {problem.M} rows, which its tiles do not fill"
    found = ratio(problem)
    return f"predicted to take {found:.2f} times as long as cuBLAS and what is left to add" if found > TIE else None
