"""Layers that other libraries quantised, in the fused call: W decoded each way, the parts alone kept.

A stand-in of Linear4bit, known by its names as the real one is, carries the tests where bitsandbytes is not installed.
torchao, apart from the environment since PEFT and Transformers change where they find it, gets a process of its own.
"""

import copy
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import CASES, SMALL
from oracle import inputs, layer_results
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_peft as fp
from fused_peft.core import dropout, frozen, ops
from fused_peft.core.eager import Eager
from fused_peft.core.factors import Factors
from fused_peft.integrations import quantised
from fused_peft.methods import METHODS

BITS = ["nf4", "nf4+nested", "fp4", "fp4+nested", "nf4+nested/128", "int8"]  # bitsandbytes'
FORMATS = ["stand-in", *BITS, "fp8 4 5", "fp8"]  # the latter Transformers', with a scale for 4 x 5 values or for all
FEW = ["stand-in", "nf4+nested", "int8", "fp8 4 5"]
TORCHAO = ["torchao int8", "torchao int8 one", "torchao float8", "torchao int4"]
if os.environ.get("OF_TORCHAO"):
    FORMATS, FEW = TORCHAO, [TORCHAO[0], TORCHAO[-1]]
SITE = Path(__file__).resolve().parent.parent / ".venv/torchao"  # apart from the environment, as set-up puts it
UNTYPED = ["int8", *TORCHAO]  # whose layers name no dtype that they compute in, or none wider than fp32
BLOCK, BLOCK2 = 8, 4  # of the stand-in


