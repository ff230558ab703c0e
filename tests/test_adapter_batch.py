"""Batches whose samples use different adapters: PEFT's mixed forward on one call, and adapter_batch, which trains."""

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_peft as fp
from fused_peft.core import grouped, groups
from fused_peft.core.dropout import keep_mask
from fused_peft.core.factors import Factors
from fused_peft.model import rows

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")
BASE = "__base__"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 4)
        self.again = None

    def forward(self, x):
        h = self.first(x) if self.again is None else checkpoint(self.first, x, use_reentrant=self.again)
        return self.three(h)

    def first(self, x):
        return torch.tanh(self.two(torch.tanh(self.one(x))))


@pytest.fixture
def calls(monkeypatch):
    """The groups of every grouped call."""
    made, own = [], grouped.linear

    def linear(x, w, f, groups, *rest):
        made.append(groups)
        return own(x, w, f, groups, *rest)

    monkeypatch.setattr(grouped, "linear", linear)
    return made


def names_of(n):
    return [f"x{i}" for i in range(n)]


def pefts(n, dtype=torch.float32, **options):
    """A PEFT model of n adapters that differ in rank, scale, bias and targets."""
    torch.manual_seed(0)
    model, every = Net().to(dtype), ["one", "two", "three"]
    for i, name in enumerate(names_of(n)):
        config = peft.LoraConfig(
            r=2 + i % 3, lora_alpha=3 + i, init_lora_weights=False, lora_bias=i % 4 == 1, use_rslora=i % 2 == 0,
            target_modules=every if i == 0 else [t for j, t in enumerate(every) if j != i % 4], **options,
        )  # fmt: skip
        if i == 0:
            model = peft.get_peft_model(model, config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(name, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.5)
    model.base_model.set_adapter(names_of(n))
    return model


def ours(n=3, dtype=torch.float64, **options):
    torch.manual_seed(0)
    every, made = ["one", "two", "three"], {}
    for i, name in enumerate(["default", *names_of(n)[1:]]):
        targets = every if i == 0 else [t for j, t in enumerate(every) if j != i % 4]
        made[name] = fp.LoraConfig(
            r=2 + i % 3, lora_alpha=3 + i, init_lora_weights=False, target_modules=targets, **options
        )
    return with_adapters(Net().to(dtype), made)


def with_adapters(model, configs):
    (_, first), *others = configs.items()
    model = fp.get_peft_model(model, first)
    for name, config in others:
        fp.add_adapter(model, name, config)
    fp.set_adapter(model, list(configs))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
    return model


def batch(names, shape=(5, 6), dtype=torch.float64):
    return torch.randn(len(names), *shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def alone(model, activate, x, names, weight):
    """What one call an adapter, on its own samples, gives: y, dx and the gradients."""
    x = x.clone().requires_grad_()
    y = torch.zeros(*x.shape[:-1], 4, dtype=x.dtype)
    for name in dict.fromkeys(names):
        own = [i for i, n in enumerate(names) if n == name]
        if name == BASE:
            off = model.disable_adapter() if hasattr(model, "peft_config") else fp.disable_adapter(model)
            with off:
                part = model(x[own])
        else:
            activate(model, name)
            for p in model.parameters():
                p.requires_grad_(p.requires_grad)
            part = model(x[own])
        (part * weight[own]).sum().backward()
        y[own] = part.detach()
    return y, x.grad, gradients(model)


def together(model, x, names, weight, inside=False):
    x = x.clone().requires_grad_()
    with fp.adapter_batch(model, names):
        y = model(x)
        if inside:
            (y * weight).sum().backward()
    if not inside:
        (y * weight).sum().backward()
    return y.detach(), x.grad, gradients(model)


def same(got, want, **tolerance):
    for a, b in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(a, b, **tolerance)
    assert got[2].keys() == want[2].keys()
    for name, grad in want[2].items():
        torch.testing.assert_close(got[2][name], grad, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


EXACT = {"rtol": 1e-10, "atol": 1e-10}


def mixtures(n):
    cyclic = [f"x{(5 * i) % n}" for i in range(max(n, 4))]
    return [cyclic, [*cyclic, BASE, "x0", BASE], sorted(cyclic), cyclic[:1], [BASE, BASE]]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("n", [1, 3, 16])
def test_pefts_mixed_forward_in_one_call_a_layer(n, dtype, rtol, calls):
    stock = pefts(n, dtype).eval()
    fast = fp.accelerate(copy.deepcopy(stock))
    for names in mixtures(n):
        for shape in ((5, 6), (1, 6), (6,), (12, 6)):
            x = batch(names, shape, dtype)
            with torch.no_grad():
                want = stock(x, adapter_names=names)
                calls.clear()
                got = fast(x, adapter_names=names)
            assert got.dtype == dtype
            assert (got - want).norm() <= rtol * want.norm(), (names, shape)
            assert len(calls) == (0 if len(set(names)) == 1 else len(calls)) <= 3
    assert calls == []  # the last batch is the base's alone


def test_generating_in_a_mixed_batch(calls):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config)
    lora = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=16, **lora), adapter_name="x0")
    model.add_adapter("x1", peft.LoraConfig(r=4, **lora))
    model.eval()
    fast = fp.accelerate(copy.deepcopy(model))
    ids = torch.randint(0, 40, (3, 4))
    for beams in (1, 2):
        options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False, "adapter_names": ["x1", BASE, "x0"]}
        assert torch.equal(fast.generate(ids, **options), model.generate(ids, **options))
    assert calls


