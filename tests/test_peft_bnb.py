"""fp.accelerate on PEFT's LoRA, AdaLoRA and (IA)³ layers on bitsandbytes': PEFT's numbers, W decoded and not kept."""

import copy
import importlib
import pickle
import pkgutil
import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

peft = pytest.importorskip("peft")
bnb = pytest.importorskip("bitsandbytes")

import test_accelerate  # noqa: E402
from test_accelerate import CONFIGS, agree, fused_calls, results  # noqa: E402

import fused_peft as fp  # noqa: E402
from fused_peft.core import frozen  # noqa: E402
from fused_peft.core.eager import Eager  # noqa: E402
from fused_peft.integrations.peft_unfused import why_unfused  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
same_masks = test_accelerate.same_masks
KINDS = ["nf4", "fp4+nested", "int8"]
FEW = ["lora", "adalora", "ia3"]
FUSED = {*FEW, "hira"}
K, H, N = 64, 48, 32


class Net(nn.Module):
    """Two quantised layers, as PEFT finds them in a model that Transformers loaded."""

    def __init__(self, kind, dtype):
        super().__init__()
        quant, _, nested = kind.partition("+")
        self.is_loaded_in_8bit, self.is_loaded_in_4bit = quant == "int8", quant != "int8"
        self.checkpoints = False

        def layer(K, N, bias):
            W = torch.randn(N, K) / K**0.5
            if quant == "int8":
                made = bnb.nn.Linear8bitLt(K, N, bias, has_fp16_weights=False)
                made.weight = bnb.nn.Int8Params(W, requires_grad=False, has_fp16_weights=False)
            else:
                options = {"quant_type": quant, "compress_statistics": bool(nested)}
                made = bnb.nn.Linear4bit(K, N, bias, dtype, **options)
                made.weight = bnb.nn.Params4bit(W, requires_grad=False, module=made, **options)
            if bias:
                made.bias.data = made.bias.data.to(dtype)
            return made.to("cpu")

        self.layers = nn.Sequential(layer(K, H, True), nn.Tanh(), layer(H, N, False))

    def forward(self, x):
        if self.checkpoints:
            return checkpoint(self.layers, x, use_reentrant=False)
        return self.layers(x)


def build(name, kind, dtype=torch.float32, **options):
    torch.manual_seed(0)
    names = ["layers.0", "layers.2"]
    if name == "ia3":  # PEFT looks for feedforward_modules among these, letter by letter
        names = ["0", "2"]
    options = {"target_modules": names, **options}
    model = peft.get_peft_model(Net(kind, dtype), CONFIGS[name](**options))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(0.3).add_(torch.rand_like(p) * 0.1)
    return model.train()


@pytest.mark.parametrize("part", ["fp32", "bf16-0", "bf16-2"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_numbers_as_peft(name, kind, part, same_masks, monkeypatch):
    """Entry by entry to 1e-5 in fp32; in norm to 1.5e-2 in bf16, layer by layer since they amplify the rounding."""
    dtype, i = (torch.float32, None) if part == "fp32" else (torch.bfloat16, int(part[-1]))
    model = build(name, kind, dtype)
    x = torch.randn(2, 7, H if i == 2 else K).to(dtype)
    if i is not None:
        model = model.base_model.model.layers[i]
    keys, own = set(model.state_dict()), [type(m) for m in model.modules()]
    want = results(model, x)
    same_masks()
    calls = fused_calls(monkeypatch)
    got = results(fp.accelerate(model), x)
    assert len(calls) == (2 if i is None else 1)
    agree(got, want, dtype, 1.5e-2)
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in want.items()}
    assert set(model.state_dict()) == keys
    same_masks()
    again = results(model, x)
    assert all(torch.equal(again[n], t) for n, t in got.items())
    calls.clear()
    same_masks()
    fp.restore(model)
    assert [type(m) for m in model.modules()] == own
    if (
        kind != "int8" or "dora" not in name
    ):  # of which PEFT's own second call fails: its norm leaves a weight without SCB
        back = results(model, x)
        assert all(torch.equal(back[n], want[n]) for n in want)
    assert not calls


def _doubled_dB(grads):
    return [*grads[:9], 2 * grads[9], *grads[10:]]


@pytest.mark.parametrize("mutant", ["doubled dB", "dx of another weight", "no adapter"])
def test_the_comparison_sees_a_mutant(mutant, same_masks, monkeypatch):
    backward, forward = Eager.backward, Eager.forward
    if mutant == "doubled dB":
        change = lambda self, *args: _doubled_dB(list(backward(self, *args)))  # noqa: E731
        monkeypatch.setattr(Eager, "backward", change)
    elif mutant == "dx of another weight":
        change = lambda self, dy, o, *args: backward(self, dy, o._replace(w=o.w.roll(1, 0)), *args)  # noqa: E731
        monkeypatch.setattr(Eager, "backward", change)
    else:
        change = lambda self, o, keep_z: forward(self, o._replace(s=0.0), keep_z)  # noqa: E731
        monkeypatch.setattr(Eager, "forward", change)
    with pytest.raises(AssertionError):
        test_the_same_numbers_as_peft("lora", "nf4", "fp32", same_masks, monkeypatch)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FEW)
