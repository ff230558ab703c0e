"""Calls replayed by csrc/replay.cpp are, bit for bit, the calls that Python makes, and reach a GPU's driver as Triton's
own launcher would bring them there."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, Shape
from oracle import build, distinct
from test_selftest import KINDS
from torch.utils import cpp_extension
from torch.utils.checkpoint import checkpoint

import fused_peft as fp
from fused_peft.backends import rates, replay
from fused_peft.backends.triton import Triton
from fused_peft.core import dispatch, ops, records
from fused_peft.core.factors import Factors
from fused_peft.core.torch_internals import TorchDispatchMode
from fused_peft.tools import selftest

pytest.importorskip("triton", reason="Triton runs on Linux")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
HERE = Path(__file__).parent
SHAPE = Shape((3, 11), 24, 40, 4)


@pytest.fixture(scope="module")
def built():
    replay.load(None)
    module, ops.host = ops.host, None
    yield module
    ops.host = None


@pytest.fixture
def host(built):
    """The library, with calls on the CPU replayed as a GPU's are."""
    built.forget()
    replay.without_plan.clear()
    ops.host = built
    yield built
    ops.host = None


def step(layer, x, dy, seed=0):
    """y and every gradient."""
    torch.manual_seed(seed)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, wanted, dy, allow_unused=True)]


def through_python(*args):
    module, ops.host = ops.host, None
    try:
        return step(*args)
    finally:
        ops.host = module


def same(got, right):
    for a, b in zip(got, right, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def drawn(shape=SHAPE, dtype=torch.float32):
    x = torch.randn(*shape.lead, shape.K, dtype=dtype, requires_grad=True)
    return x, torch.randn(*shape.lead, shape.N, dtype=dtype)


def adapted(config, shape=SHAPE, **options):
    layer = fp.PeftLinear(shape.K, shape.N, config=config, **options)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    return layer


def counted(monkeypatch):
    """The calls that go to Python, from now on."""
    found, answer = [], replay._answer
    monkeypatch.setattr(replay, "_answer", answer)

    def spy(kind, *args):
        found.append(kind)
        return answer(kind, *args)

    ops.host.start(spy)
    return found


@pytest.mark.parametrize("case", distinct(CASES), ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["triton", "cublas", "eager"])
def test_every_call_is_what_python_computes(case, name, host, monkeypatch):
    layer = build(case, SHAPE, dtype=torch.float32)
    fp.set_backend(name)
    x, dy = drawn()
    for seed in range(2):
        step(layer, x, dy, seed)  # seen, and made a plan of
    asked = counted(monkeypatch)
    x, dy = drawn()  # elsewhere in memory
    same(step(layer, x, dy, 2), through_python(layer, x, dy, 2))
    host.start(replay._answer)
    assert not asked
    assert not replay.without_plan


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "triton"), (torch.bfloat16, "eager")])
def test_narrow_inputs_with_wide_adapters(dtype, name, host):
    layer = adapted(fp.DoraConfig(r=4, lora_dropout=0.2), dtype=dtype)
    fp.set_backend(name)
    for seed in range(4):
        x, dy = drawn(dtype=dtype)
        same(step(layer, x, dy, seed), through_python(layer, x, dy, seed))
    assert host.known()[1] == 3  # a norm, a forward, a backward


def test_what_changes_makes_a_class_of_its_own(host):
    """Sizes, strides, alignment, numbers, wanted gradients, the mode: none is taken for another."""
    fp.set_backend("triton")
    layer = adapted(fp.LoraConfig(r=4, lora_dropout=0.5))
    x, dy = drawn()
    wide = torch.randn(3, 11, 48)
    variants = {
        "as it is": x,
        "fewer rows": x[:2],
        "two dimensions": x.flatten(0, 1),
        "strided": torch.randn(3, 24, 11).transpose(1, 2),
        "columns of a wider one": wide[..., :24],
        "off by an element": wide.flatten()[1 : 1 + x.numel()].view_as(x),
        "rows repeated": torch.randn(1, 1, 24).expand(3, 11, 24),
    }
    for _ in range(3):
        for x in variants.values():
            x = x.detach().requires_grad_()
            y = dy[: len(x)] if x.dim() == 3 else dy.flatten(0, 1)
            same(step(layer, x, y), through_python(layer, x, y))
            with torch.no_grad():
                torch.manual_seed(0)
                replayed = layer(x)
                ops.host = None
                torch.manual_seed(0)
                assert torch.equal(replayed, layer(x))
                ops.host = host
    seen = host.known()[0]
    for change in ("eval", "frozen A", "scaling"):
        if change == "eval":
            layer.eval()
        elif change == "frozen A":
            layer.lora_A.requires_grad_(False)
        else:
            object.__setattr__(layer.config, "lora_alpha", 3)
        for _ in range(3):
            same(step(layer, x, dy if x.dim() == 3 else dy.flatten(0, 1)),
                 through_python(layer, x, dy if x.dim() == 3 else dy.flatten(0, 1)))  # fmt: skip
        before, seen = seen, host.known()[0]
        assert seen > before, change


