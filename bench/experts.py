"""LoRA on a mixture of experts, predicted for an H100: ours on Triton's kernels, ours on PyTorch's grouped product, HF
PEFT's, as ratios to the frozen layer. Nothing is measured.

    python bench/experts.py [--out bench/results/experts_predicted.csv]

The stacks for gate and up and for down, forward and backward, both adapted, the routing even; what all have in common
is left out (the routing, the activation, the weighted sum). Launches as ``roofline`` counts them: PyTorch's operations
on meta tensors, our kernels written down, x counted each time that they read a row. time = Σ max(FLOPs / rate, bytes /
bandwidth) with the figures of ``backends.rates`` for sm_90: PyTorch's grouped product at GROUPED_MM of cuBLAS's rate,
Triton's at SHARE_GROUPED, both estimates. Tiles that a group does not fill are not counted, nor is the host's time.
``choice``: which of ours dispatch would take for each of the two stacks.

HF PEFT (0.21, ``target_parameters``) forms W + s·BA of every expert each time, W' = baddbmm(W, B, A), keeps it for
backward, and there makes the gradient of the whole of W' before those of its factors. Its adapters are bf16, ours fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import tables
import torch
import torch.nn.functional as F
from roofline import ARCH, ON_PAPER, Launch, _traced
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from fused_peft.backends import rates
from fused_peft.core import dispatch, grouped, groups
from fused_peft.core.factors import Factors
from fused_peft.core.groups import Groups
from fused_peft.core.operands import call_of


class Model(NamedTuple):
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    bias: bool = False
    transposed: bool = False


MODELS = {
    "Qwen3-30B-A3B": Model(2048, 768, 128, 8),
    "gpt-oss-20b": Model(2880, 2880, 32, 4, bias=True, transposed=True),
    "Mixtral-8x7B": Model(4096, 14336, 8, 2),
}
TOKENS, R = 8192, 16
HALF, _, BANDWIDTH = rates.rates(ARCH)


def _grouped_flops(a: Tensor, b: Tensor, *args, out_val: Tensor, **kwargs) -> int:
    """Of (P, K) by a stack (E, K, N), or of (K, P) by (P, N) group by group: every row meets one expert."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[-1]


SHARE = {"gemm_grouped": rates.SHARE_GROUPED, "_grouped_mm": rates.GROUPED_MM}


def stacks(m: Model) -> list[tuple[Tensor, Tensor, Tensor | None, Groups]]:
    """x, W (E, N, K), bias and groups of each stack's call; only the first reads x through an index."""
    empty = partial(torch.empty, device="meta", dtype=torch.bfloat16)
    found, P = [], TOKENS * m.top_k
    offs = empty(m.experts, dtype=torch.int32)
    routed = Groups(offs, empty(P, dtype=torch.int64), empty(TOKENS, m.top_k, dtype=torch.int64))
    shapes = (TOKENS, 2 * m.intermediate, m.hidden, routed), (P, m.hidden, m.intermediate, Groups(offs))
    for M, N, K, groups_ in shapes:
        w = empty(m.experts, K, N).mT if m.transposed else empty(m.experts, N, K)
        found.append((empty(M, K, requires_grad=True), w, empty(m.experts, N) if m.bias else None, groups_))
    return found


def _theirs(x: Tensor, w: Tensor, bias: Tensor | None, g: Groups) -> Tensor:
    """Transformers' grouped layer."""
    x = x if g.rows is None else x[g.rows]
    y = F.grouped_mm(x, w.mT, offs=g.offs)
    return y if bias is None else y.add_(bias[groups.group_of(g.offs, len(y))])


def _factors(w: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    (E, N, K), empty = w.shape, partial(torch.empty, device="meta", dtype=dtype, requires_grad=True)
    return empty(E, R, K), empty(E, N, R)


def _both(call: Callable, x: Tensor, *parameters: Tensor) -> list[Launch]:
    """The launches of forward and backward."""
    forward, y = _traced(lambda: call(x))
    backward, _ = _traced(lambda: torch.autograd.grad(y, [x, *parameters], torch.empty_like(y)))
    return [*forward, *backward]


def launches(who: str, m: Model) -> list[Launch]:
    """Of both stacks; who: triton, grouped_mm, peft or frozen."""
    found = []
    for x, w, bias, g in stacks(m):
        if who == "frozen":
            found += _both(lambda x, w=w, bias=bias, g=g: _theirs(x, w, bias, g), x)
        elif who == "peft":
            A, B = _factors(w, torch.bfloat16)
            left, right = (A.mT, B.mT) if m.transposed else (B, A)  # folded into W as it is stored
            fold = lambda w, left=left, right=right: torch.baddbmm(w, left, right, alpha=2.0)  # noqa: E731
            merged = (lambda w, fold=fold: fold(w.mT).mT) if m.transposed else fold
            found += _both(lambda x, w=w, bias=bias, g=g, merged=merged: _theirs(x, merged(w), bias, g), x, A, B)
        else:
            A, B = _factors(w, torch.float32)
            f = Factors(A=A, B=B, s=2.0)
            found += _both(lambda x, w=w, bias=bias, g=g, f=f: grouped.linear(x, w, f, g, bias), x, A, B)
    return found


def traced(who: str, m: Model) -> list[Launch]:
    """The same, on the backend that ``who`` names."""
    backend = {"triton": ON_PAPER["ours"]}.get(who, dispatch.backends()["eager"])
    if who == "triton":
        dispatch.register(backend)
    known = {torch.ops.aten._grouped_mm: _grouped_flops}
    try:
        with (
            dispatch.forcing(backend.name), patch.dict(flop_registry, known),
            patch.object(groups, "fits_grouped_mm", lambda *tensors: True),
        ):  # fmt: skip
            return launches(who, m)
    finally:
        if who == "triton":
            dispatch.unregister(backend.name)


def seconds(who: str, m: Model) -> float:
    found = traced(who, m)
    return sum(max(x.flops / (HALF * SHARE.get(x.name, 1)), x.bytes / BANDWIDTH) for x in found)


def choice(m: Model) -> str:
    """What dispatch prefers on an H100 that nothing was measured on, for the stack of gate and up and for that of
    down."""
    names = []
    for x, w, bias, g in stacks(m):
        A, B = _factors(w, torch.float32)
        problem = grouped.problem_of(call_of(x, w, Factors(A=A, B=B), bias, None, None, 0.0), g)
        problem = problem.__class__(**{**problem.__dict__, "device": "cuda", "arch": ARCH})
        names.append("grouped_mm" if rates.grouped_slower(problem) else "triton")
    return " ".join(names)


def rows() -> list[dict[str, str | int]]:
    found = []
    for name, m in MODELS.items():
        took = {who: seconds(who, m) for who in ("frozen", "triton", "grouped_mm", "peft")}
        kept = sum(w.nbytes for _, w, _, _ in stacks(m))
        found.append({
            "model": name, "experts": m.experts, "top_k": m.top_k, "hidden": m.hidden,
            "intermediate": m.intermediate, "tokens": TOKENS, "r": R, "basis": "predicted, H100",
            "frozen_ms": f"{1e3 * took['frozen']:.3f}",
            **{who: f"{t / took['frozen']:.3f}" for who, t in took.items() if who != "frozen"},
            "choice": choice(m), "peft_keeps_gib": f"{kept / 2**30:.2f}",
        })  # fmt: skip
    return found


if __name__ == "__main__":
    tables.command(__doc__, rows)
