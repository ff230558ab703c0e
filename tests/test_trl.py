"""TRL's SFTTrainer, DPOTrainer and GRPOTrainer with this library's configs and models, where TRL is set up."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SITE = HERE.parent / ".venv/trl"  # apart from the environment, as set-up puts it
pytestmark = pytest.mark.skipif(
    not (SITE / "trl").is_dir() and importlib.util.find_spec("trl") is None,
    reason="TRL is not installed: make .venv/trl",
)
FIVE = ("lora", "dora", "ssb", "adalora", "flora")
five = pytest.mark.parametrize("name", FIVE)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    paths = filter(None, [os.environ.get("PYTHONPATH"), str(SITE) if SITE.is_dir() else None])
    run = subprocess.run(
        [sys.executable, HERE / "trl_run.py", tmp_path_factory.mktemp("trl")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout.splitlines()[-1])


def near(losses):
    return pytest.approx(losses, rel=1e-5)


@five
def test_fine_tuning_from_a_config_and_of_an_adapted_model(found, name):
    it = found["sft"][name]
    assert it["losses"] == near(it.get("stock", it["losses"]))
    assert it["theirs"] == near(it["ours"]) or name == "adalora"  # PEFT's adds a penalty to the loss
    assert it["losses"][-1] != it["losses"][0]
    assert it["resumed"]
    assert it["fused"]
    assert it["reloaded"] < 1e-5
    for keys in (it["keys"], it["our keys"]):
        assert keys
        assert not [key for key in keys if re.search(r"embed_tokens|_proj\.weight", key)]


@five
def test_the_reference_is_the_adapter_as_training_begins(found, name):
    it = found["dpo"][name]
    assert {door: losses[0] for door, losses in it.items()} == {door: pytest.approx(math.log(2), 1e-6) for door in it}
    assert it["config"] == near(it.get("stock", it["config"]))
    assert all(losses[-1] != losses[0] for losses in it.values())


@five
def test_a_policy_is_trained_from_a_config(found, name):
    it = found["grpo"][name]
    assert it["ours"] == pytest.approx(it.get("stock", it["ours"]), rel=1e-4, abs=1e-7)
    assert it["ours"][1] != 0


def test_a_reference_that_would_be_another_is_refused(found):
    assert "the reference of GRPOTrainer would be its base" in found["refused"]
