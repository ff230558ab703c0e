"""csrc/'s check without a GPU: every plan compiled by nvcc, its machine code read."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ..backends.extension import ARCH, FLAGS, PLANS, Plan, _write, fingerprint, nvcc
from ..backends.triton import kernels
from ..core.paths import source_dir
from .compile_triton import judged

COUNTED = {"wgmma": "HGMMA", "tma_load": "UTMALDG", "tma_store": "UTMASTG", "local": r"(?:LD|ST)L"}
FENCES = 8  # at a cluster's start and end, the counter put back, and around INLINE's flag; none belongs into a loop


@dataclass(frozen=True)
class Report:
    """One compiled plan: bytes of stack and shared memory, instruction counts (fences: of the whole GPU), ptxas's
    warnings of kind C75xx."""

    name: str
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


def compiled(plan: Plan, folder: Path, shared: int) -> Report:
    """Compile one plan to folder/NAME.cubin. Raises RuntimeError with nvcc's output."""
    source, cubin = folder / f"{plan.name}.cu", folder / f"{plan.name}.cubin"
    _write(source, plan.source)
    command = [nvcc(), *FLAGS, ARCH, "-Xptxas", "-v", "-I", source_dir("csrc"), "-cubin", "-o", cubin, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{plan.name} does not compile:\n{done.stdout}{done.stderr}")
    warnings = tuple(line.strip() for line in (done.stdout + done.stderr).splitlines() if re.search(r"C75\d\d", line))
    usage = dict(re.findall(r"(REG|STACK):(\d+)", dumped(cubin, "--dump-resource-usage")))
    code = dumped(cubin, "--dump-sass")
    counts = instructions(code) | {"fences": len(re.findall(r"MEMBAR\.\w+\.(?:GPU|SYS)", code))}
    keys = ("wgmma", "tma_load", "tma_store", "local", "fences")
    return Report(
        plan.name, int(usage["REG"]), int(usage["STACK"]), shared, *(counts[k] for k in keys), warnings=warnings
    )


def shared_bytes(folder: Path) -> dict[str, int]:
    """{plan: bytes of shared memory}, as the sources compute them."""
    lines = "".join(f'  std::printf("{p.name} %d\\n", Plan<{p.template}>::BYTES);\n' for p in PLANS)
    _write(folder / "bytes.cpp", f'#include "launch.cuh"\nint main() {{\n  using namespace fused_peft;\n{lines}}}\n')
    command = ["g++", "-std=c++17", "-DFUSED_PEFT_EMULATE", f"-I{source_dir('csrc')}", folder / "bytes.cpp"]
    subprocess.run([*command, "-o", folder / "bytes"], check=True)
    out = subprocess.run([folder / "bytes"], capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in (line.split() for line in out.splitlines())}


def compile_all(folder: Path, only: str = "", jobs: int | None = None) -> Iterator[Report]:
    """Compile every plan whose name contains ``only``, some at a time. Raises RuntimeError where nvcc is missing."""
    if not nvcc():
        raise RuntimeError("nvcc is not on the PATH; install the CUDA toolkit, or set CUDA_HOME")
    folder.mkdir(parents=True, exist_ok=True)
    shared = shared_bytes(folder)
    with ThreadPoolExecutor(jobs or os.cpu_count()) as pool:
        yield from pool.map(
            lambda plan: compiled(plan, folder, shared[plan.name]), [p for p in PLANS if only in p.name]
        )


def run(folder: Path, json_file: Path | None, jobs: int | None = None, only: str = "") -> int:
    """Compile, print one line a plan, write the JSON report; 1 when the check refuses one, or there is none."""

    def line(r: Report) -> str:
        counts = f"fences {r.fences}  HGMMA {r.wgmma:3} UTMALDG {r.tma_load:2} UTMASTG {r.tma_store:2}"
        return f"{r.name:<32} {r.registers} regs {r.stack} stack {r.shared} shared  {counts}"

    return judged("sm_90a", "plans", compile_all(folder, only, jobs), line, {"sources": fingerprint()}, json_file)
