"""The Gluon GEMM: its own source on numpy against fp64, wrong edits of it, when the backend runs. No GPU is needed."""

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import gluon_emulator
import pytest
import torch

import fused_peft as fp
from fused_peft.__main__ import main
from fused_peft.backends import rates
from fused_peft.backends.triton import kernels
from fused_peft.core import dispatch, records
from fused_peft.core.dropout import keep_mask, threshold
from fused_peft.core.operands import Problem
from fused_peft.tools import selftest

pytest.importorskip("triton", reason="Triton runs on Linux")
k = kernels()
SOURCE = (Path(k.gemm_lowrank.__file__).parent / "gemm_gluon.py").read_text()
P, SCALE = 0.3, 1.7
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDE, SMALL = k.configs.Config(128, 256, 64, 4, 4, group=2), k.configs.Config(128, 128, 64, 4, 6, group=2)


class Case(NamedTuple):
    """One GEMM. r = 0: no update; bias: None, "inside" or "outside" d_out's scaling."""

    M: int = 200
    N: int = 264
    K: int = 264
    r: int = 16
    across: bool = False
    masked: bool = False
    bias: str | None = "inside"
    d_out: bool = False
    z: bool = False
    dtype: torch.dtype = BF16
    wide: torch.dtype = FP32  # of the adapter's tensors
    config: object = WIDE
    programs: int = 2


CASES = [
    Case(64, 64, 64, 0, bias=None),
    Case(64, 64, 64, 16, config=SMALL, programs=1),
    Case(128, 256, 256, 64),
    Case(129, 264, 72, 8, programs=3),
    Case(300, 520, 328, 64, d_out=True, z=True),
    Case(300, 520, 328, 0, d_out=True, z=True, bias="outside", config=SMALL),
    Case(d_out=True, bias="outside", dtype=FP16),
    Case(d_out=True, bias="outside", z=True, wide=BF16),
    Case(d_out=True, bias="inside", z=True, r=24),
    Case(d_out=True, bias=None, z=True, r=40, config=SMALL),
    Case(z=True, bias="inside"),
    Case(across=True, masked=True, bias=None),
    Case(across=True, masked=True, bias=None, dtype=FP16, config=SMALL, programs=3),
    Case(across=True, masked=True, bias=None, r=64, d_out=True, wide=BF16),
    Case(300, 520, 328, 33, across=True, masked=True, bias=None),
    Case(across=True, bias=None, r=0),
    Case(across=True, bias=None, r=8, d_out=True),
    Case(masked=True),
    *(Case(130, 136, 136, r, across=across, config=SMALL) for r in (1, 2, 4, 12, 31, 32, 63) for across in (0, 1)),
    *(Case(K=K, programs=1) for K in (64, 128, 320, 640)),  # fewer steps than slots, as many, one more, twice around
]


def loaded(monkeypatch, source=SOURCE, seed=0, case=None):
    """The kernel of this source, in the place of the real one."""
    module = gluon_emulator.load(source, seed)
    monkeypatch.setattr(k, "gemm_gluon", module)
    for kind, form in module.forms.items():
        monkeypatch.setitem(k.configs.CLOSED_FORMS, kind, form)
    if case:
        monkeypatch.setattr(k.configs, "choose", lambda *shape: case.config)
    monkeypatch.setattr(k.launch, "processors", lambda device: case.programs if case else 3)
    return module


def error(module, case: Case, seed: int = 0) -> float:
    """The largest error of y and z, in units of what their dtype cannot tell apart, against fp64."""
    rng = torch.Generator().manual_seed(seed)
    M, N, K, r = case[:4]
    draw = lambda *shape, dtype=case.dtype: torch.randn(*shape, generator=rng).to(dtype)  # noqa: E731
    x, w = draw(M, K), draw(K, N).t() if case.across else draw(N, K)
    bias, d_out = draw(N) if case.bias else None, draw(N, dtype=case.wide) if case.d_out else None
    update = mask = None
    exact = x.double() @ w.double().t()
    if case.masked:
        words = torch.randint(-(1 << 31), 1 << 31, (2,), generator=rng).int()
        mask = k.gemm_lowrank.Mask(words, threshold(P), 1 / (1 - P))
    if r:
        B = draw(r, N, dtype=case.wide).t() if case.across else draw(N, r, dtype=case.wide)
        update = k.gemm_lowrank.Update(draw(M, r), B, SCALE, case.masked)
        low = SCALE * (update.S.double() @ B.to(case.dtype).double().t())
        exact += low * keep_mask(mask.seed, (M, N), P) if case.masked else low
    inside = case.bias != "outside"
    exact_z = exact + bias.double() if bias is not None and inside else exact
    exact_y = exact_z if d_out is None else exact_z * d_out.double()
    if bias is not None and not inside:
        exact_y = exact_y + bias.double()
    got = module.gemm(x, w, (M, N), update, d_out, bias, inside, mask, case.z)
    assert (got.z is not None) == case.z
    pairs = [(got.y, exact_y), *([(got.z, exact_z)] if case.z else [])]
    rounds = torch.finfo(case.dtype).eps / 2
    found = max(((got.double() - want).abs() / want.abs().clamp_min(1e-2)).max().item() for got, want in pairs)
    return found / rounds if found == found else float("inf")


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(str(v).removeprefix("torch.") for v in c[:-2]))
def test_it_is_rounded_once(case, monkeypatch, poison):
    """Whatever the order of events: y and z are what fp64 gives, rounded to their dtype."""
    for seed in range(2):
        assert error(loaded(monkeypatch, seed=seed, case=case), case, seed) <= 1.001


