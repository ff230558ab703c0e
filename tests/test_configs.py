"""This library's configs are Hugging Face PEFT's: every method through PEFT's doors, whichever was imported first."""

import copy
import dataclasses
import importlib.util
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from cases import CASES
from safetensors.torch import load_file
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from test_accelerate import warned  # noqa: E402
from test_register import Net, configured, shaken  # noqa: E402

import fused_peft as fp  # noqa: E402
from fused_peft.core import imports  # noqa: E402
from fused_peft.integrations import tuners  # noqa: E402
from fused_peft.integrations.peft import FUSED  # noqa: E402
from fused_peft.methods import METHODS, method_of  # noqa: E402
from fused_peft.model import adapter_config, prompt  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
HAD = [c for c in CASES if c.make(3).peft_type not in tuners.REGISTERED]
TAKEN = [c for c in HAD if not c.name.endswith(("+n", "+unscaled_bias")) and c.method != "milora"]
EVERY = {**{name: m.example(2) for name, m in METHODS.items()}, **{t.lower(): c() for t, c in prompt.CONFIGS.items()}}


@pytest.mark.parametrize("name", EVERY)
def test_every_config_is_one_of_peft_s_and_stays_itself(name):
    config = EVERY[name]
    assert isinstance(config, peft.PeftConfig)
    assert config.peft_type in peft.PeftType
    assert isinstance(config.peft_type, peft.PeftType)
    assert config.peft_version is None  # no field of ours
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other == config
        assert type(other) is type(config)
    assert dataclasses.replace(config) == config
    assert set(dataclasses.asdict(config)) == {f.name for f in dataclasses.fields(config)}
    assert repr(config).startswith(type(config).__name__ + "(")
    with pytest.raises(AttributeError, match="already built"):
        config.in_use().target_modules = ["q"]
    assert json.loads(json.dumps(config.to_dict()))["peft_type"] == config.peft_type


@pytest.mark.parametrize("name", [name for name in EVERY if name != "milora"])
def test_to_peft_is_what_our_file_says(name, tmp_path):
    config = EVERY[name]
    own = config.to_peft()
    if config.peft_type in tuners.REGISTERED:
        assert own is config
        return
    assert type(own).__module__.startswith("peft.")
    adapter_config.write_config(config, tmp_path)
    read = peft.PeftConfig.from_pretrained(tmp_path)
    read.inference_mode = False
    assert own == read


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            fp.LoraConfig(nonlinearity="relu"),
            "nonlinearity='relu' of fused_peft.LoraConfig has no counterpart",
        ),
        (fp.IA3Config(scale_bias=False), "scale_bias=False of fused_peft.IA3Config"),
        (
            fp.MiloraConfig(),
            "init_lora_weights='milora' of fused_peft.MiloraConfig is a start that peft.L",
        ),
        (fp.AdaLoraConfig(total_step=9, nonlinearity="tanh"), "nonlinearity='tanh'"),
    ],
    ids=lambda v: type(v).__name__,
)
@pytest.mark.parametrize("door", ["get_peft_model", "add_adapter", "inject_adapter_in_model"])
def test_what_peft_cannot_mean_is_refused_before_any_change(config, message, door):
    config.target_modules, model = ["layers.0"], Net()
    if door == "add_adapter":
        model = peft.get_peft_model(model, _plain(config))
    before = [type(m) for m in model.modules()], model.state_dict().keys()
    act = {
        "add_adapter": lambda: model.add_adapter("other", config),
        "get_peft_model": lambda: peft.get_peft_model(model, config),
        "inject_adapter_in_model": lambda: peft.inject_adapter_in_model(config, model),
    }
    with pytest.raises(ValueError, match=message):
        act[door]()
    assert ([type(m) for m in model.modules()], model.state_dict().keys()) == before


def _plain(config):
    """A config of the same type that PEFT takes."""
    kind = {"LORA": peft.LoraConfig, "IA3": peft.IA3Config, "ADALORA": peft.AdaLoraConfig}[config.peft_type]
    more = {"feedforward_modules": []} if kind is peft.IA3Config else {}
    more |= {"total_step": 9} if kind is peft.AdaLoraConfig else {}
    return kind(target_modules=["layers.0"], **more)


