"""Adapters on nn.Embedding: the formula on one-hot rows, what a layer does, Hugging Face PEFT's numbers and files."""

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from oracle import gradients
from paper import FORMULAS
from torch import nn

import fused_peft as fp
from fused_peft.core import lookup
from fused_peft.core.torch_internals import HALF_PRODUCTS
from fused_peft.methods import METHODS

V, N, R = 13, 7, 3
IDS = torch.tensor([[3, 0, 3, 7, 1], [12, 0, 5, 5, 5]])
LORA = next(case for case in CASES if case.name == "lora")
# what adds a low-rank product and reads no weight: the others are refused
ACTS = {"lora", "adalora", "trilora", "flora", "moslora", "kasa", "vera"}


class Scaled(nn.Embedding):
    """As Gemma's."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)

    def forward(self, input_ids):
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)


class ScaledByNumber(nn.Embedding):
    """As BART's."""

    embed_scale = 3.0

    def forward(self, input_ids):
        return super().forward(input_ids) * self.embed_scale


class Offset(nn.Embedding):
    """As BART's positions."""

    def forward(self, ids):
        return super().forward((ids + 2) % self.num_embeddings)


TABLES = {
    "plain": nn.Embedding,
    "padded": lambda *a, **k: nn.Embedding(*a, padding_idx=0, **k),
    "scaled": Scaled,
    "scaled by a number": ScaledByNumber,
}


def shaken(module):
    """With values that no start has."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(module.named_parameters()):
            if p.requires_grad:
                p.copy_(torch.randn(p.shape) * 0.5)
    return module


def adapted(config=None, table="plain", dtype=torch.float64):
    torch.manual_seed(0)
    config = config or fp.LoraConfig(r=R, lora_alpha=5)
    return shaken(fp.PeftEmbedding.from_embedding(TABLES[table](V, N).to(dtype), config))


class Net(nn.Module):
    def __init__(self, table=nn.Embedding):
        super().__init__()
        self.emb, self.out = table(V, N), nn.Linear(N, 5)

    def forward(self, ids):
        return self.out(torch.tanh(self.emb(ids)))


def aimed(method, *targets):
    """A method's example, for these modules."""
    return METHODS[method].config(**{**vars(METHODS[method].example(R)), "target_modules": [*targets]})


def net(config=None, table="plain", targets=("emb", "out")):
    torch.manual_seed(0)
    config = config or fp.LoraConfig(r=R, lora_alpha=5, target_modules=[*targets])
    return shaken(fp.get_peft_model(Net(TABLES[table]), config))


def test_the_page_names_the_methods():
    page = (Path(__file__).parents[1] / "docs/methods.md").read_text().partition("## Embeddings")[2]
    assert set(re.findall(r"`(\w+)`", page.partition("These act there")[2].partition(", unless")[0])) == ACTS


# The formula


def by_formula(case, layer, ids, dy):
    """y and every gradient from tests/paper.py on one-hot rows, without dropout; A's at padding_idx left out."""
    p = {n: getattr(layer, n).detach().clone().requires_grad_() for n in layer.tensor_names}
    x, by = F.one_hot(ids.long(), V).double(), 1.0
    if (scale := getattr(layer, "embed_scale", None)) is not None:
        by = float(scale)
    y = by * FORMULAS[case.method](x, layer.weight.detach().T, None, p, case.constants(layer, layer.config))
    found = gradients(y, p, dy)
    if layer.padding_idx is not None:
        found["lora_A"][:, layer.padding_idx] = 0
    return found


