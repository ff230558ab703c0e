"""fp.accelerate on the methods that fewer use: PEFT's numbers, and every class of its layers fused or explained."""

import copy
import importlib
import pickle
import pkgutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

import test_accelerate  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from test_accelerate import ALL, DELORA, GRALORA, MORE, Even, R, agree, beside, build, close, fused_calls, results  # noqa: E402

import fused_peft as fp  # noqa: E402
from fused_peft.core.eager import Eager  # noqa: E402
from fused_peft.integrations import peft_methods, peft_unfused  # noqa: E402
from fused_peft.integrations.peft import FUSED  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
same_masks = test_accelerate.same_masks
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
PLAIN = [name for name in MORE if "dropout" not in name and name != "gralora-hybrid"]


def made(name, dtype=torch.float32, **options):
    """With adapters in fp32 where the base is in bf16, as PEFT has them."""
    return build(name, torch.float32 if dtype == torch.float64 else dtype, **options).to(
        dtype if dtype == torch.float64 else None
    )


def fuses(name, dtype=torch.float32, training=False):
    method, _, kind = name.partition("-")
    if method not in ("gralora", "miss") or dtype == torch.bfloat16:
        return True
    return training and kind in ("dropout", "hybrid")


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MORE)
def test_the_same_numbers_as_peft(name, dtype, training, same_masks, monkeypatch):
    """y, dx and every gradient: entry by entry in fp64 to 1e-10 and in fp32 to 1e-5, in norm in bf16."""
    dtype = DTYPES[dtype]
    names = ["layers.2"] if dtype == torch.bfloat16 else ["layers.0", "layers.2"]
    model = made(name, dtype, target_modules=names).train(training)
    keys, x = list(model.state_dict()), torch.randn(2, 7, 8).to(dtype)
    want = results(model, x)
    same_masks()
    calls = fused_calls(monkeypatch)
    got = results(fp.accelerate(model), x)
    hybrid = 2 if name == "gralora-hybrid" else 1
    assert len(calls) == (hybrid * len(names) if fuses(name, dtype, training) else 0)
    if dtype == torch.float64:
        close(got, want, 1e-10)
    agree(got, want, dtype)
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in want.items()}
    assert list(model.state_dict()) == keys
    calls.clear()
    same_masks()
    again = results(fp.restore(model), x)
    assert not calls
    assert all(torch.equal(again[n], want[n]) for n in want)


@pytest.mark.parametrize("mutant", ["doubled dB", "scale"])
@pytest.mark.parametrize("name", [name for name in MORE if fuses(name, training=True)])
def test_the_comparison_sees_a_mutant(name, mutant, same_masks, monkeypatch):
    backward, forward = Eager.backward, Eager.forward
    if mutant == "scale":
        monkeypatch.setattr(Eager, "forward", lambda self, o, z: forward(self, o._replace(s=1.1 * o.s), z))
    else:
        place = 6 if name == "mica" else 9  # whose B does not train: dA
        change = lambda self, *args: [g if i != place else 2 * g for i, g in enumerate(backward(self, *args))]  # noqa: E731
        monkeypatch.setattr(Eager, "backward", change)
    with pytest.raises(AssertionError):
        test_the_same_numbers_as_peft(name, "fp32", True, same_masks, monkeypatch)


def pair(name, dtype=torch.float32):
    """The same model twice, with two adapters: PEFT's own, and accelerated."""
    models = []
    for _ in range(2):
        model = made(name)
        config = MORE[name](target_modules=["layers.0"])
        torch.manual_seed(7)
        model.add_adapter("second", config)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if ".second" in key:
                    p.mul_(0.3).add_(torch.rand_like(p) * 0.1)
        models.append(model)
    fp.accelerate(models[1])
    return models


@pytest.mark.parametrize("name", PLAIN)
def test_several_adapters_merging_and_none(name, monkeypatch):
    stock, fast = pair(name)
    x, calls = torch.randn(4, 8), fused_calls(monkeypatch)
    for active, fused in (("default", 2), ("second", 1), (["default", "second"], 2 if name == "hira" else 3)):
        for model in (stock, fast):
            model.base_model.set_adapter(active)
        want = results(stock, x)
        calls.clear()
        close(results(fast, x), want, 1e-5)
        assert len(calls) == (fused if fuses(name) else 0)
    calls.clear()
    with stock.disable_adapter(), fast.disable_adapter():
        assert torch.equal(fast(x), stock(x))
    for model in (stock, fast):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(fast(x), stock(x))
    assert not calls
    for model in (stock, fast):
        model.unmerge_adapter()
        model.delete_adapter("default")
        model.base_model.set_adapter("second")
    close(results(fast, x), results(stock, x), 1e-5)
    assert repr(fast) == repr(stock)
    assert type(fast.merge_and_unload().layers[0]) is nn.Linear


