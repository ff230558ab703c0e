"""fp.accelerate on PEFT's LoRA of expert stacks: Transformers' MoE models give PEFT's numbers, and all else stays."""

import copy
import pickle
import types
from collections import Counter
from itertools import product

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
moe = pytest.importorskip("transformers.integrations.moe")

from test_accelerate import Packed, close, warned  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralExperts  # noqa: E402

import fused_peft as fp  # noqa: E402
from fused_peft.core import dispatch, experts, grouped, groups  # noqa: E402
from fused_peft.core.factors import Factors  # noqa: E402
from fused_peft.integrations import experts as bridge  # noqa: E402
from fused_peft.tools import calibrate  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
STACKS = ["gate_up_proj", "up_proj", "down_proj"]
H = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32,
     "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
K = {"num_experts_per_tok": 2}
NARROW = {**K, "moe_intermediate_size": 12}
ROUTED = {**NARROW, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MODELS = {
    "Mixtral": {**K, "num_local_experts": 4},
    "Qwen2Moe": {**NARROW, "num_experts": 4, "shared_expert_intermediate_size": 8, "decoder_sparse_step": 1},
    "Qwen3Moe": {**NARROW, "num_experts": 4, "decoder_sparse_step": 1},
    "GptOss": {**K, "num_local_experts": 4},
    "Olmoe": {**K, "num_experts": 4},
    "DeepseekV2": {**ROUTED, **LATENT, "num_key_value_heads": 2},
    "DeepseekV3": {**ROUTED, **LATENT, "num_key_value_heads": 2, "n_group": 2},
    "Glm4Moe": ROUTED,
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12, "moe_layer_start_index": 0},
    "GraniteMoe": {**K, "num_local_experts": 4},
    "NemotronH": {**ROUTED, "layers_block_type": ["moe", "attention", "moe"], "moe_shared_expert_intermediate_size": 12,
                  "n_groups": 1, "mamba_num_heads": 2, "mamba_head_dim": 8, "ssm_state_size": 8},
    "Jamba": {**K, "num_experts": 4, "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1,
              "expert_layer_offset": 0, "use_mamba_kernels": False},
    "Phimoe": {**K, "num_local_experts": 4},
    "MiniMax": {**K, "num_local_experts": 4},
}  # fmt: skip
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
LLAMA4 = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1}


def bare(name="Mixtral", implementation="eager", **options):
    """A tiny model, its weights large enough to matter."""
    torch.manual_seed(0)
    text = "Text" if name == "Llama4" else ""
    config = getattr(transformers, f"{name}{text}Config")(**{**H, **MODELS.get(name, LLAMA4), **options})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(std=0.2)
    if name != "Llama4":
        model.set_experts_implementation(implementation)
    return model


def fill(model, seed=0):
    """Values for every adapter, another one's for another seed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n:
                p.normal_(std=0.2)
    return model


def lora(targets=STACKS, **options):
    return peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": targets, **options})


def build(name="Mixtral", implementation="eager", targets=STACKS, options=None, **more):
    return fill(peft.get_peft_model(bare(name, implementation, **more), lora(targets, **(options or {}))))


def tokens(shape=(2, 7)):
    return torch.randint(2, 32, shape, generator=torch.Generator().manual_seed(3))


def step(model, ids=None):
    """Logits, loss and the gradient of every parameter that trains."""
    ids = tokens() if ids is None else ids
    torch.manual_seed(5)  # PhiMoE draws its experts
    model.zero_grad()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **grads}


@pytest.fixture
def calls(monkeypatch):
    found = []
    linear = grouped.linear
    monkeypatch.setattr(grouped, "linear", lambda *a, **k: found.append(a) or linear(*a, **k))
    return found


def same(model, calls, fused=4, run=step, rtol=1e-5):
    """What an accelerated model computes is what it does restored, to rounding, by so many fused calls."""
    calls.clear()
    got = run(model)
    assert len(calls) == fused
    want = run(fp.restore(copy.deepcopy(model)))
    assert len(calls) == fused
    close(got, want, rtol)
    return got


@pytest.mark.parametrize(("name", "implementation"), product(MODELS, IMPLEMENTATIONS))
def test_the_same_numbers_as_peft(name, implementation, calls):
    model = build(name, implementation)
    keys, shown, want = sorted(model.state_dict()), repr(model), step(model)
    assert not calls
    assert warned(fp.accelerate, model) == []
    assert (sorted(model.state_dict()), repr(model)) == (keys, shown)
    wrappers = 4
    got = step(model)
    assert len(calls) == wrappers
    close(got, want, 2e-5)
    rows = fp.explain(model)
    assert Counter((r.method, r.form, r.backend) for r in rows) == {("lora", "experts", "eager"): wrappers}
    assert all(r.problem.groups == 4 for r in rows)
    fp.restore(model)
    again = step(model)
    assert len(calls) == wrappers
    assert all(torch.equal(again[n], want[n]) for n in want)


@pytest.mark.parametrize(("name", "implementation"), [("Mixtral", "grouped_mm"), ("GptOss", "eager")])
def test_losses_over_32_steps(name, implementation):
    curves, start = [], build(name, implementation)
    for fused in (False, True):
        model = copy.deepcopy(start)
        if fused:
            fp.accelerate(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(32):
            optimizer.zero_grad()
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step()
            curves.append(loss.item())
    stock, fast = torch.tensor(curves).view(2, -1)
    assert stock[-1] < 0.5 * stock[0]
    torch.testing.assert_close(fast, stock, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Qwen3Moe"])
def test_activation_checkpointing(name, reentrant, calls):
    model = build(name)
    want = step(model)
    fp.accelerate(model).gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    got = step(model.train())
    assert len(calls) == 8  # each once more in backward
    close(got, want, 1e-5)


def the_experts(model, layer=0):
    """The outermost wrapper of a layer's experts."""
    return next(m for n, m in model.named_modules() if n.endswith(f"layers.{layer}.mlp.experts"))