def disagreements(case, layer, ids, tolerance=1e-12):
    torch.manual_seed(2)
    dy = torch.randn(*ids.shape, N, dtype=torch.float64)
    got = gradients(layer(ids), {n: getattr(layer, n) for n in layer.tensor_names}, dy)
    want = by_formula(case, layer, ids, dy)
    wrong = [n for n, t in want.items() if not torch.allclose(got[n], t, rtol=0, atol=tolerance * max(1, t.numel()))]
    return wrong


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_case_is_the_formula_on_one_hot_rows_or_refused(case):
    config = case.make(R)
    table = nn.Embedding(V, N, dtype=torch.float64)
    pure = case.method in ACTS or case.name == "parallel_adapter+identity"
    if not pure or getattr(config, "lora_bias", False) or getattr(config, "nonlinearity", "identity") != "identity":
        with pytest.raises(TypeError, match=f"{case.method} cannot adapt an nn.Embedding: .*such as LoRA"):
            fp.PeftEmbedding.from_embedding(table, config)
        assert table.weight.requires_grad
        return
    layer = shaken(fp.PeftEmbedding.from_embedding(table, config))
    assert layer.weight is table.weight
    assert not disagreements(case, layer, IDS)
    assert torch.autograd.gradcheck(lambda *_: layer(IDS), layer.adapter_tensors())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_its_linear_layer_on_one_hot_rows_or_refused(name):
    config, table = METHODS[name].example(R), nn.Embedding(V, N)
    if name not in ACTS:
        with pytest.raises(TypeError, match=f"^{name} cannot adapt an nn.Embedding"):
            fp.PeftEmbedding.from_embedding(table, config)
        with pytest.raises(TypeError, match=f"^emb: {name} cannot adapt an nn.Embedding"):
            fp.get_peft_model(Net(), aimed(name, "emb"))
        return
    layer = shaken(fp.PeftEmbedding.from_embedding(table, config))
    linear = nn.Linear(V, N, bias=False)
    linear.weight.data = table.weight.detach().T.contiguous()
    linear = fp.PeftLinear.from_linear(linear, config)
    linear.load_state_dict({**layer.state_dict(), "weight": linear.weight})
    torch.testing.assert_close(layer(IDS), linear(F.one_hot(IDS, V).float()))


@pytest.mark.parametrize("mutant", ["scale", "B of another shape's product", "update at another id", "doubled dB"])
def test_the_formula_sees_a_mutant(mutant, monkeypatch):
    addmm = torch.addmm

    def changed(y, T, B, alpha):
        if mutant == "scale":
            return addmm(y, T, B, alpha=1.1 * alpha)
        if mutant == "doubled dB":
            return addmm(y, T, 2 * B - B.detach(), alpha=alpha)
        if mutant == "update at another id":
            return addmm(y, T.roll(1, 0), B, alpha=alpha)
        return addmm(y, T, B.t().reshape(B.shape), alpha=alpha)

    layer = adapted()
    assert not disagreements(LORA, layer, IDS)
    monkeypatch.setattr(lookup.torch, "addmm", changed)
    assert disagreements(LORA, layer, IDS)


@pytest.mark.parametrize(
    "ids",
    [
        IDS.int(),
        torch.arange(V)[::2],
        IDS.repeat(2, 2)[:, ::3],
        IDS.t(),
        torch.tensor(4),
        torch.empty(0, dtype=torch.int64),
        torch.empty(2, 0, dtype=torch.int64),
        torch.arange(12).view(2, 1, 2, 3),
    ],
    ids=lambda t: f"{tuple(t.shape)} {t.dtype}",
)
@pytest.mark.parametrize("table", ["plain", "scaled"])
def test_ids_of_any_shape_and_layout(ids, table):
    layer = adapted(table=table)
    assert layer(ids).shape == (*ids.shape, N)
    assert not disagreements(LORA, layer, ids)


@pytest.mark.parametrize("table", TABLES)
def test_what_a_table_does_besides(table):
    layer = adapted(table=table)
    assert isinstance(layer, nn.Embedding)
    assert not disagreements(LORA, layer, IDS)
    with torch.no_grad():  # away from the step that marks it
        assert layer.padding_idx is None or layer.lora_A[:, layer.padding_idx].abs().sum() > 0
    layer(IDS).sum().backward()
    assert layer.weight.grad is None
    if layer.padding_idx is not None:
        assert not layer.lora_A.grad[:, layer.padding_idx].any()
    seen = layer.lora_A.grad.any(0)
    assert set(seen.nonzero().flatten().tolist()) == set(IDS.flatten().tolist()) - {layer.padding_idx}


