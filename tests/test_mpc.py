"""The matrix-preserving constraint: its value and gradient written out in loops, its cost, and training with it."""

import statistics
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from cases import CASES, NONLINEAR
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fused_peft as fp
from fused_peft.methods import METHODS

both_kinds = pytest.mark.parametrize("kind", ["o", "d"])


class Net(nn.Module):
    """Layers of several shapes, some of them shared by two or more factors."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(7, 10), nn.Linear(10, 10), nn.Linear(10, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.fc3(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))))


def ada(**kwargs):
    return fp.AdaLoraConfig(init_r=3, target_r=2, total_step=40, tinit=5, tfinal=5, **kwargs)


CONFIGS = {
    "lora": fp.LoraConfig(r=3),
    "lora+ranks": fp.LoraConfig(r=3, rank_pattern={"fc2": 5, "fc3": 1}),
    "trilora": fp.TriLoraConfig(r=3),
    "trilora+ranks": fp.TriLoraConfig(r=2, rank_pattern={"fc1": 4}),
    "adalora": ada(),
    "flora": fp.FloraConfig(r=3),
    "dora": fp.DoraConfig(r=3),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def adapted(config, dtype=torch.float32):
    return fp.get_peft_model(Net().to(dtype), replace(config, target_modules=["fc1", "fc2", "fc3"]))


def randomised(config, dtype=torch.float64):
    model = adapted(config, dtype)
    for p in trainable(model):
        nn.init.normal_(p)
    return model


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def layers(model):
    return [m for m in model.modules() if isinstance(m, fp.PeftLinear)]


def factors_of(model):
    return [p for layer in layers(model) for p in (layer.lora_A, layer.lora_B)]


def residual(rows, own_diagonal=False):
    """‖P Pᵀ − target‖² entry by entry, P given by its rows."""
    total = 0.0
    for i, p in enumerate(rows):
        for j, q in enumerate(rows):
            if i != j:
                total = total + (p @ q) ** 2
            elif not own_diagonal:
                total = total + (p @ p - 1) ** 2
    return total


def written_out(model, kind):
    total = 0.0
    for layer in layers(model):
        A, B = (getattr(layer, name) for name in (layer.method.A, layer.method.B))
        total = total + residual(list(A)) + residual(list(B.t()), kind == "d")
    return total


def assert_close(got, want, tolerance=1e-12):
    """Relative to the largest entry."""
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert (g - w).abs().max() <= tolerance * w.abs().max()


# --- value and gradient ----------------------------------------------------------------------------------------------


@both_kinds
@every_config
def test_penalty_equals_the_formula_written_out(config, kind):
    model = randomised(config)
    got, want = fp.mpc_penalty(model, kind), written_out(model, kind)
    assert got.shape == ()
    assert_close([got], [want])
    factors = factors_of(model)
    grads = [torch.autograd.grad(penalty, factors, materialize_grads=True) for penalty in (got, want)]
    assert_close(*grads)  # B of rank 1 is orthogonal whatever it holds: MPC_d gives it none


@both_kinds
@every_config
def test_gradcheck(config, kind):
    model = randomised(config)  # gradcheck moves the factors in place
    assert torch.autograd.gradcheck(lambda *factors: fp.mpc_penalty(model, kind), factors_of(model))


@pytest.mark.parametrize("case", [next(c for c in CASES if c.method == m) for m in METHODS], ids=lambda c: c.name)
@both_kinds
def test_every_method_is_either_penalised_on_its_rank_or_refused(case, kind):
    """The Gram matrices are r × r: of A's rows, seen from the input, and of B's columns, seen from the output."""
    model = adapted(case.make(2), torch.float64)
    for p in trainable(model):
        nn.init.normal_(p)
    try:
        got = fp.mpc_penalty(model, kind)
    except ValueError as e:
        assert case.method in str(e)  # noqa: PT017
        return
    for layer in layers(model):
        A, B = (getattr(layer, name) for name in (layer.method.A, layer.method.B))
        assert (A.shape, B.shape) == ((2, layer.in_features), (layer.out_features, 2))
    assert_close([got], [written_out(model, kind)])


def test_the_default_kind_is_o():
    model = randomised(CONFIGS["lora"])
    assert torch.equal(fp.mpc_penalty(model), fp.mpc_penalty(model, "o"))


@both_kinds
def test_half_precision_models_are_penalised_in_fp32(kind):
    model = randomised(CONFIGS["lora"], torch.bfloat16)
    penalty = fp.mpc_penalty(model, kind)
    assert penalty.dtype == torch.float32
    wide = randomised(CONFIGS["lora"])
    for p, q in zip(factors_of(wide), factors_of(model), strict=True):
        p.data.copy_(q.data)
    assert_close([penalty.double()], [fp.mpc_penalty(wide, kind)], 1e-6)


@both_kinds
def test_penalty_is_zero_with_zero_gradient_at_orthonormal_factors(kind):
    model = adapted(CONFIGS["lora"])
    for layer in layers(model):
        nn.init.eye_(layer.lora_A)
        nn.init.eye_(layer.lora_B)
    penalty = fp.mpc_penalty(model, kind)
    penalty.backward()
    assert penalty == 0
    assert not any(p.grad.any() for p in factors_of(model))


# --- what it costs ---------------------------------------------------------------------------------------------------


class Launches(TorchDispatchMode):
    """Counts aten ops by name, less views and allocations, which launch nothing."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and "empty" not in name:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def launches(depth, kind, run):
    model = nn.Sequential(*(nn.Linear(8, 6) if i % 2 else nn.Linear(6, 8) for i in range(depth)))
    fp.get_peft_model(model, fp.LoraConfig(r=3, target_modules="all-linear"))
    with Launches() as seen:
        run(fp.mpc_penalty(model, kind), factors_of(model))
    return seen.count


