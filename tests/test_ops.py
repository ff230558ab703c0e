"""The differentiable call itself: every combination of factors, what it saves, and how it behaves as a torch op."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fused_peft as fp
from fused_peft.core import dispatch, eager, operands, ops
from fused_peft.core.dropout import keep_mask, new_seed
from fused_peft.core.factors import ACTIVATIONS, Factors, NotMergeableError

M, K, N, R = 5, 7, 6, 3
FACTOR_SHAPES = {"A": (R, K), "B": (N, R), "a": (R,), "d_in": (K,), "d_out": (N,), "bias": (N,)}
PRODUCTS = torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_


class _Count(TorchDispatchMode):
    """Calls of some operations."""

    def __init__(self, *of):
        super().__init__()
        self.of, self.calls = of, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func.overloadpacket in self.of
        return func(*args, **(kwargs or {}))


def rand(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def make(present, G=None, dtype=torch.float64, **scalars):
    tensors = {name: rand(*FACTOR_SHAPES[name], dtype=dtype) for name in present}
    if G:
        tensors["G"] = rand(*G, dtype=dtype)
    return Factors(**tensors, **scalars), tensors


def results(y, tensors, dy):
    return [y.detach(), *torch.autograd.grad(y, list(tensors), dy)]


COMBINATIONS = [
    pytest.param(present, G, h, p, c, id=f"{'+'.join(present) or 'none'}-G{G}-{h}-p{p}-{c}")
    for present, G, h, p, c in [
        *((("A", "B"), G, h, p, None) for G in (None, (R,), (R, R)) for h in ACTIVATIONS for p in (0.0, 0.3)),
        *((("A", "B", "a", "d_in", "d_out", "bias"), G, h, 0.3, None) for G in (None, (R, R)) for h in ACTIVATIONS),
        *((s, None, "identity", 0.0, None) for s in ((), ("d_in",), ("d_out",), ("d_in", "d_out"), ("bias",))),
        (("d_out", "bias"), None, "identity", 0.0, None),
        (("A", "B", "d_out", "bias"), None, "identity", 0.0, "c"),
        *((s, None, "gelu", 0.0, "c") for s in (("A", "B", "a"), ("A", "B", "a", "bias"), ("A", "B", "d_out"))),
        (("A", "B", "d_in", "d_out", "bias"), (R,), "identity", 0.2, "c"),
        (("A", "B"), (R,), "identity", 0.2, "zero"),
        (("A", "B", "d_out", "bias"), None, "gelu", 0.0, "zero"),
        *(
            (s, None, "identity", 0.3, "drop_base")
            for s in (("A", "B"), ("A", "B", "d_out"), ("A", "B", "d_in", "d_out"))
        ),
    ]
]


@pytest.mark.parametrize(("present", "G", "h", "p", "c"), COMBINATIONS)
@pytest.mark.parametrize("scale_bias", [False, True])
@pytest.mark.parametrize("route", ["eager", "op"])
def test_every_combination_against_the_expression(present, G, h, p, c, scale_bias, route, poison, monkeypatch):
    for name, small in {"BLOCK": 2 * N, "MANY": 1, "TALL": 1, "LONG": 1}.items():  # as large layers do
        monkeypatch.setattr(eager, name, small)
    f, tensors = make(present, G, h=h, p=p, s=1.7, scale_bias=scale_bias, drop_base=c == "drop_base")
    x, w, bias, dy = rand(2, M, K), rand(N, K), rand(N), torch.randn(2, M, N, dtype=torch.float64)
    extra = {"c": {"c": rand(2, M, N)}, "zero": {}}.get(c, {"w": w})
    leaves = [x, *extra.values(), *tensors.values(), *([] if "bias" in present else [bias])]
    if route == "op":
        monkeypatch.setattr(ops, "is_compiling", lambda: True)
    torch.manual_seed(5)
    y = ops.linear(x, extra.get("w"), f, bias, extra.get("c"))
    torch.manual_seed(5)
    keep = keep_mask(new_seed(x.device), x.shape, p) if p else None
    want = f.expression(x, extra.get("w"), bias, extra.get("c"), keep)
    for got, reference in zip(results(y, leaves, dy), results(want, leaves, dy), strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scales_and_sums_of_any_layout(of, dtype, poison, monkeypatch):
    """By batch norm's kernel and block by block: values, gradients and dtypes, rounded as often as is said."""
    for name, small in {"BLOCK": 2 * 70, "MANY": 1}.items():
        monkeypatch.setattr(eager, name, small)
    d, plus = torch.randn(70).to(of), torch.randn(70).to(of)
    eps, half = torch.finfo(dtype).eps, torch.finfo(dtype).bits < 32
    square = torch.randn(37, 37).to(dtype)
    layouts = (
        torch.randn(37, 70).to(dtype),
        torch.randn(37, 70).to(dtype),
        torch.randn(70, 37).to(dtype).t(),
        square[:1].expand(37, -1).repeat(1, 2)[:, :70],
        square[:, :1].expand(-1, 70),
        torch.randn(74, 140).to(dtype)[::2, ::2],
        torch.ones((), dtype=dtype).expand(37, 70),
    )
    assert [eager._batch_norm(t) is not None for t in layouts] == [half, half, *[False] * 5]
    close = torch.testing.assert_close
    summed = {"rtol": 8e-3 if of == torch.bfloat16 else 1e-5, "atol": 1e-5}
    for dy, z in itertools.product(layouts, layouts):
        sums, product = (dy.double() * z.double()).sum(0), dy.double() * d.to(dtype).double()
        for once, in_place in ((True, False), (False, False), (False, True)):
            given = dy.clone() if in_place else dy
            dd, dz = eager._scale_gradients(given, z, d, once, in_place)
            assert (dd.dtype, dz.dtype, dz is given) == (of, dtype, in_place)
            close(dz.double(), dy.double() * d.double() if once else product, rtol=0.51 * eps, atol=1e-7)
            close(dd.double(), sums, **summed)
        total = eager.row_sum(dy, of)
        assert total.dtype == of
        if of != torch.bfloat16 or dtype == torch.bfloat16:  # sum rounds to the narrower first
            close(total.double(), dy.double().sum(0), **summed)
        for add in (None, plus, dy):
            got = eager._scaled(z, d, add)
            assert got.dtype == dtype
            close(got.double(), z.double() * d.double() + (0 if add is None else add.double()), rtol=eps, atol=1e-6)
    none = z[:0]  # batch norm's kernel would end the process
    dd, dz = eager._scale_gradients(none, none, d)
    assert dd.equal(torch.zeros(70, dtype=of))
    assert eager.row_sum(none, of).equal(torch.zeros(70, dtype=of))
    assert dz.shape == eager._scaled(none, d, plus).shape == (0, 70)


