"""PEFT's models on quantised layers: its own layers accelerated on torchao's weights and Transformers' FP8Linear (on
bitsandbytes': test_peft_bnb), and this library's methods registered with it on every format.

With torchao these run in a process of their own (test_packed).
"""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

import test_accelerate  # noqa: E402
from test_accelerate import CONFIGS, agree, fused_calls, results  # noqa: E402
from test_packed import FEW, TORCHAO, dense, quantised_layer  # noqa: E402

import fused_peft as fp  # noqa: E402
from fused_peft.core import frozen  # noqa: E402
from fused_peft.integrations import tuners  # noqa: E402
from fused_peft.methods import METHODS  # noqa: E402

same_masks = test_accelerate.same_masks
pytestmark = pytest.mark.filterwarnings("ignore")
FP8 = ["fp8 4 5", "fp8"]
K, N = 32, 24
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def config(name):
    return CONFIGS[name](target_modules=["0"], **({"feedforward_modules": []} if name == "ia3" else {}))


def build(name, kind, dtype=torch.float32):
    torch.manual_seed(0)
    base = nn.Sequential(quantised_layer(kind, N, K, dtype=dtype))
    model = peft.get_peft_model(base, config(name))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and "ranknum" not in n:
                p.mul_(0.3).add_(torch.rand_like(p) * 0.1)
    return model.train()


@needs_torchao
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", TORCHAO)
@pytest.mark.parametrize("name", ["lora", "lora-dropout", "dora", "dora-dropout", "adalora", "ia3"])
def test_the_same_numbers_as_peft(name, kind, dtype, same_masks, monkeypatch):
    model = build(name, kind, dtype)
    x = torch.randn(2, 7, K).to(dtype)
    keys, own = set(model.state_dict()), [type(m) for m in model.modules()]
    want = results(model, x)
    same_masks()
    calls = fused_calls(monkeypatch)
    got = results(fp.accelerate(model), x)
    assert len(calls) == 1
    agree(got, want, dtype)
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in want.items()}
    assert set(model.state_dict()) == keys
    fp.restore(model)
    assert [type(m) for m in model.modules()] == own


@pytest.mark.parametrize("kind", [*FP8, *(pytest.param(k, marks=needs_torchao) for k in TORCHAO)])
@pytest.mark.parametrize("name", ["lora", "lora-dropout", "adalora"])  # PEFT makes no DoRA on float8 layers
def test_as_on_the_decoded_weight(name, kind):
    """y and every gradient, bit for bit, against the same adapter accelerated on a dense layer; explained as fused."""
    model = build(name, kind)
    base = next(m for m in model.modules() if isinstance(m, nn.Linear) and hasattr(m, "weight") and _packed(m))
    W = frozen.kind_of(base).matrix(base)
    plain = nn.Linear(K, N)
    plain.load_state_dict({"weight": frozen.decode(W.spec, W.parts, torch.float32), "bias": base.bias})
    other = peft.get_peft_model(nn.Sequential(plain), config(name)).train()
    own = dict(model.named_parameters())
    for n, p in other.named_parameters():
        if p.requires_grad:
            p.data.copy_(own[n])
    x = torch.randn(2, 5, K)
    got, want = (torch.manual_seed(5) and results(fp.accelerate(m), x) for m in (model, other))
    assert got.keys() >= want.keys()
    assert all(torch.equal(got[n], want[n]) for n in want)
    (row,) = fp.explain(model)
    assert row.form == "factors"
    assert "decoded once each way" in row.why