ROWS = 12


def module_step(model, dtype=torch.float32, autocast=False):
    """One layer's experts on fixed rows: y, dx, the gradient of the routing weights and of every adapter."""
    made = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 16, generator=made).to(dtype).requires_grad_()
    w = torch.rand(ROWS, 2, generator=made).to(dtype).requires_grad_()
    index = torch.rand(ROWS, 4, generator=made).argsort(1)[:, :2]
    module = the_experts(model)
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = module(x, index, w)
    loss = (y.double() * torch.randn(y.shape, generator=made)).sum()
    grads = torch.autograd.grad(loss, [x, w, *named.values()])
    return {"y": y.detach(), **dict(zip(["x", "w", *named], grads, strict=True))}


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("how", ["bf16", "fp16", "autocast"])
def test_low_precision(how, name, calls):
    """As far from fp64 as PEFT's own, in norm; autocast rounds A and B too, of which PEFT forms the weight in fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(how, torch.float32)
    model = fill(peft.get_peft_model(bare(name).to(dtype), lora()))
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}
    exact = module_step(copy.deepcopy(model).double(), torch.float64)
    models = model, fp.accelerate(copy.deepcopy(model))
    stock, fast = [module_step(m, dtype, how == "autocast") for m in models]
    assert len(calls) == (4 if how == "autocast" else 2)  # where it calls itself with what was cast
    for n, true in exact.items():
        assert fast[n].dtype == stock[n].dtype, n
        mine, theirs = ((run[n].double() - true).norm() for run in (fast, stock))
        assert mine <= (3 if how == "autocast" else 2) * theirs, (n, mine / true.norm(), theirs / true.norm())


def test_bf16_models(calls):
    model = fill(peft.get_peft_model(bare().to(torch.bfloat16), lora(), autocast_adapter_dtype=False))
    want = step(fp.accelerate(model))
    assert len(calls) == 4
    assert all(g.dtype == torch.bfloat16 for n, g in want.items() if "lora_" in n)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_in_fp64_to_the_last_digits(name, calls):
    model = fp.accelerate(build(name).double())
    same(model, calls, 2, lambda m: module_step(m, torch.float64), 1e-12)


def second(model, r=2, targets=STACKS, **options):
    model.add_adapter("second", lora(targets, r=r, **options))
    return fill(model, 1)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "NemotronH"])
def test_several_adapters(name, implementation, calls):
    model = fp.accelerate(second(build(name, implementation)))
    for active in ("second", ["default", "second"], ["second", "default"], "default"):
        model.base_model.set_adapter(active)
        same(model, calls)
        both = {c[2].A.shape[1] for c in calls}
        assert both == {"second": {2}, "default": {3}}.get(str(active), {5})
    model.delete_adapter("default")
    model.base_model.set_adapter("second")
    same(model, calls)


def test_adapters_of_one_scale_are_not_multiplied_by_it(calls):
    model = fp.accelerate(second(build(), lora_alpha=10 / 3))
    model.base_model.set_adapter(["default", "second"])
    same(model, calls)
    assert {c[2].s for c in calls} == {5 / 3}


def test_a_scale_that_is_a_tensor(calls):
    model = fp.accelerate(build())
    for m in model.modules():
        if isinstance(m, bridge.ParamWrapper):
            m.scaling["default"] = torch.tensor(5 / 3)
    assert len(step(model)) > 4
    got = step(model)
    for m in model.modules():
        if isinstance(m, bridge.ParamWrapper):
            m.scaling["default"] = 5 / 3
    close(got, step(model), 1e-5)
    assert len(calls) == 12


@pytest.mark.parametrize("targets", [["gate_up_proj"], ["down_proj"]])
@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_one_stack_alone(name, targets, calls):
    model = fp.accelerate(build(name, targets=targets))
    assert len(fp.explain(model)) == 2
    same(model, calls)  # the other stack is a fused call too, without factors


def test_an_adapter_of_another_stack(calls):
    """An adapter that leaves a wrapper without: its stack runs as it is, and the other's wrapper starts the call."""
    model = fp.accelerate(build())
    for name in ("down_proj", "gate_up_proj"):
        other = copy.deepcopy(model)
        for m in other.modules():
            if isinstance(m, bridge.ParamWrapper) and m.parameter_name == name:
                m.delete_adapter("default")
        same(other, calls)
        rows = {r.name.rpartition(".")[2]: (r.form, r.why) for r in fp.explain(other)}
        assert Counter(form for form, _ in rows.values()) == {"plain": 1, "experts": 1}
        assert ("plain", "no adapter of this layer is active") in rows.values()