def test_gradients_of_scales_over_many_rows():
    """As exact in fp32 as the products summed by PyTorch, which adds pairwise."""
    dy, z, d = torch.randn(20_000, 48), torch.randn(20_000, 48), torch.rand(48)
    want = (dy.double() * z.double()).sum(0)
    plain, ours = ((t.double() - want).norm() for t in ((dy * z).sum(0), eager._scale_gradients(dy, z, d)[0]))
    assert ours <= 1.25 * plain


@pytest.mark.parametrize("layout", ["contiguous", "expanded", "columns", "transposed"])
def test_gradients_of_scales_by_layout(layout):
    """A dy that sum() or cat gives goes block by block: batch norm's kernel is 20 times slower there."""
    dy = {
        "contiguous": torch.ones(512, 256).bfloat16(),
        "expanded": torch.ones(()).bfloat16().expand(512, 256),
        "columns": torch.ones(512, 512).bfloat16()[:, :256],
        "transposed": torch.ones(256, 512).bfloat16().t(),
    }[layout]
    with _Count(torch.ops.aten.native_batch_norm_backward) as count:
        eager._scale_gradients(dy, torch.ones(512, 256).bfloat16(), torch.ones(256))
        eager.row_sum(dy, torch.float32)
    assert count.calls == (2 if layout == "contiguous" else 0)


def test_merged_weight_is_the_forward():
    for G in (None, (R,), (R, R)):
        f, _ = make(("A", "B", "d_in", "d_out"), G, s=0.3)
        x, w = rand(M, K), rand(N, K)
        torch.testing.assert_close(ops.linear(x, w, f), x @ f.merged(w).T, rtol=1e-10, atol=1e-10)
    with pytest.raises(NotMergeableError, match="relu"):
        make(("A", "B"), h="relu")[0].merged(w)
    with pytest.raises(NotMergeableError, match="bias a"):
        make(("A", "B", "a"))[0].merged(w)


