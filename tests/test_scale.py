"""Scales of many rows, which go into W or into a copy of x: the kernel, the calls that take that way, and mutants."""

import pytest
import torch
from test_kernel_mutations import mutated

import fused_peft as fp
from fused_peft.backends import rates
from fused_peft.backends import triton as backend_file
from fused_peft.core import dispatch
from fused_peft.core.operands import Problem
from fused_peft.tools import selftest

pytest.importorskip("triton", reason="Triton runs on Linux")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the self-test says the same of real sizes")
k = backend_file.kernels()
SHAPES = ((1, 1), (33, 300), (16, 256), (257, 8))


def wrong_results(module) -> list[str]:
    """The shapes, orientations and dtypes where t ⊙ d is not what PyTorch makes of it."""
    found = []
    for shape in SHAPES:
        for across in (False, True):
            for dtype in (torch.float16, torch.float32, torch.float64):
                t = torch.randn(shape[::-1] if across else shape, dtype=torch.float64).to(dtype)
                t, d = t.t() if across else t, torch.randn(shape[1], dtype=torch.promote_types(dtype, torch.float32))
                got, want = module.scaled(t, d), (t.to(d.dtype) * d).to(dtype)
                if got.dtype != dtype or (across and 1 not in got.stride()) or not torch.equal(got, want):
                    found.append(f"{shape} {across} {dtype}")
    return found


def test_it_is_the_product_and_lies_as_its_matrix_does(poison):
    assert not wrong_results(k.scale)
    t = torch.randn(5, 40)[:, :33]  # rows apart
    assert torch.equal(k.scale.scaled(t, d := torch.randn(33)), t * d)
    assert k.scale.scaled(torch.empty(0, 7), torch.randn(7)).shape == (0, 7)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("m + tl.arange(0, BM), M)", "n + tl.arange(0, BM), M)"),
        ("n + tl.arange(0, BN), N)", "m + tl.arange(0, BN), N)"),
        ("(x.to(ACC) * d)", "(x.to(ACC))"),
        ("tl.program_id(1) * BN", "tl.program_id(1) * BM"),
        ("if ROWS:", "if not ROWS:"),
    ],
)
def test_a_mutant_is_noticed(before, after, monkeypatch, tmp_path, poison):
    mutated("scale", before, after, monkeypatch, tmp_path)
    assert wrong_results(k.scale)


def test_the_smaller_of_the_two_is_copied():
    d = torch.randn(24)
    x, w = torch.randn(40, 24), torch.randn(16, 24)
    for rows, columns in ((x, w), (x, w.t().contiguous().t())):
        same, scaled = k.scale.absorbed(rows, columns, d)
        assert same is rows
        assert torch.equal(scaled, columns * d)
    scaled, same = k.scale.absorbed(x[:8], w, d)
    assert same is w
    assert torch.equal(scaled, x[:8] * d)
    assert k.scale.absorbed(x, w, None) == (x, w)


KINDS = {
    "ssb": ("d_in d_out bias", {}),
    "ssl": ("d_in", {}),
    "dora": ("A B d_out bias", {}),
    "dropout": ("A B d_in d_out", {"p": 0.3}),
    "gelu": ("A a G B d_in bias", {"h": "gelu", "scale_bias": True}),
}


def disagreement(name: str, kind: str, M: int = 200) -> str | None:
    operands, options = KINDS[kind]
    r = 8 if "A" in operands.split() else 0
    present = frozenset({"x", "w", *operands.split()})
    p = Problem("cpu", None, torch.float16, torch.float32, M, 136, 200, r, present, **options)
    with dispatch.forcing(name):
        backend = dispatch.backends()[name]
        assert not backend.reasons(p)
        return selftest.disagreement(backend, *selftest.draw(p, torch.device("cpu")), bias=True)


@pytest.fixture
def launched(monkeypatch):
    """As of many rows on an H100; the names of what is launched."""
    names, submit = [], k.launch.submit
    monkeypatch.setattr(rates, "MANY", (0, 0))
    monkeypatch.setattr(k.launch, "submit", lambda kernel, *a: names.append(kernel.__name__) or submit(kernel, *a))
    return names


@pytest.mark.parametrize("M", [72, 200])  # fewer than W's rows, and not
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["triton", "cublas"])
def test_every_kind_of_call_is_its_formula(name, kind, M, launched, poison):
    assert disagreement(name, kind, M) is None
    operands = KINDS[kind][0].split()
    assert launched.count("scale") == ("d_in" in operands) + ("d_out" in operands)
    assert launched.count("gemm_lowrank_tma") == (2 if name == "triton" else 0)
    if name == "triton":  # the column sums for d_in, and y of a stored z
        passes = ("d_in" in operands) + ("d_out" in operands and "A" in operands)
        assert launched.count("gemm_lowrank") == passes


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("(x, scaled(w, d)) if lies", "(x, w) if lies"),
        ("return (x, scaled(w, d))", "return (x, scaled(scaled(w, d), d))"),
    ],
)
@pytest.mark.parametrize("name", ["triton", "cublas"])
def test_a_scale_that_is_lost_or_doubled_is_noticed(name, before, after, launched, monkeypatch, tmp_path):
    mutated("scale", before, after, monkeypatch, tmp_path)
    assert disagreement(name, "ssb")


def test_few_rows_keep_the_scale_in_the_gemm(launched, monkeypatch):
    monkeypatch.setattr(rates, "MANY", (1024, 2304))
    assert disagreement("triton", "ssb") is None
    assert "scale" not in launched
    assert rates.many(8192, 1024)
    assert rates.many(1024, 14336)
    assert not rates.many(2048, 2048)
    assert not rates.many(512, 8192)


def test_what_a_layer_launches():
    """Recorded on meta tensors: one pass over W a scale, and the column sums from the stored dx."""
    from test_triton import launches

    assert launches(fp.SSBConfig(), 8192) == ["scale", "gemm_lowrank_tma"]
    assert launches(fp.SSBConfig(), 8192, backward=True) == [
        "scale", "gemm_lowrank_tma", "gemm_lowrank", "outer", "add_up"]  # fmt: skip
    assert launches(fp.SSBConfig(), 256) == ["gemm_lowrank_tma"]