def test_factors_that_tma_cannot_read_are_copied(monkeypatch, poison):
    module = loaded(monkeypatch, case=CASES[1])
    x, w = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    S, B = torch.randn(64 * 8 + 1).bfloat16()[1:].view(64, 8), torch.randn(8, 64).bfloat16().t()
    assert not k.gemm_lowrank._describable(S) + k.gemm_lowrank._describable(B)
    got = module.gemm(x, w, (64, 64), k.gemm_lowrank.Update(S, B, 1.0)).y
    exact = x.double() @ w.double().t() + S.double() @ B.double().t()
    assert torch.allclose(got.double(), exact, rtol=2**-8, atol=1e-4)


FORWARD, DX = Case(300, 520, 328, programs=2), Case(300, 520, 328, across=True, masked=True, bias=None)
SCALED = Case(d_out=True, bias="outside", z=True)
MUTANTS = {  # what the source says, what the mutant says, the case that must notice
    "scale twice": ("acc *= scale", "acc *= scale * scale", FORWARD),
    "update not scaled": ("acc *= scale", "acc *= 1.0", FORWARD),
    "rank step not multiplied": (
        "acc = warpgroup_mma(s, b if TRANSPOSED else b.permute((1, 0)), acc, is_async=True)", "acc = acc", FORWARD
    ),
    "rank step cut short": ("rank_tile(R, 64)", "rank_tile(R // 2, 64)", Case(r=64)),
    "rank slot not freed": (
        "            mbarrier.arrive(free.index(slot), count=1)\n            it += 1", "            it += 1", FORWARD
    ),
    "rank slot freed before its product": (
        "            acc = warpgroup_mma_wait(0, deps=(acc,))\n            mbarrier.arrive(free.index(slot), count=1)",
        "            mbarrier.arrive(free.index(slot), count=1)\n            acc = warpgroup_mma_wait(0, deps=(acc,))",
        FORWARD,
    ),
    "slot freed before its product": (
        "mbarrier.arrive(free.index((it + STAGES - 1) % STAGES), count=1, pred=k > 0)",
        "mbarrier.arrive(free.index(slot), count=1, pred=k + BK < K)", FORWARD,
    ),
    "slot freed at the first step": ("pred=k > 0", "pred=True", FORWARD),
    "last slot not freed": (
        "acc,))\n        mbarrier.arrive(free.index((it + STAGES - 1) % STAGES), count=1)\n", "acc,))\n", FORWARD
    ),
    "two products under way": ("warpgroup_mma_wait(1", "warpgroup_mma_wait(2", FORWARD),
    "product not waited for": (
        "        acc = warpgroup_mma_wait(0, deps=(acc,))\n        mb",
        "        acc = warpgroup_mma_wait(1, deps=(acc,))\n        mb", FORWARD,
    ),
    "phase of the free slots": ("(it // STAGES & 1) ^ 1", "it // STAGES & 1", FORWARD),
    "phase of the full slots": (
        "it // STAGES & 1)\n            x, w", "it // STAGES & 1 ^ 1)\n            x, w", FORWARD
    ),
    "phase never turns": ("(it // STAGES & 1) ^ 1", "1", FORWARD),
    "tile not waited for": ("mbarrier.wait(full.index(slot), it // STAGES & 1)\n            x, w", "x, w", FORWARD),
    "rank tiles not waited for": ("mbarrier.wait(full.index(slot), it // STAGES & 1)\n            s =", "s =", FORWARD),
    "too few bytes expected": (" + b_desc.block_type.nbytes", "", FORWARD),
    "one consumer frees a slot": ("count=CONSUMERS", "count=1", FORWARD),
    "last K step dropped, both sides": ("range(0, K, BK)", "range(0, K - BK, BK)", FORWARD),
    "K step beyond": ("i_n * BN, k, ring", "i_n * BN, k + 1, ring", FORWARD),
    "consumers swap rows": ("i_m * BM + I * ROWS", "i_m * BM + (1 - I) * ROWS", FORWARD),
    "quarters swapped": ("_halves(near)", "_halves(far)", FORWARD),
    "halves of a quarter swapped": ("_emit(b, 1,", "_emit(b, 2,", FORWARD),
    "bias of other columns": ("bias_ptr + col, mask", "bias_ptr + (col - n), mask", FORWARD),
    "bias not masked": ("bias_ptr + col, mask=col < N, other=0.0", "bias_ptr + col", FORWARD),
    "bias always inside": ("if BIAS_INSIDE:", "if True:", SCALED),
    "d_out missing": ("if d_out_ptr is not None:", "if False:", SCALED),
    "z and y swapped": ("_put(z_desc, part", "_put(y_desc, part", SCALED),
    "z and y in one buffer": ("m, n, outs.index(0)", "m, n, outs.index(1)", SCALED),
    "old store not waited for": ("    tma.store_wait(1)\n", "", FORWARD),
    "wait leaves a store too many": ("tma.store_wait(1)", "tma.store_wait(2)", FORWARD),
    "last stores not waited for": ("    tma.store_wait(0)\n", "", FORWARD),
    "no fence before the store": ("    fence_async_shared()\n    store(", "    store(", FORWARD),
    "mask of other columns": ("(n + 2 * gl.arange", "(n + 2 + 2 * gl.arange", DX),
    "mask of other rows": ("(m + gl.arange", "(m + 64 + gl.arange", DX),
    "mask of the other neighbour": ("gl.where(low >=", "gl.where(high >=", DX),
    "mask dropped": ("if MASK:", "if False:", DX),
    "W read across": ("load(b_desc, [k, n]", "load(b_desc, [n, k]", DX),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, monkeypatch, poison):
    before, after, case = MUTANTS[name]
    assert before in SOURCE
    changed, noticed = SOURCE.replace(before, after), False
    for seed in range(4):
        try:
            noticed = error(loaded(monkeypatch, changed, seed, case), case, seed) > 1.001
        except (gluon_emulator.Race, IndexError):
            noticed = True
        if noticed:
            break
    assert noticed