@pytest.mark.parametrize("instructions", [False, True], ids=["in fp32", "in bf16"])
def test_half_precision_keeps_the_adapter_in_fp32(instructions, monkeypatch):
    monkeypatch.setitem(lookup.HALF_PRODUCTS, torch.bfloat16, instructions)
    layer = adapted(dtype=torch.bfloat16)
    assert layer.lora_A.dtype == torch.float32
    exact = copy.deepcopy(layer).double()
    dy = torch.randn(*IDS.shape, N)
    got, want = (
        gradients(m(IDS), {n: getattr(m, n) for n in m.tensor_names}, dy.to(m.weight.dtype)) for m in (layer, exact)
    )
    assert got["y"].dtype == torch.bfloat16
    assert got["lora_A"].dtype == got["lora_B"].dtype == torch.float32
    for name, t in want.items():
        assert (got[name].double() - t).norm() <= 5e-3 * t.norm(), name


def test_nothing_of_the_vocabulary_s_size_is_kept():
    many, width, tokens = 5000, 64, 32
    layer = shaken(fp.PeftEmbedding.from_embedding(nn.Embedding(many, width).bfloat16(), fp.LoraConfig(r=4)))
    ids, kept = torch.randint(many, (tokens,)), []
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(ids)
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    sizes = sorted(n for at, n in found.items() if at not in own)
    few = HALF_PRODUCTS[torch.bfloat16]  # else it is computed in fp32: nothing is cast
    assert sizes == sorted((8 * tokens, tokens * 4 * 2, width * 4 * 2) if few else (8 * tokens, tokens * 4 * 4))
    model = nn.Sequential(nn.Embedding(many, width).bfloat16())  # ids, A[:, ids], B in the table's dtype
    guess = fp.estimate(model, fp.LoraConfig(r=4, target_modules=["0"]), tokens=tokens)
    assert (guess.x, guess.beyond_x) == (8 * tokens, tokens * 4 * 2 + width * 4 * 2)
    assert (guess.peft_x, guess.peft_beyond_x) == (8 * tokens, tokens * 4 * 4)
    assert guess.adapter == (many + width) * 4 * 4


# What a layer does


def test_starts_as_the_frozen_table():
    torch.manual_seed(0)
    table = nn.Embedding(2000, 64)
    for how in (True, "gaussian"):
        layer = fp.PeftEmbedding.from_embedding(table, fp.LoraConfig(r=8, init_lora_weights=how))
        assert not layer.lora_A.any()
        assert layer.lora_B.std().item() == pytest.approx(1, abs=0.1)
        assert torch.equal(layer(IDS), table(IDS))
        layer.load_state_dict(shaken(copy.deepcopy(layer)).state_dict())
        layer.reset_adapter_parameters()
        assert not layer.lora_A.any()
    layer = fp.PeftEmbedding.from_embedding(table, fp.LoraConfig(r=8, init_lora_weights=False))
    assert layer.lora_A.std().item() == pytest.approx(1, abs=0.1)
    for name in ACTS:
        config = METHODS[name].example(2)
        torch.testing.assert_close(fp.PeftEmbedding.from_embedding(table, config)(IDS), table(IDS))


@pytest.mark.parametrize("table", TABLES)
def test_merged_disabled_and_back(table):
    model, plain = net(table=table), Net(TABLES[table])
    plain.load_state_dict(Net(TABLES[table]).state_dict())
    base = {n: t.clone() for n, t in model.state_dict().items()}
    y = model(IDS)
    with fp.disable_adapter(model):
        off = model(IDS)
    assert not torch.equal(y, off)
    plain.load_state_dict({n.replace("base_layer.", ""): t for n, t in fp.merged_state_dict(model).items()})
    torch.testing.assert_close(plain(IDS), y)
    fp.merge(model)
    model.eval()
    torch.testing.assert_close(model(IDS), y)
    assert fp.explain(model)[0].why == "merged: one plain lookup"
    with fp.disable_adapter(model):
        assert torch.equal(model(IDS), off)
    assert all(torch.equal(base[n], t) for n, t in model.state_dict().items())
    with pytest.raises(RuntimeError, match="call unmerge before load_state_dict"):
        model.load_state_dict(base)
    fp.unmerge(model)
    assert all(torch.equal(base[n], t) for n, t in model.state_dict().items())
    torch.testing.assert_close(model(IDS), y)
    model = fp.merge_and_unload(model)
    assert type(model.emb) is type(plain.emb)
    assert model.emb.__dict__.keys() == plain.emb.__dict__.keys()
    torch.testing.assert_close(model(IDS), y)


