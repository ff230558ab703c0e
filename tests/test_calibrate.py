"""Calibration end to end on a CPU: Triton's interpreter in the GPU's place, and clocks that say what a test wants."""

import json
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import pytest
import torch

import fused_peft as fp
from fused_peft.__main__ import _counted, main
from fused_peft.core import dispatch, records
from fused_peft.core.operands import Problem
from fused_peft.tools import calibrate
from fused_peft.tools.isolated import Failure

pytest.importorskip("triton", reason="Triton runs on Linux")
from test_kernel_mutations import MUTANTS, k, mutated

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
ROWS = (33,)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_PEFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(records, "_held", {})
    records.forget()
    yield tmp_path / "cache"
    records.forget()


@pytest.fixture
def gpu(monkeypatch):
    """The CPU's calls go to the GPU's backends, as Triton interprets them."""
    monkeypatch.setitem(dispatch._priority, "cpu", ["triton", "cublas"])
    dispatch.choose.cache_clear()
    yield
    monkeypatch.undo()
    dispatch.choose.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """A function that sets the milliseconds that each backend takes."""

    def says(**ms):
        monkeypatch.setattr(
            calibrate, "timed", lambda p, names, device: {n: ms.get(n, 9.0) / 1e3 for n in names}
        )  # fmt: skip

    says(triton=1.0, cublas=2.0, eager=3.0)
    return says


def model(config=None, features=(24, 40), dtype=torch.float32):
    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(*features, dtype=dtype))
    return fp.get_peft_model(plain, config or fp.LoraConfig(r=4, lora_dropout=0.1, target_modules=["0"]))


def here(m, **options):
    return fp.calibrate(m, rows=ROWS, seconds=600, apart=False, **options)


def chosen(m, rows=33):
    m.train()
    (row,) = fp.explain(m, rows)
    return row.backend, row.why


def test_end_to_end_in_processes_of_their_own(own_cache, capsys):
    m = model(fp.LoraConfig(r=8, target_modules=["0"]), (72, 64), torch.float16)
    seen = []
    found = fp.calibrate(m, rows=(65, 3), seconds=300, progress=lambda done, of: seen.append((done, of)))
    assert not found.left
    assert found.file.parent == own_cache
    assert {(c["M"], c["kind"], c["dtype"]) for c in found.record.calls} == {(65, "low", "fp16"), (3, "low", "fp16")}
    for call in found.record.calls:
        assert set(call["ms"]) >= {"triton", "cublas", "eager"}
        assert all(ms > 0 for ms in call["ms"].values())
    assert set(found.record.passed) >= {"triton low fp16", "cublas low fp16"}
    assert not found.record.failed
    assert seen[-1][0] == seen[-1][1] == len(seen)
    assert json.loads(found.file.read_text())["gpu"] == records.INTERPRETER
    assert "65 x 72 x 64 r=8: eager" in str(found)
    records._held.clear()  # as in another process
    records.forget()
    fp.set_backend("triton")
    assert "triton: measured to take" in chosen(m, 65)[1]
    fp.set_backend(None)
    assert main(["info"]) == 0
    assert f"on disk      {found.file}: interpreter" in capsys.readouterr().out
    begin = time.time()
    again = fp.calibrate(m, rows=(65, 3), folder=own_cache / "copy")  # nothing left to measure
    assert again.record == found.record == records.read(again.file)
    assert again.file == own_cache / "copy" / found.file.name
    assert time.time() - begin < 2


@pytest.mark.parametrize("fastest", ["triton", "cublas", "eager"])
def test_the_fastest_is_chosen(gpu, clock, fastest):
    clock(**{"triton": 2.0, "cublas": 2.0, "eager": 2.0, fastest: 1.0})
    m = model()
    here(m)
    backend, why = chosen(m)
    assert backend == fastest
    if fastest != "triton":
        assert (
            "triton: measured to take 2.00 times as long as the fastest after it, on 33 x 24 x 40, interpreter" in why
        )
    assert chosen(m, 40)[0] == fastest  # the nearest
    assert "predicted" in chosen(m, 400)[1]