def test_operands_that_are_one_tensor_need_not_stay_one(host):
    """The plan of a call whose x is its c serves one whose x and c differ."""
    fp.set_backend("triton")
    f = Factors(A=torch.randn(4, 24), B=torch.randn(24, 4), h="relu")
    x, c = torch.randn(9, 24), torch.randn(9, 24)
    for _ in range(3):
        ops.linear(x, None, f, None, x)
    replayed = ops.linear(x, None, f, None, c)
    ops.host = None
    assert torch.equal(replayed, ops.linear(x, None, f, None, c))


def test_saved_tensors_may_come_back_elsewhere_and_otherwise(host):
    """Hooks that keep x on disk or contiguous, and checkpointing."""
    fp.set_backend("triton")
    layer = adapted(fp.LoraConfig(r=4))
    x, dy = torch.randn(24, 33).t().requires_grad_(), torch.randn(33, 40)
    right = through_python(layer, x, dy)
    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.contiguous().clone(), lambda t: t):
            same(step(layer, x, dy), right)
        for reentrant in (False, True):
            y = checkpoint(layer, x, use_reentrant=reentrant)
            assert torch.equal(torch.autograd.grad(y, x, dy)[0] if not reentrant else right[1], right[1])


def test_autocast(host):
    fp.set_backend("triton")
    layer = adapted(fp.LoraConfig(r=4))
    x, dy = drawn()
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            got = torch.autograd.grad(y, [x, layer.lora_A], dy.bfloat16())
            ops.host, y0 = None, None
            y0 = layer(x)
            right = torch.autograd.grad(y0, [x, layer.lora_A], dy.bfloat16())
            ops.host = host
        assert y.dtype == torch.bfloat16
        same([y.detach(), *got], [y0.detach(), *right])


@pytest.mark.parametrize("name", ["lora+dropout", "dora", "ssb", "houlsby"])
def test_compiled_calls_are_replayed_too(name, host):
    torch._dynamo.reset()
    layer = build(next(case for case in CASES if case.name == name), SHAPE, dtype=torch.float32)
    fp.set_backend("triton")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, dy = drawn()
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def both(run):
        torch.manual_seed(0)
        y = run(x)
        return [y.detach(), *torch.autograd.grad(y, wanted, dy)]

    for _ in range(3):
        same(both(compiled), through_python(layer, x, dy))
    classes, plans = host.known()
    assert classes == plans >= 2
    assert not replay.without_plan