@pytest.mark.parametrize("table", TABLES)
def test_copies_pickles_and_state(table):
    model = net(table=table)
    y = model(IDS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin.emb) is type(model.emb)
        assert torch.equal(twin(IDS), y)
    assert [*model.emb.state_dict()] == ["weight", "lora_A", "lora_B"]
    assert [n for n, p in model.emb.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    fresh = fp.get_peft_model(Net(TABLES[table]), fp.LoraConfig(r=R, lora_alpha=5, target_modules=["emb", "out"]))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IDS), y)
    assert repr(model.emb) == "PeftEmbedding(13, 7, method=lora, r=3, lora_alpha=5)" or table != "plain"


def test_several_adapters_by_name():
    model = net(targets=["emb"])
    first = model(IDS).detach()
    fp.add_adapter(model, "second", fp.TriLoraConfig(r=2, target_modules=["emb", "out"]))
    shaken(model.emb.added["second"].requires_grad_())
    shaken(model.out.added["second"].requires_grad_())
    fp.set_adapter(model, "second")
    second = model(IDS).detach()
    fp.set_adapter(model, ["default", "second"])
    E, a, b = model.emb.weight, model.emb, model.emb.added["second"]
    update = a.config.scaling * (a.lora_B @ a.lora_A).T + (b.lora_B @ torch.diag(b.lora_E) @ b.lora_A).T
    torch.testing.assert_close(model.emb(IDS), (E + update)[IDS])
    both = model(IDS)
    with fp.adapter_batch(model, ["default", "second"]):
        mixed = model(IDS)
    torch.testing.assert_close(mixed, torch.stack([first[0], second[1]]))
    mixed.sum().backward()
    assert set(a.lora_A.grad.any(0).nonzero().flatten().tolist()) == set(IDS[0].tolist())
    assert set(b.lora_A.grad.any(0).nonzero().flatten().tolist()) == set(IDS[1].tolist())
    with fp.adapter_batch(model, ["second", "__base__"]), pytest.raises(ValueError, match="names has 2 entries"):
        model(IDS[:1])
    fp.merge(model)
    torch.testing.assert_close(model.eval()(IDS), both)
    fp.unmerge(model)
    with pytest.raises(TypeError, match=r"emb: dora cannot adapt an nn.Embedding"):
        fp.add_adapter(model, "third", fp.DoraConfig(r=2, target_modules=["emb"]))
    with pytest.raises(TypeError, match=r"emb: ia3 cannot adapt an nn.Embedding: .* a scale of the layer's output"):
        fp.add_adapter(model, "third", fp.IA3Config(target_modules=["emb"], feedforward_modules=[]))
    fp.delete_adapter(model, "second")
    fp.set_adapter(model, "default")
    assert torch.equal(model(IDS), first)
    fp.add_adapter(model, "third", fp.LoraConfig(r=2, target_modules=["out"]))
    assert type(fp.merge_and_unload(model).emb) is nn.Embedding


def test_an_adapter_added_where_the_first_has_none():
    model = net(targets=["out"])
    fp.add_adapter(model, "second", fp.LoraConfig(r=2, target_modules=["emb"]))
    assert isinstance(model.emb, fp.PeftEmbedding)
    assert not model.emb.added["second"].lora_A.any()
    fp.set_adapter(model, "second")
    model(IDS).sum().backward()
    assert model.emb.added["second"].lora_A.grad.any()
    fp.delete_adapter(model, "second")
    assert type(model.emb) is nn.Embedding


