"""The Triton backend: every method and every kernel option against fp64, in the interpreter or on a GPU.

The interpreter computes in fp64 as well, so the kernels' algebra is held to the paper's formulas there; scalars reach a
kernel in fp32, which bounds the agreement at 2e-7. Without a GPU bf16 is checked loosely: the interpreter truncates.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, SHAPES, WIDE
from oracle import INTERPRETED, build, disagreements, distinct, inputs

import fused_peft as fp
from fused_peft.backends import triton as backend_file
from fused_peft.core import dispatch, operands, ops, records
from fused_peft.core.factors import Factors
from fused_peft.core.operands import Problem
from fused_peft.tools import verify

pytest.importorskip("triton", reason="Triton runs on Linux")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
interpreted = pytest.mark.skipif(GPU, reason="fp64 runs in the interpreter only")
k = backend_file.kernels()


@pytest.fixture(autouse=True)
def _forced():
    fp.set_backend("triton")
    fp.set_strict(True)


@pytest.fixture(params=["few rows", "many rows"])
def path(request, monkeypatch):
    """Few rows: S inside the GEMM. Many: launches of their own, dT and dB in one read of dy."""
    if request.param == "many rows":
        monkeypatch.setattr(k.gemm_lowrank, "INLINE_ROWS", 0)
        monkeypatch.setattr(k.outer, "one_read", lambda arch, M, N, r, processors: r <= 128)


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_method_is_its_formula(case, shape, poison):
    assert not disagreements(case, build(case, shape), *inputs(shape), INTERPRETED)


@interpreted
@pytest.mark.parametrize("case", distinct(CASES), ids=lambda c: c.name)
def test_several_tiles_and_strided_inputs(case, path, poison):
    layer, (x, dy) = build(case, WIDE), inputs(WIDE)
    assert not disagreements(case, layer, x.t().contiguous().t(), dy.repeat(1, 2)[:, : WIDE.N], INTERPRETED)


FULL = ("A", "a", "G", "B", "d_in", "d_out", "bias")


def _factors(K, N, r, names, dtype=torch.float64, **options):
    shapes = {"A": (r, K), "a": (r,), "G": (r,), "M": (r, r), "B": (N, r), "d_in": (K,), "d_out": (N,), "bias": (N,)}
    made = {"G" if n == "M" else n: torch.randn(shapes[n], dtype=dtype, device=DEVICE) / 4 for n in names}
    return Factors(**{n: t.requires_grad_() for n, t in made.items()}, **options)


def _compare(f, M=9, K=40, N=24, w=True, c=False, tolerance=INTERPRETED):
    """The op against the written-out expression: y and every gradient."""
    dtype = next(t for t in (f.A, f.d_in, f.d_out) if t is not None).dtype
    x, dy = (torch.randn(M, n, dtype=dtype, device=DEVICE) for n in (K, N))
    weight = torch.randn(N, K, dtype=dtype, device=DEVICE) if w else None
    extra = torch.randn(M, N, dtype=dtype, device=DEVICE).requires_grad_() if c else None
    names = [n for n in (*FULL,) if getattr(f, n) is not None]
    leaves = [x.requires_grad_(), *(getattr(f, n) for n in names), *([extra] if c else [])]
    torch.manual_seed(3)
    y = ops.linear(x, weight, f, None, extra)
    torch.manual_seed(3)
    keep = ops.keep_mask(ops.new_seed(x.device), x.shape, f.p) if f.p else None
    want = f.expression(x, weight, None, extra, keep)
    for name, got, right in zip(
        ["y", "x", *names, "c"],
        [y, *torch.autograd.grad(y, leaves, dy)],
        [want, *torch.autograd.grad(want, leaves, dy)],
        strict=False,
    ):
        error = (got - right).norm() / right.norm().clamp_min(1)
        assert error <= tolerance, (name, error.item())


@interpreted
@pytest.mark.parametrize("r", [1, 15, 16, 17, 64, 65, 128, 130, 512])
def test_any_rank(r, path):
    names = ("A", "a", "M", "B") if r in (17, 65, 128) else ("A", "a", "G", "B")
    _compare(_factors(40, 24, r, names, s=1.5, h="gelu", p=0.5))


@interpreted
@pytest.mark.parametrize("shares", [2, 3, 5, 100])
@pytest.mark.parametrize(
    ("r", "names", "options"),
    [
        (3, ("A", "B"), {"p": 0.5, "s": 1.5}),
        (17, ("A", "a", "G", "B", "d_in"), {"h": "gelu"}),
        (16, ("A", "a", "M", "B", "d_out"), {"h": "tanh", "s": 0.5}),
        (130, ("A", "a", "B"), {"h": "silu"}),
    ],
)
def test_k_in_shares(shares, r, names, options, monkeypatch, poison):
    """Whatever is asked for, no share is empty, and two runs are the same to the bit."""
    monkeypatch.setattr(k.gemm_lowrank, "INLINE_ROWS", 0)
    monkeypatch.setattr(k.outer, "one_read", lambda *_: False)
    monkeypatch.setattr(k.down, "shares_of", lambda *_: shares)
    seen, submit = [], k.launch.submit

    def watched(kernel, grid, args, *rest):
        seen.append((kernel.__name__, grid, args))
        submit(kernel, grid, args, *rest)

    monkeypatch.setattr(k.launch, "submit", watched)
    _compare(_factors(333, 201, r, names, **options), M=37, K=333, N=201)
    downs = [(grid[2], args) for name, grid, args in seen if name == "down"]
    assert [name for name, *_ in seen].count("finish") == len(downs) == 2
    assert all(0 <= args["K"] - (n - 1) * args["steps"] * args["BK"] <= args["steps"] * args["BK"] for n, args in downs)
    x, A = torch.randn(37, 333), torch.randn(r, 333)
    first, again = (k.down.project(x, None, A, None, None, "identity", None, 0, 1.0)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_shares_fill_the_processors():
    of = k.down.shares_of
    assert [of(1, 32, 132), of(32, 32, 132), of(66, 32, 132), of(67, 32, 132), of(128, 32, 132)] == [16, 4, 2, 1, 1]
    assert of(1, 1, 132) == of(1, 0, 132) == of(4, 2, 132) == 1


def test_the_slots_of_one_read_are_capped():
    slots = lambda M, N, r: 4 * -(-M // 128) * N * r  # noqa: E731
    read = k.outer.one_read
    assert read((9, 0), 8192, 14336, 16, 132)
    assert slots(8192, 14336, 16) <= k.outer.SLOTS < slots(131072, 14336, 16)
    for M in (6000, 8192, 16384, 131072):
        for N in (1024, 4096, 14336):
            assert not read((9, 0), M, N, 16, 132) or slots(M, N, 16) <= k.outer.SLOTS
    assert not read((9, 0), 131072, 14336, 16, 132)
    assert not read((8, 0), 8192, 4096, 16, 108)
    assert not read((10, 0), 8192, 4096, 16, 148)


@pytest.mark.parametrize(
    ("M", "N", "BN"),
    [
        (1024, 4096, 256),  # 128 large tiles: one wave of 132
        (8192, 4096, 256),
        (1536, 4096, 128),  # two waves of large tiles, three of tiles half as large
        (2048, 1024, 128),  # 64 large tiles are one wave, and so are 128 small ones
        (8448, 4096, 256),
        (200, 14336, 256),
        (1024, 128, 128),
    ],
)
def test_the_tile_is_chosen_by_waves(M, N, BN):
    config = k.gemm_lowrank.config_of_tma((9, 0), 16, M, N, 4096, 16)
    assert (config.BM, config.BN) == (128, BN)
    other = 384 - BN
    waves = lambda BN: -(-(-(-M // 128) * -(-N // BN)) // 132) * BN  # noqa: E731
    assert waves(BN) <= waves(other)
    assert k.gemm_lowrank.config_of_tma((9, 0), 16, M, N, 4096, 64).BN == 128  # a higher rank has no registers for it


@interpreted
@pytest.mark.parametrize(
    ("names", "options", "operands"),
    [
        (("A", "B", "d_in", "d_out", "bias"), {"p": 0.5}, {}),
        (("A", "B", "d_in", "d_out", "bias"), {"scale_bias": True}, {}),
        (("A", "a", "M", "B", "d_in", "d_out", "bias"), {"h": "silu", "s": 0.5}, {}),
        (("A", "B", "d_in", "d_out", "bias"), {"drop_base": True, "p": 0.25}, {}),
        (("A", "B", "d_in", "bias"), {"drop_base": True, "p": 0.25, "h": "relu"}, {}),
        (("A", "a", "B", "bias"), {"h": "tanh"}, {"w": False, "c": True}),
        (("A", "B", "d_out"), {}, {"w": False, "c": True}),
        (("A", "G", "B"), {"p": 0.5}, {"w": False}),
        (("A", "B", "bias"), {"hadamard": True, "s": 2.0}, {}),
    ],
    ids=lambda v: "-".join(map(str, v)) if v else "plain",
)
def test_options_together(names, options, operands, path, poison):
    _compare(_factors(40, 24, 5, names, **options), **operands)


@interpreted
def test_a_weight_that_trains(path):
    linear = torch.nn.Linear(12, 7, dtype=torch.float64)
    f = _factors(12, 7, 3, ("A", "B"), p=0.5)
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    y = ops.linear(x, linear.weight, f, linear.bias)
    torch.manual_seed(1)
    keep = ops.keep_mask(ops.new_seed(x.device), x.shape, 0.5)
    want = f.expression(x, linear.weight, linear.bias, None, keep)
    leaves = [x, linear.weight, linear.bias, f.A, f.B]
    for a, b in zip(torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@interpreted
@pytest.mark.parametrize("config", [fp.LoraConfig(r=3), fp.IA3Config(), fp.LieraConfig(r=3), fp.SSLConfig()])
def test_x_that_does_not_fit_is_refused(config, path):
    layer = fp.PeftLinear(32, 24, config=config)
    for shape in ((5, 40), (100, 40), (100, 16)):
        with pytest.raises(ValueError, match="last dimension must be in_features=32"):
            layer(torch.randn(shape))
    with pytest.raises(TypeError, match=r"x has dtype torch\.float16 but the weight has torch\.float32"):
        layer(torch.randn(5, 32, dtype=torch.float16))


@interpreted
def test_results_may_be_changed_in_place():
    layer = fp.PeftLinear(8, 6, config=fp.LoraConfig(r=2))
    y = layer(torch.randn(2, 3, 8, requires_grad=True))
    y.mul_(2).add_(1)
    y.sum().backward()


@interpreted
@pytest.mark.parametrize("frozen", ["A", "a", "B", "d_in", "d_out", "bias"])
def test_any_gradient_may_be_unwanted(frozen, path):
    f = _factors(40, 24, 5, ("A", "a", "B", "d_in", "d_out", "bias"), h="gelu", p=0.5)
    getattr(f, frozen).requires_grad_(False)
    x, w, dy = (torch.randn(*s, dtype=torch.float64) for s in ((70, 40), (24, 40), (70, 24)))
    leaves = [t for n in FULL if (t := getattr(f, n)) is not None and t.requires_grad]
    got = []
    for backend in ("triton", "eager"):
        fp.set_backend(backend)
        torch.manual_seed(1)
        got.append(torch.autograd.grad(ops.linear(x, w, f), leaves, dy))
    for a, b in zip(*got, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_strides_that_no_tile_takes(dtype):
    layer = fp.PeftLinear(16, 24, config=fp.LoraConfig(r=3, init_lora_weights=False), dtype=dtype)
    narrow, odd = torch.randn(70, 33).to(dtype)[:, :16], torch.randn(16, 70).to(dtype).t()
    for x in (narrow, odd, torch.randn(1, 16).to(dtype).expand(70, 16)):
        for reduce in (lambda y: y.sum(), lambda y: y.sum(0).square().sum()):
            results = []
            for backend in ("triton", "eager"):
                fp.set_backend(backend)
                leaf = x.detach().requires_grad_()
                results.append(torch.autograd.grad(reduce(layer(leaf)), [leaf, *layer.adapter_tensors()]))
            for a, b in zip(*results, strict=True):
                assert (a - b).norm() <= (5e-3 if dtype == torch.float16 else 1e-6) * b.norm()


@interpreted
def test_relu_shows_nan_and_fp16_does_not_overflow_early():
    f = _factors(16, 8, 2, ("A", "B"), torch.float16, h="relu")
    x = torch.full((3, 16), float("nan"), dtype=torch.float16)
    assert ops.linear(x, torch.zeros(8, 16, dtype=torch.float16), f).isnan().all()
    big = Factors(A=torch.full((1, 16), 60.0), B=torch.full((80, 1), 1e-4), s=2.0)
    x, w = torch.full((70, 16), 40.0, dtype=torch.float16), torch.zeros(80, 16, dtype=torch.float16)
    for rows in (3, 70):  # one launch, and two
        y = ops.linear(x[:rows], w, big)
        torch.testing.assert_close(y.float(), torch.full((rows, 80), 7.68), rtol=1e-2, atol=0)


class Wrapped(torch.Tensor):
    pass


def test_tensor_subclasses_are_refused():
    problem = Problem.of(operands.Operands(x=torch.randn(2, 4), w=torch.randn(3, 4).as_subclass(Wrapped)))
    assert problem.subclasses == {"w is a Wrapped"}
    assert (
        "w is a Wrapped: a tensor subclass" in backend_file.Triton().reasons(_problem(subclasses=problem.subclasses))[0]
    )


HALF = [
    "lora",
    "lora+dropout",
    "ssb",
    "dora",
    "ia3 (input)",
    "parallel_adapter",
    "houlsby",
    "flora",
    "liera",
    "adalora",
]
DTYPES = [torch.float16, torch.float32, pytest.param(torch.bfloat16, id="bf16")]


@pytest.mark.parametrize("arch", [(9, 0), (8, 0)], ids=["tma", "pointers"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HALF)
def test_accuracy(name, dtype, arch, monkeypatch):
    if arch == (9, 0) and dtype == torch.float32:
        pytest.skip("fp32 takes the pointer kernel")
    if arch == (9, 0) and GPU and torch.cuda.get_device_capability() != arch:
        pytest.skip("the TMA kernel is sm_90's")
    used = []
    submit = k.launch.submit
    monkeypatch.setattr(k.launch, "submit", lambda kernel, *a: used.append(kernel.__name__) or submit(kernel, *a))
    with k.launch.pretend(arch):
        errors = verify.measure(verify.configs()[name], dtype, DEVICE, shape=(130, 136, 72), draws=1)
    if name not in ("houlsby", "liera"):
        assert ("gemm_lowrank_tma" in used) == (arch == (9, 0))
    loose = 9e-3 if dtype == torch.bfloat16 and not GPU else None
    for tensor, (error, plain) in errors.items():
        row = verify.Row(name, dtype, tensor, error, plain)
        assert error <= (loose or row.limit), row
        assert loose or row.ok or plain < 1e-6, row


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("lora+dropout", "dora+dropout", "ssb", "liera")])
def test_bitwise_repeatable(case):
    layer, (x, dy) = build(case, WIDE, dtype=torch.float32).to(DEVICE), inputs(WIDE, torch.float32)
    x = x.to(DEVICE).requires_grad_()
    runs = []
    for _ in range(2):
        torch.manual_seed(5)
        y = layer(x)
        runs.append([y, *torch.autograd.grad(y, [x, *layer.adapter_tensors()], dy.to(DEVICE))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def launches(config, M, backward=False, K=4096, N=4096):
    """Kernel names of one call in bf16, recorded."""
    layer = fp.PeftLinear(K, N, config=config, device="meta", dtype=torch.bfloat16)
    f = layer.factors()
    x = torch.empty(M, K, device="meta", dtype=torch.bfloat16)
    seed = torch.empty(2, device="meta", dtype=torch.int32) if f.p else None
    o = operands.call_of(x, layer.weight, f, None, None, seed, f.p)
    need = tuple(
        t is not None and n not in ("w", "seed") for n, t in zip(o._fields, o[: operands.TENSORS], strict=False)
    )
    backend = backend_file.Triton()
    with k.launch.record((9, 0)) as first:
        y, T, z = backend.forward(o, o.d_out is not None)
    with k.launch.record((9, 0)) as second:
        backend.backward(torch.empty_like(y), o, T, z, need)
    return [one.kernel.__name__ for one in (second if backward else first)]


def test_tf32_follows_torch():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for allowed in ("tf32", "ieee"):
            matmul.fp32_precision = allowed
            assert k.launch.precision(torch.float32) == allowed
        assert k.launch.precision(torch.float16) == "ieee"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_launches_of_lora(p):
    config = fp.LoraConfig(r=16, lora_dropout=p)
    assert launches(config, 8192) == ["down", "gemm_lowrank_tma"]
    assert launches(config, 16) == ["gemm_lowrank"]
    assert launches(config, 8192, backward=True) == ["back", "gemm_lowrank_tma", "outer", "add_up"]
    assert launches(config, 1024, backward=True) == ["down", "finish", "gemm_lowrank_tma", "outer", "add_up"]
    assert launches(config, 131072, backward=True, N=14336)[0] == "down"
    # one row share: nothing to add up
    assert launches(config, 1, backward=True) == ["down", "finish", "gemm_lowrank", "outer"]


def test_launches_of_scales():
    assert launches(fp.SSBConfig(), 1024, K=1024, N=1024) == ["gemm_lowrank_tma"]
    assert launches(fp.SSBConfig(), 1024, True, 1024, 1024) == ["gemm_lowrank_tma", "outer", "add_up"]


def _problem(**changes):
    values = {"device": "cuda", "arch": (9, 0), "dtype": torch.bfloat16, "adapter_dtype": torch.float32}
    values |= {"M": 8, "K": 64, "N": 64, "r": 8, "present": frozenset({"x", "w", "A", "B"})}
    return Problem(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "mps"}, "x is on mps, the kernels run on cuda; move"),
        ({"arch": (7, 5)}, "sm_75 is older than sm_80"),
        ({"dtype": torch.int8}, "torch.int8 is not float16, bfloat16 or float32"),
        ({"adapter_dtype": torch.int8}, "adapter's torch.int8"),
        ({"r": 600}, "r=600 is above 512"),
        ({"r": 200, "G": "matrix"}, "a matrix between A and B of side 200 is above one tile"),
        ({"hadamard": True, "p": 0.1}, "beside a product of weights"),
        ({"p": 0.1, "M": 1 << 20, "K": 1 << 12}, r"dropout on 1048576 x 4096 elements, above 2\^32"),
        ({"elsewhere": frozenset({"A on cpu", "B on cuda:1"})}, "but A on cpu, B on cuda:1; move them"),
    ],
)
def test_every_refusal_is_named(changes, reason):
    found = backend_file.Triton().reasons(_problem(**changes))
    assert len(found) == 1
    assert re.search(reason, found[0])
    assert not backend_file.Triton().reasons(_problem())


def test_strict_raises_every_reason_at_once():
    with pytest.raises(fp.StrictError, match=r"older than sm_80.*int8 is not float16.*r=600 is above 512"):
        dispatch.choose(_problem(arch=(7, 5), dtype=torch.int8, r=600))


def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch):
    monkeypatch.setattr(k.launch, "interpreting", lambda: False)
    assert "x is on cpu" in backend_file.Triton().reasons(_problem(device="cpu", arch=None))[0]


def test_eager_runs_where_it_was_measured_faster(monkeypatch, record):
    problem = _problem()
    record(calls=[{**records.described(problem), "ms": {"triton": 1.2, "cublas": 1.1, "eager": 1.0}}])
    monkeypatch.setattr(backend_file.Triton, "available", lambda self: [])
    fp.set_backend(None)
    fp.set_strict(False)
    choice = dispatch.choose(problem)
    assert choice.backend.name == "eager"
    after = "times as long as the fastest after it, on 8 x 64 x 64, an H100, 2026-01-01"
    assert choice.why().endswith(f"; triton: measured to take 1.20 {after}; cublas: measured to take 1.10 {after}")
    fp.set_backend("triton")
    assert dispatch.choose(problem).backend.name == "triton"


@interpreted
@pytest.mark.parametrize("config", [fp.LoraConfig(r=3, lora_dropout=0.5), fp.DoraConfig(r=3), fp.LieraConfig(r=3)])
def test_compiles_as_one_graph(config):
    layer = fp.PeftLinear(13, 9, config=config, dtype=torch.float64)
    x = torch.randn(5, 13, dtype=torch.float64, requires_grad=True)
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(2)
        y = call(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.adapter_tensors()])])
    if not getattr(config, "lora_dropout", 0):
        torch.testing.assert_close(*results)
    assert [t.shape for t in results[0]] == [t.shape for t in results[1]]


@interpreted
@pytest.mark.parametrize("hadamard", [False, True])
def test_opcheck(hadamard):
    f = _factors(11, 7, 3, ("A", "B"), torch.float32)
    x, w = torch.randn(4, 11, requires_grad=True), torch.randn(7, 11)
    o = operands.Operands(x, w, A=f.A, B=f.B, s=1.5, hadamard=hadamard)
    torch.library.opcheck(torch.ops.fused_peft.linear.default, (*o, False))


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_graph_capture():
    layer = fp.PeftLinear(256, 128, config=fp.LoraConfig(r=8), device="cuda", dtype=torch.bfloat16)
    x, dy = (torch.randn(64, n, device="cuda", dtype=torch.bfloat16) for n in (256, 128))
    x.requires_grad_()
    step = lambda: torch.autograd.grad(layer(x), [x, *layer.adapter_tensors()], dy)  # noqa: E731
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = [g.clone() for g in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


_WITHOUT = """
import sys
for module in ("triton.language.extra.cuda", "triton.tools.tensor_descriptor", "triton.compiler"):
    if REMOVED:
        __import__(module)
        for name in ("gdc_launch_dependents", "TensorDescriptor", "ASTSource"):
            vars(sys.modules[module]).pop(name, None)
