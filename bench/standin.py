"""Triton's whole launch path and ours on a stand-in for the CUDA driver, so that a call's host time is seen without a
GPU: kernels compile for a real architecture, tensors lie in the CPU's memory, launches return at once.

Only for a process of its own: ``install`` replaces Triton's driver.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver

from fused_peft.backends import cuda, extension
from fused_peft.backends import triton as base
from fused_peft.backends.plans import CAST

SOURCE = Path(__file__).with_name("standin.c")
NAME = "libcuda.so.1"


class StandIn:
    """The loaded library, and what it wrote down."""

    def __init__(self, folder: Path):
        library = folder / NAME
        command = ["cc", "-shared", "-fPIC", "-O2", "-w", f"-Wl,-soname,{NAME}", "-o", str(library), str(SOURCE)]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # what is opened by this name later is this
        self.library.standin_text.restype = ctypes.c_size_t

    def layout(self, function: int, sizes: list[int]) -> None:
        self.library.standin_layout(ctypes.c_size_t(function), len(sizes), (ctypes.c_int * len(sizes))(*sizes))

    @contextmanager
    def launches(self):
        """A list that holds, at the end, of each launch: function, grid and threads, shared memory, parameters."""
        found: list[tuple] = []
        self.library.standin_log(1)
        try:
            yield found
        finally:
            at = ctypes.c_char_p()
            size = self.library.standin_text(ctypes.byref(at))
            data, place = ctypes.string_at(at, size), 0
            while place < size:
                function, *shape, shared, count = struct.unpack_from("<Q6IIi", data, place)
                place += 40
                parameters = []
                for _ in range(count):
                    (n,) = struct.unpack_from("<i", data, place)
                    parameters.append(data[place + 4 : place + 4 + n])
                    place += 4 + n
                found.append((function, tuple(shape), shared, parameters))
            self.library.standin_log(0)


def take_csrc(driver: StandIn) -> None:
    """Let the cuda backend take CPU tensors like Triton's: compiled by NVRTC, launched through the stand-in."""
    load, known = extension.function, set()

    def function(name: str, on_cpu: bool):
        found = load(name, False)
        if name not in known:
            known.add(name)
            kernel = ctypes.c_int.in_dll(driver.library, "standin_kernels").value
            driver.layout(kernel, [extension.library().fused_peft_sizes(1 if name == CAST else 2)])
        return found

    extension.function = function
    cuda._broken = lambda on_cpu: None


def install(arch: tuple[int, int] = (9, 0)) -> StandIn:
    """Make the stand-in Triton's driver; the fused backends then take CPU tensors as if on that architecture."""
    folder = Path(tempfile.mkdtemp(prefix="standin-"))
    stand_in = StandIn(folder)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)

    class Driver(driver.CudaDriver):
        def __init__(self):
            self.utils, self.launcher_cls = driver.CudaUtils(), driver.CudaLauncher

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 10 * arch[0] + arch[1], 32)

        def allocate_default_profile_scratch(self, size, alignment, stream):
            raise RuntimeError("no kernel of this library takes scratch memory")

    triton.runtime.driver.set_active(Driver())
    base.Triton.available = lambda self: []
    base.Triton.reasons = lambda self, problem: []
    base.kernels().launch._arch = arch
    return stand_in
