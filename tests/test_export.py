"""Plain LoRA from every method: read by PEFT's documented layout alone, by stock PEFT, or refused and why."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import CASES
from safetensors.torch import load_file
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from test_experts import ON_EXPERTS, STACKS  # noqa: E402
from test_experts import model as moe  # noqa: E402

import fused_peft as fp  # noqa: E402
from fused_peft.core.factors import Factors  # noqa: E402
from fused_peft.integrations import tuners  # noqa: E402
from fused_peft.methods import METHODS  # noqa: E402
from fused_peft.model import export  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = (Path(__file__).resolve().parent.parent / "docs/serving.md").read_text()
# those whose update is a low-rank product at their usual settings, from their papers' equations
EXACT = {"lora", "pissa", "milora", "olora", "adalora", "trilora", "flora", "moslora", "kasa", "delora"}
EXACT |= {"spectral_adapter", "lora_dash", "lora_xs", "vera"}
every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(3)
        self.q, self.v, self.head = nn.Linear(8, 12), nn.Linear(12, 8, bias=False), nn.Linear(8, 5)
        self.to(dtype).eval()

    def forward(self, x):
        return self.head(x + self.v(torch.tanh(self.q(x))))


def trained(config, model=None, size=0.3, targets=("q", "v")):
    """A model whose adapters (and heads and biases) have moved, LoRA-Dash's directions chosen."""
    model = fp.get_peft_model(Net() if model is None else model, replace(config, target_modules=list(targets)))
    return moved(model, size).eval()


def moved(model, size=0.3):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn_like(p))
        for m in model.modules():
            for name in ("dash_U", "dash_Vh"):
                if name in m._buffers:
                    m._buffers[name].normal_()
    return model


def read(folder, model):
    """A base model with an adapter of PEFT's LoRA layout put into its weights, by PEFT's documentation of it: tensors
    base_model.model.NAME.lora_A.weight (r, in) and lora_B.weight (out, r), W + lora_alpha / r * B A; what else is there
    replaces the model's own."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_rslora"], config["use_dora"]) == ("LORA", False, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}  # vLLM and SGLang do not read them
    tensors = load_file(folder / "adapter_model.safetensors")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, t in tensors.items():
            name = key.removeprefix("base_model.model.")
            if name.endswith(".lora_A.weight"):
                assert t.shape[0] == config["r"]
                B = tensors[key.replace("lora_A", "lora_B")]
                W = parameters[name.replace("lora_A.weight", "weight")]
                update = config["lora_alpha"] / config["r"] * B.to(W.dtype) @ t.to(W.dtype)
                W.add_(update.T if config["fan_in_fan_out"] else update)
            elif "lora_" not in name:
                parameters[name.replace(".base_layer.", ".")].copy_(t)
    return model


def exports(config):
    plain = getattr(config, "nonlinearity", "identity") == "identity" and not getattr(config, "use_bias", False)
    product = config.method_name in EXACT or config.method_name == "parallel_adapter"
    return product and plain and not getattr(config, "lora_bias", False)


def difference(case, folder, dtype=torch.float64):
    """How far the exported adapter is from the model, by the reader above, relative, and its file's r."""
    model, x = trained(case.make(3), Net(dtype)), X.to(dtype)
    assert set(fp.export_lora(model, folder).values()) == {0.0}
    config = json.loads((folder / "adapter_config.json").read_text())
    want = model(x)
    return ((read(folder, Net(dtype))(x) - want).abs().max() / want.abs().max()).item(), config["r"]


def test_every_method_has_a_case():
    assert {case.method for case in CASES} == set(METHODS)