def test_pefts_errors_are_pefts():
    stock = pefts(3).eval()
    dora = peft.LoraConfig(r=2, target_modules=["two"], use_dora=True)
    stock.add_adapter("dora", dora)
    said = []
    for model in (stock, fp.accelerate(copy.deepcopy(stock))):
        x = batch(["x0"] * 2, dtype=torch.float32)
        for names, prepare in (
            (["x0"], None), (["x0", "no"], None), (["x0", "dora"], None),
            (["x0", "x1"], lambda m: m.merge_adapter(["x0"])), (["x0", "x1"], lambda m: m.train()),
        ):  # fmt: skip
            if prepare:
                prepare(model)
            with pytest.raises(ValueError) as error:
                model(x, adapter_names=names)
            said.append(str(error.value))
    assert said[:5] == said[5:]


def peft_activate(model, name):
    model.base_model.set_adapter(name)


@pytest.mark.parametrize("accelerated", [True, False])
@pytest.mark.parametrize("n", [1, 3, 16])
def test_training_pefts_adapters_together(n, accelerated, calls):
    model = pefts(n, torch.float64).train()
    reference = copy.deepcopy(model)
    if accelerated:
        fp.accelerate(model)
    for names in mixtures(n):
        x = batch(names)
        weight = torch.randn(len(names), 5, 4, dtype=torch.float64)
        want = alone(reference, peft_activate, x, names, weight)
        for inside in (False, True):
            got = together(model, x, names, weight, inside)
            same(got, want, **EXACT)
    assert bool(calls) == accelerated


@pytest.mark.parametrize("shape", [(5, 6), (1, 6), (6,)], ids=str)
def test_training_own_adapters_together(shape, calls):
    model = ours()
    for names in (["x1", "default", BASE, "x2", "x1", "x1"], ["x2", "x1"], ["default"], ["x1", BASE]):
        x, weight = batch(names, shape), torch.randn(len(names), *shape[:-1], 4, dtype=torch.float64)
        calls.clear()
        got = together(model, x, names, weight)
        assert (len(set(names)) > 1) == bool(calls)
        used = {n.split("added.")[1].split(".")[0] if "added." in n else "default" for n in got[2]}
        assert used == {n for n in names if n != BASE}
        want = alone(copy.deepcopy(model), fp.set_adapter, x, names, weight)
        same(got, want, **EXACT)


OTHERS = {
    "default": fp.LoraConfig(r=2, target_modules=["one", "two"], init_lora_weights=False),
    "ssb": fp.SSBConfig(target_modules=["two", "three"]),
    "dora": fp.DoraConfig(r=3, target_modules=["one", "two"]),
    "flora": fp.FloraConfig(r=3, target_modules=["one", "two", "three"]),
    "trilora": fp.TriLoraConfig(r=2, target_modules=["two"]),
    "pissa": fp.PissaConfig(r=2, target_modules=["one", "two"]),
    "svdiff": fp.SVDiffConfig(target_modules=["one", "two"]),
    "parallel": fp.ParallelAdapterConfig(r=2, target_modules=["one", "two"]),
    "bottleneck": fp.BottleneckConfig(r=2, target_modules=["two"]),
    "liera": fp.LieraConfig(r=2, target_modules=["two", "three"]),
}


def test_every_method_in_one_batch(calls):
    model = with_adapters_one_by_one(Net().double(), OTHERS)
    names = [*OTHERS, BASE, *reversed(OTHERS)]
    x, weight = batch(names), torch.randn(len(names), 5, 4, dtype=torch.float64)
    want = alone(copy.deepcopy(model), fp.set_adapter, x, names, weight)
    for layer in (model.one, model.two, model.three):
        for adapter in layer.adapters.values():
            for t in adapter.adapter_tensors():
                t.requires_grad_(True)
    same(together(model, x, names, weight), want, **EXACT)
    assert len(calls) == 3