def given(case):
    """The case's config as PEFT takes it for a model that it knows no defaults of."""
    config = configured(case)
    if hasattr(config, "feedforward_modules") and config.feedforward_modules is None:
        config.feedforward_modules = []
    return config


def shaken_but_ranks(model):
    """PEFT has how many ranks are in use as a parameter that trains."""
    counts = {n: p.detach().clone() for n, p in model.named_parameters() if "ranknum" in n}
    shaken(model).load_state_dict(counts, strict=False)
    return model


def results(model, x):
    """y, dx, and the state_dict with gradients in the place of what trains."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    y = model(x)
    y.square().sum().backward()
    state = dict(model.state_dict())
    return y.detach(), x.grad, state | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", TAKEN, ids=lambda c: c.name)
def test_the_numbers_are_those_of_fp_get_peft_model_with_the_same_tensors(case, tmp_path):
    """Forward, dx and every gradient; the file is PEFT's and stock PEFT loads it."""
    config = given(case)
    before = copy.deepcopy(config)
    # PEFT starts from an SVD or QR in half or single precision only
    dtype, eps = (torch.float32, 1e-5) if method_of(config).from_weight else (torch.float64, 1e-9)
    theirs = shaken_but_ranks(peft.get_peft_model(Net().to(dtype), config))
    assert type(theirs.peft_config["default"]) is type(before.to_peft())
    assert config == before  # the caller's is not edited
    assert not any(type(m) in FUSED for m in theirs.modules())  # accelerated where there is a fused form
    theirs.save_pretrained(tmp_path / "theirs")
    ours = fp.load_adapter(Net().to(dtype), tmp_path / "theirs")
    x = torch.randn(3, 8, dtype=dtype)
    if "dropout" in case.name:  # masks are not comparable
        ours.eval(), theirs.eval()
    (y, dx, state), (y_, dx_, state_) = results(ours, x), results(theirs, x)
    close = {"rtol": eps, "atol": eps}
    torch.testing.assert_close(y_, y, **close)
    torch.testing.assert_close(dx_, dx, **close)
    assert (y - Net().to(dtype)(x)).abs().max() > 1e-3
    fp.save_pretrained(ours, tmp_path / "ours", state_dict=state)
    theirs.save_pretrained(tmp_path / "gradients", state_dict=state_)
    a, b = (load_file(tmp_path / f"{folder}/adapter_model.safetensors") for folder in ("ours", "gradients"))
    assert b.keys() <= a.keys()
    for key, gradient in b.items():
        torch.testing.assert_close(a[key], gradient, rtol=10 * eps, atol=10 * eps, msg=key)
    stock = peft.PeftModel.from_pretrained(Net().to(dtype), tmp_path / "theirs").eval()
    assert not any(type(m) in FUSED.values() for m in stock.modules())
    torch.testing.assert_close(stock(x), theirs.eval()(x), **close)


def test_adapters_that_a_config_adds_are_accelerated_and_those_of_peft_s_own_are_not():
    config = fp.LoraConfig(r=2, target_modules=["layers.0"])
    model = peft.get_peft_model(Net(), config.to_peft())
    assert type(model.base_model.model.layers[0]) is peft.tuners.lora.Linear
    assert not warned(model.add_adapter, "second", fp.LoraConfig(r=2, target_modules=["layers.2"]))
    assert [type(model.base_model.model.layers[i]) in FUSED for i in (0, 2)] == [True, False]
    mixed = peft.get_peft_model(Net(), config, mixed=True)
    mixed.add_adapter("second", fp.LoraConfig(r=3, target_modules=["layers.2"]))
    assert [type(mixed.base_model.model.layers[i]) in FUSED.values() for i in (0, 2)] == [True, True]
    said = warned(peft.get_peft_model, Net(), fp.VeraConfig(r=129, target_modules=["layers.0"]))  # too many, on a CPU
    assert any("accelerate fused 0 of 1 PEFT layers" in text for text in said)
    assert (
        fp.restore(peft.get_peft_model(Net(), config)).base_model.model.layers[0].__class__ is peft.tuners.lora.Linear
    )


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=40))