@pytest.mark.parametrize(
    ("inside", "before", "kept"), [(1.0, 2.0, True), (2.0, 1.0, False), (2.0, 1.99, True), (1.99, 2.0, True)]
)
def test_where_the_cuda_kernel_makes_T_is_measured(inside, before, kept, gpu, clock, monkeypatch):
    monkeypatch.setitem(dispatch._priority, "cpu", ["cuda", "triton"])
    cuda = dispatch.backends()["cuda"]
    monkeypatch.setattr("fused_peft.backends.cuda._broken", lambda emulated: None)
    monkeypatch.setattr(type(cuda), "available", lambda self: [])
    tested = []
    monkeypatch.setattr(calibrate.selftest, "failure", lambda name, p, d: tested.append((name, usual().inline)))
    clock(**{"cuda INLINE": inside, "cuda LATE": before, "triton": 3.0})
    usual = lambda: calibrate.configs.choose("gemm_cuda", (9, 0), 16, 128, 64, 72, 8)  # noqa: E731
    assert usual().inline
    found = fp.calibrate(
        model(fp.LoraConfig(r=8, target_modules=["0"]), (72, 64), torch.float16), rows=(128,), seconds=600, apart=False
    )
    assert {("cuda", True), ("cuda", False)} <= set(tested)
    (call,) = found.record.calls
    assert call["ms"]["cuda"] == (inside if kept else before)
    assert not any(" " in name for name in call["ms"])
    monkeypatch.setattr(calibrate.configs, "table", lambda: found.record.tiles)
    calibrate.configs.choose.cache_clear()
    assert usual().inline is kept
    assert len(found.record.tiles) == (not kept)
    monkeypatch.undo()
    calibrate.configs.choose.cache_clear()


@pytest.mark.parametrize("way", ["cuda INLINE", "cuda LATE", "triton"])
def test_a_way_is_entered_and_left(way):
    p = Problem("cpu", None, torch.float16, None, 128, 72, 64, 8, frozenset({"x", "w", "A", "B"}))
    usual = calibrate.configs.choose("gemm_cuda", (9, 0), 16, 128, 64, 72, 8)
    calibrate.enter(way, p)
    assert dispatch.forced() == way.split()[0]
    now = calibrate.configs.choose("gemm_cuda", (9, 0), 16, 128, 64, 72, 8)
    assert now.inline is {"cuda INLINE": True, "cuda LATE": False}.get(way, usual.inline)
    calibrate.enter("eager", p)
    assert calibrate.configs.choose("gemm_cuda", (9, 0), 16, 128, 64, 72, 8) == usual


def test_a_tie_goes_to_the_fused_kernel(gpu, clock):
    clock(triton=1.029, cublas=1.0, eager=1.0)
    m = model()
    here(m)
    assert chosen(m)[0] == "triton"


FAULTS = ("dB of one read doubled", "mask dropped from S", "mask dropped from dx", "last K block dropped")


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_kernel_is_off_and_training_goes_on(name, gpu, clock, monkeypatch, tmp_path):
    mutant, one_read = MUTANTS[name], "one read" in name
    mutated(mutant.file, mutant.before, mutant.after, monkeypatch, tmp_path)
    monkeypatch.setattr(k.outer, "one_read", lambda *shape: one_read)
    m = model(features=(72, 96))
    with pytest.warns(UserWarning, match="triton low.dropout fp32 is off on this interpreter: its self-test failed"):
        found = here(m)
    assert "triton low+dropout fp32" in found.record.failed
    assert "OFF: triton low+dropout fp32" in str(found)
    assert all("triton" not in call["ms"] for call in found.record.calls)
    backend, why = chosen(m)
    assert backend != "triton"
    assert "triton: its self-test failed on interpreter" in why
    fp.set_backend("triton")  # not even when asked for
    assert chosen(m)[0] != "triton"
    fp.set_strict(True)
    with pytest.raises(fp.StrictError, match="its self-test failed"):
        fp.explain(m, 33)
    fp.set_strict(False)
    fp.set_backend(None)
    x, results = torch.randn(33, 72, requires_grad=True), []
    for asked in (None, "eager"):
        fp.set_backend(asked)
        torch.manual_seed(1)
        y = m(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *m[0].adapter_tensors()])])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


