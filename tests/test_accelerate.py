"""fp.accelerate: PEFT's own models on the fused call give PEFT's numbers, and everything else of theirs stays."""

import copy
import pickle
import re
import subprocess
import sys
import warnings
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import fused_peft as fp  # noqa: E402
from fused_peft.core import dropout, ops, versions  # noqa: E402
from fused_peft.integrations import peft as bridge  # noqa: E402
from fused_peft.integrations import peft_layers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
R = {"r": 3, "lora_alpha": 5, "init_lora_weights": False}
ADA = {"init_r": 3, "target_r": 2, "total_step": 10, "tinit": 1, "tfinal": 1, "init_lora_weights": False}
CONFIGS = {
    "lora": lambda **k: peft.LoraConfig(**R, **k),
    "rslora": lambda **k: peft.LoraConfig(**R, use_rslora=True, **k),
    "lora-bias": lambda **k: peft.LoraConfig(**R, lora_bias=True, **k),
    "lora-dropout": lambda **k: peft.LoraConfig(**R, lora_dropout=0.3, **k),
    "dora": lambda **k: peft.LoraConfig(**R, use_dora=True, **k),
    "dora-dropout": lambda **k: peft.LoraConfig(**R, use_dora=True, lora_dropout=0.3, **k),
    "adalora": lambda **k: peft.AdaLoraConfig(**ADA, **k),
    "adalora-dropout": lambda **k: peft.AdaLoraConfig(**ADA, lora_dropout=0.3, **k),
    "ia3": lambda **k: peft.IA3Config(**{"feedforward_modules": ["2"], "init_ia3_weights": False, **k}),
}
DELORA = {"r": 3, "init_weights": False}
GRALORA = {"r": 6, "alpha": 5, "init_weights": False}
MORE = {  # the methods that fewer use: test_accelerate_methods.py
    "vera": lambda **k: peft.VeraConfig(r=5, init_weights=False, **k),
    "vera-dropout": lambda **k: peft.VeraConfig(r=5, init_weights=False, vera_dropout=0.3, **k),
    "delora": lambda **k: peft.DeloraConfig(**DELORA, **k),
    "delora-dropout": lambda **k: peft.DeloraConfig(**DELORA, module_dropout=0.3, **k),
    "hira": lambda **k: peft.HiraConfig(r=3, init_weights=False, **k),
    "miss": lambda **k: peft.MissConfig(r=3, init_weights=False, **k),
    "miss-dropout": lambda **k: peft.MissConfig(r=4, init_weights=False, miss_dropout=0.3, **k),
    "miss-mini": lambda **k: peft.MissConfig(r=4, mini_r=3, init_weights="mini", **k),
    "gralora": lambda **k: peft.GraloraConfig(**GRALORA, gralora_k=2, **k),
    "gralora-dropout": lambda **k: peft.GraloraConfig(**GRALORA, gralora_k=2, gralora_dropout=0.3, **k),
    "gralora-hybrid": lambda **k: peft.GraloraConfig(**GRALORA, gralora_k=2, hybrid_r=2, gralora_dropout=0.3, **k),
    "mica": lambda **k: peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights="mica", **k),
    "kasa": lambda **k: peft.LoraConfig(**R, kasa_config=peft.KasaConfig(), **k),
    "kasa-dropout": lambda **k: peft.LoraConfig(**R, kasa_config=peft.KasaConfig(), lora_dropout=0.3, **k),
}
ALL = CONFIGS | MORE


class Net(nn.Module):
    N = 5

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, self.N, bias=False))

    def forward(self, x):
        return self.layers(x)


class Even(Net):
    """Of sizes that divide into blocks."""

    N = 6


def build(name, dtype=torch.float32, seed=0, **options):
    torch.manual_seed(seed)
    options = {"target_modules": ["layers.0", "layers.2"], **options}
    if name == "ia3":  # PEFT looks for feedforward_modules among these, letter by letter
        options["target_modules"] = [n.rpartition(".")[2] for n in options["target_modules"]]
    net = Net() if name in CONFIGS else Even()
    model = peft.get_peft_model(net.to(dtype), ALL[name](**options))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(0.3).add_(torch.rand_like(p) * 0.1)
    return model


