"""What is on disk gives back what was saved: every field of every config, and every method by every way to save."""

import contextlib
import copy
import io
import json
import pickle
import warnings
from dataclasses import MISSING, fields, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fused_peft as fp
from fused_peft.methods import METHODS, PeftConfig
from fused_peft.model import adapter_config, prompt

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")
SAMPLES = {name: method.example(4) for name, method in METHODS.items()}
SAMPLES |= {c.method_name: c() for c in prompt.CONFIGS.values()}
SAMPLES |= {"lora-use_dora": fp.LoraConfig(use_dora=True), "lora-pissa": fp.LoraConfig(init_lora_weights="pissa")}

# values that a field may take, by its name and else by its type; each config keeps those that it accepts
BY_NAME = {
    "target_modules": [["0"], "all-linear", r".*\.0"],
    "exclude_modules": [["1"], "1"],
    "layers_to_transform": [3, [1, 2], (0, 1), range(2)],
    "layers_pattern": ["layers", ["h"], ("h", "l")],
    "modules_to_save": [["head"], ("head",)],
    "bias": ["all", "lora_only", "ssb_only"],
    "task_type": ["SEQ_CLS", peft.TaskType.CAUSAL_LM],
    "init_lora_weights": [False, "gaussian", "pissa", "pissa_niter_4", "milora", "olora"],
    "nonlinearity": ["relu", "silu"],
    "rank_pattern": [{"q": 3, "0": 2}, {"0.lora_E": [True, False]}],
    "alpha_pattern": [{"q": 3.5, "0": 2}],
    "lambda_pattern": [{"q": 3.5}],
    "feedforward_modules": [["0"], ".*", []],
    "mask": [{"0": 3, "1": 4}, 5],
    "kind": ["houlsby", "double_seq_bn"],
    "projection_shape": [(8, 6)],
    "prompt_tuning_init": ["SAMPLE_VOCAB"],
    "encoder_reparameterization_type": ["LSTM"],
    "lora_dropout": [0.25],
    "tinit": [2],
    "total_step": [70],
    "density": [0.5],
    "revision": ["main"],
    "base_model_name_or_path": ["models/base"],
}
BY_TYPE = {bool: [True, False], int: [3, 40], float: [0.25, 3.5], str: ["text"]}


def accepted(config: PeftConfig, field) -> list[PeftConfig]:
    """The config with every value of this field that it takes: None, the default, and others."""
    values = [None, *BY_NAME.get(field.name, ())]
    values += [] if field.default is MISSING else [field.default]
    for kind, of in BY_TYPE.items():
        values += of if kind.__name__ in str(field.type) else []
    found = []
    for value in values:
        try:
            found.append(replace(config, **{field.name: value}))
        except (TypeError, ValueError):
            continue
    return found


EVERY = [
    pytest.param(name, field, id=f"{name}-{field.name}") for name, config in SAMPLES.items() for field in fields(config)
]


@pytest.mark.parametrize(("name", "field"), EVERY)
def test_a_config_comes_back_as_it_was(name, field, tmp_path):
    found = accepted(SAMPLES[name], field)
    assert found, f"no value of {field.name} to try: add some to BY_NAME"
    for i, config in enumerate(found):
        folder = tmp_path / str(i)
        adapter_config.write_config(config, folder)
        note = {"format": "pt", adapter_config.NOTE: json.dumps(adapter_config.note(config))}
        save_file({}, folder / adapter_config.WEIGHTS_NAME, metadata=note)
        for back in (fp.load_config(folder), adapter_config.unpacked(adapter_config.packed(config))):
            if field.name == "projection_shape":  # found anew from the model's layers
                back.projection_shape = config.projection_shape
            assert type(back) is type(config)
            assert back == config, (field.name, getattr(config, field.name), getattr(back, field.name))


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.q, self.v, self.norm = nn.Linear(width, 12), nn.Linear(12, width, bias=False), nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.norm(x + self.v(torch.tanh(self.q(x)))))


