"""PeftLinear as a module: construction, shapes, merging, state, and every refusal."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_peft as fp
from fused_peft.methods import METHODS

CONFIG = fp.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False)


def layer_pair(bias=True, config=CONFIG):
    linear = nn.Linear(12, 10, bias=bias)
    return linear, fp.PeftLinear.from_linear(linear, config)


def test_from_linear_shares_parameters_and_keys():
    linear, layer = layer_pair()
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.weight.requires_grad
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (12, 10)


def test_from_linear_keeps_hooks_mode_and_attributes():
    linear = nn.Linear(12, 10).eval()
    linear.tag, seen = "mine", []
    linear.register_forward_hook(lambda *args: seen.append(1))
    layer = fp.PeftLinear.from_linear(linear, CONFIG)
    layer(torch.randn(2, 12))
    assert seen == [1]
    assert layer.tag == "mine"
    assert not layer.training


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_any_leading_shape(lead):
    _, layer = layer_pair()
    y = layer(torch.randn(*lead, 12))
    assert y.shape == (*lead, 10)
    y.sum().backward()
    assert layer.lora_A.grad.shape == layer.lora_A.shape


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("config", [CONFIG, fp.IA3Config(), fp.IA3Config(feedforward_modules=".*"), fp.SSBConfig()])
def test_conv1d_is_its_transposed_linear(bias, config):
    transformers = pytest.importorskip("transformers.pytorch_utils")
    conv = transformers.Conv1D(10, 12)
    nn.init.normal_(conv.bias)
    linear = nn.Linear(12, 10)
    linear.weight.data, linear.bias.data = conv.weight.data.t().clone(), conv.bias.data.clone()
    torch.manual_seed(0)
    a = fp.PeftLinear.from_linear(conv, config)
    torch.manual_seed(0)
    b = fp.PeftLinear.from_linear(linear, config)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(a(x), b(x))
    assert a.weight is conv.weight
    assert a.weight.shape == (12, 10)
    a.merge(), b.merge()
    torch.testing.assert_close(a.weight.t(), b.weight)
    assert a.weight.is_contiguous()
    plain = a.unload()
    assert type(plain) is transformers.Conv1D
    assert plain.__dict__.keys() == conv.__dict__.keys()
    torch.testing.assert_close(plain(x), b(x))


def test_unload_gives_back_the_class_and_the_merged_function():
    linear, layer = layer_pair()
    x = torch.randn(3, 12)
    base, want = nn.functional.linear(x, linear.weight.clone(), linear.bias), layer(x)
    assert torch.equal(layer.unload(merge=False)(x), base)
    plain = layer.unload()
    assert type(plain) is nn.Linear
    assert plain.__dict__.keys() == nn.Linear(2, 2).__dict__.keys()
    assert set(plain.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(plain(x), want)


def test_merge_adds_a_bias_where_the_method_needs_one_and_unmerge_removes_it():
    _, layer = layer_pair(bias=False, config=fp.BitFitConfig())
    nn.init.normal_(layer.bitfit_bias)
    x = torch.randn(3, 12)
    want = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), want)
    layer.unmerge()
    assert layer.bias is None


def test_merging_twice_and_unmerging_unmerged_are_refused():
    _, layer = layer_pair()
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.merge()
    merged = layer.weight.clone()
    with pytest.raises(RuntimeError, match="already merged; unmerge"):
        layer.merge()
    assert torch.equal(layer.weight, merged)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_non_finite_weights(value):
    _, layer = layer_pair()
    before = layer.weight.clone()
    layer.lora_B.data[0, 0] = value
    with pytest.raises(ValueError, match="merged weight has NaN"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    assert torch.equal(layer.weight, before)


def test_merged_weight_is_rounded_once():
    layer = fp.PeftLinear(64, 48, config=fp.LoraConfig(r=4, init_lora_weights=False), dtype=torch.bfloat16)
    want = (layer.weight.double() + layer.factors().to(torch.float64).low_rank()).to(torch.bfloat16)
    layer.merge()
    assert (layer.weight != want).float().mean() < 1e-3  # fp32 and fp64 round alike but for ties


def test_a_checkpoint_of_a_merged_layer_holds_the_base_weight():
    _, layer = layer_pair()
    unmerged = {k: v.clone() for k, v in layer.state_dict().items()}
    layer.merge()
    merged = layer.state_dict()
    assert merged.keys() == unmerged.keys()
    assert all(torch.equal(merged[k], v) for k, v in unmerged.items())
    with pytest.raises(RuntimeError, match="is merged; call unmerge"):
        nn.Sequential(layer).load_state_dict({f"0.{k}": v for k, v in unmerged.items()})
    layer.to(torch.float64)
    layer.unmerge()
    assert torch.equal(layer.weight, unmerged["weight"].double())


def test_meta_construction_then_materialise():
    config = fp.LoraConfig(r=4)
    layer = fp.PeftLinear(12, 10, config=config, device="meta", dtype=torch.bfloat16)
    assert layer(torch.empty(3, 12, device="meta", dtype=torch.bfloat16)).shape == (3, 10)
    assert layer.lora_A.is_meta
    assert layer.lora_A.dtype == torch.float32
    objects = dict(layer.named_parameters())
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.lora_A.abs().sum() > 0
    assert dict(layer.named_parameters()).keys() == objects.keys()


def test_reset_adapter_parameters_keeps_the_objects():
    _, layer = layer_pair(config=fp.LoraConfig(r=4))
    before = layer.lora_B
    nn.init.normal_(layer.lora_B)
    layer.reset_adapter_parameters()
    assert layer.lora_B is before
    assert layer.lora_B.abs().sum() == 0


def test_repr_names_the_method_and_the_state():
    _, layer = layer_pair(config=fp.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1))
    text = "in_features=12, out_features=10, bias=True, method=lora, r=4, lora_alpha=8, lora_dropout=0.1"
    assert repr(layer) == f"PeftLinear({text})"
    layer.merge()
    assert repr(layer) == f"PeftLinear({text}, merged)"


def test_adapter_dtype():
    for base, asked, want in (
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ):
        assert fp.PeftLinear(8, 8, config=CONFIG, dtype=base, adapter_dtype=asked).lora_A.dtype == want


def test_trainable_base_weight_gets_its_gradient():
    _, layer = layer_pair()
    layer.weight.requires_grad_(True)
    x = torch.randn(3, 12)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torch.ones(3, 10).T @ x)


class Tagged(nn.Linear):
    method = "mine"


def with_attribute(name, value):
    linear = nn.Linear(4, 4)
    setattr(linear, name, value)
    return linear


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: nn.Embedding(4, 4), "Embedding is not a linear layer"),
        (lambda: nn.Conv1d(4, 4, 1), "Conv1d is not a linear layer"),
        (lambda: nn.MultiheadAttention(4, 1).out_proj, "never calls it"),
        (lambda: nn.LazyLinear(4), "shape is not known"),
        (lambda: nn.Linear(4, 4).to(torch.complex64), "complex64"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "parametriz"),
        (lambda: fp.PeftLinear(4, 4, config=CONFIG), "already carries an adapter"),
        (lambda: with_attribute("config", {"name": "mine"}), "attribute 'config'.*rename it"),
        (lambda: with_attribute("enabled", False), "attribute 'enabled'"),
        (lambda: with_attribute("merged", torch.nn.Identity()), "attribute 'merged'"),
        (lambda: Tagged(4, 4), "attribute 'method'"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_unchanged(module, message):
    module = module()
    flags = [p.requires_grad for p in module.parameters()]
    with pytest.raises(TypeError, match=message):
        fp.PeftLinear.from_linear(module, CONFIG)
    assert flags == [p.requires_grad for p in module.parameters()]


FACTORISED = {"pissa", "milora", "olora", "spectral_adapter", "lora_xs", "lora_dash"}  # start from an SVD or QR of W


@pytest.mark.parametrize("name", METHODS)
def test_only_a_factorisation_bounds_the_rank(name):
    linear, config = nn.Linear(8, 4), METHODS[name].example(5)
    if name not in FACTORISED:
        y = fp.PeftLinear.from_linear(linear, config)(torch.randn(3, 8))
        y.sum().backward()
        return
    with pytest.raises(ValueError, match=r"=5 must not exceed .*=4"):
        fp.PeftLinear.from_linear(linear, config)
    assert linear.weight.requires_grad
    fp.PeftLinear.from_linear(linear, METHODS[name].example(4))


@pytest.mark.parametrize("config", [None, "lora", nn.Linear(2, 2), fp.LoraConfig])
def test_a_foreign_config_is_refused(config):
    with pytest.raises(TypeError, match="LoraConfig"):
        fp.PeftLinear(8, 4, config=config)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"r": -1}, "r=-1"),
        ({"r": 2.5}, "r=2.5"),
        ({"r": True}, "r=True"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf"),
        ({"lora_dropout": 1.0}, r"lora_dropout=1.0 must lie in \[0, 1\)"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"bias": "some"}, "bias='some'"),
        ({"init_lora_weights": "magic"}, "init_lora_weights='magic'"),
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\['q'\]=0"),
        ({"alpha_pattern": {"q": -1}}, r"alpha_pattern\['q'\]=-1"),
        ({"target_modules": "(q"}, "regular expression"),
        ({"target_modules": [""]}, "target_modules"),
        ({"modules_to_save": "head"}, "modules_to_save='head'"),
        ({"target_modules": "q", "layers_to_transform": [1]}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
    ],
)
def test_config_errors_name_the_field_and_the_value(kwargs, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fp.LoraConfig(**kwargs)


def test_ia3_feedforward_modules_must_be_targets():
    with pytest.raises(ValueError, match=r"feedforward_modules=\['w2'\]"):
        fp.IA3Config(target_modules=["k"], feedforward_modules=["w2"])


def test_merging_notices_autograd_and_inference_mode():
    _, layer = layer_pair()
    x = torch.randn(3, 12, requires_grad=True)
    y = layer(x)
    layer.merge()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    layer.unmerge()
    with torch.inference_mode():
        layer.merge()
    layer(x).sum().backward()
    layer.unmerge()


@pytest.mark.parametrize("lead", [(3,), (2, 3), ()])
def test_output_may_be_changed_in_place(lead):
    _, layer = layer_pair()
    x = torch.randn(*lead, 12)
    want = layer(x).relu()
    y = layer(x)
    y.relu_()
    assert torch.equal(y, want)
    y.sum().backward()


@pytest.mark.parametrize("name", METHODS)
def test_traced_by_torchscript_and_saved(name):
    """In eval, gradients recorded or not: what is traced holds PyTorch's operations only, and other batches fit."""
    layer = fp.PeftLinear(8, 8, config=METHODS[name].example(4)).eval()
    with torch.no_grad():
        for p in layer.adapter_tensors():
            p.add_(0.1 * torch.randn_like(p))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            traced, memory = torch.jit.trace(layer, torch.randn(3, 8)), io.BytesIO()
        torch.jit.save(traced, memory)
        memory.seek(0)
        x = torch.randn(5, 8)
        torch.testing.assert_close(torch.jit.load(memory)(x), layer(x), rtol=1e-5, atol=1e-6)


