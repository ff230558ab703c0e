"""Adapters on experts and routers of MoE models, this library's own layers: every method, in fp64, against weights
formed expert by expert."""

import contextlib
import copy
import pickle

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import transformers_weight_conversion as peft_names
from torch import nn

import fused_peft as fp
from fused_peft.core import experts
from fused_peft.core.factors import NotMergeableError
from fused_peft.core.groups import Groups, route
from fused_peft.methods import METHODS
from fused_peft.model import moe_names
from fused_peft.model.holder import Holder
from fused_peft.model.parameter import PeftParameter, why_not_method

transformers = pytest.importorskip("transformers")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
SIZES |= {"num_key_value_heads": 2, "num_experts_per_tok": 2, "pad_token_id": 0}
FOUR = {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 0}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": FOUR,
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "Olmoe": {"num_experts": 4},
    "DeepseekV3": ROUTED | LATENT,
    "Glm4Moe": ROUTED | {"head_dim": 8},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
    "GraniteMoe": {"num_local_experts": 4},
}
IDS = torch.randint(1, 64, (2, 9), generator=torch.Generator().manual_seed(1))
STACKS = ["gate_up_proj", "down_proj"]
ON_EXPERTS = [n for n, m in METHODS.items() if why_not_method(m, m.example(2), stacked=True, routed=True) is None]


def model(kind="Qwen3Moe", dtype=torch.float64):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | MODELS[kind]))
    config._experts_implementation = "eager"  # fp64
    made = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
    for name, p in made.named_parameters():  # else routers and biases start alike
        if p.dim() < 2 or "gate" in name:
            nn.init.normal_(p, std=0.3)
    return made.eval()


def moved(m, std=0.2):
    """The model with its adapter's tensors anywhere but where they start."""
    torch.manual_seed(3)
    for p in m.parameters():
        if p.requires_grad:
            with torch.no_grad():
                p.add_(std * torch.randn_like(p))
    return m


def config_of(method, **others):
    config = METHODS[method].example(2)
    settings = {"target_modules": [], "target_parameters": STACKS, **others}
    return type(config)(**{f: getattr(config, f) for f in ("r", "lora_alpha", "init_r", "target_r", "total_step")
                           if f in config.__dataclass_fields__}, **settings)  # fmt: skip


def formed(m, monkeypatch):
    """The same model on weights that its modules' own forwards read, formed by ``Factors.merged``."""
    m = copy.deepcopy(m)
    monkeypatch.setattr(experts, "why_not", lambda *_: "for a test")
    return m


def gradients(m):
    m.zero_grad()
    out = m(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad for n, p in m.named_parameters() if p.requires_grad}


def test_the_methods_that_the_library_promises_are_among_those():
    promised = "lora dora olora pissa trilora adalora flora moslora ia3 ssl ssb vera"
    assert set(promised.split()) <= set(ON_EXPERTS)


@pytest.mark.parametrize("method", ON_EXPERTS)
def test_every_method_equals_weights_formed_expert_by_expert(method, monkeypatch):
    m = moved(fp.get_peft_model(model(), config_of(method)))
    y, found = gradients(m)
    exact, wanted = gradients(formed(m, monkeypatch))
    assert (y - exact).abs().max() < 1e-12
    assert (y - model()(IDS).logits).abs().max() > 1e-3
    assert found.keys() == wanted.keys()
    assert found
    for name, grad in found.items():
        assert (grad - wanted[name]).norm() <= 1e-10 * wanted[name].norm().clamp_min(1e-3), name


@pytest.mark.parametrize("method", ON_EXPERTS)
def test_every_method_starts_as_the_frozen_model_saves_loads_and_merges(method, tmp_path):
    base = model()(IDS).logits
    m = fp.get_peft_model(model(), config_of(method))
    assert (m(IDS).logits - base).abs().max() < 1e-12
    y = moved(m)(IDS).logits
    with fp.disable_adapter(m):
        assert torch.equal(m(IDS).logits, base)
    fp.save_pretrained(m, tmp_path)
    again = fp.load_adapter(model(), tmp_path).eval()
    assert (again(IDS).logits - y).abs().max() < 1e-12
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        assert torch.equal(twin(IDS).logits, y)
    before = {n: t.clone() for n, t in m.state_dict().items()}
    fp.merge(m)
    assert (m(IDS).logits - y).abs().max() < 1e-10
    assert all(torch.equal(t, before[n]) for n, t in m.state_dict().items())
    with fp.disable_adapter(m):
        assert torch.equal(m(IDS).logits, base)
    fp.unmerge(m)
    assert torch.equal(m(IDS).logits, y)
    plain = fp.merge_and_unload(m)
    assert (plain(IDS).logits - y).abs().max() < 1e-10
    assert type(plain.model.layers[0].mlp.experts) is type(model().model.layers[0].mlp.experts)
    assert plain.state_dict().keys() == model().state_dict().keys()