def answers(monkeypatch, **by_function):
    """calibrate's jobs answered by functions of the job, in place of running them."""

    def run(self, function, jobs, seconds, deadline=None, workers=1):
        by_name = by_function.get(function.partition(":")[2], lambda *job: None)
        yield from ((number, by_name(*job)) for number, job in enumerate(jobs))

    monkeypatch.setattr(calibrate.isolated.Pool, "run", run)


def times(p, names, device):
    return dict.fromkeys(names, 1e-3)


def test_a_crash_turns_the_variant_off(gpu, monkeypatch):
    crash = Failure("its process was ended by signal 11", fatal=True)
    answers(monkeypatch, test=lambda name, p, device: crash if name == "triton" else None, timed=times)
    m = model()
    with pytest.warns(UserWarning, match="triton low.dropout fp32 is off .*ended by signal 11"):
        found = fp.calibrate(m, rows=ROWS)
    assert found.record.failed == {"triton low+dropout fp32": "its process was ended by signal 11"}
    assert set(found.record.calls[0]["ms"]) == {"cublas", "eager"}
    assert chosen(m)[0] == "cublas"


@pytest.mark.parametrize("why", ["OutOfMemoryError: tried to allocate 1 TB", "out of time"])
def test_what_says_nothing_of_the_kernel_turns_nothing_off(gpu, monkeypatch, why):
    answers(monkeypatch, test=lambda *job: Failure(why), timed=times)
    found = fp.calibrate(model(), rows=ROWS)
    assert (found.record.failed, found.record.passed, found.record.calls) == ({}, [], [])
    assert found.left == [f"{name} on low+dropout 33 x 24 x 40, r=4: {why}" for name in ("triton", "cublas")]
    assert "left to the rate model: triton on low+dropout" in str(found)


def test_a_failed_timing_leaves_the_call_to_the_rate_model(gpu, monkeypatch):
    answers(monkeypatch, timed=lambda *job: Failure("OutOfMemoryError"))
    m = model()
    found = fp.calibrate(m, rows=ROWS)
    assert found.left == ["low+dropout 33 x 24 x 40, r=4: OutOfMemoryError"]
    assert "predicted" in chosen(m)[1]


def test_a_process_that_cannot_use_the_gpu_is_an_error(gpu, monkeypatch):
    answers(monkeypatch, usable=lambda device: Failure("all CUDA-capable devices are busy"))
    with pytest.raises(RuntimeError, match=r"process of its own cannot use cpu \(all CUDA-capable.*apart=False"):
        fp.calibrate(model(), rows=ROWS)


def test_it_stops_when_the_time_is_over(gpu, clock, monkeypatch):
    found = fp.calibrate(model(), rows=ROWS, seconds=1e-9, apart=False)
    assert found.record.calls == []
    assert found.left == ["2 of 2 self-tests, for want of time (seconds=1e-09)"]


def test_calls_are_measured_as_training_makes_them(gpu, clock):
    m = model()
    m.eval()
    assert {c["kind"] for c in here(m).record.calls} == {"low+dropout"}
    assert not any(module.training for module in m.modules())


