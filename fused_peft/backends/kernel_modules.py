"""The kernel modules, by name.

Import this inside a function, through ``triton.kernels()``: the modules need Triton, which may be missing, and Triton
reads TRITON_INTERPRET when they are imported.
"""

from ..core import records
from ..kernels import (
    coded,
    configs,
    decode,
    down,
    dropout,
    gemm_lowrank,
    grouped,
    hadamard,
    launch,
    outer,
    row_norm,
    scale,
    triton_internals,
)

if triton_internals.no_gluon() is None:
    from ..kernels import gemm_gluon
else:
    gemm_gluon = None

__all__ = [
    "coded",
    "configs",
    "decode",
    "down",
    "dropout",
    "gemm_gluon",
    "gemm_lowrank",
    "grouped",
    "hadamard",
    "launch",
    "outer",
    "row_norm",
    "scale",
    "triton_internals",
]

configs.table = records.tiles
records.ON_FORGET.append(configs.choose)