@pytest.mark.parametrize("name", PLAIN)
def test_saving_copies_and_pickles(name, tmp_path):
    stock, fast = pair(name)
    for i, model in enumerate((stock, fast)):
        model.save_pretrained(tmp_path / str(i))
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "1" / file).read_bytes()
    x = torch.randn(3, 8)
    want, loaded = stock(x), peft.PeftModel.from_pretrained(copy.deepcopy(stock).unload(), tmp_path / "1")
    for other in (fp.accelerate(loaded), copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        torch.testing.assert_close(other(x), want, rtol=1e-5, atol=1e-6)
        assert all(row.form != "PEFT's" for row in fp.explain(other)) == fuses(name)


@pytest.mark.parametrize("name", PLAIN)
def test_a_batch_of_several_adapters(name):
    _, model = pair(name)
    model.base_model.set_adapter(["default", "second"])
    x, alone = torch.randn(4, 3, 8), {}
    if not fuses(name):
        return
    for active in ("default", "second"):
        model.base_model.set_adapter(active)
        alone[active] = model(x)
    model.base_model.set_adapter(["default", "second"])
    with model.disable_adapter():
        alone["__base__"] = model(x)
    names = ["second", "default", "__base__", "second"]
    with fp.adapter_batch(model, names):
        y = model(x)
    want = torch.stack([alone[n][i] for i, n in enumerate(names)])
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PLAIN)
def test_autocast(name):
    model, x = made(name), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = results(model, x)
        got = results(fp.accelerate(model), x)
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in want.items()}
    for n, reference in want.items():
        assert (got[n].float() - reference.float()).norm() <= 2e-2 * reference.float().norm(), n


@pytest.mark.parametrize("second", [False, True], ids=["", "two"])
@pytest.mark.parametrize("kind", ["FalconLinear", "Doubling", "Linear, hooks"])
@pytest.mark.parametrize("name", MORE)
def test_adapters_act_beside_a_product_of_its_own(name, kind, second, same_masks, monkeypatch):
    model, x = beside(kind, name, second=second), torch.randn(2, 5, 8)
    want = results(model, x)
    same_masks()
    calls = fused_calls(monkeypatch)
    close(results(fp.accelerate(model), x), want, 1e-5)
    (row,) = fp.explain(model)
    assert row.form == ("PEFT's" if name == "hira" or not fuses(name, training=True) else "beside")
    assert bool(calls) == (row.form == "beside")
    if name == "hira":
        assert "HiRA multiplies the weight" in row.why


@pytest.mark.parametrize("name", PLAIN)
def test_compiled(name):
    model, x = made(name), torch.randn(4, 8)
    want = model(x)
    torch._dynamo.reset()
    y = torch.compile(fp.accelerate(model), backend="aot_eager", fullgraph=fuses(name))(x)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["vera", "vera-dropout", "hira", "miss"])
def test_on_layers_of_bitsandbytes(name, kind, same_masks, monkeypatch):
    pytest.importorskip("bitsandbytes")
    from test_peft_bnb import Net

    torch.manual_seed(0)
    config = MORE[name](target_modules=["layers.0", "layers.2"])
    model = peft.get_peft_model(Net(kind, torch.float32), config).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(0.3).add_(torch.rand_like(p) * 0.1)
    x = torch.randn(2, 7, 64)
    want = results(model, x)
    same_masks()
    calls = fused_calls(monkeypatch)
    close(results(fp.accelerate(model), x), want, 1e-5)
    assert len(calls) == 2
    assert all("decoded once each way" in row.why for row in fp.explain(model))