def with_adapters_one_by_one(model, configs):
    """Of methods that could not all be active at once."""
    (_, first), *others = configs.items()
    model = fp.get_peft_model(model, first)
    for name, config in others:
        fp.add_adapter(model, name, config)
    for name in configs:
        fp.set_adapter(model, name)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.3 * torch.randn_like(p))
    return model


def test_registered_methods_and_other_layers_of_pefts():
    torch.manual_seed(0)
    model = peft.get_peft_model(Net().double(), fp.SSBConfig(target_modules=["one", "two"]), adapter_name="x0")
    model.add_adapter("x1", fp.SSBConfig(target_modules=["two", "three"]))
    names, weight = ["x1", BASE, "x0", "x1"], torch.randn(4, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "d_in" in n or "d_out" in n:
                p.add_(0.3 * torch.randn_like(p)).requires_grad_(True)
    x = batch(names)
    want = alone(copy.deepcopy(model), peft_activate, x, names, weight)
    model.base_model.set_adapter(["x0", "x1"])
    same(together(model, x, names, weight), want, **EXACT)


@pytest.mark.parametrize("kind", ["dora", "adalora", "ia3"])
def test_accelerated_layers_of_other_forms(kind):
    config = {
        "dora": lambda t: peft.LoraConfig(r=2, use_dora=True, target_modules=t, init_lora_weights=False),
        "adalora": lambda t: peft.AdaLoraConfig(total_step=9, target_modules=t, inference_mode=t != ["one", "two"]),
        "ia3": lambda t: peft.IA3Config(target_modules=t, feedforward_modules=[]),
    }[kind]
    torch.manual_seed(0)
    model = peft.get_peft_model(Net().double(), config(["one", "two"]), adapter_name="x0")
    model.add_adapter("x1", config(["two", "three"]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_" in n or "ia3" in n:
                p.add_(0.3 * torch.randn_like(p))
    fp.accelerate(model)
    names, x = ["x1", BASE, "x0", "x1"], batch(["x0"] * 4)
    model.eval()
    with fp.adapter_batch(model, names):
        got = model(x)
    for i, name in enumerate(names):
        if name == BASE:
            with model.disable_adapter():
                torch.testing.assert_close(got[i], model(x[i : i + 1])[0], **EXACT)
        else:
            peft_activate(model, name)
            torch.testing.assert_close(got[i], model(x[i : i + 1])[0], **EXACT)


def test_dropout_is_each_adapters_own(calls):
    """Of one probability in one call, whose mask is the one that is said; of several in a call each."""
    torch.manual_seed(0)
    layers = {"one": {"lora_dropout": 0.5}, "two": {"lora_dropout": 0.5}, "other": {"lora_dropout": 0.0}}
    configs = {
        "default" if n == "one" else n: fp.LoraConfig(r=2, target_modules=["one"], init_lora_weights=False, **o)
        for n, o in layers.items()
    }
    model = with_adapters(Net().double(), configs)
    x = batch([0] * 4, (400, 6))
    for names, count in ((["default", "two", BASE, "two"], 1), (["default", "other", "two", BASE], 1)):
        calls.clear()
        drawn = []
        with pytest.MonkeyPatch.context() as patch:
            own = torch.randint
            patch.setattr(
                torch, "randint", lambda *a, own=own, drawn=drawn, **k: drawn.append(own(*a, **k)) or drawn[-1]
            )
            with fp.adapter_batch(model, names):
                got = model.one(x)
        assert (len(calls), len(drawn)) == (count, 1)
        part = [i for i, n in enumerate(names) if n != "other"]
        keep = torch.ones(4, 400, 6, dtype=torch.bool)
        keep[part] = keep_mask(drawn[0], (len(part) * 400, 6), 0.5).view(len(part), 400, 6)
        assert abs(keep[part].double().mean() - 0.5) < 0.03
        for i, name in enumerate(names):
            want = model.one.base_class.forward(model.one, x[i])
            if name != BASE:
                a = model.one.adapters[name]
                dropped = x[i] if name == "other" else x[i] * keep[i] * 2
                want = want + a.config.lora_alpha / 2 * (dropped @ a.lora_A.T @ a.lora_B.T)
            torch.testing.assert_close(got[i], want, **EXACT)


def test_gradients_under_dropout():
    """By differences, the seed fixed."""
    torch.manual_seed(0)
    w, x = torch.randn(5, 6).double(), torch.randn(8, 6).double().requires_grad_()
    A, B = torch.randn(2, 3, 6).double().requires_grad_(), torch.randn(2, 5, 3).double().requires_grad_()
    bias = torch.randn(5).double().requires_grad_()
    seed = torch.tensor([3, 4], dtype=torch.int32)
    for p in (0.0, 0.4):
        for of, n in (((1, -1, 0, 1), 2), ((0, 1, -1, -1, 0, 1, 1, 0), 1), ((1, 1, -1, -1), 2)):
            routed = rows.runs(of, n, x.device)

            def call(x, A, B, bias, p=p, routed=routed):
                f = Factors(A=A, B=B, s=0.7, p=p)
                return grouped.linear(x, w.expand(2, 5, 6), f, routed, bias.expand(2, 5), seed=seed)

            assert torch.autograd.gradcheck(call, (x, A, B, bias))
            o = call(x, A, B, bias)
            with pytest.MonkeyPatch.context() as patch:  # written out, as functional transforms take it
                patch.setattr(grouped, "transforming", lambda: True)
                torch.testing.assert_close(o, call(x, A, B, bias), **EXACT)


@pytest.mark.parametrize("of", [(1, -1, 0, 1), (0, 1, 2), (-1, 2, 2, -1), (2, 1, 0, 0, 2, -1)], ids=str)
def test_the_grouped_products_of_a_gpu_are_the_same(of):
    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip("no grouped_mm")
    torch.manual_seed(0)
    routed = rows.runs(of, 16, torch.device("cpu"))
    P = 16 * len(of)
    made = groups._GroupedMM(routed, P), groups._Loop(routed, P)
    u, v, w, b = torch.randn(P, 8), torch.randn(P, 16), torch.randn(3, 8, 16), torch.randn(3, 16)
    of_none = torch.tensor(of).repeat_interleave(16) < 0
    for results in (
        [p.mm(u, w).masked_fill(of_none[:, None], 0) for p in made],
        [p.add(v.clone(), u, w, 0.5) for p in made],
        [p.add_bias(v.clone(), b) for p in made],
        [p.outer(u, v, 3, 2.0) for p in made],
    ):
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("library", ["own", "peft"])
def test_a_forward_made_again_in_backward_uses_the_same_adapters(library, reentrant):
    model = ours() if library == "own" else fp.accelerate(pefts(3, torch.float64).train())
    net = model if library == "own" else model.base_model.model
    first = "default" if library == "own" else "x0"
    names = ["x1", first, BASE, "x2"]
    x, weight = batch(names), torch.randn(4, 5, 4, dtype=torch.float64)
    want = together(model, x, names, weight)
    plain = model(x).detach()
    net.again = reentrant
    same(together(model, x, names, weight), want, **EXACT)
    same(together(model, x, names, weight, inside=True), want, **EXACT)
    with fp.adapter_batch(model, names[::-1]), torch.no_grad():
        model(x)  # nobody goes back through this
    same(together(model, x, names, weight), want, **EXACT)
    for _ in range(2):  # a training step without a context, gradients and all
        x_ = x.clone().requires_grad_()
        y = model(x_)
        torch.testing.assert_close(y.detach(), plain)
        y.sum().backward()
        gradients(model)
        del y
    if reentrant:
        return
    with fp.adapter_batch(model, names):
        one = model(x).sum()
    for other in (names[::-1], None):
        if other is None:
            two = model(x).sum()
        else:
            with fp.adapter_batch(model, other):
                two = model(x).sum()
        with pytest.raises(RuntimeError, match="activation checkpointing makes a forward again"):
            (one + two).backward()
    del one, two
    gc.collect()
    gradients(model)
    same(together(model, x, names, weight), want, **EXACT)


def test_afterwards_the_layers_are_as_they_were():
    for model in (ours(), fp.accelerate(pefts(3).train())):
        x = batch([0] * 2).to(next(model.parameters()).dtype)
        before, state = model(x), {n: set(m.__dict__) for n, m in model.named_modules()}
        first = "default" if not hasattr(model, "peft_config") else "x0"
        with fp.adapter_batch(model, [first, "x1"]):
            assert not torch.equal(model(x), before)
            copied = copy.deepcopy(model)
            assert torch.equal(copied(x), before)
            pickle.loads(pickle.dumps(model))
        assert torch.equal(model(x), before)
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        assert {n: {k for k in m.__dict__ if m.__dict__[k] is not None} - state[n]
                for n, m in model.named_modules()} == {n: set() for n in state}  # fmt: skip


def test_disabled_within_and_around():
    model, names = ours(), ["x1", "x2"]
    x = batch(names)
    with fp.disable_adapter(model):
        base = model(x)
        with fp.adapter_batch(model, names):
            assert torch.equal(model(x), base)
    with fp.adapter_batch(model, names), fp.disable_adapter(model):
        assert torch.equal(model(x), base)
    accelerated = fp.accelerate(pefts(3, torch.float64))
    with accelerated.disable_adapter():
        base = accelerated(x)
    with fp.adapter_batch(accelerated, names), accelerated.disable_adapter():
        assert torch.equal(accelerated(x), base)


def frozen(model):
    fp.set_adapter(model, "default")
    return model


def merged(model):
    fp.merge(model)
    return model


BAD = [
    (ours, "x1", TypeError, "must be a list of adapter names"),
    (ours, [1, 2], TypeError, "must be a list of adapter names"),
    (ours, [], ValueError, "names is empty"),
    (ours, ["x1", "no"], ValueError, r"names: 'no' is none of the model's adapters: default, x1, x2"),
    (ours, ["x1"], ValueError, r"names has 1 entries, one a sample, but the batch that reaches a layer has 2"),
    (lambda: frozen(ours()), ["x1", "default"], ValueError, r"'x1' does not train.*set_adapter\(model, \['x1', 'def"),
    (lambda: merged(ours()), ["x1", "x1"], RuntimeError, "is merged; call unmerge before adapter_batch"),
    (Net, ["x1", "x1"], ValueError, "has no adapter"),
    (lambda: pefts(3), ["x1", "no"], ValueError, "names: 'no' is none"),
    (lambda: fp.accelerate(pefts(3)), ["x1"], ValueError, "names has 1 entries"),
    (lambda: peft.get_peft_model(Net(), peft.LoHaConfig(target_modules=["one"])), ["default"] * 2, ValueError,
     "takes no batch of several adapters"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "names", "kind", "message"), BAD, ids=[m for *_, m in BAD])
def test_what_is_refused(make, names, kind, message):
    model = make()
    x = batch([0] * 2).to(next(model.parameters()).dtype)
    with pytest.raises(kind, match=message), fp.adapter_batch(model, names):
        model(x)
    model(x)  # as ever


def test_one_context_at_a_time():
    model, x = ours(), batch([0] * 2)
    with fp.adapter_batch(model, ["x1", "x2"]):
        want = model(x)
        with pytest.raises(RuntimeError, match="within another one"), fp.adapter_batch(model, ["x2", "x1"]):
            pass
        assert torch.equal(model(x), want)


def test_inference_needs_nothing_that_trains():
    model = frozen(ours())
    names, x = ["x1", BASE], batch([0] * 2)
    with torch.no_grad(), fp.adapter_batch(model, names):
        want = model(x)
    model.eval()
    with fp.adapter_batch(model, names):
        assert torch.equal(model(x), want)
    with torch.inference_mode(), fp.adapter_batch(model, names):
        model(x)
    fp.set_adapter(model, ["x1"])
    model.train()
    with fp.adapter_batch(model, names):
        model(x).sum().backward()  # on routing that inference_mode has made


def test_compiled():
    model = ours(dtype=torch.float32)
    names, x = ["x1", BASE, "default", "x1"], batch([0] * 4, dtype=torch.float32)
    weight = torch.randn(4, 5, 4)
    want = together(model, x, names, weight)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    same(together(compiled, x, names, weight), (*want[:2], {f"_orig_mod.{n}": g for n, g in want[2].items()}))


@pytest.mark.parametrize("mutant", ["order", "offset", "scale"])
def test_a_wrong_call_is_noticed(mutant, monkeypatch):
    stacked, runs = rows.stacked, rows.runs
    if mutant == "order":
        swap = lambda f: Factors(A=f.A, B=f.B.flip(0), s=f.s, p=f.p)  # noqa: E731
        monkeypatch.setattr(rows, "stacked", lambda fs: swap(stacked(fs)))
    elif mutant == "offset":
        monkeypatch.setattr(rows, "runs", lambda of, n, d: (g := runs(of, n, d))._replace(of=g.of.roll(1)))
    else:
        monkeypatch.setattr(rows, "stacked", lambda fs: stacked([Factors(A=f.A, B=f.B, s=fs[0].s) for f in fs]))
    stock = pefts(3).eval()
    names = ["x1", "x2", "x0", BASE]
    with torch.no_grad():
        x = batch(names, dtype=torch.float32)
        want = stock(x, adapter_names=names)
        got = fp.accelerate(stock)(x, adapter_names=names)
    assert (got - want).norm() > 1e-3 * want.norm()
