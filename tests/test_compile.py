"""torch.compile and torch.export of every method: whole graphs, no more of them than needed, and the same numbers."""

import io
import itertools
import shutil

import pytest
import torch
from cases import CASES, SMALL, Shape
from oracle import build, distinct, gradients, inputs
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.utils.checkpoint import checkpoint

import fused_peft as fp
from fused_peft.core import dispatch

BATCHES = (4, 6, 9, 40)  # of 3 rows each; with the last, SAM-PARSER and SVDiff are cheaper with their weight formed
DROPOUT = [case for case in CASES if "dropout" in case.name or case.name.endswith("+all")]
ONE_EACH = [*{case.method: case for case in reversed(CASES)}.values()][::-1]  # the first case of each method
DISTINCT = distinct(CASES)  # as the op sees them
EACH_AND_DROPOUT = [case for case in CASES if case in ONE_EACH or case in DROPOUT]
SVD = ("sam_parser", "svdiff")  # with two forms, one of which forms the weight


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


class Graphs:
    """A backend of torch.compile that counts: ``total`` graphs compiled, ``fused`` calls of the library's op in each.

    A compilation that Dynamo gives up in order to start over (a float it had taken for a variable) is no graph.
    """

    def __init__(self, backend: str = "aot_eager"):
        self.backend, self.total, self.fused = lookup_backend(backend), 0, []

    def __call__(self, graph, inputs):
        compiled = self.backend(graph, inputs)
        nodes = [node for part in graph.modules() if hasattr(part, "graph") for node in part.graph.nodes]
        self.fused.append(sum("fused_peft.linear" in str(node.target) for node in nodes))
        self.total += 1
        return compiled


def step(call, x, dy, tensors):
    """y, dx and the gradient of each tensor, dropout seeded; y alone under no_grad."""
    torch.manual_seed(3)
    if not torch.is_grad_enabled():
        return {"y": call(x)}
    x = x.detach().requires_grad_()
    y = call(x)
    return gradients(y, {"x": x, **tensors}, dy.to(y.dtype))


def close(got, want, limit):
    assert got.keys() == want.keys()
    for name, reference in want.items():
        scale = max(1.0, reference.abs().max().item())
        torch.testing.assert_close(got[name], reference, rtol=0, atol=limit * scale, msg=lambda m, n=name: f"{n}: {m}")


def compiled_like(
    call, tensors, batches, shape=SMALL, dtype=torch.float64, limit=1e-10, reference=None, graphs=None, **options
):
    """Compare a call with its compiled self on batches of 3 rows each: [graphs after each batch], the graphs."""
    graphs = graphs or Graphs()
    compiled = torch.compile(call, fullgraph=True, backend=graphs, **options)
    counts = []
    for batch in batches:
        x, dy = inputs(Shape((batch, 3), shape.K, shape.N, shape.r), dtype)
        close(step(compiled, x, dy, tensors), step(reference or call, x, dy, tensors), limit)
        counts.append(graphs.total)
    return counts, graphs


def adapter(layer):
    return {name: getattr(layer, name) for name in layer.tensor_names}


@pytest.mark.parametrize(
    ("training", "case"),
    [
        pytest.param(training, case, id=f"{case.name}-{'train' if training else 'eval'}")
        for training, cases in ((True, CASES), (False, EACH_AND_DROPOUT))
        for case in cases
    ],
)
def test_one_graph_and_one_more_when_the_rows_change(training, case):
    layer = build(case, SMALL).train(training)
    with torch.set_grad_enabled(training):
        counts, graphs = compiled_like(layer, adapter(layer), BATCHES)
    assert counts == [1, 2, 2, 2]
    calls = 0 if case.method == "diff_pruning" else 2 if layer.method.residual else 1
    assert graphs.fused == [calls, calls]


@each(DROPOUT)
def test_gradients_in_eval(case):
    layer = build(case, SMALL).eval()
    assert compiled_like(layer, adapter(layer), (4,))[0] == [1]


@each(ONE_EACH)
def test_dynamic_from_the_start(case):
    layer = build(case, SMALL)
    assert compiled_like(layer, adapter(layer), (6, 40), dynamic=True)[0] == [1, 1]


@each(DISTINCT)
def test_under_activation_checkpointing(case):
    layer = build(case, SMALL)
    call = lambda x: checkpoint(layer, x, use_reentrant=False)  # noqa: E731
    assert compiled_like(call, adapter(layer), (4,), reference=layer)[0] == [1]


@each(DISTINCT)
def test_under_autocast(case):
    layer = build(case, SMALL, dtype=torch.float32)
    # a formed weight's backward is PyTorch's own, which, compiled, runs under the autocast around it
    limit = 1e-2 if case.method in SVD else 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert compiled_like(layer, adapter(layer), (4,), dtype=torch.float32, limit=limit)[0] == [1]