@every_case
def test_exported_and_equal_or_refused(case, tmp_path):
    if not exports(case.make(3)):
        model = trained(case.make(3))
        with pytest.raises(ValueError, match=r"q: \w+ is more than a low-rank product beside the weight: an? .*is: \w"):
            fp.export_lora(model, tmp_path / "no")
        assert not (tmp_path / "no").exists()
        return
    wide, r = difference(case, tmp_path / "wide")
    assert wide < 1e-12
    assert r == {"pissa": 6, "milora": 6, "olora": 6, "spectral_adapter": 6, "lora_dash": 6, "vera": 6}.get(
        case.method, 3
    )
    assert difference(case, tmp_path / "narrow", torch.float32)[0] < 1e-6
    for folder, dtype, limit in (("wide", torch.float64, 1e-11), ("narrow", torch.float32, 1e-5)):
        theirs = peft.PeftModel.from_pretrained(Net(dtype), tmp_path / folder, autocast_adapter_dtype=False).eval()
        torch.testing.assert_close(
            theirs(X.to(dtype)), trained(case.make(3), Net(dtype))(X.to(dtype)), rtol=0, atol=limit
        )
        mine = fp.load_adapter(Net(dtype), tmp_path / folder)
        torch.testing.assert_close(mine(X.to(dtype)), theirs(X.to(dtype)), rtol=0, atol=limit)


def without_residual(piece_of):
    return lambda *args: (piece := piece_of(*args))._replace(factors=piece.factors[-1:])


@pytest.mark.parametrize("case", [c for c in CASES if exports(c.make(3))], ids=lambda c: c.name)
def test_a_wrong_scale_or_a_lost_residual_shows(case, tmp_path, monkeypatch):
    if METHODS[case.method].residual is not None:
        monkeypatch.setattr(export, "piece_of", without_residual(export.piece_of))
    else:
        product = Factors.product
        monkeypatch.setattr(Factors, "product", lambda f: product(replace(f, s=1.0, G=None)))
    assert difference(case, tmp_path)[0] > 1e-4


@every_case
def test_a_rank_gives_the_best_approximation_and_says_how_far_off_it_is(case, tmp_path):
    model = trained(case.make(3))
    base = Net().state_dict()
    try:
        state = fp.merged_state_dict(model)
    except fp.NotMergeableError:
        with pytest.raises(ValueError, match="is more than a low-rank product"):
            fp.export_lora(model, tmp_path, rank=2)
        return
    if not torch.equal(state["q.bias"], base["q.bias"]) or "v.bias" in state:
        with pytest.raises(ValueError, match="leaves biases as they are"):
            fp.export_lora(model, tmp_path, rank=2)
        return
    with pytest.warns(UserWarning, match=r"rank=2 approximates 2 of 2 layers; relative error .*[qv] 0\.\d+"):
        errors = fp.export_lora(model, tmp_path, rank=2)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for name in "qv":
        change = state[f"{name}.weight"] - base[f"{name}.weight"]
        S = torch.linalg.svdvals(change)
        best = (S[2:].norm() / S.norm()).item()
        assert best > 1e-3
        assert errors[name] == pytest.approx(best, rel=1e-5)
        A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        assert A.shape[0] == 2
        assert ((B @ A - change).norm() / change.norm()).item() == pytest.approx(best, rel=1e-4)