def test_autocast_compiled_and_checkpointed():
    layer = adapted(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(IDS), layer(IDS).float())  # no lookup heeds it
    model = net()
    want = {n: p.grad for n, p in _trained(model)}
    again = net()
    again.forward = lambda ids, own=again.forward: torch.utils.checkpoint.checkpoint(own, ids, use_reentrant=False)
    for n, p in _trained(again):
        assert torch.equal(p.grad, want[n]), n
    torch.compiler.reset()
    compiled = net()
    compiled.forward = torch.compile(compiled.forward, backend="aot_eager", fullgraph=True)
    for n, p in _trained(compiled):
        torch.testing.assert_close(p.grad, want[n])


def _trained(model):
    model(IDS).square().sum().backward()
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def test_what_is_said_of_it():
    model = net(fp.LoraConfig(r=R, lora_dropout=0.1, target_modules=["emb", "out"]))
    row = fp.explain(model)[0]
    assert (row.name, row.method, row.form, row.backend) == ("emb", "lora", "lookup", "torch")
    assert "no dropout acts" in row.why
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(IDS).sum().backward()
    assert fp.check_training(model, optimizer) == []
    status = fp.get_layer_status(model)[0]
    assert (status.name, status.module_type, status.backend) == ("emb", "PeftEmbedding", "torch")
    assert status.gradient == {"default": True}
    guess = fp.estimate(Net(), fp.TriLoraConfig(r=R, target_modules=["emb", "out"]), tokens=10)
    assert guess.layers[0].peft_x is None
    assert guess.layers[0].x == 80
    assert len(fp.lora_plus_groups(model, lr=1e-3, ratio=16)) == 2


def test_adalora_s_schedule():
    config = fp.AdaLoraConfig(init_r=4, target_r=1, total_step=6, tinit=0, tfinal=1, target_modules=["emb", "out"])
    model = shaken(fp.get_peft_model(Net(), config))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(1, 7):
        model(IDS).square().sum().backward()
        optimizer.step()
        fp.on_step(model, step)
        optimizer.zero_grad()
    kept = sum(int((layer.lora_E != 0).sum()) for layer in (model.emb, model.out))
    assert kept == 2
    assert fp.orthogonality_penalty(model).isfinite()


# What is refused


class WithMore(nn.Embedding):
    def __init__(self, *args):
        super().__init__(*args)
        self.extra = nn.Parameter(torch.zeros(1))

    def forward(self, ids):
        return super().forward(ids)


