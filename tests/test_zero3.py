"""Every method with parameters that DeepSpeed ZeRO-3 holds in parts, and under ZeRO-2, if it installs."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fused_peft.methods import METHODS

HERE = Path(__file__).resolve().parent
SITE = HERE.parent / ".venv/deepspeed"  # apart from the environment, as set-up puts it
pytestmark = pytest.mark.skipif(
    not (SITE / "deepspeed").is_dir() and importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: make .venv/deepspeed",
)


# the steps compared: DeLoRA's norms, clamped at 1e-4, make much of a rounding at the start
BEFORE = {name: slice(1 if name == "delora" else None) for name in METHODS}


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def found(request, tmp_path_factory):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folder = tmp_path_factory.mktemp("zero3")
    paths = filter(None, [str(SITE), os.environ.get("PYTHONPATH")])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(request.param):
        command = [sys.executable, HERE / "zero3_run.py", folder, port, rank, request.param, *METHODS]
        with (folder / f"said{rank}").open("w") as said:
            to = subprocess.PIPE if rank == 0 else said
            processes.append(subprocess.Popen([*map(str, command)], env=env, stdout=to, stderr=said, text=True))
    try:
        printed, _ = processes[0].communicate(timeout=900)
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 0, "\n".join(f.read_text()[-4000:] for f in sorted(folder.glob("said*")))
    return json.loads(printed.splitlines()[-1])


@pytest.mark.parametrize("name", METHODS)
def test_training_saving_loading_and_merging(found, name):
    it = found[name]
    steps = BEFORE[name]
    assert it["losses"][steps] == pytest.approx(it["want"][steps], rel=1e-5)
    assert it["losses"][-1] != it["losses"][0]
    assert it["counts"][0] == it["counts"][1]
    assert it["shapes"], "the files hold tensors of other shapes than a plain model's"
    assert it["trained"] < 1e-5 or name == "delora"
    assert it["reloaded"] < 1e-6
    assert it.get("merged", 0) < 1e-5
    assert ("merged" in it) == (METHODS[name].output is None and name != "parallel_adapter")
    assert it["unmerged"] == 0
    assert it["disabled"] < 1e-6
    assert it["overwritten"] > 1e-3
    assert it["loaded back"] < 1e-6
    assert "ZeRO-3 manages" in it["merge_and_unload"]


@pytest.mark.parametrize("name", METHODS)
def test_training_and_saving_under_stage_two(found, name):
    it = found[name]["stage two"]
    assert it["losses"][BEFORE[name]] == pytest.approx(it["want"][BEFORE[name]], rel=1e-6)
    assert it["losses"][-1] != it["losses"][0]
    assert it["reloaded"] < 1e-6


def test_a_penalty_without_a_gradient_is_refused(found):
    assert "ZeRO-3" in found["lora"]["mpc_penalty"]
