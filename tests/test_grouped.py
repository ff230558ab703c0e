"""The call on rows in groups against the expression written out a group at a time, in fp64, and its mutants."""

from dataclasses import replace

import pytest
import torch

import fused_peft as fp
from fused_peft.core import eager, grouped, groups, ops
from fused_peft.core.factors import Factors
from fused_peft.core.groups import Groups, route
from fused_peft.core.operands import call_of

E, K, N, R, M, TOP = 5, 7, 6, 3, 11, 2
SEED = torch.tensor([-5, 77], dtype=torch.int32)


def leaf(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def lora(E=E, dtype=torch.float64, **others):
    return Factors(A=leaf(E, R, K, dtype=dtype), B=leaf(E, N, R, dtype=dtype), s=0.7, **others)


# name -> (factors, whether the layers have a bias that trains)
FORMS = {
    "frozen": lambda: (Factors(), False),
    "lora": lambda: (lora(), False),
    "bias": lambda: (lora(), True),
    "dropout": lambda: (lora(p=0.3), True),
    "gate": lambda: (lora(G=leaf(E, R), p=0.3), False),
    "mixer": lambda: (lora(G=leaf(E, R, R)), False),
    "bottleneck": lambda: (lora(a=leaf(E, R), h="silu"), True),
    "scales": lambda: (Factors(d_in=leaf(E, K), d_out=leaf(E, N)), True),
    "scaled bias": lambda: (Factors(d_out=leaf(E, N), scale_bias=True), True),
    "dora": lambda: (lora(d_out=leaf(E, N), p=0.3, drop_base=True), True),
    "everything": lambda: (lora(G=leaf(E, R, R), a=leaf(E, R), h="gelu", d_in=leaf(E, K), d_out=leaf(E, N)), True),
    "hadamard": lambda: (replace(lora(), hadamard=True), False),
}
# name -> top_k_index (rows, TOP)
ROUTINGS = {
    "mixed": lambda: torch.stack([torch.randperm(E)[:TOP] for _ in range(M)]),
    "an empty group": lambda: torch.randint(0, 2, (M, TOP)) * 3 + 1,
    "the first and last empty": lambda: torch.randint(1, E - 1, (M, TOP)),
    "one takes all": lambda: torch.full((M, TOP), 2),
    "one row": lambda: torch.tensor([[4, 1]]),
    "no row": lambda: torch.empty(0, TOP, dtype=torch.long),
}


def trained(f, *others):
    return [t for t in (f.A, f.B, f.G, f.a, f.d_in, f.d_out, *others) if t is not None]


def both(x, W, f, g, bias=None, c=None):
    """(y, gradients) of the call and of the formula."""
    seed = SEED if f.p else None
    y = grouped.linear(x, W, f, g, bias, c, seed=seed)
    exact = grouped.written_out(call_of(x, W, f, bias, c, seed, f.p), g, f)
    dy, leaves = torch.randn_like(y), trained(f, x, bias, c)
    grads = [torch.autograd.grad(out, leaves, dy, allow_unused=True) for out in (y, exact)]
    return y, exact, *grads


def close(a, b):
    if a is None or b is None:
        return (a is None or not a.any()) and (b is None or not b.any())
    return torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_equal_to_the_formula(form, routing, poison):
    f, with_bias = FORMS[form]()
    g, _ = route(ROUTINGS[routing](), E)
    x, W = leaf(g.back.shape[0], K), torch.randn(E, N, K, dtype=torch.float64)
    y, exact, found, wanted = both(x, W, f, g, leaf(E, N) if with_bias else None)
    assert close(y, exact)
    assert all(map(close, found, wanted))


def transposed():
    return torch.randn(E, K, N, dtype=torch.float64).mT


def shared():
    return torch.randn(N, K, dtype=torch.float64).expand(E, N, K)


def strided():
    return torch.randn(E, N, 2 * K, dtype=torch.float64)[:, :, ::2]


@pytest.mark.parametrize("make", [transposed, shared, strided])
@pytest.mark.parametrize("form", ["bias", "dropout", "dora", "scales"])
def test_weights_in_any_strides(form, make, poison):
    f, _ = FORMS[form]()
    g, _ = route(ROUTINGS["mixed"](), E)
    y, exact, found, wanted = both(leaf(M, K), make(), f, g, leaf(E, N))
    assert close(y, exact)
    assert all(map(close, found, wanted))


@pytest.mark.parametrize("form", ["lora", "dropout", "gate", "scales", "dora"])
def test_beside_a_product_that_is_there_and_in_the_groups_order(form, poison):
    f, _ = FORMS[form]()
    f = replace(f, d_in=None, drop_base=False)
    g = Groups(torch.tensor([2, 2, 7, 8, 11], dtype=torch.int32))
    y, exact, found, wanted = both(leaf(M, K), None, f, g, c=leaf(M, N))
    assert close(y, exact)
    assert all(map(close, found, wanted))


def test_strides_of_x_and_factors_do_not_matter():
    f, (g, _) = lora(), route(ROUTINGS["mixed"](), E)
    x, W = torch.randn(K, M, dtype=torch.float64).t().requires_grad_(), torch.randn(E, N, K, dtype=torch.float64)
    B = leaf(N, R, E)  # as PEFT stores it: experts fastest
    y, exact, found, wanted = both(x, W, replace(f, B=B.permute(2, 0, 1)), g)
    assert close(y, exact)
    assert all(map(close, found, wanted))


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    f, with_bias = FORMS[form]()
    g, _ = route(ROUTINGS["an empty group"](), E)
    bias = leaf(E, N) if with_bias else None
    names = [n for n in ("A", "B", "G", "a", "d_in", "d_out") if getattr(f, n) is not None]

    def call(x, *tensors):
        b, tensors = (tensors[0], tensors[1:]) if with_bias else (None, tensors)
        return grouped.linear(x, W, replace(f, **dict(zip(names, tensors, strict=True))), g, b, seed=SEED)

    W = torch.randn(E, N, K, dtype=torch.float64)
    leaves = [leaf(M, K), *([bias] if with_bias else []), *(getattr(f, n) for n in names)]
    assert torch.autograd.gradcheck(call, leaves)


def test_each_gradient_alone():
    for name in ("x", "A", "B", "bias"):
        f, (g, _) = lora(p=0.3), route(ROUTINGS["mixed"](), E)
        x, bias, W = leaf(M, K), leaf(E, N), torch.randn(E, N, K, dtype=torch.float64)
        tensors = {"x": x, "A": f.A, "B": f.B, "bias": bias}
        for other, t in tensors.items():
            t.requires_grad_(other == name)
        y = grouped.linear(x, W, f, g, bias, seed=SEED)
        exact = grouped.written_out(call_of(x, W, f, bias, None, SEED, f.p), g, f)
        dy = torch.randn_like(y)
        assert close(*(torch.autograd.grad(out, tensors[name], dy)[0] for out in (y, exact)))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-6), (torch.float16, 4e-4), (torch.bfloat16, 3e-3)])
