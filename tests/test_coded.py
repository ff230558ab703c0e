"""The product that decodes in its loop: against the decoded weight, its mutants, who takes it, and what is kept."""

import sys
import warnings

import pytest
import torch
from cases import CASES
from oracle import layer_results
from test_decode import random, weight
from test_kernel_mutations import mutated
from test_packed import pair, quantised_layer, stored, stored_parts
from torch import nn

import fused_peft as fp
from fused_peft.backends import decode as backend
from fused_peft.core import frozen, ops, records
from fused_peft.tools import calibrate
from fused_peft.tools import stored as judge

pytest.importorskip("triton", reason="Triton runs on Linux")
from fused_peft.backends.kernel_modules import coded

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter; a GPU tests itself")
CPU, HALF = torch.device("cpu"), (torch.float16, torch.bfloat16)
FORMS = ("runs", "nested", "int8", "int8 blocks", "int8 zeros", "fp8 blocks", "fp8 large blocks", "fp8 bf16 scales",
         "int4 zeros", "int4 signed", "mxfp4")  # fmt: skip


def drawn(name, N, K):
    return judge.draw(weight(name, 16, 32).form, N, K, CPU)


def off(w, M, dtype=torch.float16, kernel=None):
    """The relative error of both products of M rows with strides of their own."""
    worst = 0.0
    for back in (False, True):
        torch.manual_seed(M)
        x = torch.randn(M, 2 * w.shape[not back]).to(dtype)[:, ::2]
        got = (kernel or coded.multiplied)(x, back, *w)
        assert got.dtype == dtype
        want = judge._exactly(w, x, back)
        assert got.isnan().equal(want.isnan())
        worst = max(worst, ((got.double() - want).nan_to_num().norm() / want.nan_to_num().norm()).item())
    return worst


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_it_is_the_product_with_the_decoded_weight(name, dtype, poison):
    for M, N, K in ((1, 37, 24), (13, 130, 264), (64, 64, 128), (16, 3, 40)):
        assert off(drawn(name, N, K), M, dtype) < (1e-3 if dtype == torch.float16 else 1e-2)


def test_sums_are_the_same_in_any_number_of_shares(monkeypatch, poison):
    w = drawn("int8", 70, 700)
    for most in (1, 2, 3, 100):
        monkeypatch.setattr(coded, "shares_of", lambda programs, blocks, processors, most=most: min(most, blocks))
        assert off(w, 5) < 1e-3


def test_no_rows_are_no_launch():
    assert coded.multiplied(torch.empty(0, 32).half(), False, *drawn("int8", 16, 32)).shape == (0, 16)