@each([case for case in ONE_EACH if case.method in ("lora", "dora", "liera", *SVD)])
def test_with_an_autocast_region_inside(case):
    layer = build(case, SMALL, dtype=torch.float32)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    assert compiled_like(call, adapter(layer), (4, 40), dtype=torch.float32, limit=1e-6)[0] == [1, 2]


@each(ONE_EACH)
def test_merged_disabled_and_back(case):
    """Changes of state after the call was compiled: a graph for each state, none for one that was there before."""
    layer, graphs = build(case, SMALL), Graphs()
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    x, dy = inputs(SMALL)

    def total():
        close(step(compiled, x, dy, {}), step(layer, x, dy, {}), 1e-10)
        return graphs.total

    assert total() == 1
    try:
        layer.merge()
    except fp.NotMergeableError:
        counted = 1
    else:
        assert total() == 2
        layer.enabled = False
        assert total() == 3
        layer.unmerge()
        counted = 3
    layer.enabled = False
    assert total() == counted + 1
    layer.enabled = True
    with torch.no_grad():
        for tensor in layer.adapter_tensors():  # an optimizer's step
            tensor.add_(0.1)
    assert total() == counted + 1


@pytest.mark.parametrize("name", ["lora+dropout", "dora", "vera", "svdiff"])
def test_equal_layers_share_a_graph(name):
    """Layers compiled one by one, as blocks of a model often are."""
    case, graphs = next(case for case in CASES if case.name == name), Graphs()
    layers = [build(case, Shape((), 8, 8, 3)) for _ in range(3)]
    model = nn.Sequential(*(torch.compile(layer, fullgraph=True, backend=graphs) for layer in layers))
    x, dy = inputs(Shape((4,), 8, 8, 3))
    close(step(model, x, dy, {}), step(nn.Sequential(*layers), x, dy, {}), 1e-10)
    assert graphs.total == 1


@pytest.mark.parametrize("name", SVD)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_form_of_a_graph(name, dtype):
    """A static graph has the cheaper form, one for any number of rows the factored; half precision is always formed."""
    layer = build(next(case for case in CASES if case.name == name), SMALL, dtype=dtype)
    limit = 1e-10 if dtype == torch.float64 else 1e-6
    for batches, fused in (((4,), [1]), ((40,), [0]), ((40, 4, 50), [0, 1])):
        torch._dynamo.reset()
        _, graphs = compiled_like(layer, adapter(layer), batches, dtype=dtype, limit=limit)
        assert graphs.fused == (fused if dtype == torch.float64 else [0] * len(fused))


@each(CASES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export(case, dynamic):
    layer = build(case, SMALL).eval()
    sizes = {"x": {0: torch.export.Dim("batch")}} if dynamic else None
    example, _ = inputs(Shape((4, 3), SMALL.K, SMALL.N, SMALL.r))
    program = torch.export.export(layer, (example,), dynamic_shapes=sizes)
    for batch in BATCHES if dynamic else (4,):
        x = torch.randn(batch, 3, SMALL.K, dtype=torch.float64)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-10, atol=1e-10)


def test_an_exported_program_survives_its_file():
    layer = build(next(case for case in CASES if case.name == "flora+dropout+n"), SMALL).eval()
    x, _ = inputs(SMALL)
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,)), file)
    file.seek(0)
    loaded = torch.export.load(file).run_decompositions()
    torch.testing.assert_close(loaded.module()(x), layer(x), rtol=1e-10, atol=1e-10)


class Net(nn.Module):
    def __init__(self, config, checkpointed=False):
        super().__init__()
        self.up, self.down, self.checkpointed = nn.Linear(7, 13), nn.Linear(13, 11), checkpointed
        fp.get_peft_model(self, config)
        with torch.no_grad():
            for p in self.trained().values():
                p.add_(torch.randn_like(p) * 0.3)

    def trained(self):
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def block(self, x):
        return self.down(torch.tanh(self.up(x)))

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)


