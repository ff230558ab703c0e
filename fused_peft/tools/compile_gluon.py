"""The forms of Gluon's GEMM for ahead-of-time compilation: what the backend's forward and dx ask of it on sm_90."""

from __future__ import annotations

from itertools import product

import torch

from ..backends.gluon import Gluon
from ..backends.triton import kernels

SHAPES = ((8192, 4096, 4096), (1024, 1024, 1024))  # M, K, N: one a tile
ENDS = ("", "bias", "bias-d_out", "bias-inside-d_out-z", "d_out-z")  # what is left to do after the products
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def launches() -> dict[str, object]:
    """{name: Launch} of every form, named kernel-config-dtype-form-phase; none where there is no Gluon."""
    if kernels().gemm_gluon is None:
        return {}
    forms = [(end, False, "forward") for end in ENDS] + [("", masked, "backward") for masked in (False, True)]
    found = {}
    for (end, masked, phase), shape, dtype, r in product(forms, SHAPES, DTYPES, (0, 16, 32, 64)):
        if r or not masked:
            launch = _recorded(end.split("-"), masked, phase == "backward", *shape, r, DTYPES[dtype])
            c = launch.config
            form = "-".join(part for part in (f"r{r}", end, "dropout" * masked, phase) if part)
            found[f"gemm_gluon-{c.BM}x{c.BN}x{c.BK}w{c.warps}s{c.stages}-{dtype}-{form}"] = launch
    return found


def _recorded(end: list[str], masked: bool, across: bool, M: int, K: int, N: int, r: int, dtype: torch.dtype):
    empty = lambda *shape, dtype=dtype: torch.empty(shape, device="meta", dtype=dtype)  # noqa: E731
    stored = lambda rows, columns: empty(columns, rows).t() if across else empty(rows, columns)  # noqa: E731
    k = kernels()
    update = k.gemm_lowrank.Update(empty(M, r), stored(N, r), 2.0, masked) if r else None
    mask = k.gemm_lowrank.Mask(empty(2, dtype=torch.int32), -30000, 1.1) if masked else None
    bias = empty(N) if "bias" in end else None
    d_out = empty(N, dtype=torch.float32) if "d_out" in end else None
    inside = d_out is None or "inside" in end
    with k.launch.record((9, 0)) as made:
        Gluon().gemm(
            empty(M, K), stored(N, K), (M, N), update, d_out=d_out, bias=bias, bias_inside=inside, mask=mask,
            want_z="z" in end,
        )  # fmt: skip
    (launch,) = made
    return launch