def test_adding_adapters_to_an_accelerated_model(calls):
    model = fp.accelerate(build())
    assert warned(second, model) == []
    assert {type(m) for m in model.modules() if isinstance(m, peft.tuners.lora.ParamWrapper)} == {bridge.ParamWrapper}
    model.base_model.set_adapter(["default", "second"])
    same(model, calls)
    plain = fp.accelerate(peft.get_peft_model(bare(), peft.LoraConfig(target_modules=["q_proj"])))
    plain.add_adapter("more", lora())
    fill(plain).set_adapter("more")
    same(plain, calls)
    fp.restore(plain)
    step(plain)
    assert not any(isinstance(m, bridge.ParamWrapper) for m in plain.modules())


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_merging(name, calls):
    model = build(name)
    stock = copy.deepcopy(model)
    want, ids = step(model), tokens()
    fp.accelerate(model)
    for m in (model, stock):
        m.merge_adapter()
    assert all(torch.equal(stock.state_dict()[n], t) for n, t in model.state_dict().items())
    torch.testing.assert_close(model(input_ids=ids).logits, want["logits"], rtol=1e-4, atol=1e-5)
    assert not calls
    assert {(r.form, r.why) for r in fp.explain(model)} == {("PEFT's", "merged")}
    model.unmerge_adapter()
    close(step(model), want, 1e-4)
    assert len(calls) == 4
    merged, unwrapped = copy.deepcopy(model).merge_and_unload(), stock.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, unwrapped(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, bridge.ParamWrapper) for m in (*merged.modules(), *model.unload().modules()))


@pytest.mark.parametrize("inner", [False, True], ids=["outer", "inner"])
@pytest.mark.parametrize("what", ["merge", "disable", "merge and disable"])
def test_one_wrapper_of_a_chain_merged_or_disabled(what, inner, calls):
    model = fp.accelerate(build())
    module = the_experts(model)
    module = module.base_layer if inner else module
    if "merge" in what:
        module.merge()
    if "disable" in what:
        module.enable_adapters(False)
    both = what == "merge and disable"  # PEFT unmerges in the call, of an inner one within a call of its own
    same(copy.deepcopy(model), calls, 2 if both and inner else 4, rtol=1e-4)
    rows = [r.form for r in fp.explain(model)]
    assert rows.count("experts") == (2 if both and inner else 3)