class Quantised(torch.Tensor):
    """A weight of a quantising library's class: F.linear multiplies by it, and nothing else can be done with it."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, *_):
        return cls(inner["inner"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            return cls.product(args[0], args[1].inner, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"{func} is not implemented")

    product = staticmethod(F.linear)


class QuantisedForInference(Quantised):
    """As with quantised activations: the product has no gradient."""

    @staticmethod
    def product(*args):
        return F.linear(*args).detach()


# the methods that compute from the weight's values in each forward
READS_THE_WEIGHT = {"diff_pruning", "dora", "liera"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", sorted(METHODS.keys() - READS_THE_WEIGHT))
def test_a_weight_quantised_afterwards_is_multiplied_by_its_own_class(name, dtype):
    """Same outputs and gradients as with the plain weight, to the rounding of one more sum."""
    layer = fp.PeftLinear.from_linear(nn.Linear(12, 10, dtype=dtype), METHODS[name].example(4))
    for tensor in layer.adapter_tensors():
        tensor.data += torch.randn_like(tensor) / 9
    found = []
    for weight in (layer.weight.detach(), Quantised(layer.weight.detach())):
        layer.weight = nn.Parameter(weight, requires_grad=False)
        x = torch.randn(2, 3, 12, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        y = layer(x)
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.adapter_tensors()])))
        assert found[-1][0].dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for quantised, plain in zip(found[1], found[0], strict=True):
        assert (quantised - plain).norm() <= tolerance * plain.norm()
    (row,) = fp.explain(nn.Sequential(layer), 8)
    assert row.backend in ("eager", "torch")


@pytest.mark.parametrize("name", sorted(READS_THE_WEIGHT))
def test_explain_says_which_layers_cannot_read_their_weight(name):
    layer = fp.PeftLinear.from_linear(nn.Linear(12, 10), METHODS[name].example(4))
    layer.weight = nn.Parameter(Quantised(layer.weight.detach()), requires_grad=False)
    (row,) = fp.explain(nn.Sequential(layer), 8)
    assert row.backend == "none"
    with pytest.raises(RuntimeError, match=f"weight of a {name} layer.*Quantised.*keep this layer unquantised"):
        layer(torch.randn(2, 12))


@pytest.mark.parametrize("name", METHODS)
def test_every_attribute_that_a_layer_sets_is_looked_for_on_the_users(name):
    plain = nn.Linear(8, 8)
    layer = fp.PeftLinear.from_linear(plain, METHODS[name].example(4))
    for attribute in layer.__dict__.keys() - plain.__dict__.keys():
        with pytest.raises(TypeError, match=f"attribute '{attribute}'"):
            fp.PeftLinear.from_linear(with_attribute(attribute, 1), METHODS[name].example(4))
