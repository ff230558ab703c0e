"""What happens between steps (AdaLoRA's budget, LoRA-Dash's directions), resuming a run, and what configs refuse."""

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import CASES, Case
from torch import nn

import fused_peft as fp
from fused_peft.methods import METHODS

TARGETS = ["fc1", "fc2"]
SCHEDULED = {name for name, method in METHODS.items() if method.on_step is not None}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(7, 10), nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


def adapted(config, dtype=torch.float32, **kwargs):
    return fp.get_peft_model(Net().to(dtype), replace(config, target_modules=TARGETS, **kwargs)).train()


def adamw(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model, optimizer, steps, after=lambda step: None):
    """The losses of these steps; the data, like the dropout, comes from torch's generator."""
    losses, dtype = [], model.head.weight.dtype
    for step in steps:
        x = torch.randn(16, 7, dtype=dtype)
        loss = (model(x) - 3 * torch.sin(x[:, :3])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        fp.on_step(model, step)
        losses.append(loss.item())
        after(step)
    return losses


def bits(tensors):
    """{name: bytes}, so that NaN equals NaN."""
    return {name: t.detach().contiguous().view(-1).view(torch.uint8).clone() for name, t in tensors.items()}


def differing(a, b):
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


# --- an interrupted run ----------------------------------------------------------------------------------------------

RESUMED = (
    *CASES,
    Case(  # allocates before and after the interruption
        "adalora+budget",
        "adalora",
        lambda r: fp.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=2, total_step=12),
    ),
    Case("lora_dash+late", "lora_dash", lambda r: fp.LoraDashConfig(r=r, directions=2, warmup=8)),
)


@pytest.mark.parametrize("case", RESUMED, ids=lambda c: c.name)
def test_an_interrupted_run_continues_bit_for_bit(case):
    config = case.make(3)
    model = adapted(config, modules_to_save=["head"])
    optimizer, checkpoint = adamw(model), io.BytesIO()
    train(model, optimizer, range(6))
    middle = bits(dict(model.named_parameters()))
    torch.save((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()), checkpoint)
    losses = train(model, optimizer, range(6, 12))
    moved = differing(middle, bits(dict(model.named_parameters())))
    assert set(moved) == {n for n, p in model.named_parameters() if p.requires_grad}

    torch.manual_seed(99)  # another base, another start: everything must come from the checkpoint
    fresh = adapted(config, modules_to_save=["head"])
    resumed = adamw(fresh)
    checkpoint.seek(0)
    model_state, optimizer_state, generator = torch.load(checkpoint)
    fresh.load_state_dict(model_state)
    resumed.load_state_dict(optimizer_state)
    torch.set_rng_state(generator)
    assert train(fresh, resumed, range(6, 12)) == losses
    assert not differing(bits(dict(fresh.named_parameters())), bits(dict(model.named_parameters())))
    assert not differing(bits(dict(fresh.named_buffers())), bits(dict(model.named_buffers())))


# --- on_step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.method not in SCHEDULED], ids=lambda c: c.name)
def test_on_step_leaves_methods_without_a_schedule_alone(case):
    model = adapted(case.make(3))
    before, generator = bits(model.state_dict()), torch.get_rng_state()
    for step in (0, 3, 100):
        fp.on_step(model, step)  # no gradients either
    assert not differing(before, bits(model.state_dict()))
    assert torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_on_step_without_any_adapter_does_nothing():
    fp.on_step(Net(), 0)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("lora", "adalora", "lora_dash")], ids=lambda c: c.name)
def test_negative_steps_are_refused(case):
    with pytest.raises(ValueError, match="step=-1 must not be negative"):
        fp.on_step(adapted(case.make(3)), -1)


# --- AdaLoRA ---------------------------------------------------------------------------------------------------------


SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 4, "deltaT": 2, "total_step": 16}