def test_disabling(calls):
    model, ids = fp.accelerate(build()), tokens()
    with model.disable_adapter():
        got = model(input_ids=ids).logits
        assert {(r.form, r.why) for r in fp.explain(model)} == {("PEFT's", "disabled")}
    assert not calls
    assert torch.equal(got, bare()(input_ids=ids).logits)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_saving_and_loading(name, calls, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "stock")
    fp.accelerate(model).save_pretrained(tmp_path / "fast")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "fast" / file).read_bytes() == (tmp_path / "stock" / file).read_bytes()
    want = step(model)
    loaded = fp.accelerate(peft.PeftModel.from_pretrained(bare(name), tmp_path / "fast", is_trainable=True))
    close(step(loaded), want, 1e-6)
    model.load_adapter(tmp_path / "fast", "again")
    model.set_adapter("again")
    calls.clear()
    close({"logits": step(model)["logits"]}, {"logits": want["logits"]}, 1e-6)
    assert len(calls) == 4


def test_copies_and_pickles(calls):
    model = fp.accelerate(build())
    want = step(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        close(step(other), want, 1e-7)
        assert len(calls) == 4
        second(other).set_adapter("second")
        same(other, calls)


def test_a_chain_that_starts_further_in(calls):
    """The inner wrapper called on its own computes its own stack's adapter, and both the one whole call."""
    model = fp.accelerate(build())
    inner, x, index, w = the_experts(model).base_layer, torch.randn(5, 16), torch.tensor([[0, 3]] * 5), torch.rand(5, 2)
    got = inner(x, index, w)
    assert len(calls) == 2
    fp.restore(model)
    torch.testing.assert_close(got, inner(x, index, w), rtol=1e-5, atol=1e-6)


ROUTINGS = {
    "one expert takes all": torch.full((9, 1), 2),
    "one row": torch.tensor([[3, 0]]),
    "the first and the last": torch.tensor([[0, 3]] * 5),
    "an expert twice in a row": torch.tensor([[1, 1], [2, 1]]),
}


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing, name, calls):
    index, found = ROUTINGS[routing], []
    model = build(name, targets=["gate_up_proj", "down_proj"])
    for m in (model, fp.accelerate(copy.deepcopy(model))):
        module = the_experts(m)
        made = torch.Generator().manual_seed(0)
        x = torch.randn(len(index), 16, generator=made).requires_grad_()
        w = torch.rand(index.shape, generator=made).requires_grad_()
        y = module(x, index, w)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
        found.append({"y": y.detach(), "x": x.grad, "w": w.grad, **grads})
    assert len(calls) == 2
    stock, fast = found
    close(fast, stock, 1e-5)
    for n, g in fast.items():
        if "lora_" in n:
            g = g.view(4, -1) if "lora_A" in n else g.view(g.shape[0], -1, 4).permute(2, 0, 1)
            hit = torch.tensor([e in index for e in range(4)])
            assert (g.flatten(1).abs().sum(1) > 0).equal(hit), n


def test_no_rows(calls):
    module = the_experts(fp.accelerate(build()))
    module(torch.zeros(0, 16), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)).sum().backward()
    assert len(calls) == 2
    assert all(p.grad.count_nonzero() == 0 for p in module.parameters() if p.requires_grad)


def test_an_expert_that_does_not_exist():
    model = fp.accelerate(build())
    with pytest.raises(ValueError, match=r"1 of 4 rows to no expert of 0 ... 3"):
        the_experts(model)(torch.randn(2, 16), torch.tensor([[0, 4], [1, 2]]), torch.rand(2, 2))


def test_calls_by_name_and_batches(calls):
    model = fp.accelerate(build())
    module, x, w = the_experts(model), torch.randn(2, 3, 16), torch.rand(6, 2)
    index = torch.tensor([[0, 3], [1, 2], [2, 0]] * 2)
    want = module(x.view(6, 16), index, w)
    for args, kwargs in (
        ((x.view(6, 16), index), {"top_k_weights": w}),
        ((x.view(6, 16),), {"top_k_weights": w, "top_k_index": index}),
        ((), {"hidden_states": x.view(6, 16), "top_k_weights": w, "top_k_index": index}),
    ):
        assert torch.equal(module(*args, **kwargs), want)
    for i, v in ((index, w), (index.view(2, 3, 2), w.view(2, 3, 2))):
        assert torch.equal(module(x, i, v), want.view(2, 3, 16))
    assert len(calls) == 12
    with pytest.raises(ValueError, match="mixed"):
        module(x.view(6, 16), index, w, adapter_names=["default"])
    with pytest.raises(TypeError):
        module(x.view(6, 16), index, w, another=1)
    assert len(calls) == 12


