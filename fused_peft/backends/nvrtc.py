"""NVRTC, CUDA's compiler as a library, found and called without CUDA's headers or tools.

CUDA builds of PyTorch require it as a package (nvidia/cu13/lib/libnvrtc.so.13, nvidia/cuda_nvrtc/lib/libnvrtc.so.12 in
site-packages) or carry it in torch/lib. Its code runs on drivers of its own CUDA major and of later ones.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from .built import BuildError
from .plans import DEFINES

OPTIONS = ("--gpu-architecture=sm_90a", *DEFINES, "--ptxas-options=-v")
OLDEST = 12  # CUDA major that knows sm_90a
INSTALL = {12: "pip install nvidia-cuda-nvrtc-cu12", 13: "pip install nvidia-cuda-nvrtc"}


def _folders() -> Iterator[Path]:
    """Where it may be: packages, PyTorch's own folder, Python's (conda's), the toolkit's."""
    for entry in dict.fromkeys(sys.path):
        yield from sorted(Path(entry or ".").glob("nvidia/*/lib"), reverse=True)
    yield Path(torch.__file__).parent / "lib"
    yield Path(sys.prefix) / "lib"
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            yield from (Path(home) / "lib64", Path(home) / "lib")


def _loaded() -> list[Path]:
    """Those that this process has loaded."""
    with suppress(OSError):
        mapped = re.findall(r"\s(/\S*/libnvrtc\.so[.\d]*)$", Path("/proc/self/maps").read_text(), re.M)
        return [Path(file) for file in dict.fromkeys(mapped)]
    return []


def candidates() -> Iterator[Path]:
    """Every libnvrtc, the one that this process has loaded first."""
    yield from _loaded()
    for folder in _folders():
        yield from sorted(folder.glob("libnvrtc.so.*"))


def _major(file: Path) -> int:
    found = re.search(r"\.so\.(\d+)", file.name)
    return int(found[1]) if found else 0


@cache
def find(driver: int | None = None) -> Nvrtc:
    """The first NVRTC whose code a driver of this CUDA major runs; None: any driver. Raises BuildError."""
    files = [file for file in candidates() if _major(file) >= OLDEST]
    wrong = []
    for file in files:
        if driver is None or _major(file) <= driver:
            try:
                return Nvrtc(file)
            except (OSError, AttributeError) as e:
                wrong.append(f"{file} does not load: {e}")
    if wrong:
        raise BuildError(wrong[0])
    cure = INSTALL.get(driver, INSTALL[13])
    if files:
        has = _major(files[0])
        raise BuildError(f"{files[0].name} makes code for drivers of CUDA {has}; this one is of CUDA {driver} ({cure})")
    raise BuildError(f"NVRTC (libnvrtc.so.12 or .13), which CUDA builds of PyTorch bring, is not found ({cure})")


class Nvrtc:
    """One loaded library; version: (major, minor). Raises OSError or AttributeError where it is not one."""

    def __init__(self, file: Path):
        for beside in sorted(file.parent.glob("libnvrtc-builtins.so*")):  # it asks for these by name, not by place
            with suppress(OSError):
                ctypes.CDLL(str(beside))
        self.file, self._library = file, ctypes.CDLL(str(file))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = major.value, minor.value

    def __str__(self) -> str:
        return f"nvrtc {self.version[0]}.{self.version[1]}"

    def compile(self, source: str, headers: dict[str, bytes], options: tuple[str, ...] = OPTIONS) -> tuple[bytes, str]:
        """(cubin, what the compiler and ptxas -v said). headers: texts by the names under which they are included.

        Raises BuildError with the first error.
        """
        program, n = ctypes.c_void_p(), len(headers)
        strings = lambda values: (ctypes.c_char_p * len(values))(*values)  # noqa: E731
        texts, names = strings(list(headers.values())), strings([name.encode() for name in headers])
        self._check(
            self._library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"plan.cu", n, texts, names)
        )
        try:
            given = strings([option.encode() for option in options])
            wrong = self._library.nvrtcCompileProgram(program, len(options), given)
            log = self._get("ProgramLog", program).rstrip(b"\0").decode(errors="replace")
            if wrong:
                told = log.splitlines() or [self._library.nvrtcGetErrorString(wrong).decode()]
                raise BuildError(f"{self}: {next((line for line in told if 'error' in line), told[0])}")
            return self._get("CUBIN", program), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _get(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        data = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, data))
        return data.raw

    def _check(self, wrong: int) -> None:
        if wrong:
            raise BuildError(f"{self}: {self._library.nvrtcGetErrorString(wrong).decode()}")
