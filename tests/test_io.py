"""Checkpoints: what is written, what is refused, and that a refused load changes nothing."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_model import CONFIGS, IDS, Net, perturb, same, snapshot

import fused_peft as fp

LORA = fp.LoraConfig(r=2, target_modules=["q", "v"])


@pytest.fixture
def saved(tmp_path):
    """A folder with a LoRA adapter of Net, and the logits it gives."""
    torch.manual_seed(1)
    net = fp.get_peft_model(Net().eval(), LORA)
    perturb(net)
    fp.save_pretrained(net, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "DELETE"}))


def edit_weights(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.peft_type}-{c.bias}-{c.modules_to_save}")
def test_round_trip(config, tmp_path):
    torch.manual_seed(1)
    net = fp.get_peft_model(Net().eval(), config)
    perturb(net)
    fp.save_pretrained(net, tmp_path)
    torch.manual_seed(1)
    fresh = Net().eval()
    assert fp.load_adapter(fresh, tmp_path) is fresh
    assert torch.equal(fresh(IDS), net(IDS))
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in net.parameters()]
    torch.manual_seed(1)
    fixed = fp.load_adapter(Net().eval(), tmp_path, is_trainable=False)
    assert torch.equal(fixed(IDS), net(IDS))
    assert not any(p.requires_grad for p in fixed.parameters())


def test_a_merged_model_saves_the_same_adapter(tmp_path):
    net = fp.get_peft_model(Net(), LORA)
    perturb(net)
    fp.save_pretrained(net, tmp_path / "a")
    fp.merge(net)
    fp.save_pretrained(net, tmp_path / "b")
    a, b = (load_file(tmp_path / f / "adapter_model.safetensors") for f in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_names_on_disk(tmp_path):
    names = {}
    for config in (LORA, *CONFIGS[1:]):
        fp.save_pretrained(fp.get_peft_model(Net(), config), tmp_path)
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        found = {k.removeprefix("base_model.model."): tuple(v.shape) for k, v in tensors.items()}
        names.setdefault(config.peft_type, {}).update(found)
    assert names["LORA"]["blocks.0.q.lora_A.weight"] == (2, 8)
    assert names["LORA"]["blocks.0.q.base_layer.bias"] == (8,)
    assert names["LORA"]["blocks.0.norm.bias"] == (8,)
    assert names["LORA"]["head.weight"] == (20, 8)
    assert names["IA3"]["blocks.0.q.ia3_l"] == (8, 1)
    assert names["IA3"]["blocks.0.v.ia3_l"] == (1, 8)
    assert names["SSL"]["blocks.0.q.ssl_d_in"] == (8,)
    assert names["SSB"]["blocks.0.q.ssb_d_out"] == (8,)
    assert names["BITFIT"]["blocks.0.q.bitfit_bias"] == (8,)


def test_loading_into_an_adapted_model_replaces_values_and_keeps_objects(saved):
    net = fp.get_peft_model(Net(), LORA)
    before = [p for p in net.parameters() if p.requires_grad]
    fp.load_adapter(net, saved)
    assert all(a is b for a, b in zip(before, (p for p in net.parameters() if p.requires_grad), strict=True))
    stored = load_file(saved / "adapter_model.safetensors")
    assert torch.equal(net.blocks[1].q.lora_B, stored["base_model.model.blocks.1.q.lora_B.weight"])
    edit_config(saved, lora_dropout=0.5)
    with pytest.warns(UserWarning, match=r"lora_dropout=0.0 \(not 0.5\)"):
        fp.load_adapter(net, saved)
    edit_config(saved, lora_alpha=99)
    before = snapshot(net)
    with pytest.raises(fp.AdapterFormatError, match=r"lora_alpha=99 for blocks\.0\.q, but .* lora_alpha=8"):
        fp.load_adapter(net, saved)
    assert same(snapshot(net), before)
    fp.merge(net)
    with pytest.raises(RuntimeError, match="merged; call unmerge"):
        fp.load_adapter(net, saved)


def test_a_save_replaces_a_save_and_leaves_no_scraps(saved):
    net = fp.load_adapter(Net(), saved)
    fp.save_pretrained(net, saved)
    assert sorted(os.listdir(saved)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_saving_into_a_file_or_without_an_adapter_is_refused(saved, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="existing file"):
        fp.save_pretrained(fp.load_adapter(Net(), saved), file)
    assert file.read_text() == "mine"
    with pytest.raises(ValueError, match="no adapter"):
        fp.save_pretrained(Net(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def truncate(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-20])


BROKEN = {
    "missing key": (lambda f: edit_weights(f, lambda t: t.pop(next(iter(t)))), "lacks base_model"),
    "extra key": (lambda f: edit_weights(f, lambda t: t.update(more=torch.ones(2))), "has more, which the model"),
    "other shape": (
        lambda f: edit_weights(
            f, lambda t: t.update({k: torch.ones(2, 9) for k in t if k.endswith("0.q.lora_A.weight")})
        ),
        r"shape \(2, 9\), but the model needs \(2, 8\)",
    ),
    "integers": (
        lambda f: edit_weights(f, lambda t: t.update({k: v.int() for k, v in t.items()})),
        "dtype torch.int32",
    ),
    "another architecture": (lambda f: edit_config(f, target_modules=["c_attn"]), "matches no module"),
    "another rank": (lambda f: edit_config(f, r=3), "needs"),
    "rank too large": (lambda f: edit_config(f, r=64), r"needs \(64, 8\)"),
    "truncated": (truncate, "truncated or not a safetensors"),
    "not safetensors": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"hello"), "not a safetensors"),
    "unknown method": (lambda f: edit_config(f, peft_type="MAGIC"), "peft_type='MAGIC' is unknown; known: .*LORA"),
    "no method": (lambda f: edit_config(f, peft_type="DELETE"), "not an adapter config"),
    "config not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "not an adapter config"),
    "unknown setting": (lambda f: edit_config(f, use_magic=True), "use_magic.*not supported for LORA"),
    "bad setting": (lambda f: edit_config(f, lora_alpha=-1), "lora_alpha=-1"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "holds no adapter_model.safetensors"),
    "pickled weights": (
        lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
        "found adapter_model.bin",
    ),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "holds no adapter_config.json"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_adapter_is_refused_and_the_model_unchanged(saved, name):
    damage, message = BROKEN[name]
    damage(saved)
    net = Net()
    before = snapshot(net)
    with pytest.raises((fp.AdapterFormatError, FileNotFoundError), match=message):
        fp.load_adapter(net, saved)
    assert same(before, snapshot(net))
    assert not hasattr(net, "_fused_peft")


@pytest.mark.parametrize("name", ["missing key", "other shape", "truncated", "another rank"])
def test_an_adapted_model_is_unchanged_too(saved, name):
    net = fp.get_peft_model(Net(), LORA)
    before = snapshot(net)
    damage, _ = BROKEN[name]
    damage(saved)
    if name == "another rank":
        edit_weights(saved, lambda t: t.update({k: torch.ones(3, 3) for k in t}))
    with pytest.raises(fp.AdapterFormatError):
        fp.load_adapter(net, saved)
    assert same(before, snapshot(net))


def test_an_adapter_of_another_method_is_refused(saved):
    net = fp.get_peft_model(Net(), fp.SSBConfig(target_modules=["q"]))
    with pytest.raises(fp.AdapterFormatError, match="is for lora, but the model carries ssb"):
        fp.load_adapter(net, saved)


def test_settings_that_peft_lacks_are_stored_only_when_set_and_with_a_warning(tmp_path):
    plain = fp.IA3Config(target_modules=["q"], feedforward_modules=[])
    fp.save_pretrained(fp.get_peft_model(Net(), plain), tmp_path)
    assert not {"bias", "scale_bias"} & json.loads((tmp_path / "adapter_config.json").read_text()).keys()
    plain.scale_bias = False
    with pytest.warns(UserWarning, match="ignores {'scale_bias': False} of IA3"):
        fp.save_pretrained(fp.get_peft_model(Net(), plain), tmp_path)
    assert fp.load_config(tmp_path).scale_bias is False


@pytest.mark.parametrize("how", ["orthogonal", "eva"])
def test_initialisations_that_only_set_values_load(saved, how):
    edit_config(saved, init_lora_weights=how)
    assert fp.load_adapter(Net(), saved).blocks[0].q.config.init_lora_weights is True


def test_config_round_trip(saved):
    config = fp.load_config(saved)
    assert isinstance(config, fp.LoraConfig)
    assert (config.r, config.target_modules) == (2, ["q", "v"])
    with pytest.raises(FileNotFoundError, match="save_pretrained"):
        fp.load_config(saved / "elsewhere")


def test_pattern_order_survives(tmp_path):
    config = fp.LoraConfig(r=2, lora_alpha=2, target_modules=["q"], alpha_pattern={"1.q": 64, "q": 4})
    fp.save_pretrained(fp.get_peft_model(Net(), config), tmp_path)
    scalings = [b.q.config.scaling for b in fp.load_adapter(Net(), tmp_path).blocks]
    assert scalings == [2.0, 32.0, 2.0]


def test_is_trainable_holds_for_an_adapted_model_too(saved):
    net = fp.get_peft_model(Net(), LORA)
    fp.load_adapter(net, saved, is_trainable=False)
    assert not any(p.requires_grad for p in net.parameters())
    fp.load_adapter(net, saved)
    assert net.blocks[0].q.lora_A.requires_grad
