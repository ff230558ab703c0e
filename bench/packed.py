"""What decoding a quantised frozen weight in forward and again in backward adds to a LoRA step, predicted for an H100.
Nothing is measured.

    python bench/packed.py [--out bench/results/packed_predicted.csv]

Launches as ``roofline`` counts them, at the rates of ``backends.rates`` for sm_90: time = Σ max(FLOPs / rate, bytes /
bandwidth). A decode reads codes and scales and writes W in bf16; that a small W may still be in the cache when the
product reads it is not counted, nor is the host's time. ``ratio``: the step with both decodes over the step on a dense
weight. ``inside``: the same if each product took codes and scales in place of W and decoded them for nothing, the
least that ``kernels/coded.py``, which decodes in its loop of at most 64 rows, could take.
"""

from __future__ import annotations

from itertools import product

import tables
import torch
from roofline import ARCH, FP32, Launch, Shape, _kernel, schedule

from fused_peft.backends import decode, rates
from fused_peft.backends.kernel_modules import launch
from fused_peft.tools.compile_triton import weights

WIDTHS, ROWS, R = ((4096, 4096), (4096, 14336)), (8192, 1024, 16), 16  # K, N
FORMATS = ("nf4-nested", "int8", "fp8", "mxfp4")
HALF, SINGLE, BANDWIDTH = rates.rates(ARCH)


def seconds(launches: list[Launch], saved: int = 0) -> float:
    """Of launches; ``saved``: bytes that each product with the frozen weight reads less."""
    most = max(x.flops for x in launches)
    products = {id(x) for x in launches if 2 * x.flops > most > 0}
    return sum(
        max(x.flops / (SINGLE if x.rate == FP32 else HALF), (x.bytes - saved * (id(x) in products)) / BANDWIDTH)
        for x in launches
    )


def decoded(name: str, K: int, N: int) -> Launch:
    with launch.record(ARCH) as found:
        decode.in_one_launch(dict(weights(N, K))[name], torch.bfloat16)
    return _kernel(found[0])


def rows() -> list[dict[str, str | int]]:
    found = []
    for (K, N), name, M in product(WIDTHS, FORMATS, ROWS):
        one, step = decoded(name, K, N), schedule("ours", "lora", Shape(M, K, N, R), True)
        dense, W = seconds(step), 2 * N * K
        found.append({
            "format": name, "K": K, "N": N, "M": M, "r": R, "basis": "predicted, H100",
            "decode_mbytes": f"{one.bytes / 1e6:.1f}", "decode_us": f"{1e6 * seconds([one]):.1f}",
            "dense_us": f"{1e6 * dense:.1f}", "ratio": f"{(dense + 2 * seconds([one])) / dense:.3f}",
            "inside": f"{seconds(step, 2 * W - one.bytes) / dense:.3f}",
        })  # fmt: skip
    return found


if __name__ == "__main__":
    tables.command(__doc__, rows)