def ada(**kwargs):
    """For two layers the budget falls from 8 to 4 between steps 3 and 12 of 16."""
    return fp.AdaLoraConfig(**SCHEDULE | kwargs)


@pytest.mark.parametrize(
    ("step", "budget", "allocate"),
    [
        (0, 8, False),
        (2, 8, False),
        (3, 8, False),  # tinit itself
        (4, 6, True),  # int(4 (8/9)³ + 4), on a multiple of deltaT
        (5, 5, False),  # int(4 (7/9)³ + 4)
        (6, 5, True),
        (11, 4, False),
        (12, 4, True),  # total_step − tfinal
        (13, 4, True),
        (15, 4, True),
    ],
)
def test_the_budget_falls_along_a_cubic(step, budget, allocate):
    assert ada().budget(step, 8, 4) == (budget, allocate)


def test_delta_t_says_when_to_allocate():
    config = ada(deltaT=5)
    assert [step for step in range(13) if config.budget(step, 8, 4)[1]] == [5, 10]


def test_the_budget_never_rises():
    budgets = [ada().budget(step, 80, 40)[0] for step in range(16)]
    assert budgets == sorted(budgets, reverse=True)
    assert (budgets[0], budgets[-1]) == (80, 40)


@pytest.mark.parametrize("deltaT", [1, 2, 5])
def test_kept_ranks_are_the_budget_at_each_allocation(deltaT):
    config, last = ada(deltaT=deltaT), {}
    model, end, allocated = adapted(config), 12, []

    def check(step):
        kept = {n: m.kept.clone() for n, m in model.named_modules() if isinstance(m, fp.PeftLinear)}
        outside = torch.cat([model.get_submodule(n).lora_E[~k] for n, k in kept.items()])
        budget, allocate = config.budget(step, 8, 4)
        if step <= end and (allocate or step == end):
            allocated.append(step)
            assert sum(k.sum() for k in kept.values()) == budget
            assert len(outside) == 8 - budget
            assert not outside.any()
        elif last:
            assert not differing(last, kept)
        if step > end:
            assert len(outside) == 4
            assert not outside.any()
        last.update(kept)

    train(model, adamw(model), range(16), check)
    assert allocated == [s for s in range(4, 12) if s % deltaT == 0] + [12]
    assert all(m.lora_E.any() for m in model.modules() if isinstance(m, fp.PeftLinear) and m.kept.any())


def test_ranks_move_to_the_layer_whose_gradients_dominate():
    config = ada(tinit=0, tfinal=2, deltaT=1, total_step=60, beta1=0.5, beta2=0.5)
    model = adapted(config)
    for layer in (model.fc1, model.fc2):
        nn.init.normal_(layer.lora_E)

    def steps(which, size):
        for step in which:
            for name, layer in (("fc1", model.fc1), ("fc2", model.fc2)):
                for part in ("lora_A", "lora_E", "lora_B"):
                    p = getattr(layer, part)
                    p.grad = torch.randn_like(p) * size[name]
            fp.on_step(model, step)
            budget, allocate = config.budget(step, 8, 4)
            kept = [int(model.fc1.kept.sum()), int(model.fc2.kept.sum())]
            assert sum(kept) == (budget if allocate else 8)
        return kept

    assert steps(range(30), {"fc1": 1.0, "fc2": 1e-3}) == [4, 0]
    assert not model.fc2.lora_E.any()
    assert steps(range(30, 59), {"fc1": 1e-3, "fc2": 1.0}) == [0, 4]
    assert not model.fc1.lora_E.any()


