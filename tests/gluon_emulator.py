"""Gluon on numpy: a kernel's own source runs, every partition of warps a thread, one event at a time in random order.

    module = load(source, seed)      # a kernel file, as it is or changed
    module.gemm(...)                 # its launches run here, on CPU tensors

TMA moves a tile some time after it was asked to, a wgmma reads its operands some time before it is waited for, and sums
are in fp64, rounded where the kernel rounds. ``Race`` is raised where a GPU would promise nothing: a slot that is read
before its tile is there or written while something reads it, a store of what no fence made visible, an element that is
stored twice or never, partitions that wait for one another for good.

What it does not model is what Triton makes of the source: layouts, registers, descriptors of shared memory.
"""

import inspect
import random
import sys
import threading
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch

from fused_peft.backends.triton import kernels


class Race(Exception):
    """What a GPU would not promise."""


class Value(np.ndarray):
    """A tensor in registers."""

    type = SimpleNamespace(layout=None)

    def to(self, dtype, bitcast=False):
        if isinstance(dtype, torch.dtype):  # rounds
            return value(torch.from_numpy(np.ascontiguousarray(self)).to(dtype).double().numpy())
        plain = np.asarray(self)
        return value(plain.view(dtype) if bitcast else plain.astype(dtype))

    def permute(self, order):
        return self.transpose(order)


def value(array) -> Value:
    return np.asarray(array).view(Value)


class Constexpr(int):
    value = property(int)


class Pointer:
    def __init__(self, array, at=0):
        self.array, self.at = array, at

    def __add__(self, offset):
        return Pointer(self.array, self.at + np.asarray(offset))


def read(pointer, mask=None, other=0.0):
    if mask is None:
        return value(pointer.array[pointer.at])
    return value(np.where(mask, pointer.array[np.where(mask, pointer.at, 0)], other))


class HostDescriptor:
    """``TensorDescriptor``, on the host."""

    def __init__(self, base, block_shape):
        self.base, self.block_shape = base, block_shape

    @classmethod
    def from_tensor(cls, tensor, block_shape, layout):
        assert tensor.stride(1) == 1
        assert not tensor.data_ptr() % 16 + tensor.stride(0) * tensor.itemsize % 16
        assert max(block_shape) <= 256
        return cls(tensor, block_shape)


class Descriptor:
    """A matrix as TMA sees it: zeros beyond its edges."""

    layout = None

    def __init__(self, host: HostDescriptor):
        self.base, self.dtype = host.base, host.base.dtype
        self.array, self.stored = host.base.double().numpy(), np.zeros(host.base.shape, bool)
        h, w = host.block_shape
        self.block_type = SimpleNamespace(shape=[h, w], nbytes=host.base.itemsize * h * w)

    def box(self, at):
        return tuple(slice(i, i + n) for i, n in zip(at, self.block_type.shape, strict=True))

    def get(self, at):
        out, part = np.zeros(self.block_type.shape), self.array[self.box(at)]
        out[: part.shape[0], : part.shape[1]] = part
        return out

    def put(self, at, tile):
        stored = self.stored[self.box(at)]
        if stored.any():
            raise Race("an element is stored twice")
        stored[...] = True
        self.array[self.box(at)] = tile[: stored.shape[0], : stored.shape[1]]


class State:
    """What happens to one slot of shared memory."""

    landing = reading = storing = 0
    there = unfenced = False


class Buffer:
    """Shared memory, or a view of it."""

    def __init__(self, array, states):
        self.array, self.states = array, states

    shape = property(lambda self: self.array.shape)

    def index(self, i):
        return Buffer(self.array[i], [self.states[i]])

    def slice(self, start, n, dim):
        assert start + n <= self.array.shape[dim]
        return Buffer(self.array[(slice(None),) * dim + (slice(start, start + n),)], self.states)

    def permute(self, order):
        return Buffer(self.array.transpose(order), self.states)

    def store(self, tile):
        step()
        (state,) = self.states
        if state.storing:
            raise Race("a buffer is written while TMA stores it")
        self.array[...], state.unfenced, state.there = tile, True, True
        threading.current_thread().written.append(state)


class Barrier:
    def init(self, count):
        self.count = self.left = count
        self.phase = self.bytes = 0

    def settle(self):
        if self.left == self.bytes == 0:
            self.left, self.phase = self.count, self.phase ^ 1


class Barriers(list):
    def index(self, i):
        return self[i]


class Accumulator:
    """A sum that wgmma still adds to: of no use before it is waited for."""

    def __init__(self, array, pending):
        self.array, self.pending, self.shape = array, pending, array.shape

    def __getattr__(self, name):
        raise Race("a sum is used before it was waited for")


