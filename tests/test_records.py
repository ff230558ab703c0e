"""Records of a GPU: what they hold for, what is nearest, and what becomes of broken and foreign ones."""

import json
import warnings
from dataclasses import asdict, replace

import pytest
import torch

from fused_peft.core import dispatch, records
from fused_peft.core.operands import Problem
from fused_peft.core.records import Record

GPU = {"gpu": "GPU X", "driver": "1.2", "torch": torch.__version__, "triton": "3.9.0", "kernels": "abc"}
PROBLEM = Problem("cuda", (9, 0), torch.bfloat16, torch.float32, 8192, 4096, 4096, 16, frozenset({"x", "w", "A", "B"}))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """One GPU X, and folders for records of its own."""
    monkeypatch.setenv("FUSED_PEFT_CACHE", str(tmp_path / "user"))
    monkeypatch.setattr(records, "source_dir", lambda name: tmp_path / name)
    monkeypatch.setattr(records, "identity", lambda device: dict(GPU))
    monkeypatch.setattr(records, "_held", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=0: (9, 0))
    records.forget()
    yield tmp_path
    monkeypatch.undo()
    records.forget()


def call(p=PROBLEM, **ms):
    return {**records.described(p), "ms": ms or {"triton": 1.2, "cublas": 1.0, "eager": 1.1}}


def made(**fields):
    return Record(**GPU, **{"when": "2026-01-01", **fields})


def write(folder, record, name=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / (name or record.name)).write_text(json.dumps(asdict(record)))
    records.forget()


def test_kept_and_found_again(machine):
    assert records.of(PROBLEM) is None
    record = made(calls=[call()], passed=["cublas low bf16"], failed={"triton low bf16": "dB"}, tiles={"outer a": [1]})
    file = records.keep(record)
    assert file.parent == machine / "user"
    assert list(file.parent.iterdir()) == [file]
    records._held.clear()  # as in another process
    records.forget()
    assert records.of(PROBLEM) == record == records.read(file)
    assert records.tiles() == {"outer a": [1]}
    assert records.tested(PROBLEM, "cublas")
    assert records.failed(PROBLEM, "triton") == "its self-test failed on GPU X, 2026-01-01: dB"
    assert records.failed(PROBLEM, "cublas") is None


def test_what_is_kept_later_counts(machine):
    records.keep(made(calls=[call(triton=1.0, cublas=2.0)], failed={"triton low bf16": "dB", "cuda low bf16": "y"}))
    other = call(replace(PROBLEM, M=256), triton=3.0)
    records.keep(
        made(
            calls=[call(triton=5.0, cublas=2.0), other],
            passed=["triton low bf16", "cublas low bf16"],
            when="2026-02-02",
        )
    )
    found = records.of(PROBLEM)
    assert found.calls == [call(triton=5.0, cublas=2.0), other]
    assert (found.failed.keys(), found.passed) == ({"cuda low bf16", "triton low bf16"}, ["cublas low bf16"])
    assert found.when == "2026-02-02"


def test_the_users_record_counts_more_than_the_committed_one(machine):
    write(machine / "kernels/records", made(calls=[call(triton=1.0, cublas=2.0)]))
    assert records.measured(PROBLEM, "triton")[0] == 0.5
    write(machine / "user", made(calls=[call(triton=4.0, cublas=2.0)]))
    assert records.measured(PROBLEM, "triton") == (2.0, "on 8192 x 4096 x 4096, GPU X, 2026-01-01")


@pytest.mark.parametrize("name", ["driver", "torch", "triton", "kernels"])
def test_a_foreign_record_is_named_and_ignored(machine, name):
    foreign = replace(made(calls=[call()]), **{name: "another"})
    write(machine / "user", foreign)
    with pytest.warns(UserWarning, match=f"made with others: .*{name} another, not .*It is not used"):
        assert records.of(PROBLEM) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert records.measured(PROBLEM, "triton") is None  # told once
    write(machine / "user", replace(foreign, gpu="GPU Y"))  # another GPU's record is nobody's fault
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records.forget()
        (machine / "user" / foreign.name).unlink()
        assert records.of(PROBLEM) is None


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"gpu": "GPU X"}', json.dumps({**GPU, "unknown": 1}), json.dumps({**GPU, "calls": [{}]}),
     json.dumps({**GPU, "calls": [{**call(), "ms": {}}]}), json.dumps({**GPU, "calls": [{**call(), "ms": {"a": -1}}]}),
     json.dumps({**GPU, "failed": [1]}), "\\x00\\xff"],
)  # fmt: skip
def test_a_broken_record_is_named_and_the_run_goes_on(machine, text):
    write(machine / "user", made(calls=[call()]))
    (machine / "user/broken.json").write_text(text)
    records.forget()
    with pytest.warns(UserWarning, match=r"broken\.json is no record of fused_peft .*delete it; which GEMM runs is"):
        assert records.measured(PROBLEM, "cublas")[0] == pytest.approx(1 / 1.1)