def test_a_trace_leaves_nothing_behind():
    """MiSS keeps its A for all layers of a width, but not the stand-in of one that a trace makes, nor inference's."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, x = fp.accelerate(made("miss-dropout")), torch.randn(3, 8)
    peft_methods._SUMS.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(torch.randn(3, 8))
    assert not peft_methods._SUMS
    with torch.inference_mode():
        model(x)
    assert len(peft_methods._SUMS) == 2
    results(model, x)


UNFUSED = {
    "HiRA with dropout": (lambda: peft.HiraConfig(r=3, hira_dropout=0.2, init_weights=False), "HiRA with dropout"),
    "MiSS, bat": (lambda: peft.MissConfig(r=2, init_weights="bat"), "multiplies blocks of the weight"),
    "GraLoRA, one dtype": (lambda: peft.GraloraConfig(**GRALORA), "without dropout in the weight's dtype"),
    "MiSS, one dtype": (lambda: peft.MissConfig(r=2, init_weights=False), "without dropout in the weight's dtype"),
    "GraLoRA, 4 x 4": (
        lambda: peft.GraloraConfig(r=4, gralora_k=4, gralora_dropout=0.1, init_weights=False),
        "4 x 4 blocks",
    ),
    "VeRA, wide": (lambda: peft.VeraConfig(r=256, init_weights=False), "VeRA of rank 256, on a CPU"),
}


@pytest.mark.parametrize("kind", UNFUSED)
def test_what_keeps_peft_s_forward_says_why(kind, same_masks):
    make, why = UNFUSED[kind]
    config = make()
    config.target_modules = {"0"}
    torch.manual_seed(0)
    model, x = peft.get_peft_model(nn.Sequential(nn.Linear(8, 12)), config), torch.randn(2, 3, 8)
    want = results(model, x)
    (said,) = test_accelerate.warned(fp.accelerate, model)
    assert why in said
    assert why in fp.explain(model)[0].why
    same_masks()
    got, again = results(model, x), results(fp.restore(model), x)
    if "dropout" not in kind and "4 x 4" not in kind:
        assert all(torch.equal(got[n], t) for n, t in want.items())
        assert all(torch.equal(again[n], t) for n, t in want.items())


def test_kasa_s_truncation_comes_first():
    """Of an adapter made on the meta device PEFT truncates the base in its first call, and the fused one goes on."""
    config = MORE["kasa"](target_modules=["layers.0"])
    torch.manual_seed(0)
    model = peft.get_peft_model(Even(), config, low_cpu_mem_usage=True)
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(build("kasa", target_modules=["layers.0"])),
                                   low_cpu_mem_usage=True)  # fmt: skip
    fp.accelerate(model)
    assert "PEFT's next call is to truncate the weight first" in fp.explain(model)[0].why
    x = torch.randn(3, 8)
    first = model(x)
    assert fp.explain(model)[0].form == "factors"
    torch.testing.assert_close(model(x), first, rtol=1e-5, atol=1e-6)


def _every_class():
    found = {}
    for _, name, _ in pkgutil.walk_packages(peft.tuners.__path__, "peft.tuners."):
        try:
            module = importlib.import_module(name)
        except ImportError:  # of a library that is not installed; the quantised ones: test_peft_bnb.py
            continue
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, BaseTunerLayer) and kind.__module__ == name:
                if issubclass(kind, nn.Module):
                    found[f"{name}.{kind.__name__}"] = kind
    return found


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    EVERY = _every_class()


def test_every_layer_of_peft_is_fused_or_says_why_not():
    """A new tuner of PEFT's, or a new class of an accelerated one, has neither."""
    if importlib.util.find_spec("bitsandbytes"):
        importlib.import_module("fused_peft.integrations.peft_bnb")
    fused = {kind for kind in EVERY.values() if kind in FUSED}
    reasons = {name: peft_unfused.why_unfused(kind) for name, kind in EVERY.items() if kind not in fused}
    assert not [name for name, reason in reasons.items() if reason is None]
    assert len(fused) >= 12
    assert not [kind for kind in fused if peft_unfused.why_unfused(kind)]


ELSEWHERE = {"Embedding": "accelerate_embedding", "ParamWrapper": "experts_peft", "TorchaoLoraLinear": "peft_packed"}


def test_every_fused_class_is_compared():
    """Here, in test_accelerate.py, or in the file that is named; bitsandbytes': test_peft_bnb.py and above."""
    reached = {type(layer) for name in ALL for layer in build(name).modules() if isinstance(layer, BaseTunerLayer)}
    left = {kind for kind in FUSED if kind not in reached and not kind.__module__.endswith(".bnb")}
    assert {kind.__name__ for kind in left} == set(ELSEWHERE)
    for file in ELSEWHERE.values():
        assert (Path(__file__).parent / f"test_{file}.py").exists()


def test_no_reason_is_of_a_layer_that_is_gone():
    methods = {name.split(".")[2] for name in EVERY}
    assert set(peft_unfused._METHODS) <= methods
    assert set(peft_unfused._NAMES) <= {kind.__name__ for kind in EVERY.values()}
    assert {f"peft.tuners.{name.replace('.', '.layer.')}" for name in peft_unfused._CLASSES} <= {
        name.replace("tp_layer", "layer") for name in EVERY
    }


def test_a_new_class_would_have_neither():
    kind = type("Linear9", (peft.tuners.lora.Linear,), {"__module__": "peft.tuners.lora.layer"})
    assert peft_unfused.why_unfused(kind) is None


def test_convolutions_and_attention_say_why():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.attention = nn.Conv2d(1, 2, 3), nn.MultiheadAttention(8, 2)

    model = peft.get_peft_model(Two(), peft.LoraConfig(**R, target_modules=["conv", "attention"]))
    (said,) = test_accelerate.warned(fp.accelerate, model)
    why = {row.name.rpartition(".")[2]: row.why for row in fp.explain(model)}
    assert why["conv"] == "peft.tuners.lora.layer.Conv2d has no fused form: a convolution is no product with one matrix"
    assert why["attention"].endswith("nn.MultiheadAttention computes with its weights itself and calls no linear layer")
    assert said.count(why["conv"]) == said.count(why["attention"]) == 1


def test_delora_of_small_norms():
    """Below 1e-4 the norms count as that, and pass no gradient."""
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), peft.DeloraConfig(**DELORA, target_modules=["0"]))
    with torch.no_grad():
        model.base_model.model[0].delora_B["default"].mul_(1e-6)
    x = torch.randn(3, 8)
    want = results(model, x)
    close(results(fp.accelerate(model), x), want, 1e-5)