def test_missing_gradients_are_an_error_that_says_when_to_call():
    model = adapted(ada())
    with pytest.raises(RuntimeError, match=r"on_step needs the gradients.*after backward and before zero_grad"):
        fp.on_step(model, 0)
    optimizer = adamw(model)
    train(model, optimizer, range(2))
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"after backward and before zero_grad"):
        fp.on_step(model, 2)
    fp.on_step(model, 13)  # once the budget has fallen, none are read


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["plain", "wrapped"])
def test_pefts_adalora_allocates_as_by_its_own_call(wrap):
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, tinit=1, tfinal=3, target_modules=TARGETS)
    torch.manual_seed(0)
    ours = peft.get_peft_model(Net(), config)
    theirs, x = copy.deepcopy(ours), torch.randn(16, 7)
    for model, act in ((ours, lambda i: fp.on_step(wrap(ours), i)), (theirs, theirs.base_model.update_and_allocate)):
        optimizer = adamw(model)
        for i in range(9):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            act(i)
    ranks = [int((p != 0).sum()) for name, p in ours.named_parameters() if "lora_E" in name]
    assert sum(ranks) == 2 * len(ranks)
    assert not differing(bits(ours.state_dict()), bits(theirs.state_dict()))


def test_pefts_adalora_without_gradients_is_told_when_to_call():
    peft = pytest.importorskip("peft")
    config = {"init_r": 4, "target_r": 2, "total_step": 9, "tinit": 1, "tfinal": 3, "target_modules": TARGETS}
    with pytest.raises(RuntimeError, match=r"on_step needs the gradients.*before zero_grad"):
        fp.on_step(peft.get_peft_model(Net(), peft.AdaLoraConfig(**config)), 0)
    frozen = peft.get_peft_model(Net(), peft.AdaLoraConfig(**config, inference_mode=True))
    fp.on_step(frozen, 0)  # which trains nothing


# --- LoRA-Dash -------------------------------------------------------------------------------------------------------

DASH = fp.LoraDashConfig(r=3, directions=4, warmup=5)


def test_dash_adds_nothing_before_the_warm_up():
    model = adapted(DASH)
    x, optimizer = torch.randn(5, 7), adamw(model)
    train(model, optimizer, range(5))
    assert not any(t.any() for layer in (model.fc1, model.fc2) for t in (layer.dash, layer.dash_U, layer.dash_Vh))
    before = model(x)
    twin = copy.deepcopy(model)
    nn.init.normal_(twin.fc1.dash)
    assert torch.equal(twin(x), before)
    train(twin, adamw(twin), [5])
    assert not torch.allclose(twin(x), before)


def test_dash_chooses_late_where_the_step_was_left_out_and_never_twice():
    model = adapted(DASH)
    train(model, adamw(model), range(5))
    fp.on_step(model, 7)  # loss scaling skipped 5 and 6
    chosen = model.fc1.dash_U.clone()
    assert chosen.any()
    resumed = copy.deepcopy(model)  # as from a checkpoint: no memory but the buffers
    for again in (model, resumed):
        nn.init.normal_(again.fc1.lora_B)
        fp.on_step(again, 8)
        fp.on_step(again, 9)
        assert torch.equal(again.fc1.dash_U, chosen)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_dash_takes_the_directions_that_the_update_uses_most(dtype, tolerance):
    model = adapted(DASH, dtype)
    train(model, adamw(model), range(5))
    wanted = {}
    for layer in (model.fc1, model.fc2):  # chosen from the factors as they stand at the call
        W, A, B = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B))
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        dW = DASH.lora_alpha / DASH.r * (B @ A)
        used = [abs(float(U[:, i] @ dW @ Vh[i]) / float(S[i])) for i in range(len(S))]
        best = sorted(range(len(S)), key=lambda i: -used[i])[:4]
        wanted[layer] = torch.stack([torch.outer(U[:, i], Vh[i]) for i in best])  # free of the SVD's sign
    fp.on_step(model, 5)
    for layer, want in wanted.items():
        got = torch.einsum("nt,tk->tnk", layer.dash_U.double(), layer.dash_Vh.double())
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def test_dash_directions_are_written_in_place_and_the_first_optimizer_trains_them():
    model = adapted(DASH)
    optimizer = adamw(model)
    parameters = dict(model.named_parameters())
    buffers = {n: (b, b.data_ptr(), b.stride()) for n, b in model.named_buffers() if "dash" in n}
    assert len(buffers) == 4
    train(model, optimizer, range(6))  # the directions are chosen at the end of step 5
    assert not model.fc1.dash.any()
    chosen = bits({n: b for n, (b, *_) in buffers.items()})
    assert all(b.any() for b, *_ in buffers.values())
    train(model, optimizer, range(6, 9))
    assert model.fc1.dash.all()
    assert model.fc2.dash.all()
    assert not differing(chosen, bits({n: b for n, (b, *_) in buffers.items()}))
    for name, (b, pointer, stride) in buffers.items():
        now = model.get_buffer(name)
        assert now is b
        assert (now.data_ptr(), now.stride()) == (pointer, stride)
    assert all(p is parameters[n] for n, p in model.named_parameters())


