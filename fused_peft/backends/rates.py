"""Which backend is faster where nothing was measured: a slower product against the passes over memory that it saves,
and on few rows the time that the host takes.

A GEMM takes max(2 M N K / FLOP/s, bytes / bandwidth). Triton's runs at a share of cuBLAS's rate; cuBLAS's is followed,
or preceded, by passes that read and write x or y once more, and plain PyTorch by still more. What all do (the sums over
rows, the skinny products) counts its bytes. A call takes what the GPU takes or what the host does, whichever is more;
the host's share of other layers is not known. The rates and Triton's share on sm_90 were measured on an H100
(bench/results/gpu), those of other GPUs are what public measurements saw; plain PyTorch's host time is an estimate,
ours taken on a stand-in for the driver. Inside a CUDA graph the host does not count, and this model does not know that
it is in one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..core.operands import Problem

# arch: FLOP/s of 16-bit products, of fp32 ones, bytes/s
RATES = {
    (8, 0): (250e12, 17e12, 1.6e12), (8, 6): (65e12, 30e12, 0.7e12), (8, 9): (150e12, 60e12, 0.8e12),
    (9, 0): (750e12, 50e12, 3.0e12), (10, 0): (1500e12, 65e12, 6.5e12), (12, 0): (200e12, 80e12, 1.5e12),
}  # fmt: skip
SHARE, SHARE_TMA, SHARE_FP32 = 0.85, 0.94, 0.4  # Triton's GEMM, of cuBLAS's rate; that of sm_90
MANY = 1024, 2304  # the smaller and the larger of rows and columns from which ``many`` holds
# of rows in groups, both of cuBLAS's rate on one matrix: Triton's GEMM, which reads by pointers, and PyTorch's own
SHARE_GROUPED, GROUPED_MM = 0.7, 0.85
FEW_ROWS = 64  # up to which Triton's, without split-K, leaves most processors idle
TIE = 1.03  # up to here the fused kernel runs
OURS = 8  # launches of a fused call, forward and backward, or fewer
GROUPED = 9, 5  # those of one on rows in groups: Triton's, and PyTorch's to check the routing and to gather dx
# seconds of the host: a call each way through autograd, and each launch; replayed (csrc/replay.cpp), and in Python
REPLAYED, PLAIN = (50e-6, 4e-6), (60e-6, 6e-6)
IN_PYTHON = 410e-6  # a fused call each way, through Triton's launcher
# csrc/'s GEMM: seconds of a cycle, so that a tile of 128 x 256, 4096 deep, takes the 44.6 us measured on an H100; an
# estimate of the cycles from a tile's last product on x to S in shared memory (T, fence, flag, poll, TMA); and of
# ``down`` the bytes/s of x measured on 8192 rows, with an estimate of the seconds of the least launch
CYCLE, HANDOVER, DOWN = 1 / 1.53e9, 3500, (2.36e12, 5e-6)
replayed: Callable[[], bool] = lambda: True  # noqa: E731  whether calls are; the package replaces this function


def host(launches: int | None = None) -> float:
    """Seconds of the host for forward and backward of a fused call, or of plain PyTorch's with so many launches."""
    if not replayed():
        return IN_PYTHON if launches is None else PLAIN[0] + PLAIN[1] * launches
    return REPLAYED[0] + REPLAYED[1] * (OURS if launches is None else launches)


def rates(arch: tuple[int, int]) -> tuple[float, float, float]:
    """Those of the newest architecture listed that is not newer."""
    return RATES[max((known for known in RATES if known <= arch), default=min(RATES))]


def many(M: int, N: int) -> bool:
    """Whether a pass over the smaller of x and W costs less than a scale in the TMA kernel's K loop, which takes x
    through registers: a quarter more time on an H100."""
    return min(M, N) >= MANY[0] and max(M, N) >= MANY[1]


def tma(problem: Problem) -> bool:
    """Whether Triton's GEMM is the one that loads by TMA."""
    return problem.arch in ((9, 0), None) and problem.dtype.itemsize == 2 and min(problem.M, problem.N, problem.K) >= 64