import torch
import fused_peft
from fused_peft.backends.triton import Triton, kernels
from fused_peft.core.operands import Operands
k = kernels()
print(*k.triton_internals.MISSING)
half = lambda *shape: torch.empty(*shape, device="meta", dtype=torch.bfloat16)
with k.launch.record((9, 0)) as found:
    Triton().forward(Operands(x=half(128, 64), w=half(64, 64), A=half(8, 64), B=half(64, 8), s=1.0), False)
print(*(launch.kernel.__name__ for launch in found))
"""
_OLDER = Path(__file__).resolve().parent.parent / ".venv/triton-3.6"


@pytest.mark.parametrize("older", [False, True], ids=["installed", "oldest"])
@pytest.mark.parametrize("removed", [False, True], ids=["whole", "without"])
def test_private_names_of_triton(older, removed):
    """Those we use are there in this Triton and the oldest we take, and what stands in for them runs."""
    if older and not _OLDER.is_dir():
        pytest.skip("make gate installs Triton 3.6")
    env = {**os.environ, **({"PYTHONPATH": f"{_OLDER}:{os.environ.get('PYTHONPATH', '')}"} if older else {})}
    code = _WITHOUT.replace("REMOVED", str(removed))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
    missing, started = (run.stdout + "\n\n").split("\n")[:2]
    assert run.returncode == 0, run.stderr
    names = "triton.language.extra.cuda.gdc_launch_dependents triton.tools.tensor_descriptor.TensorDescriptor"
    assert missing == (f"{names} triton.compiler.ASTSource" if removed else "")
    assert started == ("down gemm_lowrank" if removed else "down gemm_lowrank_tma")