@both_kinds
@pytest.mark.parametrize(
    "run",
    [lambda penalty, factors: None, torch.autograd.grad, lambda penalty, factors: penalty.backward()],
    ids=["forward", "autograd.grad", "backward into .grad"],
)
def test_launches_do_not_grow_with_the_number_of_layers(kind, run):
    few, many = launches(2, kind, run), launches(12, kind, run)
    assert few["bmm"] > 0
    assert many == few


def test_a_penalty_over_roberta_base_is_cheap():
    """72 adapted layers, in one thread so that other work on the machine matters less: 4 ms on an idle core."""
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    model = nn.ModuleList()
    for out_features, in_features in shapes * 12:
        linear = nn.Linear(in_features, out_features, device="meta")
        linear.weight = nn.Parameter(torch.zeros(1).expand(out_features, in_features))  # no memory
        linear.bias = None
        model.append(fp.PeftLinear.from_linear(linear, fp.LoraConfig(r=8, init_lora_weights=False)))
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(15):
            start = time.perf_counter()
            fp.mpc_penalty(model).backward()
            times.append(time.perf_counter() - start)
            model.zero_grad()
    finally:
        torch.set_num_threads(threads)
    median = statistics.median(times)
    print(f"\npenalty forward + backward, 72 layers of RoBERTa-base, r = 8: {1e3 * median:.2f} ms")
    assert median < 0.05


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["x", "O", "", None])
def test_unknown_kinds_are_refused(kind):
    with pytest.raises(ValueError, match=rf"kind={kind!r} must be 'o' or 'd'$"):
        fp.mpc_penalty(adapted(CONFIGS["lora"]), kind)


def test_kind_n_points_to_the_config():
    with pytest.raises(ValueError, match=r"kind='n' must be 'o' or 'd'; MPC_n is the config field nonlinearity"):
        fp.mpc_penalty(adapted(CONFIGS["lora"]), "n")


@both_kinds
@pytest.mark.parametrize(
    ("config", "method"),
    [
        (fp.SSBConfig(), "ssb"),
        (fp.IA3Config(feedforward_modules=[]), "ia3"),
        (fp.BitFitConfig(), "bitfit"),
        (fp.LoraXsConfig(r=2), "lora_xs"),
        (fp.LoraConfig(r=2, inference_mode=True), "lora"),
    ],
    ids=["ssb", "ia3", "bitfit", "lora_xs", "lora in inference mode"],
)
def test_methods_that_train_no_a_and_b_are_refused(config, method, kind):
    with pytest.raises(ValueError, match=rf"needs factors A and B, but {method} \(on fc1\) trains none"):
        fp.mpc_penalty(adapted(config), kind)


def test_one_layer_without_factors_is_named():
    model = nn.Sequential(
        fp.PeftLinear(4, 4, config=fp.LoraConfig(r=2)),
        fp.PeftLinear(4, 4, config=fp.SSBConfig()),
    )
    with pytest.raises(ValueError, match=r"ssb \(on 1\)"):
        fp.mpc_penalty(model)


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match=r"model=Net has no adapted layer; call get_peft_model first"):
        fp.mpc_penalty(Net())


