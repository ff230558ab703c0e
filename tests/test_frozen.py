"""What a layer's base can be: a forward of its own, hooks, a weight in parts; and several adapters on it."""

import copy
import inspect
import io
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, SMALL
from oracle import inputs, layer_results
from torch import nn

import fused_peft as fp
from fused_peft.core import frozen
from fused_peft.methods import METHODS
from fused_peft.model import adapter as adapters

ATOL = 1e-10


def test_every_method_has_a_case():
    assert {case.method for case in CASES} == set(METHODS)


class Doubling(nn.Linear):
    """A forward of its own that is no x Wᵀ + b with its weight."""

    def forward(self, x):
        return 2 * super().forward(x)


class Written(nn.Linear):
    """As Transformers' FalconLinear: a forward of its own that is x Wᵀ + b."""

    def forward(self, x):
        hidden = x @ self.weight.T
        return hidden if self.bias is None else hidden + self.bias


def made(kind, bias):
    torch.manual_seed(0)
    return kind(SMALL.K, SMALL.N, bias=bias, dtype=torch.float64)


def adapted(linear, case):
    torch.manual_seed(3)
    layer = fp.PeftLinear.from_linear(linear, case.make(SMALL.r))
    with torch.no_grad():
        torch.manual_seed(4)
        for name in layer.tensor_names:
            getattr(layer, name).add_(0.3 * torch.randn_like(getattr(layer, name)))
    return layer


def same(got, want, atol=ATOL):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=atol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_beside_a_product_of_its_own(case, bias):
    """Every method adds to the module's own product, or is refused since it reads the weight."""
    linear = made(Doubling, bias)
    if METHODS[case.method].needs_weight:
        with pytest.raises(TypeError, match=f"{case.method} reads the weight, and Doubling has a forward of its own"):
            adapted(linear, case)
        assert type(linear) is Doubling
        return
    plain = made(nn.Linear, bias)
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(2)
    layer, reference = adapted(linear, case), adapted(plain, case)
    assert isinstance(layer, Doubling)
    assert isinstance(layer, fp.PeftLinear)
    x, dy = inputs(SMALL)
    if case.method == "bitfit" and bias:  # it trains a change of the bias
        with torch.no_grad():
            reference.bitfit_bias.copy_(layer.bitfit_bias + linear.bias)
    same(layer_results(layer, x, dy), layer_results(reference, x, dy))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(fp.NotMergeableError):
        layer.merge()
    assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_forward_of_its_own_that_is_the_plain_product(case, bias):
    """Every method; where it can be merged, merged and unmerged as the plain layer is."""
    layer, reference = adapted(made(Written, bias), case), adapted(made(nn.Linear, bias), case)
    assert isinstance(layer, Written)
    x, dy = inputs(SMALL)
    same(layer_results(layer, x, dy), layer_results(reference, x, dy))
    assert layer.state_dict().keys() == reference.state_dict().keys()
    layer.eval(), reference.eval()
    before = layer(x)
    try:
        reference.merge()
    except fp.NotMergeableError:
        with pytest.raises(fp.NotMergeableError):
            layer.merge()
        return
    layer.merge()
    same(dict(layer.named_parameters()), dict(reference.named_parameters()))
    torch.testing.assert_close(layer(x), reference(x), rtol=ATOL, atol=ATOL)
    layer.unmerge()
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.weight, made(Written, bias).weight)
    plain = layer.unload()
    assert type(plain) is Written
    torch.testing.assert_close(plain(x), reference(x), rtol=ATOL, atol=ATOL)


