"""PEFT's own calls do to an accelerated model what they do to a stock one: a pair goes through each side by side."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.helpers import DoraCaching  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from test_accelerate import CONFIGS, Net, build, close, fused_calls  # noqa: E402

import fused_peft as fp  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
METHODS = ["lora", "rslora", "dora", "adalora", "ia3"]
SECOND = {"ia3": 2}  # layers that the second adapter is on, where it is not one: (IA)³'s always has the feed-forward's


@pytest.fixture
def calls(monkeypatch):
    return fused_calls(monkeypatch)


def twice(make, *args, **options):
    """The same model twice: PEFT's own, and accelerated."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(make(*args, **options))
    fp.accelerate(models[1])
    return models


def pair(name, *args, **options):
    return twice(build, name, *args, **options)


def each(models, method, *args, **options):
    return [getattr(model, method)(*args, **options) for model in models]


def add(models, name, targets=("layers.0",), **options):
    """A second adapter with the same values in each model; frozen, as AdaLoRA trains no two."""
    targets = ["0", "2"] if name == "ia3" else list(targets)
    for model in models:
        torch.manual_seed(7)
        model.add_adapter("second", CONFIGS[name](target_modules=targets, inference_mode=True), **options)
        for key, p in model.named_parameters():
            if ".second" in key and "ranknum" not in key:
                p.data.mul_(0.3).add_(torch.rand_like(p) * 0.1)


def state(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    described = {n: (t.shape, t.dtype, t.requires_grad, t.device.type) for n, t in tensors}
    return (repr(model), list(model.state_dict()), described, model.get_layer_status(), model.get_model_status(),
            model.active_adapters, sorted(model.peft_config))  # fmt: skip


def step(model, x):
    """y, dx and the gradient of every parameter that has one."""
    x = x.detach().requires_grad_()
    y = model(x)
    y.float().square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"y": y.detach(), "x": x.grad, **grads}


def same(models, calls, fused=2, rtol=1e-5):
    """All that shows of both is the same, and so are the numbers; ``fused`` fused calls were made."""
    stock, fast = models
    assert state(stock) == state(fast)
    x = torch.randn(4, 8).to(next(stock.parameters()).dtype)
    want = step(stock, x)
    calls.clear()
    got = step(fast, x)
    assert len(calls) == fused
    assert {n: t.dtype for n, t in got.items()} == {n: t.dtype for n, t in want.items()}
    close(got, want, rtol)


def same_tensors(stock, fast):
    assert stock.keys() == fast.keys()
    assert all(torch.equal(fast[n], t) for n, t in stock.items())


def same_without_adapters(models, calls):
    calls.clear()
    with models[0].disable_adapter(), models[1].disable_adapter():
        assert torch.equal(*each(models, "forward", torch.ones(3, 8)))
        assert state(models[0]) == state(models[1])
    assert not calls


@pytest.mark.parametrize("low", [False, True], ids=["", "low_cpu_mem_usage"])
@pytest.mark.parametrize("name", METHODS)
def test_saving_and_loading(name, low, calls, tmp_path):
    models = pair(name)
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    stock, fast = tmp_path / "0", tmp_path / "1"
    assert (fast / "adapter_config.json").read_text() == (stock / "adapter_config.json").read_text()
    saved = load_file(fast / "adapter_model.safetensors")
    same_tensors(load_file(stock / "adapter_model.safetensors"), saved)
    each(models, "load_adapter", fast, "again", low_cpu_mem_usage=low)
    each(models, "set_adapter", "again")
    same(models, calls)
    loaded = twice(lambda: peft.PeftModel.from_pretrained(Net(), fast, is_trainable=True, low_cpu_mem_usage=low))
    same(loaded, calls)
    config = models[0].peft_config["default"]
    empty = twice(lambda: peft.get_peft_model(Net(), config, low_cpu_mem_usage=low))
    assert any(p.is_meta for p in empty[1].parameters()) == low
    for model in empty:
        peft.set_peft_model_state_dict(model, saved, low_cpu_mem_usage=low)
    same(empty, calls)


