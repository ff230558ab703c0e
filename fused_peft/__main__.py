"""python -m fused_peft info | verify"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import sys

import torch

from . import __version__, dispatch, verify


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
        print(f"backend      {name}: {'; '.join(reasons) if reasons else 'available'} ({devices})")
    return 0


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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fused_peft", description="Fused adapter layers for PyTorch.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, backends and why each is or is not available")
    check = commands.add_parser("verify", help="accuracy of every method against fp64 on this machine")
    check.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    return info() if args.command == "info" else run_verify(args.device)


if __name__ == "__main__":
    sys.exit(main())
