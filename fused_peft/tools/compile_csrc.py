"""csrc/'s check without a GPU: every plan compiled by NVRTC and by nvcc, where they are, its machine code read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..backends.built import BuildError
from ..backends.extension import cxx
from ..backends.nvrtc import Nvrtc
from ..backends.nvrtc import find as find_nvrtc
from ..backends.plans import DEFINES, PLANS, Plan, fingerprint, headers
from ..backends.triton import kernels
from ..core.paths import source_dir
from .compile_triton import judged

COUNTED = {"wgmma": "HGMMA", "tma_load": "UTMALDG", "tma_store": "UTMASTG", "local": r"(?:LD|ST)L"}
FLAGS = (*DEFINES, "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas", "-v")
FENCES = 8  # at a cluster's start and end, the counter put back, and around INLINE's flag; none belongs into a loop


@dataclass(frozen=True)
class Report:
    """One compiled plan: bytes of stack and shared memory, instruction counts (fences: of the whole GPU), ptxas's
    warnings of kind C75xx."""

    name: str
    compiler: str
    registers: int
    stack: int
    shared: int
    wgmma: int
    tma_load: int
    tma_store: int
    local: int
    fences: int
    warnings: tuple[str, ...]

    def faults(self) -> list[str]:
        """What the check refuses."""
        found = list(self.warnings)
        if self.stack or self.local:
            found.append(f"{self.stack} bytes of stack and {self.local} local loads and stores: registers spill")
        counts = {"HGMMA": self.wgmma, "UTMALDG": self.tma_load, "UTMASTG": self.tma_store}
        found += [f"no {name}" for name, n in counts.items() if not n]
        if self.fences > FENCES:
            found.append(f"{self.fences} fences of the whole GPU, {FENCES} are needed")
        if not 0 < self.shared <= 227 * 1024:
            found.append(f"{self.shared} bytes of shared memory, {227 * 1024} are there")
        return found


def dumped(file: Path, what: str) -> str:
    """What cuobjdump, the one in Triton's wheel if there is none else, prints about a cubin."""
    tool = kernels().triton_internals.tool("cuobjdump")
    return subprocess.run([tool, what, file], capture_output=True, text=True, check=True).stdout


def instructions(code: str) -> dict[str, int]:
    """How many of each kind in COUNTED a cubin's machine code, as ``dumped`` prints it, has."""
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)", code, re.M))
    return {k: sum(n for op, n in opcodes.items() if re.fullmatch(pattern, op)) for k, pattern in COUNTED.items()}


def nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, on the PATH, or where it is usually installed."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = os.pathsep.join([*([f"{home}/bin"] if home else []), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    return shutil.which("nvcc", path=path)


def toolkit() -> Path:
    """The folder of CUDA's bin/, include/ and lib64/, as nvcc itself sees it."""
    said = subprocess.run(
        [nvcc(), "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False
    ).stderr
    top = re.search(r"^#\$ TOP=(.+)$", said, re.M)
    return Path(top.group(1).strip() if top else Path(nvcc()).parent / "..").resolve()


class Nvcc:
    """nvcc, called as Nvrtc is."""

    def __init__(self):
        said = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
        self.version = re.search(r"release ([\d.]+)", said)[1]

    def __str__(self) -> str:
        return f"nvcc {self.version}"

    def compile(self, source: str, headers: dict[str, bytes], options: tuple[str, ...] = FLAGS) -> tuple[bytes, str]:
        """(cubin, what it said). Raises BuildError with its output."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for header, text in {**headers, "plan.cu": source.encode()}.items():
                (folder / header).write_bytes(text)
            command = [nvcc(), *options, "-cubin", "-o", folder / "plan.cubin", folder / "plan.cu"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise BuildError(f"{self}:\n{done.stdout}{done.stderr}")
            return (folder / "plan.cubin").read_bytes(), done.stdout + done.stderr


def compilers() -> list[Nvrtc | Nvcc]:
    """Those at hand: NVRTC, nvcc. Raises RuntimeError where there is neither."""
    found: list[Nvrtc | Nvcc] = [Nvcc()] if nvcc() else []
    try:
        return [find_nvrtc(), *found]
    except BuildError as e:
        if not found:
            raise RuntimeError(f"{e}, and nvcc is not on the PATH") from e
        return found


def compiled(plan: Plan, folder: Path, shared: int, compiler: Nvrtc | Nvcc) -> Report:
    """Compile one plan to folder/NAME.COMPILER.cubin. Raises BuildError with what the compiler says."""
    code, log = compiler.compile(plan.kernel, headers())
    cubin = folder / f"{plan.name}.{str(compiler).split()[0]}.cubin"
    cubin.write_bytes(code)
    warnings = tuple(line.strip() for line in log.splitlines() if re.search(r"C75\d\d", line))
    usage = dict(re.findall(r"(REG|STACK):(\d+)", dumped(cubin, "--dump-resource-usage")))
    code = dumped(cubin, "--dump-sass")
    counts = instructions(code) | {"fences": len(re.findall(r"MEMBAR\.\w+\.(?:GPU|SYS)", code))}
    keys = ("wgmma", "tma_load", "tma_store", "local", "fences")
    sizes = int(usage["REG"]), int(usage["STACK"]), shared
    return Report(plan.name, str(compiler), *sizes, *(counts[k] for k in keys), warnings=warnings)


def shared_bytes() -> dict[str, int]:
    """{plan: bytes of shared memory}, as the sources compute them. Raises RuntimeError without a C++ compiler."""
    if not cxx():
        raise RuntimeError("there is no C++ compiler (apt install g++)")
    lines = "".join(f'  std::printf("{p.name} %d\\n", Plan<{p.template}>::BYTES);\n' for p in PLANS)
    source = f'#include <cstdio>\n#include "gemm.cuh"\nint main() {{\n  using namespace fused_peft;\n{lines}}}\n'
    with tempfile.TemporaryDirectory() as name:
        program = Path(name) / "bytes"
        command = [*cxx(), "-std=c++17", f"-I{source_dir('csrc')}", "-x", "c++", "-", "-o", program]
        subprocess.run(command, input=source, text=True, check=True)
        out = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in (line.split() for line in out.splitlines())}


def compile_all(folder: Path, only: str = "", jobs: int | None = None) -> Iterator[Report]:
    """Compile every plan whose name contains ``only``, with each compiler at hand, some at a time. Raises RuntimeError
    where there is none."""
    each = compilers()
    folder.mkdir(parents=True, exist_ok=True)
    shared = shared_bytes()
    work = [(plan, compiler) for plan in PLANS if only in plan.name for compiler in each]
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        yield from pool.map(lambda w: compiled(w[0], folder, shared[w[0].name], w[1]), work)


def run(folder: Path, json_file: Path | None, jobs: int | None = None, only: str = "") -> int:
    """Compile, print one line a plan and compiler, write the JSON report; 1 when the check refuses one, or there is
    none."""

    def line(r: Report) -> str:
        counts = f"fences {r.fences}  HGMMA {r.wgmma:3} UTMALDG {r.tma_load:2} UTMASTG {r.tma_store:2}"
        return f"{r.name:<32} {r.compiler:<11} {r.registers} regs {r.stack} stack {r.shared} shared  {counts}"

    return judged("sm_90a", "plans", compile_all(folder, only, jobs), line, {"sources": fingerprint()}, json_file)
