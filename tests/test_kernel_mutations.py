"""Deliberately wrong kernels: each edit of a kernel's source must be noticed by the formula it breaks."""

import importlib.util
import sys
from typing import NamedTuple

import pytest
import torch
from cases import CASES, Shape
from oracle import build, disagreements, inputs

import fused_peft as fp
from fused_peft.backends import triton as backend_file

pytest.importorskip("triton", reason="Triton runs on Linux")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="fp64 runs in the interpreter only")
TOLERANCE = 2e-7
SHAPE = Shape((300,), 65, 72, 5)  # several tiles each way and several row shares
k = backend_file._kernels()


class Mutant(NamedTuple):
    """A kernel file, what its source says, what the mutant says, and the cases that must notice."""

    file: str
    before: str
    after: str
    cases: tuple[str, ...]


MUTANTS = {
    "low-rank phase skipped": Mutant(
        "gemm_lowrank",
        "update = dot(s, b, update, PRECISION)",
        "update = update",
        ("lora",),
    ),
    "update not scaled": Mutant(
        "gemm_lowrank",
        "PRECISION, BM, BN, BR) * scale\n        if MASK",
        "PRECISION, BM, BN, BR)\n        if MASK",
        ("lora",),
    ),
    "s doubled": Mutant(
        "down",
        "    acc *= scale\n",
        "    acc *= 2 * scale\n",
        ("lora", "dora"),
    ),
    "last K block dropped": Mutant(
        "gemm_lowrank",
        "for k0 in range(0, K, BK):",
        "for k0 in range(0, K - BK, BK):",
        ("lora", "ssb"),
    ),
    "last K block dropped from S": Mutant(
        "down",
        "range(0, K, BK)",
        "range(0, K - BK, BK)",
        ("lora",),
    ),
    "mask dropped from dx": Mutant(
        "gemm_lowrank",
        "        if MASK:\n",
        "        if MASK and BM < 0:\n",
        ("lora+dropout",),
    ),
    "mask dropped from S": Mutant(
        "down",
        "if seed_ptr is not None:",
        "if seed_ptr is not None and BM < 0:",
        ("lora+dropout",),
    ),
    "mask dropped from dA": Mutant(
        "outer",
        "if seed_ptr is not None:",
        "if seed_ptr is not None and BM < 0:",
        ("lora+dropout",),
    ),
    "mask of other rows": Mutant(
        "gemm_lowrank",
        "keep_tile(seed_ptr, m, n, N",
        "keep_tile(seed_ptr, m + 1, n, N",
        ("lora+dropout",),
    ),
    "d_in dropped": Mutant(
        "gemm_lowrank",
        "if d_in_ptr is not None:",
        "if d_in_ptr is not None and BM < 0:",
        ("ssb", "ssl"),
    ),
    "d_out dropped": Mutant(
        "gemm_lowrank",
        "if d_out_ptr is not None:",
        "if d_out_ptr is not None and BM < 0:",
        ("ssb", "ia3"),
    ),
    "dA doubled": Mutant(
        "outer",
        "        acc *= scale\n",
        "        acc *= 2 * scale\n",
        ("lora",),
    ),
    "rows lost": Mutant(
        "outer",
        "range(first, last, BM)",
        "range(first, last - BM, BM)",
        ("lora", "ia3"),
    ),
    "a share lost": Mutant(
        "outer",
        "range(0, shares, DEEP)",
        "range(1, shares, DEEP)",
        ("lora",),
    ),
    "dB of one read doubled": Mutant(
        "outer",
        "tl.zeros((BN, BR), ACC), PRECISION) * scale",
        "tl.zeros((BN, BR), ACC), PRECISION) * (2 * scale)",
        ("lora",),
    ),
    "last N block dropped": Mutant("outer", "for n in range(0, N, BN):", "for n in range(0, N - BN, BN):", ("lora",)),
    "slope forgotten in one read": Mutant(
        "outer",
        '    if H != "identity":\n        acc *= slope',
        '    if H == "none":\n        acc *= slope',
        ("parallel_adapter+gelu",),
    ),
    "slope forgotten": Mutant(
        "down",
        'if H != "identity":',
        'if H == "none":',
        ("parallel_adapter+gelu",),
    ),
    "past dropped": Mutant(
        "gemm_lowrank",
        "acc = past + tl.where(",
        "acc = tl.where(",
        ("dora+dropout",),
    ),
    "rest not what is dropped": Mutant(
        "dropout", "tl.store(rest_ptr + element, x - kept", "tl.store(rest_ptr + element, x", ("dora+dropout",)
    ),
    "column sums of dx": Mutant(
        "gemm_lowrank",
        "tl.sum(acc * u, 0)",
        "tl.sum(u, 0)",
        ("ssb",),
    ),
    "factor doubled": Mutant(
        "hadamard",
        "1 + scale * factor",
        "1 + 2 * scale * factor",
        ("liera",),
    ),
    "E without W": Mutant(
        "hadamard",
        "e = (acc * matrix(w_ptr, n, k, N, K, w_n, w_k, BN, BK).to(ACC))",
        "e = (acc)",
        ("liera",),
    ),
    "norm's cross term": Mutant(
        "row_norm",
        "2 * wa",
        "wa",
        ("dora",),
    ),
    "norm's own term": Mutant(
        "row_norm",
        "+ scale * baa",
        "",
        ("dora",),
    ),
}

MODULES = {"gemm_lowrank": "gemm"}


@pytest.mark.parametrize("name", MUTANTS)
def test_kernel_mutant_is_caught(name, monkeypatch, tmp_path):
    mutant = MUTANTS[name]
    fp.set_backend("triton")
    monkeypatch.setattr(k.configs, "INLINE_ROWS", 0)
    one_read = "one read" in name or "N block" in name
    monkeypatch.setattr(k.configs, "one_read", lambda *shape: one_read)
    source = (fp.source_dir("kernels") / f"{mutant.file}.py").read_text()
    assert mutant.before in source
    (tmp_path / "mutant.py").write_text(source.replace(mutant.before, mutant.after))
    spec = importlib.util.spec_from_file_location(f"fused_peft.kernels.mutant_{mutant.file}", tmp_path / "mutant.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(k, MODULES.get(mutant.file, mutant.file), module)
    for case in (c for c in CASES if c.name in mutant.cases):
        assert disagreements(case, build(case, SHAPE), *inputs(SHAPE), TOLERANCE), case.name