class World:
    """One program: its partitions, and what the hardware has yet to do."""

    def __init__(self, program, programs, seed):
        self.program, self.programs, self.random = program, programs, random.Random(seed)
        self.eager, self.events, self.error = self.random.choice((0.05, 0.3, 0.8)), [], None

    def run(self, parts):
        partitions = [Partition(self, function, args) for function, args in parts]
        for p in partitions:
            p.start()
        while self.error is None and any(not p.done for p in partitions):
            ready = [p for p in partitions if not p.done and p.may_go()]
            if self.events and (not ready or self.random.random() < self.eager):
                self.happen()
            elif ready:
                self.random.choice(ready).resume()
            else:
                self.error = Race("every partition waits")
        for p in partitions:
            p.go.release()
        while self.events and self.error is None:
            self.happen()
        if self.error:
            raise self.error

    def happen(self):
        try:
            self.events.pop(self.random.randrange(len(self.events)))()
        except Race as e:
            self.error = e


_world: World | None = None


class Partition(threading.Thread):
    """A group of warps. It runs while ``go`` is granted, up to its next ``step``."""

    def __init__(self, world, function, args):
        super().__init__(daemon=True)
        self.world, self.function, self.args = world, function, args
        self.go, self.back = threading.Semaphore(0), threading.Semaphore(0)
        self.may_go, self.done = (lambda: True), False
        self.stores, self.written = [], []  # TMA stores in order, whether each has left its buffer; buffers unfenced

    def resume(self):
        self.go.release()
        self.back.acquire()

    def pause(self, until):
        self.may_go = until
        self.back.release()
        self.go.acquire()
        if self.world.error:
            raise SystemExit

    def run(self):
        try:
            self.go.acquire()
            if not self.world.error:
                self.function(*self.args)
            if not all(left for (left,) in self.stores):
                raise Race("a partition ends while TMA reads its buffers")
        except SystemExit:
            pass
        except BaseException as e:
            self.world.error = self.world.error or e
        self.done = True
        self.back.release()


def step(until=lambda: True):
    """Others may go first; goes on once ``until`` holds."""
    thread = threading.current_thread()
    if isinstance(thread, Partition):
        thread.pause(until)


def mbarrier_wait(barrier, parity):
    step(lambda: barrier.phase != parity)


def mbarrier_expect(barrier, nbytes):
    step()
    barrier.bytes += nbytes
    barrier.left -= 1
    barrier.settle()


def mbarrier_arrive(barrier, count=1, pred=True):
    step()
    if pred:
        if barrier.left < count:
            raise Race("more arrivals than the barrier counts")
        barrier.left -= count
        barrier.settle()


def tma_load(desc, at, barrier, buffer):
    step()
    (state,), at = buffer.states, tuple(int(n) for n in at)
    if state.landing or state.reading:
        raise Race("a slot is overwritten while it is in use")
    if buffer.shape != tuple(desc.block_type.shape):
        raise Race(f"a tile of {desc.block_type.shape} into a slot of {buffer.shape}")
    state.landing, state.there = 1, True
    buffer.array[...] = np.nan

    def land():
        if barrier.bytes < desc.block_type.nbytes:
            raise Race("more bytes land than the barrier expects")
        buffer.array[...], state.landing = desc.get(at), 0
        barrier.bytes -= desc.block_type.nbytes
        barrier.settle()

    _world.events.append(land)


def tma_store(desc, at, buffer):
    step()
    (state,), at, left = buffer.states, tuple(int(n) for n in at), [False]
    if state.unfenced or not state.there:
        raise Race("TMA stores what no fence made visible")
    state.storing += 1

    def leave():
        desc.put(at, buffer.array)
        state.storing -= 1
        left[0] = True

    threading.current_thread().stores.append(left)
    _world.events.append(leave)


def store_wait(pending):
    stores = threading.current_thread().stores
    older = stores[: len(stores) - pending]
    step(lambda: all(left for (left,) in older))


def fence():
    thread = threading.current_thread()
    while isinstance(thread, Partition) and thread.written:
        thread.written.pop().unfenced = False


def mma(a, b, acc, is_async=False):
    step()
    pending = []
    if isinstance(acc, Accumulator):
        array, pending = acc.array, acc.pending
    else:
        array = np.array(acc)
    states = [*a.states, *b.states]
    if any(s.landing or not s.there for s in states):
        raise Race("a slot is read before its tile is there")
    for s in states:
        s.reading += 1

    def add():
        array[...] += np.einsum("ij,jk->ik", a.array, b.array)  # BLAS starts threads for each, and they get in the way
        for s in states:
            s.reading -= 1

    pending.append(add)
    while pending and _world.random.random() < 0.3:
        pending.pop(0)()
    return Accumulator(array, pending)


def mma_wait(pending, deps):
    step()
    (acc,) = deps
    if not isinstance(acc, Accumulator):
        return acc
    while len(acc.pending) > pending:
        acc.pending.pop(0)()
    return acc if pending else value(acc.array)


def allocate(dtype, shape, layout):
    if dtype == "barrier":
        return Barriers(Barrier() for _ in range(shape[0]))
    return Buffer(np.full(shape, np.nan), [State() for _ in range(shape[0])])