@pytest.fixture
def same_masks(monkeypatch):
    """PEFT's dropout draws the fused call's mask: both from seeds counted up, a seed a call, in each model anew."""
    count = [0]

    def new_seed(device):
        count[0] += 1
        return torch.tensor([count[0], 7], dtype=torch.int32)

    def drop(x, p=0.5, training=True, inplace=False):
        if not training or not p:
            return x
        return x * dropout.keep_mask(new_seed(x.device), x.shape, p).to(x.dtype) / (1 - p)

    monkeypatch.setattr(ops, "new_seed", new_seed)
    monkeypatch.setattr(torch.nn.functional, "dropout", drop)
    return lambda: count.__setitem__(0, 0)


def results(model, x):
    """y, dx and every gradient of one step."""
    x = x.detach().requires_grad_()
    y = model(x)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y.float().square().sum(), [x, *named.values()])
    return {"y": y.detach(), **dict(zip(["x", *named], grads, strict=True))}


def fused_calls(monkeypatch):
    calls = []
    linear = ops.linear
    monkeypatch.setattr(ops, "linear", lambda *a, **k: calls.append(a) or linear(*a, **k))
    return calls


def warned(call, *args, **options):
    """The texts of the warnings that a call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*args, **options)
    return [str(w.message) for w in caught]


def close(got, want, rtol):
    assert got.keys() == want.keys()
    for name, reference in want.items():
        scale = reference.abs().max().clamp_min(1e-6).item()
        torch.testing.assert_close(got[name], reference, rtol=rtol, atol=rtol * scale, msg=name)


def agree(got, want, dtype, within=1e-2):
    """Entry by entry to 1e-5 in fp32; in norm to 1e-2, or another bound, in any dtype."""
    if dtype == torch.float32:
        close(got, want, 1e-5)
    for n, reference in want.items():
        assert (got[n] - reference).float().norm() <= within * reference.float().norm(), n


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_numbers_as_peft(name, dtype, training, same_masks, monkeypatch):
    """Entry by entry to 1e-5 in fp32; in norm to 1e-2 in bf16, where a layer before it would amplify the rounding."""
    names = ["layers.0", "layers.2"] if dtype == torch.float32 else ["layers.2"]
    model = build(name, dtype, target_modules=names).train(training)
    x = torch.randn(2, 7, 8).to(dtype)
    want = results(model, x)
    same_masks()
    calls = fused_calls(monkeypatch)
    got = results(fp.accelerate(model), x)
    assert len(calls) == len(names)
    agree(got, want, dtype)
    calls.clear()
    same_masks()
    again = results(fp.restore(model), x)
    assert not calls
    assert all(torch.equal(again[n], want[n]) for n in want)


@pytest.mark.parametrize("name", ["lora-dropout", "dora", "adalora", "ia3"])
def test_losses_over_32_steps(name, same_masks):
    curves, start = [], build(name)
    for fused in (False, True):
        same_masks()
        model = copy.deepcopy(start)
        model = fp.accelerate(model) if fused else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(1)
        losses = []
        for _ in range(32):
            x = torch.randn(16, 8)
            loss = (model(x) - x[:, :5]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < curves[0][0]
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_but_the_class_changes(name, tmp_path):
    # PEFT merges no lora_bias into a layer without a bias
    options = {"target_modules": ["layers.0"]} if name == "lora-bias" else {}
    model = build(name, **options).eval()
    before, shown = {n: id(p) for n, p in model.named_parameters()}, repr(model)
    keys, x = list(model.state_dict()), torch.randn(3, 8)
    want = model(x)
    assert fp.accelerate(fp.accelerate(model)) is model
    assert {n: id(p) for n, p in model.named_parameters()} == before
    assert repr(model) == shown
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    stock = peft.PeftModel.from_pretrained(Net(), tmp_path).eval()
    for other in (stock, fp.accelerate(stock), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), want, rtol=1e-5, atol=1e-6)
    fused = {type(m) for m in copy.deepcopy(model).modules()} & set(bridge.FUSED.values())
    assert fused
    with model.disable_adapter():
        base = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(base, Net()(x), rtol=0, atol=0)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    assert type(model.merge_and_unload().layers[0]) is nn.Linear


def test_several_adapters(same_masks, monkeypatch):
    model = build("lora-dropout")
    model.add_adapter("other", peft.LoraConfig(**{**R, "r": 2}, target_modules=["layers.0"]))
    x = torch.randn(5, 8)
    for active in ("other", "default", ["default", "other"]):
        model.base_model.set_adapter(active)
        same_masks()
        want = results(model, x)
        same_masks()
        close(results(fp.accelerate(model), x), want, 1e-5)
        fp.restore(model)
    fp.accelerate(model)
    model.delete_adapter("default")
    model.base_model.set_adapter("other")
    calls = fused_calls(monkeypatch)
    model(x)
    assert len(calls) == 1  # layers.2 has no adapter any more
    assert "no adapter of this layer is active" in str(fp.explain(model))


def test_what_cannot_be_fused_keeps_peft_s_forward(monkeypatch):
    model = fp.accelerate(build("lora"))
    x = torch.randn(2, 8)
    calls = fused_calls(monkeypatch)
    layer = model.base_model.model.layers[0]
    layer(x, adapter_names=["default", "__base__"])
    handle = layer.lora_A["default"].register_forward_hook(lambda *a: None)
    layer(x)
    assert "its A or B has hooks" in str(fp.explain(model))
    handle.remove()
    layer.base_layer = nn.Sequential(layer.base_layer)
    layer(x)
    assert not calls
    assert "its base is a torch.nn.modules.container.Sequential" in str(fp.explain(model))


class Packed(torch.Tensor):
    """A wrapper subclass, as quantised and sharded weights are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return Packed(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        out = func(*(t.inner if isinstance(t, Packed) else t for t in args), **(kwargs or {}))
        return Packed(out) if func is torch.ops.aten.detach.default else out


def test_a_forward_replaced_on_peft_s_own_layer_is_left_alone(monkeypatch):
    model, x = build("lora", target_modules=["layers.2"]), torch.randn(2, 8)
    want = model(x)
    fp.accelerate(model)
    calls = fused_calls(monkeypatch)
    layer = model.base_model.model.layers[2]
    layer.forward = peft.tuners.lora.Linear.forward.__get__(layer)  # as hooks of a device_map do
    assert torch.equal(model(x), want)
    assert not calls
    assert fp.explain(model)[0].why.startswith("its forward is replaced on the instance")


class OtherConv1D(transformers.pytorch_utils.Conv1D):
    def forward(self, x):
        return 2 * super().forward(x)


def test_an_adapter_with_a_bias_in_a_keeps_peft_s_forward(monkeypatch):
    x, calls = torch.randn(2, 8), fused_calls(monkeypatch)
    model = build("lora", target_modules=["layers.0"])
    layer = model.base_model.model.layers[0]
    layer.lora_A["default"].bias = nn.Parameter(torch.ones(3))
    want = model(x)
    assert torch.equal(fp.accelerate(model)(x), want)
    assert not calls
    assert "the A of adapter 'default' has a bias" in str(fp.explain(model))


def test_meta_tensors_under_autocast():
    with torch.device("meta"):
        model = fp.get_peft_model(Net(), fp.LieraConfig(r=2, target_modules=["layers.0"]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.empty(3, 8, device="meta"))
        y.sum().backward()
    assert y.is_meta


def test_variants_keep_peft_s_forward(monkeypatch):
    """aLoRA, whose update starts in the middle of the sequence."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                      intermediate_size=32, bos_token_id=0, eos_token_id=1)  # fmt: skip
    alora = peft.LoraConfig(**R, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6])
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), alora).eval()
    ids = torch.tensor([[2, 3, 5, 6, 7, 8], [9, 5, 6, 4, 3, 2]])
    want = model(input_ids=ids).logits
    fp.accelerate(model)
    calls = fused_calls(monkeypatch)
    assert torch.equal(model(input_ids=ids).logits, want)
    assert not calls
    assert "adapter 'default' is a variant of LoRA (ALoraLinearVariant)" in str(fp.explain(model))


def test_conv1d_and_other_layers():
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.0,
                                     embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    lora = peft.LoraConfig(**R, target_modules=["c_attn", "c_proj", "wte"], fan_in_fan_out=True)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)
    ids = torch.randint(32, (2, 6))
    want = model(ids, labels=ids).loss
    torch.testing.assert_close(fp.accelerate(model)(ids, labels=ids).loss, want, rtol=1e-5, atol=0)
    rows = {row.name: row for row in fp.explain(model)}
    assert rows["base_model.model.transformer.wte"].form == "lookup"
    assert rows["base_model.model.transformer.h.0.attn.c_attn"].backend == "eager"


@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_autocast(name):
    model, x = build(name), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = results(model, x)
        got = results(fp.accelerate(model), x)
    assert got["y"].dtype == want["y"].dtype
    for n, reference in want.items():
        assert (got[n].float() - reference.float()).norm() <= 2e-2 * reference.float().norm(), n


@pytest.mark.parametrize(
    ("name", "dtype", "limit"),
    [("lora", torch.bfloat16, 1.1), ("lora-dropout", torch.bfloat16, 1.1), ("dora", torch.bfloat16, 2.1)],
)
def test_bytes_saved_for_backward(name, dtype, limit):
    """A 1024 x 1024 layer on 512 tokens, in multiples of its input: what PEFT keeps shrinks to x (and z for DoRA)."""
    kept = {}
    for fused in (False, True):
        torch.manual_seed(0)
        options = {"target_modules": ["0"]}
        model = peft.get_peft_model(nn.Sequential(nn.Linear(1024, 1024, dtype=dtype)), CONFIGS[name](**options))
        model = fp.accelerate(model) if fused else model
        x = torch.randn(512, 1024, dtype=dtype, requires_grad=True)
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            model(x)
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        kept[fused] = sum(n for at, n in sizes.items() if at not in own) / x.nbytes
    assert kept[True] <= limit < kept[False]


def test_bad_calls(monkeypatch):
    with pytest.raises(
        ValueError, match=r"model=Net has no Hugging Face PEFT layer; adapt it with peft\.get_peft_model"
    ):
        fp.accelerate(Net())
    with pytest.raises(TypeError, match=r"model=3 must be a torch\.nn\.Module"):
        fp.accelerate(3)
    with pytest.raises(TypeError, match=r"model=3 must be a torch\.nn\.Module"):
        fp.restore(3)
    monkeypatch.setitem(versions.TRIED, "peft", ("0.1", "0.2"))
    monkeypatch.setattr(versions, "_warned", set())
    said = [warned(fp.accelerate, build("lora")) for _ in range(2)]
    assert len(said[0]) == 1
    assert "outside the range that fused_peft was tested on, >=0.1,<0.2" in said[0][0]
    assert not said[1]


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Mixed(nn.Module):
    """A module of every kind that PEFT's LoRA adapts, and that this process can make."""

    def __init__(self):
        super().__init__()
        self.emb, self.conv = nn.Embedding(9, 8), nn.Conv2d(1, 2, 3)
        self.plain, self.other, self.last = nn.Linear(8, 8), Doubling(8, 8), nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.experts = nn.Module()
        self.experts.weights = nn.Parameter(torch.randn(2, 8, 8))

    def forward(self, ids):
        x = self.last(self.other(self.plain(self.emb(ids))))
        return self.attention(x, x, x)[0] + x @ self.experts.weights.sum(0)


def mixed(*names, parameters=None, **options):
    config = peft.LoraConfig(**R, target_modules=list(names), target_parameters=parameters, **options)
    return peft.get_peft_model(Mixed(), config)


class CountCalls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CONFIGS)
def test_silent_where_all_layers_are_fused(name):
    model = build(name)
    assert not warned(fp.accelerate, model)
    model.merge_adapter() if name != "lora-bias" else model.eval()
    assert not warned(fp.accelerate, model)


UNFUSED = {  # what is targeted: how many of its layers are fused
    "an embedding with DoRA": (lambda: mixed("emb", use_dora=True), "0 of 1"),
    "a convolution": (lambda: mixed("conv", "plain", "last"), "2 of 3"),
    "DoRA beside a forward that is not x W^T + b": (lambda: mixed("plain", "other", use_dora=True), "1 of 2"),
    "an attention": (lambda: mixed("attention"), "0 of 2"),  # and its projection, which nobody calls
    "a bare parameter": (lambda: mixed("plain", parameters=["experts.weights"]), "1 of 2"),
    "token rows": (lambda: mixed("plain", trainable_token_indices={"emb": [1, 2]}), "1 of 2"),
    "all of them": (lambda: mixed("emb", "conv", "plain", "other", "last", "attention"), "4 of 7, beside"),
    "a method without a fused form": (
        lambda: peft.get_peft_model(Net(), peft.LoHaConfig(r=2, target_modules=["layers.0"])),
        "0 of 1",
    ),
}


@pytest.mark.parametrize("kind", UNFUSED)
def test_one_warning_counts_what_is_not_fused(kind):
    """In explain's words, its numbers and without a tensor made or moved."""
    make, fused = UNFUSED[kind]
    fused, _, beside = fused.partition(", ")
    of = ", 1 of them beside the product of a Doubling" if beside else ""
    model = make()
    with CountCalls() as counted:
        said = warned(fp.accelerate, model)
    if "DoRA" not in kind:  # which tries the base on four rows
        # PEFT's attention puts its weights in place anew whenever modules are listed
        assert set(counted.calls) <= {torch.ops.aten.detach.default}
    assert len(said) == 1
    assert f"accelerate fused {fused} PEFT layers{of}; " in said[0]
    rows = fp.explain(model)
    reasons = Counter(row.why for row in rows if row.form == "PEFT's")
    assert f"{len(rows) - reasons.total()} of {len(rows)}" == fused
    assert f"; {reasons.total()} keep PEFT's forward: " in said[0]
    for why, count in reasons.most_common(3):
        assert re.search(rf"{re.escape(why)} \({count}, e\.g\. \S+\)", said[0]), why
    assert (f"{len(reasons) - 3} further reasons" in said[0]) == (len(reasons) > 3)


def test_the_warning_points_at_the_caller_s_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fp.accelerate(mixed("conv"))
    assert caught[0].filename == __file__


def test_modules_to_save_are_no_layers_to_fuse():
    model = mixed("plain", modules_to_save=["last"])
    assert not warned(fp.accelerate, model)


def by_add_adapter(model, config, folder):
    model.add_adapter("second", config)


def by_load_adapter(model, config, folder):
    torch.manual_seed(3)
    peft.get_peft_model(Net(), config, adapter_name="second").save_pretrained(folder)
    model.load_adapter(folder / "second", "second")


def by_injection(model, config, folder):
    peft.inject_adapter_in_model(config, model.base_model.model, "second")


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("prepare", [lambda model: model, copy.deepcopy, pickled], ids=["", "deepcopy", "pickle"])
@pytest.mark.parametrize("add", [by_add_adapter, by_load_adapter, by_injection])
@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "ia3"])
def test_adapters_added_later_are_fused_by_themselves(name, add, prepare, monkeypatch, tmp_path):
    """On a module that had no adapter before; the outputs are stock PEFT's."""
    models = [build(name, target_modules=["layers.2"]) for _ in range(2)]
    stock, fast = models[0], prepare(fp.accelerate(models[1]))
    for model in (stock, fast):
        targets = {"target_modules": ["0", "2"]} if name == "ia3" else {"target_modules": ["layers.0"]}
        config = CONFIGS[name](**targets, inference_mode=True)
        torch.manual_seed(5)
        said = warned(add, model, config, tmp_path)
        assert not any("accelerate fused" in text for text in said)
    rows = fp.explain(fast)
    assert [row.name for row in rows] == [f"base_model.model.layers.{i}" for i in (0, 2)]
    assert "PEFT's" not in [row.form for row in rows]
    assert repr(fast) == repr(stock)
    x = torch.randn(3, 8)
    calls = fused_calls(monkeypatch)
    for active in ("second", "default"):
        for model in (stock, fast):
            for layer in model.modules():
                if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
                    layer.set_adapter(active)
        want = stock(x)
        assert not calls
        torch.testing.assert_close(fast(x), want, rtol=1e-5, atol=1e-6)
        assert calls
        calls.clear()


