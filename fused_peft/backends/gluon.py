"""The Triton backend with its 16-bit GEMMs computed by warps that each do one thing, in Gluon, on sm_90.

forward   down (S), then ``gemm_gluon`` (y, z)
backward  dx from the same GEMM; what sums over rows, and GEMMs that it does not take, are the Triton backend's

Off by default, as ``hopper`` says. Gluon is Triton's experiment and changes from release to release, so the backend is
also off where the installed release is not one that its kernel is known by (``triton_internals.GLUON``).
"""

from __future__ import annotations

from ..core.operands import Problem
from . import hopper, rates
from . import triton as base

MAX_RANK = 64  # one slot of the kernel's ring


class Gluon(hopper.Hopper):
    name = "gluon"

    def available(self) -> list[str]:
        found = super().available()
        return found or [why for why in [base.kernels().triton_internals.no_gluon()] if why]

    def unfit(self, problem: Problem) -> list[str]:
        found = super().unfit(problem)
        if "d_in" in problem.present and not rates.many(problem.M, problem.N):
            found.append("a scale on x, which the kernel reads as it is, on few rows")
        if problem.r > MAX_RANK:
            found.append(f"r={problem.r} is above {MAX_RANK}")
        return found

    def inlines(self, o, x, mask) -> bool:
        return x.shape[0] < hopper.LEAST and super().inlines(o, x, mask)

    def product(
        self, x, w, like, update=None, c=None, d_in=None, d_out=None, bias=None, bias_inside=True, mask=None,
        dual=False, u=None, want_y=True, want_z=False,
    ):  # fmt: skip
        k = base.kernels()
        taken = hopper.fits(x, w, like[1], c, dual, u) and d_in is None and want_y
        if update is not None:
            taken = taken and isinstance(update, k.gemm_lowrank.Update) and update.B.shape[1] <= MAX_RANK
        if not taken:
            return super().product(x, w, like, update, c, d_in, d_out, bias, bias_inside, mask, dual, u, want_y, want_z)
        return k.gemm_gluon.gemm(x, w, like, update, d_out, bias, bias_inside, mask, want_z)
