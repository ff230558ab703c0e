"""A quantised frozen weight decoded by one Triton launch, on GPUs where that was seen to make PyTorch's bits; or of few
rows in the loop of the product, on GPUs where ``fused_peft.calibrate`` saw it right, and faster.

A form (how codes and scales are read) is tested when a weight of it is first decoded to a dtype on a GPU. What fails is
off for the process, with a warning that says why, and PyTorch decodes as before.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from ..core import dispatch, frozen, records
from ..core.frozen import Coded
from ..core.operands import Problem, place
from .triton import _missing, kernels

NAME = "triton"  # of the product that decodes in its loop, in records; eager's decodes first
off: dict[tuple, str | None] = {}  # (device, dtype, form) -> why it is off; None: it passed


def failure(w: Coded, dtype: torch.dtype) -> str | None:
    """Why weights of w's form must not be decoded by the kernel on w's device; the package replaces this function."""
    return "nothing tests it, since fused_peft itself is not imported"


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
    key = (w.codes.device, dtype, w.form)
    if key not in off:
        if _capturing(w.codes.device):
            return False  # the test waits for the GPU
        off[key] = why = failure(w, dtype)
        if why:
            warnings.warn(f"The kernel that decodes a frozen weight is off on {key[0]}, and PyTorch decodes it: {why}",
                          stacklevel=2)  # fmt: skip
    return off[key] is None


def product_of(w: Coded, M: int, dtype: torch.dtype) -> Problem:
    """The product of M rows with a weight, as records know it: an operand w of its codes."""
    N, K = w.shape
    return Problem(**place(w.codes.device), dtype=dtype, adapter_dtype=None, M=M, K=K, N=N, r=0,
                   present=frozenset({"x", "w"}), stored=w.form)  # fmt: skip


def multiplies(w: Coded, M: int, dtype: torch.dtype) -> bool:
    """Whether the kernel that decodes in its loop can take M rows of a dtype."""
    if not (_runs(w.codes.device) and _readable(w, dtype) and dtype.itemsize == 2):
        return False
    return M <= kernels().coded.ROWS and not (isinstance(w.block, int) and w.shape[1] % w.block)


def in_loop(w: Coded, x: Tensor, back: bool) -> Tensor | None:
    """For ``core.frozen``: x Wᵀ or x W, or None where W is to be decoded first."""
    return kernels().coded.multiplied(x, back, *w) if takes(w, x.shape[0], x.dtype) else None


def takes(w: Coded, M: int, dtype: torch.dtype) -> bool:
    """Whether a product of M rows decodes in its loop: where that was seen right and faster, or is asked for."""
    return multiplies(w, M, dtype) and _chosen(product_of(w, M, dtype))


def _chosen(p: Problem) -> bool:
    forced = dispatch.forced()
    return _faster(p) if forced is None else forced == NAME


@cache
def _faster(p: Problem) -> bool:
    """Whether it was seen right and faster on this GPU, forward and backward; unmeasured it is not used."""
    found = records.measured(p, NAME)
    return records.tested(p, NAME) and found is not None and found[0] < 1


records.ON_FORGET.append(_faster)
frozen.in_one_launch, frozen.in_loop = in_one_launch, in_loop