@pytest.mark.parametrize("name", METHODS)
def test_merging(name, calls):
    models = pair(name)
    add(models, name)
    each(models, "merge_adapter", adapter_names=["second"], safe_merge=True)
    same(models, calls, fused=2 - SECOND.get(name, 1))  # the rest has nothing merged
    same_tensors(*each(models, "state_dict"))
    each(models, "unmerge_adapter")
    same(models, calls)
    each(models, "merge_adapter")
    each(models, "merge_adapter", adapter_names=["second"])
    same(models, calls, fused=0)
    same_without_adapters(models, calls)  # which unmerges
    same(models, calls)
    merged = each(copy.deepcopy(models), "merge_and_unload", safe_merge=True, adapter_names=["default", "second"])
    same_tensors(*each(merged, "state_dict"))
    assert not any(isinstance(m, BaseTunerLayer) for model in (*merged, models[1].unload()) for m in model.modules())


@pytest.mark.parametrize("name", METHODS)
def test_a_broken_adapter_is_refused_alike(name):
    said, weights = set(), []
    for model in pair(name):
        next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="NaNs detected in the merged weights") as error:
                merge(safe_merge=True)
            said.add(str(error.value))
        weights.append({n: t for n, t in model.state_dict().items() if "base_layer" in n})
    assert len(said) == 1
    same_tensors(*weights)


@pytest.mark.parametrize("name", METHODS)
def test_switching_mixing_disabling_and_deleting(name, calls):
    models, one = pair(name), SECOND.get(name, 1)
    add(models, name)
    if "lora" in name and name != "adalora":  # PEFT mixes no other method's adapters in a batch
        each(models, "eval")
        want, got = each(models, "forward", torch.randn(3, 8), adapter_names=["second", "__base__", "default"])
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert not calls  # none a sample or an adapter: test_adapter_batch counts the grouped ones
    both = {"dora": 1, "ia3": 2}.get(name, 3)  # PEFT computes DoRA beside another adapter; (IA)³'s are one factor
    for active, fused in (("second", one), (["default", "second"], both), ("default", 2)):
        each([m.base_model for m in models], "set_adapter", active)
        same(models, calls, fused)
    same_without_adapters(models, calls)
    each(models, "delete_adapter", "default")
    each(models, "set_adapter", "second")
    same(models, calls, one)


@pytest.mark.parametrize("kind", ["linear", "cat", "svd", "ties"])
def test_weighted_adapters(kind, calls):
    models = pair("lora")
    add(models, "lora", targets=("layers.0", "layers.2"))
    weights = [0.7, -0.4]
    each(models, "add_weighted_adapter", ["default", "second"], weights, "mix", combination_type=kind, density=0.9)
    each(models, "set_adapter", "mix")
    same_tensors(*each(models, "state_dict"))
    same(models, calls, rtol=1e-4)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", METHODS)
def test_adapter_dtypes(name, dtype, rtol, autocast, calls):
    models = pair(name, dtype)
    add(models, name, autocast_adapter_dtype=autocast)
    each(models, "set_adapter", "second")
    found = {p.dtype for n, p in models[1].named_parameters() if ".second" in n and "ranknum" not in n}
    assert found == {torch.float32 if autocast else dtype}
    same(models, calls, SECOND.get(name, 1), rtol)