@pytest.mark.parametrize("kind", [Doubling, Written])
def test_a_model_of_them_is_copied_pickled_and_unloaded(kind):
    torch.manual_seed(0)
    base = nn.Sequential(kind(6, 8), nn.Tanh(), kind(8, 4)).double()
    config = fp.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    model = fp.get_peft_model(copy.deepcopy(base), config)
    plain = fp.get_peft_model(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), config)
    assert model.state_dict().keys() == plain.state_dict().keys()
    x = torch.randn(3, 6, dtype=torch.float64)
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    want = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(memory, weights_only=False)):
        assert torch.equal(twin(x), want)
        assert isinstance(twin[0], kind)
        twin[0].lora_B.data.zero_()
        assert torch.equal(model(x), want)
    if kind is Doubling:
        with pytest.raises(fp.NotMergeableError, match="Doubling has a forward of its own"):
            fp.merge_and_unload(model)
        assert torch.equal(model(x), want)
        return
    unloaded = fp.merge_and_unload(model)
    assert [type(m) for m in unloaded] == [Written, nn.Tanh, Written]
    assert unloaded.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(unloaded(x), want, rtol=ATOL, atol=ATOL)


@pytest.mark.parametrize("kind", [Doubling, Written])
def test_it_can_be_copied_and_pickled(kind):
    layer = adapted(made(kind, True), next(c for c in CASES if c.name == "lora"))
    x, _ = inputs(SMALL)
    memory = io.BytesIO()
    torch.save(layer, memory)
    memory.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(memory, weights_only=False)):
        assert type(twin) is type(layer)
        assert torch.equal(twin(x), layer(x))
        with torch.no_grad():
            twin.lora_B.zero_()
        torch.testing.assert_close(twin(x), made(kind, True)(x), rtol=0, atol=0)


LORA = fp.LoraConfig(r=2, init_lora_weights=False)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Narrow(nn.Linear):
    def forward(self, x):
        return super().forward(x)[..., :1]


class Detached(nn.Linear):
    def forward(self, x):
        return super().forward(x.detach())


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Pair, "Pair.forward gives a tuple"),
        (Narrow, r"Narrow.forward gives \(3, 1\) for x \(3, 4\)"),
        (Detached, "Detached.forward gives no gradient to its input"),
    ],
)
def test_what_is_no_map_of_x_is_refused_at_the_first_call(kind, message):
    layer = fp.PeftLinear.from_linear(kind(4, 5), LORA)
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=message):
        layer(x)
    if kind is Detached:
        with torch.no_grad():
            assert layer(x).shape == (3, 5)
        assert layer(x.detach()).requires_grad  # the first layer of a model needs no gradient of its input


def test_falcon(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.FalconConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20, new_decoder_architecture=False
    )
    torch.manual_seed(0)
    base = transformers.FalconForCausalLM(config).eval()
    ids = torch.arange(6)[None]
    model = fp.get_peft_model(copy.deepcopy(base), fp.LoraConfig(r=2, target_modules="all-linear")).eval()
    torch.testing.assert_close(model(ids).logits, base(ids).logits, rtol=0, atol=0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    for _ in range(2):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    want = model(ids).logits
    assert (want - base(ids).logits).abs().max() > 1e-4
    fp.save_pretrained(model, tmp_path)
    loaded = fp.load_adapter(copy.deepcopy(base), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, want)
    fp.merge(model)
    torch.testing.assert_close(model(ids).logits, want, rtol=1e-4, atol=1e-5)
    fp.unmerge(model)
    assert torch.equal(model(ids).logits, want)
    torch.testing.assert_close(fp.merge_and_unload(model)(ids).logits, want, rtol=1e-4, atol=1e-5)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def hooked(where, folder):
    """The model under accelerate's hooks, and the names of its layers whose weights lie elsewhere between calls."""
    accelerate = pytest.importorskip("accelerate")
    model, cpu = Around(), torch.device("cpu")
    if where == "dispatched":
        return accelerate.dispatch_model(
            model, {"first": "cpu", "last": "cpu"}, main_device="cpu", force_hooks=True
        ), []
    if where == "in part":
        places = {"first": "cpu", "last": "disk"}
        return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder), ["last"]
    if where == "in memory":
        accelerate.cpu_offload(model, execution_device=cpu)
    else:
        accelerate.disk_offload(model, folder, execution_device=cpu)
    return model, ["first", "last"]


