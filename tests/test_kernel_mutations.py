"""Deliberately wrong kernels: each edit of a kernel's source must be noticed by the formula it breaks."""

import importlib.util
import sys
from typing import NamedTuple

import pytest
import torch
from cases import CASES, WIDE
from oracle import INTERPRETED, build, disagreements, inputs

import fused_peft as fp
from fused_peft.backends import triton as backend_file
from fused_peft.tools import verify

pytest.importorskip("triton", reason="Triton runs on Linux")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="fp64 runs in the interpreter only")
k = backend_file.kernels()


class Mutant(NamedTuple):
    """A kernel file, what its source says, what the mutant says, and the cases that must notice."""

    file: str
    before: str
    after: str
    cases: tuple[str, ...]


MUTANTS = {
    "low-rank phase skipped": Mutant(
        "gemm_lowrank",
        "return dot(s, b.to(s.dtype), acc, PRECISION)",
        "return acc",
        ("lora",),
    ),
    "update not scaled": Mutant(
        "gemm_lowrank",
        "ONE, BM, BN, BR) * scale\n        if MASK",
        "ONE, BM, BN, BR)\n        if MASK",
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
        "min(first + steps * BK, K), BK)",
        "min(first + steps * BK, K) - BK, BK)",
        ("lora",),
    ),
    "last share of S lost": Mutant("down", "first + deep < shares", "first + deep < shares - 1", ("lora",)),
    "scale in a share of S": Mutant("down", "* R, acc, m", "* R, acc * scale, m", ("lora", "dora")),
    "bias in every share of S": Mutant(
        "down",
        "* R, acc, m",
        "* R, acc if bias_ptr is None else acc + vector(bias_ptr, r + tl.arange(0, BR), R).to(ACC)[None, :], m",
        ("parallel_adapter+all",),
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


def mutated(file, before, after, monkeypatch, tmp_path):
    """Put the kernel file in force with one text replaced."""
    source = (fp.source_dir("kernels") / f"{file}.py").read_text()
    assert before in source
    (tmp_path / "mutant.py").write_text(source.replace(before, after))
    spec = importlib.util.spec_from_file_location(f"fused_peft.kernels.mutant_{file}", tmp_path / "mutant.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(k, file, module)


@pytest.mark.parametrize("name", MUTANTS)
def test_kernel_mutant_is_caught(name, monkeypatch, tmp_path):
    mutant = MUTANTS[name]
    fp.set_backend("triton")
    one_read = "one read" in name or "N block" in name
    mutated(mutant.file, mutant.before, mutant.after, monkeypatch, tmp_path)
    monkeypatch.setattr(k.gemm_lowrank, "INLINE_ROWS", 0)
    monkeypatch.setattr(k.outer, "one_read", lambda *shape: one_read)
    if "share of S" in name:
        monkeypatch.setattr(k.down, "shares_of", lambda *_: 2)
    for case in (c for c in CASES if c.name in mutant.cases):
        assert disagreements(case, build(case, WIDE), *inputs(WIDE), INTERPRETED), case.name


class TmaMutant(NamedTuple):
    config: str  # verify's name
    before: str
    after: str | None = None  # None: the branch that ``before`` opens is never taken


# of the TMA kernel, which takes 16-bit operands
TMA_MUTANTS = {
    "last K block dropped": TmaMutant("ssb", "range(tl.cdiv(K, BK))", "range(tl.cdiv(K, BK) - 1)"),
    "late phase skipped": TmaMutant("lora", "if b_ptr is not None and LATE:"),
    "late scale dropped": TmaMutant("lora", "b.to(acc.dtype) * scale", "b.to(acc.dtype)"),
    "late scale doubled": TmaMutant("lora", "b.to(acc.dtype) * scale", "b.to(acc.dtype) * (2 * scale)"),
    "mask dropped": TmaMutant("lora+dropout", "            if MASK:"),
    "early scale dropped": TmaMutant("lora+dropout", "ONE, BM, BN, BR) * scale", "ONE, BM, BN, BR)"),
    "d_in dropped": TmaMutant("ssb", "            if d_in_ptr is not None:"),
    "d_out dropped": TmaMutant("ia3", "            if d_out_ptr is not None:"),
    "bias dropped": TmaMutant("lora", "            if BIAS_INSIDE:"),
    "outer bias dropped": TmaMutant("ssb", "                if not BIAS_INSIDE:"),
    "z not written": TmaMutant("dora", "            z_desc.store([m, n], acc.to(DTYPE))", "            pass"),
    "column sums of x": TmaMutant("ssb", "tl.sum(acc * u, 0)", "tl.sum(u, 0)"),
}


def tma_faults(config):
    """Results of a layer through the TMA kernel that are above their limit, in fp16."""
    fp.set_backend("triton")
    with k.launch.pretend((9, 0)):
        errors = verify.measure(verify.configs()[config], torch.float16, shape=(130, 136, 72), draws=1)
    rows = [verify.Row(config, torch.float16, tensor, *pair) for tensor, pair in errors.items()]
    return [row for row in rows if not row.error <= row.limit]


@pytest.mark.parametrize("name", TMA_MUTANTS)
def test_tma_mutant_is_caught(name, monkeypatch, tmp_path, poison):
    mutant = TMA_MUTANTS[name]
    assert not tma_faults(mutant.config)
    after = mutant.before.replace(":", " and BM < 0:") if mutant.after is None else mutant.after
    mutated("gemm_lowrank", mutant.before, after, monkeypatch, tmp_path)
    assert tma_faults(mutant.config)