def test_layers_of_hugging_face_peft(gpu, clock):
    peft = pytest.importorskip("peft")
    plain = torch.nn.Sequential(torch.nn.Linear(24, 40))
    m = fp.accelerate(peft.get_peft_model(plain, peft.LoraConfig(r=4, target_modules=["0"])))
    assert [c["kind"] for c in here(m).record.calls] == ["low"]
    assert chosen(m)[0] == "triton"


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"rows": 0}, ValueError, r"rows=\(0,\) must be positive integers"),
        ({"rows": ()}, ValueError, r"rows=\(\) must be positive"),
        ({"rows": (128, 2.5)}, ValueError, "must be positive integers"),
        ({"rows": (True,)}, ValueError, "must be positive integers"),
        ({"seconds": 0}, ValueError, "seconds=0 must be a positive number"),
        ({"seconds": float("nan")}, ValueError, "must be a positive number"),
        ({"model": torch.nn.Linear(3, 3)}, ValueError, "no adapted layer; call get_peft_model first"),
    ],
)
def test_bad_arguments(own_cache, options, error, said):
    m = options.pop("model", None) or model()
    with pytest.raises(error, match=said):
        fp.calibrate(m, **options)
    assert not own_cache.exists()


def test_a_model_on_a_cpu_is_refused(own_cache, monkeypatch):
    triton = type(dispatch.backends()["triton"])
    monkeypatch.setattr(triton, "available", lambda self: ["no CUDA device is available"])
    with pytest.raises(ValueError, match=r"model is on cpu: calibrate measures a GPU; move the model with \.to"):
        fp.calibrate(model())
    assert not own_cache.exists()


def test_a_full_disk_is_a_warning(gpu, clock, monkeypatch):
    def full(record, folder=None):
        kept(record, folder)
        raise OSError(28, "No space left on device")

    kept = records.keep
    monkeypatch.setattr(records, "keep", full)
    m = model()
    with pytest.warns(UserWarning, match="cannot be written .*No space left.*this process alone.*FUSED_PEFT_CACHE"):
        found = here(m)
    assert found.file is None
    assert chosen(m)[1].startswith("triton: measured")


def test_two_processes_at_once(own_cache, gpu, clock):
    """The second waits for the first, and reads what it found."""
    m = model()
    file = here(m).file
    text = file.read_text()
    file.unlink()
    records._held.clear()
    records.forget()
    hold = (
        "import fcntl, pathlib, sys, time\n"
        "lock = open(sys.argv[1] + '/.calibrating', 'w'); fcntl.flock(lock, fcntl.LOCK_EX); print('held', flush=True)\n"
        "time.sleep(1.5); pathlib.Path(sys.argv[2]).write_text(sys.argv[3])\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(own_cache), str(file), text], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    begin = time.time()
    clock(triton=77.0)
    found = here(m)
    assert time.time() - begin > 1
    assert found.record.calls[0]["ms"]["triton"] == 1.0  # the other's
    assert other.wait() == 0


def test_the_command(own_cache, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "timed", times)
    answers(monkeypatch, timed=times)
    sizes = ["calibrate", "--sizes", "24x40", "--rows", "33", "--r", "4", "--dtype", "fp32"]
    assert main([*sizes, "--methods", "lora", "lora+dropout", "ssb", "--out", str(own_cache / "elsewhere")]) == 0
    out = capsys.readouterr().out
    (file,) = (own_cache / "elsewhere").glob("*.json")
    assert f"record: {file}" in out
    assert {c["kind"] for c in records.read(file).calls} == {"low", "low+dropout", "in+out"}
    for wrong in (["--rows", "0"], ["--sizes", "24"], ["--methods", "no_such"]):
        assert main([*sizes, *wrong]) == 2
        assert capsys.readouterr().err.startswith("calibrate: ")
    answers(monkeypatch, test=lambda *job: "y is off", timed=times)
    records.forget()
    with pytest.warns(UserWarning, match="is off"):
        assert main([*sizes, "--methods", "dora"]) == 1


def test_a_log_gets_few_lines_of_progress(monkeypatch, capsys):
    """And a terminal one line that is written over."""
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda terminal=terminal: terminal, raising=False)
        for done in range(1, 201):
            _counted(done, 200)
        said = capsys.readouterr().err
        assert (said.count("\r"), said.count("\n")) == ((200, 1) if terminal else (0, 4))
        assert said.endswith("200 of 200 jobs\n")
        with calibrate._bar() as progress:
            progress(1, 2)
        assert bool(capsys.readouterr().err) is terminal


