"""One way to start a kernel, on a GPU, in Triton's interpreter, or only on paper for ahead-of-time compilation."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .configs import Config
from .triton_internals import arg_names, interpreted

TL = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


class Launch(NamedTuple):
    """A kernel, its grid, its arguments by name in order, and the tile config they came from."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    config: Config


_recorded: list[Launch] | None = None
_told = threading.local()
_arch: tuple[int, int] | None = None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when they were imported)."""
    return interpreted(_probe)


@triton.jit
def _probe():
    pass


@contextmanager
def pretend(arch: tuple[int, int]) -> Iterator[None]:
    """Choose kernels and configs as for another architecture."""
    global _arch
    before, _arch = _arch, arch
    try:
        yield
    finally:
        _arch = before


@contextmanager
def record(arch: tuple[int, int]) -> Iterator[list[Launch]]:
    """Collect the launches instead of making them; operands may be meta tensors."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        with pretend(arch):
            yield _recorded
    finally:
        _recorded = before


def recording() -> bool:
    """Whether launches are written down instead of made."""
    return _recorded is not None


@cache
def _properties(index: int) -> tuple[tuple[int, int], int]:
    p = torch.cuda.get_device_properties(index)
    return (p.major, p.minor), p.multi_processor_count


def arch_of(device: torch.device) -> tuple[int, int]:
    if _arch is not None:
        return _arch
    return _properties(device.index)[0] if device.type == "cuda" else (9, 0)


@cache
def most_processors() -> float:
    """FUSED_PEFT_SMS: streaming multiprocessors that a persistent GEMM takes at most, so that NCCL's kernels, for one,
    find some free. Raises ValueError where it is no positive integer."""
    said = os.environ.get("FUSED_PEFT_SMS", "")
    if said and not (said.isdecimal() and int(said)):
        raise ValueError(f"FUSED_PEFT_SMS={said!r} must be a positive integer, or unset for all of the GPU")
    return int(said) if said else float("inf")


def processors(device: torch.device) -> int:
    """Streaming multiprocessors to fill; an H200's where there is no GPU to ask."""
    there = _properties(device.index)[1] if device.type == "cuda" else 132
    return min(there, most_processors())


def precision(dtype: torch.dtype) -> str:
    """How products of a dtype are taken: fp32 in full unless torch allows tf32."""
    if dtype == torch.float32:
        # not allow_tf32: reading it raises once a user has set the newer fp32_precision
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "widen" if dtype == torch.bfloat16 and interpreting() else "ieee"


def acc(dtype: torch.dtype) -> tl.dtype:
    """What sums of a dtype are held in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def strides(t: torch.Tensor | None) -> tuple[int, int]:
    """Of a matrix; zeros for an absent one."""
    return (0, 0) if t is None else t.stride()


def submit(kernel, grid: tuple[int, ...], args: dict[str, Any], config: Config, device: torch.device) -> None:
    """Start the kernel on the current stream of ``device``, or write the launch down while recording. Of ``args`` the
    kernel takes those it names."""
    args = {name: args[name] for name in arg_names(kernel)}
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, config))
        return
    tell(kernel, grid, args, config, start(kernel, grid, args, config, device))


def tell(*launch) -> None:
    """Tell this thread's listener, if it has one, of a launch that ``submit`` did not make, as ``submit`` tells."""
    if (listener := getattr(_told, "listener", None)) is not None:
        listener(*launch)


def start(kernel, grid: tuple[int, ...], args: dict[str, Any], config: Config, device: torch.device):
    """Start the kernel with just its arguments; what Triton compiled for them."""
    with on(device):
        return kernel[grid](**args, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=config.fuse)


@contextmanager
def listening(listener: Callable) -> Iterator[None]:
    """Tell ``listener`` of every launch that this thread makes: kernel, grid, args, config, what Triton compiled."""
    _told.listener = listener
    try:
        yield
    finally:
        _told.listener = None


def on(device: torch.device):
    """What makes a device the current one, where it is not."""
    there = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if there else nullcontext()


def stream(device: torch.device) -> int | None:
    """The current stream of a device as CUDA names it; None where there is no GPU."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else None