@pytest.mark.parametrize(("G", "H"), itertools.product([None, (R,), (R, R)], repeat=2))
def test_sum_of_factors_concatenates_ranks(G, H):
    f, _ = make(("A", "B", "d_in"), G, s=0.3)
    g, _ = make(("A", "B"), H, s=0.3 if G is None else 2.0)
    w = rand(N, K)
    total = f + g
    assert total.rank == 2 * R
    torch.testing.assert_close(total.low_rank(), f.low_rank() + g.low_rank(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((f + Factors(bias=rand(N))).merged(w), f.merged(w))


def test_sum_of_factors_refuses_what_it_cannot_express():
    f, _ = make(("A", "B"))
    with pytest.raises(NotMergeableError):
        f + make(("A", "B"), h="relu")[0]
    with pytest.raises(ValueError, match="dropout"):
        f + make(("A", "B"), p=0.5)[0]
    with pytest.raises(ValueError, match="d_out"):
        make(("d_out",))[0] + make(("A", "B", "d_out"))[0]


@pytest.mark.parametrize(
    ("wanted", "products"),
    [
        # P = dy·B, dy·W, + P·A, dA, dB
        ({"x", "A", "B"}, 5),
        ({"A", "B"}, 3),
        ({"B"}, 1),
        ({"A"}, 2),
        ({"x"}, 3),
    ],
)
def test_nothing_is_computed_that_is_not_wanted(wanted, products):
    f, tensors = make(("A", "B"), s=2.0)
    x, w = rand(M, K), rand(N, K).detach()
    for name, t in {"x": x, **tensors}.items():
        t.requires_grad_(name in wanted)
    with _Count(*PRODUCTS) as forward:
        y = ops.linear(x, w, f)
    assert forward.calls == 3
    with _Count(*PRODUCTS) as backward:
        y.sum().backward()
    assert backward.calls == products
    assert {name for name, t in {"x": x, **tensors}.items() if t.grad is not None} == wanted


def test_inputs_are_not_mutated():
    f, tensors = make(("A", "B", "a", "d_in", "d_out"), (R, R), h="silu", p=0.2)
    everything = [rand(M, K), rand(N, K), rand(N), *tensors.values()]
    before = [t.detach().clone() for t in everything]
    dy = torch.randn(M, N, dtype=torch.float64)
    kept = dy.clone()
    ops.linear(everything[0], everything[1], f, everything[2]).backward(dy)
    assert all(torch.equal(a, b) for a, b in zip(before, everything, strict=True))
    assert torch.equal(dy, kept)
    c = rand(M, N)
    y = ops.linear(everything[0], None, Factors(d_out=tensors["d_out"]), None, c)
    y.data.zero_()
    assert c.abs().min() > 0


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.sum()

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("route", ["eager", "op"])
def test_none_gradient_passes_through(route, monkeypatch):
    f, _ = make(("A", "B"))
    x, w = rand(M, K), rand(N, K)
    if route == "op":
        monkeypatch.setattr(ops, "is_compiling", lambda: True)
    _NoGradient.apply(ops.linear(x, w, f)).backward()
    assert x.grad is None
    assert f.A.grad is None


def test_second_order_is_refused():
    f, tensors = make(("A", "B"))
    x, w = rand(M, K), rand(N, K)
    (dx,) = torch.autograd.grad(ops.linear(x, w, f).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        torch.autograd.grad(dx.sum(), tensors["A"])


def saved_bytes(run, exclude):
    """Bytes of distinct storages kept for backward, less those of ``exclude``."""
    storages = {}
    excluded = {t.untyped_storage().data_ptr() for t in exclude}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    assert y.requires_grad
    return sum(n for ptr, n in storages.items() if ptr not in excluded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("config", "extra"),
    [
        (fp.LoraConfig(r=4), lambda b: 64 * 4 * b),
        (fp.LoraConfig(r=4, lora_dropout=0.1), lambda b: 64 * 4 * b + 8),
        (fp.LoraConfig(r=4, lora_bias=True), lambda b: 64 * 4 * b),
        (fp.SSLConfig(), lambda b: 0),
        (fp.SSBConfig(), lambda b: 64 * 48 * b),
        (fp.IA3Config(), lambda b: 64 * 48 * b),
        (fp.IA3Config(feedforward_modules=".*"), lambda b: 0),
        (fp.BitFitConfig(), lambda b: 0),
    ],
    ids=lambda c: c.describe() or c.peft_type if isinstance(c, fp.methods.PeftConfig) else "",
)
def test_saved_for_backward_is_x_and_exactly_this(config, extra, dtype):
    layer = fp.PeftLinear(32, 48, config=config, dtype=dtype)
    x = torch.randn(64, 32, dtype=dtype, requires_grad=True)
    # lora_bias makes the sum of two biases, which autograd does not keep
    assert saved_bytes(lambda: layer(x), [x, *layer.parameters()]) == extra(x.element_size())


@pytest.mark.parametrize("config", [fp.BitFitConfig(), fp.IA3Config()])
def test_x_is_not_saved_when_no_gradient_reads_it(config):
    layer = fp.PeftLinear(32, 48, config=config)
    x = torch.randn(64, 32, requires_grad=True)
    kept = saved_bytes(lambda: layer(x), layer.parameters())
    assert kept == (0 if isinstance(config, fp.BitFitConfig) else 64 * 48 * 4)


def test_bitwise_equal_from_run_to_run():
    f, tensors = make(("A", "B", "d_in", "d_out"), dtype=torch.float32, p=0.2)
    x, w, dy = rand(33, K, dtype=torch.float32), rand(N, K, dtype=torch.float32), torch.randn(33, N)
    runs = []
    for _ in range(2):
        torch.manual_seed(9)
        runs.append(results(ops.linear(x, w, f), [x, *tensors.values()], dy))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_dropout_mask_survives_activation_checkpointing():
    f, tensors = make(("A", "B"), p=0.5)
    x, w, dy = rand(M, K), rand(N, K), torch.randn(M, N, dtype=torch.float64)
    leaves = [x, *tensors.values()]
    for reentrant in (False, True):
        torch.manual_seed(2)
        plain = results(ops.linear(x, w, f), leaves, dy)
        torch.manual_seed(2)
        y = checkpoint(ops.linear, x, w, f, use_reentrant=reentrant)
        y.backward(dy)
        assert torch.equal(y, plain[0])
        for leaf, want in zip(leaves, plain[1:], strict=True):
            assert torch.equal(leaf.grad, want)
            leaf.grad = None


def test_eval_mode_has_no_dropout():
    f, _ = make(("A", "B"), p=0.5)
    x, w = rand(M, K), rand(N, K)
    assert torch.equal(ops.linear(x, w, f, training=False), ops.linear(x, w, f, training=False))
    assert not torch.equal(ops.linear(x, w, f), ops.linear(x, w, f))


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_fp32_adapter_over_a_half_precision_base(base):
    layer = fp.PeftLinear(64, 48, config=fp.LoraConfig(r=8, init_lora_weights=False), dtype=base)
    x = torch.randn(32, 64, dtype=base, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert layer.lora_A.dtype == layer.lora_A.grad.dtype == torch.float32
    assert y.dtype == x.grad.dtype == base
    assert saved_bytes(lambda: layer(x), [x, *layer.parameters()]) == 32 * 8 * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_its_dtype(dtype):
    layer = fp.PeftLinear(64, 48, config=fp.LoraConfig(r=8, init_lora_weights=False))
    x = torch.randn(32, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == dtype
    assert x.grad.dtype == layer.lora_A.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.05)
    with torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == torch.float32


OPCHECK = [
    (("A", "B"), None, "identity", False),
    (("A", "B", "a", "d_in", "d_out", "bias"), (R, R), "gelu", False),
    (("d_out",), None, "identity", False),
    (("A", "B", "a"), None, "relu", True),
    (("A", "B", "d_out"), (R,), "tanh", True),
]


@pytest.mark.parametrize(("present", "G", "h", "with_c"), OPCHECK)
def test_opcheck(present, G, h, with_c):
    _, t = make(present, G, dtype=torch.float32)
    x = rand(2, M, K, dtype=torch.float32)
    w, c = (None, rand(2, M, N, dtype=torch.float32)) if with_c else (rand(N, K, dtype=torch.float32), None)
    names = ("bias", "d_in", "d_out", "A", "a", "G", "B")
    seed = new_seed(x.device)
    given = {n: t.get(n) for n in names}
    o = operands.Operands(x, w, c, **given, seed=seed, s=1.5, p=0.3, h=h, scale_bias=True)
    torch.library.opcheck(torch.ops.fused_peft.linear.default, (*o, t.get("d_out") is not None))


@pytest.mark.parametrize("trains_B", [True, False])
@pytest.mark.parametrize("adapters", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("present", "G", "h", "with_c"), OPCHECK)
def test_opcheck_of_the_backward(present, G, h, with_c, adapters, trains_B):
    """Every gradient has its tensor's dtype and shape, as the fake ones say to a compiler."""
    _, t = make(present, G, dtype=adapters)
    x, dy = torch.randn(2, M, K), torch.randn(2, M, N)
    w, c = (None, torch.randn(2, M, N)) if with_c else (torch.randn(N, K), None)
    tensors = [t[n].detach() if n in t else None for n in ("bias", "d_in", "d_out", "A", "a", "G", "B")]
    rest = {"s": 1.5, "p": 0.3, "h": h, "scale_bias": True}
    o = operands.Operands(x, w, c, *tensors, new_seed(x.device), **rest)
    _, T, z = eager.Eager().forward(o, "d_out" in present)
    need = [t is not None for t in o[: operands.TENSORS]]
    need[o._fields.index("w")] = need[o._fields.index("seed")] = False
    need[o._fields.index("B")] &= trains_B
    need[o._fields.index("c")] &= "d_out" in present  # otherwise dy itself, which is not asked for
    args = (dy, *o, T, z, need)
    torch.library.opcheck(torch.ops.fused_peft.linear_backward.default, args)


def test_function_transforms():
    layer = fp.PeftLinear(K, N, config=fp.LoraConfig(r=3, init_lora_weights=False), dtype=torch.float64)
    x = torch.randn(M, K, dtype=torch.float64)
    params = {n: getattr(layer, n).detach() for n in layer.tensor_names}

    def loss(params):
        return torch.func.functional_call(layer, params, (x,)).square().sum()

    grads = torch.func.grad(loss)(params)
    loss({n: getattr(layer, n) for n in params}).backward()
    for name, g in grads.items():
        torch.testing.assert_close(g, getattr(layer, name).grad)


def test_misfits_are_named():
    layer = fp.PeftLinear(8, 4, config=fp.LoraConfig(r=2))
    with pytest.raises(ValueError, match=r"\(3, 9\).*in_features=8"):
        layer(torch.randn(3, 9))
    with pytest.raises(ValueError, match="in_features=8"):
        layer(torch.tensor(1.0))
    with pytest.raises(TypeError, match=r"float64.*float32.*cast"):
        layer(torch.randn(3, 8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x is on meta.*cpu"):
        layer(torch.randn(3, 8, device="meta"))
    layer.merge()
    with pytest.raises(ValueError, match="in_features=8"):
        layer(torch.randn(3, 9))


def test_one_call_reaches_the_backend_once():
    calls = []

    class Spy(type(dispatch.backends()["eager"])):
        name = "spy"

        def forward(self, *args):
            calls.append("forward")
            return super().forward(*args)

        def backward(self, *args):
            calls.append("backward")
            return super().backward(*args)

    dispatch.register(Spy(), ("cpu",))
    layer = fp.PeftLinear(8, 4, config=fp.LoraConfig(r=2))
    layer(torch.randn(3, 8)).sum().backward()
    with torch.no_grad():
        layer(torch.randn(3, 8))
    assert calls == ["forward", "backward", "forward"]


@pytest.mark.parametrize("config", [fp.SSBConfig(), fp.SSLConfig(), fp.IA3Config(feedforward_modules=".*")])
def test_a_width_of_one_is_not_broadcast(config):
    with pytest.raises(ValueError, match="in_features=8"):
        fp.PeftLinear(8, 6, config=config)(torch.randn(3, 1))


@pytest.mark.parametrize("config", [fp.LoraConfig(r=2), fp.LieraConfig(r=2)])
def test_backward_inside_autocast(config):
    layer = fp.PeftLinear(8, 6, config=config)
    x = torch.randn(3, 8, requires_grad=True)
    y = layer(x)
    want = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)


def test_only_the_bias_trains_behind_a_nonlinearity():
    f, tensors = make(("A", "B", "bias"), h="relu")
    for name in ("A", "B"):
        tensors[name].requires_grad_(False)
    ops.linear(torch.randn(M, K, dtype=torch.float64), rand(N, K).detach(), f).sum().backward()
    assert tensors["bias"].grad.tolist() == [M] * N


def test_vmap_with_dropout_draws_a_mask_a_sample():
    f, _ = make(("A", "B"), p=0.5)
    x, w = torch.ones(64, 1, K, dtype=torch.float64), rand(N, K).detach()
    y = torch.func.vmap(lambda v: ops.linear(v, w, f), randomness="different")(x)
    assert y.shape == (64, 1, N)
    assert len(y[:, 0].unique(dim=0)) > 32
