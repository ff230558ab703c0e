"""Forward + backward on this CPU against the frozen layer and HF PEFT: medians of interleaved runs.

    python bench/cpu.py [--rounds 15] [--out bench/results/cpu/layers.csv] [--check]

Each round runs every contender once in turn, so drift of the machine hits all alike. A ratio is the median over rounds
of (this step / the frozen step of the same round); p20 and p80 show the spread. The C allocator is told to keep freed
memory, since otherwise page faults, which fall on a contender by chance, outweigh the differences. --check fails when a
method is above 1.02 of HF PEFT's (the run-to-run noise) or LoRA above 1.10 of the frozen layer on the square shape.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import tables
import torch
from baselines import CPU_SHAPES, contenders

KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 33),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
NOISE = 1.02
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def interleave(steps: dict, rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every step in every round."""
    times = {name: [] for name in steps}
    for i in range(rounds + warmup):
        for name, run in steps.items():
            start = time.perf_counter()
            run()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[round(q * (len(values) - 1))]


def rows(rounds: int):
    for shape in CPU_SHAPES:
        for dtype_name, dtype in DTYPES.items():
            times = interleave(contenders(shape, dtype), rounds)
            for name, seconds in times.items():
                ratios = [s / f for s, f in zip(seconds, times["frozen"], strict=True)]
                peer = times.get(name.replace("ours", "peft")) if name.endswith("ours") else None
                yield {
                    "shape": str(shape),
                    "dtype": dtype_name,
                    "step": name,
                    "ms_p50": round(1e3 * statistics.median(seconds), 3),
                    "ratio_p20": round(quantile(ratios, 0.2), 3),
                    "ratio_p50": round(statistics.median(ratios), 3),
                    "ratio_p80": round(quantile(ratios, 0.8), 3),
                    "vs_peft_p50": round(statistics.median(s / p for s, p in zip(seconds, peer, strict=True)), 3)
                    if peer
                    else "",
                    "torch": torch.__version__,
                    "cpu": f"{platform.machine()} x{torch.get_num_threads()}",
                }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    measured, failures = [], []
    for row in rows(args.rounds):
        measured.append(row)
        print(*(row[k] for k in ("shape", "dtype", "step", "ms_p50", "ratio_p50", "vs_peft_p50")), sep="\t", flush=True)
        if row["vs_peft_p50"] and row["vs_peft_p50"] > NOISE:
            failures.append(f"{row['step']} is {row['vs_peft_p50']} of HF PEFT at {row['shape']} {row['dtype']}")
        if row["step"] == "lora ours" and row["shape"] == str(CPU_SHAPES[0]) and row["ratio_p50"] > 1.10:
            failures.append(f"lora is {row['ratio_p50']} of the frozen layer at {row['shape']} {row['dtype']}")
    tables.write(args.out, measured)
    print("\n".join(failures))
    return bool(failures and args.check)


if __name__ == "__main__":
    if not KEEP_MEMORY.items() <= os.environ.items():  # read by the C library at start-up only
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    sys.exit(main())