@pytest.mark.parametrize("form", ["lora", "dropout", "scales", "dora"])
def test_accuracy_in_each_dtype(form, dtype, limit):
    """fp32 adapters; gradients come out in fp32."""
    E, K, N, M = 4, 64, 48, 96
    g, _ = route(torch.randint(0, E, (M, TOP)), E)
    round_ = lambda *s: torch.randn(*s).to(dtype)  # noqa: E731
    make = {
        "lora": lambda t: Factors(A=t(E, 8, K), B=t(E, N, 8), s=0.5),
        "dropout": lambda t: Factors(A=t(E, 8, K), B=t(E, N, 8), s=0.5, p=0.25),
        "scales": lambda t: Factors(d_in=t(E, K), d_out=t(E, N)),
        "dora": lambda t: Factors(A=t(E, 8, K), B=t(E, N, 8), d_out=t(E, N), p=0.25, drop_base=True),
    }[form]
    start = 1.0 if form == "scales" else 0.0
    f = make(lambda *s: (start + 0.1 * torch.randn(*s)).to(dtype).float().requires_grad_())
    x, W = round_(M, K).requires_grad_(), round_(E, N, K)
    seed = SEED if f.p else None
    y = grouped.linear(x, W, f, g, seed=seed)
    assert y.dtype == dtype
    wide = f.to(torch.float64)
    x64 = x.detach().double().requires_grad_()
    exact = grouped.written_out(call_of(x64, W.double(), wide, None, None, seed, f.p), g, wide)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, trained(f, x), dy)
    wanted = torch.autograd.grad(exact, trained(wide, x64), dy.double())
    narrow = f.to(dtype)
    plain = grouped.written_out(call_of(x, W, narrow, None, None, seed, f.p), g, narrow)
    usual = torch.autograd.grad(plain, trained(f, x), dy)
    error = lambda a, b: (a.detach().double() - b.detach()).norm() / b.detach().norm()  # noqa: E731
    for a, p, b in ((y, plain, exact), *zip(found, usual, wanted, strict=True)):
        # x's gradient is a sum over experts of what each has rounded
        assert error(a, b) <= max(limit, 1.05 * error(p, b))
    assert all(a.dtype == torch.float32 for a in found[:-1])


