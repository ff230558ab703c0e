"""fp.accelerate on PEFT's LoRA of embeddings, and beside trained tokens and tied weights: PEFT's numbers."""

import copy
import pickle

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from test_accelerate import R, close, warned  # noqa: E402

import fused_peft as fp  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
V = 40


class Scaled(nn.Embedding):
    """As Gemma's."""

    embed_scale = torch.tensor(3.0)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale.to(self.weight.dtype)


class Net(nn.Module):
    def __init__(self, kind=nn.Embedding, **options):
        super().__init__()
        self.emb, self.out = kind(V, 8, **options), nn.Linear(8, 5)

    def forward(self, ids, **options):
        return self.out(torch.tanh(self.emb(ids)))


def build(dtype=torch.float32, kind=nn.Embedding, options=(), net=Net, **config):
    torch.manual_seed(0)
    config = {**R, "target_modules": ["emb", "out"], **config}
    model = peft.get_peft_model(net(kind, **dict(options)).to(dtype), peft.LoraConfig(**config))
    return shaken(model.double() if dtype == torch.float64 else model)


def shaken(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(0.3).add_(torch.rand_like(p) * 0.1)
    return model


def results(model, ids):
    y = model(ids)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {
        "y": y.detach(),
        **dict(zip(named, torch.autograd.grad(y.float().square().sum(), [*named.values()]), strict=True)),
    }


IDS = torch.tensor([[3, 0, 3, 7, 1], [39, 0, 5, 5, 5]])
KINDS = {
    "plain": {},
    "padded": {"options": {"padding_idx": 0}},
    "by frequency": {"options": {"scale_grad_by_freq": True}},
    "scaled": {"kind": Scaled},
    "rslora": {"use_rslora": True},
    "mica": {"init_lora_weights": "mica"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_numbers_as_peft(kind, dtype):
    start = torch.float32 if dtype == torch.float64 else dtype
    model = build(start, **KINDS[kind])
    model = model.double() if dtype == torch.float64 else model
    keys = list(model.state_dict())
    want = results(model, IDS)
    assert not warned(fp.accelerate, model)
    got = results(model, IDS)
    assert fp.explain(model)[0].form == "lookup"
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in want.items()}
    assert list(model.state_dict()) == keys
    if dtype == torch.bfloat16:
        assert all((got[n] - t).float().norm() <= 2e-2 * t.float().norm() for n, t in want.items())
    else:
        close(got, want, 1e-10 if dtype == torch.float64 else 1e-5)
    again = results(fp.restore(model), IDS)
    assert all(torch.equal(again[n], t) for n, t in want.items())


@pytest.mark.parametrize("mutant", ["scale", "the update of another id", "doubled dB"])
def test_the_comparison_sees_a_mutant(mutant, monkeypatch):
    addmm = torch.addmm

    def changed(y, T, B, alpha, **others):
        if others:  # another call
            return addmm(y, T, B, alpha=alpha, **others)
        if mutant == "scale":
            return addmm(y, T, B, alpha=1.1 * alpha)
        if mutant == "doubled dB":
            return addmm(y, T, 2 * B - B.detach(), alpha=alpha)
        return addmm(y, T.roll(1, 0), B, alpha=alpha)

    monkeypatch.setattr(torch, "addmm", changed)
    with pytest.raises(AssertionError):
        test_the_same_numbers_as_peft("plain", torch.float64)


def test_several_adapters_mixed_batches_merging_and_none(tmp_path):
    models = [build(), build()]
    for model in models:
        torch.manual_seed(7)
        model.add_adapter("second", peft.LoraConfig(**{**R, "r": 2}, target_modules=["emb"]))
    stock, fast = models[0], fp.accelerate(models[1])
    for active in ("second", ["default", "second"], "default"):
        for model in models:
            model.base_model.set_adapter(active)
        close(results(fast, IDS), results(stock, IDS), 1e-5)
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    assert (tmp_path / "0/adapter_model.safetensors").read_bytes() == (
        tmp_path / "1/adapter_model.safetensors"
    ).read_bytes()
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        close(results(other, IDS), results(stock, IDS), 1e-5)
    names = {"adapter_names": ["second", "__base__"]}
    torch.testing.assert_close(fast.eval()(IDS, **names), stock.eval()(IDS, **names), rtol=1e-5, atol=1e-6)
    for model in models:
        model.train().base_model.set_adapter(["default", "second"])
    with fp.adapter_batch(fast, ["second", "default"]):
        mixed = fast(IDS)
    for i, name in enumerate(("second", "default")):
        stock.base_model.set_adapter(name)
        torch.testing.assert_close(mixed[i], stock(IDS)[i], rtol=1e-5, atol=1e-6)
    for model in models:
        model.base_model.set_adapter("default")
    with stock.disable_adapter(), fast.disable_adapter():
        assert torch.equal(stock(IDS), fast(IDS))
    for model in models:
        model.merge_adapter()
    assert torch.equal(stock(IDS), fast(IDS))
    for model in models:
        model.unmerge_adapter()
    close(results(fast, IDS), results(stock, IDS), 1e-5)
    assert type(fast.merge_and_unload().emb) is nn.Embedding


def test_a_scaling_that_is_a_tensor():
    """As PEFT makes it for hot-swapping in a compiled model."""
    model = build()
    layer = model.base_model.model.emb
    layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    want = results(model, IDS)
    close(results(fp.accelerate(model), IDS), want, 1e-5)


def test_autocast_and_compiled():
    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = model.base_model.model.emb(IDS)
        fp.accelerate(model)
        got = model.base_model.model.emb(IDS)
    assert got.dtype == want.dtype
    assert (got - want).norm() <= 1e-2 * want.norm()
    want = model(IDS)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(IDS), want)


def test_nothing_of_the_vocabulary_s_size_is_kept():
    model = fp.accelerate(build(torch.bfloat16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.base_model.model.emb(IDS)
    assert kept
    assert max(t.numel() for t in kept) <= IDS.numel() * 8 < V * 3


REASONS = {
    "DoRA": ({"use_dora": True}, "a variant of LoRA (DoraEmbeddingVariant)"),
    "max_norm": ({"options": {"max_norm": 1.0}}, "its table has a max_norm"),
    "sparse": ({"options": {"sparse": True}}, "its table has sparse gradients"),
}


@pytest.mark.parametrize("kind", REASONS)
def test_what_keeps_peft_s_forward_says_why(kind):
    options, why = REASONS[kind]
    model = build(**options)
    want = copy.deepcopy(model)(IDS)
    (said,) = warned(fp.accelerate, model)
    assert why in said
    assert why in fp.explain(model)[0].why
    torch.testing.assert_close(model(IDS), want, rtol=1e-5, atol=1e-6)


def language_model(**config):
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                     num_attention_heads=2, bos_token_id=0, eos_token_id=1,
                                     tie_word_embeddings=True)  # fmt: skip
    return shaken(peft.get_peft_model(transformers.LlamaForCausalLM(llama), peft.LoraConfig(**R, **config)))


BESIDE = {
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "tokens of a tied head": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": [3, 5],
        "ensure_weight_tying": True,
    },
    "a tied embedding": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "a tied head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "a head saved whole": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
}


@pytest.mark.parametrize("kind", BESIDE)
def test_beside_trained_tokens_and_tied_weights(kind, tmp_path):
    """Logits and gradients; what is saved; three steps of training."""
    models = [language_model(**BESIDE[kind]) for _ in range(2)]
    fast = fp.accelerate(models[1])
    assert [row.form for row in fp.explain(fast) if row.name.endswith("q_proj")] == ["factors"]
    ids, found, losses = torch.randint(2, V, (2, 6)), [], []
    for i, model in enumerate(models):
        out = model(input_ids=ids, labels=ids)
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(out.loss, [*named.values()])
        found.append({"logits": out.logits.detach(), **dict(zip(named, grads, strict=True))})
        optimizer = torch.optim.SGD(named.values(), lr=0.1)
        for _ in range(3):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        model.save_pretrained(tmp_path / str(i))
    close(found[1], found[0], 1e-4)
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-5)
    saved = [
        peft.utils.save_and_load.safe_load_file(str(tmp_path / str(i) / "adapter_model.safetensors")) for i in (0, 1)
    ]
    close(saved[1], saved[0], 1e-3)