@pytest.mark.parametrize("name", ["lora+dropout", "dora", "ssb"])
def test_a_training_step_can_be_captured(name, host):
    """It waits for no value of the GPU's, as a CUDA graph demands, and draws each dropout seed anew on the device."""
    layer = build(next(case for case in CASES if case.name == name), SHAPE, dtype=torch.float32)
    fp.set_backend("triton")
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    x, dy = drawn()
    operations, ys = [], []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for _ in range(4):
        operations.clear()
        with Seen():
            ys.append(layer(x))
            ys[-1].backward(dy)
            optimizer.step()
            optimizer.zero_grad()
    assert not {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select"} & {*operations}
    assert operations.count("randint") == ("dropout" in name)
    assert not torch.equal(ys[-1], ys[-2])
    assert host.known()[0] == host.known()[1]


def test_gradients_of_gradients_are_refused(host):
    fp.set_backend("triton")
    layer = adapted(fp.LoraConfig(r=4))
    for _ in range(3):
        x, dy = drawn()
        (dx,) = torch.autograd.grad(layer(x), x, dy.requires_grad_(), create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()


def test_a_tensor_that_was_written_to_is_noticed(host):
    fp.set_backend("triton")
    layer = adapted(fp.LoraConfig(r=4))
    for _ in range(3):
        x, dy = drawn()
        y = layer(x)
        with torch.no_grad():
            layer.lora_A.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(dy)


def test_inference_mode_and_no_gradient_at_all(host):
    fp.set_backend("triton")
    layer = adapted(fp.LoraConfig(r=4)).requires_grad_(False)
    x = torch.randn(3, 24)
    right = None
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        for _ in range(3):
            with mode():
                y = layer(x)
            assert not y.requires_grad
            right = y if right is None else right
            assert torch.equal(y, right)


def test_errors_are_those_of_python(host):
    fp.set_backend("triton")
    layer = adapted(fp.LoraConfig(r=4))
    for _ in range(3):
        layer(torch.randn(3, 24))
        with pytest.raises(ValueError, match="last dimension must be in_features=24"):
            layer(torch.randn(3, 25))
        with pytest.raises(TypeError, match=r"x has dtype torch.float64"):
            layer(torch.randn(3, 24).double())


def test_what_backward_raises_is_raised(host, monkeypatch):
    class Broken(Triton):
        name = "broken"

        def backward(self, *args):
            raise torch.OutOfMemoryError("none left")

    dispatch.register(Broken())
    fp.set_backend("broken")
    layer = adapted(fp.LoraConfig(r=4))
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError, match="none left"):
            layer(torch.randn(3, 24)).sum().backward()


def test_what_failed_while_it_was_watched_is_watched_again(host):
    class Once(Triton):
        name, calls = "once", 0

        def forward(self, *args):
            self.calls += 1
            if self.calls == 2:
                raise torch.OutOfMemoryError("none left")
            return super().forward(*args)

    dispatch.register(Once())
    fp.set_backend("once")
    layer, x = adapted(fp.LoraConfig(r=4)), torch.randn(3, 24)
    layer(x)
    with pytest.raises(torch.OutOfMemoryError):
        layer(x)
    layer(x)
    assert host.known() == (1, 1)


def test_another_backend_means_other_plans(host):
    layer = adapted(fp.LoraConfig(r=4))
    x, dy = drawn()
    for name in ("triton", "cublas", "triton"):
        fp.set_backend(name)
        assert host.known() == (0, 0)
        for _ in range(3):
            same(step(layer, x, dy), through_python(layer, x, dy))
        assert host.known() == (2, 2)


def test_subclasses_and_transforms_go_to_python(host):
    layer = adapted(fp.LoraConfig(r=4))
    fp.set_backend("eager")
    torch.func.vmap(layer)(torch.randn(2, 3, 24))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        layer(torch.randn(3, 24))
    assert host.known() == (0, 0)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (lambda x, c: [torch.cat([x, c])], "takes a list of tensors"),
        (lambda x, c: [x * x.sum().item()], "a result that is no tensor"),
        (lambda x, c: [torch.from_numpy(x.numpy().copy())], "unknown origin"),
    ],
)
def test_what_cannot_be_followed_has_no_plan(body, why, host):
    x, c = torch.randn(3, 4), torch.randn(3, 4)
    recorder = replay.Recorder(host, [x, c])
    with recorder:
        outputs = body(x, c)
    with pytest.raises(replay.NoPlan, match=why):
        recorder.finished(outputs)


def test_a_backend_that_cannot_be_watched_keeps_to_python(host):
    class Apart(Triton):
        name, replays = "apart", False

    dispatch.register(Apart())
    fp.set_backend("apart")
    layer = adapted(fp.LoraConfig(r=4))
    x, dy = drawn()
    for _ in range(6):
        same(step(layer, x, dy), through_python(layer, x, dy))
    assert host.known() == (2, 0)
    assert replay.without_plan.total() == 2  # a forward and a backward are watched once, not again and again
    assert "apart backend" in next(iter(replay.without_plan))


def test_the_self_test_finds_a_replay_that_differs(host, monkeypatch, record):
    """And such calls go through Python from then on."""
    problem, cpu = KINDS["low"], torch.device("cpu")
    assert selftest.failure("replay", problem, cpu) is None
    watched = replay.Recorder._interpreted
    doubled = lambda self, kernel, grid, args, config: watched(  # noqa: E731
        self, kernel, grid, {**args, **{n: 2 * v for n, v in args.items() if n == "scale"}}, config
    )
    monkeypatch.setattr(replay.Recorder, "_interpreted", doubled)
    assert selftest.failure("replay", problem, cpu).startswith("y replayed is not y through Python")
    monkeypatch.undo()
    record(failed={records.variant("replay", problem): "y is off"})
    layer = adapted(fp.LoraConfig(r=4), bias=False)
    fp.set_backend("triton")
    for _ in range(3):
        step(layer, *drawn())
    assert host.known() == (2, 0)
    assert all("its self-test failed" in why for why in replay.without_plan)