def test_only_accelerated_models_are_fused_further():
    config = CONFIGS["lora"](target_modules=["layers.0"])
    never, undone = (build("lora", target_modules=["layers.2"]) for _ in range(2))
    fp.restore(fp.accelerate(undone))
    for model in (never, undone):
        model.add_adapter("second", config)
        assert {row.why for row in fp.explain(model)} == {"accelerate has not run on it"}
    after = fp.restore(fp.accelerate(never))  # undoes what was accelerated by itself too
    assert not any(isinstance(m, bridge.Fused) for m in after.modules())


def test_adapters_added_later_are_named_where_they_are_not_fused():
    model = fp.accelerate(mixed("plain"))
    said = warned(model.add_adapter, "second", peft.LoraConfig(**R, target_modules=["plain", "conv", "last"]))
    assert len(said) == 1
    assert "accelerate fused 2 of 3 PEFT layers of adapter 'second'; 1 keep PEFT's forward: " in said[0]
    assert re.search(r"lora.layer.Conv2d has no fused form: .* \(1, e.g. \S*conv\)", said[0])
    # one on the same modules, of a kind that has no fused form: not active yet, and named all the same
    variant = peft.LoraConfig(**R, target_modules=["plain"], alora_invocation_tokens=[1])
    said = warned(model.add_adapter, "third", variant)
    assert "accelerate fused 0 of 1 PEFT layers of adapter 'third'" in said[-1]
    assert "adapter 'third' is a variant of LoRA (ALoraLinearVariant)" in said[-1]
    assert "PEFT's" not in [row.form for row in fp.explain(model) if not row.name.endswith("conv")]


