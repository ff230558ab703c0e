"""Rows in groups on the Triton kernels: y and every gradient against the expression a group at a time, in fp64 in the
interpreter, and in the dtypes of training there or on a GPU."""

from dataclasses import replace

import pytest
import torch
from test_kernel_mutations import mutated

import fused_peft as fp
from fused_peft.backends import rates
from fused_peft.backends import triton as backend_file
from fused_peft.core import dispatch, dropout, grouped, records
from fused_peft.core.factors import Factors
from fused_peft.core.groups import Groups, route
from fused_peft.core.operands import TENSORS, Problem, call_of

pytest.importorskip("triton", reason="Triton runs on Linux")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
k = backend_file.kernels()
SEED = torch.tensor([5, -7], dtype=torch.int32, device=DEVICE)
TOLERANCE = {
    torch.float64: 3e-7,
    torch.float32: 3e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}  # of the largest entry
LORA = ("A", "B")
ALL = ("A", "a", "G", "B", "d_in", "d_out", "bias")
EXACT = torch.float32 if DEVICE == "cuda" else torch.float64  # fp64 runs in the interpreter only
SOME = (3, 0, 17, 1)  # rows of each group


@pytest.fixture(autouse=True)
def _forced():
    fp.set_backend("triton")
    fp.set_strict(True)


def sized(*sizes):
    """x in the order of the groups, of so many rows each."""
    return Groups(torch.tensor(sizes, device=DEVICE).cumsum(0).to(torch.int32))


def call(groups, names=LORA, K=21, N=19, r=5, dtype=EXACT, stored="rows", w=True, c=False, wide=None, **options):
    """(x, w, factors, frozen bias, c), all that trains requiring gradients. stored: how w lies."""
    E, k_of = len(groups.offs), 1 if groups.back is None else groups.back.shape[1]
    P = int(groups.offs[-1])
    make = lambda *shape, dtype=dtype: torch.randn(shape, dtype=torch.float64).mul(0.5).to(DEVICE, dtype)  # noqa: E731
    x = make(P // k_of, K).requires_grad_()
    weight = make(N, K).expand(E, N, K) if stored == "shared" else make(E, K, N).mT
    weight = weight.contiguous() if stored == "rows" else weight
    shapes = {"A": (r, K), "a": (r,), "G": (r,), "M": (r, r), "B": (N, r), "d_in": (K,), "d_out": (N,), "bias": (N,)}
    made = {"G" if n == "M" else n: make(E, *shapes[n], dtype=wide or dtype).requires_grad_() for n in names}
    return x, weight if w else None, Factors(**made, **options), make(P, N).requires_grad_() if c else None


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
    dy = torch.randn(int(groups.offs[-1]), (w if w is not None else f.B).shape[1], dtype=dtype).to(DEVICE)
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


# of six groups the third and the last are empty; x is read through an index
ROUTED = route(torch.tensor([[0, 3], [3, 1], [0, 1], [3, 0], [1, 4], [3, 4], [0, 3]], device=DEVICE), 6)[0]
GROUPS = {"uneven": sized(*SOME), "one has all": sized(0, 0, 70, 0), "a row": sized(1), "routed": ROUTED,
          "none": sized(0, 0)}  # fmt: skip


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_lora(groups, p, poison):
    groups = GROUPS[groups]
    assert not faults(*call(groups, p=p, s=1.5), groups)


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (ALL, {"h": "gelu", "p": 0.5, "s": 0.7}),
        (ALL, {"h": "tanh", "scale_bias": True}),
        (("A", "a", "M", "B"), {"h": "silu", "p": 0.2}),
        (("A", "M", "B", "d_in"), {}),
        (("A", "B", "d_out"), {"c": True, "w": False}),
        (("A", "a", "G", "B", "bias"), {"c": True, "w": False, "h": "relu"}),
        (("A", "B"), {"w": False, "p": 0.3}),
        (("d_in", "d_out"), {}),
    ],
    ids=lambda v: "+".join(v),
)
def test_every_form(names, options, poison):
    groups = sized(*SOME) if "c" in options else ROUTED
    assert not faults(*call(groups, names, **options), groups)


@pytest.mark.parametrize("frozen", [(), ("A",), ("B",), ("A", "B"), ("x",), ("x", "a", "B")], ids="+".join)
def test_what_is_frozen_gets_no_gradient(frozen, poison):
    """What trains alone is still right, with what is kept for backward less."""
    x, w, f, _ = call(ROUTED, ("A", "a", "B", "bias"))
    leaves = {"x": x, "A": f.A, "a": f.a, "B": f.B, "bias": f.bias}
    for name in frozen:
        leaves[name].requires_grad_(False)
    grads = []
    for linear in ours, written_out:
        y = linear(x, w, f, ROUTED, None, None)
        grads.append(torch.autograd.grad(y.sin().sum(), [t for t in leaves.values() if t.requires_grad]))
    for got, want in zip(*grads, strict=True):
        assert torch.allclose(got, want, rtol=0, atol=TOLERANCE[EXACT] * want.abs().max().clamp_min(1))