# --- LoRA+ -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [fp.LoraConfig(r=2, lora_bias=True), *(m.example(2) for m in METHODS.values() if m.B)],
    ids=lambda c: c.method_name,
)
def test_lora_plus_trains_the_b_factors_faster(config):
    model = adapted(config, modules_to_save=["head"])
    groups = fp.lora_plus_groups(model, 1e-3, ratio=8.0, weight_decay=0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    rates = [(names[id(p)], group["lr"]) for group in groups for p in group["params"]]
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(trainable)  # none twice
    # by shape: fc1 is 7 -> 10 and fc2 10 -> 8, so that the factor on the output's side is the one of so many rows
    sides = {"fc1": (7, 10), "fc2": (10, 8)}
    assert {n for n, lr in rates if lr == 8e-3} == {
        n for n in trainable for layer, (_, out) in sides.items()
        if n.startswith(layer) and model.get_parameter(n).shape == (out, 2)
    }  # fmt: skip
    assert {lr for _, lr in rates} == {1e-3, 8e-3}
    assert {"head.weight", "head.bias"} <= trainable
    assert all(group["weight_decay"] == 0.1 for group in groups)
    optimizer = torch.optim.AdamW(groups)
    train(model, optimizer, range(2))


def test_lora_plus_takes_its_ratio_from_the_paper():
    groups = fp.lora_plus_groups(adapted(fp.LoraConfig(r=2)), 1e-3)
    assert [group["lr"] for group in groups] == [1e-3, 16e-3]


@pytest.mark.parametrize("config", [fp.SSBConfig(), fp.LoraXsConfig(r=2), fp.LoraConfig(r=2, inference_mode=True)])
def test_lora_plus_needs_a_trainable_b(config):
    with pytest.raises(ValueError, match="no trainable factor B"):
        fp.lora_plus_groups(adapted(config), 1e-3)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fp.AdaLoraConfig(), "total_step=None must be the positive number of training steps"),
        (lambda: ada(total_step=0), "total_step=0"),
        (lambda: ada(tinit=12), r"tinit=12 must lie below total_step - tfinal = 12"),
        (lambda: ada(tinit=13), "tinit=13"),
        (lambda: ada(target_r=5), "target_r=5 must not exceed init_r=4"),
        (lambda: ada(target_r=0), "target_r=0 must be a positive integer"),
        (lambda: ada(deltaT=0), "deltaT=0"),
        *((lambda b=b: ada(beta1=b), f"beta1={b} must lie in") for b in (0, 1, -0.1, 1.5, math.nan)),
        *((lambda b=b: ada(beta2=b), f"beta2={b} must lie in") for b in (0, 1, -0.1, 1.5)),
        (lambda: ada(orth_reg_weight=-1), "orth_reg_weight=-1"),
        (lambda: fp.LoraDashConfig(directions=0), "directions=0"),
        (lambda: fp.LoraDashConfig(warmup=0), "warmup=0"),
        (lambda: fp.LoraDashConfig(nonlinearity="relu"), "nonlinearity='relu'"),
        (lambda: fp.LieraConfig(lora_dropout=0.1), "lora_dropout=0.1 has no meaning for LieRA"),
        (lambda: fp.LieraConfig(nonlinearity="relu"), "nonlinearity='relu' has no meaning for LieRA"),
        (lambda: fp.LoraConfig(use_dora=True, lora_bias=True), "use_dora=True excludes lora_bias"),
        (lambda: fp.DoraConfig(lora_bias=True), "use_dora=True excludes lora_bias"),
        *((lambda d=d: fp.DiffPruningConfig(density=d), "density=") for d in (0, -0.1, 1.5, math.nan, "0.1", None)),
        (lambda: fp.BottleneckConfig(kind="par"), r"kind='par' must be houlsby \(double_seq_bn\) or pfeiffer"),
        (lambda: fp.BottleneckConfig(kind="par_bn"), "kind='par_bn'"),
        (lambda: fp.bottleneck("sequential"), "kind='sequential'"),
        (lambda: fp.BottleneckConfig(r=0), "r=0"),
        (lambda: fp.BottleneckConfig(scaling=0), "scaling=0"),
    ],
)
def test_configs_refuse_what_cannot_work(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "make",
    [
        fp.LoraConfig,
        fp.TriLoraConfig,
        fp.FloraConfig,
        fp.ParallelAdapterConfig,
        fp.BottleneckConfig,
        lambda **kwargs: ada(**kwargs),
    ],
    ids=["lora", "trilora", "flora", "parallel_adapter", "bottleneck", "adalora"],
)
def test_unknown_nonlinearities_are_refused_with_the_known_ones(make):
    with pytest.raises(ValueError, match=r"nonlinearity='sigmoid' must be one of .*relu"):
        make(nonlinearity="sigmoid")