def test_a_large_enough_rank_is_exact(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fp.export_lora(trained(fp.PissaConfig(r=3)), tmp_path, rank=6) == {"q": 0.0, "v": 0.0}
    errors = fp.export_lora(trained(fp.SSLConfig()), tmp_path, rank=8)
    assert max(errors.values()) < 1e-6
    torch.testing.assert_close(read(tmp_path, Net())(X), trained(fp.SSLConfig())(X), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [0, -1, 1.5, "2", True])
def test_a_rank_that_is_none(rank, tmp_path):
    with pytest.raises(ValueError, match=r"rank=.* must be a positive integer"):
        fp.export_lora(trained(fp.LoraConfig(r=2)), tmp_path, rank=rank)


def test_ranks_that_adalora_has_dropped_are_left_out(tmp_path):
    model = trained(fp.AdaLoraConfig(init_r=5, target_r=3, total_step=10))
    with torch.no_grad():
        model.q.lora_E[[0, 3]] = 0
        model.v.lora_E[[1, 2, 4]] = 0
    assert fp.export_lora(model, tmp_path) == {"q": 0.0, "v": 0.0}
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.q.lora_A.weight"].shape == (3, 8)
    assert tensors["base_model.model.v.lora_A.weight"].shape == (3, 12)  # one of them zeros: every layer has one rank
    torch.testing.assert_close(read(tmp_path, Net())(X), model(X), rtol=0, atol=1e-12)


def test_ranks_and_scales_that_differ_become_one(tmp_path):
    config = fp.LoraConfig(r=2, lora_alpha=6, rank_pattern={"v": 5}, alpha_pattern={"v": 3}, use_rslora=True)
    model = trained(config)
    fp.export_lora(model, tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["r"], stored["lora_alpha"]) == (5, 5)
    torch.testing.assert_close(read(tmp_path, Net())(X), model(X), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bias", ["none", "all", "trilora_only"])
def test_heads_and_biases_go_along(bias, tmp_path):
    config = fp.TriLoraConfig(r=2, bias=bias, modules_to_save=["head"])
    model = trained(config)
    fp.export_lora(model, tmp_path)
    assert ("base_model.model.q.base_layer.bias" in load_file(tmp_path / "adapter_model.safetensors")) == (
        bias != "none"
    )
    for back in (read(tmp_path, Net()), peft.PeftModel.from_pretrained(Net(), tmp_path).eval()):
        torch.testing.assert_close(back(X), model(X), rtol=0, atol=1e-5)


def test_an_adapter_is_chosen_by_name(tmp_path):
    model = trained(fp.FloraConfig(r=2))
    alone = {"default": model(X)}
    fp.add_adapter(model, "other", fp.KasaConfig(r=4, target_modules=["v"]))
    fp.set_adapter(model, "other")
    moved(model)
    alone["other"] = model(X)
    for name, want in alone.items():
        assert fp.export_lora(model, tmp_path / name, adapter_name=name).keys() == (
            {"v"} if name == "other" else {"q", "v"}
        )
        torch.testing.assert_close(read(tmp_path / name, Net())(X), want, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="adapter_name='no' is none of the model's: default, other"):
        fp.export_lora(model, tmp_path, adapter_name="no")


def test_what_is_refused_and_why(tmp_path):
    model = trained(fp.LoraConfig(r=2))
    fp.merge(model)
    with pytest.raises(RuntimeError, match="q is merged; call unmerge"):
        fp.export_lora(model, tmp_path / "no")
    fp.unmerge(model)
    heads = trained(fp.LoraConfig(r=2, modules_to_save=["head"]))
    with fp.disable_adapter(heads), pytest.raises(RuntimeError, match="leave the context first"):
        fp.export_lora(heads, tmp_path / "no")
    with torch.no_grad():
        model.v.lora_A[0, 0] = float("nan")
    with pytest.raises(ValueError, match="v: the adapter has NaN"):
        fp.export_lora(model, tmp_path / "no")
    with pytest.raises(ValueError, match=r"save_pretrained writes dora in .* PEFT's own format, for PEFT alone"):
        fp.export_lora(trained(fp.DoraConfig(r=2)), tmp_path / "no")
    with pytest.raises(ValueError, match="call get_peft_model or load_adapter first"):
        fp.export_lora(Net(), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="give a folder"):
        fp.export_lora(trained(fp.LoraConfig(r=2)), tmp_path / "file")


def test_half_precision_adapters_lose_nothing(tmp_path):
    config = fp.TriLoraConfig(r=3, target_modules=["q", "v"])
    model = moved(fp.get_peft_model(Net(torch.bfloat16), config, adapter_dtype=torch.bfloat16))
    fp.export_lora(model, tmp_path)
    B = load_file(tmp_path / "adapter_model.safetensors")["base_model.model.q.lora_B.weight"]
    assert B.dtype == torch.float32
    assert torch.equal(B.double(), model.q.lora_B.double() * model.q.lora_E.double())


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    return transformers.GPT2LMHeadModel(config).eval()


def test_weights_that_are_stored_in_out(tmp_path):
    ids = torch.arange(6).view(1, 6)
    model = trained(fp.PissaConfig(r=2), gpt2(), targets=["c_attn"])
    fp.export_lora(model, tmp_path)
    for back in (read(tmp_path, gpt2()), peft.PeftModel.from_pretrained(gpt2(), tmp_path).eval()):
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_a_quantised_base_exports_without_its_weight(tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 64, bias=False))

    def quantised():
        layer = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        layer.load_state_dict(plain[0].state_dict())
        return nn.Sequential(layer.to("cpu")).eval()

    model = moved(fp.get_peft_model(quantised(), fp.MosLoraConfig(r=3, target_modules=["0"]))).eval()
    fp.export_lora(model, tmp_path)
    x = torch.randn(4, 64)
    torch.testing.assert_close(fp.load_adapter(quantised(), tmp_path).eval()(x), model(x), rtol=0, atol=1e-5)
    ssl = moved(fp.get_peft_model(quantised(), fp.SSLConfig(target_modules=["0"])))
    assert 0 < fp.export_lora(ssl, tmp_path, rank=4)["0"] < 1


@pytest.mark.parametrize("kind", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("name", ON_EXPERTS)
def test_experts(name, kind, tmp_path):
    config = METHODS[name].example(2)
    config.target_modules, config.target_parameters = [], [f"experts.{stack}" for stack in STACKS]
    ids = torch.arange(8).view(1, 8)
    model = moved(fp.get_peft_model(moe(kind), config), 0.1).eval()
    if not exports(config):
        with pytest.raises(ValueError, match=r"experts.gate_up_proj: \w+ is more than a low-rank product"):
            fp.export_lora(model, tmp_path)
        return
    fp.export_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(moe(kind), tmp_path, autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=0, atol=1e-6)
    mine = fp.load_adapter(moe(kind), tmp_path).eval()
    torch.testing.assert_close(mine(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


OWN = [case for case in CASES if case.make(3).peft_type in tuners.REGISTERED]


@pytest.mark.parametrize("case", OWN, ids=lambda c: c.name)
def test_this_librarys_methods_in_a_model_of_pefts(case, tmp_path):
    config = case.make(3)
    config.target_modules, config.modules_to_save = ["q", "v"], ["head"]
    model = moved(peft.get_peft_model(Net(), config)).eval()
    if not exports(config):
        with pytest.raises(ValueError, match=r"q: \w+ is more than a low-rank product beside the weight: ") as e:
            fp.export_lora(model, tmp_path)
        assert "fused_peft.save" not in str(e.value)
        return
    assert fp.export_lora(model, tmp_path) == {"q": 0.0, "v": 0.0}
    torch.testing.assert_close(read(tmp_path, Net())(X), model(X), rtol=0, atol=1e-12)


THEIRS = {
    "lora": peft.LoraConfig(r=3, lora_alpha=5),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=3, total_step=10),
    "dora": peft.LoraConfig(r=3, use_dora=True),
    "ia3": peft.IA3Config(feedforward_modules=[]),
    "vera": peft.VeraConfig(r=4),
}


@pytest.mark.parametrize("name", THEIRS)
def test_pefts_own_methods_once_accelerated(name, tmp_path):
    config = THEIRS[name]
    config.target_modules = {"q", "v"}
    model = moved(peft.get_peft_model(Net(), config)).eval()
    with pytest.raises(ValueError, match=r"is not known as factors: .*load_adapter\(base, folder\)"):
        fp.export_lora(model, tmp_path)
    if name == "vera":
        return
    fp.accelerate(model)
    if name in ("dora", "ia3"):
        with pytest.raises(ValueError, match=r"a scale of the layer's output.*model.save_pretrained writes"):
            fp.export_lora(model, tmp_path)
        return
    fp.export_lora(model, tmp_path)
    torch.testing.assert_close(read(tmp_path, Net())(X), model(X), rtol=0, atol=1e-6)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="q is merged; call unmerge_adapter"):
        fp.export_lora(model, tmp_path)


def test_the_page_names_what_exports():
    can, cannot = PAGE.partition("## Plain LoRA files")[2].partition("\n## ")[0].split("The others", 1)
    exact = set()
    for name, method in METHODS.items():
        layer = fp.PeftLinear.from_linear(nn.Linear(16, 16), method.example(2))
        piece = export.piece_of("x", "x", layer)
        if piece.instead is None and all(f.beyond_product() is None for f in piece.factors):
            exact.add(name)
    assert exact == EXACT
    assert set(re.findall(r"`(\w+)`", can)) & set(METHODS) == exact
    assert set(re.findall(r"`(\w+)`", cannot)) & set(METHODS) == set(METHODS) - exact
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text()
    assert f"writes the adapters of {len(exact)} methods exactly" in readme