@pytest.mark.parametrize("name", METHODS[:-1])
def test_modules_to_save(name, calls, tmp_path):
    models = pair(name, target_modules=["layers.0"], modules_to_save=["layers.2"])
    with torch.no_grad():
        for model in models:
            model.base_model.model.layers[2].modules_to_save["default"].weight.add_(0.1)
    same(models, calls, fused=1)
    models[1].save_pretrained(tmp_path)
    loaded, x = peft.PeftModel.from_pretrained(copy.deepcopy(models[0]).unload(), tmp_path), torch.randn(3, 8)
    torch.testing.assert_close(loaded(x), models[0](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lora-dropout", "dora-dropout", "adalora-dropout"])
def test_the_mode_of_the_dropout_counts(name, calls):
    models = pair(name)
    drops = [m for model in models for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    each(drops, "eval")
    same(models, calls)
    each(models, "eval")
    each(drops, "train")  # as Monte Carlo dropout does; PEFT's DoRA heeds the layer's mode too
    x = torch.randn(3, 8)
    assert [torch.equal(m(x), m(x)) for m in models] == [name == "dora-dropout"] * 2
    each(models, "train")
    for drop in drops:
        drop.p = 1.0
    same(models, calls, fused=0)


def test_dora_s_cache_and_hooks_are_left_to_peft(calls):
    models, seen = pair("dora"), []
    magnitudes = [model.base_model.model.layers[0].lora_magnitude_vector["default"] for model in models]
    each(models, "eval")
    with DoraCaching():
        same(models, calls, fused=0)
        assert all(magnitude._dora_cache for magnitude in magnitudes)
    same(models, calls)
    assert not any(magnitude._dora_cache for magnitude in magnitudes)
    each(magnitudes, "register_forward_hook", lambda *args: seen.append(args))
    same(models, calls, fused=1)
    assert len(seen) == 2


def test_adalora_allocates_the_same_ranks(calls):
    models, x = pair("adalora"), torch.randn(10, 4, 8)
    for model in models:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for i in range(10):
            model(x[i]).square().sum().backward()
            optimizer.step()
            model.base_model.update_and_allocate(i)
            optimizer.zero_grad()
    stock, fast = (model.peft_config["default"].rank_pattern for model in models)
    assert stock == fast
    assert not all(map(all, stock.values()))  # some rank is gone
    same(models, calls, rtol=1e-4)


@pytest.mark.parametrize("name", ["lora", "lora-bias"])
def test_hot_swapping_in_a_compiled_model(name, tmp_path):
    other = build(name, seed=1)
    other.peft_config["default"].lora_alpha = 9
    other.save_pretrained(tmp_path)
    stock, fast = pair(name)
    for model in (stock, fast):
        model.eval().requires_grad_(False)
        prepare_model_for_compiled_hotswap(model, config=model.peft_config, target_rank=4)
    torch._dynamo.reset()
    x, found = torch.randn(3, 8), []
    for model in (stock, torch.compile(fast, backend="eager", fullgraph=True)):
        before = model(x)
        hotswap_adapter(model, tmp_path, "default")
        with torch.compiler.set_stance("fail_on_recompile"):
            found.append({"before": before, "after": model(x)})
    assert (found[0]["after"] - found[0]["before"]).abs().max() > 0.1
    close(found[1], found[0], 1e-5)


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "ia3"])
def test_a_language_model_generates_and_trains_with_checkpointing(name, calls):
    config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                                      num_attention_heads=2, bos_token_id=0, eos_token_id=1)  # fmt: skip
    on = {"target_modules": ["q_proj", "down_proj"]}
    own = peft.IA3Config(**on, feedforward_modules=["down_proj"]) if name == "ia3" else CONFIGS[name](**on)
    models = twice(lambda: peft.get_peft_model(transformers.LlamaForCausalLM(config), own))
    ids = torch.randint(2, 32, (2, 6))
    want, got = each(models, "generate", input_ids=ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(got, want)
    assert calls
    grads = []
    for model in models:
        model.train().gradient_checkpointing_enable()
        model.enable_input_require_grads()
        calls.clear()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(calls) == 8  # four layers, each once more in backward
    close(grads[1], grads[0], 1e-4)


@pytest.mark.parametrize("name", ["lora", "dora", "adalora", "ia3"])
def test_falcon_s_own_linear_layers(name, calls):
    config = transformers.FalconConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                       hidden_dropout=0.0, attention_dropout=0.0, eos_token_id=1)  # fmt: skip
    on = {"target_modules": ["query_key_value", "dense_4h_to_h"]}
    own = peft.IA3Config(**on, feedforward_modules=["dense_4h_to_h"]) if name == "ia3" else CONFIGS[name](**on)
    models = twice(lambda: peft.get_peft_model(transformers.FalconForCausalLM(config), own))
    rows = fp.explain(models[1])
    assert len(rows) == 4
    assert all(row.why.startswith("beside the product of a FalconLinear") for row in rows)
    ids = torch.randint(2, 32, (2, 6))
    assert torch.equal(*each(models, "generate", input_ids=ids, max_new_tokens=8, do_sample=False))
    grads = []
    for model in models:
        model.train()
        calls.clear()
        model(input_ids=ids, labels=ids).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert len(calls) == (0 if name == "ia3" else 4)
    close(grads[1], grads[0], 1e-4)