def masks(**kwargs):
    return {"fc1": torch.ones(10, 7, dtype=torch.bool), "fc2": torch.ones(8, 10, dtype=torch.bool), **kwargs}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (fp.LoraDashConfig(r=2, directions=8), r"fc1: directions=8 must not exceed min\(in_features, out_features\)=7"),
        (fp.DiffPruningConfig(mask=masks(fc2=torch.ones(10, 8).bool())), r"fc2: mask has shape \(10, 8\).*\(8, 10\)"),
        (fp.DiffPruningConfig(mask=masks(fc2=torch.ones(8, 10))), r"fc2: mask has .*dtype torch.float32.*boolean"),
        (fp.DiffPruningConfig(mask={"fc1": masks()["fc1"]}), r"fc2: mask has no entry for 'fc2', only for fc1"),
        (fp.PissaConfig(r=9), r"fc1: r=9 must not exceed"),
    ],
    ids=["directions", "mask shape", "mask dtype", "mask name", "rank"],
)
def test_what_a_layer_cannot_carry_is_refused_by_name(config, message):
    net = Net()
    before, types = bits(net.state_dict()), [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=message):
        fp.get_peft_model(net, replace(config, target_modules=TARGETS))
    assert not differing(before, bits(net.state_dict()))
    assert [type(m) for m in net.modules()] == types
    assert all(p.requires_grad for p in net.parameters())


def test_a_given_mask_is_the_one_that_trains():
    chosen = torch.rand(8, 10) < 0.2
    model = adapted(fp.DiffPruningConfig(mask=masks(fc2=chosen)))
    before = model.fc2.weight.clone()
    nn.init.ones_(model.fc2.values)
    model.fc2.merge()
    torch.testing.assert_close(model.fc2.weight - before, chosen.float())


