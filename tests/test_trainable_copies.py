"""Heads and biases that train beside adapters of a half-precision model are fp32; what they compute is as before."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fused_peft as fp
from fused_peft.model.wide import HALF

IDS = torch.arange(10).view(2, 5)


class Head(nn.Module):
    """A head of several modules, one of which is called past it."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, x):
        return self.out(self.norm(x))


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, width), nn.LayerNorm(width)
        self.q, self.v, self.head = nn.Linear(width, width), nn.Linear(width, width), Head(width)

    def forward(self, ids):
        x = self.norm(self.embed(ids))
        return self.head(x + self.v(torch.tanh(self.q(x)))) + self.head.out(x)


CONFIGS = {
    "head": fp.LoraConfig(r=2, target_modules=["q"], modules_to_save=["head"]),
    "embedding": fp.LoraConfig(r=2, target_modules=["q"], modules_to_save=["embed", "norm"]),
    "biases": fp.LoraConfig(r=2, target_modules=["q"], bias="all"),
    "own biases": fp.SSBConfig(target_modules=["q", "v"], bias="ssb_only"),
    "bitfit": fp.BitFitConfig(),
}
every = pytest.mark.parametrize("name", CONFIGS)
half = pytest.mark.parametrize("dtype", HALF, ids=str)


def pair(name, dtype):
    torch.manual_seed(0)
    base = Net().to(dtype)
    return copy.deepcopy(base), fp.get_peft_model(base, CONFIGS[name])


@every
@half
def test_every_trainable_parameter_is_fp32_and_the_start_is_the_same(name, dtype):
    base, model = pair(name, dtype)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
    assert len(trainable) > 2
    y = model(IDS)
    assert y.dtype == dtype
    torch.testing.assert_close(y, base(IDS), rtol=8 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    y.float().square().mean().backward()
    assert {p.grad.dtype for p in trainable.values()} == {torch.float32}
    assert all(p.grad.any() for n, p in trainable.items() if "lora_A" not in n)  # A gets none while B is zero


@every
def test_gradients_are_those_of_plain_half_precision_in_fp32(name):
    """The gradient that reaches the fp32 parameter is the half-precision one, unrounded by what accumulates."""
    base, model = pair(name, torch.bfloat16)
    base.requires_grad_(True)
    for m in (base, model):
        m(IDS).float().square().mean().backward()
    theirs = dict(base.named_parameters())
    shared = [n for n, p in model.named_parameters() if p.requires_grad and n in theirs]
    assert shared or name == "own biases"
    for n in shared:
        torch.testing.assert_close(model.get_parameter(n).grad, theirs[n].grad.float(), rtol=2e-2, atol=1e-3)


@every
def test_small_steps_are_not_lost(name):
    _, model = pair(name, torch.bfloat16)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for p in trainable:
        p.data.fill_(1.0)
    optimizer = torch.optim.SGD(trainable, 1e-6)
    for _ in range(2):
        model(IDS).float().square().mean().backward()
        optimizer.step()
    moved = [not p.eq(1).all() for p in trainable if p.grad.abs().max() > 0.1]
    assert moved
    assert all(moved)


@every
def test_under_autocast_with_a_scaler(name):
    _, model = pair(name, torch.float16)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer, scaler = torch.optim.AdamW(trainable, 1e-3), torch.amp.GradScaler("cpu", init_scale=8.0)
    before = [p.detach().clone() for p in trainable]
    with torch.autocast("cpu", torch.float16):
        loss = model(IDS).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # "Attempting to unscale FP16 gradients" otherwise
    scaler.step(optimizer)
    assert all(not torch.equal(p, b) for p, b in zip(trainable, before, strict=True) if p.grad.any())


@every
def test_saving_disabling_copying_and_unloading(name, tmp_path):
    base, model = pair(name, torch.bfloat16)
    model.eval(), base.eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    y = model(IDS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS), y)
    with fp.disable_adapter(model):
        assert torch.equal(model(IDS), base(IDS))
    fp.save_pretrained(model, tmp_path)
    assert torch.equal(fp.load_adapter(copy.deepcopy(base), tmp_path)(IDS), y)
    plain = fp.merge_and_unload(model)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert not [n for n, m in plain.named_modules() if "forward" in m.__dict__]
    torch.testing.assert_close(plain(IDS), y, rtol=0.05, atol=0.05)


@every
def test_one_compiled_graph(name):
    _, model = pair(name, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS), model(IDS), rtol=0.02, atol=0.02)
    compiled(IDS).float().square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class Nested(nn.Module):
    """As ViT's embeddings: a parameter of its own, and layers below."""

    def __init__(self):
        super().__init__()
        self.token, self.project = nn.Parameter(torch.randn(16)), nn.Linear(16, 16)

    def forward(self, x):
        return self.project(x + self.token)