def test_in_evaluation(name, kind):
    """4-bit layers as PEFT; of 8-bit ones bitsandbytes quantises x there, and the fused call does not."""
    model = build(name, kind).eval()
    x = torch.randn(5, K)
    with torch.no_grad():
        stock, trained = model(x), model.train()(x)
        fused = fp.accelerate(model).eval()(x)
    torch.testing.assert_close(fused, trained, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused, stock, rtol=1e-5, atol=0.05 if kind == "int8" else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "ia3"])
def test_explain_says_how(name, kind):
    model = build(name, kind)
    assert all("accelerate has not run on it" in row.why for row in fp.explain(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fp.accelerate(model)
    stored = {"nf4": "nf4 with a scale for 64 values", "fp4+nested": "fp4 with a scale for 64 values"}
    for row in fp.explain(model):
        assert (row.form, row.backend) == ("factors", "eager")
        assert row.why.startswith(f"{stored.get(kind, 'int8 with a scale a row')} (")
        assert "bits a value in all), decoded once each way; " in row.why


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lora", "lora-dropout", "dora-dropout", "adalora-dropout", "ia3"])
def test_what_is_kept(name, kind):
    """Nothing of W's shape in any dtype, and, beside the parts, no more than PEFT keeps."""
    model = fp.accelerate(build(name, kind, torch.bfloat16))
    kept = {}
    x = torch.randn(4, K, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t):
        model(x)
    parts = [t for m in model.modules() if not isinstance(kind_of := _kind(m), str) for t in kind_of.matrix(m).parts]
    own = {t.untyped_storage().data_ptr() for t in (*parts, *model.parameters())}
    left = [t for t in kept.values() if t.untyped_storage().data_ptr() not in own]
    assert left
    assert not [t for t in left if t.numel() >= min(K * H, H * N)]


def _kind(module):
    kind = frozen.kind_of(module) if isinstance(module, nn.Linear) else "no linear layer"
    return kind if isinstance(kind, str) or kind.packed else "dense"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FEW)
def test_checkpointing_and_autocast(name, kind):
    model = fp.accelerate(build(name, kind))
    x = torch.randn(6, K)
    plain = results(model, x)
    model.base_model.model.checkpoints = True
    again = results(model, x)
    assert all(torch.equal(again[n], t) for n, t in plain.items())
    with torch.autocast("cpu", torch.bfloat16):
        cast = results(model, x)
    assert cast["y"].dtype == torch.bfloat16
    for n, t in plain.items():
        assert (cast[n].float() - t.float()).norm() <= 3e-2 * t.float().norm(), n


@pytest.mark.parametrize("kind", KINDS)
def test_several_adapters_and_none(kind, monkeypatch):
    model, x = fp.accelerate(build("lora", kind)), torch.randn(4, K)
    first = model(x)
    model.add_adapter("other", CONFIGS["lora"](target_modules=["layers.0", "layers.2"]))
    calls = fused_calls(monkeypatch)
    model.set_adapter("other")
    other = model(x)
    assert len(calls) == 2
    mixed = model.eval()(x, adapter_names=["default", "other", "__base__", "default"])
    with model.disable_adapter():
        none = model.eval()(x)
    assert not any(getattr(m, "quant_state", None) and _packed(m) for m in model.modules())
    want = torch.stack([first[0], other[1], none[2], first[3]])
    torch.testing.assert_close(mixed, want, rtol=1e-5, atol=1e-5)
    stock = fp.restore(copy.deepcopy(model)).train()
    with stock.disable_adapter():
        torch.testing.assert_close(none, stock(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FEW)
def test_disabled_in_evaluation_repacks_nothing(name, kind, monkeypatch):
    model, x = fp.accelerate(build(name, kind)), torch.randn(4, K)
    stock = fp.restore(copy.deepcopy(model))
    calls = fused_calls(monkeypatch)
    with model.disable_adapter(), stock.disable_adapter():
        none = model.eval()(x)
        torch.testing.assert_close(none, stock(x), rtol=1e-5, atol=1e-5)
    assert len(calls) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_adapters_of_ia3(dtype, kind):
    """Two at once multiply; a batch of several has each sample's, and those of none."""
    model = build("ia3", kind, dtype)
    model.add_adapter("other", CONFIGS["ia3"](target_modules=["0", "2"]))
    x, alone = torch.randn(4, K).to(dtype), {}
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        want = model(x)
        alone[str(active)] = got = fp.accelerate(model)(x)
        assert got.dtype == want.dtype
        agree({"y": got}, {"y": want}, dtype, 1.5e-2)
        fp.restore(model)
    fp.accelerate(model)
    with fp.adapter_batch(model, ["other", "default", "other", "default"]):
        y = model(x)
    rows = [alone["other"][0], alone["default"][1], alone["other"][2], alone["default"][3]]
    agree({"y": y}, {"y": torch.stack(rows)}, dtype, 1.5e-2)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_rank_allocator_of_adalora(kind):
    """Its steps mask lora_E by the fused gradients as by PEFT's own."""
    models, x = [build("adalora", kind), fp.accelerate(build("adalora", kind))], torch.randn(6, K)
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(10):
            model(x).square().mean().backward()
            optimizer.step()
            fp.on_step(model, step)
            optimizer.zero_grad()
    stock, fused = ({n: p for n, p in model.named_parameters() if "lora_E" in n} for model in models)
    assert any((p == 0).any() for p in stock.values())
    for n, p in stock.items():
        torch.testing.assert_close(fused[n], p, rtol=1e-4, atol=1e-6)


MODULES = [name for _, name, _ in pkgutil.walk_packages(peft.tuners.__path__, "peft.tuners.")]
OF_BNB = sorted(name.split(".")[2] for name in MODULES if name.endswith(".bnb"))


def test_the_methods_with_classes_of_their_own():
    assert {"lora", "adalora", "ia3"} < set(OF_BNB)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", OF_BNB)
def test_every_method_of_peft_on_them(method, kind):
    """Whatever PEFT has classes for is fused, or keeps PEFT's forward, bit for bit, with one warning that says so."""
    own = getattr(peft.PeftType, method.upper())
    more = {"lora": {"init_lora_weights": False}, "ia3": {"feedforward_modules": ["2"]}, "adalora": {"total_step": 9}}
    more["road"] = {"group_size": 16}
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[own](target_modules=["0", "2"], **more.get(method, {}))
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(kind, torch.float32), config)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]
    assert [type(layer).__module__ for layer in layers] == [f"peft.tuners.{method}.bnb"] * 2
    if method == "pvera":  # which draws noise in training
        model.eval()
    x, was = torch.randn(3, K), type(layers[0])
    want = model(x)
    said = test_accelerate.warned(fp.accelerate, model)
    if method in FUSED:
        assert not said
        assert type(layers[0]) is not was
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
        return
    reason = f"peft.tuners.{method}.bnb.{was.__name__} has no fused form: {why_unfused(was)}"
    (said,) = said
    assert said.startswith(f"accelerate fused 0 of 2 PEFT layers; 2 keep PEFT's forward: {reason} (2, e.g. ")
    assert [type(layer) for layer in layers] == [was] * 2
    assert [(row.backend, row.why) for row in fp.explain(model)] == [("peft", reason)] * 2
    assert torch.equal(model(x), want)