def test_a_model_generates(calls):
    model = fp.accelerate(build().eval())
    options = {"input_ids": tokens((2, 3)), "max_new_tokens": 5, "do_sample": False}
    got = model.generate(**options)
    assert len(calls) == 20
    assert torch.equal(got, fp.restore(model).generate(**options))


def test_trained_biases(calls):
    model = build("GptOss")
    for n, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or "proj_bias" in n)
    got = same(fp.accelerate(model), calls)
    assert sum("proj_bias" in n and g.norm() > 0 for n, g in got.items()) == 4


def test_a_single_expert(calls):
    same(fp.accelerate(build(num_local_experts=1, num_experts_per_tok=1)), calls)


def test_beside_adapters_of_linear_layers(calls):
    model = fp.accelerate(build(options={"target_modules": ["q_proj", "o_proj"]}))
    assert Counter(r.form for r in fp.explain(model)) == {"factors": 4, "experts": 4}
    same(model, calls)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_compiled(name):
    torch._dynamo.reset()
    model = fp.accelerate(build(name))
    module, w = the_experts(model), torch.rand(6, 2, requires_grad=True)
    x, index = torch.randn(6, 16, requires_grad=True), torch.tensor([[0, 3], [1, 2], [2, 0]] * 2)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    found = []
    for call in (module, compiled):
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        y = call(x, index, w)
        found.append({"y": y.detach()})
        grads = torch.autograd.grad(y.square().sum(), [x, w, *named.values()])
        found[-1].update(zip(["x", "w", *named], grads, strict=True))
    close(found[1], found[0], 1e-5)


def test_transforms_tracing_and_export():
    module, w = the_experts(fp.accelerate(build())), torch.rand(6, 2)
    x, index = torch.randn(6, 16, requires_grad=True), torch.tensor([[0, 3], [1, 2], [2, 0]] * 2)
    y = module(x, index, w)
    (want,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda x: module(x, index, w).square().sum())(x.detach()), want)
    x = x.detach()
    for other in (torch.jit.trace(module, (x, index, w)), torch.export.export(module, (x, index, w)).module()):
        torch.testing.assert_close(other(x, index, w), y)


def test_calibration_leaves_rows_in_groups_alone():
    """It would time them as the one product of as many rows."""
    if dispatch.backends()["triton"].available():
        pytest.skip("calibration needs a GPU or Triton's interpreter")
    model = fp.accelerate(build(options={"target_modules": ["q_proj"]}))
    assert sum(row.problem is not None for row in fp.explain(model, 8)) == 6
    _, asked = calibrate._asked(model, 8, 1, None)
    assert [p.groups for p in asked] == [0]


def test_patterns_of_ranks_and_scales(calls):
    options = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"gate_up_proj": 3}, "use_rslora": True}
    same(fp.accelerate(build(options=options)), calls)
    assert {(c[2].A.shape[1], c[2].s) for c in calls} == {(3, 3 / 3**0.5), (2, 5 / 2**0.5)}


def test_layers_that_peft_turns_into_stacks(calls):
    """Adapters made for a model's former layers go to its stacks."""
    model = fill(peft.get_peft_model(bare(), peft.LoraConfig(r=3, target_modules=["w1", "w2", "w3"])))
    assert warned(fp.accelerate, model) == []
    same(model, calls)


# What stays PEFT's, and why


class Spread(torch.Tensor):
    def full_tensor(self):
        return self


def spread(t):
    return nn.Parameter(torch.Tensor._make_subclass(Spread, t.detach()), requires_grad=False)


def pack(t):
    return nn.Parameter(Packed(t.detach()), requires_grad=False)