@pytest.mark.parametrize("where", ["dispatched", "in part", "in memory", "on disk"])
def test_under_accelerates_hooks(where, tmp_path):
    """Forward, backward, saving and loading as without hooks; merged only where the weight stays."""
    config = fp.LoraConfig(r=2, target_modules=["first", "last"], init_lora_weights=False)
    torch.manual_seed(5)
    plain = fp.get_peft_model(Around(), config)
    model, away = hooked(where, tmp_path / "weights")
    assert [name for name in ("first", "last") if getattr(model, name).weight.is_meta] == away
    torch.manual_seed(6)
    fp.get_peft_model(model, config)
    fp.save_pretrained(model, tmp_path / "hooked")
    fp.load_adapter(plain, tmp_path / "hooked")
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), plain(x))
    plain.first.lora_B.data.mul_(2)
    fp.save_pretrained(plain, tmp_path / "plain")
    fp.load_adapter(model, tmp_path / "plain")
    for _ in range(2):
        results = []
        for each in (model, plain):
            each.zero_grad()
            leaf = x.clone().requires_grad_()
            y = each(leaf)
            y.square().sum().backward()
            results.append([y, leaf.grad, *(p.grad for p in each.parameters() if p.requires_grad)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    model.eval()
    y = model(x)
    if away:
        with pytest.raises(fp.NotMergeableError, match="meta device"):
            fp.merge(model)
        assert torch.equal(model(x), y)
        assert not model.first.merged
    if where == "in part":
        model.first.merge()
        torch.testing.assert_close(model(x), y)
        model.first.unmerge()
    if not away:
        fp.merge(model)
        torch.testing.assert_close(model(x), y)
        fp.unmerge(model)
    assert torch.equal(model(x), y)


def test_an_attribute_where_a_tensor_would_lie_is_refused():
    linear = nn.Linear(4, 4)
    linear.lora_A = 1
    with pytest.raises(ValueError, match="has an attribute 'lora_A' already, which lora needs"):
        fp.PeftLinear.from_linear(linear, LORA)
    assert type(linear) is nn.Linear
    assert linear.weight.requires_grad


# The recipe for a weight stored in another format: one subclass of Frozen, in front of KINDS, whose ``matrix`` is a
# Stored with the parts, and one decoder under the name in its spec. Nothing else in the library knows of the format.


class Rows(nn.Module):
    """A linear layer with int8 codes and a scale a row."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scale = linear.weight.detach().abs().amax(1) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scales", scale)
        self.bias = linear.bias

    @property
    def weight(self):
        return self.codes

    def forward(self, x):
        return F.linear(x, decoded((self.codes, self.scales), "", x.dtype), self.bias)


def decoded(parts, rest, dtype):
    codes, scale = parts
    return codes.to(dtype) * scale.to(dtype)[:, None]


class RowCodes(frozen.Frozen):
    def reads(self, module):
        return isinstance(module, Rows)

    def shape(self, module):
        return module.out_features, module.in_features

    def matrix(self, module):
        return frozen.Stored((module.codes, module.scales), "test_rows", self.shape(module), module.scales.dtype)

    def why_unwritable(self, module):
        return "its weight is stored in int8"


@pytest.fixture
def rows():
    frozen.KINDS.insert(0, RowCodes())
    frozen.register_decoder("test_rows", decoded)
    yield
    del frozen.KINDS[0], frozen._DECODERS["test_rows"]


def pair(case):
    linear = made(nn.Linear, True)
    packed, plain = Rows(linear), made(nn.Linear, True)
    with torch.no_grad():
        plain.weight.copy_(decoded((packed.codes, packed.scales), "", torch.float64))
    return adapted(packed, case), adapted(plain, case)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_weight_in_parts_is_decoded_each_way_and_not_kept(case, rows):
    layer, reference = pair(case)
    x, dy = inputs(SMALL)
    same(layer_results(layer, x, dy), layer_results(reference, x, dy))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x.requires_grad_())
    allowed = [layer.codes, *layer.buffers()]
    if not METHODS[case.method].weight:
        assert not [t for t in kept if t.shape == (SMALL.N, SMALL.K) and not any(t is a for a in allowed)]
    assert y.requires_grad
    with pytest.raises(fp.NotMergeableError, match=r"stored in int8"):
        layer.merge()


def test_a_kind_that_says_nothing_of_writing_refuses_a_merge(rows, monkeypatch):
    monkeypatch.delattr(RowCodes, "why_unwritable")
    layer, _ = pair(next(c for c in CASES if c.name == "lora"))
    with pytest.raises(fp.NotMergeableError, match="Rows is stored in parts"):
        layer.merge()


@pytest.mark.parametrize("name", ["lora", "ssb", "dora", "lora+dropout"])
def test_a_weight_in_parts_compiles(name, rows):
    layer, reference = pair(next(c for c in CASES if c.name == name))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, dy = inputs(SMALL)
    results = []
    for call, own in ((compiled, layer), (reference, reference)):
        leaf = x.detach().requires_grad_()
        torch.manual_seed(7)
        y = call(leaf)
        results.append([y, *torch.autograd.grad(y, [leaf, *own.adapter_tensors()], dy)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=ATOL, atol=ATOL)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_weight_in_parts_under_autocast(case, rows):
    """Codes of 7 bits times a power of two are exact in bf16, so what is decoded in it equals the matrix cast to it."""
    linear = made(nn.Linear, True).float()
    packed = Rows(linear)
    packed.scales.copy_(packed.scales.log2().round().exp2())
    plain = nn.Linear(SMALL.K, SMALL.N)
    with torch.no_grad():
        plain.weight.copy_(decoded((packed.codes, packed.scales), "", torch.float32))
        plain.bias.copy_(linear.bias)
    x, dy = inputs(SMALL, torch.float32)
    results = []
    for base in (packed, plain):
        layer = adapted(base, case)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(layer_results(layer, x, dy.bfloat16()))
    assert results[0]["y"].dtype == torch.bfloat16
    same(*results, atol=1e-6)


def test_a_format_has_one_decoder(rows):
    with pytest.raises(ValueError, match="name='test_rows' has a decoder already"):
        frozen.register_decoder("test_rows", decoded)


# Several adapters on one layer

ONE_EACH = {}
for _case in CASES:
    ONE_EACH.setdefault(_case.method, _case)


def merges(name, bias):
    """Whether an adapter alone can be merged."""
    try:
        adapted(made(nn.Linear, bias), ONE_EACH[name]).merge()
    except fp.NotMergeableError:
        return False
    return True


def add_second(layer, name):
    torch.manual_seed(6)
    layer.add_adapter("second", ONE_EACH[name].make(SMALL.r))
    with torch.no_grad():
        for p in layer.added["second"].adapter_tensors():
            p.add_(0.3 * torch.randn_like(p))
    return layer.eval()


def two(kind, first, second, bias=True):
    layer = add_second(adapted(made(kind, bias), ONE_EACH[first]), second)
    layer.set_adapter(["default", "second"])
    return layer


def gradients_of(layer, x, dy):
    """[y, dx and the gradient of every active adapter's tensors]"""
    leaf = x.detach().requires_grad_()
    y = layer(leaf)
    trained = [p for a in layer.active_adapters() for p in a.adapter_tensors()]
    return [y, *torch.autograd.grad(y, [leaf, *trained], dy, allow_unused=True)]


@pytest.mark.parametrize("second", ONE_EACH)
@pytest.mark.parametrize("first", ONE_EACH)
def test_adapters_act_in_their_order(first, second):
    """y as merging them in that order gives, for every pair of methods; a second that reads the weight is refused."""
    x, _ = inputs(SMALL)
    for bias in (True, False):
        layer = add_second(adapted(made(nn.Linear, bias), ONE_EACH[first]), second)
        alone = layer(x)
        if METHODS[second].stands_alone:
            with pytest.raises(ValueError, match=f"{second} reads the frozen weight itself"):
                layer.set_adapter(["default", "second"])
        else:
            layer.set_adapter(["default", "second"])
            y = layer(x)
            if merges(first, bias) and merges(second, bias):
                layer.merge()
                torch.testing.assert_close(layer(x), y, rtol=1e-9, atol=1e-9)
                layer.unmerge()
                assert torch.equal(layer(x), y)
            else:
                with pytest.raises(fp.NotMergeableError):
                    layer.merge()
                assert torch.equal(layer(x), y)
            layer.delete_adapter("second")
        assert torch.equal(layer(x), alone)


SLOPED = [name for name in ONE_EACH if name not in ("dora", "delora")]  # the others' norms are not differentiated


@pytest.mark.parametrize("second", [name for name in SLOPED if not METHODS[name].stands_alone])
@pytest.mark.parametrize("first", SLOPED)
def test_gradients_of_two_adapters(first, second):
    """The derivative along a random direction of x and every tensor, against differences."""
    layer = two(nn.Linear, first, second)
    x, dy = inputs(SMALL)
    _, *grads = gradients_of(layer, x, dy)
    moved = [x, *(p.data for a in layer.active_adapters() for p in a.adapter_tensors())]
    torch.manual_seed(8)
    directions = [torch.randn_like(t) for t in moved]
    step, ends = 1e-6, []
    with torch.no_grad():
        for sign in (1, -1):
            for t, d in zip(moved, directions, strict=True):
                t.add_(d, alpha=sign * step)
            ends.append((layer(x) * dy).sum())
            for t, d in zip(moved, directions, strict=True):
                t.sub_(d, alpha=sign * step)
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True) if g is not None)
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-5)