@pytest.mark.parametrize("method", ["lora", "trilora", "vera", "dora", "adalora"])
def test_dropout_acts_on_each_routed_row(method):
    """Its mean over many masks is the output without it; in eval mode it is off."""
    drop = {"vera": "vera_dropout"}.get(method, "lora_dropout")
    m = moved(fp.get_peft_model(model(), config_of(method, **{drop: 0.4})))
    layer = m.model.layers[0].mlp.experts
    x, index = torch.randn(6, 32, dtype=torch.float64), torch.tensor([[0, 1], [1, 2], [2, 3], [0, 3], [1, 3], [0, 2]])
    weights = torch.rand(6, 2, dtype=torch.float64)
    still = layer(x, index, weights)
    assert torch.equal(still, layer(x, index, weights))
    layer.down_proj_adapter.train()  # behind the gate, which is no linear map
    drawn = torch.stack([layer(x, index, weights) for _ in range(1500)])
    assert (drawn[0] - drawn[1]).abs().max() > 1e-6
    standard_error = (drawn.var(0) / len(drawn)).sqrt()
    assert ((drawn.mean(0) - still).abs() <= 6 * standard_error + 1e-9).all()


@pytest.mark.parametrize("kind", MODELS)
def test_architectures_agree_with_peft_and_read_its_checkpoints(kind, tmp_path):
    parameters = [f"experts.{s}" for s in STACKS]
    settings = {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["o_proj"],
        "target_parameters": parameters,
        "init_lora_weights": False,
    }
    stock = peft.get_peft_model(model(kind, torch.float32), peft.LoraConfig(**settings)).eval()
    stock.save_pretrained(tmp_path / "stock")
    own = fp.load_adapter(model(kind, torch.float32), tmp_path / "stock").eval()
    y, found = gradients(own)
    exact, wanted = gradients(stock)
    assert (y - exact).abs().max() < 2e-5
    assert "experts" in {row.form for row in fp.explain(own)}
    for name, p in own.named_parameters():
        if p.requires_grad and name.endswith("down_proj_adapter.lora_B"):
            E, out, r = p.shape
            theirs = wanted["base_model.model." + name.replace("down_proj_adapter.lora_B", "lora_B.default.weight")]
            theirs = theirs.view(out, r, E).permute(2, 0, 1)
            assert (found[name] - theirs).norm() <= 1e-4 * theirs.norm()
    fp.save_pretrained(own, tmp_path / "own")
    again = peft.PeftModel.from_pretrained(model(kind, torch.float32), tmp_path / "own").eval()
    assert (again(IDS).logits - y).abs().max() < 2e-5


NAMED = ["q_proj", "gate_proj", "up_proj", "down_proj"]
OLD_NAMES = [("Mixtral", ["q_proj", "w1", "w2", "w3"]), ("Mixtral", r".*experts\.w[123]"), ("GptOss", ["q_proj"])]
OLD_NAMES += [(kind, "all-linear") for kind in ("Mixtral", "Qwen3Moe", "Olmoe", "DeepseekV3", "GptOss")]
OLD_NAMES += [(kind, t) for kind in ("Qwen3Moe", "Olmoe") for t in (NAMED, r".*experts\.(gate|up|down)_proj")]


@pytest.mark.parametrize(("kind", "targets"), OLD_NAMES, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(OLD_NAMES)])
def test_old_names_mean_what_they_mean_in_peft(kind, targets):
    settings = {"r": 2, "lora_alpha": 4, "target_modules": targets}
    stock = peft.get_peft_model(model(kind, torch.float32), peft.LoraConfig(**settings))
    said = kind == "GptOss" and targets == "all-linear"  # whose experts PEFT does not mean by it
    with pytest.warns(UserWarning, match="does not reach") if said else contextlib.nullcontext():
        own = fp.get_peft_model(model(kind, torch.float32), fp.LoraConfig(**settings))
    numbers = lambda m: sorted(p.numel() for p in m.parameters() if p.requires_grad)  # noqa: E731
    assert numbers(own) == numbers(stock)
    scales = {s for m in stock.modules() if isinstance(m, BaseTunerLayer) for s in m.scaling.values()}
    assert {layer.config.scaling for layer in own.modules() if isinstance(layer, Holder)} == scales