def test_a_pickle_goes_on_in_another_process(tmp_path):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
    torch.save(fp.accelerate(model), tmp_path / "model.pt")
    script = f"""
import torch, peft
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
model.add_adapter("second", peft.LoraConfig(target_modules=["1"]))
print(*(type(m).__name__ for m in model.base_model.model))
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, capture_output=True, text=True)
    assert run.stdout.split() == ["FusedLoraLinear"] * 2


def test_dora_keeps_the_norm_of_a_weight_that_stays(monkeypatch):
    model = fp.accelerate(
        peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), peft.LoraConfig(**R, use_dora=True, target_modules=["0"]))
    )
    stock = copy.deepcopy(fp.restore(copy.deepcopy(model)))
    layer, counted = model.base_model.model[0], []
    norm2 = peft_layers._row_norm2
    monkeypatch.setattr(peft_layers, "_row_norm2", lambda w: (counted.append(1), norm2(w))[1])
    x = torch.randn(3, 8)

    def agrees(made):
        counted.clear()
        for _ in range(2):
            torch.testing.assert_close(model(x), stock(x), rtol=1e-5, atol=1e-6)
        assert len(counted) == made

    agrees(1)
    agrees(0)
    for each in (model, stock):  # in place
        with torch.no_grad():
            each.base_model.model[0].base_layer.weight.mul_(2)
    agrees(1)
    for each in (model, stock):  # another storage
        each.base_model.model[0].base_layer.weight.data = 3 * torch.ones(6, 8)
    agrees(1)
    for each in (model, stock):  # without a trace, as merging writes
        each.merge_adapter()
        each.unmerge_adapter()
    agrees(1)
    for each in (model, stock):
        each.base_model.model[0].base_layer.weight.data.mul_(2)
        each.train()
    agrees(1)
    assert not any("norm2" in name for name in pickle.loads(pickle.dumps(layer)).__dict__)
    assert not any("norm2" in name for name in model.state_dict())
    assert not any("norm2" in name for name in fp.restore(model).base_model.model[0].__dict__)


def replaced(base, weight):
    base.weight = nn.Parameter(weight, requires_grad=False)


def put_in_data(base, weight):
    base.weight.data = weight


def assigned(base, weight):
    base.load_state_dict({"weight": weight, "bias": base.bias}, assign=True)


@pytest.mark.parametrize("change", [replaced, put_in_data, assigned])
def test_dora_s_kept_norm_is_of_no_weight_that_had_the_address_before(change):
    """Freed memory comes back, so another weight's address and version are often the same: here always."""
    model = fp.accelerate(
        peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(**R, use_dora=True, target_modules=["0"]))
    )
    base, x, memory, seen = model.base_model.model[0].base_layer, torch.randn(3, 8), bytearray(4 * 64), []
    for i in range(3):
        weight = torch.frombuffer(memory, dtype=torch.float32).view(8, 8)
        torch.frombuffer(memory, dtype=torch.float32).copy_(torch.randn(64) * (i + 1))  # the version stays
        change(base, weight)
        seen.append((base.weight.data_ptr(), base.weight._version))
        torch.testing.assert_close(model(x), fp.restore(copy.deepcopy(model))(x), rtol=1e-5, atol=1e-6)
    assert len(set(seen)) == 1