class OwnForward(MixtralExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return 2 * super().forward(hidden_states, top_k_index, top_k_weights)


class OwnGate(MixtralExperts):
    def _apply_gate(self, gate_up_out):
        return super()._apply_gate(gate_up_out)


OTHERS = type("Others", (moe.ExpertsInterface,), {})()


@moe.use_experts_implementation(experts_interface=OTHERS)
class OwnImplementations(MixtralExperts):
    pass


class Undecorated(nn.Module):
    """Experts that say nothing of what they compute."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 48, 16) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(4, 16, 24) * 0.2)

    def forward(self, x, index, w):
        y = torch.zeros_like(x)
        for j, i in enumerate(index.unbind(1)):
            gate, up = torch.einsum("mk,mnk->mn", x, self.gate_up_proj[i]).chunk(2, -1)
            y = y + w[:, j, None] * torch.einsum("mk,mnk->mn", gate.tanh() * up, self.down_proj[i])
        return y


def as_class(kind):
    def change(module):
        module.get_base_layer().__class__ = kind

    return change


def on_base(**attributes):
    def change(module):
        for n, v in attributes.items():
            setattr(module.get_base_layer(), n, v)

    return change


def set_implementation(module):
    module.get_base_layer().config = copy.copy(module.get_base_layer().config)
    module.get_base_layer().config._experts_implementation = "sonicmoe"


def weight(make):
    def change(module):
        base = module.get_base_layer()
        base._parameters["down_proj"] = make(base.down_proj)

    return change


def zero3(p):
    p.ds_id = 1
    return p


def adapter(part, make):
    def change(module):
        linear = getattr(module, part)["default"]
        linear._parameters["weight"] = make(linear.weight)

    return change


def hook(find):
    return lambda module: find(module).register_forward_hook(lambda *args: None)


def own_forward(find):
    def change(module):
        m = find(module)
        m.forward = types.MethodType(lambda self, *args: type(self).forward(self, *args), m)

    return change


def inner(module):
    return module.base_layer


def base_of(module):
    return module.get_base_layer()


def stock_inner(module):
    module.base_layer.__class__ = peft.tuners.lora.ParamWrapper


def wrapped_twice(module):
    module.base_layer.parameter_name = module.parameter_name
    module.base_layer.__dict__.update(in_features=module.in_features, out_features=module.out_features)


def parametrized(module):
    nn.utils.parametrize.register_parametrization(module.get_base_layer(), "down_proj", nn.Identity())


RUNS, EXPLAINED = True, False  # whether PEFT's forward can run here too
# why -> (what is done to the outermost wrapper of one layer of an accelerated model, does it still run)
REASONS = {
    "the forward of OwnForward is not one that Transformers chooses": (as_class(OwnForward), RUNS),
    "OwnGate replaces the gate of MixtralExperts": (as_class(OwnGate), RUNS),
    "OwnImplementations has experts implementations of its own": (as_class(OwnImplementations), RUNS),
    "the experts implementation 'sonicmoe' is a forward of its own": (set_implementation, EXPLAINED),
    "its experts are spread over several processes": (on_base(_is_expert_parallel=True), RUNS),
    "MixtralExperts has hooks or a forward of its own": (hook(base_of), RUNS),
    "MixtralExperts has hooks or a forward of its own, which": (own_forward(base_of), RUNS),
    "MixtralExperts has hooks or a forward": (on_base(_apply_gate=torch.relu), RUNS),
    "the wrapper of gate_up_proj has hooks": (hook(inner), RUNS),
    "the wrapper of gate_up_proj has hooks or a forward": (own_forward(inner), RUNS),
    "the wrapper of gate_up_proj has hooks or a forward of its own": (stock_inner, RUNS),
    "MixtralExperts.down_proj is trained itself": (weight(lambda p: p.requires_grad_()), RUNS),
    "the weights of its experts are parametrized": (parametrized, EXPLAINED),  # of two, PEFT leaves its own behind
    "MixtralExperts.down_proj is sharded over several": (weight(spread), EXPLAINED),
    "MixtralExperts.down_proj is sharded": (weight(zero3), RUNS),
    "MixtralExperts.down_proj has dtype torch.float8_e4m3fn, and experts in a quantised format": (
        weight(lambda p: nn.Parameter(p.to(torch.float8_e4m3fn), requires_grad=False)), EXPLAINED),
    "MixtralExperts.down_proj has dtype torch.uint8": (
        weight(lambda p: nn.Parameter(p.to(torch.uint8), requires_grad=False)), EXPLAINED),
    "MixtralExperts.down_proj is a Packed, whose format": (
        weight(pack), EXPLAINED),
    "has shape (4, 384), which is no stack of 4 experts": (
        weight(lambda p: nn.Parameter(p.flatten(1), requires_grad=False)), EXPLAINED),
    "which is no stack of 4 experts": (weight(lambda p: nn.Parameter(p[:3], requires_grad=False)), EXPLAINED),
    "adapter 'default' has A (11, 24) and B (16, 12), which do not fit 4 experts of shape (16, 24)": (
        adapter("lora_A", lambda p: nn.Parameter(p[:-1])), EXPLAINED),
    "which do not fit 4 experts": (adapter("lora_B", lambda p: nn.Parameter(p[:, :-4])), EXPLAINED),
    "adapter 'default' is sharded over several processes": (adapter("lora_A", spread), EXPLAINED),
    "adapter 'default' is held in a quantised format": (
        adapter("lora_B", pack), EXPLAINED),
    "stored the other way round": (on_base(is_transposed=True), EXPLAINED),
    "or is wrapped twice": (wrapped_twice, EXPLAINED),
}  # fmt: skip


@pytest.mark.parametrize("reason", REASONS)
def test_what_stays_peft_s(reason, calls):
    """One warning says so, ``explain`` says so of each wrapper of the chain, and PEFT's own forward runs."""
    change, runs = REASONS[reason]
    model = fp.accelerate(build())
    change(the_experts(model))
    (said,) = warned(fp.accelerate, model) if change is not stock_inner else warned(report, model)
    assert said.startswith("accelerate fused 2 of 4 PEFT layers; 2 keep PEFT's forward: ")
    assert reason in said
    rows = [r for r in fp.explain(model) if "layers.0." in r.name]
    assert [(r.form, r.backend) for r in rows] == [("PEFT's", "peft")] * 2
    assert all(reason in r.why for r in rows)
    if runs:
        got, want = module_step(model), module_step(fp.restore(model))
        assert all(torch.equal(got[n], want[n]) for n in want)
        assert not calls


def report(model):
    """accelerate's warning, without its accelerating."""
    from fused_peft.integrations import peft as integration

    integration._report(integration._layers(model))


MODEL_REASONS = {
    "the forward of Llama4TextExperts is not one that Transformers chooses": ("Llama4", ["gate_up_proj", "down_proj"]),
    "MixtralTopKRouter.weight is a matrix": ("Mixtral", ["gate.weight"]),
    "GptOssExperts.gate_up_proj_bias is a matrix": ("GptOss", ["gate_up_proj_bias", "down_proj"]),
}


@pytest.mark.parametrize("reason", MODEL_REASONS)
def test_models_that_stay_peft_s(reason, calls):
    model = build(MODEL_REASONS[reason][0], targets=MODEL_REASONS[reason][1])
    want = step(model)
    (said,) = warned(fp.accelerate, model)
    assert reason in said
    assert {r.form for r in fp.explain(model)} == {"PEFT's"}
    got = step(model)
    assert not calls
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_a_linear_layer_s_parameter_stays_peft_s(calls):
    model = build(targets=["q_proj.weight", *STACKS])
    (said,) = warned(fp.accelerate, model)
    assert "fused 4 of 6" in said
    assert "Linear.weight is a matrix" in said
    same(model, calls)


def test_experts_of_an_unknown_module(calls):
    model = bare()
    model.model.layers[0].mlp.experts = Undecorated()
    model = fill(peft.get_peft_model(model, lora()))
    (said,) = warned(fp.accelerate, model)
    assert "fused 2 of 4" in said
    assert "the forward of Undecorated is not one that Transformers chooses" in said
    same(model, calls, 2)


def test_a_replaced_implementation(monkeypatch, calls):
    model = fp.accelerate(build(implementation="grouped_mm"))
    seen = []

    def own(self, *args):
        seen.append(self)
        return moe.grouped_mm_experts_forward(self, *args)

    monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "grouped_mm", own)
    same(model, calls, 0)
    assert len(seen) == 4
    assert all("'grouped_mm' was replaced" in r.why for r in fp.explain(model))


