"""What this project uses of Triton beyond its documented names, and what is done instead where a release lacks one.

``MISSING`` lists the names that this Triton lacks; a test keeps it empty for the installed one.
"""

from __future__ import annotations

import importlib
import inspect
import io
import os
import re
import shutil
import subprocess
import tempfile
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import triton

MISSING: list[str] = []
# the oldest and the newest Triton whose Gluon, still an experiment, ``gemm_gluon`` is written for
GLUON = (3, 6), (3, 9)


def _found(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        MISSING.append(f"{module}.{name}")
        return None


@triton.jit
def _nothing():
    pass


# lets the next launch begin early; without it that begins when this one has ended
gdc_launch_dependents = _found("triton.language.extra.cuda", "gdc_launch_dependents") or _nothing
# a tensor as TMA reads it; None: the kernels that take pointers run instead
TensorDescriptor = _found("triton.tools.tensor_descriptor", "TensorDescriptor")
# whether a flattened tile loop keeps its wgmma asynchronous: in 3.6 ptxas serialises it (C7515)
FLATTENS = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 9)
_ASTSource = _found("triton.compiler", "ASTSource")
_GPUTarget = _found("triton.backends.compiler", "GPUTarget")
_knobs = _found("triton", "knobs")  # without them ptxas runs again for its log


def interpreted(kernel) -> bool:
    """Whether a kernel runs in Triton's interpreter; its class is not imported, since that imports numpy."""
    return not isinstance(kernel, triton.JITFunction)


def no_gluon() -> str | None:
    """Why kernels in Gluon cannot be had; ``gemm_gluon`` is imported where this is None."""
    first, last = (".".join(map(str, version)) for version in GLUON)
    if not GLUON[0] <= tuple(int(n) for n in triton.__version__.split(".")[:2]) <= GLUON[1]:
        return f"its kernel is written for the Gluon of Triton {first} to {last}, not of {triton.__version__}"
    if interpreted(_nothing):
        return "TRITON_INTERPRET is set, and Triton's interpreter cannot run Gluon"
    try:
        importlib.import_module("triton.experimental.gluon.language.nvidia.hopper")
    except ImportError as e:
        return f"Triton {triton.__version__} has no Gluon ({e})"
    return None


def arg_names(kernel) -> list[str]:
    """A kernel's arguments in order."""
    return getattr(kernel, "arg_names", None) or list(inspect.signature(kernel.fn).parameters)


def is_constexpr(kernel) -> dict[str, bool]:
    """For each argument of a kernel, in order, whether it is a tl.constexpr."""
    if hasattr(kernel, "params"):
        return {p.name: p.is_constexpr for p in kernel.params}
    return {n: "constexpr" in str(p.annotation) for n, p in inspect.signature(kernel.fn).parameters.items()}


def unspecialised(kernel) -> frozenset[str]:
    """Arguments of a kernel whose values change nothing about what is compiled."""
    options = vars(kernel) if hasattr(kernel, "params") else kernel.kwargs  # the interpreter keeps what it was given
    return frozenset(options["do_not_specialize"] or ())


def compiled(kernel, signature: dict, constants: dict, attributes: dict, arch: tuple[int, int], options: dict):
    """A kernel compiled ahead of time, whose ``asm`` holds its ttgir, ptx and cubin, ``metadata.shared`` its shared
    memory; and what ptxas -v said of it.

    Raises RuntimeError where this Triton has no such compiler interface.
    """
    if _ASTSource is None or _GPUTarget is None:
        raise RuntimeError(f"Triton {triton.__version__} cannot compile ahead of time: it has no {', '.join(MISSING)}")
    source = _ASTSource
    if getattr(kernel, "is_gluon", bool)():
        source = importlib.import_module("triton.experimental.gluon._runtime").GluonASTSource
    source = source(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    with _told(), redirect_stdout(io.StringIO()) as printed:
        result = triton.compile(source, target=_GPUTarget("cuda", 10 * arch[0] + arch[1], 32), options=options)
    log = printed.getvalue()
    return result, log if " registers" in log else _ptxas(result.asm["ptx"])


@contextmanager
def _told():
    """Triton compiles though its cache may hold the kernel, and prints what ptxas says."""
    wanted = [] if _knobs is None else [(_knobs.nvidia, "dump_ptxas_log"), (_knobs.compilation, "always_compile")]
    wanted = [(group, name, getattr(group, name)) for group, name in wanted if hasattr(group, name)]
    for group, name, _ in wanted:
        setattr(group, name, True)
    try:
        yield
    finally:
        for group, name, before in wanted:
            setattr(group, name, before)


def _ptxas(ptx: str) -> str:
    """What ptxas -v says about PTX; the newer of the two in Triton's wheel knows every version of it."""
    arch = re.search(r"^\.target (\w+)", ptx, re.M)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [tool("ptxas-blackwell" if "\n.version 9" in ptx else "ptxas"), "-v", f"-arch={arch}"]
        command += ["-o", os.devnull, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def tool(name: str) -> str:
    """The path of ptxas, ptxas-blackwell or cuobjdump: the one in Triton's wheel, else CUDA's own on PATH.

    Raises RuntimeError where there is neither.
    """
    ours = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    found = str(ours) if ours.exists() else shutil.which(name)
    if found is None:
        raise RuntimeError(f"{name} is neither in {ours.parent} nor on PATH; install CUDA's command-line tools")
    return found