def test_autocast_computes_in_its_dtype():
    f, (g, _) = lora(dtype=torch.float32), route(ROUTINGS["mixed"](), E)
    x, W = leaf(M, K, dtype=torch.float32), torch.randn(E, N, K)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped.linear(x, W, f, g)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.sum(), [x, f.A])
    assert all(t.dtype == torch.float32 for t in grads)


def test_nothing_but_x_and_the_narrow_product_is_kept():
    f, (g, _) = lora(p=0.5), route(ROUTINGS["mixed"](), E)
    x, W, kept = leaf(M, K), torch.randn(E, N, K, dtype=torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        grouped.linear(x, W, f, g)
    own = {t.data_ptr() for t in (x, W, f.A, f.B, *g) if t is not None}
    extra = [t for t in kept if t.data_ptr() not in own]
    assert sorted(t.numel() for t in extra) == [2, M * TOP * R]  # a seed, and T


def test_one_op_when_compiled():
    f, (g, _) = lora(p=0.0, dtype=torch.float32), route(ROUTINGS["mixed"](), E)
    x, W, bias = leaf(M, K, dtype=torch.float32), torch.randn(E, N, K), torch.randn(E, N)
    call = lambda x, A, B: grouped.linear(x, W, replace(f, A=A, B=B), g, bias)  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    dy = torch.randn(M * TOP, N)
    found, wanted = (torch.autograd.grad(c(x, f.A, f.B), [x, f.A, f.B], dy) for c in (compiled, call))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("form", ["lora", "scales", "dora"])
def test_the_op_keeps_pytorchs_rules(form):
    f, with_bias = FORMS[form]()
    g, _ = route(ROUTINGS["mixed"](), E)
    x, W = leaf(M, K), torch.randn(E, N, K, dtype=torch.float64)
    o = call_of(x, W, f, leaf(E, N) if with_bias else None, None, SEED if f.p else None, f.p)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.fused_peft.grouped.default, (*o, *g, f.d_out is not None), test_utils=tests)


def test_functional_transforms_see_through_it():
    f, (g, _) = lora(), route(ROUTINGS["mixed"](), E)
    x, W = leaf(M, K), torch.randn(E, N, K, dtype=torch.float64)
    loss = lambda A: grouped.linear(x, W, replace(f, A=A), g).square().sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(f.A.detach()), torch.autograd.grad(loss(f.A), f.A)[0])


def test_bitwise_equal_from_run_to_run():
    f, (g, _) = lora(p=0.3, dtype=torch.float32), route(ROUTINGS["mixed"](), E)
    x, W = leaf(M, K, dtype=torch.float32), torch.randn(E, N, K)

    def run():
        y = grouped.linear(x, W, f, g, seed=SEED)
        return y, *torch.autograd.grad(y.sum(), [x, f.A, f.B])

    assert all(map(torch.equal, run(), run()))


