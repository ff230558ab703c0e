"""A quantised frozen weight decoded by one Triton launch, on GPUs where that was seen to make PyTorch's bits.

A form (how codes and scales are read) is tested when a weight of it is first decoded to a dtype on a GPU. What fails is
off for the process, with a warning that says why, and PyTorch decodes as before.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..core import frozen
from ..core.frozen import Coded
from .triton import _missing, kernels

off: dict[tuple, str | None] = {}  # (device, dtype, form) -> why it is off; None: it passed


def failure(w: Coded, dtype: torch.dtype) -> str | None:
    """Why weights of w's form must not be decoded by the kernel on w's device; the package replaces this function."""
    return "nothing tests it, since fused_peft itself is not imported"


def form(w: Coded) -> tuple:
    """What decides about the machine code; a block as large as the weight is as large as any."""
    kinds = (None if t is None else t.dtype for t in (w.codes, w.scales, w.table, w.zeros))
    block = w.block if isinstance(w.block, int) else tuple(b * (b < n) for b, n in zip(w.block, w.shape, strict=True))
    return *kinds, block, w.high_first, w.nested and w.nested[3]


def _readable(w: Coded, dtype: torch.dtype) -> bool:
    """Whether the kernel can read the weight and write the dtype."""
    k, own = kernels().decode, (w.codes, w.scales, w.table, w.zeros, *(w.nested or ())[:3])
    known = (w.table is not None or w.codes.dtype in (torch.int8, k.E4M3)) and w.scales.dtype in k.SCALES
    whole = w.table is None or (w.block if isinstance(w.block, int) else w.shape[1]) % 2 == 0
    return dtype in k.DTYPES and known and whole and all(t is None or t.is_contiguous() for t in own)


def _runs(device: torch.device) -> bool:
    """Whether Triton's kernels run there: on a GPU, in the interpreter, or on paper."""
    if _missing() or torch.version.hip:
        return False
    if device.type == "cuda":
        return kernels().launch.arch_of(device) >= (8, 0)
    return kernels().launch.recording() if device.type == "meta" else kernels().launch.interpreting()


def in_one_launch(w: Coded, dtype: torch.dtype) -> Tensor | None:
    """For ``core.frozen``: W in a dtype, or None where PyTorch is to decode it."""
    device = w.codes.device
    if _runs(device) and _readable(w, dtype) and (device.type == "meta" or _passed(w, dtype)):
        return kernels().decode.decoded(*w, dtype=dtype)
    return None


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _passed(w: Coded, dtype: torch.dtype) -> bool:
    key = (w.codes.device, dtype, *form(w))
    if key not in off:
        if _capturing(w.codes.device):
            return False  # the test waits for the GPU
        off[key] = why = failure(w, dtype)
        if why:
            warnings.warn(f"The kernel that decodes a frozen weight is off on {key[0]}, and PyTorch decodes it: {why}",
                          stacklevel=2)  # fmt: skip
    return off[key] is None


frozen.in_one_launch = in_one_launch