IDS = torch.arange(10).view(2, 5)
VARIANTS = {
    **{name: config for name, config in SAMPLES.items() if config.peft_type not in prompt.CONFIGS},
    "pissa_niter": fp.PissaConfig(r=4, init_lora_weights="pissa_niter_1"),
    "lora-biases": fp.LoraConfig(r=4, bias="all", modules_to_save=["head"]),
    "lora-both-biases": fp.LoraConfig(r=4, lora_bias=True, bias="all"),
    "ia3-biases": fp.IA3Config(bias="all"),
    "lora-no-alpha": fp.LoraConfig(r=4, lora_alpha=None),
    "lora-no-alpha-rs": fp.LoraConfig(r=4, lora_alpha=None, use_rslora=True, rank_pattern={"v": 2}),
    "vera-projection": fp.VeraConfig(r=4, save_projection=True),
}
every_variant = pytest.mark.parametrize("name", VARIANTS)


def base(dtype=torch.float32):
    torch.manual_seed(3)
    return Net().to(dtype).eval()


def trained(name, model=None):
    """A model whose adapters, heads and biases have all moved, schedules driven."""
    torch.manual_seed(5)
    model = base() if model is None else model
    model = fp.get_peft_model(model, replace(VARIANTS[name], target_modules=["q", "v"])).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3)
    for step in range(3):
        torch.nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten() % 5).backward()
        optimizer.step()
        fp.on_step(model, 100 + step)  # past LoRA-Dash's warm-up
        optimizer.zero_grad()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    model.eval()
    assert (model(IDS) - base()(IDS)).abs().max() > 1e-3
    return model


def by_save_pretrained(model, name, path):
    fp.save_pretrained(model, path)
    torch.manual_seed(99)
    return fp.load_adapter(base(), path)


def by_save_while_merged(model, name, path):
    if METHODS[VARIANTS[name].method_name].output is None and VARIANTS[name].method_name != "parallel_adapter":
        fp.merge(model)
    fp.save_pretrained(model, path)
    return fp.load_adapter(base(), path)