def test_a_kernel_runs_the_same_way_again(monkeypatch):
    """A fault that chance found is found again."""
    before, after, case = MUTANTS["old store not waited for"]
    found = set()
    for _ in range(2):
        with pytest.raises(gluon_emulator.Race) as e:
            error(loaded(monkeypatch, SOURCE.replace(before, after), 3, case), case, 3)
        found.add((str(e.value), len(e.traceback)))
    assert len(found) == 1


PROBLEM = Problem("cuda", (9, 0), BF16, FP32, 8192, 4096, 4096, 16, frozenset({"x", "w", "A", "B"}))
TRAINED = {  # kinds of calls that training makes: what is present besides x and w, and how it is used
    "update": ("A B bias", {}),
    "update with dropout": ("A B", {"p": 0.25}),
    "scaled": ("A B bias d_out", {}),
    "scaled bias": ("bias d_out", {"scale_bias": True}),
    "gate": ("A a G B bias", {"h": "gelu", "G": "vector"}),
}


@pytest.fixture
def runs(monkeypatch):
    """The backend with its kernel emulated, everything else in Triton's interpreter."""
    if torch.cuda.is_available():
        pytest.skip("the emulator takes the interpreter's place")
    monkeypatch.setattr(k.triton_internals, "no_gluon", lambda: None)
    return loaded(monkeypatch)


