import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(__file__).resolve().parent.parent / "build/torch_extensions"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["FUSED_PEFT_CACHE"] = str(
    Path(tempfile.gettempdir()) / f"fused_peft-tests-{os.getpid()}"
)  # no one's records
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are imported

import fused_peft
from fused_peft.core import dispatch, records

if not torch.cuda.is_available():
    dispatch.ON_GPU.clear()  # tests that speak of a GPU build nothing for it

# what compiles, starts processes or trains for long: `make check` leaves it out
SLOW = """accelerate accelerate_api accelerate_embedding accelerate_methods aot bench calibrate checks compile configs
cuda decode distributed embedding estimate examples experts experts_peft export gpu grouped_kernels isolated
kernel_mutations layers merged messages methods nvrtc ops packaging peft_files peft_interop peft_methods plot prompt
reads register replay roofline round_trip schedule selftest trainable_copies trainer triton trl zero3"""
SLOW_FILES = {f"test_{name}" for name in SLOW.split()}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in SLOW_FILES or "recipe" in item.name or "command" in item.name:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _clean_state():
    """Every test starts with the same seed and leaves the dispatcher as it was."""
    torch.manual_seed(0)
    before = set(dispatch.backends())
    yield
    fused_peft.set_strict(False)
    fused_peft.set_backend(None)
    for name in set(dispatch.backends()) - before:
        dispatch.unregister(name)


@pytest.fixture(autouse=True, scope="module")
def _nothing_compiled():
    """No file's tests count towards another's limit of recompilations."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@pytest.fixture
def record(monkeypatch):
    """A function that makes records.of answer a record with these fields, for every device."""

    def tell(**fields) -> records.Record:
        known = records.Record("an H100", "1", "2", "3", "4", "2026-01-01", **fields)
        monkeypatch.setattr(records, "of", lambda problem: known)
        dispatch.choose.cache_clear()
        return known

    yield tell
    dispatch.choose.cache_clear()


@pytest.fixture
def poison():
    """Fresh allocations are filled with NaN, so an element that is never written fails the comparison."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