LAYERS = ["up", "down"]
CONFIGS = {
    "lora+dropout": lambda: fp.LoraConfig(r=3, lora_dropout=0.4, target_modules=LAYERS),
    "dora+dropout": lambda: fp.DoraConfig(r=3, lora_dropout=0.4, target_modules=LAYERS),
    "ia3": lambda: fp.IA3Config(target_modules=LAYERS, feedforward_modules=["down"]),
    "svdiff": lambda: fp.SVDiffConfig(target_modules=LAYERS),
    "houlsby": lambda: fp.BottleneckConfig(r=3, target_modules=LAYERS),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_a_model(name, checkpointed):
    net = Net(CONFIGS[name](), checkpointed)
    counts, graphs = compiled_like(net, net.trained(), (4, 6, 9), dtype=torch.float32, limit=1e-5, reference=net.block)
    assert counts == [1, 2, 2]
    assert graphs.fused == [2, 2]


PEFT = {
    "train": ("lora", "lora-bias", "lora-dropout", "dora", "dora-dropout", "adalora", "adalora-dropout", "ia3"),
    "eval": ("lora-dropout", "dora", "adalora", "ia3"),
    "dynamic": ("lora-dropout", "ia3"),
    "checkpointed": ("lora-dropout", "dora-dropout", "adalora-dropout", "ia3"),  # and under autocast
    "merged": ("lora",),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("mode", "name"), [(mode, name) for mode, names in PEFT.items() for name in names])
def test_accelerated_peft_models(mode, name):
    from test_accelerate import build  # skips where PEFT is not installed

    net, checkpointed = fp.accelerate(build(name)).train(mode != "eval"), mode == "checkpointed"
    if mode == "merged":
        net.merge_adapter()
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad and mode != "merged"}
    call = (lambda x: checkpoint(net, x, use_reentrant=False)) if checkpointed else net
    batches = {"merged": (4,), "checkpointed": (4,), "dynamic": (4, 6)}.get(mode, (4, 6, 9))
    options = {"dynamic": True} if mode == "dynamic" else {}
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=checkpointed)
    with torch.set_grad_enabled(mode != "eval"), autocast:
        counts, graphs = compiled_like(
            call, trained, batches, Shape((), 8, 5, 3), torch.float32, 1e-5, reference=net, **options
        )
    assert counts == ([1, 1] if mode == "dynamic" else [1, 2, 2][: len(batches)])
    assert graphs.fused == [0 if mode == "merged" else 2] * graphs.total


def test_a_checkpointed_call_is_computed_again():
    calls = []

    class Spy(type(dispatch.backends()["eager"])):
        name = "spy"

        def forward(self, o, keep_z):
            calls.append(o.seed.tolist())
            return super().forward(o, keep_z)

        def backward(self, dy, o, *rest):
            calls.append(o.seed.tolist())
            return super().backward(dy, o, *rest)

    dispatch.register(Spy(), ("cpu",))
    net = Net(CONFIGS["lora+dropout"](), checkpointed=True)
    x, dy = inputs(Shape((4,), 7, 11, 3), torch.float32)
    step(torch.compile(net, fullgraph=True, backend="aot_eager"), x, dy, net.trained())
    up, down = calls[:2]
    assert up != down
    assert sorted(calls[2:]) == sorted([up, up, down, down])
    assert len(calls) == 6


BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")),
]


class Masks(nn.Module):
    """Two equal layers on one input, each of which returns its dropout mask over 1 - p where x is all ones."""

    def __init__(self, checkpointed):
        super().__init__()
        config, self.checkpointed = fp.LoraConfig(r=8, lora_alpha=8, lora_dropout=0.25), checkpointed
        self.layers = nn.ModuleList(fp.PeftLinear(8, 8, False, config) for _ in range(2))
        for layer in self.layers:
            layer.weight.data.zero_()
            nn.init.eye_(layer.lora_A), nn.init.eye_(layer.lora_B)

    def block(self, x):
        return torch.stack([layer(v) for layer, v in zip(self.layers, x, strict=True)])

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_each_call_draws_its_masks_and_backward_takes_the_same(backend, checkpointed):
    compiled, masks = torch.compile(Masks(checkpointed), fullgraph=True, backend=backend), []
    for seed in (1, 1, 2, None):
        if seed:
            torch.manual_seed(seed)
        x = torch.ones(2, 400, 8, requires_grad=True)
        y = compiled(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(dx, y)
        assert not torch.equal(y[0], y[1])
        torch.testing.assert_close(y.unique().detach(), torch.tensor([0, 4 / 3]))
        assert abs((y == 0).float().mean() - 0.25) < 0.03
        masks.append(y.detach())
    assert torch.equal(masks[0], masks[1])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(masks[1:], 2))


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
@pytest.mark.parametrize(("name", "batches"), [("dora+dropout", (4, 6)), ("svdiff", (4,))], ids=lambda v: str(v))
def test_inductor(name, batches):
    net = Net(CONFIGS[name](), checkpointed=True)
    with torch._inductor.config.patch(fallback_random=True):  # the masks of the uncompiled call
        counts, _ = compiled_like(
            net, net.trained(), batches, dtype=torch.float32, limit=1e-5, reference=net.block, graphs=Graphs("inductor")
        )
    assert counts == [1, 2][: len(batches)]
