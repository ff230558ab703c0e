"""The figures of accuracy: every method, dtype and gradient against fp64, and against plain PyTorch's error."""

import pytest
import torch

from fused_peft.core import eager
from fused_peft.methods import METHODS
from fused_peft.tools import verify


@pytest.mark.parametrize("dtype", verify.LIMITS, ids=str)
@pytest.mark.parametrize("name", verify.configs())
def test_error_is_within_the_limit_and_no_worse_than_plain_pytorch(name, dtype):
    for tensor, (error, plain) in verify.measure(verify.configs()[name], dtype).items():
        row = verify.Row(name, dtype, tensor, error, plain)
        assert row.ok, row


@pytest.mark.parametrize("dtype", verify.LIMITS, ids=str)
@pytest.mark.parametrize("name", ["lora", "dora", "ssb", "ia3", "lora_xs", "lora+dropout"])
def test_layers_larger_than_the_cache(name, dtype, monkeypatch):
    """What the CPU backend does with large layers: block by block, by batch norm's kernel, with B by columns."""
    for constant, small in {"BLOCK": 10_000, "MANY": 1, "TALL": 1, "LONG": 1}.items():
        monkeypatch.setattr(eager, constant, small)
    for tensor, (error, plain) in verify.measure(verify.configs()[name], dtype).items():
        row = verify.Row(name.partition("+")[0], dtype, tensor, error, plain)
        assert row.ok, row


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_adapters_are_no_worse_than_plain_pytorch(dtype):
    for name, config in verify.configs().items():
        for tensor, (error, plain) in verify.measure(config, dtype, adapter_dtype=dtype).items():
            # no absolute limit: the gradient itself is rounded to half precision
            assert error <= verify.EAGER_FACTOR * plain, (name, tensor, error, plain)


def test_every_method_is_verified():
    assert {type(c) for c in verify.configs().values()} == {m.config for m in METHODS.values()}


def test_a_row_over_its_limit_is_not_ok():
    assert verify.Row("m", torch.float32, "y", 5e-7, 5e-7).ok
    assert not verify.Row("m", torch.float32, "y", 2e-6, 2e-6).ok
    assert not verify.Row("m", torch.float32, "y", 5e-7, 3e-7).ok
    assert not verify.Row("m", torch.float32, "y", float("nan"), 3e-7).ok