REFUSED = {
    "max_norm": (lambda: nn.Embedding(V, N, max_norm=1.0), "max_norm=1.0 of Embedding changes rows"),
    "sparse": (lambda: nn.Embedding(V, N, sparse=True), "Embedding has sparse=True"),
    "another forward": (lambda: Offset(V, N), "Offset has a forward of its own"),
    "more parameters": (lambda: WithMore(V, N), "WithMore has a forward of its own"),
    "integers": (
        lambda: nn.Embedding.from_pretrained(torch.ones(V, N, dtype=torch.int8)),
        "table of Embedding is a .*int8",
    ),
    "bag": (lambda: nn.EmbeddingBag(V, N), "EmbeddingBag pools the rows"),
    "complex": (lambda: nn.Embedding(V, N, dtype=torch.complex64), "table of Embedding is a .*complex64"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tables_that_are_refused(kind):
    make, message = REFUSED[kind]
    model = nn.ModuleDict({"emb": make(), "out": nn.Linear(N, 5)})
    for call in (
        lambda: fp.get_peft_model(model, fp.LoraConfig(r=2, target_modules=["emb", "out"])),
        lambda: fp.PeftEmbedding.from_embedding(model["emb"], fp.LoraConfig(r=2)),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    assert type(model["out"]) is nn.Linear
    assert model["out"].weight.requires_grad


def test_what_else_is_refused():
    with pytest.raises(TypeError, match=r"looks up rows; .*PeftEmbedding.from_embedding"):
        fp.PeftLinear.from_linear(nn.Embedding(V, N), fp.LoraConfig(r=2))
    with pytest.raises(TypeError, match=r"it is no nn.Embedding; give it to PeftLinear.from_linear"):
        fp.PeftEmbedding.from_embedding(nn.Linear(V, N), fp.LoraConfig(r=2))
    with pytest.raises(TypeError, match="already carries an adapter"):
        fp.PeftEmbedding.from_embedding(adapted(), fp.LoraConfig(r=2))
    for call in (lambda: fp.PeftEmbedding(V, N), lambda: fp.PeftEmbedding.from_pretrained(torch.ones(V, N))):
        with pytest.raises(TypeError, match=r"made by PeftEmbedding.from_embedding"):
            call()
    with pytest.raises(TypeError, match="a bias of the layer"):
        fp.PeftEmbedding.from_embedding(nn.Embedding(V, N), fp.LoraConfig(r=2, lora_bias=True))
    model = Net()
    with pytest.raises(TypeError, match=r"emb: pissa cannot adapt an nn.Embedding"):
        fp.get_peft_model(model, fp.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["out", "emb"]))
    assert type(model.out) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())
    assert type(fp.get_peft_model(Net(), fp.LoraConfig(r=2, target_modules="all-linear")).emb) is nn.Embedding


def test_where_only_linear_layers_go():
    peft = pytest.importorskip("peft")
    from fused_peft.distributed.parallel import ColwiseParallel, RowwiseParallel

    for style in (ColwiseParallel, RowwiseParallel):
        with pytest.raises(ValueError, match=r"emb is an adapted nn.Embedding, which is not split"):
            style()._partition_embedding_fn("emb", adapted(), None)
    with pytest.raises(TypeError, match=r"looks up rows; fused_peft.get_peft_model adapts it"):
        peft.get_peft_model(Net(), fp.TriLoraConfig(r=2, target_modules=["emb"]))


# Hugging Face's models and files


def language_model(tie=False):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                                 num_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
                                 tie_word_embeddings=tie)
    )  # fmt: skip