def test_loading_a_state_dict_forgets_the_norm():
    model = fp.accelerate(
        peft.get_peft_model(nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(**R, use_dora=True, target_modules=["0"]))
    )
    x, layer = torch.randn(3, 8), model.base_model.model[0]
    model(x)
    model.load_state_dict(model.state_dict())
    assert not any("norm2" in name for name in layer.__dict__)


class Blocked(nn.Linear):
    """A product without gradients, as kernels for inference give."""

    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Exempt(nn.Linear):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


def falcon(N, K):
    return transformers.models.falcon.modeling_falcon.FalconLinear(K, N)


def conv1d(N, K):
    return OtherConv1D(N, K)


def hooked(N, K):
    base = nn.Linear(K, N)
    base.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    base.register_forward_hook(lambda module, args, y: y * 3 + 1)
    return base


def placed(N, K):
    """As dispatch_model does: the forward is replaced on the instance."""
    hooks = pytest.importorskip("accelerate.hooks")
    return hooks.add_hook_to_module(nn.Linear(K, N), hooks.AlignDevicesHook("cpu", io_same_device=True))


BESIDE = {
    "FalconLinear": falcon,
    "Doubling": lambda N, K: Doubling(K, N),
    "OtherConv1D": conv1d,
    "Linear, hooks": hooked,
    "Linear, placed": placed,
    "Linear, packed": lambda N, K: nn.Linear(K, N),  # packed once the adapters are there
    "Blocked": lambda N, K: Blocked(K, N),
}
NO_DORA = ("Doubling", "OtherConv1D", "Linear, packed")


