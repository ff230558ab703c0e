"""The dropout mask: its statistics, and the same bits in PyTorch, Triton and C++."""

import math
import os
import shutil
import subprocess
import sys

import pytest
import torch

import fused_peft as fp
from fused_peft.core.dropout import Mask, keep_mask, new_seed, threshold

N = 1 << 21


def signed(seed, n=N):
    """Uniform values in (-1, 1), read back through masks of every threshold bit."""
    from fused_peft.core.dropout import _bits

    return (_bits(seed, n).double() + 0.5) / 32768


def z_of_products(u, v):
    """Σ u v in standard deviations of independent uniforms."""
    return 3 * (u * v).sum().item() / math.sqrt(u.numel())


@pytest.mark.parametrize("words", [(0, 0), (1, 0), (0, 1), (-1, -(2**31)), (123456789, -987654321)])
def test_bits_are_uniform_and_uncorrelated(words):
    seed = torch.tensor(words, dtype=torch.int32)
    u = signed(seed)
    counts = torch.histc(u, 4096, -1, 1)
    chi2 = ((counts - N / 4096).square() / (N / 4096)).sum().item()
    assert abs(chi2 - 4095) < 5 * math.sqrt(2 * 4095)
    assert all(abs(z_of_products(u[:-lag], u[lag:])) < 5 for lag in (1, 2, 3, 8, 64, 1024, 4096))
    for word in range(2):
        for change in (1, 1 << 16, -(1 << 31)):
            other = seed.clone()
            other[word] ^= change
            assert abs(z_of_products(u, signed(other))) < 5


@pytest.mark.parametrize("p", [0.001, 0.05, 0.1, 0.5, 0.9])
def test_kept_fraction_by_row_and_column(p):
    keep = keep_mask(new_seed(torch.device("cpu")), (1024, 2048), p).double()
    sigma = math.sqrt(p * (1 - p))
    assert abs(keep.mean().item() - (1 - p)) < 5 * sigma / math.sqrt(keep.numel()) + 2**-16
    for dim in (0, 1):
        z = (keep.mean(dim) - (1 - p)) * math.sqrt(keep.shape[dim]) / sigma
        assert 0.9 < z.std().item() < 1.1


def test_threshold_covers_the_whole_range():
    assert threshold(0.0) == -32768
    assert threshold(0.5) == 0
    assert threshold(1 - 1e-9) == 32767


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 7), (4, 8), (1, 1), (0, 3)])
def test_mask_applies_the_same_elements_in_every_dtype(dtype, shape, poison):
    seed = new_seed(torch.device("cpu"))
    x = torch.randn(shape).to(dtype)
    want = torch.where(keep_mask(seed, shape, 0.4), x, torch.zeros((), dtype=dtype))
    assert torch.equal(Mask(seed, shape, 0.4)(x), want)
    assert torch.equal(Mask(seed, shape, 0.4)(x.T.contiguous().T), want)


def test_seeds_follow_manual_seed():
    cpu = torch.device("cpu")
    torch.manual_seed(4)
    first = new_seed(cpu)
    assert not torch.equal(first, new_seed(cpu))
    torch.manual_seed(4)
    assert torch.equal(first, new_seed(cpu))


_TRITON = """
import torch
from fused_peft.backends import triton as backend
from fused_peft.core.dropout import Mask, in_one_launch, keep_mask, threshold
from fused_peft.kernels.dropout import mask
for words, n, p in (((0, 0), 1000, 0.3), ((-5, 77), 1001, 0.9), ((2**31 - 1, -2**31), 64, 0.0), ((3, 4), 1, 0.5),
                    ((5, 6), 4097, 0.5), ((7, 8), 0, 0.5)):
    seed = torch.tensor(words, dtype=torch.int32)
    assert torch.equal(mask(seed, n, threshold(p)), keep_mask(seed, (n,), p)), (words, n, p)
assert in_one_launch(seed, 7, 0) is None  # on a CPU
from fused_peft.core import dropout
dropout.in_one_launch = mask
for dtype in (torch.float16, torch.bfloat16, torch.float32):
    x = torch.randn(33, 7).to(dtype)
    kept = Mask(seed, x.shape, 0.4)
    assert kept.bits is None
    for x in (x, x.T.contiguous().T):
        want = torch.where(keep_mask(seed, x.shape, 0.4), x, 0)
        assert kept(x).dtype == dtype
        assert torch.equal(kept(x), want)
assert torch.func.vmap(lambda s: Mask(s, (4,), 0.4).bits, randomness="same")(torch.stack([seed, seed])).shape == (2, 4)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")
def test_triton_kernel_gives_the_same_bits():
    subprocess.run([sys.executable, "-c", _TRITON], check=True, env={**os.environ, "TRITON_INTERPRET": "1"})


_CPP = """
#include <cstdio>
#include "dropout.cuh"
int main() {
  const int32_t seed[2] = {-5, 77};
  for (uint32_t e = 0; e < 1001; ++e) std::putchar(fused_peft::keep(seed, e, THRESHOLD) ? '1' : '0');
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_cpp_header_gives_the_same_bits(tmp_path):
    (tmp_path / "main.cpp").write_text(_CPP)
    include = f"-I{fp.source_dir('csrc')}"
    define = f"-DTHRESHOLD={threshold(0.3)}"
    subprocess.run(["g++", "-Wall", "-Werror", include, define, "main.cpp", "-o", "keep"], cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "keep"], capture_output=True, text=True, check=True).stdout
    want = keep_mask(torch.tensor([-5, 77], dtype=torch.int32), (1001,), 0.3)
    assert printed == "".join("01"[k] for k in want.tolist())