LM = {"r": R, "lora_alpha": 5, "target_modules": ["embed_tokens", "q_proj"]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("table", [*TABLES, "by frequency"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_same_numbers_and_keys_as_peft(table, rslora, tmp_path):
    peft = pytest.importorskip("peft")
    kinds = {**TABLES, "by frequency": lambda *a: nn.Embedding(*a, scale_grad_by_freq=True)}
    config = {"r": R, "lora_alpha": 5, "target_modules": ["emb", "out"], "use_rslora": rslora}
    torch.manual_seed(0)
    stock = shaken(peft.get_peft_model(Net(kinds[table]), peft.LoraConfig(**config, init_lora_weights=False)))
    stock.save_pretrained(tmp_path / "theirs")
    torch.manual_seed(0)
    ours = fp.load_adapter(Net(kinds[table]), tmp_path / "theirs")
    results = []
    for model in (stock, ours):
        model.zero_grad()
        y = model(IDS)
        y.square().sum().backward()
        grads = [(n.replace(".default", "").replace("_embedding", ""), p.grad) for n, p in model.named_parameters()]
        results.append([y.detach(), *(g for n, g in sorted(grads, key=lambda e: e[0][-15:]) if g is not None)])
    assert len(results[0]) == len(results[1]) == 5
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * want.abs().max().item())
    fp.save_pretrained(ours, tmp_path / "ours")
    files = [peft.utils.save_and_load.safe_load_file(str(tmp_path / d / "adapter_model.safetensors"))
             for d in ("theirs", "ours")]  # fmt: skip
    assert {n: (t.shape, t.dtype) for n, t in files[0].items()} == {n: (t.shape, t.dtype) for n, t in files[1].items()}
    torch.manual_seed(0)
    back = peft.PeftModel.from_pretrained(Net(kinds[table]), tmp_path / "ours")
    torch.testing.assert_close(back(IDS), results[1][0], rtol=1e-6, atol=1e-6)
    assert fp.load_config(tmp_path / "ours").fan_in_fan_out is False  # as of no Conv1D


@pytest.mark.filterwarnings("ignore")
def test_a_language_model_and_peft_s_file_with_its_embeddings(tmp_path):
    """PEFT stores the table too where it is a target."""
    peft = pytest.importorskip("peft")
    stock = shaken(peft.get_peft_model(language_model(), peft.LoraConfig(**LM)))
    stock.save_pretrained(tmp_path)
    ours = fp.load_adapter(language_model(), tmp_path)
    ids = torch.randint(2, 40, (2, 6))
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-6)
    assert ours.get_input_embeddings() is ours.model.embed_tokens
    ours.gradient_checkpointing_enable()
    ours.train()(ids, labels=ids).loss.backward()
    assert ours.model.embed_tokens.lora_A.grad.any()
    with pytest.raises(RuntimeError, match="call it before get_peft_model"):
        ours.resize_token_embeddings(50)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(language_model(), tmp_path / "ours")
    torch.testing.assert_close(again(ids).logits, stock(ids).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", sorted(ACTS))
def test_files_of_every_method_and_plain_lora(method, tmp_path):
    peft = pytest.importorskip("peft")
    model = net(aimed(method, "emb", "out"))
    fp.save_pretrained(model, tmp_path / "own")
    torch.manual_seed(0)
    back = fp.load_adapter(Net(), tmp_path / "own")
    assert torch.equal(back(IDS), model(IDS))
    errors = fp.export_lora(model, tmp_path / "plain")
    assert set(errors.values()) == {0.0}
    assert fp.load_config(tmp_path / "plain").fan_in_fan_out is False
    for load in (fp.load_adapter, peft.PeftModel.from_pretrained):
        torch.manual_seed(0)
        torch.testing.assert_close(load(Net(), tmp_path / "plain")(IDS), model(IDS))
    with pytest.warns(UserWarning, match="rank=1 approximates"):
        assert 0 < fp.export_lora(model, tmp_path / "small", rank=1)["emb"] < 1


def test_a_tied_head_stays_and_forbids_merging():
    model = language_model(tie=True)
    plain = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"embed_tokens.weight is shared with lm_head"):
        model = shaken(fp.get_peft_model(model, fp.LoraConfig(**LM)))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    hidden = torch.randn(2, 16)
    assert torch.equal(model.lm_head(hidden), plain.lm_head(hidden))
    for call in (fp.merge, fp.merge_and_unload, fp.merged_state_dict):
        with pytest.raises(fp.NotMergeableError, match=r"embed_tokens.weight is shared with lm_head"):
            call(model)


@pytest.mark.parametrize("scaled", ["Gemma3TextScaledWordEmbedding", "BartScaledWordEmbedding"])
def test_transformers_scaled_tables(scaled):
    pytest.importorskip("transformers")
    from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    kind = {k.__name__: k for k in (Gemma3TextScaledWordEmbedding, BartScaledWordEmbedding)}[scaled]
    table = kind(V, N, padding_idx=0, embed_scale=4.0)
    layer = shaken(fp.PeftEmbedding.from_embedding(table, fp.LoraConfig(r=2)))
    assert isinstance(layer, kind)
    want = 4 * (layer.weight + layer.config.scaling * (layer.lora_B @ layer.lora_A).T)[IDS]
    torch.testing.assert_close(layer(IDS), want)
    with pytest.raises(TypeError, match="BartLearnedPositionalEmbedding has a forward of its own"):
        fp.PeftEmbedding.from_embedding(BartLearnedPositionalEmbedding(V, N), fp.LoraConfig(r=2))


def test_offloaded_tables():
    hooks = pytest.importorskip("accelerate.hooks")
    table = nn.Embedding(V, N)
    want = shaken(fp.PeftEmbedding.from_embedding(copy.deepcopy(table), fp.LoraConfig(r=2)))
    hooks.add_hook_to_module(table, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    assert table.weight.is_meta
    layer = fp.PeftEmbedding.from_embedding(table, fp.LoraConfig(r=2))
    layer.load_state_dict({n: t for n, t in want.state_dict().items() if n != "weight"}, strict=False)
    assert torch.equal(layer(IDS), want(IDS))
    with pytest.raises(fp.NotMergeableError, match="meta device"):
        layer.merge()