def test_the_families_of_old_names_are_pefts():
    assert moe_names.FAMILIES == peft_names._MOE_TARGET_MODULE_MAPPING


def test_half_of_a_stack_is_refused_as_in_peft():
    with pytest.raises(ValueError, match="names gate_proj without up_proj"):
        fp.get_peft_model(model(), fp.LoraConfig(target_modules=["gate_proj"]))


def test_a_router_trains_on_a_formed_weight(tmp_path):
    config = fp.LoraConfig(r=2, target_modules=[], target_parameters=["mlp.gate.weight"], init_lora_weights=False)
    m = fp.get_peft_model(model(), config)
    y, found = gradients(m)
    assert set(found) == {f"model.layers.{i}.mlp.gate.weight_adapter.lora_{n}" for i in (0, 1) for n in "AB"}
    assert all(g.any() for g in found.values())
    fp.save_pretrained(m, tmp_path)
    stock = peft.PeftModel.from_pretrained(model(), tmp_path).eval()
    assert (stock(IDS).logits - y).abs().max() < 1e-6
    assert (fp.merge_and_unload(m)(IDS).logits - y).abs().max() < 1e-12


def test_several_adapters_on_experts():
    m = moved(fp.get_peft_model(model(), config_of("lora")))
    fp.add_adapter(m, "second", config_of("dora"))
    fp.add_adapter(m, "third", config_of("ssb", target_parameters=["down_proj"]))
    torch.manual_seed(5)
    for name, p in m.named_parameters():
        if "_adapter.added" in name:
            with torch.no_grad():
                p.add_(0.1 * torch.randn_like(p))
    one = m(IDS).logits
    fp.set_adapter(m, "third")
    third = m(IDS).logits
    fp.set_adapter(m, ["default", "third"][:1])
    assert torch.equal(m(IDS).logits, one)
    assert (third - one).abs().max() > 1e-3
    fp.set_adapter(m, "second")
    y = m(IDS).logits
    fp.merge(m)
    assert (m(IDS).logits - y).abs().max() < 1e-10
    fp.unmerge(m)
    with pytest.raises(ValueError, match="each expert's own input"):
        fp.set_adapter(m, ["default", "third"])
    fp.delete_adapter(m, "third")
    fp.delete_adapter(m, "second")
    assert torch.equal(m(IDS).logits, one)
    fp.add_adapter(m, "sum", config_of("lora"))
    torch.manual_seed(6)
    for name, p in m.named_parameters():
        if "added.sum" in name:
            nn.init.normal_(p, std=0.1)
    fp.set_adapter(m, ["default", "sum"])
    y = m(IDS).logits
    fp.merge(m)
    assert (m(IDS).logits - y).abs().max() < 1e-10
    assert (y - one).abs().max() > 1e-3


@pytest.mark.parametrize("second", [STACKS, STACKS[:1], ["down_proj", "mlp.gate.weight"]], ids=["all", "one", "router"])
def test_a_further_adapter_is_stored_as_peft_reads_it(second, tmp_path):
    m = fp.get_peft_model(model(), config_of("lora", target_parameters=STACKS[1:]))
    fp.add_adapter(m, "second", config_of("lora", target_parameters=second, init_lora_weights=False))
    fp.set_adapter(m, "second")
    y = m(IDS).logits
    fp.save_pretrained(m, tmp_path, adapter_name="second")
    for again in (peft.PeftModel.from_pretrained(model(), tmp_path).eval(), fp.load_adapter(model(), tmp_path)):
        assert (again(IDS).logits - y).abs().max() < 1e-6
    own = fp.get_peft_model(model(), config_of("lora"))
    fp.load_adapter(own, tmp_path, adapter_name="again")
    fp.set_adapter(own, "again")
    assert torch.equal(own(IDS).logits, y)