def beside(kind, name, dtype=torch.float32, second=False):
    """A model of one such layer under nn.Linear's, with an adapter, or two that are both active."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), BESIDE[kind](6, 8)).to(dtype)
    on = {"target_modules": ["1"]} | ({"fan_in_fan_out": True} if kind == "OtherConv1D" else {})

    def make():
        if name.startswith("ia3"):
            return peft.IA3Config(**on, feedforward_modules=["1"] * (name == "ia3-in"), init_ia3_weights=False)
        return ALL[name](**on)

    model = peft.get_peft_model(net, make())
    if second:
        config = make()
        config.inference_mode = "adalora" in name  # of which PEFT trains one
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"], inference_mode=config.inference_mode)
    layer = model.base_model.model[1]
    with torch.no_grad():
        for key, p in layer.named_parameters():
            if "base_layer" not in key and "ranknum" not in key:
                p.mul_(0.3).add_(torch.rand_like(p) * 0.1)
                p.requires_grad_(True)
    if kind == "Linear, packed":
        layer.base_layer.weight = nn.Parameter(Packed(layer.base_layer.weight.detach()), requires_grad=False)
    return model


@pytest.mark.parametrize("second", [False, True], ids=["", "two"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", [*(n for n in CONFIGS if n != "ia3"), "ia3-in", "ia3-out"])
@pytest.mark.parametrize("kind", BESIDE)
def test_adapters_act_beside_a_product_of_its_own(kind, name, dtype, rtol, second, same_masks, monkeypatch):
    if kind == "Blocked" and ("ia3" in name or "adalora" in name):
        pytest.skip("PEFT raises in backward")
    model, x = beside(kind, name, dtype, second), torch.randn(2, 5, 8, dtype=dtype)
    want = results(model, x)
    same_masks()
    fp.accelerate(model)
    calls = fused_calls(monkeypatch)
    row = fp.explain(model)[0]
    close(results(model, x), want, rtol)
    base = kind.partition(",")[0]
    if "dora" in name and (second or kind in NO_DORA or "dropout" in name):
        assert row.form == "PEFT's"
        assert not calls
    else:
        assert row.form == "beside"
        assert row.why.startswith(f"beside the product of a {base}")
        assert ("passes no gradient" in row.why) == (kind == "Blocked")
        assert len(calls) == ("ia3" not in name) * (1 + second)
        assert all(call[1] is None for call in calls)  # the product is not made again
        assert not warned(fp.accelerate, model)


@pytest.mark.parametrize("name", ["lora", "dora", "ia3-in", "ia3-out", "adalora"])
def test_a_base_with_hooks_is_called_once_by_its_own_call(name):
    model, seen = beside("FalconLinear", name), []
    fp.accelerate(model)
    model.base_model.model[1].base_layer.register_forward_hook(lambda *a: seen.append(a))
    fp.explain(model)
    assert not seen
    model(torch.randn(3, 8))
    assert len(seen) == 1


@pytest.mark.parametrize("kind", ["FalconLinear", "Exempt"])
@pytest.mark.parametrize("name", ["lora", "lora-bias", "adalora", "ia3-in", "ia3-out"])
def test_beside_under_autocast(kind, name, monkeypatch):
    monkeypatch.setitem(BESIDE, "Exempt", lambda N, K: Exempt(K, N))
    model, x = beside(kind, name), torch.randn(4, 8)
    if kind == "Exempt":
        model.base_model.model[0] = nn.Identity()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = results(model, x)
        got = results(fp.accelerate(model), x)
    assert got["y"].dtype == want["y"].dtype
    for n, reference in want.items():
        assert (got[n].float() - reference.float()).norm() <= 2e-2 * reference.float().norm(), n


@pytest.mark.parametrize("name", ["lora", "lora-bias", "dora", "adalora", "ia3-in", "ia3-out"])
def test_beside_copied_pickled_and_compiled(name):
    model, x = beside("FalconLinear", name), torch.randn(4, 8)
    want = results(model, x)
    fp.accelerate(model)
    model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(results(other, x), want, 1e-5)
    torch._dynamo.reset()
    y = torch.compile(model.base_model.model[1], backend="aot_eager", fullgraph=True)(model.base_model.model[0](x))
    torch.testing.assert_close(y.detach(), want["y"], rtol=1e-5, atol=1e-6)


class Times(nn.Linear):
    def __init__(self, by):
        super().__init__(8, 6)
        self.by = by

    def forward(self, x):
        return self.by * super().forward(x)


def test_dora_reads_a_base_anew_where_it_is_another():
    model, x = beside("FalconLinear", "dora"), torch.randn(3, 8)
    layer = fp.accelerate(model).base_model.model[1]
    for by, form in ((1, "beside"), (2, "PEFT's"), (1, "beside")):
        layer.base_layer = Times(by)
        assert fp.explain(model)[0].form == form
        torch.testing.assert_close(model(x), fp.restore(copy.deepcopy(model))(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lora", "lora-bias", "dora", "adalora", "ia3-in", "ia3-out"])
def test_beside_a_base_that_hooks_offload(name):
    accelerate = pytest.importorskip("accelerate")
    model, x = beside("FalconLinear", name), torch.randn(3, 8)
    accelerate.cpu_offload(model.base_model.model[1].base_layer, execution_device=torch.device("cpu"))
    with torch.no_grad():
        if name == "dora":  # PEFT's forward, which finds no values to take the norm of
            assert "on the meta device (offloaded?)" in fp.explain(fp.accelerate(model))[0].why
            return
        want = model(x)
        torch.testing.assert_close(fp.accelerate(model)(x), want, rtol=1e-5, atol=1e-6)
    row = fp.explain(model)[0]
    assert row.form == "beside"
    assert "passes no gradient" not in row.why
