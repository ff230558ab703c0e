"""What a layer's base can be: a forward of its own, hooks, a weight in parts; and several adapters on it."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, SMALL
from oracle import inputs, layer_results
from torch import nn

import fused_peft as fp
from fused_peft.core import frozen
from fused_peft.methods import METHODS

ATOL = 1e-10


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


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_a_forward_of_its_own_that_is_the_plain_product(case):
    """Every method; where it can be merged, merged as the plain layer is."""
    layer, reference = adapted(made(Written, True), case), adapted(made(nn.Linear, True), case)
    x, dy = inputs(SMALL)
    same(layer_results(layer, x, dy), layer_results(reference, x, dy))
    assert layer.state_dict().keys() == reference.state_dict().keys()
    try:
        reference.merge()
    except fp.NotMergeableError:
        with pytest.raises(fp.NotMergeableError):
            layer.merge()
        return
    layer.merge()
    torch.testing.assert_close(layer(x), reference(x), rtol=ATOL, atol=ATOL)
    plain = layer.unload()
    assert type(plain) is Written
    torch.testing.assert_close(plain(x), reference(x), rtol=ATOL, atol=ATOL)


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


def test_falcon():
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
    torch.testing.assert_close(fp.merge_and_unload(model)(ids).logits, want, rtol=1e-4, atol=1e-5)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


@pytest.mark.parametrize("where", ["dispatched", "offloaded"])
def test_under_accelerates_hooks(where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    config = fp.LoraConfig(r=2, target_modules=["first", "last"], init_lora_weights=False)
    torch.manual_seed(5)
    plain = fp.get_peft_model(Around(), config)
    model = Around()
    if where == "dispatched":
        accelerate.dispatch_model(model, {"first": "cpu", "last": "cpu"}, main_device="cpu", force_hooks=True)
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert model.first.weight.is_meta
    torch.manual_seed(5)
    fp.get_peft_model(model, config)
    fp.save_pretrained(plain, tmp_path)
    fp.load_adapter(model, tmp_path)
    x = torch.randn(3, 6)
    for _ in range(2):
        results = []
        for each in (model, plain):
            each.zero_grad()
            y = each(x)
            y.square().sum().backward()
            results.append([y, *(p.grad for p in each.parameters() if p.requires_grad)])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want)
    if where == "offloaded":
        with pytest.raises(fp.NotMergeableError, match="meta device"):
            fp.merge(model)
        return
    fp.merge(model.eval())
    torch.testing.assert_close(model(x), plain(x))


def test_an_attribute_where_a_tensor_would_lie_is_refused():
    linear = nn.Linear(4, 4)
    linear.lora_A = 1
    with pytest.raises(ValueError, match="has an attribute 'lora_A' already, which lora needs"):
        fp.PeftLinear.from_linear(linear, LORA)
    assert type(linear) is nn.Linear
    assert linear.weight.requires_grad


# A kind of one's own: a class that reads its modules, and a decoder. Nothing else in the library knows of it.


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
    if "test_rows" not in frozen._DECODERS:
        frozen.register_decoder("test_rows", decoded)
    yield
    del frozen.KINDS[0]


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


def test_a_format_has_one_decoder(rows):
    with pytest.raises(ValueError, match="name='test_rows' has a decoder already"):
        frozen.register_decoder("test_rows", decoded)


# Several adapters on one layer

ONE_EACH = {}
for _case in CASES:
    ONE_EACH.setdefault(_case.method, _case)


@pytest.mark.parametrize("second", ONE_EACH)
@pytest.mark.parametrize("first", ["lora", "ssb", "dora", "sam_parser", "houlsby", "pissa", "bitfit", "liera"])
def test_adapters_act_in_their_order(first, second):
    layer = adapted(made(nn.Linear, True), ONE_EACH[first])
    torch.manual_seed(6)
    layer.add_adapter("second", ONE_EACH[second].make(SMALL.r))
    with torch.no_grad():
        for p in layer.added["second"].adapter_tensors():
            p.add_(0.3 * torch.randn_like(p))
    x, dy = inputs(SMALL)
    alone = layer(x)
    if METHODS[second].stands_alone:
        with pytest.raises(ValueError, match=f"{second} reads the frozen weight itself"):
            layer.set_adapter(["default", "second"])
        assert torch.equal(layer(x), alone)
        return
    layer.set_adapter(["default", "second"])
    layer.eval()
    leaf = x.requires_grad_()
    y = layer(leaf)
    trained = [p for a in layer.adapters.values() for p in a.adapter_tensors()]
    grads = torch.autograd.grad(y, [leaf, *trained], dy, allow_unused=True)
    step = 1e-6  # along a random direction of everything: the derivative by differences
    torch.manual_seed(8)
    directions = [torch.randn_like(t) for t in (leaf, *trained)]
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            for t, d in zip((leaf, *trained), directions, strict=True):
                t.add_(d, alpha=sign * step)
            ends.append((layer(leaf) * dy).sum())
            for t, d in zip((leaf, *trained), directions, strict=True):
                t.sub_(d, alpha=sign * step)
    if "dora" not in (first, second) and "delora" not in (first, second):  # their norms are not differentiated
        slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True) if g is not None)
        torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-5)
    try:
        layer.merge()
    except fp.NotMergeableError:
        return
    torch.testing.assert_close(layer(x), y, rtol=1e-9, atol=1e-9)
    layer.unmerge()
    layer.delete_adapter("second")
    torch.testing.assert_close(layer(x), adapted(made(nn.Linear, True), ONE_EACH[first]).eval()(x), rtol=0, atol=ATOL)