@pytest.mark.parametrize("kind", TRAINED)
def test_every_kind_of_call_is_its_formula(kind, runs, monkeypatch):  # in fp16: the interpreter cuts bf16 off
    names, options = TRAINED[kind]
    r = 12 if "A" in names.split() else 0
    p = Problem("cpu", None, FP16, FP32, 136, 136, 72, r, frozenset({"x", "w", *names.split()}), **options)
    fp.set_backend("gluon")
    assert not dispatch.backends()["gluon"].reasons(p)
    made, gemm = [], runs.gemm
    monkeypatch.setattr(runs, "gemm", lambda *a, **kw: made.append(1) or gemm(*a, **kw))
    assert selftest.disagreement(dispatch.backends()["gluon"], *selftest.draw(p, torch.device("cpu")), True) is None
    assert len(made) == (1 if "d_out" in names else 2)  # dx of what d_out scales is Triton's, of few rows
    monkeypatch.setattr(rates, "MANY", (0, 0))
    made.clear()
    assert selftest.disagreement(dispatch.backends()["gluon"], *selftest.draw(p, torch.device("cpu")), True) is None
    assert len(made) == 2


def test_scales_on_both_sides(runs, monkeypatch):
    """Of many rows: into W, and the column sums from the stored product."""
    monkeypatch.setattr(rates, "MANY", (0, 0))
    p = Problem("cpu", None, FP16, FP32, 136, 136, 72, 0, frozenset({"x", "w", "d_in", "d_out", "bias"}))
    fp.set_backend("gluon")
    assert not dispatch.backends()["gluon"].reasons(p)
    made, gemm = [], runs.gemm
    monkeypatch.setattr(runs, "gemm", lambda *a, **kw: made.append(1) or gemm(*a, **kw))
    assert selftest.disagreement(dispatch.backends()["gluon"], *selftest.draw(p, torch.device("cpu")), True) is None
    assert len(made) == 2


@pytest.fixture
def hopper(monkeypatch, runs, record):
    """As on an H100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: (9, 0))
    record()
    yield monkeypatch
    dispatch.choose.cache_clear()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": FP32}, "torch.float32 is not bfloat16 or float16"),
        ({"arch": (8, 0)}, "sm_80 is not sm_90"),
        ({"arch": (10, 0)}, "sm_100 is not sm_90"),
        ({"r": 65}, "r=65 is above 64"),
        ({"M": 63}, "63 x 4096 x 4096 is below 64"),
        ({"N": 4100}, "its rows are not whole 16 bytes"),
        ({"K": 4100}, "its rows are not whole 16 bytes"),
        ({"hadamard": True}, "not one GEMM with a frozen weight"),
        ({"drop_base": True}, "not one GEMM with a frozen weight"),
        ({"present": frozenset({"x", "w", "d_in"}), "M": 512}, "a scale on x"),
    ],
)
def test_reasons(hopper, changes, reason):
    fp.set_backend("gluon")
    assert dispatch.choose(PROBLEM).backend.name == "gluon"
    choice = dispatch.choose(replace(PROBLEM, **changes))
    assert choice.backend.name in ("triton", "cublas", "eager")
    assert reason in choice.why()
    fp.set_strict(True)
    with pytest.raises(fp.StrictError, match=re.escape(reason)):
        dispatch.choose(replace(PROBLEM, **changes))


def test_off_until_it_is_tested_and_measured(hopper, record):
    assert "gluon: not self-tested on this GPU" in dispatch.choose(PROBLEM).why()
    passed = [records.variant(name, PROBLEM) for name in ("gluon", "triton", "cublas")]
    record(passed=passed)
    assert "gluon: not measured on this GPU" in dispatch.choose(PROBLEM).why()
    times = {"gluon": 0.9, "triton": 1.2, "cublas": 1.0, "eager": 2.0}
    record(passed=passed, calls=[{**records.described(PROBLEM), "ms": times}])
    assert dispatch.choose(PROBLEM).backend.name == "gluon"
    record(failed={passed[0]: "y is off"}, calls=[{**records.described(PROBLEM), "ms": times}])
    assert "gluon: its self-test failed" in dispatch.choose(PROBLEM).why()


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0"])
def test_off_where_gluon_is_another(version, monkeypatch):
    monkeypatch.setattr(k.triton_internals.triton, "__version__", version)
    assert f"Gluon of Triton 3.6 to 3.9, not of {version}" in k.triton_internals.no_gluon()
    if not torch.cuda.is_available():
        assert dispatch.backends()["gluon"].available() == [k.triton_internals.no_gluon()]


def test_the_kernel_is_not_imported_where_it_cannot_be_had():
    assert (k.gemm_gluon is None) == (k.triton_internals.no_gluon() is not None)


def test_info_says_why_it_is_off(capsys):
    assert main(["info"]) == 0
    (line,) = (n for n in capsys.readouterr().out.splitlines() if n.startswith("backend      gluon"))
    assert "where its self-test passed and it was measured fastest" in line
    if not torch.cuda.is_available():
        assert "Triton's interpreter cannot run Gluon" in line
