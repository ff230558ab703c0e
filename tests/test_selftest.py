"""The self-test passes what is right and refuses what is wrong, for every kind of call that a method makes."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from cases import CASES, Shape
from oracle import build, distinct

import fused_peft as fp
from fused_peft.backends import triton as backend_file
from fused_peft.core import dispatch, ops, records
from fused_peft.core.operands import Problem
from fused_peft.tools import selftest
from fused_peft.tools.verify import configs

pytest.importorskip("triton", reason="Triton runs on Linux")
from test_kernel_mutations import MUTANTS, TMA_MUTANTS, k, mutated

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
CPU, SHAPE = torch.device("cpu"), Shape((70,), 48, 56, 4)


def called(layer, M: int) -> list[Problem]:
    """The calls of the expression that a layer's forward makes."""
    found = []

    def spy(o):
        found.append(Problem.of(o))
        return dispatch.backends()["eager"]

    with patch.object(ops, "backend_for", spy), patch.object(ops, "is_eager", lambda x: False):
        layer(torch.randn(M, layer.in_features, dtype=layer.weight.dtype))
    return [p for p in found if not p.present <= {"x", "A", "B"} or p.N != p.M]  # less DoRA's norms


def kinds() -> dict[str, Problem]:
    """One problem of every kind."""
    found = {}
    for case in distinct(CASES):
        for p in called(build(case, SHAPE, dtype=torch.float32), 70):
            found.setdefault(records.kind(p), p)
    return found


KINDS = kinds()


def test_every_kind_of_call_is_there():
    assert {"low", "low+dropout", "out", "in", "low+out", "hadamard", "low+dropout+base+out"} <= set(KINDS)
    assert any("gelu" in kind for kind in KINDS)
    assert any("gate" in kind for kind in KINDS)
    assert any("beside" in kind for kind in KINDS)


@pytest.mark.parametrize("name", ["triton", "cublas"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_right_passes(kind, name):
    p = KINDS[kind]
    if dispatch.backends()[name].reasons(p):
        pytest.skip("this backend does not take the call")
    assert selftest.failure(name, p, CPU) is None


def test_a_backend_that_waits_for_its_self_test_runs_on_every_size(monkeypatch):
    """That it was not tested yet is no reason to skip the odd sizes, on which most faults show."""
    kept = backend_file.Triton.reasons
    waits = lambda self, p: kept(self, p) or (["not self-tested"] if dispatch.forced() != "triton" else [])  # noqa: E731
    monkeypatch.setattr(backend_file.Triton, "reasons", waits)
    drawn, draw = [], selftest.draw
    monkeypatch.setattr(selftest, "draw", lambda p, *rest: drawn.append(p) or draw(p, *rest))
    assert selftest.failure("triton", KINDS["low"], CPU) is None
    assert len(drawn) > 1
    assert drawn == selftest.shapes(KINDS["low"], False)


def faults(p: Problem, o, dy):
    """(what, results) of a backend with each fault that the call can have."""
    eager = dispatch.backends()["eager"]
    names = selftest.trained(o)
    right = lambda o=o: {n: 1 * t.contiguous() for n, t in selftest._of_backend(eager, o, dy, names).items()}  # noqa: E731
    for name in right():
        for what, value in (("garbage in one tile", 7.0), ("an element never written", float("nan"))):
            results = right()
            results[name].view(-1)[-16 if value == 7.0 else -1 :] = value
            yield f"{name}: {what}", results
        results = right()
        if results[name].any():
            yield f"{name} doubled", {**results, name: 2 * results[name]}
    if o.w is not None:
        lost = o.x.clone()
        lost[:, -16:] = 0
        yield "a K block is lost", {**right(), "y": right(o._replace(x=lost))["y"]}
    if p.p:
        yield "the mask is ignored", right(o._replace(seed=None, p=0.0))
    if o.A is not None and not p.hadamard and (o.w is not None or o.c is not None):
        yield "the adapter is missing from dx", {**right(), "dx": right(o._replace(B=torch.zeros_like(o.B)))["dx"]}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_wrong_is_refused(kind):
    p, seen = KINDS[kind], 0
    o, dy = selftest.draw(p, CPU)
    eager = dispatch.backends()["eager"]
    assert selftest.disagreement(eager, o, dy) is None
    for what, results in faults(p, o, dy):
        with patch.object(selftest, "_of_backend", lambda *a, r=results: r):
            assert selftest.disagreement(eager, o, dy), what
        seen += 1
    assert seen >= 4


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_kernel_is_refused(name, monkeypatch, tmp_path):
    """The edits of the kernels' sources that the formulas notice, the self-test notices."""
    mutant = MUTANTS[name]
    one_read, M = "one read" in name or "N block" in name, 150 if "share" in name else 70
    mutated(mutant.file, mutant.before, mutant.after, monkeypatch, tmp_path)
    monkeypatch.setattr(k.gemm_lowrank, "INLINE_ROWS", 0)
    monkeypatch.setattr(k.outer, "one_read", lambda *shape: one_read)
    if "share of S" in name:
        monkeypatch.setattr(k.down, "shares_of", lambda *_: 2)
    for case in (c for c in CASES if c.name in mutant.cases):
        for p in called(build(case, SHAPE, dtype=torch.float32), M):
            assert selftest.failure("triton", replace(p, K=96, N=96), CPU), case.name


@pytest.mark.parametrize("name", sorted({mutant.config for mutant in TMA_MUTANTS.values()}))
def test_a_right_tma_kernel_passes(name):
    layer = fp.PeftLinear(136, 72, config=configs()[name], dtype=torch.float16)
    with k.launch.pretend((9, 0)):
        assert [selftest.failure("triton", p, CPU) for p in called(layer, 130)] == [None]


@pytest.mark.parametrize("name", TMA_MUTANTS)
def test_a_wrong_tma_kernel_is_refused(name, monkeypatch, tmp_path):
    mutant = TMA_MUTANTS[name]
    layer = fp.PeftLinear(136, 72, bias="bias" in name, config=configs()[mutant.config], dtype=torch.float16)
    with k.launch.pretend((9, 0)):
        problems = called(layer, 130)
        after = mutant.before.replace(":", " and BM < 0:") if mutant.after is None else mutant.after
        mutated("gemm_lowrank", mutant.before, after, monkeypatch, tmp_path)
        assert all(selftest.failure("triton", p, CPU) for p in problems)


def test_what_a_kernel_raises_is_a_failure(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(backend_file.Triton, "gemm", broken)
    why = selftest.failure("triton", KINDS["low"], CPU)
    assert why.startswith("RuntimeError: no such instruction, on 70 x 48 x 56")

    def full(*args, **options):
        raise torch.OutOfMemoryError("tried to allocate 1 TB")

    monkeypatch.setattr(backend_file.Triton, "gemm", full)
    with pytest.raises(torch.OutOfMemoryError):
        selftest.failure("triton", KINDS["low"], CPU)