MUTANTS = {
    "a share begins late": ("first = share * steps", "first = share * steps + share"),
    "a share ends early": ("min(first + steps,", "min(first + steps - share,"),
    "shares on top of each other": ("part_ptr + share * M", "part_ptr + 0 * M"),
    "another tile of W": ("step if BACK else at, at if BACK else step", "at if BACK else at, at if BACK else step"),
    "another tile of x": ("step * BK, 0, K, M", "0 * BK, 0, K, M"),
    "another tile of dz": ("0, step * BN, M, N", "0, 0 * BN, M, N"),
    "strides swapped": ("K, M, x_k, x_m", "K, M, x_m, x_k"),
    "a column lost": ("at * BN, 0, N, M, 1, N", "at * BN, 0, N - 1, M, 1, N"),
    "a row lost": ("0, at * BK, M, K, K, 1", "0, at * BK, M - 1, K, K, 1"),
    "N steps for K": ("tl.cdiv(N, BN) if BACK else tl.cdiv(K, BK)", "tl.cdiv(N, BN)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, monkeypatch, tmp_path, poison):
    w, before = drawn("int8", 200, 600), (lambda p: judge.failure(p, CPU))
    p = backend.product_of(w, 5, torch.float16)
    assert off(w, 5) < 1e-3
    assert before(p) is None
    mutated("coded", *MUTANTS[name], monkeypatch, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrong = not off(w, 5, kernel=backend.kernels().coded.multiplied) < 1e-3
        except AssertionError:
            wrong = True
        assert wrong
        assert "is off by" in before(p)  # the self-test refuses it


def test_what_it_raises_is_a_failure(monkeypatch):
    monkeypatch.setattr(coded, "multiplied", lambda *a: 1 / 0)
    p = backend.product_of(drawn("mxfp4", 16, 32), 1, torch.float16)
    assert judge.failure(p, CPU) == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("why", "w", "M", "dtype"),
    [
        ("rows", weight("int8"), 65, torch.float16),
        ("fp32", weight("int8"), 1, torch.float32),
        ("runs that end inside a row", weight("runs", 8, 12), 1, torch.float16),
        ("a row begins inside a byte", weight("mxfp4", 2, 3), 1, torch.float16),
        ("a layout", weight("int8")._replace(codes=random(26, 5, dtype=torch.int8).t()), 1, torch.float16),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_it_does_not_take(why, w, M, dtype):
    assert backend.multiplies(weight("int8"), 64, torch.float16)
    assert not backend.multiplies(w, M, dtype)


# Who takes it


@pytest.fixture
def asked(monkeypatch):
    """The products that the kernel was asked for: (rows, back)."""
    seen, own = [], coded.multiplied
    monkeypatch.setattr(coded, "multiplied", lambda x, back, *w: seen.append((len(x), back)) or own(x, back, *w))
    return seen


def few(kind, config, rows=5, K=24, N=40):
    """(layer on the quantised base, the same on the decoded weight, x, dy), in fp16."""
    layer, reference = pair(kind, config, torch.float16, N=N, K=K)
    torch.manual_seed(2)
    return layer, reference, torch.randn(rows, K).half(), torch.randn(rows, N).half()


def far(got, want):
    """The largest relative distance of two dicts of tensors, and whose."""
    distance = {n: ((got[n] - t).double().norm() / t.double().norm()).item() for n, t in want.items() if t.any()}
    return max(distance.items(), key=lambda item: item[1], default=("", 0.0))[::-1]


@pytest.fixture
def alone(monkeypatch):
    """As without bitsandbytes, and with Triton's kernels asked for."""
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    fp.set_backend("triton")
    yield
    fp.set_backend(None)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_method_computes_beside_the_product(case, asked, alone):
    config = case.make(3)
    layer, reference, x, dy = few("stand-in", config)
    got, want = layer_results(layer, x, dy), layer_results(reference, x, dy)
    assert got.keys() == want.keys()
    assert far(got, want)[0] < 1e-2, far(got, want)
    assert asked[:2] == ([(5, False), (5, True)] if asked else [])
    assert bool(asked) == ("is a call of its own" in fp.explain(nn.Sequential(layer), 5)[0].why)
    # what takes none reads W itself: its norms, its product with factors, or all of it
    assert asked or case.method not in ("lora", "ssl", "ssb", "ia3", "adalora", "bitfit", "flora", "vera")


def test_explain_says_so(alone):
    layer, *_ = few("stand-in", fp.LoraConfig(r=4))
    row = fp.explain(nn.Sequential(layer), 5)[0]
    assert (row.form, row.problem.M, row.problem.present & {"w", "c"}) == ("beside", 5, {"c"})
    assert "the product of few rows is a call of its own, that decodes in its loop; " in row.why
    assert "decoded once each way" in fp.explain(nn.Sequential(layer), ops.FEW + 1)[0].why
    fp.set_backend("cublas")
    assert "of its own, after that; " in fp.explain(nn.Sequential(layer), 5)[0].why
    fp.set_backend(None)
    assert fp.explain(nn.Sequential(layer), 5)[0].form == "factors"  # on a CPU


def test_beyond_few_rows_the_call_is_fused(asked, alone):
    layer, reference, x, dy = few("stand-in", fp.LoraConfig(r=4), rows=ops.FEW + 1)
    assert far(layer_results(layer, x, dy), layer_results(reference, x, dy))[0] < 1e-2
    assert not asked


def test_a_gradient_that_nobody_wants_is_not_computed(asked, alone):
    layer, _, x, _ = few("stand-in", fp.LoraConfig(r=4))
    layer(x).sum().backward()
    assert asked == [(5, False)]
    with torch.no_grad():
        layer(x)
    assert asked == [(5, False)] * 2


def test_the_parts_alone_are_kept(alone):
    """Nothing of W's size, as the fused call keeps nothing of it."""
    layer, _, x, _ = few("stand-in", fp.LoraConfig(r=4), K=64, N=128)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        y = layer(x.requires_grad_())
    own = {t.data_ptr() for t in (*stored_parts(layer), *layer.parameters(), x)}
    beside = [t for at, t in kept.items() if at not in own]
    assert y.requires_grad
    assert sum(t.nbytes for t in beside) <= 5 * 16 * 4  # T of five rows, and what it is padded to


def test_inside_a_compiled_graph(asked, alone):
    layer, _, x, dy = few("stand-in", fp.LoraConfig(r=4))
    want = layer_results(layer, x, dy)
    asked.clear()
    layer.forward = torch.compile(layer.forward, backend="aot_eager", fullgraph=True)
    got = layer_results(layer, x, dy)
    assert asked == [(5, False), (5, True)]
    assert all(torch.equal(got[n], t) for n, t in want.items())


# Which of the two is chosen


def measured(w, **ms):
    p = backend.product_of(w, 1, torch.float16)
    return {**records.described(p), "ms": ms}


@pytest.mark.parametrize(
    ("passed", "ms", "used"),
    [
        (True, {"triton": 1.0, "eager": 2.0}, True),
        (True, {"triton": 2.0, "eager": 1.0}, False),
        (False, {"triton": 1.0, "eager": 2.0}, False),
        (True, None, False),
    ],
)
def test_it_is_used_where_it_was_right_and_faster(passed, ms, used, record, monkeypatch):
    backend._faster.cache_clear()
    w, x = drawn("int8", 16, 32), torch.randn(1, 32).half()
    variant = records.variant("triton", backend.product_of(w, 1, torch.float16))
    record(passed=[variant] * passed, calls=[measured(w, **ms)] if ms else [])
    assert (frozen.in_loop(w, x, False) is not None) == used
    assert frozen.in_loop(drawn("mxfp4", 16, 32), x, False) is None  # another form
    fp.set_backend("eager")
    try:
        assert frozen.in_loop(w, x, False) is None
    finally:
        fp.set_backend(None)
        backend._faster.cache_clear()


def test_calibrate_tests_and_times_it(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    monkeypatch.setenv("FUSED_PEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(records, "_held", {})
    records.forget()
    model = nn.Sequential(quantised_layer("stand-in", K=24, N=40, dtype=torch.float16, compute_dtype=torch.float16))
    model = fp.get_peft_model(model, fp.LoraConfig(r=2, target_modules=["0"]))
    problems = judge.problems(model, None)
    assert [(p.M, p.N, p.K, str(p.stored)) for p in problems] == [
        (M, 40, 24, "4 bits, scales uint8 a 8, nested") for M in judge.ROWS
    ]
    try:
        found = calibrate.calibrate(model, rows=8, seconds=60.0, apart=False)
        calls = [call for call in found.record.calls if call["kind"].startswith("stored in")]
        assert [(call["M"], {*call["ms"]}) for call in calls] == [(M, {"triton", "eager"}) for M in judge.ROWS]
        assert "triton stored in 4 bits, scales uint8 a 8, nested fp16" in found.record.passed
        w = frozen.coded(*(W := stored(quantised_layer("stand-in", K=24, N=40)))[1::-1], whole=False)
        assert w.shape == W.shape
        assert records.nearest(backend.product_of(w, 4, torch.float16))[0]["M"] in judge.ROWS
        assert calibrate.calibrate(model, rows=8, apart=False).record.calls == found.record.calls  # all known now
    finally:
        records.forget()


def test_a_kernel_that_fails_its_test_is_off(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSED_PEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(records, "_held", {})
    monkeypatch.setattr(coded, "multiplied", lambda x, back, *w: x.new_zeros(len(x), w[2][back]))
    records.forget()
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)
    model = nn.Sequential(quantised_layer("stand-in", K=24, N=40, dtype=torch.float16, compute_dtype=torch.float16))
    model = fp.get_peft_model(model, fp.LoraConfig(r=2, target_modules=["0"]))
    try:
        with pytest.warns(UserWarning, match=r"triton stored in 4 bits.* is off on this interpreter: .*is off by"):
            calibrate.calibrate(model, rows=8, seconds=60.0, apart=False)
        p = backend.product_of(stored_weight(model), 1, torch.float16)
        assert records.failed(p, "triton")
        assert calibrate._candidates(p) == ["eager"]
    finally:
        records.forget()


def stored_weight(model):
    W = frozen.now(model[0]).matrix(model[0])
    return frozen.coded(W.spec, W.parts, whole=False)
