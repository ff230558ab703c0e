"""Calls replayed without Python: csrc/replay.cpp, and how a backend's work on one call becomes a plan for it.

A class of calls (sizes, strides, dtypes, alignments, numbers, wanted gradients) runs through Python when it is first
seen. The second time it is watched: the operations and launches of the backend, and from which tensor each of their
tensors comes. From then on only pointers change. What cannot be watched to the end has no plan, with the reason in
``without_plan``, and stays with Python.

The library is built with PyTorch's extension loader: a C++ compiler and ninja, no CUDA toolkit. That takes half a
minute once, in the background; until it is there, and where it cannot be built, calls go through Python.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from ..core import dispatch, ops, records
from ..core.operands import TENSORS, Operands, Problem
from ..core.ops import ACTIVATION_NAMES, FORWARD, NORM, OP_BACKWARD, OP_FORWARD
from ..core.paths import source_dir
from ..core.torch_internals import TorchDispatchMode
from . import built, extension
from .triton import kernels

PATIENCE = 300  # seconds: another process that builds it may have died

without_plan: Counter[str] = Counter()  # reason -> classes of calls
_module: types.ModuleType | None = None
_failure: str | None = None
_builder: threading.Thread | None = None
_lock = threading.Lock()


class NoPlan(Exception):
    """Why a call has no plan."""


# ---- building and loading


def expected() -> bool:
    """Whether calls on a GPU are replayed, or will be once the library is built."""
    return wanted() and _failure is None


def wanted() -> bool:
    """Whether calls are replayed at all: FUSED_PEFT_REPLAY=0 turns it off."""
    return os.environ.get("FUSED_PEFT_REPLAY", "1") != "0"


def state() -> str:
    """In words, for ``info``."""
    if not wanted():
        return "off: FUSED_PEFT_REPLAY=0"
    if _failure:
        return f"off: {_failure}"
    if _module is not None:
        return "on"
    return "being built, or read" if _builder is not None else "begins with the first call on a GPU"


def start() -> None:
    """Build and load the library in the background, once; ``ops`` uses it as soon as it is there."""
    global _builder
    with _lock:
        if _builder is None and wanted() and torch.cuda.is_available():
            _builder = threading.Thread(target=_load, name="fused_peft replay", daemon=True)
            _builder.start()


def ready() -> bool:
    """Build and load it, and wait for that; False where it cannot be, and ``state`` says why."""
    start()
    if _builder is not None:
        _builder.join(PATIENCE)
    return _module is not None


def _load() -> None:
    global _failure
    try:
        load(extension.DRIVER)
    except Exception as e:  # whatever a compiler, a loader or a driver says: Python does without
        said = str(e).strip().splitlines() or [type(e).__name__]
        _failure = next((line for line in said if "error" in line.lower()), said[0])


def load(driver: str | None) -> None:
    """Build and read the library, and replay calls with it, kernels through this driver; RuntimeError where it
    cannot be."""
    global _module
    module = _build()
    if driver is not None:
        module.open(driver)
    module.start(_answer)
    dispatch.ON_CHANGE.append(module.forget)
    _module, ops.host = module, module


@cache
def _build() -> types.ModuleType:
    compiler = os.environ.get("CXX", "c++")
    missing = [] if shutil.which(compiler) else [f"no C++ compiler {compiler} on PATH"]
    missing += [] if shutil.which("ninja", path=built.path()) else ["ninja is not installed (pip install ninja)"]
    if missing:
        raise RuntimeError(", ".join(missing))
    source, driver = source_dir("csrc") / "replay.cpp", source_dir("csrc") / "driver.h"
    parts = source.read_bytes(), driver.read_bytes(), f"{torch.__version__} {sys.implementation.cache_tag}".encode()
    version = hashlib.sha256(b"".join(parts)).hexdigest()[:12]
    name = f"fused_peft_replay_{version}"
    folder = built.root() / name
    with built.alone(folder, "building"):
        return built.load(name, [str(source)], folder, extra_cflags=["-O2", "-std=c++17"])


# ---- what Python computes, and the plan that it makes of it


_chosen: list[dispatch.Backend] = []  # those that a forward was computed by: csrc/replay.cpp keeps their places


def _answer(kind, tensors, s, p, h, flags, place, need, make):
    """(outputs, plan or None, whether backward reads x, and T, the place of the backend in ``_chosen``)."""
    numbers = (s, p, ACTIVATION_NAMES[h], bool(flags & 1), bool(flags & 2), bool(flags & 4))
    mine = tensors
    if make:  # apart even where two operands are one tensor
        mine = [None if t is None else t.detach() for t in tensors]
    with torch.no_grad():
        backend, compute = _prepared(kind, mine, numbers, place, tuple(need))
        outputs, plan = _watched(backend, compute, mine, _failed(kind, mine, numbers)) if make else (compute(), None)
    if backend not in _chosen:
        _chosen.append(backend)
    reads = ops._reads(tuple(need), numbers[2], numbers[5]) if kind == FORWARD else (False, False)
    return outputs, plan, *reads, _chosen.index(backend)


def _prepared(kind, tensors, numbers, place, need) -> tuple[dispatch.Backend, Callable[[], Sequence[Tensor | None]]]:
    """The backend that computes the call, and its computation."""
    if kind == NORM:
        W, squared, A, B = tensors
        backend = dispatch.backend_for(Operands(x=W, A=A, B=B, s=numbers[0]))
        return backend, lambda: [_settled(W, backend.row_norm, W, squared, A, B, numbers[0])]
    if kind in (FORWARD, OP_FORWARD):
        o = Operands(*tensors, (), *numbers)
        backend = dispatch.backend_for(o)
        if kind == OP_FORWARD:
            return backend, lambda: ops.op_forward(backend, o, need[0])
        return backend, lambda: backend.forward(o, need[ops.D_OUT])
    *operands, T, z, dy = tensors
    o = Operands(*operands, (), *numbers)
    if kind == OP_BACKWARD:
        backend = ops.op_backward_backend(dy, o, need)
        return backend, lambda: ops.op_backward(backend, dy, o, T, z, need)
    backend = _chosen[place]
    return backend, lambda: _settled(dy, backend.backward, dy, o, T, z, need)


def _failed(kind, tensors, numbers) -> str | None:
    """Why such calls are not replayed on this GPU: their self-test failed."""
    if kind == NORM:
        return None
    if kind not in (FORWARD, OP_FORWARD):  # dy, with as many rows, for an x that was not kept
        tensors = [tensors[-1], *tensors[1:TENSORS]]
    return records.failed(Problem.of(Operands(*tensors, (), *numbers)), "replay")


def _settled(t: Tensor, function: Callable, *args):
    """In the dtypes that the arguments have."""
    with ops.no_autocast(t.device.type):
        return function(*args)


def _watched(backend, compute, inputs, why: str | None):
    """What is computed, and its plan or None."""
    if not getattr(backend, "replays", True):
        without_plan[f"the {backend.name} backend starts kernels that cannot be watched"] += 1
        return compute(), None
    if why:
        without_plan[why] += 1
        return compute(), None
    recorder = Recorder(_module, inputs)
    with recorder:
        outputs = compute()
    try:
        return outputs, recorder.finished(outputs)
    except NoPlan as why:
        without_plan[str(why)] += 1
        return outputs, None


_ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class Recorder(TorchDispatchMode):
    """Watches a computation on ``inputs`` and makes a plan of it."""

    def __init__(self, host: types.ModuleType, inputs: Sequence[Tensor | None]):
        super().__init__()
        self.host, self.plan, self.inputs = host, host.Plan(len(inputs)), len(inputs)
        self.why: str | None = None
        self.known: dict[int, tuple[int, Tensor]] = {}  # by id: a slot, and the tensor that fills it
        self.kept = list(inputs)  # so that no id is used twice
        for slot, t in enumerate(inputs):
            if t is not None:
                self.known[id(t)] = slot, t

    def __enter__(self):
        self._listening = kernels().launch.listening(self.launched)
        self._listening.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._listening.__exit__(*error)

    def finished(self, outputs: Sequence[Tensor | None]):
        """The plan; NoPlan where something could not be followed."""
        if self.why is None:
            try:
                self.plan.finish([None if t is None else self._ref(t) for t in outputs], self.inputs)
            except NoPlan as e:
                self.why = str(e)
        if self.why is not None:
            raise NoPlan(self.why)
        return self.plan

    def _where(self, t: Tensor) -> tuple[int, Tensor]:
        """The slot whose tensor t is, or is a view of, and what fills it now."""
        if id(t) not in self.known:
            raise NoPlan("a tensor of unknown origin")
        return self.known[id(t)]

    def _ref(self, t: Tensor):
        slot, root = self._where(t)
        whole = t.shape == root.shape and t.stride() == root.stride() and t.storage_offset() == root.storage_offset()
        return self.host.Ref(slot, whole, t.shape, t.stride(), t.storage_offset() - root.storage_offset())

    def _keep(self, t: Tensor, slot: int, root: Tensor) -> None:
        self.kept.append(t)
        self.known[id(t)] = slot, root

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if self.why is None:
            try:
                self._operation(func, args, kwargs or {}, result)
            except NoPlan as e:
                self.why = str(e)
        return result

    def _operation(self, func, args, kwargs, result) -> None:
        name = func.overloadpacket.__name__
        schema = func._schema
        given = {a.name: a.default_value for a in schema.arguments}
        given |= dict(zip(given, args, strict=False)) | kwargs
        results = result if isinstance(result, (tuple, list)) else (result,)
        tensors = [v for v in given.values() if isinstance(v, Tensor)]
        if not all(isinstance(t, Tensor) for t in results):
            if tensors:
                raise NoPlan(f"aten::{name} has a result that is no tensor")
            return  # of dtypes and the like, which the class of calls fixes
        if name in _ALLOCATIONS:
            t = result
            self._keep(t, self.plan.empty(t.shape, t.stride(), t.is_contiguous(), t), t)
            return
        if not schema.is_mutable:
            of = {v.untyped_storage()._cdata: v for v in reversed(tensors)}
            sources = [of.get(t.untyped_storage()._cdata) for t in results]
            if all(v is not None and v.dtype == t.dtype for v, t in zip(sources, results, strict=True)):
                for v, t in zip(sources, results, strict=True):  # views, which cost nothing
                    self._keep(t, *self._where(v))
                return
        if any(isinstance(v, (list, tuple)) and any(isinstance(e, Tensor) for e in v) for v in given.values()):
            raise NoPlan(f"aten::{name} takes a list of tensors")
        arguments = [self._ref(v) if isinstance(v, Tensor) else v for v in given.values()]
        try:
            first = self.plan.operation(schema.name, schema.overload_name, arguments, schema.is_mutable)
        except RuntimeError as e:
            raise NoPlan(f"aten::{name}: {str(e).splitlines()[0]}") from e
        for i, t in enumerate(results):
            if schema.is_mutable:
                changed = next(v for v in tensors if v.untyped_storage()._cdata == t.untyped_storage()._cdata)
                self._keep(t, *self._where(changed))
            else:
                self._keep(t, first + i, t)

    def launched(self, kernel, grid, args, config, compiled) -> None:
        """As ``launch.submit`` tells of a launch."""
        if self.why is not None:
            return
        try:
            if isinstance(compiled, extension.Started):
                self._called(compiled)
            elif kernels().launch.interpreting():
                self._interpreted(kernel, grid, args, config)
            else:
                self._compiled(kernel, grid, args, compiled)
        except NoPlan as e:
            self.why = str(e)

    def _called(self, started: extension.Started) -> None:
        """A call of csrc/'s host side, which launches by itself."""
        pointers = [(at, self._pointer(t)) for at, t in started.pointers.items()]
        struct = started.struct
        self.plan.call(started.name, started.address(), bytes(struct), type(struct).stream.offset, pointers)

    def _interpreted(self, kernel, grid, args, config) -> None:
        """A launch in Triton's interpreter, which Python makes."""
        launch = kernels().launch
        base = lambda v: v if isinstance(v, Tensor) else getattr(v, "base", None)  # noqa: E731
        names = [name for name, v in args.items() if isinstance(base(v), Tensor)]
        describe = kernels().triton_internals.TensorDescriptor

        def again(*tensors: Tensor) -> None:
            given = dict(args)
            for name, t in zip(names, tensors, strict=True):
                v = args[name]
                given[name] = t if isinstance(v, Tensor) else describe.from_tensor(t, v.block_shape)
            launch.start(kernel, grid, given, config, tensors[0].device)

        self.plan.function(again, [self._ref(base(args[name])) for name in names])

    def _compiled(self, kernel, grid, args, compiled) -> None:
        about, parameters = compiled.metadata, []
        name = kernel.__name__
        for what in ("launch_pdl", "launch_cooperative_grid", "global_scratch_size", "profile_scratch_size"):
            if getattr(about, what, 0):
                raise NoPlan(f"{name} is launched with {what}")
        if getattr(about, "num_ctas", 1) != 1:
            raise NoPlan(f"{name} runs in clusters")
        maps = iter(getattr(about, "tensordesc_meta", None) or ())
        for arg, kind in compiled.src.signature.items():
            if kind == "constexpr":
                continue
            value = args[arg]
            if kind.startswith("*"):
                parameters.append((8, 8, self._pointer(value)))
            elif kind.startswith("tensordesc"):
                parameters += self._descriptor(name, value, next(maps, None))
            elif kind in _PACKED:
                parameters.append((struct.pack(_PACKED[kind], value), struct.calcsize(_PACKED[kind]), None))
            else:
                raise NoPlan(f"{name} has an argument of type {kind}")
        parameters += [(bytes(8), 8, None)] * 2  # scratch memory that nothing here uses
        sizes = [len(p[0]) if isinstance(p[0], bytes) else p[0] for p in parameters]
        if sizes != (expected := parameter_sizes(compiled.asm["ptx"])):
            raise NoPlan(f"{name} takes parameters of {expected} bytes, not {sizes}: this Triton launches otherwise")
        threads, shared = 32 * about.num_warps, about.shared
        self.plan.launch(name, compiled, list(grid), threads, shared, parameters)

    def _pointer(self, t: Tensor):
        """A Ref whose offset is in bytes."""
        slot, root = self._where(t)
        return self.host.Ref(slot, False, (), (), t.data_ptr() - root.data_ptr())

    def _descriptor(self, name, value, about) -> list[tuple]:
        """A tensor map, and the sizes and strides that follow it, as Triton passes a descriptor."""
        if about is None or len(value.shape) != 2 or value.padding != "zero" or about.get("fp4_padded"):
            raise NoPlan(f"{name} takes a tensor descriptor of another kind")
        size = about["elem_size"]
        kind = {8: 10, 9: 8, 10: 9}.get(about["elem_type"], about["elem_type"])  # Triton's number -> the driver's
        (rows, columns), row = value.shape, value.strides[0]
        at = self._pointer(value.base), kind, about["swizzle"], (columns, rows), (row * size, rows * row * size)
        sizes = [(struct.pack("<i", n), 4, None) for n in value.shape]
        strides = [(struct.pack("<q", n), 8, None) for n in value.strides]
        return [(128, 64, (*at, tuple(about["block_size"][::-1]))), *sizes, *strides]


_PACKED = {"i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "fp32": "<f"}


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the kernel in a PTX file."""
    entry = re.search(r"\.entry[^(]*\((.*?)\)", ptx, re.S)[1]
    found = re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.([a-z]+)(\d+)[^,\[]*(?:\[(\d+)\])?", entry)
    return [int(bits) // 8 * int(n or 1) for _, bits, n in found]


assert TENSORS == 11, "csrc/replay.cpp counts the operands too"
