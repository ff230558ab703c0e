"""bench/gpu.sh end to end on a machine without a GPU: its three stages on tiny shapes, in Triton's interpreter."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_peft.core import records
from fused_peft.tools.isolated import Pool

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

pytest.importorskip("triton", reason="Triton runs on Linux")

import correctness
import gpu
import tune

from fused_peft.backends.kernel_modules import configs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the script is run itself")
CONTENDERS = {"frozen", "triton", "cublas", "cuda", "eager"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of the three stages' and the tuner's results, and what they printed."""
    out, printed = tmp_path_factory.mktemp("gpu"), []
    env = {**os.environ, "OUT": str(out), "PYTHON": sys.executable}
    tuner = [sys.executable, str(gpu.ROOT / "bench/tune.py"), "--out", str(out / "tuned")]
    for command in (*(["bash", str(gpu.ROOT / "bench/gpu.sh"), n, "900"] for n in "123"), tuner):
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        printed.append(done.stdout)
    return out, "".join(printed)


def rows(file, columns):
    with file.open(newline="") as f:
        reader = csv.DictReader(f)
        found = list(reader)
    assert reader.fieldnames == columns.split()
    assert {r["gpu"] for r in found} == {"interpreter"}
    return found


def test_nothing_is_left_out_and_few_files_come_back(ran):
    out, printed = ran
    assert "left out" not in printed
    assert len([file for file in out.iterdir() if file.is_file()]) <= 8


def test_the_stages_take_ten_minutes_and_a_half_and_no_case_is_without_an_end():
    assert gpu.SECONDS == {1: 150, 2: 240, 3: 240}
    assert 0 < gpu.EACH < float("inf")
    assert 0 < tune.EACH < float("inf")


def test_every_row_of_the_proof_holds(ran):
    found = rows(ran[0] / "correctness.csv", correctness.COLUMNS)
    skipped = [r for r in found if r["ok"] == "skipped"]
    assert all(r["note"] and r["error"] == "" for r in skipped)
    assert {(r["case"], r["dtype"]) for r in skipped if r["dtype"] != "bf16"} == {("CUDA graph", "")}
    refused = [r for r in found if r["ok"] == "refused"]
    assert [(r["case"], r["backend"], r["note"]) for r in refused] == [
        ("dora+dropout", "cuda", "the call is not one GEMM with a frozen weight")
    ]
    held = [r for r in found if r not in skipped and r not in refused]
    assert {r["ok"] for r in held} == {"true"}
    plans = {p.name for p in correctness.PLANS[3::13]}
    assert {r["case"] for r in held if r["backend"] == "cuda"} == {"lora+dropout", "ssb", *plans}
    assert {r["dtype"] for r in held} == {"", "fp64", "fp32", "fp16", "bf16"}
    assert {r["against"] for r in held} == {"PyTorch's", "1 - p", "paper", "expression", "fp64"}
    assert len({r["case"] for r in held if r["case"] not in plans}) == 4
    for r in held:
        assert r["against"] == "fp64" or float(r["error"]) <= float(r["limit"])


def test_the_layers_that_matter_are_timed_with_every_contender(ran):
    found = rows(ran[0] / "speed.csv", gpu.SPEED)
    timed = {(r["method"], r["contender"], r["step"], int(r["M"])) for r in found}
    contenders = {m: CONTENDERS | ({"peft", "peft_half"} if gpu.has_peer(m) else set()) for m in gpu.METHODS}
    assert [m for m, who in contenders.items() if "peft" in who] == ["lora", "lora+dropout", "dora"]
    assert timed == {(m, c, s, layer.M) for m, layer in gpu.TIMINGS for c in contenders[m] for s in gpu.STEPS}
    for r in found:
        assert 0 < float(r["ms_p20"]) <= float(r["ms_p50"]) <= float(r["ms_p80"])
        assert float(r["ratio_p50"]) == 1 if r["contender"] == "frozen" else float(r["ratio_p50"]) > 0
        assert r["commit"]


def test_the_gemm_is_timed(ran):
    found = rows(ran[0] / "gemm.csv", gpu.gemm.COLUMNS)
    assert [r["contender"] for r in found] == ["cublas", "cuda", "cuda+update", "triton", "triton+update"]
    assert all(float(r["tflops"]) > 0 for r in found)


def test_the_record_of_calibration_reads_back(ran):
    (file,) = ran[0].glob("*.json")
    record = records.read(file)
    assert record.identity == records.identity(torch.device("cpu"))
    assert {call["kind"] for call in record.calls} == {"low", "low+dropout", "low+out", "in+out"}
    assert {call["M"] for call in record.calls} == set(gpu.ROWS)
    assert all({"triton", "cublas", "eager"} <= call["ms"].keys() for call in record.calls)
    assert not record.failed
    assert {variant.split()[0] for variant in record.passed} == {"triton", "cublas", "cuda"}