PAIRS = [
    ("lora", "lora"),
    ("ssb", "ssb"),
    ("ia3", "lora"),
    ("pissa", "adalora"),
    ("bitfit", "ssb"),
    ("houlsby", "lora"),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_gradcheck_of_two_adapters(first, second):
    layer = two(nn.Linear, first, second)
    x = inputs(SMALL)[0][:2].requires_grad_()
    trained = [p for a in layer.active_adapters() for p in a.adapter_tensors()]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *trained))


ADDING = [name for name in ONE_EACH if not METHODS[name].needs_weight]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("second", ADDING)
@pytest.mark.parametrize("first", ADDING)
def test_two_adapters_beside_a_product_of_its_own(first, second, bias):
    layer, plain = two(Doubling, first, second, bias), made(nn.Linear, bias)
    own = None if plain.bias is None else plain.bias.detach().clone()
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(2)
    reference = add_second(adapted(plain, ONE_EACH[first]), second)
    reference.set_adapter(["default", "second"])
    for mine, its in zip(layer.active_adapters(), reference.active_adapters(), strict=True):
        if mine.method.name == "bitfit" and bias:
            its.bitfit_bias.data.copy_(mine.bitfit_bias + own)
    x, dy = inputs(SMALL)
    for got, want in zip(gradients_of(layer, x, dy), gradients_of(reference, x, dy), strict=True):
        torch.testing.assert_close(got, want, rtol=ATOL, atol=ATOL)