def by_save_in_wrappers(model, name, path):
    """The names on disk are those without activation checkpointing or a compiled part."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wrapped = copy.deepcopy(model)
    wrapped.q, wrapped.head = checkpoint_wrapper(wrapped.q), torch.compile(wrapped.head, backend="eager")
    fp.save_pretrained(wrapped, path)
    assert "_checkpoint" not in str(sorted(load_file(path / "adapter_model.safetensors")))
    return fp.load_adapter(base(), path)


def by_state_dict(model, name, path):
    memory = io.BytesIO()
    torch.save(model.state_dict(), memory)
    memory.seek(0)
    torch.manual_seed(99)
    fresh = fp.get_peft_model(base(), replace(VARIANTS[name], target_modules=["q", "v"])).eval()
    fresh.load_state_dict(torch.load(memory), strict=True)
    return fresh


def by_pickle(model, name, path):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model, name, path):
    path.mkdir(exist_ok=True)
    torch.save(model, path / "model.pt")
    return torch.load(path / "model.pt", weights_only=False)


def by_deepcopy(model, name, path):
    return copy.deepcopy(model)


WAYS = [v for k, v in globals().copy().items() if k.startswith("by_")]


@pytest.mark.parametrize("way", WAYS)
@every_variant
def test_what_is_saved_gives_back_the_trained_model(name, way, tmp_path):
    model = trained(name)
    want = model(IDS).detach()
    again = way(model, name, tmp_path / "saved")
    assert torch.equal(again(IDS), want)
    with fp.disable_adapter(again):
        assert torch.equal(again(IDS), base()(IDS))
    twice = way(again, name, tmp_path / "again")  # and once more, from what was loaded
    assert torch.equal(twice(IDS), want)


@pytest.mark.parametrize("name", ["lora", "lora-biases", "ia3-biases"])
def test_what_is_taken_inside_disable_adapter_is_trained_or_refused(name):
    model = trained(name)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    outer, base_values = nn.ModuleList([model]), base()(IDS)

    def same(found):
        assert all(torch.equal(found[n], t) for n, t in state.items())

    ways = {
        "state_dict": lambda: same(model.state_dict()),
        "of what holds it": lambda: same({n[2:]: t for n, t in outer.state_dict().items()}),
        "load_state_dict": lambda: model.load_state_dict(state),
        "pickling": lambda: same(pickle.loads(pickle.dumps(model)).state_dict()),
    }
    for way in ways.values():
        with fp.disable_adapter(model):
            with contextlib.nullcontext() if name == "lora" else pytest.raises(RuntimeError, match="leave the context"):
                way()
            assert torch.equal(model(IDS), base_values)
            assert torch.equal(copy.deepcopy(model)(IDS), base_values)  # a reference model
        way()
        same(model.state_dict())


@pytest.mark.parametrize("name", ["lora-biases", "adalora", "pissa"])
def test_a_pickle_of_an_older_version_loads_or_says_why_not(name, tmp_path):
    model = trained(name)
    want, state = model(IDS).detach(), model.__dict__["_fused_peft"]
    for field in ("embeddings", "layers", "told"):
        del state.__dict__[field]
    tables = [c.__dict__.pop("rank_pattern") for c in (model.q.config, state.config)]
    assert not any(tables)
    del model.q.__dict__["awaits_weight"], model.q.__dict__["buffer_names"]
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(IDS), want)
    fp.save_pretrained(again, tmp_path)
    assert torch.equal(fp.load_adapter(base(), tmp_path)(IDS), want)
    assert again.q.buffer_names == model.v.buffer_names
    if name == "pissa":  # it kept the residual as the weight, and this beside it
        model.q._buffers["taken_A"] = model.q._buffers.pop("residual_A")
        with pytest.raises(RuntimeError, match=r"older version of fused_peft and lacks residual_A; .*save_pretrained"):
            pickle.loads(pickle.dumps(model))


@pytest.mark.filterwarnings("default")
def test_a_folder_of_an_older_version_that_left_lora_alpha_out(tmp_path):
    model = trained("lora-no-alpha")
    fp.save_pretrained(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    stored = json.loads(file.read_text())
    del stored["lora_alpha"]
    file.write_text(json.dumps(stored))
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    with pytest.warns(UserWarning, match="has no lora_alpha, as an older version .* read as lora_alpha=None"):
        again = fp.load_adapter(base(), tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    file.write_text(json.dumps(stored | {"auto_mapping": None}))  # PEFT's, edited: its default
    assert strictly(fp.load_config, tmp_path).lora_alpha == 8


@every_variant
def test_the_state_holds_the_base_weights(name):
    before, after = base().state_dict(), trained(name).state_dict()
    frozen = before.keys() - {n for n, p in trained(name).named_parameters() if p.requires_grad}
    assert {"q.weight", "v.weight"} <= frozen
    assert all(torch.equal(before[n], after[n]) for n in frozen)


def llama(folder=None):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=20
    )
    model = transformers.LlamaForCausalLM(config).eval()
    if folder is not None:
        model.save_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    return model


def randomised(config, model):
    torch.manual_seed(1)
    model = fp.get_peft_model(model, replace(config, target_modules=["q_proj", "down_proj"])).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


BESIDE = {
    "adapter": {},
    "heads, biases, rows": {"modules_to_save": ["lm_head"], "bias": "all", "trainable_token_indices": [3, 4]},
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
def test_a_base_without_a_name_is_saved_beside_its_adapter(beside, merged, tmp_path):
    """From the folder alone comes the adapted model; Trainer's checkpoints, and models with a name, hold no base."""
    config = fp.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **beside)
    model = randomised(config, llama())
    want = model(IDS).logits.detach()
    if merged:
        fp.merge(model)
    with pytest.warns(UserWarning, match="has no name .*base_model"):
        model.save_pretrained(tmp_path / "out")
    before = llama()
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base_model").eval()
    assert base.state_dict().keys() == before.state_dict().keys()
    assert all(torch.equal(t, before.state_dict()[key]) for key, t in base.state_dict().items())
    torch.testing.assert_close(fp.load_adapter(base, tmp_path / "out")(IDS).logits, want, rtol=0, atol=1e-6)
    back = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(back(IDS).logits, want, rtol=0, atol=1e-6)
    if not beside:
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(back(IDS).logits, want, rtol=0, atol=1e-6)
    for folder, other in (("checkpoint-3", model), ("named", randomised(fp.LoraConfig(r=2), llama(tmp_path / "b")))):
        other.save_pretrained(tmp_path / folder)
        assert not (tmp_path / folder / "base_model").exists()