IDS = torch.arange(12).reshape(2, 6)
ON_ATTENTION = {"target_modules": ["q_proj", "v_proj"]}


def logits(model):
    return model.eval()(input_ids=IDS).logits


# not DoRA: Transformers does not find its magnitudes, stock PEFT's either
@pytest.mark.parametrize("config", [fp.SSBConfig, fp.FloraConfig, fp.LoraConfig], ids=lambda c: c.__name__)
def test_transformers_own_adapters(config, tmp_path, monkeypatch):
    """model.add_adapter, save_pretrained, load_adapter and from_pretrained of an adapter's folder."""
    monkeypatch.setattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0.18.0")  # a later one than PEFT's newest
    llama().save_pretrained(tmp_path / "base")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model.add_adapter(config(**ON_ATTENTION))
    assert not any(type(m) in FUSED for m in model.modules())
    want = logits(shaken(model))
    assert (want - logits(llama())).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    again.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(again), want, rtol=0, atol=1e-5)
    again.disable_adapters()
    torch.testing.assert_close(logits(again), logits(llama()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [fp.SSBConfig, fp.LoraConfig], ids=lambda c: c.__name__)
@pytest.mark.parametrize("kind", ["AutoPeftModel", "AutoPeftModelForCausalLM"])
def test_auto_models_find_base_and_adapter(config, kind, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    task = None if kind == "AutoPeftModel" else "CAUSAL_LM"
    model = shaken(peft.get_peft_model(base, config(task_type=task, **ON_ATTENTION)))
    model.save_pretrained(tmp_path / "adapter")
    found = getattr(peft, kind).from_pretrained(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(found), logits(model), rtol=0, atol=1e-6)


def test_a_config_of_a_file_s_entries():
    """peft.get_peft_config and PeftConfig.from_peft_type hand over the peft_type too."""
    config = fp.FloraConfig(r=3, target_modules=["layers.0"])
    entries = {"r": 3, "target_modules": ["layers.0"]}
    assert peft.get_peft_config({"peft_type": "FLORA", **entries}) == config
    assert peft.PeftConfig.from_peft_type(peft_type="FLORA", **entries) == config
    with pytest.raises(fp.AdapterFormatError, match="nonsense"):
        peft.get_peft_config({"peft_type": "FLORA", "nonsense": 3})


def test_soft_prompts_become_peft_s(tmp_path):
    for kind in prompt.CONFIGS.values():
        model = peft.get_peft_model(llama(), kind(num_virtual_tokens=3, task_type="CAUSAL_LM"))
        assert type(model.active_peft_config).__module__.startswith("peft.")
        model(input_ids=IDS, labels=IDS).loss.backward()
        model.save_pretrained(tmp_path / kind.__name__)
        ours = fp.load_adapter(llama(), tmp_path / kind.__name__)
        torch.testing.assert_close(logits(ours), logits(model), rtol=0, atol=1e-5)


def test_kasa_is_peft_s_update_on_a_weight_that_is_not_truncated(tmp_path):
    """One name, two weights: PEFT's KaSA takes the r smallest singular values out of W, ours leaves W alone."""
    lower = peft.LoraConfig(r=2, lora_alpha=6, target_modules=["layers.0"], kasa_config=peft.KasaConfig())
    theirs = shaken(peft.get_peft_model(Net(), lower)).double()
    layer, W = theirs.base_model.model.layers[0], Net().layers[0].weight.double()
    U, S, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(layer.base_layer.weight, U[:, :6] * S[:6] @ Vh[:6], rtol=0, atol=1e-6)
    base = Net().double()
    base.layers[0].weight.data.copy_(layer.base_layer.weight)
    ours = fp.get_peft_model(base, fp.KasaConfig(r=2, lora_alpha=6, target_modules=["layers.0"]))
    parts = {
        "lora_A": layer.lora_A.default.weight,
        "lora_B": layer.lora_B.default.weight,
        "lora_diag": layer.lora_diag.default,
    }
    ours.layers[0].load_state_dict({k: v.detach() for k, v in parts.items()}, strict=False)
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    assert fp.KasaConfig.peft_type not in ("LORA", *{m.value for m in peft.PeftType} - tuners.REGISTERED)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(fp.AdapterFormatError, match=r"kasa_config.*load this adapter with PEFT"):
        fp.load_adapter(Net(), tmp_path)


# --- whichever is imported first --------------------------------------------------------------------------------------

IMPORTS = {
    "config made before": """
configs = [fp.SSBConfig(target_modules=["0"]), fp.LoraConfig(r=2, target_modules=["0"])]
assert not {"peft", "transformers"} & {*sys.modules}
importlib.util.find_spec("peft")  # is it there? that is no import of it
stored = pickle.dumps(configs)
from peft.utils import PeftType  # a submodule
assert isinstance(configs[1].to_peft(), sys.modules["peft"].LoraConfig)
assert pickle.loads(stored) == configs
assert fp.SSBConfig.peft_type is PeftType.SSB
assert "exec_module" not in vars(sys.modules["peft"].__spec__.loader)
""",
    "no config made": "",
    "the file that registers": "from fused_peft.integrations import tuners",
    "peft before": None,
}


@pytest.mark.parametrize("order", IMPORTS)
def test_the_order_of_imports_does_not_matter(order, tmp_path):
    torch.manual_seed(0)
    model = shaken(peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), fp.FloraConfig(r=2, target_modules=["0"])))
    model.save_pretrained(tmp_path)
    first, meanwhile = ("import peft", "") if IMPORTS[order] is None else ("", IMPORTS[order])
    script = f"""
import importlib.util, pickle, sys
{first}
import fused_peft as fp
{meanwhile}
from peft import PeftConfig, PeftModel, get_peft_model
import torch
torch.manual_seed(0)
base = torch.nn.Sequential(torch.nn.Linear(4, 4))
print(PeftModel.from_pretrained(base, sys.argv[1])(torch.ones(1, 4)).tolist())
for config in (fp.SSBConfig(target_modules=["0"]), fp.LoraConfig(r=2, target_modules=["0"])):
    assert isinstance(config, PeftConfig)
    get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config)
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout)[0] == pytest.approx(model.eval()(torch.ones(1, 4))[0].tolist(), abs=1e-6)


def test_a_failure_while_meeting_peft_is_a_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "fused_peft.integrations.peft", None)
    (text,) = (str(w.message) for w in _caught(fp._meet_peft))
    assert "will not take this library's configs" in text


def _caught(act):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return caught


def test_acting_after_an_import(tmp_path, monkeypatch):
    """Once, after the module is complete, whatever asked for its spec before and however often its import failed."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "awaited").mkdir()
    root, part = tmp_path / "awaited/__init__.py", tmp_path / "awaited/part.py"
    root.write_text("raise RuntimeError('half way')")
    part.write_text("x = 1")
    seen = []
    for name in ("first", "second"):
        imports.after_import(
            "awaited", lambda name=name: seen.append((name, sys.modules["awaited"].__dict__.get("done")))
        )
    imports.after_import("awaited.never", lambda: seen.append("never"))
    assert importlib.util.find_spec("awaited") is not None
    with pytest.raises(RuntimeError, match="half way"):
        importlib.import_module("awaited")
    assert seen == []
    root.write_text("from . import part\ndone = 'done'\n")
    importlib.invalidate_caches()
    importlib.import_module("awaited.part")
    assert sorted(seen) == [("first", "done"), ("second", "done")]
    importlib.reload(sys.modules["awaited"])
    imports.after_import("awaited", lambda: seen.append("at once"))
    assert seen[2:] == ["at once"]
    del imports._WAITING.acts["awaited.never"]
    assert "exec_module" not in vars(sys.modules["awaited"].__spec__.loader)
    for name in ("awaited", "awaited.part"):
        del sys.modules[name]