def _module(name, **names):
    module = ModuleType(name)
    module.__dict__.update(names)
    return module


cdiv = lambda a, b: -(-a // b)  # noqa: E731
GL = _module(
    "triton.experimental.gluon.language", constexpr=Constexpr, cdiv=cdiv, program_id=lambda axis: _world.program,
    num_programs=lambda axis: _world.programs, zeros=lambda shape, dtype, layout: value(np.zeros(shape)),
    split=lambda t: (value(t[..., 0].copy()), value(t[..., 1].copy())), join=lambda a, b: value(np.stack((a, b), -1)),
    arange=lambda a, b, layout: value(np.arange(a, b, dtype=np.int32)), load=read, where=lambda *a: value(np.where(*a)),
    expand_dims=lambda t, dim: value(np.expand_dims(t, dim)), convert_layout=lambda t, layout: t, static_range=range,
    uint32=np.uint32, uint16=np.uint16, int16=np.int16, int32=np.int32, float32=np.float64, int64="barrier",
    bfloat16=torch.bfloat16, float16=torch.float16, SliceLayout=lambda dim, layout: None,
    NVMMADistributedLayout=lambda *a: None, allocate_shared_memory=allocate,
    NVMMASharedLayout=SimpleNamespace(get_default_for=lambda block, dtype: None),
    warp_specialize=lambda parts, warps, registers: _world.run(parts),
)  # fmt: skip


class Kernel:
    """A kernel as ``launch.submit`` starts it."""

    def __init__(self, function, seed):
        self.fn, self.seed, self.__name__ = function, seed, function.__name__
        self.arg_names = list(inspect.signature(function).parameters)

    def __call__(self, *args):
        return self.fn(*args)

    def __getitem__(self, grid):
        return lambda num_warps, num_stages, enable_fp_fusion, **args: self._start(grid, args)

    def _start(self, grid, args):
        global _world
        made = {name: _on_device(a) for name, a in args.items()}
        for program in range(grid[0]):
            _world = World(program, grid[0], f"{self.seed} {program}")
            self.fn(**made)
        for desc in made.values():
            if isinstance(desc, Descriptor) and desc.stored.any():
                if not desc.stored.all():
                    raise Race("an element is never stored")
                desc.base.copy_(torch.from_numpy(desc.array))


def _on_device(arg):
    if isinstance(arg, HostDescriptor):
        return Descriptor(arg)
    if isinstance(arg, torch.Tensor):
        return Pointer((arg.double() if arg.is_floating_point() else arg).numpy())
    return arg


def _on_numpy(kernel, **names):
    """A function of the library's Triton kernels, on the same numpy."""
    source = inspect.getsource(kernel.fn)
    tl = SimpleNamespace(load=read, uint32=np.uint32, cdiv=cdiv, constexpr=int)
    scope = {"tl": tl, "triton": SimpleNamespace(jit=lambda f: f), **names}
    exec(source, scope)
    return scope[kernel.fn.__name__]


@contextmanager
def _gluon(seed):
    """Gluon's modules replaced."""
    tma = SimpleNamespace(async_load=tma_load, async_store=tma_store, store_wait=store_wait)
    barriers = SimpleNamespace(
        init=lambda barrier, count: barrier.init(count), wait=mbarrier_wait, expect=mbarrier_expect,
        arrive=mbarrier_arrive, MBarrierLayout=lambda: None,
    )  # fmt: skip
    hopper = _module(
        "language.nvidia.hopper", fence_async_shared=fence, mbarrier=barriers, tma=tma, warpgroup_mma=mma,
        warpgroup_mma_wait=mma_wait,
    )  # fmt: skip
    root = "triton.experimental.gluon"
    fakes = {
        root: _module(root, jit=lambda f: Kernel(f, seed), language=GL), f"{root}.language": GL,
        f"{root}.language.nvidia": _module("nvidia"), f"{root}.language.nvidia.hopper": hopper,
        f"{root}.nvidia": _module("nvidia"),
        f"{root}.nvidia.hopper": _module("hopper", TensorDescriptor=HostDescriptor),
    }  # fmt: skip
    with patch.dict(sys.modules, fakes), patch(root, fakes[root], create=True):
        yield


def load(source: str, seed: int = 0, name: str = "fused_peft.kernels.gemm_gluon") -> ModuleType:
    """A kernel file of this source, as a module."""
    module, k = ModuleType(name), kernels()
    module.__package__ = "fused_peft.kernels"
    forms = dict(k.configs.CLOSED_FORMS)
    try:
        with _gluon(seed):
            exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    finally:
        module.forms = {kind: form for kind, form in k.configs.CLOSED_FORMS.items() if kind not in forms}
        k.configs.CLOSED_FORMS.clear()
        k.configs.CLOSED_FORMS.update(forms)
    module._hash, module.place = _on_numpy(module._hash), _on_numpy(module.place)
    return module