# --- MPC_n -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("h", [h for h in NONLINEAR if h != "identity"])
@pytest.mark.parametrize(
    ("config", "scale"),
    [(fp.LoraConfig(r=3, lora_alpha=6), 2.0), (fp.TriLoraConfig(r=3), 1.0), (ada(lora_alpha=6), 6 / (3 + 1e-5))],
    ids=["lora", "trilora", "adalora"],
)
def test_mpc_n_lies_between_the_factors(config, scale, h):
    plain = randomised(config).fc1
    bent = randomised(replace(config, nonlinearity=h)).fc1
    bent.load_state_dict(plain.state_dict())
    x = torch.randn(5, 7, dtype=torch.float64)
    hidden = NONLINEAR[h](x @ bent.lora_A.T) * getattr(bent, "lora_E", 1.0)
    want = x @ bent.weight.T + bent.bias + scale * hidden @ bent.lora_B.T
    torch.testing.assert_close(bent(x), want, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(bent(x), plain(x), rtol=1e-2, atol=1e-2)


# --- training --------------------------------------------------------------------------------------------------------

TABLES = {
    "LoRA + o": (fp.LoraConfig(r=3), "o"),
    "LoRA + d": (fp.LoraConfig(r=3), "d"),
    "LoRA + n": (fp.LoraConfig(r=3, nonlinearity="relu"), None),
    "TriLoRA + o": (fp.TriLoraConfig(r=3), "o"),
    "AdaLoRA": (ada(), None),
    "AdaLoRA + o": (ada(), "o"),
}


@pytest.mark.parametrize(("config", "kind"), TABLES.values(), ids=TABLES)
def test_the_papers_combinations_train(config, kind):
    model = adapted(config)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    x = torch.randn(32, 7)
    y, objectives = 2 * torch.sin(x[:, :3]), []
    for step in range(21):
        objective = (model(x) - y).square().mean()
        if kind:
            objective = objective + 0.01 * fp.mpc_penalty(model, kind)
        objectives.append(objective.item())
        optimizer.zero_grad()
        objective.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trainable(model))
        optimizer.step()
        fp.on_step(model, step)
    assert objectives[20] < 0.95 * objectives[0]


@both_kinds
@pytest.mark.parametrize("name", ["lora", "trilora", "adalora"])
def test_minimising_the_penalty_alone_lowers_it_at_every_step(name, kind):
    model = adapted(CONFIGS[name])
    optimizer = torch.optim.SGD(factors_of(model), lr=0.02)
    values = []
    for _ in range(60):
        penalty = fp.mpc_penalty(model, kind)
        values.append(penalty.item())
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    assert all(b < a for a, b in pairwise(values[:21]))
    assert values[-1] < values[20]
    for layer in layers(model):  # A's rows come close to an orthonormal set
        torch.testing.assert_close(layer.lora_A @ layer.lora_A.T, torch.eye(3), rtol=0, atol=0.2)


# --- AdaLoRA's own penalty -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, 0.1, 0.0])
def test_orthogonality_penalty_is_the_weighted_mean_of_norms(weight):
    model = randomised(ada(orth_reg_weight=weight))
    got, norms = fp.orthogonality_penalty(model), []
    for layer in layers(model):
        norms += [torch.linalg.norm(P @ P.T - torch.eye(3, dtype=P.dtype)) for P in (layer.lora_A, layer.lora_B.T)]
    want = weight * sum(norms) / len(norms)
    assert got.shape == ()
    assert_close([got], [want])
    assert_close(torch.autograd.grad(got, factors_of(model)), torch.autograd.grad(want, factors_of(model)))


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "adalora"])
def test_orthogonality_penalty_belongs_to_adalora(name):
    with pytest.raises(ValueError, match=r"model=Net has no AdaLoRA layer.*AdaLoraConfig"):
        fp.orthogonality_penalty(adapted(CONFIGS[name]))


def test_orthogonality_penalty_needs_an_adapter():
    with pytest.raises(ValueError, match="no AdaLoRA layer"):
        fp.orthogonality_penalty(Net())


@pytest.mark.parametrize("exact", ["lora_A", "lora_B"])
def test_orthogonality_penalty_has_a_finite_gradient_at_an_exactly_orthonormal_factor(exact):
    """The norm's slope is infinite at 0; PyTorch's own norm, which PEFT takes, gives 0 there."""
    model = adapted(ada())
    nn.init.eye_(getattr(model.fc2, exact))
    fp.orthogonality_penalty(model).backward()
    assert not getattr(model.fc2, exact).grad.any()
    assert all(p.grad.isfinite().all() for p in factors_of(model))