def test_an_adapter_on_other_parameters_comes_and_goes():
    m = fp.get_peft_model(model(), fp.LoraConfig(r=2, target_modules=["q_proj"]))
    y = m(IDS).logits
    fp.add_adapter(m, "experts", config_of("lora", init_lora_weights=False))
    fp.set_adapter(m, "experts")
    assert (m(IDS).logits - y).abs().max() > 1e-3
    fp.delete_adapter(m, "experts")
    assert torch.equal(m(IDS).logits, y)
    assert not any(isinstance(x, PeftParameter) for x in m.modules())
    assert type(m.model.layers[0].mlp.experts).__name__ == "Qwen3MoeExperts"


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_activation_checkpointing(reentrant):
    m = moved(fp.get_peft_model(model(), config_of("lora")))
    wanted = gradients(m)[1]
    m.train()
    m.enable_input_require_grads()
    m.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(m)[1]
    assert all(torch.allclose(found[n], g, rtol=1e-10, atol=1e-14) for n, g in wanted.items())


def test_adalora_moves_its_budget_over_experts():
    config = fp.AdaLoraConfig(init_r=4, target_r=2, total_step=6, target_modules=[], target_parameters=STACKS)
    m = fp.get_peft_model(model(), config).train()
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
    for step in range(8):
        m(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        fp.on_step(m, step)
        optimizer.zero_grad()
    kept = sum(layer.kept.sum().item() for layer in m.modules() if isinstance(layer, PeftParameter))
    assert kept == 2 * 4 * 2 * 2  # target_r, experts, stacks, layers
    assert fp.orthogonality_penalty(m).isfinite()


def test_mpc_counts_each_expert():
    m = moved(fp.get_peft_model(model(), config_of("lora")))
    eye = torch.eye(2, dtype=torch.float64)
    wanted = 0
    for name, p in m.named_parameters():
        for f in p.detach() if name.endswith(("lora_A", "lora_B")) else ():
            wanted += (((f @ f.T) if name.endswith("A") else (f.T @ f)) - eye).square().sum()
    torch.testing.assert_close(fp.mpc_penalty(m).detach(), wanted)


def test_training_in_bf16_keeps_fp32_adapters():
    m = fp.get_peft_model(model(dtype=torch.bfloat16), config_of("lora"))
    assert {p.dtype for p in m.parameters() if p.requires_grad} == {torch.float32}
    _, grads = gradients(m)
    assert {g.dtype for g in grads.values()} == {torch.float32}


def test_a_checkpoint_of_the_whole_model_comes_back():
    m = moved(fp.get_peft_model(model(), config_of("dora")))
    other = fp.get_peft_model(model(), config_of("dora"))
    other.load_state_dict(m.state_dict())
    assert torch.equal(other(IDS).logits, m(IDS).logits)
    assert model().state_dict().keys() <= m.state_dict().keys()
    fp.merge(m)
    with pytest.raises(RuntimeError, match="is merged; call unmerge"):
        m.load_state_dict(other.state_dict())


class Undecorated(nn.Module):
    """Experts whose class says nothing of what it computes."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 5))
        self.code = nn.Parameter(torch.zeros(3, 6, 5, 2))
        self.table = nn.Parameter(torch.zeros(3, 6, dtype=torch.int8), requires_grad=False)
        self.plain, self.embedding = nn.Linear(4, 4), nn.Embedding(4, 4)

    def forward(self, x):
        return torch.einsum("mk,enk->mn", x, self.w)


def test_other_modules_compute_with_formed_weights():
    torch.manual_seed(0)
    m = nn.ModuleDict({"experts": Undecorated()}).double()
    x, wide = torch.randn(4, 5, dtype=torch.float64), lambda: copy.deepcopy(m)
    adapted = moved(fp.get_peft_model(wide(), fp.DoraConfig(r=2, target_modules=[], target_parameters=["w"])))
    y = adapted["experts"](x)
    assert "formed in each call" in fp.explain(adapted)[0].why
    fp.merge(adapted)
    torch.testing.assert_close(adapted["experts"](x), y)
    with pytest.raises(TypeError, match=r"dropout=0\.1"):
        fp.get_peft_model(wide(), fp.LoraConfig(r=2, target_modules=[], target_parameters=["w"], lora_dropout=0.1))


# what is asked for -> (the error, what its message names)
BAD = {
    "a name that is none": ({"target_parameters": ["w2"]}, ValueError, "no parameter"),
    "a string": ({"target_parameters": "w"}, TypeError, "list of names"),
    "four dimensions": ({"target_parameters": ["code"]}, TypeError, "shape"),
    "codes": ({"target_parameters": ["table"]}, TypeError, "quantised"),
    "a linear layer's": ({"target_parameters": ["plain.weight"]}, TypeError, "linear layer"),
    "an embedding's": ({"target_parameters": ["embedding.weight"]}, TypeError, "does not multiply rows"),
    "a rank too large": (
        {"target_parameters": ["w"], "init_lora_weights": "olora", "r": 9},
        ValueError,
        "must not exceed",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_leaves_the_model_alone(what):
    settings, kind, message = BAD[what]
    m = nn.ModuleDict({"experts": Undecorated()})
    with pytest.raises(kind, match=message):
        fp.get_peft_model(m, fp.LoraConfig(target_modules=[], **settings))
    assert type(m["experts"]) is Undecorated
    assert m["experts"].w.requires_grad


@pytest.mark.parametrize("method", [n for n in METHODS if n not in ON_EXPERTS])
def test_methods_that_cannot_act_on_experts_say_why(method):
    config = METHODS[method].example(2)
    config.target_modules, config.target_parameters = [], list(STACKS)
    with pytest.raises((TypeError, ValueError), match=r"cannot be adapted|target_"):
        fp.get_peft_model(model(), config)


def test_an_adapter_of_another_expert_count_is_refused(tmp_path):
    fp.save_pretrained(fp.get_peft_model(model(), config_of("lora")), tmp_path)
    config = transformers.Qwen3MoeConfig(**(SIZES | MODELS["Qwen3Moe"] | {"num_experts": 6}))
    other = transformers.Qwen3MoeForCausalLM(config)
    with pytest.raises(fp.AdapterFormatError, match="shape"):
        fp.load_adapter(other, tmp_path)
    assert not any(isinstance(m, PeftParameter) for m in other.modules())


def test_merging_what_adds_a_bias_to_experts_without_one_is_refused():
    m = moved(fp.get_peft_model(model(), config_of("lora", lora_bias=True)))
    with pytest.raises(NotMergeableError, match="has no bias"):
        fp.merge(m)


def test_a_routing_to_no_expert_is_refused():
    layer = fp.get_peft_model(model(), config_of("lora")).model.layers[0].mlp.experts
    x = torch.randn(2, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="no expert of 0"):
        layer(x, torch.tensor([[0, 4], [1, 2]]), torch.ones(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("method", [n for n in ON_EXPERTS if n != "liera"])
def test_estimate_counts_what_experts_keep(method):
    """Storages that autograd keeps, less those of the model."""
    config, tokens = config_of(method), 18
    counted = {row.name: (row.x, row.beyond_x) for row in fp.estimate(model(), config, tokens, device="cpu").layers}
    layer = fp.get_peft_model(model(), config).train().model.layers[0].mlp.experts
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    groups, _ = route(torch.stack([torch.randperm(4)[:2] for _ in range(tokens)]), 4)
    for name, rows, g in (("gate_up_proj", tokens, groups), ("down_proj", 2 * tokens, Groups(groups.offs))):
        adapter, kept = layer._modules[f"{name}_adapter"], []
        x = torch.randn(rows, adapter.in_features, dtype=torch.float64, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            adapter.call(x, g)
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        of_x = sizes.pop(x.untyped_storage().data_ptr(), 0)
        beyond = sum(n for at, n in sizes.items() if at not in own)
        assert counted[f"model.layers.0.mlp.experts.{name}"] == (of_x, beyond)


ON_ROUTERS = [n for n, m in METHODS.items() if why_not_method(m, m.example(2), stacked=False, routed=False) is None]


@pytest.mark.parametrize("method", ON_ROUTERS)
def test_every_method_on_a_router_starts_as_it_and_merges(method):
    base = model()(IDS).logits
    few = {"directions": 2} if method == "lora_dash" else {}
    m = fp.get_peft_model(model(), config_of(method, target_parameters=["gate.weight"], **few))
    assert (m(IDS).logits - base).abs().max() < 1e-12
    y, grads = gradients(moved(m))
    assert (y - base).abs().max() > 1e-6
    assert all(g.any() for n, g in grads.items() if not n.endswith("dash"))  # which waits for its steps
    assert (fp.merge_and_unload(m)(IDS).logits - y).abs().max() < 1e-10


def test_all_linear_with_dropout_leaves_routers_out():
    config = fp.LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.1)
    with pytest.warns(UserWarning, match="leaves the routers out"):
        m = fp.get_peft_model(model(), config)
    adapted = {layer.parameter_name for layer in m.modules() if isinstance(layer, PeftParameter)}
    assert adapted == set(STACKS)


def test_a_batch_of_several_adapters_does_not_reach_experts():
    m = fp.get_peft_model(model(), config_of("lora"))
    with pytest.raises(ValueError, match=r"does not reach model\.layers"), fp.adapter_batch(m, ["default"] * 2):
        pass


def one_layer(m):
    torch.manual_seed(4)
    x, index = torch.randn(6, 32, dtype=torch.float64), torch.stack([torch.randperm(4)[:2] for _ in range(6)])
    return m.model.layers[0].mlp.experts, x, index, torch.rand(6, 2, dtype=torch.float64)


def test_a_forward_that_is_not_transformers_reads_formed_weights():
    """A subclass that does something else before is not passed by."""
    plain = model()
    kind = type(plain.model.layers[0].mlp.experts)
    twice = lambda self, x, *routing: kind.forward(self, 2 * x, *routing)  # noqa: E731
    plain.model.layers[0].mlp.experts.__class__ = type("Twice", (kind,), {"forward": twice})
    m = moved(fp.get_peft_model(plain, config_of("lora")))
    layer, x, index, weights = one_layer(m)
    other = moved(fp.get_peft_model(model(), config_of("lora"))).model.layers[0].mlp.experts
    torch.testing.assert_close(layer(x, index, weights), other(2 * x, index, weights))
    row = next(r for r in fp.explain(m) if r.name.endswith("0.mlp.experts.down_proj"))
    assert row.form == "weight"
    assert "not one that Transformers chooses" in row.why


def test_a_call_in_other_shapes_by_name_or_in_another_dtype():
    m = moved(fp.get_peft_model(model(), config_of("lora")))
    layer, x, index, weights = one_layer(m)
    y = layer(x, index, weights)
    torch.testing.assert_close(layer(hidden_states=x, top_k_index=index, top_k_weights=weights), y)
    shaped = layer(x.view(2, 3, 32), index.view(2, 3, 2), weights.view(2, 3, 2))
    torch.testing.assert_close(shaped, y.view(2, 3, 32))
    m.set_experts_implementation("grouped_mm")
    m.to(torch.bfloat16)
    with torch.no_grad():  # Transformers casts x there
        assert layer(x.float(), index, weights.float()).isfinite().all()


def test_behind_hooks_that_place_tensors():
    hooks = pytest.importorskip("accelerate.hooks")
    m = moved(fp.get_peft_model(model(), config_of("lora")))
    layer, x, index, weights = one_layer(m)
    y = layer(x, index, weights)
    plain = model()
    hooks.add_hook_to_module(plain.model.layers[0].mlp.experts, hooks.AlignDevicesHook(execution_device="cpu"))
    hooked = moved(fp.get_peft_model(plain, config_of("lora")))
    assert torch.equal(hooked.model.layers[0].mlp.experts(x, index, weights), y)
    base = fp.merge_and_unload(hooked).model.layers[0].mlp.experts
    torch.testing.assert_close(base(x, index, weights), y)


def test_a_forward_on_the_instance_is_refused():
    plain = model()
    layer = plain.model.layers[0].mlp.experts
    layer.forward = lambda *args: type(layer).forward(layer, *args)
    with pytest.raises(TypeError, match="forward of its own on the instance"):
        fp.get_peft_model(plain, config_of("lora"))


@pytest.mark.parametrize("targets", ["all-linear", ["gate_proj", "up_proj", "down_proj"]])
def test_linear_layers_that_old_names_leave_out_are_named(targets):
    with pytest.warns(UserWarning, match="leaves out 6 linear layers .first: model.layers.0.mlp.shared_experts"):
        m = fp.get_peft_model(model("DeepseekV3"), fp.LoraConfig(r=2, target_modules=targets))
    assert not any("shared" in name for name, _ in m.named_parameters() if "lora_" in name)


@pytest.mark.parametrize("method", ["lora", "dora", "ssb"])
def test_one_graph_when_compiled(method):
    m = moved(fp.get_peft_model(model(), config_of(method, target_parameters=[*STACKS, "gate.weight"])).train())
    layer, x, index, weights = one_layer(m)
    x.requires_grad_()
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, wanted = (torch.autograd.grad(c(x, index, weights).square().sum(), leaves) for c in (compiled, layer))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    router = torch.compile(m.model.layers[0].mlp.gate, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(router(x)[0], m.model.layers[0].mlp.gate(x)[0])


def test_a_scaled_bias_is_not_lost_where_weights_are_formed(monkeypatch):
    m = moved(fp.get_peft_model(model("GptOss"), config_of("ia3")))
    m(IDS)
    with pytest.raises(RuntimeError, match="changes a bias"):
        formed(m, monkeypatch)(IDS)
