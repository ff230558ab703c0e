"""Offline tuning of the kernels' tile sizes.

    python bench/tune.py [--seconds 300] [--out out/gpu] [--kinds gemm_lowrank_tma outer ...] [--dry-run]

A key of the table is tuned on the launches that forward and backward of real layers make under it (r = 16). Around the
closed form's config, and then around the best found, legal configs that differ in at most two fields are compiled side
by side, held to the closed form's results, and timed against it. The folder --out gets the GPU's record with the
winners, for kernels/records, and tuning.csv with every candidate. Without a GPU: tiny shapes in Triton's interpreter,
whose record holds for no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, replace
from functools import partial
from itertools import combinations_with_replacement, product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from baselines import config as config_of
from correctness import ready, shaken
from fused_peft.kernels.configs import Config
from timing import CPU_OR_GPU, DEVICE, FACTS, INTERPRETING, Table, captured, copies_of, interleaved
from torch import Tensor

import fused_peft as fp
from fused_peft.backends.kernel_modules import configs, launch
from fused_peft.backends.plans import TILES as TILES_OF_CSRC
from fused_peft.core import dispatch, records
from fused_peft.tools.isolated import Failure, Pool

EACH = 120.0  # seconds that compiling and checking a candidate, or timing all of a key, may take
GAIN = 0.98  # a config is kept below this multiple of the closed form's time
CLOSE = 2e-2  # relative Frobenius distance between the results under two configs
R = 16
DTYPE = torch.float16 if INTERPRETING else torch.bfloat16
MOST = 2 if INTERPRETING else 24  # candidates around one config
COLUMNS = f"kind key config ms_p50 default_ms ratio_p50 note {FACTS}"
TILES = {
    "BM": (16, 32, 64, 128, 256), "BN": (32, 64, 128, 192, 256), "BK": (32, 64, 128, 256), "warps": (4, 8),
    "stages": (2, 3, 4, 5), "group": (4, 8, 16), "late": (True, False), "flatten": (True, False),
    "cluster": (1, 2),
}  # fmt: skip
BANDED = ("gemm_cuda", "gemm_gluon", "gemm_lowrank", "gemm_lowrank_tma", "hadamard", "hadamard_grads")  # read ``group``
METHOD = dict.fromkeys(("hadamard", "form", "hadamard_grads"), "liera") | {"row_norm": "dora"}
LAYERS = ((4096, 4096), (4096, 14336), (14336, 4096), (1024, 1024))  # K, N
ORDER = (
    ("gemm_cuda", 8192), ("gemm_cuda", 1024), ("gemm_lowrank_tma", 8192), ("gemm_lowrank_tma", 1024),
    ("outer", 8192), ("outer", 1024), ("down", 8192),
    ("down", 1024), ("back", 8192), ("back", 1024), ("gemm_lowrank", 16), ("row_norm", 16), ("hadamard", 16),
    ("hadamard_grads", 8192), ("form", 8192), ("hadamard", 128), ("gemm_lowrank_tma", 128),
)  # fmt: skip
TARGETS = [(kind, M, *layer) for kind, M in ORDER for layer in LAYERS]
SMALL = {"gemm_lowrank_tma": (64, 64, 72), "gemm_cuda": (70, 64, 72), "form": (130, 24, 40)}
TINY = [(kind, *SMALL.get(kind, (5, 24, 40))) for kind in dict(ORDER)]


def fields(kind: str, c: Config) -> list[str]:
    """What may differ: a size that is 0 is not the kernel's, and back's BM decides what another launch adds up."""
    if kind == "gemm_cuda":
        return ["BM", "BN", "group", "cluster"]
    if kind == "gemm_gluon":
        return ["BN", "stages", "group"]
    sizes = [f for f in ("BM", "BN", "BK") if getattr(c, f) and (kind, f) != ("back", "BM")]
    return [*sizes, "warps", "stages", *(("group",) * (kind in BANDED)), *(("late", "flatten") * kind.endswith("tma"))]


def legal(kind: str, c: Config, rows: int) -> bool:
    """Whether the accumulator fits the registers, the stages fit shared memory, and the rows are not mostly padding."""
    if kind == "gemm_cuda":
        return (c.BM, c.BN) in TILES_OF_CSRC
    if kind == "gemm_gluon":  # beside the ring, two pieces of a quarter of the columns for each half of the rows
        return c.BN in (128, 256) and (c.stages * (c.BM + c.BN) * 64 + c.BM * c.BN // 2) * 2 <= 226 * 1024
    if c.BN == 192:  # no power of two
        return False
    by_rows = {"outer": (c.BN, R, c.BM), "hadamard_grads": (c.BN, c.BK, c.BM), "back": (c.BM, R, c.BN)}
    a, b, depth = by_rows.get(kind, (c.BM, c.BN or R, c.BK))
    fits = c.stages * (a + b) * depth * 2 <= 1024 * configs.shared_kib((9, 0))
    return fits and a * b <= 128 * 32 * c.warps and max(16, rows) >= c.BM


def candidates(key: str, around: Config) -> Iterator[Config]:
    """Legal configs that differ from one in one field, then in two."""
    kind, rows = key.split()[0], int(key.split()[3])
    pairs = combinations_with_replacement(fields(kind, around), 2)
    found = {replace(around, **{a: u, b: v}): None for a, b in pairs for u, v in product(TILES[a], TILES[b])}
    change = lambda c: sum(u != v for u, v in zip(astuple(c), astuple(around), strict=True))  # noqa: E731
    yield from sorted((c for c in found if c != around and legal(kind, c, rows)), key=change)


@contextmanager
def using(kind: str, key: str = "", config: Config | None = None) -> Iterator[SimpleNamespace]:
    """Kernels of the kind run with the closed form's config, but under the key with the one given. Yields ``asked``,
    {key: closed form's config}, and ``made``, what launches again each kernel that ran under the key."""
    seen, choose_, submit_ = SimpleNamespace(asked={}, made=[], at=""), configs.choose, launch.submit

    def choose(k, arch, bits, M, N, K, r=16):
        seen.at = configs.key(k, arch, bits, M, N, K, r)
        if k != kind:
            return choose_(k, arch, bits, M, N, K, r)
        form = seen.asked[seen.at] = configs.CLOSED_FORMS[k](arch, bits, M, N, K, r)
        return config if config and seen.at == key else form

    def submit(kernel, *args):
        submit_(kernel, *args)
        if seen.at == key and kernel.__name__ in (kind, "add_up", "finish"):
            seen.made.append(partial(submit_, kernel, *args))

    with patch.object(configs, "choose", choose), patch.object(launch, "submit", submit):
        yield seen


def work(kind: str, M: int, K: int, N: int) -> Callable[[], list[Tensor]]:
    """Forward and backward of a layer and of its mirror image, on inputs of their own; a call returns every result."""
    torch.manual_seed(0)
    calls = []
    for a, b in ((K, N), (N, K)):
        method = config_of(METHOD.get(kind, "lora"), R)
        layer = shaken(fp.PeftLinear(a, b, config=method, device=DEVICE, dtype=DTYPE))
        x, dy = (torch.randn(M, n, device=DEVICE, dtype=DTYPE) for n in (a, b))
        calls.append((layer, [x.requires_grad_(), *layer.adapter_tensors()], dy))
    both = lambda layer, leaves, dy: (y := layer(leaves[0]), *torch.autograd.grad(y, leaves, dy))  # noqa: E731

    def run() -> list[Tensor]:
        with dispatch.forcing({"gemm_cuda": "cuda", "gemm_gluon": "gluon"}.get(kind, "triton")):
            return [t.detach() for call in calls for t in both(*call)]

    return run


def attempt(kind: str, M: int, K: int, N: int, key: str, config: Config) -> str:
    """Why the config cannot be used: it does not compile or launch, or its results are off; empty when it can."""
    ready()
    try:
        run = work(kind, M, K, N)
        with using(kind):
            want = run()
        with using(kind, key, config):
            got = run()
        off = [((g - w).float().norm() / w.float().norm()).item() for g, w in zip(got, want, strict=True)]
    except Exception as e:  # out of resources, or the compiler's
        return f"{type(e).__name__}: {e}".splitlines()[0][:160]
    return "" if all(o <= CLOSE for o in off) else "off by " + " ".join(f"{o:.1e}" for o in off)


def forms(*target) -> dict[str, Config]:
    """{key: the closed form's config} of what forward and backward of the target's layers look up."""
    ready()
    with using(target[0]) as seen:
        work(*target)()
    return seen.asked


def times(target: tuple, key: str, chosen: list[Config]) -> dict[Config, list[float]]:
    """Seconds that the key's launches take with each config in every round; on a GPU as CUDA graphs."""
    ready()
    kind, M, K, N = target
    copies = 1 if INTERPRETING else copies_of((M * K + M * N + K * N) * DTYPE.itemsize)
    runs = [work(*target) for _ in range(copies)]

    def step(config: Config) -> Callable[[int], None]:
        made = []
        for run in runs:
            with using(kind, key, config) as seen:
                run()
            made.append(seen.made)
        return lambda i: [again() for again in made[i % copies]]

    if INTERPRETING:
        return interleaved({c: step(c) for c in chosen})
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = interleaved({c: captured(step(c), copies) for c in chosen}, seconds=0.5)
    return {c: [s / copies for s in seconds] for c, seconds in found.items()}


def alone(pool: Pool, function: str, *job):
    """``function(*job)`` in a process of its own. Raises RuntimeError where it fails, crashes or takes too long."""
    ((_, answer),) = pool.run(function, [job], EACH)
    if isinstance(answer, Failure):
        raise RuntimeError(answer.why)
    return answer


def tune(target: tuple, key: str, form: Config, table: Table, pool: Pool, deadline: float) -> Config:
    """The best config for the key: the closed form's, or one that beats it by enough."""
    best, gain, tried = form, GAIN, {form}
    for _ in range(1 if INTERPRETING else 2):
        around = best
        jobs = [(*target, key, c) for c in candidates(key, around) if c not in tried][:MOST]
        tried |= {job[-1] for job in jobs}
        notes = {}
        for i, note in pool.run("tune:attempt", jobs, EACH, deadline):
            notes[jobs[i][-1]] = note.why if isinstance(note, Failure) else note
        found = alone(pool, "tune:times", target, key, [form, *(c for c, note in notes.items() if not note)])
        for c, note in notes.items():
            row = {"kind": target[0], "key": key, "config": " ".join(map(str, astuple(c))), "note": note}
            if c in found:
                ratio = statistics.median(a / b for a, b in zip(found[c], found[form], strict=True))
                row |= {"ms_p50": 1e3 * statistics.median(found[c]), "ratio_p50": ratio}
                best, gain = (c, ratio) if ratio < gain else (best, gain)
            table.add(**row, default_ms=1e3 * statistics.median(found[form]))
        if best == around:
            break
    return best


def sweep(seconds: float, out: Path, pool: Pool, kinds=tuple(configs.CLOSED_FORMS)) -> list[str]:
    """Tune for so many seconds: winners to the GPU's record in ``out``, candidates to tuning.csv; what was left."""
    deadline, table, done, left = time.time() + seconds, Table(out / "tuning.csv", COLUMNS), {}, []
    for target in (t for t in (TINY if INTERPRETING else TARGETS) if t[0] in kinds):
        if time.time() >= deadline:
            left.append(f"tuning {' '.join(map(str, target))}")
            continue
        try:
            for key, form in list(alone(pool, "tune:forms", *target).items())[: 1 if INTERPRETING else None]:
                if time.time() >= deadline:
                    left.append(f"tuning {key}")
                elif key not in done:
                    done[key] = form, tune(target, key, form, table, pool, deadline)
        except Exception as e:
            left.append(f"tuning {target}: {type(e).__name__}: {e}"[:300])
        tuned = {key: list(astuple(best)) for key, (form, best) in done.items() if best != form}
        today = datetime.date.today().isoformat()
        records.keep(records.Record(**records.identity(CPU_OR_GPU), when=today, tiles=tuned), out)
    return left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--out", type=Path, default=Path("out/gpu"))
    parser.add_argument("--kinds", nargs="+", choices=tuple(dict(ORDER)), default=tuple(dict(ORDER)))
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes in Triton's interpreter")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with Pool(1 if INTERPRETING else max(1, (os.cpu_count() or 2) - 4)) as pool:
        left = sweep(args.seconds, args.out, pool, args.kinds)
    print("\n".join(f"left out: {what}" for what in left))


if __name__ == "__main__":
    main()