# Bad input: what to break -> (the error, what its message names)
BAD = {
    "x 3-D": (ValueError, "matrix", lambda c: c.update(x=torch.randn(2, M, K))),
    "width of x": (ValueError, "in_features=7", lambda c: c.update(x=torch.randn(M, K + 1))),
    "dtype of x": (TypeError, "float64", lambda c: c.update(x=torch.randn(M, K, dtype=torch.float64))),
    "another count of A": (ValueError, "A has shape", lambda c: c["f"].__setattr__("A", torch.randn(E + 1, R, K))),
    "another count of biases": (ValueError, "bias has shape", lambda c: c.update(bias=torch.randn(E - 1, N))),
    "ranks": (ValueError, "rank 3 and B 4", lambda c: c["f"].__setattr__("B", torch.randn(E, N, R + 1))),
    "rows of c": (ValueError, "c has 3 rows", lambda c: c.update(c=torch.randn(3, N), W=None)),
    "no such expert": (ValueError, "no expert of 0 ... 4", lambda c: c.update(index=torch.full((M, TOP), E))),
    "one sentinel": (ValueError, "1 of 22 rows", lambda c: c["index"].__setitem__((0, 0), E)),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named(what):
    kind, message, spoil = BAD[what]
    c = {"x": torch.randn(M, K), "W": torch.randn(E, N, K), "f": lora(dtype=torch.float32), "bias": None, "c": None}
    c["index"] = ROUTINGS["mixed"]()
    spoil(c)
    g, _ = route(c["index"], E)
    with pytest.raises(kind, match=message):
        grouped.linear(c["x"], c["W"], c["f"], g, c["bias"], c["c"])


def test_weights_that_train_are_refused():
    f, (g, _) = lora(), route(ROUTINGS["mixed"](), E)
    with pytest.raises(RuntimeError, match="stay frozen"):
        grouped.linear(leaf(M, K), leaf(E, N, K), f, g)


def test_a_backend_without_kernels_for_groups_is_passed_over():
    class Other(groups.Eager):
        name = "other"

    fp.core.dispatch.register(Other(), ("cpu",))
    f, (g, _) = lora(), route(ROUTINGS["mixed"](), E)
    x, W = leaf(M, K), torch.randn(E, N, K, dtype=torch.float64)
    problem = grouped.problem_of(call_of(x, W, f, None, None, None, 0.0), g)
    choice = fp.core.dispatch.choose(problem)
    assert choice.backend.name == "eager"
    assert "rows in groups" in choice.why()
    assert (problem.M, problem.K, problem.N, problem.r, problem.groups) == (M * TOP, K, N, R, E)


# Mutants: each must be caught by the comparison with the formula
def _doubled(grads, name):
    i = grouped.Operands._fields.index(name)
    grads[i] = None if grads[i] is None else 2 * grads[i]
    return grads


MUTANTS = {
    "a wrong offset": lambda o, g: (o, g._replace(offs=g.offs + torch.eye(E, dtype=torch.int32)[1])),
    "B's experts in another order": lambda o, g: (o._replace(B=o.B.flip(0)), g),
    "a dropped group": lambda o, g: (o._replace(A=o.A * (torch.arange(E) != 2).view(E, 1, 1)), g),
    "dropout ignored": lambda o, g: (o._replace(seed=None), g),
    "another scale": lambda o, g: (o._replace(s=2 * o.s), g),
    "rows of another token": lambda o, g: (o, g._replace(rows=g.rows.roll(1))),
}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_of_the_operands_are_caught(mutant, direction, monkeypatch):
    true, change = getattr(groups, direction), MUTANTS[mutant]
    if direction == "forward":
        wrong = lambda o, g, keep: true(*change(o, g), keep)  # noqa: E731
    else:
        wrong = lambda dy, o, g, T, z, need: true(dy, *change(o, g), T, z, need)  # noqa: E731
    monkeypatch.setattr(groups.EagerBackend, f"grouped_{direction}", staticmethod(wrong))
    _caught()


@pytest.mark.parametrize("name", ["x", "A", "B", "bias"])
def test_doubled_gradients_are_caught(name, monkeypatch):
    true = groups.backward
    wrong = lambda *args: _doubled(true(*args), name)  # noqa: E731
    monkeypatch.setattr(groups.EagerBackend, "grouped_backward", staticmethod(wrong))
    _caught()


def test_dx_without_the_adapter_is_caught(monkeypatch):
    true = groups.backward

    def wrong(dy, o, g, T, z, need):
        plain = true(dy, o._replace(A=None, B=None, seed=None), g, None, z, (True, *(False,) * (len(need) - 1)))
        return [plain[0], *true(dy, o, g, T, z, need)[1:]]

    monkeypatch.setattr(groups.EagerBackend, "grouped_backward", staticmethod(wrong))
    _caught()


def _caught():
    torch.manual_seed(1)
    f, (g, _) = lora(p=0.3), route(ROUTINGS["mixed"](), E)
    y, exact, found, wanted = both(leaf(M, K), torch.randn(E, N, K, dtype=torch.float64), f, g, leaf(E, N))
    assert not (close(y, exact) and all(map(close, found, wanted)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_half_precision_on_a_cpu_without_instructions_for_it(dtype, p, monkeypatch):
    """There the weight is read column after column for dx, with the same result but for rounding."""
    x, w = torch.randn(40, 72).to(dtype).requires_grad_(), torch.randn(96, 72).to(dtype)
    f = Factors(A=leaf(4, 72, dtype=torch.float32), B=leaf(96, 4, dtype=torch.float32), p=p, drop_base=p > 0)
    g, _ = route(torch.randint(0, E, (40, TOP)), E)
    stacked = Factors(A=leaf(E, 4, 72, dtype=torch.float32), B=leaf(E, 96, 4, dtype=torch.float32), p=p)
    W, reads = torch.randn(E, 96, 72).to(dtype), []
    right = eager.by_columns
    for module in (eager, groups):
        monkeypatch.setattr(module, "by_columns", lambda w: reads.append(right(w)) or reads[-1])
    found = []
    for native in (True, False):
        monkeypatch.setitem(eager.HALF_PRODUCTS, dtype, native)
        calls = (
            ops.linear(x, w, f, seed=SEED if p else None),
            grouped.linear(x, W, stacked, g, seed=SEED if p else None),
        )
        found.append([torch.autograd.grad(y.float().square().sum(), x)[0].float() for y in calls])
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-2 * a.norm()
    half = len(reads) // 2
    assert any(t.stride(-1) == 1 for t in reads[:half])  # W for dx; forward's W^T lies so already
    assert all(t.stride(0) == 1 for t in reads[half:])
