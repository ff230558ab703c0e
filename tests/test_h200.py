"""bench/h200.sh end to end on a machine without a GPU: every stage on tiny shapes, in Triton's interpreter."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fused_peft.backends import triton as backend
from fused_peft.backends.extension import PLANS
from fused_peft.core.operands import Problem

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

pytest.importorskip("triton", reason="Triton runs on Linux")

import correctness
import h200
import timing
import tune

from fused_peft.backends.kernel_modules import configs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the script is run itself")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    out = tmp_path_factory.mktemp("h200")
    done = subprocess.run(
        ["bash", h200.ROOT / "bench/h200.sh", "900"],
        env={**os.environ, "OUT": str(out), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


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
    assert len(list(out.iterdir())) <= 9


def test_every_row_of_the_proof_holds(ran):
    found = rows(ran[0] / "correctness.csv", correctness.COLUMNS)
    skipped = [r for r in found if r["ok"] == "skipped"]
    assert all(r["note"] and r["error"] == "" for r in skipped)
    assert {(r["case"], r["dtype"]) for r in skipped if r["dtype"] != "bf16"} == {
        ("CUDA graph", ""),
        ("compute-sanitizer", ""),
    }
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


def test_every_method_and_contender_is_timed(ran):
    found = rows(ran[0] / "speed.csv", h200.SPEED)
    timed = {(r["method"], r["contender"], r["step"], int(r["M"])) for r in found}
    contenders = {m: {"frozen", "triton", "cublas", "eager"} for m in h200.METHODS}
    for method in filter(h200.has_peer, h200.METHODS):
        contenders[method] |= {"peft", "peft_half"}
    many, one = h200.ROWS
    want = {(m, c, s, M) for m, some in contenders.items() for c in some for s in h200.STEPS for M in (many, one)}
    taken = set(h200.METHODS) - {"liera", "svdiff"}
    assert timed == want | {(m, "cuda", s, many) for m in taken for s in h200.STEPS}
    for r in found:
        assert 0 < float(r["ms_p20"]) <= float(r["ms_p50"]) <= float(r["ms_p80"])
        assert float(r["ratio_p50"]) == 1 if r["contender"] == "frozen" else float(r["ratio_p50"]) > 0
        assert r["commit"]


def test_the_gemm_is_timed(ran):
    found = rows(ran[0] / "gemm.csv", h200.gemm.COLUMNS)
    assert [r["contender"] for r in found] == ["cublas", "cuda", "cuda+update", "triton", "triton+update"]
    assert all(float(r["tflops"]) > 0 for r in found)


def test_candidates_are_tuned(ran):
    found = rows(ran[0] / "tuning.csv", tune.COLUMNS)
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


@pytest.mark.parametrize("name", ["measured.json", "tuned.json"])
def test_a_dry_run_leaves_no_key_that_could_match(ran, name):
    assert all(key.startswith("interpreter ") for key in json.loads((ran[0] / name).read_text()))


@pytest.mark.parametrize("method", ["lora", "dora", "ssb", "liera"])
def test_the_backend_finds_what_was_measured(method, monkeypatch):
    key = h200.measured_key(method, h200.Layer(100, 32, 48, 20)).removeprefix("interpreter ")
    monkeypatch.setattr(backend, "_table", lambda: {key: 1.5})
    r = 0 if method == "ssb" else 20
    hadamard = method == "liera"
    half = torch.float16
    problem = Problem("cuda", (9, 0), half, half, 100, 32, 48, r, frozenset(), hadamard=hadamard)
    assert backend.measured(problem) == 1.5
    assert backend.measured(replace(problem, N=49)) is None


def test_the_main_table_is_measured_first():
    first = [(method, layer.M, layer.r) for method, layer in h200.jobs_timed()][: len(h200.METHODS)]
    assert first == [(method, h200.ROWS[0], h200.RANKS[0]) for method in h200.METHODS]


@pytest.mark.parametrize("kind", configs.CLOSED_FORMS)
def test_candidates_are_legal_and_near(kind):
    form = configs.CLOSED_FORMS[kind]((9, 0), 16, 8192, 4096, 4096, 16)
    found = list(tune.candidates(configs.key(kind, (9, 0), 16, 8192, 4096, 4096, 16), form))
    assert len(found) == len(set(found)) > 4
    assert form not in found
    for c in found:
        assert tune.legal(kind, c, 8192)
        assert sum(a != b for a, b in zip(vars(c).values(), vars(form).values(), strict=True)) <= 2


def test_work_stops_at_its_deadline():
    jobs = [(i,) for i in range(3)]
    assert list(timing.each(None, abs, jobs, deadline=0)) == []
    assert list(timing.each(None, abs, jobs, deadline=float("inf"))) == [((0,), 0), ((1,), 1), ((2,), 2)]


def test_what_proves_the_cuda_backend(monkeypatch):
    """Rows as the run itself makes them, on a machine where all of them hold."""
    monkeypatch.setattr(correctness, "INTERPRETING", False)
    monkeypatch.setattr(correctness.shutil, "which", lambda *a, **k: "compute-sanitizer")
    passes = SimpleNamespace(returncode=0, stdout="", stderr="")
    monkeypatch.setattr(correctness.subprocess, "run", lambda *a, **k: passes)
    graph = [{"dtype": "bf16", "shape": "128-512-384-r16", "tensor": "y", "ok": "true"}]
    monkeypatch.setitem(correctness.EXTRAS, "CUDA graph", lambda: graph)
    monkeypatch.setattr(correctness, "_compared", lambda case, dtype, shape: [{"tensor": "y", "ok": "true"}])
    monkeypatch.setattr(correctness, "planned", lambda plan: [{"tensor": "", "ok": "true"}])
    rows = [row for job in correctness.jobs() if job[1] == "cuda" for row in correctness.check(*job)]
    rows += [correctness.sanitize(*tool, 1) for tool in correctness.WATCHED]
    assert correctness.unproven(rows) == []
    others = [{**rows[0], "backend": "triton", "ok": "false"}]
    assert correctness.unproven(rows + others) == []
    some = [next(i for i, r in enumerate(rows) if r["case"] == case) for case in ("CUDA graph", PLANS[5].name, "lora")]
    for i in (*some, len(rows) - 1):
        for ok in ("false", "skipped", "refused"):
            assert correctness.unproven([*rows[:i], {**rows[i], "ok": ok}, *rows[i + 1 :]]), rows[i]
    assert len(correctness.unproven([{**r, "ok": "refused"} for r in rows])) > 100


def test_a_failed_case_is_a_row():
    (row,) = correctness.check("no such case", "triton", "fp32", correctness.SHAPES[0])
    assert row["ok"] == "false"
    assert "StopIteration" in row["note"]
    (row,) = correctness.check("pissa", "triton", "fp32", correctness.Shape((2,), 4, 5, 6))
    assert (row["ok"], "r=6" in row["note"]) == ("refused", True)