@every_variant
def test_a_transformers_model_saves_its_adapter_and_never_the_base_alone(name, tmp_path):
    config = replace(VARIANTS[name], modules_to_save=None)
    model = randomised(config, llama(tmp_path / "base"))
    want = model(IDS).logits.detach()
    model.save_pretrained(tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    torch.testing.assert_close(fp.load_adapter(llama(tmp_path / "base"), tmp_path / "out")(IDS).logits, want)
    plain = copy.deepcopy(llama())
    try:
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    except Exception:  # not a sound: no config.json, or a method that this PEFT does not take
        again = None
    # Transformers 5.24 drops DoRA's magnitudes, with a report, from PEFT's own folders too
    if again is not None and "niter" not in name and "dora" not in name:
        torch.testing.assert_close(again(IDS).logits, want, rtol=1e-4, atol=1e-5)
    assert again is None or not torch.equal(again(IDS).logits, plain(IDS).logits)
    with pytest.raises(RuntimeError, match="model is part of an adapted model"):
        model.model.save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()
    with pytest.raises(ValueError, match="push_to_hub=True"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)
    if METHODS[config.method_name].output is None and config.method_name != "parallel_adapter":
        adds_bias = name in (
            "bitfit",
            "lora-both-biases",
        )  # Llama's layers have none, and a checkpoint's are left out when it is loaded
        with pytest.warns(UserWarning, match="has a bias now") if adds_bias else contextlib.nullcontext():
            merged = fp.merge_and_unload(model)
        torch.testing.assert_close(merged(IDS).logits, want, rtol=1e-4, atol=1e-5)
        if adds_bias:
            return
        merged.save_pretrained(tmp_path / "merged")  # its own again
        back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        torch.testing.assert_close(back(IDS).logits, want, rtol=1e-4, atol=1e-5)


def by_hand(model):
    q = model.model.layers[0].self_attn
    q.q_proj = fp.PeftLinear.from_linear(q.q_proj, fp.LoraConfig(r=2, init_lora_weights=False))


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        (lambda m: randomised(fp.LoraConfig(r=2), m.model), r"fused_peft.save_pretrained\(model.model, path\)"),
        (lambda m: fp.merge(randomised(fp.LoraConfig(r=2), m.model)), r"fused_peft.save_pretrained\(model.model, "),
        (lambda m: randomised(fp.LoraConfig(r=2), m.model.layers), r"has adapted model.model.layers"),
        (by_hand, r"adapter of model.layers.0.self_attn.q_proj, a PeftLinear put in by hand"),
    ],
    ids=["part", "merged", "list", "by-hand"],
)
def test_a_model_adapted_in_part_refuses_to_save_what_would_lose_the_adapter(adapt, message, tmp_path):
    model = llama()
    adapt(model)
    for state in ({}, {"state_dict": model.state_dict()}):
        with pytest.raises(RuntimeError, match=message):
            model.save_pretrained(tmp_path, **state)
    with pytest.raises(RuntimeError, match=message):
        pickle.loads(pickle.dumps(model)).save_pretrained(tmp_path)
    assert not [*tmp_path.iterdir()]
    llama().save_pretrained(tmp_path)  # others do as before


def test_the_part_that_is_adapted_is_named_and_round_trips(tmp_path):
    model = llama()
    randomised(fp.LoraConfig(r=2), model.model)
    want = model(IDS).logits
    with pytest.raises(ValueError, match=r"has adapted model.model, not .* fused_peft.save_pretrained\(model.model"):
        fp.save_pretrained(model, tmp_path)
    fp.save_pretrained(model.model, tmp_path)
    with pytest.raises(ValueError, match=r"load_adapter\(model.model, path\)"):
        fp.load_adapter(model, tmp_path)
    again = llama()
    fp.load_adapter(again.model, tmp_path)
    assert torch.equal(again(IDS).logits, want)
    fp.merge_and_unload(again.model)
    again.save_pretrained(tmp_path / "merged")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(back(IDS).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids="-".join)