def test_state_and_switch(monkeypatch):
    monkeypatch.setenv("FUSED_PEFT_REPLAY", "0")
    assert replay.state() == "off: FUSED_PEFT_REPLAY=0"
    assert not replay.expected()
    monkeypatch.delenv("FUSED_PEFT_REPLAY")
    monkeypatch.setattr(replay, "_failure", None)
    monkeypatch.setattr(replay, "_build", lambda: (_ for _ in ()).throw(RuntimeError("no compiler")))
    replay._load()
    assert replay.state() == "off: no compiler"
    assert rates.host() == rates.IN_PYTHON


def test_a_lock_of_a_killed_build_is_no_obstacle(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    made = []

    def load(name, sources, build_directory, **options):  # as PyTorch's, which waits for a lock for ever
        made.append(Path(build_directory))
        assert not (made[-1] / "lock").exists()
        (made[-1] / "lock").touch()
        return "library"

    monkeypatch.setattr(cpp_extension, "load", load)
    assert {replay._build.__wrapped__(), replay._build.__wrapped__()} == {"library"}
    assert len({*made}) == 1
    assert made[0].parent == tmp_path


PTX = """
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .align 64 .b8 k_param_1[128],
	.param .u32 k_param_2,
	.param .f32 k_param_3,
	.param .u64 k_param_4
)
"""


def test_parameters_are_read_from_the_machine_code():
    assert replay.parameter_sizes(PTX) == [8, 128, 4, 4, 8]


BUDGETS = {  # µs of the host
    ("lora", "forward"): 25, ("lora", "backward"): 45, ("dora", "forward"): 40, ("dora", "backward"): 70,
}  # fmt: skip
LAUNCHED = ("lora", "lora+dropout", "dora", "dora+dropout", "ssb", "parallel_adapter+gelu", "flora+dropout+n")
LAUNCHED += ("lora+dropout@gluon", "dora@cublas")
NVRTC = HERE.parent / ".venv/nvrtc"  # csrc/'s calls are compared where `make test` has installed its compiler
LAUNCHED += ("lora@cuda", "lora+dropout@cuda", "dora@cuda") if NVRTC.is_dir() else ()


@pytest.fixture(scope="module")
def on_stand_in():
    """Lines of ``replay_run``, which runs on a stand-in for the driver."""
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent / "bench"), str(HERE.parent), str(NVRTC)])
    command = [sys.executable, str(HERE / "replay_run.py"), *LAUNCHED]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def test_the_driver_gets_what_triton_would_give_it(on_stand_in):
    *cases, last = on_stand_in
    assert len(cases) == 2 * len(LAUNCHED)
    assert last == {"without plan": {}}
    for case in cases:
        assert case["equal"], case
        few = "@gluon 24-" in case["case"] or "@cuda 24-" in case["case"]  # which they leave to PyTorch
        assert case["launches"] >= (0 if few else 3), case
        assert case["from Python"] == 0, case


def test_host_time_stays_within_its_budget(tmp_path):
    """The committed figures; and here, where other tests run beside, as parts of what Python takes for the same."""
    env = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent / "bench"), str(HERE.parent)])
    command = [sys.executable, str(HERE.parent / "bench/host.py"), "--out", str(tmp_path)]
    command += ["--rounds", "15", "--methods", "lora", "dora"]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]

    def table(file):
        with file.open(newline="") as f:
            return {(r["method"], r["contender"], r["step"]): float(r["us_p20"]) for r in csv.DictReader(f)}

    here, committed = table(tmp_path / "host.csv"), table(HERE.parent / "bench/results/cpu/host.csv")
    for (method, step), budget in BUDGETS.items():
        assert committed[method, "ours", step] <= budget
        part = here[method, "ours", step] / here[method, "python", step]
        assert part <= {"lora": 0.15, "dora": 0.2}[method], here  # 0.08 to 0.11, 0.11 to 0.13
    for method in ("lora", "dora"):
        for step in ("forward", "backward"):
            assert here[method, "ours", step] < 0.75 * here[method, "peft", step]
            assert here[method, "accelerated", step] < here[method, "peft", step]
