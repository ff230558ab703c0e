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
import report
import tables
import tune

from fused_peft.backends.kernel_modules import configs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the script is run itself")
CONTENDERS = {"frozen", "triton", "cublas", "cuda", "eager"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of the three stages' results, and what they printed."""
    out, printed = tmp_path_factory.mktemp("gpu"), []
    env = {**os.environ, "OUT": str(out), "PYTHON": sys.executable}
    for stage in "123":
        command = ["bash", str(gpu.ROOT / "bench/gpu.sh"), stage, "900"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        printed.append(done.stdout)
    return out, "".join(printed)


def rows(file, columns):
    """The rows of a table; each says where it comes from."""
    with file.open(newline="") as f:
        reader = csv.DictReader(f)
        found = list(reader)
    assert reader.fieldnames == columns.split()
    assert {tuple(r[name] for name in gpu.FACTS.split()) for r in found} == {tuple(gpu.facts().values())}
    assert gpu.facts()["gpu"] == "interpreter"
    assert all(gpu.facts().values())
    return found


def ordered(row, name):
    low, middle, high = (float(row[f"{name}_p{q}"]) for q in (20, 50, 80))
    return 0 < low <= middle <= high


def test_nothing_is_left_out_and_few_files_come_back(ran):
    out, printed = ran
    assert not [word for word in ("left out", "failed:", "FAILED") if word in printed]
    names = {file.name for file in out.iterdir()}
    (record,) = out.glob("*.json")
    tables_of = ("correctness", "speed", "launches", "gemm", "checks", "training", "experts")
    assert names == {f"{n}.csv" for n in tables_of} | {record.name}
    assert len(names) <= 8
    assert all(f"{name} {value};" in printed for name, value in gpu.facts().items())


def test_the_stages_fit_into_ten_minutes_and_a_half_and_every_case_ends():
    assert sum(gpu.SECONDS.values()) <= 630
    assert (gpu.SECONDS[1], *gpu.SECONDS) == (150, 1, 2, 3)
    assert all(0 < limit < float("inf") for limit in (gpu.EACH, gpu.BUILD, gpu.GRACE, tune.EACH))


def test_every_row_of_the_proof_holds(ran):
    found = rows(ran[0] / "correctness.csv", correctness.COLUMNS)
    skipped = [r for r in found if r["ok"] == "skipped"]
    assert all(r["note"] and r["error"] == "" for r in skipped)
    assert {(r["case"], r["dtype"]) for r in skipped if r["dtype"] != "bf16"} == {("CUDA graph", ""), ("replay", "")}
    refused = [r for r in found if r["ok"] == "refused"]
    assert [(r["case"], r["backend"], r["note"]) for r in refused] == [
        ("dora+dropout", "cuda", "the call is not one GEMM with a frozen weight")
    ]
    held = [r for r in found if r not in skipped and r not in refused]
    assert {r["ok"] for r in held} == {"true"}
    plans = {p.name for p in correctness.PLANS[3::13]}
    assert {r["case"] for r in held if r["backend"] == "cuda"} == {"lora", "lora+dropout", "ssb", *plans}
    assert {r["dtype"] for r in held} == {"", "fp64", "fp32", "fp16", "bf16"}
    assert {r["against"] for r in held} == {"PyTorch's", "1 - p", "paper", "expression", "fp64", "formula"}
    for r in held:
        assert r["against"] in ("fp64", "formula") or float(r["error"]) <= float(r["limit"])


def test_the_calls_that_are_timed_are_tested_first(ran, monkeypatch):
    found = rows(ran[0] / "correctness.csv", correctness.COLUMNS)
    own = [(r["backend"], r["shape"]) for r in found if r["against"] == "formula"]
    assert set(own) == {(n, str(at)) for n in correctness.BACKENDS for at in (gpu.LARGE, gpu.SMALL)}
    assert found[0]["against"] == "formula"
    monkeypatch.setattr(gpu, "INTERPRETING", False)
    asked = {(about["case"], about["backend"], about["shape"]) for about, _ in gpu.exact_jobs()}
    assert len(asked) == len(gpu.TIMINGS) * len(correctness.BACKENDS)


def test_the_layers_that_matter_are_timed_with_every_contender(ran):
    found = rows(ran[0] / "speed.csv", gpu.SPEED)
    timed = {(r["method"], r["contender"], r["step"], int(r["M"])) for r in found}
    contenders = {m: CONTENDERS | ({"peft", "peft_half"} if gpu.has_peer(m) else set()) for m in gpu.METHODS}
    assert [m for m, who in contenders.items() if "peft" in who] == ["lora", "lora+dropout", "dora"]
    assert timed == {(m, c, s, at.M) for m, at in gpu.TIMINGS for c in contenders[m] for s in gpu.STEPS}
    for r in found:
        assert ordered(r, "ms")
        assert ordered(r, "ratio")
        assert float(r["ratio_p50"]) == 1 or r["contender"] != "frozen"
        assert (r["graph"], r["note"]) == ("no", "")


def test_graphs_are_timed_apart_and_last(monkeypatch):
    monkeypatch.setattr(gpu, "GRAPHS", ("no", "yes"))
    asked = gpu.timings()
    half = len(asked) // 2
    assert [about["graph"] for about in asked] == ["no"] * half + ["yes"] * half
    assert [{**about, "graph": "no"} for about in asked[half:]] == asked[:half]


def test_the_kernels_of_a_step_are_listed(ran):
    found = rows(ran[0] / "launches.csv", gpu.LAUNCHES)
    timed = {(r["method"], r["contender"], r["M"]) for r in rows(ran[0] / "speed.csv", gpu.SPEED)}
    assert {(r["method"], r["contender"], r["M"]) for r in found} == timed
    assert {(r["kernel"], r["note"]) for r in found} == {("none on a CPU", "")}


def test_a_layer_of_experts_is_timed_once_it_agrees(ran, monkeypatch):
    found = rows(ran[0] / "experts.csv", gpu.EXPERTS)
    assert [r["contender"] for r in found] == ["frozen", "triton", "eager", "peft"]
    assert all(ordered(r, "ms") and ordered(r, "ratio") and r["note"] == "" for r in found)
    monkeypatch.setattr(gpu, "CLOSE", 0.0)
    sizes = dict(zip(("experts", "hidden", "width", "tokens", "top"), gpu.MOES[0], strict=True))
    with pytest.raises(RuntimeError, match="it does not agree with HF PEFT's"):
        gpu.routed(sizes)


def test_every_table_has_room_for_a_note():
    for columns in (correctness.COLUMNS, gpu.SPEED, gpu.LAUNCHES, gpu.TRAINING, gpu.EXPERTS, gpu.gemm.COLUMNS):
        assert "note" in columns.split()


def test_a_copy_says_which_commit_it_is(tmp_path, monkeypatch):
    import timing

    monkeypatch.setattr(timing, "ROOT", tmp_path)
    (tmp_path / "COMMIT").write_text("abc1234\n")
    assert timing.facts.__wrapped__()["commit"] == "abc1234"


def test_what_is_timed_comes_after_calls_that_settle_it():
    """A backend that was just entered computes, watches, and only then replays."""
    from fused_peft.tools import timing

    told, times = [], 3
    steps = {name: lambda i, name=name: told.append((name, i)) for name in ("a", "b")}
    found = timing.interleaved(steps, torch.device("cpu"), lambda name: told.append((name, "entered")), 10.0, times)
    assert {name: len(own) for name, own in found.items()} == {"a": times, "b": times}
    entered = [i for i, (_, what) in enumerate(told) if what == "entered"]
    assert len(entered) == 2 * (1 + times)
    for begin, end in zip(entered, [*entered[1:], len(told)], strict=True):
        of = {name for name, _ in told[begin:end]}
        assert len(of) == 1
        assert end - begin - 1 > timing.SETTLED


def test_the_gemm_is_timed(ran):
    found = rows(ran[0] / "gemm.csv", gpu.gemm.COLUMNS)
    assert [r["contender"] for r in found] == ["cublas", "cuda", "cuda+update", "triton", "triton+update"]
    assert all(float(r["tflops"]) > 0 and ordered(r, "ratio") for r in found)


def test_the_record_of_calibration_reads_back(ran):
    (file,) = ran[0].glob("*.json")
    record = records.read(file)
    assert record.identity == records.identity(torch.device("cpu"))
    assert {call["kind"] for call in record.calls} == {"low", "low+dropout", "low+out", "in+out"}
    assert {call["M"] for call in record.calls} == set(gpu.ROWS)
    assert all({"triton", "cublas", "cuda", "eager"} == call["ms"].keys() for call in record.calls)
    assert not record.failed
    assert {variant.split()[0] for variant in record.passed} == {"triton", "cublas", "cuda"}


def test_training_steps_are_timed_once_they_agree(ran):
    found = rows(ran[0] / "training.csv", gpu.TRAINING)
    want = [(of, m, who) for of in gpu.MODELS for m in gpu.TRAINED for who in ("peft", "accelerated")]
    assert [(r["model"], r["method"], r["contender"]) for r in found] == want
    for r in found:
        assert ordered(r, "tokens_per_second")
        assert ordered(r, "ratio")
        assert (r["graph"], r["note"]) == ("no", "")
    checks = rows(ran[0] / "checks.csv", correctness.COLUMNS)
    watched = checks.pop()
    assert (watched["backend"], watched["tensor"], watched["ok"]) == ("cuda", "memcheck", "skipped")
    assert {(r["case"], r["tensor"], r["ok"]) for r in checks} == {
        (f"{m}, {of}", t, "true") for of in gpu.MODELS for m in gpu.TRAINED for t in ("loss", "gradients")
    }


def test_candidates_are_tuned_into_a_record_of_no_gpu(tmp_path):
    kinds = ["gemm_lowrank_tma", "row_norm", "gemm_cuda"]
    command = [sys.executable, str(gpu.ROOT / "bench/tune.py"), "--out", str(tmp_path), "--kinds", *kinds]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stdout
    found = rows(tmp_path / "tuning.csv", tune.COLUMNS)
    assert {r["kind"] for r in found} == set(kinds)
    assert {r["note"] for r in found} == {""}
    (file,) = tmp_path.glob("*.json")
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

def case(about):
    if about["case"] == "crash":
        os.abort()
    if about["case"] == "hang":
        time.sleep(600)
    if about["case"] == "raise":
        raise RuntimeError("no such instruction")
    return [{"note": "it ran"}]
"""


def test_a_crash_a_hang_and_an_error_are_rows_and_cost_no_other_case(tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    columns = f"case ok note {gpu.FACTS}"
    table = gpu.Table(tmp_path / "cases.csv", columns)
    jobs = [({"case": kind},) for kind in ("crash", "one", "hang", "two", "raise", "three")]
    with Pool() as pool:
        assert gpu.cases(table, pool, "faulty:case", jobs, 3.0, float("inf")) == []
        assert gpu.cases(table, pool, "faulty:case", jobs[:1], 3.0, deadline=0.0) == ["crash"]
    found = rows(tmp_path / "cases.csv", columns)
    assert [r["case"] for r in found] == [about["case"] for (about,) in jobs]
    said = {r["case"]: r["note"] for r in found}
    assert said["crash"].startswith("its process was ended by signal 6")
    assert said["hang"] == "its process took too long"
    assert said["raise"] == "RuntimeError: no such instruction"
    assert {said[kind] for kind in ("one", "two", "three")} == {"it ran"}
    assert [r["ok"] for r in found] == ["false", "", "false", "", "false", ""]


@pytest.fixture
def scripted(monkeypatch):
    """A stage with answers of our own in the place of processes; a function that runs it."""

    def run(stage, folder, answer, builds=None):
        asked = []

        class Answers:
            def run(self, function, jobs, *rest):
                for number, job in enumerate(jobs):
                    asked.append((function, *job))
                    yield number, answer(function, job[0])

        monkeypatch.setattr(gpu.isolated, "run", lambda *a: iter([(0, builds)]))
        left, table = gpu.RUN[stage](Answers(), folder, gpu.time.time() + 1e3)
        assert left == []
        return asked, table.rows, tables.read(folder / ("speed.csv" if stage == 1 else "training.csv"))

    return run


def test_what_fails_its_test_is_not_timed(tmp_path, scripted):
    def answer(function, about):
        if function == "correctness:exact" and about["backend"] == "cuda":
            return gpu.Failure("its process was ended by signal 11", fatal=True)
        if function == "gpu:timed" and about["contender"] == "peft_half":
            return gpu.Failure("its process took too long", fatal=True)
        return gpu.Failure("out of time") if function == "correctness:check" else []

    asked, proof, speed = scripted(1, tmp_path, answer)
    assert {r["ok"] for r in proof if r["backend"] == "cuda" and r["case"] == "lora"} == {"false"}
    assert {r["ok"] for r in proof if r["case"] == "dropout mask"} == {"skipped"}
    halves = {(m, "peft_half", "its process took too long") for m in gpu.TRAINED}
    assert {(r["method"], r["contender"], r["note"]) for r in speed} == halves | {
        ("lora", "cuda", "its self-test failed")
    }
    timed = [about for function, about, *_ in asked if function == "gpu:timed"]
    assert len(timed) == len(gpu.timings()) - 2
    assert [about["method"] for about in timed if about["contender"] == "cuda"] == ["lora+dropout", "dora", "ssb"]


def test_what_does_not_agree_is_not_timed(tmp_path, scripted):
    def answer(function, about):
        wrong = function == "gpu:agree" and about["case"] == "dora, MiniLM"
        return gpu.Failure("its process was ended by signal 11", fatal=True) if wrong else []

    asked, checks, training = scripted(3, tmp_path, answer)
    assert [r["case"] for r in checks if r["ok"] == "false"] == ["dora, MiniLM"]
    (row,) = training
    assert (row["contender"], row["note"]) == ("accelerated", "it does not agree with HF PEFT's")
    assert len([1 for function, *_ in asked if function == "gpu:trained"]) == 11


def test_without_csrc_the_rest_goes_on(tmp_path, scripted, capsys):
    asked, proof, speed = scripted(1, tmp_path, lambda function, about: [], gpu.Failure("BuildError: no nvcc"))
    assert "csrc/ is left out: BuildError: no nvcc" in capsys.readouterr().out
    assert (proof, speed) == ([], [])
    words = {word for _, about, *_ in asked for word in about.values()}
    assert not {"cuda", "cuda+update"} & words
    assert {"triton", "cublas", "peft"} <= words


def test_the_report_shows_what_was_measured(tmp_path, monkeypatch):
    (tmp_path / "gpu").mkdir()
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "GRAPHS", ("no", "yes"))
    table = gpu.Table(tmp_path / "gpu/speed.csv", gpu.SPEED)
    for about in gpu.timings():
        ratio = 1.0625 if about["contender"] == "triton" and about["graph"] == "yes" else 3.0
        table.add(**about, step="both", ratio_p50=ratio)
        table.add(**about, note="its process took too long")
    shown = [line for line in report.gpu_graph().splitlines() if "forward + backward" in line]
    assert len(shown) == len(gpu.TIMINGS)
    assert all(line.count("1.06") == 1 and "3.00" in line for line in shown)
    launches = gpu.Table(tmp_path / "gpu/launches.csv", gpu.LAUNCHES)
    at = {"method": "lora", "M": 8192}
    launches.add(**at, contender="frozen", kernel="nvjet_tst", us=100.0)
    for kernel, us in (("down", 5.0), ("gemm_gluon", 110.0), ("some copy", 2.0)):
        launches.add(**at, contender="gluon", kernel=kernel, us=us)
    launches.add(**at, contender="gluon", kernel="down", us=50.0, note="taken out since")
    (line,) = [line for line in report.gpu_launches().splitlines() if "Gluon" in line]
    assert line == "| lora, Gluon | 110 | 5 | – | – | – | 2 | 117 | 1.17 |"


def test_the_exit_status_tells_of_a_wrong_row(tmp_path, monkeypatch):
    table = gpu.Table(tmp_path / "proof.csv", correctness.COLUMNS)
    monkeypatch.setitem(gpu.RUN, 1, lambda pool, out, deadline: ([], table))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--stage", "1", "--out", str(tmp_path)])
    for verdict, status in (("true", 0), ("skipped", 0), ("refused", 0), ("false", 1)):
        table.add(case="lora", ok=verdict)
        assert gpu.main() == status


def test_a_failed_case_is_a_row():
    case = {"case": "no such case", "backend": "triton", "dtype": "fp32", "shape": correctness.SHAPES[0]}
    (row,) = correctness.check(case)
    assert row["ok"] == "false"
    assert "StopIteration" in row["note"]
    (row,) = correctness.check({**case, "case": "pissa", "shape": correctness.Shape((2,), 4, 5, 6)})
    assert (row["ok"], "r=6" in row["note"]) == ("refused", True)
