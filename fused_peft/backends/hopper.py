"""What the backends share whose big GEMM is written for sm_90 alone: when they may run, and which GEMMs they take.

Off by default: such a backend runs where a record of this GPU says that its self-test passed and that it is the fastest
(``core.records``), or where it is asked for by name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import dispatch, records
from ..core.operands import Problem
from . import triton as base

HALF = (torch.bfloat16, torch.float16)
LEAST = 64  # rows, columns and depth below which tiles are mostly padding


def rows(t: Tensor) -> bool:
    """Whether TMA can address it row by row."""
    return base.kernels().gemm_lowrank._describable(t)


def fits(x: Tensor | None, w: Tensor | None, N: int, c: Tensor | None, dual: bool, u: Tensor | None) -> bool:
    """Whether x Wᵀ is one 16-bit product whose operands and result TMA can address."""
    if x is None or w is None or c is not None or dual or u is not None or x.dtype not in HALF or w.dtype != x.dtype:
        return False
    return min(x.shape[0], N, x.shape[1]) >= LEAST and not N % 8 and rows(x) and (rows(w) or rows(w.t()))


class Hopper(base.Triton):
    takes_groups = False

    def available(self) -> list[str]:
        found, gpus = super().available(), range(torch.cuda.device_count()) if torch.cuda.is_available() else None
        if not found and gpus is not None and not any(torch.cuda.get_device_capability(i) == (9, 0) for i in gpus):
            found = ["no GPU here is an sm_90 (H100, H200), which the kernel is written for"]
        return found

    def predicted_slower(self, problem: Problem) -> str | None:
        return "not measured on this GPU"

    def reasons(self, problem: Problem) -> list[str]:
        found = super().reasons(problem)
        if problem.arch not in ((9, 0), None):
            found.append(f"sm_{problem.arch[0]}{problem.arch[1]} is not sm_90, which the kernel is written for")
        if "w" in problem.present or "c" in problem.present:  # else a norm of rows, which is Triton's
            found += self.unfit(problem)
        if not found and dispatch.forced() != self.name and not records.tested(problem, self.name):
            found.append("not self-tested on this GPU")
        return found

    def unfit(self, problem: Problem) -> list[str]:
        """Why the kernel cannot compute the call's forward GEMM."""
        found = []
        if problem.dtype not in HALF:
            found.append(f"{problem.dtype} is not bfloat16 or float16")
        if problem.hadamard or problem.drop_base or "c" in problem.present:
            found.append("the call is not one GEMM with a frozen weight")
        if min(problem.M, problem.N, problem.K) < LEAST or problem.N % 8 or problem.K % 8:
            shape = f"{problem.M} x {problem.K} x {problem.N}"
            found.append(f"{shape} is below {LEAST} somewhere, or its rows are not whole 16 bytes")
        return found

    def standing(self) -> str:
        """Whether it runs without being asked for, in words."""
        return "where its self-test passed and it was measured fastest"
