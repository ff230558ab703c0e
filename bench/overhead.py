"""Host time of one call at a size where the arithmetic is nothing, on one thread, in microseconds.

    python bench/overhead.py [--out bench/results/cpu/overhead.csv]

Overhead is the time of the fused call less that of the bare torch functions it runs; the bar is twice F.linear's own
autograd path. Medians of interleaved repeats.
"""

from __future__ import annotations

import argparse
import statistics
import timeit
from pathlib import Path

import tables
import torch
import torch.nn.functional as F
from baselines import Shape, linear_for, ours, peft_layer

from fused_peft import ops

TINY = Shape(4, 16, 16, 2)


def cases() -> dict:
    torch.manual_seed(0)
    linear = linear_for(TINY, torch.float32)
    w, b = linear.weight, linear.bias
    trained = w.clone().requires_grad_()
    mine = ours("lora", linear_for(TINY, torch.float32), TINY.r)
    peer = peft_layer("lora", linear_for(TINY, torch.float32), TINY.r)
    f = mine.factors()
    A, B = f.A.detach(), f.B.detach()
    x = torch.randn(TINY.M, TINY.K, requires_grad=True)
    plain = x.detach()
    dy = torch.randn(TINY.M, TINY.N)

    def bare_forward():
        with torch.no_grad():
            y = F.linear(plain, w, b)
            S = torch.mm(plain, A.t())
            return y.addmm_(S, B.t(), alpha=f.s), S

    S = bare_forward()[1]

    def bare_both():
        bare_forward()
        with torch.no_grad():
            P = torch.mm(dy, B).mul_(f.s)
            torch.mm(dy, w).addmm_(P, A)
            P.t().mm(plain)
            dy.t().mm(S).mul_(f.s)

    def fused():
        return ops.linear(x, w, f, b)

    return {
        "F.linear forward": lambda: F.linear(x, trained, b),
        "F.linear forward + backward": lambda: F.linear(x, trained, b).backward(dy),
        "bare forward": bare_forward,
        "bare forward + backward": bare_both,
        "fused forward": fused,
        "fused forward + backward": lambda: fused().backward(dy),
        "nn.Linear layer forward": lambda: linear(x),
        "PeftLinear layer forward": lambda: mine(x),
        "HF PEFT layer forward": lambda: peer(x),
        "PeftLinear layer forward + backward": lambda: mine(x).backward(dy),
        "HF PEFT layer forward + backward": lambda: peer(x).backward(dy),
    }


def measure(repeats: int = 25, number: int = 1000) -> dict[str, float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        functions = cases()
        times = {name: [] for name in functions}
        for _ in range(repeats):
            for name, run in functions.items():
                times[name].append(1e6 * timeit.timeit(run, number=number) / number)
    finally:
        torch.set_num_threads(threads)
    found = {name: statistics.median(values[2:]) for name, values in times.items()}
    for kind in ("forward", "forward + backward"):
        overhead = found[f"fused {kind}"] - found[f"bare {kind}"]
        found[f"fused {kind}: overhead"] = overhead
        found[f"fused {kind}: overhead / F.linear"] = overhead / found[f"F.linear {kind}"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    found = measure(args.repeats)
    for name, value in found.items():
        print(f"{name:<45} {value:8.2f}")
    tables.write(
        args.out,
        [{"case": n, "microseconds_or_ratio": f"{v:.2f}", "torch": torch.__version__} for n, v in found.items()],
    )


if __name__ == "__main__":
    main()