def model_with(part, **config):
    torch.manual_seed(0)
    base = nn.ModuleDict({"q": nn.Linear(16, 16), "part": part}).bfloat16().eval()
    before = copy.deepcopy(base)
    return before, fp.get_peft_model(base, fp.LoraConfig(r=2, target_modules=["q"], **config))


X = torch.randn(2, 3, 16)
PARTS = {
    "nested": (Nested, lambda m, x: m(x)),
    "attention": (lambda: nn.MultiheadAttention(16, 2, batch_first=True), lambda m, x: m(x, x, x)[0]),
    "encoder": (lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True), lambda m, x: m(x)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", [{"modules_to_save": ["part"]}, {"bias": "all"}], ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_modules_that_read_the_parameters_of_those_below(name, config, training):
    make, call = PARTS[name]
    before, model = model_with(make(), **config)
    before.train(training), model.train(training)
    x = X.bfloat16()
    with torch.set_grad_enabled(training):
        y, want = call(model["part"], x), call(before["part"], x)
    torch.testing.assert_close(y, want, rtol=0.02, atol=0.02)
    if training:
        y.float().square().mean().backward()
        assert [n for n, p in model["part"].named_parameters() if p.grad is not None]


@every
def test_the_model_may_change_its_dtype_later(name):
    base, model = pair(name, torch.bfloat16)
    want = base.float()(IDS)
    model.float()
    torch.testing.assert_close(model(IDS), want)
    plain = fp.merge_and_unload(model)
    assert {p.dtype for p in plain.parameters()} == {torch.float32}
    torch.testing.assert_close(plain(IDS), want)


def test_a_forward_replaced_on_the_instance_is_kept():
    torch.manual_seed(0)
    net = Net().bfloat16()
    forward = net.head.out.forward
    net.head.out.forward = lambda x: forward(x) + 1
    want = net(IDS)
    model = fp.get_peft_model(net, CONFIGS["biases"])
    torch.testing.assert_close(model(IDS), want, rtol=0.02, atol=0.02)
    plain = fp.merge_and_unload(model)
    assert "forward" in plain.head.out.__dict__
    torch.testing.assert_close(plain(IDS), want, rtol=0.02, atol=0.02)


def test_hooks_of_a_copy_run_once():
    _, model = pair("head", torch.bfloat16)
    calls = []
    model.head.norm.register_forward_hook(lambda *_: calls.append(1))
    model(IDS)
    assert calls == [1]


class ReadsDtype(nn.Module):
    """As T5's feed-forward layer: its caller makes x as wide as the weight."""

    def __init__(self):
        super().__init__()
        self.wo = nn.Linear(16, 16)

    def forward(self, x):
        return self.wo(torch.relu(x).to(self.wo.weight.dtype))


def test_a_caller_that_makes_x_as_wide_as_the_weight():
    before, model = model_with(ReadsDtype(), modules_to_save=["wo"])
    x = X.bfloat16()
    assert model["part"].wo.weight.dtype == torch.float32
    assert torch.equal(model["part"](x), before["part"](x))
    model["part"](x).float().sum().backward()
    assert model["part"].wo.weight.grad.any()


@every
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_model_follows_what_trains(name):
    _, model = pair(name, torch.bfloat16)
    traced = torch.jit.trace(model, IDS, check_trace=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.5)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    torch.testing.assert_close(traced(IDS.flip(1)), model(IDS.flip(1)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("part", ["head", "norm"])
def test_a_replica_of_data_parallel_computes_from_its_own_tensors(part):
    """What nn.parallel.replicate does for another GPU, without one."""
    _, model = pair("embedding" if part == "norm" else "head", torch.bfloat16)
    module = model.get_submodule(part)
    copies = {m: m._replicate_for_data_parallel() for m in module.modules()}
    tensors = {}
    for m, replica in copies.items():
        for key, child in m.named_children():
            setattr(replica, key, copies[child])
        for key, p in m.named_parameters(recurse=False):
            tensors[id(p)] = torch.zeros_like(p).requires_grad_()
            setattr(replica, key, tensors[id(p)])
    x = X.bfloat16()
    y = copies[module](x)
    assert y.dtype == torch.bfloat16
    assert not y.any()
    y.sum().backward()
    assert all(p.grad is None for p in module.parameters())
    assert any(t.grad is not None for t in tensors.values())
    assert module(x).any()