def _packed(module):
    kind = frozen.kind_of(module)
    return not isinstance(kind, str) and kind.packed


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.config.peft_type in tuners.REGISTERED])
def test_registered_methods_on_a_quantised_layer(name, kind):
    """y and every gradient as on the decoded weight, with a second adapter made behind the first."""
    if (name, kind) == ("diff_pruning", "int8"):
        pytest.skip("the layer has an attribute that the method needs")
    base = quantised_layer(kind, N, K, dtype=torch.float32, compute_dtype=torch.float32)
    models = []
    for each in (base, dense(base, torch.float32)):
        torch.manual_seed(1)
        model = peft.get_peft_model(nn.Sequential(each), replace(METHODS[name].example(2), target_modules=["0"]))
        model.add_adapter("second", replace(METHODS[name].example(3), target_modules=["0"]))
        models.append(model)
    own = dict(models[1].named_parameters())
    for n, p in models[0].named_parameters():
        if ".default" in n or ".second" in n:
            p.data.add_(0.1 * torch.rand_like(p))
            own[n].data.copy_(p)
    x = torch.randn(2, 5, K)
    for adapter in ("default", "second"):
        for model in models:
            model.set_adapter(adapter)
        got, want = (results(m, x) for m in models)
        assert got.keys() == want.keys()
        for n, t in want.items():
            assert (got[n] - t).norm() <= 1e-5 * t.norm(), n
        if METHODS[name].output is None and not METHODS[name].weight:
            assert "decoded once each way" in fp.explain(models[0])[0].why
    with pytest.raises(fp.NotMergeableError, match="unmerged"):
        models[0].merge_adapter()


@needs_torchao
@pytest.mark.parametrize("kind", ["torchao int8", "torchao int4"])
def test_a_weight_quantised_after_it_was_adapted(kind):
    """Decoded from then on, as if it had been before, DoRA's reads included."""
    import torchao.quantization as ao

    config = {"int8": ao.Int8WeightOnlyConfig, "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4)}
    plain = nn.Linear(K, N)
    for each in (fp.LoraConfig(r=3, init_lora_weights=False), fp.DoraConfig(r=3, init_lora_weights=False)):
        layer = fp.PeftLinear.from_linear(plain, each)
        twin = fp.PeftLinear.from_linear(nn.Linear(K, N), each)
        twin.load_state_dict(layer.state_dict())
        model = nn.Sequential(layer)
        ao.quantize_(model, config[kind.split()[1]](), filter_fn=lambda m, _: isinstance(m, fp.PeftLinear))
        with torch.no_grad():
            twin.weight.copy_(layer.weight.dequantize())
        x = torch.randn(4, K, requires_grad=True)
        grads = []
        for m in (layer, twin):
            y = m(x)
            grads.append([y, *torch.autograd.grad(y.sum(), [x, *m.adapter_tensors()])])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        assert "decoded once each way" in fp.explain(model)[0].why
        plain = nn.Linear(K, N)


@needs_torchao
def test_torchao_that_quantises_x_keeps_its_own_product():
    import torchao.quantization as ao

    plain = nn.Linear(K, N)
    ao.quantize_(plain, ao.Int8DynamicActivationInt8WeightConfig())
    assert frozen.kind_of(plain) is frozen.OPAQUE
    layer = fp.PeftLinear.from_linear(plain, fp.LoraConfig(r=2))
    with pytest.raises(RuntimeError, match="gives no gradient to its input"):
        layer(torch.randn(3, K, requires_grad=True))


@needs_torchao
def test_peft_on_torchao_that_quantises_x_is_warned_of():
    import torchao.quantization as ao

    base = nn.Sequential(nn.Linear(K, K), nn.Tanh(), nn.Linear(K, N))
    ao.quantize_(base, ao.Int8DynamicActivationInt8WeightConfig())
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["0", "2"]))
    with pytest.warns(UserWarning, match=r"product of .*\.0 \(Int8Tensor; 1 more like it\) passes no gradient on"):
        fp.accelerate(model)
    assert "which passes no gradient on to the layers before it" in fp.explain(model)[0].why


def test_an_fp8_layer_that_cannot_be_read():
    base = quantised_layer("fp8 4 5", N, K)
    base.weight_scale_inv = nn.Parameter(torch.ones(2, 2), requires_grad=False)
    reason = r"its scales have shape \(2, 2\), but blocks of \(4, 5\) of a weight \(24, 32\) need \(6, 7\)"
    with pytest.raises(TypeError, match=reason):
        fp.PeftLinear.from_linear(base, fp.LoraConfig(r=2))
    base.weight.data = torch.zeros(N, K // 2, dtype=torch.int8)
    with pytest.raises(TypeError, match="its weight is FP4, two values in one int8"):
        fp.PeftLinear.from_linear(base, fp.LoraConfig(r=2))


def test_scales_of_an_fp8_layer_are_frozen():
    base = quantised_layer("fp8 4 5", N, K).requires_grad_(True)
    layer = fp.PeftLinear.from_linear(base, fp.LoraConfig(r=2))
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