def test_the_one_expert_of_a_transposed_stack(calls):
    model = build("GptOss", num_local_experts=1, num_experts_per_tok=1)
    (said,) = warned(fp.accelerate, model)
    assert "of a single expert stored (in, out)" in said


def test_another_dtype_of_x_stays_peft_s(calls):
    module = the_experts(fp.accelerate(build()))
    assert module.unfused(torch.ones(1, 16)) is None
    assert "x has dtype torch.bfloat16" in module.unfused(torch.ones(1, 16, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert module.unfused(torch.ones(1, 16, dtype=torch.bfloat16)) is None


def test_reasons_of_an_adapter_added_later():
    model = fp.accelerate(build())
    the_experts(model).get_base_layer().down_proj.requires_grad_()
    (said,) = warned(second, model)
    assert said.startswith("accelerate fused 2 of 4 PEFT layers of adapter 'second'; 2 keep PEFT's forward: Mixtral")


# Proofs


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_gradcheck(name):
    """The whole forward of an experts' module in fp64: hidden states, routing weights, A and B of both stacks."""
    base = the_experts(build(name, hidden_size=8, intermediate_size=6).double()).get_base_layer()
    index = torch.tensor([[0, 3], [3, 1], [0, 1]])  # no row for expert 2
    made = {}
    for n in experts.stacks(base):
        _, N, K_ = experts.matrices(base, getattr(base, n)).shape
        made[n] = (torch.randn(4, 2, K_).double().requires_grad_(), torch.randn(4, N, 2).double().requires_grad_())

    def run(x, w, *adapters):
        of = dict(zip(made, zip(adapters[::2], adapters[1::2], strict=True), strict=True))

        def linear(n, x, g):
            W, bias = experts.matrices(base, getattr(base, n)), getattr(base, f"{n}_bias", None)
            return grouped.linear(x, W, Factors(A=of[n][0], B=of[n][1], s=0.7), g, bias)

        return experts.forward(base, x, index, w, linear)

    x, w = torch.randn(3, 8).double().requires_grad_(), torch.rand(3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, w, *(t for pair in made.values() for t in pair)))


def scale_gradient(field, factor=2.0):
    right = groups.backward

    def wrong(*args):
        found = list(right(*args))
        i = groups.Operands._fields.index(field)
        found[i] = None if found[i] is None else found[i] * factor
        return found

    return lambda patch: patch.setattr(groups.EagerBackend, "grouped_backward", staticmethod(wrong))


def change_factors(change):
    right = bridge.ParamWrapper.fused_factors
    return lambda patch: patch.setattr(bridge.ParamWrapper, "fused_factors", lambda *args: change(right(*args), *args))


def experts_slowest(f, self, used):
    B = self.lora_B[used[0]].weight
    return Factors(A=f.A, B=B.view(B.shape[0], 4, -1).permute(1, 0, 2), s=f.s)


def experts_fastest(f, self, used):
    A = self.lora_A[used[0]].weight
    return Factors(A=A.view(-1, 4, A.shape[1]).transpose(0, 1), B=f.B, s=f.s)


def off_by_one(patch):
    right = experts.route

    def wrong(index, E):
        g, order = right(index, E)
        offs = (g.offs + 1).clamp_max(g.offs[-1])
        return g._replace(offs=offs), order

    patch.setattr(experts, "route", wrong)


def without_last_group(patch):
    right = groups._Loop.__init__

    def wrong(self, *args):
        right(self, *args)
        self.each, self.runs = self.each[:-1], self.runs[:-1]

    patch.setattr(groups._Loop, "__init__", wrong)


def unsorted_weights(patch):
    right = experts._Combined.forward
    wrong = lambda ctx, h, w, *routing: right(ctx, h, w.flip(1), *routing)  # noqa: E731
    patch.setattr(experts._Combined, "forward", staticmethod(wrong))


def doubled_routing_gradient(patch):
    right = experts._Combined.backward
    wrong = lambda ctx, dy: ((found := right(ctx, dy))[0], 2 * found[1], *found[2:])  # noqa: E731
    patch.setattr(experts._Combined, "backward", staticmethod(wrong))


MUTANTS = {
    "none": (None, True),
    "double dB": (scale_gradient("B"), False),
    "dB off by a thousandth": (scale_gradient("B", 1.001), False),
    "double dA": (scale_gradient("A"), False),
    "double dx": (scale_gradient("x"), False),
    "scale ignored": (change_factors(lambda f, *_: Factors(A=f.A, B=f.B)), False),
    "B's experts slowest": (change_factors(experts_slowest), False),
    "A's experts fastest": (change_factors(experts_fastest), False),
    "no adapter": (change_factors(lambda f, *_: Factors(A=f.A, B=f.B, s=0.0)), False),
    "offsets off by one": (off_by_one, False),
    "a group dropped": (without_last_group, False),
    "double gradient of the routing weights": (doubled_routing_gradient, False),
    "another order of the routing weights": (unsorted_weights, False),
}


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_caught(mutant, name, monkeypatch, poison):
    model = build(name)
    want = module_step(model)
    change, right = MUTANTS[mutant]
    if change is not None:
        change(monkeypatch)
    fp.accelerate(model)
    got = module_step(model)
    try:
        close(got, want, 1e-5)
    except AssertionError:
        assert not right
    else:
        assert right