LEAVING = ("lora+bias", "parallel_adapter+all", "bitfit", "ia3", "ia3+unscaled_bias", "ssb", "houlsby")


@pytest.mark.parametrize("second", LEAVING)
@pytest.mark.parametrize("first", LEAVING)
@pytest.mark.parametrize("kind", [nn.Linear, Doubling])
def test_a_second_adapter_starts_from_what_the_first_made(kind, first, second):
    """One just made changes nothing, whatever the first did to the bias."""
    cases = {c.name: c for c in CASES}
    x, _ = inputs(SMALL)
    for bias in (True, False):
        layer = adapted(made(kind, bias), cases[first]).eval()
        y = layer(x)
        layer.add_adapter("second", cases[second].make(SMALL.r))
        layer.set_adapter(["default", "second"])
        torch.testing.assert_close(layer.eval()(x), y, rtol=ATOL, atol=ATOL)


@pytest.mark.parametrize("name", ["bitfit", "ssb"])
def test_peft_merges_two_at_once_as_one_by_one(name):
    peft = pytest.importorskip("peft")
    config = METHODS[name].config(target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(made(nn.Linear, True)), config).eval()
    model.add_adapter("other", config)
    for n, t in model.named_parameters():
        if t.requires_grad or "other" in n:
            t.data.add_(0.3 * torch.randn_like(t))
    model.base_model.set_adapter(["default", "other"])
    x, _ = inputs(SMALL)
    layer, y = model.base_model.model[0], model(x)
    for parts in ([["default", "other"]], [["default"], ["other"]]):
        for part in parts:
            layer.merge(adapter_names=part)
        torch.testing.assert_close(model(x), y, rtol=ATOL, atol=ATOL)
        layer.unmerge()
        assert torch.equal(model(x), y)


