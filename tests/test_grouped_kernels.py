"""Rows in groups on the Triton kernels, in the interpreter: y and every gradient against the expression a group at a
time, in fp64 and in the dtypes of training."""

from dataclasses import replace

import pytest
import torch

import fused_peft as fp
from fused_peft.backends import triton as backend_file
from fused_peft.core import dispatch, dropout, grouped
from fused_peft.core.factors import Factors
from fused_peft.core.groups import Groups, route
from fused_peft.core.operands import TENSORS, Operands, call_of

pytest.importorskip("triton", reason="Triton runs on Linux")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="fp64 runs in the interpreter only")
k = backend_file.kernels()
SEED = torch.tensor([5, -7], dtype=torch.int32)
TOLERANCE = {torch.float64: 3e-7, torch.float32: 3e-6, torch.float16: 4e-3}  # of the largest entry
LORA = ("A", "B")
ALL = ("A", "a", "G", "B", "d_in", "d_out", "bias")
SOME = (3, 0, 17, 1)  # rows of each group


@pytest.fixture(autouse=True)
def _forced():
    fp.set_backend("triton")
    fp.set_strict(True)


def sized(*sizes):
    """x in the order of the groups, of so many rows each."""
    return Groups(torch.tensor(sizes).cumsum(0).to(torch.int32))


def call(
    groups, names=LORA, K=21, N=19, r=5, dtype=torch.float64, stored="rows", w=True, c=False, wide=None, **options
):
    """(x, w, factors, frozen bias, c), with all that trains requiring gradients. stored: how the stack of weights is."""
    E, k_of = len(groups.offs), 1 if groups.back is None else groups.back.shape[1]
    P = int(groups.offs[-1])
    make = lambda *shape, dtype=dtype: torch.randn(shape, dtype=torch.float64).mul(0.5).to(dtype)  # noqa: E731
    x = make(P // k_of, K).requires_grad_()
    weight = {
        "rows": lambda: make(E, N, K), "transposed": lambda: make(E, K, N).mT, "shared": lambda: make(N, K).expand(E, N, K),
    }[stored]() if w else None  # fmt: skip
    shapes = {"A": (r, K), "a": (r,), "G": (r,), "M": (r, r), "B": (N, r), "d_in": (K,), "d_out": (N,), "bias": (N,)}
    made = {"G" if n == "M" else n: make(E, *shapes[n], dtype=wide or dtype).requires_grad_() for n in names}
    return x, weight, Factors(**made, **options), make(P, N).requires_grad_() if c else None


def found(x, w, f, c, groups, dy, linear, bias=None):
    leaves = {"x": x, **{n: t for n in ALL if (t := getattr(f, n)) is not None}} | ({} if c is None else {"c": c})
    y = linear(x, w, f, groups, bias, c)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}


def ours(x, w, f, groups, bias, c):
    return grouped.linear(x, w, f, groups, bias, c, seed=SEED)


def written_out(x, w, f, groups, bias, c):
    return grouped.written_out(
        call_of(x, w, f, bias if f.bias is None else f.bias, c, SEED if f.p else None, f.p), groups, f
    )


def faults(x, w, f, c, groups, bias=None):
    """Names of the results that differ from the formula in fp64."""
    torch.manual_seed(1)
    dtype = x.dtype
    dy = torch.randn(int(groups.offs[-1]), (w if w is not None else f.B).shape[1], dtype=dtype)
    got = found(x, w, f, c, groups, dy, ours, bias)
    double = lambda t: None if t is None else t.detach().double().requires_grad_()  # noqa: E731
    f64 = replace(f, **{n: double(t) for n in ALL if (t := getattr(f, n)) is not None})
    b64 = None if bias is None else bias.double()
    want = found(double(x), None if w is None else w.double(), f64, double(c), groups, dy.double(), written_out, b64)
    wrong = []
    for name, right in want.items():
        most = TOLERANCE[dtype] * max(1.0, right.abs().max().item() if right.numel() else 1.0)
        if not torch.allclose(got[name].double(), right, rtol=0, atol=most):
            wrong.append((name, (got[name].double() - right).abs().max().item()))
    return wrong


ROUTED = route(torch.tensor([[0, 3], [3, 1], [0, 1], [3, 0], [1, 4], [3, 4], [0, 3]]), 6)[0]  # group 2 and 5 empty


@pytest.mark.parametrize("groups", [sized(*SOME), sized(0, 0, 70, 0), sized(1), ROUTED, sized(0, 0)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora(groups, p, poison):
    assert not faults(*call(groups, p=p, s=1.5), groups)