def at_start(monkeypatch, **options):
    """at_start on a model that is on a GPU, and what it called."""
    asked = []

    def stand_in(model, rows, seconds, progress):
        asked.append((rows, seconds))
        if "raises" in options:
            raise options["raises"]
        return "a calibration"

    monkeypatch.setattr(calibrate, "calibrate", stand_in)
    if "rows" in options:
        monkeypatch.setattr(calibrate, "explain", options["rows"])
    else:
        monkeypatch.setattr(calibrate, "explain", lambda m, tokens: [SimpleNamespace(problem=1)])
    monkeypatch.setattr(records, "find", lambda device: options.get("record"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU X")
    m = SimpleNamespace(parameters=lambda: [SimpleNamespace(device=torch.device("cuda", 0))])
    return calibrate.at_start(m, (8,), 5.0), asked


def test_before_training_once_a_gpu(monkeypatch, caplog):
    assert at_start(monkeypatch) == ("a calibration", [((8,), 5.0)])
    (line,) = [r.message for r in caplog.records if r.name == "fused_peft"]
    assert line == (
        "fused_peft tests and times its kernels on this GPU X once, for about 5 s; FUSED_PEFT_CALIBRATE=0 skips it"
    )
    known = records.Record("GPU X", "", "", "", "")
    assert at_start(monkeypatch, record=known) == (None, [])
    monkeypatch.setenv("FUSED_PEFT_CALIBRATE", "0")
    assert at_start(monkeypatch) == (None, [])
    monkeypatch.setenv("FUSED_PEFT_CALIBRATE", "1")

    def soft_prompt(m, tokens):
        raise ValueError("a soft prompt has no weight")

    for nothing in (soft_prompt, lambda m, tokens: [SimpleNamespace(problem=None)]):
        assert at_start(monkeypatch, rows=nothing) == (None, [])

    def broken(m, tokens):
        raise AttributeError("no such layer")

    with pytest.warns(UserWarning, match="did not calibrate .AttributeError: no such layer"):
        assert at_start(monkeypatch, rows=broken) == (None, [])


def test_what_goes_wrong_before_training_is_a_warning(monkeypatch):
    with pytest.warns(UserWarning, match=r"did not calibrate \(RuntimeError: busy\); which GEMM runs is predicted"):
        assert at_start(monkeypatch, raises=RuntimeError("busy"))[0] is None


def test_never_on_a_cpu():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibrate.at_start(model()) is None


def test_not_while_a_graph_is_captured(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    m = model()
    monkeypatch.setattr(m, "parameters", lambda: [SimpleNamespace(device=torch.device("cuda", 0))])
    with pytest.raises(RuntimeError, match="cannot run while a CUDA graph is captured"):
        fp.calibrate(m, rows=ROWS)


@pytest.mark.parametrize("calibrates", [True, False])
def test_trainers_callback_asks_for_it(monkeypatch, calibrates):
    pytest.importorskip("transformers")
    from fused_peft.integrations import transformers as bridge

    asked = []
    monkeypatch.setattr(bridge, "at_start", lambda model, rows: asked.append(rows))
    args = SimpleNamespace(save_strategy="no")
    callback = bridge.FusedPeftCallback(calibrate=calibrates, rows=(7,))
    callback.on_train_begin(args, None, None, model=model())
    assert asked == ([(7,)] if calibrates else [])
    bridge.FusedPeftCallback().on_train_begin(args, None, None, model=torch.nn.Linear(3, 3))
    assert len(asked) == calibrates