def test_inactive_adapters_change_nothing_and_get_no_gradient():
    x, dy = inputs(SMALL)
    layer = add_second(adapted(made(nn.Linear, True), ONE_EACH["lora"]), "ssb")
    alone = adapted(made(nn.Linear, True), ONE_EACH["lora"]).eval()
    assert torch.equal(layer(x), alone(x))
    for active in (["default"], ["second"], []):
        layer.zero_grad()
        layer.set_adapter(active)
        y = layer(x.requires_grad_())
        y.backward(dy)
        for name, each in layer.adapters.items():
            assert all((p.grad is not None) == (name in active) for p in each.adapter_tensors()), (name, active)
    assert torch.equal(y, made(nn.Linear, True)(x))
    layer.delete_adapter("second")
    layer.set_adapter(["default"])
    assert torch.equal(layer(x), alone(x))
    assert layer.state_dict().keys() == alone.state_dict().keys()


# What these tests must notice


def rewritten(function, old, new):
    """The function with one piece of its source replaced."""
    source = inspect.getsource(function)
    assert source.count(old) == 1, old
    scope = dict(vars(inspect.getmodule(function)))
    exec(source.replace(old, new), scope)
    return scope[function.__name__]


def test_a_bias_inside_d_out_is_noticed(monkeypatch):
    wrong = rewritten(adapters.beside, "own - f.d_out * bias", "own - bias")
    monkeypatch.setattr(adapters, "beside", wrong)
    with pytest.raises(AssertionError):
        test_adapters_act_in_their_order("lora", "ssb")
    with pytest.raises(AssertionError):
        test_beside_a_product_of_its_own(next(c for c in CASES if c.name == "ssb"), True)


def test_a_later_d_in_that_is_dropped_is_noticed(monkeypatch):
    wrong = rewritten(adapters.in_turn, "inputs[-1] * f.d_in.to(x.dtype) if scales else inputs[-1]", "inputs[-1]")
    monkeypatch.setattr(adapters, "in_turn", wrong)
    with pytest.raises(AssertionError):
        test_adapters_act_in_their_order("lora", "ssb")