@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_that_train_keep_their_size(saved, dtype, tied, tmp_path):
    def plain():
        model = llama().to(dtype)
        model.config.tie_word_embeddings = tied
        model.tie_weights()
        return model

    model = fp.get_peft_model(plain(), fp.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved))
    with torch.no_grad():
        model.get_submodule("lm_head" if "lm_head" in saved else "model.embed_tokens").weight.add_(0.1)
    want = model(IDS).logits
    for same in ({"new_num_tokens": 20}, {"new_num_tokens": 17, "pad_to_multiple_of": 4}, {}):
        assert model.resize_token_embeddings(**same) is model.model.embed_tokens
    with pytest.raises(RuntimeError, match=r"to 32 \(from 20\) .* before get_peft_model"):
        model.resize_token_embeddings(30, pad_to_multiple_of=8)
    assert torch.equal(model(IDS).logits, want)
    fp.save_pretrained(model, tmp_path)
    assert torch.equal(fp.load_adapter(plain(), tmp_path)(IDS).logits, want)
    fp.merge_and_unload(model).resize_token_embeddings(30)
    others = fp.get_peft_model(plain(), fp.LoraConfig(r=2, target_modules=["q_proj"]))
    assert others.resize_token_embeddings(30).weight.shape[0] == 30
    assert others(IDS).logits.shape[-1] == 30