class Linear4bit(nn.Linear):
    """What the reader reads of bitsandbytes', with a nested absmax."""

    def __init__(self, K, N, bias=True, compute_dtype=None):
        super().__init__(K, N, bias)
        random = torch.Generator().manual_seed(1)
        blocks = -(-N * K // BLOCK)
        codes = torch.randint(256, ((N * K + 1) // 2, 1), generator=random, dtype=torch.uint8)
        nested = SimpleNamespace(
            code=torch.rand(256, generator=random) - 0.5,
            absmax=torch.rand(-(-blocks // BLOCK2), generator=random) * 0.1,
            blocksize=BLOCK2,
        )
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.quant_state = SimpleNamespace(
            quant_type="nf4", blocksize=BLOCK, dtype=torch.float32, code=torch.randn(16, generator=random),
            absmax=torch.randint(256, (blocks,), generator=random, dtype=torch.uint8), state2=nested,
            offset=torch.tensor(0.3),
        )  # fmt: skip
        self.compute_dtype = compute_dtype

    def forward(self, x):
        raise AssertionError("the fused call computes this")


Linear4bit.__module__ = "bitsandbytes.nn.modules"


@pytest.fixture
def alone(monkeypatch):
    """Without bitsandbytes' own kernels."""
    monkeypatch.delitem(sys.modules, "bitsandbytes", raising=False)


def quantised_layer(kind, N=SMALL.N, K=SMALL.K, bias=True, dtype=torch.float32, compute_dtype=None):
    """A frozen layer of that format; its bias in dtype."""
    torch.manual_seed(0)
    if kind == "stand-in":
        layer = Linear4bit(K, N, bias, compute_dtype)
    elif kind in TORCHAO:
        layer = of_torchao(
            kind.split()[1:], nn.Linear(K, N, bias, dtype=min(dtype, torch.float32, key=lambda d: d.itemsize))
        )
    elif kind.startswith("fp8"):
        layer = fp8_layer(K, N, bias, [int(n) for n in kind.split()[1:]])
    else:
        bnb = pytest.importorskip("bitsandbytes")
        W = torch.randn(N, K) * 0.3
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(K, N, bias, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(W, requires_grad=False, has_fp16_weights=False)
        else:
            quant, _, block = kind.partition("/")
            quant, _, nested = quant.partition("+")
            options = {"quant_type": quant, "compress_statistics": bool(nested)}
            layer = bnb.nn.Linear4bit(K, N, bias, compute_dtype, **options)
            own = {"blocksize": int(block or 64), "module": layer, **options}
            layer.weight = bnb.nn.Params4bit(W, requires_grad=False, **own)
        layer = layer.to("cpu")
    if bias:
        layer.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return layer


def fp8_layer(K, N, bias, block):
    """Transformers' FP8Linear on a quantised random weight, frozen as models are loaded."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    layer = fp8.FP8Linear(K, N, block_size=tuple(block) or None, has_bias=bias)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(N, K))
        layer.weight_scale_inv.copy_(torch.rand(layer.weight_scale_inv.shape) * 0.3 + 0.1)
        if bias:
            layer.bias.copy_(torch.randn(N))
    return layer.requires_grad_(False)


def of_torchao(kind, linear):
    """A linear layer whose weight torchao quantises."""
    ao = pytest.importorskip("torchao.quantization")
    K, (name, *one) = linear.in_features, kind
    config = {
        "int8": lambda: ao.Int8WeightOnlyConfig(granularity=ao.PerTensor() if one else ao.PerRow()),
        "float8": ao.Float8WeightOnlyConfig,
        "int4": lambda: ao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=ao.PerGroup(K // 2 if K % 2 == 0 else K)
        ),
    }[name]()
    ao.quantize_(linear, config)
    return linear.requires_grad_(False)


def stored(layer):
    return frozen.kind_of(layer).matrix(layer)


def stored_parts(layer):
    """What a layer keeps of its weight, adapted or not."""
    return frozen.now(layer).matrix(layer).parts


def dense(layer, dtype):
    """The nn.Linear on the decoded weight."""
    W = stored(layer)
    plain = nn.Linear(*W.shape[::-1], bias=layer.bias is not None, dtype=dtype)
    with torch.no_grad():
        plain.weight.copy_(frozen.decode(W.spec, W.parts, dtype))
        if layer.bias is not None:
            plain.bias.copy_(layer.bias)
    return plain


def adapted(linear, config, like=None):
    torch.manual_seed(3)
    layer = fp.PeftLinear.from_linear(linear, config)
    with torch.no_grad():
        torch.manual_seed(4)
        for name in layer.tensor_names:
            own = getattr(layer, name)
            own.add_(0.3 * torch.randn(own.shape).to(own.dtype)) if like is None else own.copy_(getattr(like, name))
    return layer


def pair(kind, config, dtype=torch.float64, **options):
    """(layer on the quantised base, the same on the decoded weight)."""
    base = quantised_layer(kind, dtype=dtype, compute_dtype=dtype, **options)
    reference = adapted(dense(base, dtype), config)
    layer = adapted(base, config, like=reference)
    for name in layer.buffer_names:  # what starts from the weight does so in the dtype that this is read in
        assert getattr(layer, name).shape == getattr(reference, name).shape
        setattr(layer, name, getattr(reference, name).clone())
    for name in layer.tensor_names:
        own = getattr(layer, name)
        own.data = getattr(reference, name).detach().clone()
    return layer, reference


def equal(got, want, within=0):
    """Bit for bit, or within a relative error in norm."""
    assert got.keys() == want.keys()
    for name, t in want.items():
        same = got[name] is t is None or torch.equal(got[name], t)
        assert same or (got[name] - t).float().norm() <= within * t.float().norm(), name


def read_wide(kind, case, dtype):
    """The error allowed where a method computes from W's values, which are fp32's where the layer names no dtype."""
    method = METHODS[case.method]
    reads = method.needs_weight or method.reads_weight or method.weight
    return {torch.float64: 1e-6, torch.bfloat16: 1e-2}.get(dtype, 0) if kind in UNTYPED and reads else 0


def step(call, x, dy, tensors):
    """y and the gradients of x and of these tensors."""
    torch.manual_seed(7)
    leaf = x.detach().requires_grad_()
    y = call(leaf)
    return [y.detach(), *torch.autograd.grad(y, [leaf, *tensors], dy)]


# What is decoded


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 16), (5, 13), (1, 1), (16, 40)], ids=str)
@pytest.mark.parametrize("nested", [True, False])
def test_every_value_as_the_format_says(nested, shape, dtype, alone, monkeypatch):
    """Value i: the table at the high half of byte i // 2 for an even i, else the low one, times its block's absmax."""
    monkeypatch.setattr(quantised, "CHUNK", 4 * BLOCK)
    (N, K), s = shape, Linear4bit(shape[1], shape[0]).quant_state
    codes = Linear4bit(K, N).weight.detach()
    if not nested:
        s.absmax = torch.rand(s.absmax.shape)
    rest = f"nf4,{BLOCK},{BLOCK2 if nested else 0},{N},{K}"
    more = (s.state2.code, s.state2.absmax, s.offset) if nested else ()
    W = quantised.decode_4bit((codes, s.absmax, s.code, *more), rest, dtype).flatten()
    for i in range(N * K):
        byte, block = codes[i // 2, 0].item(), i // BLOCK
        absmax = s.absmax[block]
        if nested:
            absmax = s.state2.code[absmax.int()] * s.state2.absmax[block // BLOCK2] + s.offset
        assert W[i] == (s.code[byte & 15 if i % 2 else byte >> 4] * absmax).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(96, 192), (7, 10), (9, 13), (8, 4096)], ids=str)
@pytest.mark.parametrize("block", [32, 64, 128, 4096])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("quant", ["nf4", "fp4"])
def test_the_bits_are_those_of_bitsandbytes(quant, nested, block, shape, dtype, monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    if block >= 2048 or shape[1] % 2:
        torch.compiler.reset()  # where bitsandbytes compiles, a shape at a time
    q, s = bnb.functional.quantize_4bit(
        torch.randn(shape).to(dtype), blocksize=block, compress_statistics=nested, quant_type=quant
    )
    want = bnb.functional.dequantize_4bit(q, s)
    more = (s.state2.code, s.state2.absmax, s.offset) if nested else ()
    args = (q, s.absmax, s.code, *more), f"{quant},{block},{s.state2.blocksize if nested else 0},{shape[0]},{shape[1]}"
    assert torch.equal(quantised.decode_4bit(*args, dtype), want)
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    assert torch.equal(quantised.decode_4bit(*args, dtype), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", BITS)
def test_the_frozen_product_is_bitsandbytes_own(kind, dtype):
    """In training, where its 8-bit layer does not quantise x either; before and after its forward moved the scales."""
    base = quantised_layer(kind, dtype=dtype)
    x, dy = (t.to(dtype) for t in inputs(SMALL))
    before = step(lambda x: ops.plain_linear(x, stored(base), base.bias), x, dy, [])
    own = step(base, x, dy, [])
    after = step(lambda x: ops.plain_linear(x, stored(base), base.bias), x, dy, [])
    assert all(torch.equal(a, b) for a, b in zip(before, own, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, own, strict=True))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_any_dtype_of_storage(storage):
    bnb = pytest.importorskip("bitsandbytes")
    layers = []
    for dtype in (torch.uint8, storage):
        torch.manual_seed(0)
        layer = bnb.nn.Linear4bit(64, 32, quant_type="nf4", quant_storage=dtype)
        layers.append(stored(layer.to("cpu")))
    a, b = (frozen.decode(W.spec, W.parts, torch.float32) for W in layers)
    assert layers[1].parts[0].dtype == storage
    assert torch.equal(a, b)


# One layer


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_method_equals_a_dense_layer_on_the_decoded_weight(case, kind):
    if case.method == "diff_pruning" and kind == "int8":
        with pytest.raises(ValueError, match="has an attribute 'index' already, which diff_pruning needs"):
            pair(kind, case.make(SMALL.r))
        return
    layer, reference = pair(kind, case.make(SMALL.r))
    x, dy = inputs(SMALL)
    equal(layer_results(layer, x, dy), layer_results(reference, x, dy), read_wide(kind, case, x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["lora", "lora+dropout", "dora", "dora+dropout", "ssb", "adalora+n"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_and_dtype(kind, name, dtype):
    case = next(c for c in CASES if c.name == name)
    layer, reference = pair(kind, case.make(SMALL.r), dtype)
    x, dy = (t.to(dtype) for t in inputs(SMALL))
    equal(layer_results(layer, x, dy), layer_results(reference, x, dy), read_wide(kind, case, dtype))


CALLS = {
    "lora": {},
    "lora+dropout": {"p": 0.4},
    "scales": {"d_in": SMALL.K, "d_out": SMALL.N},
    "dora+dropout": {"p": 0.4, "d_out": SMALL.N, "drop_base": True},
    "gate": {"G": SMALL.r, "a": SMALL.r, "h": "silu", "d_in": SMALL.K},
    "scales alone": {"A": None, "B": None, "d_in": SMALL.K, "d_out": SMALL.N},
}


def call(name):
    """Factors in fp64, all trained."""
    torch.manual_seed(5)
    given = {"A": (SMALL.r, SMALL.K), "B": (SMALL.N, SMALL.r), "s": 0.7, **CALLS[name]}
    made = {
        n: torch.randn(v, dtype=torch.float64).requires_grad_()
        if n in ("A", "B", "G", "a", "d_in", "d_out") and v
        else v
        for n, v in given.items()
    }
    return Factors(**made), [t for t in made.values() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("name", CALLS)
def test_gradients_by_finite_differences(name):
    base, seed = quantised_layer("stand-in", dtype=torch.float64), torch.tensor([3, 4], dtype=torch.int32)
    f, tensors = call(name)
    x = torch.randn(4, SMALL.K, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: ops.linear(x, stored(base), f, base.bias, seed=seed), (x, *tensors))


def check_against_the_expression(kind="stand-in", names=tuple(CALLS)):
    """y and every gradient, against autograd of the expression on a weight that is looked up value by value."""
    base, seed = quantised_layer(kind, dtype=torch.float64), torch.tensor([3, 4], dtype=torch.int32)
    s = base.quant_state
    halves = torch.stack([base.weight.detach() >> 4, base.weight.detach() & 15], 1).flatten()[: SMALL.N * SMALL.K]
    blocks = torch.arange(len(halves)) // BLOCK
    scale = s.state2.code[s.absmax[blocks].long()] * s.state2.absmax[blocks // BLOCK2] + s.offset
    W = (s.code[halves.long()] * scale).double().view(SMALL.N, SMALL.K)
    x, dy = inputs(SMALL)
    for name in names:
        f, tensors = call(name)
        keep = dropout.keep_mask(seed, x.shape, f.p) if f.p else None
        got = step(lambda x, f=f: ops.linear(x, stored(base), f, base.bias, seed=seed), x, dy, tensors)
        want = step(lambda x, f=f, k=keep: f.expression(x, W, base.bias, keep=k), x, dy, tensors)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_expression(alone):
    check_against_the_expression()


def _of_backward(change):
    backward = Eager.backward

    def mutant(self, dy, o, T, z, need):
        return change(list(backward(self, dy, o, T, z, need)), dy, o)

    return Eager, "backward", mutant


def _no_adapter_in_dx(grads, dy, o):
    dz = dy if o.d_out is None else dy * o.d_out
    dx = dz @ o.w
    grads[0] = dx if o.d_in is None else dx * o.d_in
    return grads


def _of_decoding(change):
    decode = frozen._DECODERS["bnb4"]
    return frozen._DECODERS, "bnb4", lambda parts, rest, dtype: decode(*change(list(parts), rest), dtype)


def _swapped(parts, rest):
    parts[0] = (parts[0] >> 4) | (parts[0] << 4)
    return parts, rest


def _of_a_neighbour(parts, rest):
    parts[1] = parts[1].roll(1)
    return parts, rest


def _no_offset(parts, rest):
    return [*parts[:5], torch.zeros_like(parts[5])], rest


MUTANTS = {
    "doubled dB": lambda: _of_backward(lambda grads, dy, o: [*grads[:9], 2 * grads[9], *grads[10:]]),
    "the adapter's term dropped from dx": lambda: _of_backward(_no_adapter_in_dx),
    "halves of a byte swapped": lambda: _of_decoding(_swapped),
    "the scale of the block before": lambda: _of_decoding(_of_a_neighbour),
    "offset of the nested scales left out": lambda: _of_decoding(_no_offset),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name, monkeypatch, alone):
    owner, key, mutant = MUTANTS[name]()
    (monkeypatch.setitem if isinstance(owner, dict) else monkeypatch.setattr)(owner, key, mutant)
    with pytest.raises(AssertionError, match="not close"):
        check_against_the_expression(names=("lora",))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["lora", "lora+dropout", "dora+dropout", "ssb"])
def test_what_is_kept(name, kind):
    """The parts, and beside them what the dense layer keeps beside W: nothing of W's size, not one byte more."""
    case = next(c for c in CASES if c.name == name)
    counts = []
    for layer in pair(kind, case.make(SMALL.r), torch.float32):
        kept = {}

        def pack(t, kept=kept):
            kept[t.untyped_storage().data_ptr()] = t
            return t

        x = inputs(SMALL)[0].float().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x)
        assert y.requires_grad
        W = frozen.kind_of(layer.unload(merge=False)).matrix(layer)
        own = [*layer.parameters(), *layer.buffers(), *(W.parts if isinstance(W, frozen.Stored) else ())]
        for t in own[1:] if frozen.is_foreign(own[0]) else own:  # which has no storage of its own
            kept.pop(t.untyped_storage().data_ptr(), None)
        assert all(t.shape != (SMALL.N, SMALL.K) for t in kept.values())
        counts.append(sum(t.untyped_storage().nbytes() for t in kept.values()))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", FORMATS)
def test_the_compute_dtype_of_the_layer_is_kept_to(kind):
    """x in fp32 on a 4-bit layer that computes in bf16: in bf16, y and dx in fp32."""
    base = quantised_layer(kind, dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    own = kind != "stand-in" and "f4" not in kind and "p4" not in kind  # it has none, and computes in x's
    reference = adapted(dense(base, torch.float32 if own else torch.bfloat16), fp.LoraConfig(r=4), like=None)
    layer = adapted(base, fp.LoraConfig(r=4), like=reference)
    assert layer.lora_A.dtype == torch.float32
    x, dy = (t.float() for t in inputs(SMALL))
    got = layer_results(layer, x, dy)
    cast = x if own else x.bfloat16()
    want = layer_results(reference, cast, dy.to(cast.dtype))
    assert got["y"].dtype == got["x"].dtype == torch.float32
    equal({n: t.float() for n, t in got.items()}, {n: t.float() for n, t in want.items()})


@pytest.mark.parametrize("name", ["lora", "lora+dropout", "dora", "ssb", "liera"])
@pytest.mark.parametrize("kind", FEW)
def test_under_autocast(kind, name):
    config = next(c for c in CASES if c.name == name).make(SMALL.r)
    layer, reference = pair(kind, config, torch.float32)
    x, dy = (t.float() for t in inputs(SMALL))
    results = []
    for each in (layer, reference):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(layer_results(each, x, dy.bfloat16()))
    assert results[0]["y"].dtype == torch.bfloat16
    equal(*results)


class Two(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second, self.checkpoints = first, second, False

    def forward(self, x):
        run = (lambda f, x: checkpoint(f, x, use_reentrant=False)) if self.checkpoints else (lambda f, x: f(x))
        return run(self.second, torch.tanh(run(self.first, x)))


def two(kind):
    """A model of two quantised layers and the same on decoded weights."""
    config = fp.LoraConfig(r=3, lora_dropout=0.2, init_lora_weights=False)
    pairs = [pair(kind, config, torch.float32), pair(kind, config, torch.float32, N=5, K=SMALL.N)]
    return [Two(*layers) for layers in zip(*pairs, strict=True)]


@pytest.mark.parametrize("kind", FEW)
def test_gradients_reach_the_layers_below_and_checkpointing_changes_nothing(kind):
    model, reference = two(kind)
    x, dy = torch.randn(6, SMALL.K), torch.randn(6, 5)
    results = []
    for each, checkpoints in ((model, False), (model, False), (model, True), (reference, False)):
        each.checkpoints = checkpoints
        results.append(step(each, x, dy, [p for p in each.parameters() if p.requires_grad]))
    assert len(results[0]) == 6
    assert all(g.abs().max() > 0 for g in results[0])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["lora", "dora+dropout"])
@pytest.mark.parametrize("kind", FEW)
def test_compiled(kind, name):
    case = next(c for c in CASES if c.name == name)
    layer, reference = pair(kind, case.make(SMALL.r))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = inputs(SMALL)
    got = step(compiled, x, dy, layer.adapter_tensors())
    for a, b in zip(got, step(reference, x, dy, reference.adapter_tensors()), strict=True):
        assert (a - b).norm() <= (1e-12 + read_wide(kind, case, x.dtype)) * b.norm()


# The layer and its surroundings


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ["lora+dropout", "dora", "ssb", "pissa"])
def test_a_second_adapter_and_a_batch_of_both(name, kind):
    """Made from the same weight, active alone and together, chosen sample by sample: as on the decoded weight."""
    config = next(c for c in CASES if c.name == name).make(SMALL.r)
    pairs = pair(kind, config, torch.float32)
    for layer in pairs:
        torch.manual_seed(8)
        layer.add_adapter("second", config if name != "dora" else fp.LoraConfig(r=2, init_lora_weights=False))
    x, dy = (t.float() for t in inputs(SMALL))
    actives = [("second",)] + [("default", "second")] * (name != "pissa")
    for active in actives:
        results = []
        for layer in pairs:
            layer.active = active
            tensors = [t for a in layer.active_adapters() for t in a.adapter_tensors()]
            results.append(step(layer, x, dy, tensors))
        for a, b in zip(*results, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
    results = []
    for layer in pairs:
        layer.active = ("default",)
        model = nn.Sequential(layer).eval()
        with torch.no_grad(), fp.adapter_batch(model, ["second", "default", "__base__"]):
            results.append(model(torch.stack([x.reshape(-1, SMALL.K)[:2]] * 3)))
    assert (results[0] - results[1]).norm() <= 1e-5 * results[1].norm()


@pytest.mark.parametrize("kind", FORMATS)
def test_a_layer_stays_its_quantisers(kind):
    """Its keys and class stay; what was trained and the weight survive copies, pickles, checkpoints and unloading."""
    base = quantised_layer(kind)
    keys, own = set(base.state_dict()), type(base)
    layer = adapted(copy.deepcopy(base), fp.LoraConfig(r=3))
    assert isinstance(layer, own)
    assert set(layer.state_dict()) == keys | {"lora_A", "lora_B"}
    x = torch.randn(4, SMALL.K)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    other = adapted(quantised_layer(kind), fp.LoraConfig(r=3, init_lora_weights=False))
    with torch.no_grad():
        assert not torch.equal(other(x), y)
        other.lora_A.copy_(layer.lora_A), other.lora_B.copy_(layer.lora_B)
    assert torch.equal(other(x), y)
    if kind not in ("stand-in", *TORCHAO):  # classes that pickle does not find; torchao's own layers do not pickle
        torch.save(layer, file := io.BytesIO())
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), y)
    plain = layer.unload(merge=False)
    assert type(plain) is own
    assert set(plain.state_dict()) == keys


@pytest.mark.parametrize("kind", FORMATS)
def test_merging_is_refused_with_the_reason(kind):
    layer = adapted(quantised_layer(kind), fp.LoraConfig(r=3))
    parts = [t.clone() for t in (*stored_parts(layer), layer.lora_A, layer.lora_B)]
    with pytest.raises(fp.NotMergeableError, match=r"its weight is stored in .* with .* scale.*quantising a merged"):
        layer.merge()
    after = [*stored_parts(layer), layer.lora_A, layer.lora_B]
    assert all(torch.equal(a, b) for a, b in zip(after, parts, strict=True))


@pytest.mark.parametrize("kind", FEW)
def test_explain_says_how_it_is_stored(kind):
    model = nn.Sequential(adapted(quantised_layer(kind), fp.LoraConfig(r=3)))
    (row,) = fp.explain(model)
    assert (row.form, row.backend) == ("factors", "eager")
    stored_as = {
        "stand-in": f"nf4 with a scale for {BLOCK} values",
        "nf4+nested": "nf4 with a scale for 64 values",
        "fp8 4 5": "float8_e4m3fn with a scale for 4 x 5 values",
        "torchao int4": "int4 with a scale a row",
    }
    about = stored_as.get(kind, "int8 with a scale a row")
    assert re.search(rf"{about} \([\d.]+ bits a value in all\), decoded once each way", row.why)


def test_a_wrong_width_is_named():
    layer = adapted(quantised_layer("stand-in"), fp.LoraConfig(r=3))
    for linear in (layer, lambda x: ops.plain_linear(x, stored(quantised_layer("stand-in")), None)):
        with pytest.raises(ValueError, match=f"must be in_features={SMALL.K}"):
            linear(torch.randn(2, SMALL.K + 1))


def refused(base, reason):
    """Neither adapted nor read, with this reason, and left as it was."""
    assert re.search(reason, frozen.kind_of(base))
    with pytest.raises(TypeError, match=reason):
        fp.PeftLinear.from_linear(base, fp.LoraConfig(r=2))
    assert not hasattr(base, "lora_A")


@pytest.mark.parametrize("kind", ["stand-in", "nf4"])
def test_a_weight_that_is_not_quantised_yet(kind):
    if kind == "stand-in":
        base = quantised_layer(kind)
        base.quant_state = None
    else:
        base = pytest.importorskip("bitsandbytes").nn.Linear4bit(8, 8)
    refused(base, "its weight is not quantised yet; move the model to its device first")


def test_an_8_bit_weight_that_is_not_quantised_yet_or_has_lost_its_scales():
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False)
    refused(base, "its weight is not quantised yet; move the model to its device first")
    base = base.to("cpu")
    base.weight.SCB = None
    refused(base, r"its weight has lost the scales \(SCB\)")


@pytest.mark.parametrize("kind", ["stand-in", "nf4+nested"])
def test_a_weight_that_was_repacked_for_inference(kind):
    base = quantised_layer(kind, N=64, K=128)
    layer = adapted(copy.deepcopy(base), fp.LoraConfig(r=2))
    layer.kind.state(layer).packing_format_for_cpu = True
    with pytest.raises(RuntimeError, match="bitsandbytes repacked its weight for inference on this CPU"):
        layer(torch.randn(2, 128))
    if kind == "stand-in":
        base.quant_state.packing_format_for_cpu = True
    else:
        from bitsandbytes.functional import _convert_weight_packed_for_cpu

        base.weight.data, base.weight.quant_state = _convert_weight_packed_for_cpu(base.weight.data, base.quant_state)
    refused(base, "passes no gradient through that; load the model anew")


def test_other_types_and_forwards():
    base = quantised_layer("stand-in")
    base.quant_state.quant_type = "int3"
    refused(base, "its quant_type is 'int3', which is neither 'nf4' nor 'fp4'")

    class Other(Linear4bit):
        def forward(self, x):
            return 2 * x

    assert frozen.kind_of(Other(4, 4)) is frozen.OPAQUE
    hooked = quantised_layer("stand-in")
    hooked.forward = lambda x: x
    assert frozen.kind_of(hooked) is frozen.OPAQUE
    Unknown = type("Linear4bit", (nn.Linear,), {"forward": lambda self, x: x, "__module__": "another.library"})
    assert frozen.kind_of(Unknown(4, 4)) is frozen.OPAQUE


def test_8_bit_layers_with_fp16_weights_are_no_packed_ones():
    bnb = pytest.importorskip("bitsandbytes")
    assert frozen.kind_of(bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=True)) is frozen.OPAQUE


@pytest.mark.skipif(not SITE.is_dir(), reason="torchao is not installed: make .venv/torchao")
def test_all_of_this_on_torchao():
    """The tests of this file and of PEFT's layers over its formats, in a process that finds it."""
    paths = filter(None, [str(SITE), os.environ.get("PYTHONPATH")])
    own = [str(Path(__file__).with_name(name)) for name in ("test_packed.py", "test_peft_packed.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "torchao and not all_of_this", *own],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OF_TORCHAO": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "[100%]" in done.stdout


def test_nothing_is_imported_for_it():
    run = "import fused_peft, sys; print('bitsandbytes' in sys.modules, len(fused_peft.core.frozen.KINDS))"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", str(len(frozen.KINDS))]


def test_a_plain_layer_is_known_before_them(monkeypatch):
    monkeypatch.setattr(quantised, "library_class", lambda *_: pytest.fail("asked for a plain layer"))
    assert frozen.kind_of(nn.Linear(2, 2)) is frozen.DENSE
    assert METHODS  # the cases above are those of every method