QUANTISED = {  # PEFT's other files of quantised layers -> what they ask for before they define any, and import
    "adalora.gptq": None,
    "lora.aqlm": ("is_aqlm_available", "aqlm"),
    "lora.awq": None,
    "lora.eetq": ("is_eetq_available", "eetq"),
    "lora.gptq": None,
    "lora.hqq": ("is_hqq_available", "hqq.core.quantize"),
    "lora.inc": ("is_inc_available", None),
    "lora.te": ("is_te_pytorch_available", "transformer_engine"),
}


class _Anything(types.ModuleType):
    """A library that is not installed."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (nn.Module,), {})


@pytest.mark.parametrize("file", QUANTISED)
def test_peft_s_other_quantised_layers_keep_its_forward(file, monkeypatch):
    """Counted by reason and listed; their class, which may need a library that is not there, decides."""
    available, library = QUANTISED[file] or (None, None)
    if available is not None:
        monkeypatch.setattr(peft.import_utils, available, lambda: True)
    parts = library.split(".") if library else []
    for i in range(len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[: i + 1]), _Anything(parts[i]))
    found = importlib.util.find_spec(f"peft.tuners.{file}")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    base = peft.tuners.tuners_utils.BaseTunerLayer
    kinds = [k for k in vars(module).values() if isinstance(k, type) and issubclass(k, base)]
    (kind,) = [k for k in kinds if k.__module__ == module.__name__]
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer._active_adapter = "default"
    model = nn.Sequential(layer)
    model.peft_config = {}
    kind.__module__ = f"peft.tuners.{file}"
    reason = f"peft.tuners.{file}.{kind.__name__} has no fused form: {why_unfused(kind)}"
    (said,) = test_accelerate.warned(fp.accelerate, model)
    assert f"accelerate fused 0 of 1 PEFT layers; 1 keep PEFT's forward: {reason} (1, e.g. 0)" in said
    assert [(row.backend, row.why) for row in fp.explain(model)] == [("peft", reason)]
    assert type(fp.restore(model)[0]) is kind


def test_no_file_of_quantised_layers_is_forgotten():
    """Those whose name is that of no part of a method, nor of bitsandbytes and torchao."""
    usual = {"aqlm", "awq", "eetq", "gptq", "hqq", "inc", "te"}
    files = {n.removeprefix("peft.tuners.") for n in MODULES if n.rpartition(".")[2] in usual}
    assert files == set(QUANTISED)


def _packed(module):
    return getattr(module.quant_state, "packing_format_for_cpu", False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dora", "adalora", "ia3"])
def test_copies_and_pickles_stay_accelerated(name, kind, monkeypatch):
    model, x = fp.accelerate(build(name, kind)), torch.randn(3, K)
    y = model(x)
    calls = fused_calls(monkeypatch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
    assert len(calls) == 4


def test_the_norm_of_a_new_weight_is_not_the_old_ones():
    """DoRA's row norms are kept by the weight's storage and version, not by the decoded copy's address."""
    model, x = fp.accelerate(build("dora", "nf4")), torch.randn(3, K)
    layer = model.base_model.model.layers[0]
    before = layer(x)
    kept = layer._fused_peft_norm2[2]
    assert layer(x) is not before
    assert layer._fused_peft_norm2[2] is kept
    base = layer.base_layer
    with torch.no_grad():
        base.weight.copy_(base.weight.flip(0))
        want = fp.restore(copy.deepcopy(model)).base_model.model.layers[0](x)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def test_merging_is_peft_s_own():
    models = [build("lora", "nf4"), fp.accelerate(build("lora", "nf4"))]
    x = torch.randn(3, K)
    for model in models:
        model.merge_adapter()
    assert torch.equal(models[0].train()(x), models[1].train()(x))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_weight_that_cannot_be_read_keeps_peft_s_forward(kind):
    model = build("lora", kind)
    base = model.base_model.model.layers[0].base_layer
    if kind == "nf4":
        base.weight.quant_state.packing_format_for_cpu = True
        reason = "bitsandbytes repacked its weight for inference on this CPU"
    else:
        base.weight.SCB = base.state.SCB = None
        reason = "its weight has lost the scales"
    with pytest.warns(UserWarning, match=rf"accelerate fused 1 of 2 PEFT layers; 1 keep PEFT's forward.*{reason}"):
        fp.accelerate(model)
    assert reason in fp.explain(model)[0].why


def test_hooks_on_the_base_keep_its_own_product(monkeypatch):
    model, x = fp.accelerate(build("lora", "nf4")), torch.randn(3, K)
    y, seen = model(x), []
    model.base_model.model.layers[0].base_layer.register_forward_hook(lambda m, a, out: seen.append(out))
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1
    assert "beside the product of a Linear4bit" in fp.explain(model)[0].why


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", FEW)
def test_compiled(name, kind):
    model, x = fp.accelerate(build(name, kind)), torch.randn(3, K)
    want = results(model, x)
    compiled = torch.compile(model, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, want["y"], rtol=1e-5, atol=1e-5)
    y.float().square().sum().backward()
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, want[n], rtol=1e-4, atol=1e-5)