@pytest.mark.parametrize("name", [n for n, c in VARIANTS.items() if adapter_config.in_peft(c) and "niter" not in n])
def test_stock_peft_computes_the_same(name, tmp_path):
    model = trained(name)
    fp.save_pretrained(model, tmp_path)
    if name == "milora":  # PEFT 0.21 has no such start
        with pytest.raises(ValueError, match="milora"):
            peft.PeftModel.from_pretrained(base(), tmp_path)
        return
    theirs = peft.PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(theirs(IDS), model(IDS), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_settings_on_load_apply_or_are_refused(name, tmp_path):
    """Another value of any field that changes what trained values compute never loads silently."""
    config = replace(VARIANTS[name], target_modules=["q", "v"])
    fp.save_pretrained(trained(name), tmp_path)
    for field in fields(config):
        if field.name in {f.name for f in fields(PeftConfig)} | config.training_only | {"fan_in_fan_out"}:
            continue
        for other in accepted(config, field):
            mine = [other.for_module(n) for n in "qv"]
            if [config.for_module(n) for n in "qv"] == mine or other.method_name != config.method_name:
                continue
            try:
                fresh = fp.get_peft_model(base(), other)
            except ValueError:
                continue
            before = {n: t.clone() for n, t in fresh.state_dict().items()}
            with pytest.raises(fp.AdapterFormatError):
                fp.load_adapter(fresh, tmp_path)
            assert all(torch.equal(t, before[n]) for n, t in fresh.state_dict().items()), field.name


def test_every_layer_is_asked_for_its_settings(tmp_path):
    config = fp.LoraConfig(r=4, target_modules=["q", "v"], alpha_pattern={"v": 32}, init_lora_weights=False)
    fp.save_pretrained(fp.get_peft_model(base(), config), tmp_path)
    other = fp.get_peft_model(base(), replace(config, lora_dropout=0.1, alpha_pattern={}))
    with pytest.raises(fp.AdapterFormatError, match=r"lora_alpha=32 for v, but .* lora_alpha=8"):
        fp.load_adapter(other, tmp_path)


def strictly(call, *args):
    """The call with every warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call(*args)


@pytest.mark.parametrize(
    "name", [n for n in VARIANTS if "pissa" not in n and n not in ("milora", "olora", "ia3-biases")]
)
def test_loading_back_into_the_same_model_warns_of_nothing(name, tmp_path):
    model = trained(name)
    strictly(fp.save_pretrained, model, tmp_path)
    want = model(IDS)
    strictly(fp.load_adapter, model, tmp_path)
    assert torch.equal(model(IDS), want)
    if name == "lora-both-biases":
        strictly(fp.merge, model)
        strictly(fp.save_pretrained, model, tmp_path)


def test_a_state_dict_that_lacks_adapters_is_refused(tmp_path):
    model = trained("lora")
    for state in ({}, {f"module.{n}": t for n, t in model.state_dict().items()}):
        with pytest.raises(ValueError, match=r"state_dict lacks q.lora_A, .*model.state_dict\(\)"):
            fp.save_pretrained(model, tmp_path / "no", state_dict=state)
    assert not (tmp_path / "no").exists()
    merged = trained("lora-both-biases")
    want = merged(IDS)
    fp.merge(merged)
    fp.save_pretrained(merged, tmp_path / "merged", state_dict=merged.state_dict())
    assert torch.equal(fp.load_adapter(base(), tmp_path / "merged")(IDS), want)
    zeros = {n: torch.zeros_like(t) for n, t in model.state_dict().items()}
    fp.save_pretrained(model, tmp_path, state_dict=zeros)
    assert not any(t.any() for t in load_file(tmp_path / "adapter_model.safetensors").values())


def test_nothing_is_written_when_the_config_cannot_be(tmp_path):
    model = fp.get_peft_model(base(), fp.LoraConfig(r=2, nonlinearity="relu", target_modules=["q"]))
    with pytest.raises(UserWarning, match="ignores"):
        strictly(fp.save_pretrained, model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


class Reads(nn.Module):
    """A parent that holds its child's weight under another name, and two layers that share a bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.out, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x):
        return self.b(self.a(x)) @ self.out


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (fp.LoraConfig(r=2, target_modules=["a"]), r"a.weight is shared with .*out"),
        (fp.LoraConfig(r=2, target_modules=["b"], lora_bias=True), r"b.bias is shared with a.bias"),
        (fp.IA3Config(target_modules=["b"], feedforward_modules=[]), r"b.bias is shared with a.bias"),
        (fp.LoraConfig(r=2, target_modules=["b"]), None),
    ],
    ids=str,
)
def test_merging_never_changes_another_module(config, message):
    model = fp.get_peft_model(Reads(), config)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(fp.NotMergeableError, match=message) if message else contextlib.nullcontext():
        fp.merge(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_callers_tables_may_change_afterwards():
    config = fp.LoraConfig(r=4, target_modules=["q"], alpha_pattern={"q": 3})
    model = fp.get_peft_model(base(), config)
    config.alpha_pattern["q"] = 99
    assert model.q.config.scaling == 3 / 4
    assert fp.model.state.state_of(model).config.alpha_pattern == {"q": 3}


def test_a_merged_layer_does_not_start_anew():
    model = trained("pissa")
    fp.merge(model)
    with pytest.raises(RuntimeError, match="unmerge before reset_adapter_parameters"):
        model.q.reset_adapter_parameters()


def test_a_random_start_that_is_not_in_the_file_is_refused(tmp_path):
    torch.manual_seed(0)
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=["q"], init_lora_weights="pissa_niter_1"))
    theirs.save_pretrained(tmp_path)
    net = base()
    with pytest.raises(fp.AdapterFormatError, match=r"lacks what pissa_niter_1 took .*path_initial_model"):
        fp.load_adapter(net, tmp_path)
    assert not hasattr(net, "_fused_peft")


@pytest.mark.parametrize("name", ["pissa", "milora", "olora"])
@pytest.mark.filterwarnings("default")
def test_saving_says_what_a_reader_of_plain_lora_would_get_wrong(name, tmp_path):
    with pytest.warns(UserWarning, match=f"lora_A and lora_B of {name} add to a residual"):
        fp.save_pretrained(trained(name), tmp_path)


def test_trained_parameters_that_belong_to_no_adapter_are_named(tmp_path):
    model = trained("lora-biases")
    model.embed.weight.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"embed.weight trains but belong.* not saved; name .*modules_to_save"):
        fp.save_pretrained(model, tmp_path)
