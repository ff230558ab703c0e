"""Bytes that one layer keeps for backward beyond its input, as multiples of that input: ours and HF PEFT's.

    python bench/memory.py [--out bench/results/cpu/saved_bytes.csv]

1024 x 1024, 512 tokens, r = 16, bf16 base with fp32 adapters (both libraries' default); exact, nothing is timed.
"""

from __future__ import annotations

import argparse
import weakref
from pathlib import Path

import tables
import torch
from baselines import our_configs, peft_configs, peft_layer
from torch import nn

import fused_peft as fp

WIDTH, TOKENS, R = 1024, 512, 16


def saved(layer: nn.Module) -> float:
    """Bytes kept by one forward beyond x and the layer's own tensors, in multiples of x's bytes."""
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    own = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    held: list[weakref.ref[torch.Tensor]] = []  # dead once autograd lets go of the tensor

    def pack(t: torch.Tensor) -> torch.Tensor:
        held.append(weakref.ref(alias := t.detach()))
        return alias

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda alias: alias):
        y = layer(x)  # holds the graph
    kept = [t.untyped_storage() for ref in held if (t := ref()) is not None]
    del y
    sizes = {storage.data_ptr(): storage.nbytes() for storage in kept}
    return sum(n for address, n in sizes.items() if address not in own) / x.nbytes


def rows() -> list[dict[str, str]]:
    theirs, out = peft_configs(R), []
    for name, config in our_configs(R).items():
        torch.manual_seed(0)
        linear = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
        ours = saved(fp.PeftLinear.from_linear(linear, config))
        row = {"method": name, "ours": f"{ours:.3f}", "HF PEFT": ""}
        if name in theirs:
            peer = peft_layer(name, nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16), R)
            row["HF PEFT"] = f"{saved(peer.train()):.3f}"
        out.append(row)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found = rows()
    for row in found:
        print("{method:<18} {ours:>8} {HF PEFT:>8}".format(**row))
    tables.write(args.out, found)


if __name__ == "__main__":
    main()
