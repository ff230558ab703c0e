"""The Triton backend with cuBLAS for the big GEMM: y = x̂ Wᵀ by ``torch.mm``, then what is left to add.

    only S Bᵀ is left   y.addmm_(S, Bᵀ)
    else                one pass of ``gemm_lowrank`` without a weight: mask, d_out, bias, z, the column sums for d_in

The skinny products, masks and norms are the Triton kernels' in either case. Which of the two GEMMs runs where nothing
was measured: ``rates``.
"""

from __future__ import annotations

import torch

from ..core.operands import Problem
from . import rates
from . import triton as base


class Cublas(base.Triton):
    name = "cublas"
    takes_groups = False

    def predicted_slower(self, problem: Problem) -> str | None:
        return rates.slower_than_eager(problem)

    def inlines(self, o, x, mask) -> bool:
        return False

    def gemm(
        self, x, w, like, update=None, c=None, d_in=None, d_out=None, bias=None, bias_inside=True, mask=None,
        dual=False, u=None, want_y=True, want_z=False,
    ):  # fmt: skip
        k, base_of = base.kernels(), super().product
        if x is None or w is None:
            return base_of(x, w, like, update, c, d_in, d_out, bias, bias_inside, mask, dual, u, want_y, want_z)
        past = torch.mm(x, w.t()) if dual else None
        x, w = k.scale.absorbed(x, w, d_in)
        if dual:  # past + drop(acc − past)·rescale
            acc = torch.mm(x, w.t())
            if update is not None:
                acc.addmm_(update.S, update.B.t().to(x.dtype), alpha=update.scale)
            kept, _ = k.dropout.parts(acc.sub_(past), *mask)
            y, update, mask = past.add_(kept), None, None
        elif bias is not None and bias_inside:
            y, bias = torch.addmm(bias.to(x.dtype), x, w.t()), None
        else:
            y = torch.mm(x, w.t())
        if c is not None:
            y += c
        if update is not None and not update.masked:
            y.addmm_(update.S, update.B.t().to(x.dtype), alpha=update.scale)
            update = None
        if update is None and d_out is None and bias is None and u is None and not want_z:
            return k.gemm_lowrank.Result(y if want_y else None, None, None, None)
        return base_of(None, None, like, update, y, None, d_out, bias, bias_inside, mask, False, u, want_y, want_z)
