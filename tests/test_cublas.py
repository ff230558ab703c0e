"""cuBLAS as the big GEMM: every method against its formula, what is launched, and when it is chosen."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import CASES, SHAPES, WIDE
from oracle import INTERPRETED, build, disagreements, distinct, inputs, layer_results, paper_results

import fused_peft as fp
from fused_peft.backends import rates
from fused_peft.core import dispatch, records
from fused_peft.core.operands import Problem

pytest.importorskip("triton", reason="Triton runs on Linux")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import roofline
from baselines import Shape
from roofline import TIMED, schedule

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="fp64 runs in the interpreter only")


@pytest.fixture
def forced():
    fp.set_backend("cublas")
    fp.set_strict(True)


@interpreted
@pytest.mark.parametrize("shape", [*SHAPES, WIDE], ids=str)
@pytest.mark.parametrize("case", distinct(CASES), ids=lambda c: c.name)
def test_every_method_is_its_formula(case, shape, forced, poison):
    assert not disagreements(case, build(case, shape), *inputs(shape), INTERPRETED)


MUTANTS = {  # a fault in the product that cuBLAS makes, or in what is added to it
    "the update twice": ("addmm_", lambda out: out.mul_(2), "lora"),
    "the product twice": ("mm", lambda out: out.mul_(2), "ssl"),
    "a bias of its own": ("addmm", lambda out: out.add_(1), "lora"),
}


@interpreted
@pytest.mark.parametrize("fault", MUTANTS)
def test_a_wrong_product_is_noticed(fault, forced, monkeypatch):
    name, spoil, method = MUTANTS[fault]
    owner, case = (torch.Tensor if name == "addmm_" else torch), next(c for c in CASES if c.name == method)
    right = getattr(owner, name)
    layer, (x, dy) = build(case, WIDE), inputs(WIDE)
    want = paper_results(case, layer, x, dy)
    monkeypatch.setattr(owner, name, lambda *args, **options: spoil(right(*args, **options)))
    got = layer_results(layer, x, dy)
    assert any(not torch.allclose(got[n], want[n], rtol=0, atol=1e-6) for n in want)


def names(method, M, backward):
    forward, both = (schedule("cublas", method, Shape(M, 4096, 4096, 16), step) for step in (False, True))
    return [x.name for x in (both[len(forward) :] if backward else forward)]


def test_what_is_launched():
    """Products by PyTorch, skinny ones by our kernels, and at most one pass of ours over y, and over dx."""
    assert sorted(names("lora", 8192, False)) == ["_to_copy", "addmm_", "down", "mm"]
    assert sorted(names("lora", 8192, True)) == ["_to_copy", "add_up", "addmm_", "back", "mm", "outer"]
    assert names("lora", 16, False).count("down") == 1  # nothing is made inside a GEMM
    for method in TIMED:
        if method not in ("liera", "svdiff", "bitfit"):
            for backward in (False, True):
                found = names(method, 8192, backward)
                assert found.count("gemm_lowrank") <= 1, (method, found)
                assert "gemm_lowrank_tma" not in found
    assert "gemm_lowrank" in names("lora+dropout", 8192, True)  # the mask
    assert "gemm_lowrank" in names("dora", 8192, False)  # the scale and z


PROBLEM = Problem("cuda", (9, 0), torch.bfloat16, torch.float32, 8192, 4096, 4096, 16, frozenset({"x", "w", "A", "B"}))


@pytest.mark.parametrize(
    ("changes", "fused"),
    [
        ({}, True),  # by TMA, 0.94 of the rate
        ({"arch": (8, 0)}, False),  # 0.85 of the rate costs more than one pass over y
        ({"arch": (8, 0), "K": 256}, True),  # a short product, and the passes count
        ({"M": 16, "K": 256}, False),
        ({"dtype": torch.float32, "K": 64}, False),
        ({"present": frozenset({"x", "W", "A", "B"})}, True),  # no GEMM to choose
        ({"hadamard": True}, True),
    ],
)
def test_the_choice_where_nothing_was_measured(changes, fused):
    problem = PROBLEM.__class__(**{**PROBLEM.__dict__, **changes})
    assert (rates.slower(problem) is None) == fused


@pytest.mark.parametrize(
    ("changes", "eager"),
    [
        ({}, False),
        ({"M": 1024}, True),  # 410 us of host time, where the GPU takes a quarter of it
        ({"M": 1024, "p": 0.1}, True),  # a mask is one launch each way
        ({"M": 4096, "p": 0.1}, False),
        ({"M": 1024, "device": "cpu", "arch": None}, False),
        ({"hadamard": True, "M": 16}, True),
        ({"hadamard": True, "M": 1024}, False),
    ],
)
def test_plain_pytorch_where_the_host_is_what_a_call_waits_for(changes, eager, monkeypatch):
    """Where calls cannot be replayed, so that each launch goes through Python."""
    monkeypatch.setattr(rates, "replayed", lambda: False)
    problem = PROBLEM.__class__(**{**PROBLEM.__dict__, **changes})
    assert (rates.slower_than_eager(problem) is not None) == eager


def test_dispatch_prefers_it_and_says_why(monkeypatch, record):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: (8, 0))
    record()
    assert dispatch.choose(PROBLEM).backend.name == "triton"
    older = replace(PROBLEM, arch=(8, 0))
    choice = dispatch.choose(older)
    assert choice.backend.name == "cublas"
    assert "triton: predicted to take 1.09 times as long" in choice.why()
    assert choice.why().endswith("cublas: predicted, not measured; not self-tested on this GPU")
    fp.set_strict(True)
    assert dispatch.choose(older).backend.name == "cublas"  # no fallback: the kernels around it are ours
    fp.set_strict(False)
    record(calls=[{**records.described(older), "ms": {"triton": 0.9, "cublas": 1.0, "eager": 1.1}}])
    assert dispatch.choose(older).backend.name == "triton"  # what was measured counts more than the model
    record()
    fp.set_backend("triton")
    assert dispatch.choose(older).backend.name == "triton"


# up to how many rows HF PEFT is predicted ahead by more than 3 %
BEHIND_PEFT = {}


@pytest.mark.parametrize("method", TIMED)
def test_what_is_chosen_is_never_predicted_behind(method):
    """By more than 3 % of eager, or of HF PEFT, whose adapters are in bf16 while ours are in fp32, M = 1 to 32768: by
    the GPU's time or the host's, whichever is more."""
    behind = set()
    for M in (1 << n for n in range(16)):
        shape = Shape(M, 4096, 4096, 16)
        who, _ = roofline.chosen(method, shape)
        took = roofline.waited(who, method, shape, slowed=True)
        assert took <= 1.03 * roofline.waited("eager", method, shape), (M, who)
        if roofline.has_peer(method) and took > 1.03 * roofline.waited("peft", method, shape):
            behind.add(M)
    assert max(behind, default=0) == BEHIND_PEFT.get(method, 0)