def scaling(problem: Problem) -> int:
    """Elements moved by x's scale forward, and dy's backward, where it goes into W or a copy of x."""
    w, scales_in, scales_out = problem.N * problem.K, "d_in" in problem.present, "d_out" in problem.present
    return 2 * min(problem.M * problem.K, w) * scales_in + 2 * min(problem.M * problem.N, w) * scales_out


def passes(problem: Problem) -> int:
    """Elements that cuBLAS's way moves beyond one GEMM each way, forward and backward."""
    x, y = problem.M * problem.K, problem.M * problem.N
    scales_in, scales_out, low = (name in problem.present for name in ("d_in", "d_out", "A"))
    last = 9 * x if problem.drop_base else 2 * x * (scales_in or low)
    return scaling(problem) + 2 * y * (scales_out or low) + last


def fused_passes(problem: Problem) -> int:
    """Those that Triton's way moves: none, but for scales of many rows (``many``), the column sums for d_in, and y from
    a stored z."""
    if problem.drop_base or not tma(problem) or not many(problem.M, problem.N):
        return 0
    x, y = problem.M * problem.K, problem.M * problem.N
    scales_in, scales_out, low = (name in problem.present for name in ("d_in", "d_out", "A"))
    return scaling(problem) + 2 * y * (scales_out and low) + 2 * x * scales_in


def eager_passes(problem: Problem) -> tuple[int, int]:
    """Elements that plain PyTorch moves beyond cuBLAS's way, forward and backward, and its launches: as
    ``bench/roofline.py`` counts them. A mask is a launch each way, and is applied to x twice and to dx once."""
    x, y = problem.M * problem.K, problem.M * problem.N
    if problem.hadamard:  # B A, the product with W and their gradients, each of the weight's size
        return 33 * problem.N * problem.K, 16
    scales_in, scales_out, low = (name in problem.present for name in ("d_in", "d_out", "A"))
    moved = 11 * x * bool(problem.p) + 8 * x * scales_in + (16 if low else 7) * y * scales_out
    launches = 2 + 12 * low + 7 * bool(problem.p) + 9 * scales_in + (25 if low else 9) * scales_out
    return moved, launches


def seconds(problem: Problem) -> tuple[float, float, float]:
    """Predicted time on the GPU with Triton's GEMM, with cuBLAS's, and of plain PyTorch, forward and backward."""
    M, N, K, size = problem.M, problem.N, problem.K, problem.dtype.itemsize
    half, single, bandwidth = rates(problem.arch or (9, 0))
    wide = problem.dtype == torch.float32
    share, rate = (SHARE_FP32, single) if wide else (SHARE_TMA if tma(problem) else SHARE, half)
    gemm = 2 * (1 + problem.drop_base) * max(2 * M * N * K / rate, size * (M * K + N * K + M * N) / bandwidth)
    cublas = gemm + size * passes(problem) / bandwidth
    fused = gemm / share + size * fused_passes(problem) / bandwidth
    return fused, cublas, cublas + size * eager_passes(problem)[0] / bandwidth