@pytest.mark.parametrize("name", ["lora", "ssb", "dora"])
@pytest.mark.parametrize("calls", ["every", "backward's"])
def test_a_wrong_scale_is_noticed(name, calls, rows, monkeypatch):
    layer, reference = pair(next(c for c in CASES if c.name == name))
    x, dy = inputs(SMALL)
    want = layer_results(reference, x, dy)
    same(layer_results(layer, x, dy), want)

    def wrong(parts, rest, dtype):
        backward = any(f.function == "backward" for f in inspect.stack(0))
        return decoded(parts, rest, dtype) * (1.001 if calls == "every" or backward else 1)

    monkeypatch.setitem(frozen._DECODERS, "test_rows", wrong)
    with pytest.raises(AssertionError, match="^y" if calls == "every" else "^x"):
        same(layer_results(layer, x, dy), want)


class Quantised(nn.Module):
    """As the layers of GPTQ, AWQ and HQQ are: codes and scales under names of their own, no ``weight``, a product of
    its own that passes a gradient to x."""

    def __init__(self, K=8, N=6):
        super().__init__()
        self.in_features, self.out_features = K, N
        self.register_buffer("qweight", torch.randint(-8, 8, (N, K)).to(torch.int8))
        self.register_buffer("scales", torch.rand(N, 1))
        self.bias = nn.Parameter(torch.randn(N))

    def dense(self):
        return self.qweight * self.scales

    def forward(self, x):
        return nn.functional.linear(x, self.dense(), self.bias)


def compressed(K=8, N=6):
    """As compressed-tensors leaves a layer: an nn.Linear without ``weight`` and a forward on the instance."""
    layer, held = nn.Linear(K, N), Quantised(K, N)
    del layer.weight
    layer.register_buffer("weight_packed", held.qweight), layer.register_buffer("weight_scale", held.scales)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight_packed * layer.weight_scale, layer.bias)
    layer.dense = lambda: layer.weight_packed * layer.weight_scale
    return layer


@pytest.mark.parametrize("make", [Quantised, compressed], ids=["of its own", "a linear one"])
@pytest.mark.parametrize("name", [n for n in ONE_EACH if not METHODS[n].needs_weight])
def test_a_quantised_layer_that_names_its_tensors_otherwise(name, make, tmp_path):
    """Every method that reads no weight, beside its product: numbers, a second adapter, files, batches, reports."""
    base = nn.Sequential(make())
    plain = nn.Sequential(nn.Linear(8, 6))
    with torch.no_grad():
        plain[0].weight.copy_(base[0].dense()), plain[0].bias.copy_(base[0].bias)
    config = replace(METHODS[name].example(2), target_modules=["0"])
    model, reference = fp.get_peft_model(base, config), fp.get_peft_model(plain, config)
    for own, other in zip(model[0].adapter_tensors(), reference[0].adapter_tensors(), strict=True):
        own.data.add_(torch.rand_like(own) * 0.1)
        other.data.copy_(own)
    x = torch.randn(2, 3, 8, requires_grad=True)

    def same():
        for got, want in zip(
            *(gradients_of(m[0], x.detach(), torch.ones(2, 3, 6)) for m in (model, reference)), strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    same()
    assert "beside the product of" in fp.explain(model)[0].why
    fp.print_trainable_parameters(model)
    with fp.disable_adapter(model):
        assert torch.equal(model(x), base[0].base_forward(x))
    with pytest.raises(fp.NotMergeableError, match="holds its weight in a form that cannot be read"):
        fp.merge(model)
    fp.save_pretrained(model, tmp_path)
    fp.load_adapter(reference, tmp_path)
    same()
    if METHODS[name].stands_alone or METHODS[name].trains_other_biases:  # which are the first of a model's only
        return
    for m in (model, reference):
        fp.add_adapter(m, "second", replace(config))
        fp.set_adapter(m, ["default", "second"])
    for own, other in zip(
        model[0].adapters["second"].adapter_tensors(), reference[0].adapters["second"].adapter_tensors(), strict=True
    ):
        other.data.copy_(own)
    same()
    results = []
    for m in (model, reference):
        with fp.adapter_batch(m, ["second", "default"]):
            results.append(m(x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