@pytest.mark.parametrize("stored", ["transposed", "shared"])
def test_weights_stored_otherwise(stored, poison):
    assert not faults(*call(ROUTED, stored=stored, p=0.3), ROUTED, torch.randn(6, 19, dtype=EXACT, device=DEVICE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, *[torch.bfloat16] * (DEVICE == "cuda")], ids=str)
@pytest.mark.parametrize("names", [LORA, ALL], ids="+".join)
def test_in_training_dtypes(dtype, names, poison):
    assert not faults(*call(ROUTED, names, K=24, N=40, dtype=dtype, wide=torch.float32, p=0.3), ROUTED)


@pytest.mark.parametrize("r", [1, 17, 130])
def test_any_rank(r, poison):
    groups = sized(2, 5)
    assert not faults(*call(groups, ("A", "a", "G", "B"), r=r, h="gelu"), groups)


def test_many_groups_of_few_rows(poison):
    index = torch.stack([torch.randperm(128)[:2] for _ in range(6)])
    groups = route(index.to(DEVICE), 128)[0]
    assert not faults(*call(groups, K=9, N=7, r=2, p=0.3), groups)


@pytest.mark.parametrize("dtype", [EXACT, torch.float16], ids=str)
def test_several_tiles_and_shares_of_a_group(dtype, poison):
    groups = sized(70, 0, 270, 3)
    assert not faults(*call(groups, K=70, N=140, r=3, dtype=dtype, p=0.3), groups)


@pytest.mark.parametrize("size", [1, 16, 100])
@pytest.mark.parametrize("sizes", [SOME, (0, 0), (0, 16, 32, 0, 1), (5,) * 37, (250, 0)])
def test_the_table_has_every_row_once(sizes, size, poison):
    offs = sized(*sizes).offs
    tiles, ends = k.grouped.Routing(offs, None, sum(sizes)).tiles(size)
    want, start = [], 0
    for e, n in enumerate(sizes):
        want += [[e, start + i, start + min(i + size, n)] for i in range(0, n, size)]
        start += n
    assert tiles.tolist() == want + [[0, 0, 0]] * (len(tiles) - len(want))
    assert ends.tolist() == [sum(e <= upto for e, *_ in want) for upto in range(len(sizes))]


def test_the_mask_is_eagers_to_the_bit():
    groups, p = sized(3, 40, 2), 0.4
    one = torch.eye(32, device=DEVICE).expand(3, 32, 32)
    routing = k.grouped.Routing(groups.offs, None, 45)
    T, _ = k.grouped.project(
        routing, torch.ones(45, 32, device=DEVICE), None, one, None, None, "identity", SEED, dropout.threshold(p), 1.0
    )
    assert torch.equal(T != 0, dropout.keep_mask(SEED, (45, 32), p))
    mask = k.gemm_lowrank.Mask(SEED, dropout.threshold(p), 1.0)
    update = k.gemm_lowrank.Update(torch.ones(45, 1, device=DEVICE), torch.ones(3, 32, 1, device=DEVICE), 1.0, True)
    y = k.grouped.gemm(routing, None, None, None, torch.ones(45, 32, device=DEVICE), 32, update, mask=mask).y
    assert torch.equal(y != 0, dropout.keep_mask(SEED, (45, 32), p))