@pytest.mark.parametrize(
    "config",
    [
        fp.SamParserConfig(),
        fp.SVDiffConfig(),
        fp.PissaConfig(r=2),
        fp.LoraConfig(r=2, init_lora_weights="pissa_niter_4"),
        fp.MiloraConfig(r=2),
        fp.LoraXsConfig(r=2),
        fp.SpectralAdapterConfig(r=2),
    ],
    ids=lambda c: f"{c.method_name}-{getattr(c, 'init_lora_weights', '')}",
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_weight_has_no_decomposition(config, bad):
    net = Net()
    net.fc2.weight.data[3, 4] = bad  # the second layer: the first has its adapter by then
    before, types = bits(net.state_dict()), [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=r"fc2: the weight has NaN or infinite entries"):
        fp.get_peft_model(net, replace(config, target_modules=TARGETS))
    assert not differing(before, bits(net.state_dict()))
    assert [type(m) for m in net.modules()] == types
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("case", [c for c in CASES if METHODS[c.method].from_weight], ids=lambda c: c.name)
def test_a_method_that_starts_from_the_weight_waits_for_it(case):
    layer = fp.PeftLinear(7, 10, config=case.make(3), device="meta")
    assert layer(torch.empty(5, 7, device="meta")).shape == (5, 10)
    layer = layer.to_empty(device="cpu").eval()
    with torch.no_grad():  # the base weight arrives, as from a checkpoint
        for p in (layer.weight, layer.bias):
            p.normal_()
    x, weight = torch.randn(5, 7), layer.weight.clone()
    with pytest.raises(RuntimeError, match=r"starts from the weight.*call reset_adapter_parameters\(\)"):
        layer(x)
    parameters = dict(layer.named_parameters())
    layer.reset_adapter_parameters()
    torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias), rtol=1e-4, atol=1e-4)
    assert all(p is parameters[n] for n, p in layer.named_parameters())
    layer.train()(x).sum().backward()
    assert all(getattr(layer, n).grad is not None for n in layer.tensor_names)


# --- bottlenecks by AdapterHub's names -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [("double_seq_bn", "houlsby"), ("houlsby", "houlsby"), ("seq_bn", "pfeiffer"), ("pfeiffer", "pfeiffer")],
)
def test_sequential_bottlenecks_have_two_names(name, kind):
    for config in (fp.BottleneckConfig(kind=name, r=4), fp.bottleneck(name, r=4)):
        assert config == fp.BottleneckConfig(kind=kind, r=4)
        assert adapted(config).fc1.method.name == kind


@pytest.mark.parametrize(("name", "learned"), [("par_bn", False), ("scaled_par_bn", True)])
def test_parallel_bottlenecks_are_parallel_adapters(name, learned):
    config = fp.bottleneck(name, r=4, nonlinearity="gelu")
    assert config == fp.ParallelAdapterConfig(r=4, use_bias=True, learn_scale=learned, nonlinearity="gelu")
    layer = adapted(config).fc1
    assert layer.method.name == "parallel_adapter"
    assert set(layer.tensor_names) == {"lora_A", "lora_B", "down_bias", "up_bias"} | ({"scale"} if learned else set())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (fp.ParallelAdapterConfig(r=3), r"fc1: h='relu' lies between A and B"),
        (
            fp.bottleneck("par_bn", r=3, nonlinearity="identity"),
            r"fc1: h='identity' with a bias a lies between A and B",
        ),
        (fp.bottleneck("double_seq_bn", r=3), r"fc1: houlsby has a non-linearity behind the layer"),
        (fp.LoraConfig(r=3, nonlinearity="tanh"), r"fc1: h='tanh' lies between A and B"),
    ],
    ids=["parallel", "parallel with bias", "sequential", "lora with MPC_n"],
)
def test_merging_a_nonlinear_adapter_is_refused_with_the_reason(config, reason):
    model = adapted(config)
    before = bits(model.state_dict())
    for merge in (fp.merge, fp.merge_and_unload):
        with pytest.raises(fp.NotMergeableError, match=f"{reason}.*keep the layer unmerged"):
            merge(model)
    assert not model.fc1.merged
    assert not differing(before, bits(model.state_dict()))
