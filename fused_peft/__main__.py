"""python -m fused_peft info | calibrate | verify | methods | export | compile, or --version"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch

from . import __version__
from .backends import replay
from .core import dispatch, records
from .methods import METHODS
from .model.layer import PeftLinear
from .tools import calibrate, compile_csrc, compile_triton, export, verify

LLAMA_3_8B = ["4096x4096", "4096x1024", "4096x14336", "14336x4096"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def info() -> int:
    """Versions, devices, and every backend with why it is or is not available."""
    print(f"fused_peft   {__version__}")
    print(f"python       {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"torch        {torch.__version__}, CUDA build: {torch.version.cuda or 'no'}")
    for package in ("triton", "safetensors", "transformers", "peft"):
        print(f"{package:<12} {_version(package)}")
    print(f"\ndevice       cpu, {torch.get_num_threads()} threads")
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        print(f"device       cuda:{i} {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        print("device       cuda: none found")
    print()
    for name, backend in dispatch.backends().items():
        reasons = backend.available()
        devices = dispatch.devices(name)
        if hasattr(backend, "standing"):
            devices += f"; {backend.standing()}"
        print(f"backend      {name}: {'; '.join(reasons) if reasons else 'available'} ({devices})")
    print(f"replay       {replay.state()}\n")
    for i in range(torch.cuda.device_count()):
        known = records.find(torch.device("cuda", i))
        said = "none for this GPU, and which GEMM runs is predicted; python -m fused_peft calibrate makes one"
        if known:
            said = f"{len(known.calls)} calls measured on {known.when}, {len(known.passed)} self-tests passed"
        print(f"record       cuda:{i}: {said}")
        for variant, why in known.failed.items() if known else ():
            print(f"OFF          {variant}: {why}")
    for file, record in records.every():
        print(f"on disk      {file}: {record.gpu}, driver {record.driver}, torch {record.torch}, {record.when}")
    return 0


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def run_calibrate(args: argparse.Namespace) -> int:
    """Calibrate on layers of these sizes; exit status 1 where a backend failed its self-test, 2 on bad input."""
    try:
        sizes = [tuple(int(n) for n in size.lower().split("x")) for size in args.sizes]
        interpreting = not torch.cuda.is_available()
        device = torch.device("cpu") if interpreting else torch.device("cuda", torch.cuda.current_device())
        model = torch.nn.ModuleList()
        for name, (i, o) in product(args.methods, sizes):
            plain, _, dropout = name.partition("+")
            config = METHODS[plain].example(args.r)
            config = replace(config, lora_dropout=0.1) if dropout else config
            model.append(PeftLinear(i, o, bias=False, config=config, dtype=DTYPES[args.dtype], device=device))
        found = calibrate.calibrate(model, tuple(args.rows), args.seconds, folder=args.out, progress=_counted)
    except (ValueError, TypeError, KeyError, RuntimeError) as e:
        print(f"calibrate: {e if not isinstance(e, KeyError) else f'unknown method {e}'}", file=sys.stderr)
        return 2
    print(f"{found}\nrecord: {found.file or 'not written'}")
    return 1 if found.record.failed else 0


def _counted(done: int, of: int) -> None:
    """On a terminal one line that counts, elsewhere a line a quarter."""
    if sys.stderr.isatty():
        print(f"\r{done} of {of} jobs", end="\n" if done == of else "", file=sys.stderr, flush=True)
    elif 4 * done // of > 4 * (done - 1) // of:
        print(f"{done} of {of} jobs", file=sys.stderr, flush=True)


def run_verify(device: str) -> int:
    """Print the accuracy table against fp64; exit status 1 when a figure is over its limit."""
    print(f"relative Frobenius error against fp64 on {device}; limit, and {verify.EAGER_FACTOR} x plain PyTorch, hold")
    print(f"{'method':<14} {'dtype':<9} {'tensor':<13} {'fused':>8} {'plain':>8} {'limit':>8}")
    failed = 0
    for row in verify.table(device):
        failed += not row.ok
        print(
            f"{row.method:<14} {str(row.dtype).removeprefix('torch.'):<9} {row.tensor:<13} {row.error:8.1e} "
            f"{row.plain:8.1e} {row.limit:8.0e}{'' if row.ok else '  FAILED'}"
        )
    print(f"{failed} over their limit" if failed else "all within their limits")
    return 1 if failed else 0


def method_table(in_features: int = 768, out_features: int = 768, r: int = 8) -> list[dict[str, str]]:
    """One row a method: name, group, config, form, whether it merges, trainable parameters of one in x out layer, and
    the tensors that a file holds of it."""
    rows = []
    for name, method in METHODS.items():
        config = method.example(r)
        layer = PeftLinear(in_features, out_features, config=config, device="meta")
        mergeable = method.weight is not None or (method.factors is not None and layer.factors().mergeable)
        rows.append(
            {
                "method": name,
                "group": method.group,
                "config": type(config).__name__,
                "form": method.form,
                "mergeable": "yes" if mergeable else "no",
                "trainable": f"{sum(t.numel() for t in layer.adapter_tensors()):,}",
                "stored": " ".join(map(method.disk_key, (*layer.tensor_names, *method.disk_buffers))),
            }
        )
    order = ("reconstruct", "extend", "combine")
    return sorted(rows, key=lambda row: (order.index(row["group"]), row["method"]))


def methods(in_features: int, out_features: int, r: int) -> int:
    """Print the table of methods."""
    rows = method_table(in_features, out_features, r)
    print(f"trainable parameters of one layer, in={in_features}, out={out_features}, r={r}")
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in rows[0]}, *rows]:
        print("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip())
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_peft", description="Fused adapter layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fused_peft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, backends and why each is or is not available")
    check = commands.add_parser("verify", help="accuracy of every method against fp64 on this machine")
    check.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    measure = commands.add_parser("calibrate", help="test and time the backends on this GPU, and keep the record")
    measure.add_argument("--sizes", nargs="+", default=LLAMA_3_8B, metavar="INxOUT", help="features of the layers")
    measure.add_argument("--methods", nargs="+", default=["lora", "lora+dropout", "dora", "ssb"])
    measure.add_argument("--rows", nargs="+", type=int, default=calibrate.ROWS, help="numbers of tokens")
    measure.add_argument("--r", type=int, default=16)
    measure.add_argument("--dtype", choices=DTYPES, default="bf16")
    measure.add_argument("--seconds", type=float, default=240.0)
    measure.add_argument("--out", type=Path, help="folder of the record, instead of the user's cache")
    table = commands.add_parser("methods", help="every method: config, form, mergeable, trainable parameters")
    table.add_argument("--in", dest="in_features", type=int, default=768)
    table.add_argument("--out", dest="out_features", type=int, default=768)
    table.add_argument("--r", type=int, default=8)
    served = commands.add_parser(
        "export",
        help="an adapter's folder as plain LoRA, or merged into its base, to serve from",
        description="Read an adapter saved by this library or by Hugging Face PEFT, and write plain LoRA, which vLLM, "
        "SGLang, llama.cpp and PEFT read; with --merged the merged model. Methods that are no low-rank product need "
        "--rank or --merged. The base model is loaded by the adapter's task_type, else by its own architecture.",
    )
    served.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="folder with adapter_config.json")
    served.add_argument("--base", metavar="MODEL_DIR", help="the base model's folder, if not the config's")
    served.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is new or empty")
    how = served.add_mutually_exclusive_group()
    how.add_argument("--rank", type=int, help="best approximation of this rank; prints each layer's relative error")
    how.add_argument("--merged", action="store_true", help="the whole model with the adapter folded in")
    ahead = commands.add_parser("compile", help="compile every kernel without a GPU; fails on spills and the like")
    ahead.add_argument(
        "--arch", choices=[*compile_triton.ARCHES, "sm_90a"], required=True, help="sm_90a: csrc/, others: Triton"
    )
    ahead.add_argument("--out", type=Path, required=True, help="folder for one .cubin each")
    ahead.add_argument("--json", type=Path, help="registers, stack, shared memory and instruction counts")
    ahead.add_argument("--only", default="", help="only kernels whose name contains this")
    ahead.add_argument("--jobs", type=int, help="compilations at a time; all cores by default")
    ahead.add_argument(
        "--cover", type=int, choices=(0, 1, 2), default=0,
        help="as few as show each config, flag and operand of a kernel (1), every two of them together (2); 0: all",
    )  # fmt: skip
    ahead.add_argument(
        "--beside", choices=[*compile_triton.ARCHES], default="", help="only what is not the same for this architecture"
    )
    args = parser.parse_args(argv)
    if args.command == "compile" and args.arch == "sm_90a":
        return compile_csrc.run(args.out, args.json, args.jobs, args.only)
    if args.command == "compile":
        return compile_triton.run(args.arch, args.out, args.json, args.jobs, args.only, args.cover, args.beside)
    if args.command == "calibrate":
        return run_calibrate(args)
    if args.command == "export":
        return export.run(args.adapter, args.base, args.out, args.rank, args.merged)
    if args.command == "methods":
        return methods(args.in_features, args.out_features, args.r)
    return info() if args.command == "info" else run_verify(args.device)


def run() -> int:
    """``main`` for a shell: any encoding of stdout will do, and a reader that leaves early (``| head``) is no error."""
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush when Python ends
        return 141  # what a shell shows of a program that a closed pipe ended


if __name__ == "__main__":
    sys.exit(run())