def test_training_steps_are_timed(ran):
    found = rows(ran[0] / "training.csv", gpu.TRAINING)
    want = {(of, m, who) for of in ("MiniLM", "small Llama") for m in gpu.TRAINED for who in ("peft", "accelerated")}
    assert {(r["model"], r["method"], r["contender"]) for r in found} == want
    assert all(float(r["tokens_per_second"]) > 0 and r["graph"] == "no" for r in found)
    (watched,) = rows(ran[0] / "sanitizer.csv", gpu.SANITIZER)
    assert (watched["backend"], watched["tensor"], watched["ok"]) == ("cuda", "memcheck", "skipped")


def test_candidates_are_tuned_into_a_record_of_no_gpu(ran):
    found = rows(ran[0] / "tuned/tuning.csv", tune.COLUMNS)
    assert {r["kind"] for r in found} >= {
        "gemm_lowrank",
        "gemm_lowrank_tma",
        "down",
        "outer",
        "hadamard",
        "row_norm",
        "gemm_cuda",
    }
    assert {r["note"] for r in found} == {""}
    (file,) = (ran[0] / "tuned").glob("*.json")
    assert records.read(file).gpu == records.INTERPRETER


@pytest.mark.parametrize("kind", configs.CLOSED_FORMS)
def test_candidates_are_legal_and_near(kind):
    form = configs.CLOSED_FORMS[kind]((9, 0), 16, 8192, 4096, 4096, 16)
    found = list(tune.candidates(configs.key(kind, (9, 0), 16, 8192, 4096, 4096, 16), form))
    assert len(found) == len(set(found)) > 4
    assert form not in found
    for c in found:
        assert tune.legal(kind, c, 8192)
        assert sum(a != b for a, b in zip(vars(c).values(), vars(form).values(), strict=True)) <= 2


FAULTY = """
import os, time

def case(kind):
    if kind == "crash":
        os.abort()
    if kind == "hang":
        time.sleep(600)
    if kind == "raise":
        raise RuntimeError("no such instruction")
    return [{"case": kind}], ["what " + kind + " left"]
"""


def test_a_crash_a_hang_and_an_error_cost_one_case(tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(gpu, "EACH", 3.0)
    table = gpu.Table(tmp_path / "cases.csv", "case " + gpu.FACTS)
    jobs = [(kind,) for kind in ("crash", "one", "hang", "two", "raise", "three")]
    with Pool() as pool:
        left = gpu.tabled(table, pool, "faulty:case", jobs, float("inf"))
        late = gpu.tabled(table, pool, "faulty:case", jobs[:1], deadline=0.0)
    assert [r["case"] for r in rows(tmp_path / "cases.csv", "case " + gpu.FACTS)] == ["one", "two", "three"]
    assert [line for line in left if line.startswith("what")] == [f"what {n} left" for n in ("one", "two", "three")]
    said = dict(line.split(": ", 1) for line in left if not line.startswith("what"))
    assert said["crash"].startswith("its process was ended by signal 6")
    assert said["hang"] == "its process took too long"
    assert said["raise"] == "RuntimeError: no such instruction"
    assert late == ["crash, for want of time"]


def test_a_crash_in_the_proof_is_a_failed_row(tmp_path, monkeypatch):
    answers = [(0, gpu.Failure("ended by signal 11", fatal=True)), (1, gpu.Failure("out of time"))]

    class Answers:
        def run(self, function, jobs, *rest):
            return iter(answers if function == "correctness:check" else ())

    monkeypatch.setattr(gpu.extension, "library", lambda emulated: None)
    left = gpu.first(tmp_path, Answers(), gpu.time.time(), 100.0)
    found = rows(tmp_path / "correctness.csv", correctness.COLUMNS)
    assert [(r["ok"], r["note"]) for r in found] == [("false", "ended by signal 11"), ("skipped", "out of time")]
    assert len([line for line in left if line.startswith("correctness of")]) == len(correctness.jobs()) - 2


def test_a_failed_case_is_a_row():
    (row,) = correctness.check("no such case", "triton", "fp32", correctness.SHAPES[0])
    assert row["ok"] == "false"
    assert "StopIteration" in row["note"]
    (row,) = correctness.check("pissa", "triton", "fp32", correctness.Shape((2,), 4, 5, 6))
    assert (row["ok"], "r=6" in row["note"]) == ("refused", True)