def test_two_runs_are_the_same_to_the_bit():
    groups = sized(270, 3)
    x, w, f, _ = call(groups, dtype=torch.float32, p=0.3)
    dy = torch.randn(273, 19, device=DEVICE)
    first, again = (found(x, w, f, None, groups, dy, ours) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_operators_take_the_kernels_too():
    """What torch.compile calls: the same results, contiguous and no views."""
    x, w, f, _ = call(ROUTED, p=0.3)
    o = call_of(x, w, f, None, None, SEED, f.p)
    with torch.no_grad():
        y, T, _ = torch.ops.fused_peft.grouped(*o, *ROUTED, False)
    dy = torch.randn_like(y)
    need = [n in ("x", "A", "B") for n in o._fields[:TENSORS]]
    grads = torch.ops.fused_peft.grouped_backward(dy, *o, *ROUTED, T, None, need)
    want = found(x, w, f, None, ROUTED, dy, written_out)
    for got, name in zip([y, *grads], ("y", "x", "A", "B"), strict=True):
        assert torch.allclose(got, want[name], rtol=0, atol=3 * TOLERANCE[EXACT])


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU asserts it, which ends the process's use of it")
def test_a_routing_that_leaves_rows_out_is_refused():
    x, w, f, _ = call(sized(3, 4))
    with pytest.raises(ValueError, match="sends 2 of 7 rows to no expert of 0"):
        ours(x, w, f, Groups(torch.tensor([3, 5], dtype=torch.int32)), None, None)


def test_a_stack_that_has_fewer_parts_is_refused():
    x, w, f, _ = call(sized(3, 4))
    o = call_of(x, w[:1], f, None, None, None, 0.0)
    with pytest.raises(RuntimeError, match="not one part for each of 2 groups"):
        dispatch.backends()["triton"].grouped_forward(o, sized(3, 4), False)


@pytest.mark.parametrize(
    ("changes", "why"), [({"hadamard": True}, "a product of weights"), ({"drop_base": True, "p": 0.1}, "the base term")]
)
def test_what_is_refused_says_why(changes, why):
    found = grouped.problem_of(call_of(*call(ROUTED)[:3], None, None, None, 0.0), ROUTED)
    triton = dispatch.backends()["triton"]
    assert not triton.reasons(found)
    assert any(why in reason for reason in triton.reasons(replace(found, **changes)))
    for name in ("cublas", "cuda", "gluon"):
        assert "its GEMM has no groups of rows; triton's has" in dispatch.backends()[name].reasons(found)


def problem(M=65536, K=2048, N=1536, E=128, dtype=torch.bfloat16, arch=(9, 0), **changes):
    present = frozenset({"x", "w", "A", "B"})
    return Problem("cuda", arch, dtype, torch.float32, M, K, N, 16, present, groups=E, **changes)


@pytest.mark.parametrize(
    ("of", "triton"),
    [
        (problem(), True),  # of Qwen3-30B-A3B: the products are short, and the passes count
        (problem(K=768, N=2048), True),
        (problem(16384, 4096, 28672, 8), False),  # of Mixtral: long products, and PyTorch's are faster
        (problem(64, 2048, 1536, 128), False),  # the host is what it waits for
        (problem(dtype=torch.float16), True),  # PyTorch's are bf16's alone: 128 products one by one
        (problem(arch=(8, 0)), True),
        (problem(16384, 4096, 28672, 8, dtype=torch.float16), False),
    ],
)
def test_the_choice_where_nothing_was_measured(of, triton, monkeypatch):
    assert (rates.grouped_slower(of) is None) == triton
    backend = dispatch.backends()["triton"]
    monkeypatch.setattr(records, "of", lambda p: None)
    assert (backend.slower(of) is None) == triton
    assert "of the time of plain PyTorch's products" in backend.basis(of)


def test_what_was_measured_without_groups_says_nothing_of_groups(record):
    alone = replace(problem(), groups=0)
    record(calls=[{**records.described(alone), "ms": {"triton": 9.0, "eager": 1.0}}], failed={
        records.variant("triton", alone): "y"})  # fmt: skip
    backend = dispatch.backends()["triton"]
    assert "measured" in backend.slower(alone)
    assert backend.slower(problem()) is None
    assert any("self-test failed" in why for why in backend.reasons(alone))
    assert not any("self-test failed" in why for why in backend.reasons(problem()))


# what a kernel's source says, what the mutant says, and the call that must notice
MUTANTS = {
    "another group's weight": ("w_ptr + group * w_e", "w_ptr + (group ^ 1) * w_e"),
    "B of the first group": ("b = b_ptr + group * b_e", "b = b_ptr"),
    "A in another order": ("a_ptr + group * a_e", "a_ptr + (3 - group) * a_e"),
    "x not by the index": ("at = places(rows_ptr, m", "at = places(None, m"),
    "a group's last row lost": ("tl.minimum(first + size, tl.load", "tl.minimum(first + size, -1 + tl.load"),
    "a group dropped": ("if m >= last:", "if m >= last or group == 1:"),
    "a group's sums dropped": ("if first >= last:", "if first >= last or group == 1:"),
    "a tile's sums lost": ("n0, last - first, ACC", "n0, last - first - 1, ACC"),
    "sums of the group before": ("part1_ptr + first.to(tl.int64) * n1", "part1_ptr"),
    "update not scaled": ("PRECISION, ONE, BM, BN, BR) * scale", "PRECISION, ONE, BM, BN, BR)"),
    "mask dropped from dx": ("        if MASK:", "        if MASK and BM < 0:"),
    "mask dropped from T": ("if seed_ptr is not None:", "if seed_ptr is not None and BM < 0:"),
    "mask dropped from dA": ("None, seed_ptr, threshold, scale1", "None, None, threshold, scale1"),
    "mask of other rows": ("keep_tile(seed_ptr, m, k0", "keep_tile(seed_ptr, m + 1, k0"),
    "bias of the first group": ("bias_ptr + group * N", "bias_ptr"),
    "last K block dropped": ("for k0 in range(0, K, BK):", "for k0 in range(0, K - BK, BK):"),
}


def of_mutants():
    """A call in four groups, with more than a block of K, and its faults."""
    groups = route(torch.tensor([[0, 3], [3, 1], [1, 0]], device=DEVICE), 4)[0]
    return faults(*call(groups, K=34, N=9, r=2, p=0.3, s=1.5), groups, torch.randn(4, 9, dtype=EXACT, device=DEVICE))


def test_what_the_mutants_break_is_right(poison):
    assert not of_mutants()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, monkeypatch, tmp_path, poison):
    mutated("grouped", *MUTANTS[name], monkeypatch, tmp_path)
    assert of_mutants()