def test_a_broken_file_is_replaced_by_what_is_kept(machine):
    record = made(calls=[call()])
    write(machine / "user", record)
    (machine / "user" / record.name).write_text("{")
    assert records.read(records.keep(record)) == record


def test_a_full_disk_leaves_the_file_as_it_was(machine, monkeypatch):
    file = records.keep(made(calls=[call()]))
    before = file.read_text()

    def full(self, text):
        self.open("w").write(text[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(file), "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        records.keep(made(calls=[call(triton=9.0, cublas=1.0)]))
    assert file.read_text() == before
    assert list(file.parent.iterdir()) == [file]
    assert records.measured(PROBLEM, "triton")[0] == 9  # this process knows


@pytest.mark.parametrize(
    ("changes", "there"),
    [
        ({}, True),
        ({"M": 4096}, True),
        ({"M": 32768}, True),
        ({"M": 2048}, True),
        ({"M": 2047}, False),
        ({"N": 5000}, True),
        ({"N": 14336}, False),
        ({"K": 8192}, True),
        ({"K": 8192, "N": 8192}, False),
        ({"r": 64}, True),
        ({"dtype": torch.float16}, False),
        ({"p": 0.1}, False),  # another kind of call
        ({"present": PROBLEM.present | {"d_out"}}, False),
        ({"present": PROBLEM.present | {"bias"}}, True),
        ({"hadamard": True}, False),
    ],
)
def test_what_is_near(machine, changes, there):
    records.keep(made(calls=[call()]))
    assert (records.measured(replace(PROBLEM, **changes), "triton") is not None) == there


def test_the_nearest_of_several(machine):
    sizes = [replace(PROBLEM, M=M) for M in (256, 1024, 8192)]
    records.keep(made(calls=[call(p, triton=float(p.M), cublas=1.0) for p in sizes]))
    for M, nearest in ((100, 256), (400, 256), (600, 1024), (2500, 1024), (3500, 8192), (20000, 8192)):
        assert records.measured(replace(PROBLEM, M=M), "triton")[0] == nearest


def test_a_ratio_is_to_the_fastest_after_it(machine):
    records.keep(made(calls=[call(cuda=3.0, gluon=4.0, triton=2.0, cublas=4.0, eager=5.0)]))
    ratios = {name: records.measured(PROBLEM, name) for name in records.ORDER}
    assert [r and r[0] for r in ratios.values()] == [1.5, 2.0, 0.5, 0.8, None]
    records.keep(made(calls=[call(triton=2.0, eager=5.0)]))
    assert records.measured(PROBLEM, "cublas") is None


def test_what_stands_in_the_order_is_registered():
    assert set(records.ORDER) == set(dispatch.backends())
    names = [*dispatch._priority["cuda"], "eager"]
    assert list(records.ORDER) == names


def test_the_hash_is_of_what_computes(monkeypatch, tmp_path):
    for name, file in (
        ("kernels", "outer.py"),
        ("csrc", "gemm.cuh"),
        ("backends", "triton.py"),
        ("backends", "rates.py"),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / file).write_text("1")
    monkeypatch.setattr(records, "source_dir", lambda name: tmp_path / name)
    monkeypatch.setattr(records, "PACKAGE", tmp_path)
    seen = set()
    for name in ("kernels/outer.py", "csrc/gemm.cuh", "backends/triton.py"):
        seen.add(records.kernels_hash.__wrapped__())
        (tmp_path / name).write_text("2")
    seen.add(records.kernels_hash.__wrapped__())
    assert len(seen) == 4
    (tmp_path / "backends/rates.py").write_text("2")  # what is predicted is not what was measured
    assert records.kernels_hash.__wrapped__() in seen


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Fri Jan 24 2025\nGCC version: 12.2.0",
            "570.86.15",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root)", "580.65.06"),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183  Wed\n", "535.183"),
    ],
)
def test_the_drivers_version(monkeypatch, text, driver):
    monkeypatch.setattr(records.Path, "read_text", lambda self: text)
    assert records._driver.__wrapped__() == driver


def test_an_unknown_driver_is_called_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(records, "Path", lambda name: records.PACKAGE / "nowhere")
    assert records._driver.__wrapped__() == "unknown"


def test_committed_records_can_be_read():
    for file in (records.source_dir("kernels") / "records").glob("*.json"):
        record = records.read(file)
        assert record.name == file.name
        assert record.gpu != records.INTERPRETER