def grouped_seconds(problem: Problem) -> tuple[float, float]:
    """Predicted time of a call on rows in groups, forward and backward, the GPU's or the host's: with Triton's kernels
    and of plain PyTorch. That has a grouped product in bf16 on newer GPUs, and otherwise runs group by group."""
    P, N, K, E, size = problem.M, problem.N, problem.K, problem.groups, problem.dtype.itemsize
    half, single, bandwidth = rates(problem.arch or (9, 0))
    fp32, low, x, y = problem.dtype == torch.float32, "A" in problem.present, P * K, P * N
    weights = min(E, P) * N * K if "w" in problem.present else 0
    gemm = 2 * max(2 * bool(weights) * P * N * K / (single if fp32 else half), size * (x + y + weights) / bandwidth)
    plain = low and not problem.present & {"a", "G", "d_in", "d_out"} and problem.h == "identity"
    products = plain and problem.dtype == torch.bfloat16 and (problem.arch or (9, 0)) >= (9, 0)
    products = products and not (N % 8 or K % 8 or problem.r % 8)
    # the update is a product of its own that is added to y and to dx, and so is a bias; where x is read through an
    # index it is also copied each way, which a problem does not say
    moved = (4 * x + 4 * y) * low + 4 * y * ("bias" in problem.present) + 11 * x * bool(problem.p)
    moved, launches = moved + (0 if plain else passes(problem) + eager_passes(problem)[0]), eager_passes(problem)[1]
    eager = gemm / (GROUPED_MM if products else 1) + size * moved / bandwidth
    each = 1 if products else min(E, P)
    fused_host = IN_PYTHON * GROUPED[0] / OURS + PLAIN[1] * GROUPED[1]
    share = SHARE_FP32 if fp32 else SHARE_GROUPED
    return max(fused_host, gemm / share), max(PLAIN[0] + PLAIN[1] * (8 + launches * each), eager)


def grouped_slower(problem: Problem) -> str | None:
    """Why plain PyTorch is to be preferred on rows in groups; None where it is not."""
    if problem.device != "cuda":
        return None
    fused, eager = grouped_seconds(problem)
    return f"predicted to take {fused / eager:.2f} times as long as plain PyTorch's products" if fused > eager else None


def ratio(problem: Problem) -> float:
    """Predicted time with Triton's GEMM as a multiple of that with cuBLAS's, forward and backward."""
    fused, cublas, _ = seconds(problem)
    return fused / cublas


def narrow(inner: int) -> float:
    """Cycles of a product of 64 rows of x with so many of A, 16 deep: its operands come from shared memory, 128 bytes a
    cycle, more slowly than the tensor cores multiply them."""
    return max(inner / 2, 16 * (64 + inner) * 2 / 128)


def down(M: int, K: int) -> float:
    """Seconds of ``down``."""
    return max(DOWN[1], 2 * M * K / DOWN[0])


def inlines(M: int, K: int, r: int, BM: int, processors: int = 132) -> bool:
    """Whether csrc/'s GEMM makes T itself and does not run after ``down``: where a tile of the first column, for which
    all others wait once, is delayed by less than ``down`` takes. The handover counts twice, since nobody has measured
    it. ``bench/hopper.py`` simulates both."""
    first = BM // 64 * -(-K // 16) * narrow(max(16, 1 << (r - 1).bit_length())) + 2 * HANDOVER
    return -(-M // (BM * processors)) * first * CYCLE < down(M, K)


def _has_gemm(problem: Problem) -> bool:
    return not problem.hadamard and "w" in problem.present


def said(problem: Problem) -> str:
    """The prediction in words; empty where there is no GEMM to choose."""
    if problem.groups:
        fused, eager = grouped_seconds(problem)
        return f" to take {fused / eager:.2f} of the time of plain PyTorch's products"
    return f" to take {ratio(problem):.2f} of the time with cuBLAS's GEMM" if _has_gemm(problem) else ""


def slower_than_eager(problem: Problem) -> str | None:
    """Why plain PyTorch is to be preferred: its host takes less, where the host is what a call waits for."""
    if "w" not in problem.present or problem.device != "cuda":
        return None
    *ours, eager = seconds(problem)
    fused, plain = max(host(), min(ours)), max(host(eager_passes(problem)[1]), eager)
    if fused <= TIE * plain:
        return None
    return f"predicted to take {fused / plain:.2f} times as long as plain PyTorch, whose host time is less"


def slower(problem: Problem) -> str | None:
    """Why cuBLAS's GEMM is to be preferred to Triton's; None where it is not, or where there is no GEMM to choose."""
    if not _has_gemm(problem):
        return None
    if problem.M <= FEW_ROWS:
        return f"predicted slower than cuBLAS on {problem.M} rows, which its tiles do not fill"
    found = ratio(problem)
    return f"predicted to take {found:.2f} times as long as cuBLAS and what is left to add" if found > TIE else None
