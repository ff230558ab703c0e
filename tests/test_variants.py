"""How many kernels a model compiles while its row counts change: a call that compiles one more takes seconds."""

import random
import subprocess
import sys

import pytest
from test_aot import _compiling

pytest.importorskip("triton", reason="Triton runs on Linux")
LLAMA_3_8B = ((4096, 4096), (4096, 1024), (4096, 14336), (14336, 4096))  # K, N of its linear layers
MANY = sorted({8192, 200, *random.Random(0).choices(range(200, 8193), k=198)})
FEW = (1, 2, 7, 16, 33, 63, 64, 100)

_COUNT = """
import torch
from fused_peft.tools import compile_triton as aot
from fused_peft.backends.triton import Triton
found = {}
for M in ROWS:
    for K, N in LAYERS:
        o = aot._variant("lora", M, K, N, 16, torch.bfloat16, torch.float32)
        for phase, launch in aot._recorded(Triton(), o, (9, 0)):
            options = launch.kernel.__name__, launch.config.warps, launch.config.stages
            found.setdefault((options, repr(aot._signature(launch))), (M, K, N, phase))
for (options, _), first in found.items():
    print(*options, *first)
"""

_GROUPED = """
import torch
from fused_peft.tools import compile_triton as aot
from fused_peft.backends.triton import Triton
found = {}
for M in ROWS:
    for routing in ((M, 8, 128, 2048, 1536), (8 * M, 1, 128, 768, 2048)):
        o, groups = aot._grouped("experts-dropout", routing, 16, torch.bfloat16, torch.float32)
        for phase, launch in aot._recorded(Triton(), o, (9, 0), groups=groups):
            options = launch.kernel.__name__, launch.config.warps, launch.config.stages
            found.setdefault((options, repr(aot._signature(launch))), (M, routing, phase))
for (options, _), first in found.items():
    print(*options, *first)
"""


def _variants(rows, count=_COUNT):
    """Kernel, warps, stages, and what needed it first, of every kernel that LoRA on these rows compiles."""
    code = count.replace("ROWS", str(tuple(rows))).replace("LAYERS", str(LLAMA_3_8B))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_compiling())
    return run.stdout.splitlines()


def test_row_counts_that_change_compile_no_more_kernels():
    many, all_of_them = _variants(MANY), _variants([*MANY, *FEW])
    assert len(many) <= 10, many
    assert len(all_of_them) <= 16, all_of_them


def test_token_counts_that_change_compile_no_more_kernels_for_experts():
    """The table and the sums; for each of three sizes of tile, down and the GEMM of both stacks and of backward."""
    many, all_of_them = _variants(MANY[-40:], _GROUPED), _variants([*MANY[::5], *FEW], _GROUPED)
    assert len(many) <= 10, many
    assert len(all_of_them) <= 22, all_of_them
