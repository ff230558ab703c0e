"""The sm_90a backend: the Triton backend with its 16-bit GEMMs computed by csrc/ where TMA can address the operands.

forward   down (S) and one GEMM, which starts while down is running and waits for S before its low-rank steps; or one
          GEMM that makes S itself
backward  dx from the same GEMM; what sums over rows, and GEMMs that csrc/ does not take, are the Triton backend's

Off by default, as ``hopper`` says.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from ..core.operands import Problem
from ..kernels import configs
from . import extension, hopper, plans, rates
from . import triton as base
from .hopper import HALF, LEAST
from .hopper import rows as _rows
from .plans import CAST, KINDS, Call, Cast, Factor, Plan

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@configs.closed_form("gemm_cuda")
def config_of_gemm(arch: tuple[int, int], bits: int, M: int, N: int, K: int, r: int) -> configs.Config:
    tiles = configs.tiles
    waves = lambda tile: tiles(tiles(M, tile[0]) * tiles(N, tile[1]), 132) * tile[0] * tile[1]  # noqa: E731
    BM, BN = min(plans.TILES, key=waves)
    paired = tiles(M, BM) if BN >= BM else tiles(N, BN)  # an odd one out is computed for nothing
    whole = tiles(M, BM) * tiles(N, BN) >= 132 and (paired % 2 == 0 or paired >= 16)
    inline = 0 < r <= max(plans.INNER) and rates.inlines(M, K, r, BM)
    return configs.Config(BM, BN, 64, 12, 4, cluster=2 if whole else 1, inline=inline)


def config_for(device: torch.device, M: int, N: int, K: int, r: int) -> configs.Config:
    return configs.choose("gemm_cuda", base.kernels().launch.arch_of(device), 16, M, N, K, r)


class _Gemm:
    """The kernel as ``launch.submit`` starts and records kernels."""

    __name__ = "gemm_cuda"
    arg_names = (
        "x", "w", "s", "b", "a", "t", "d_in", "d_out", "bias", "seed", "y", "z", "M", "N", "K", "R", "threshold",
        "bias_inside", "across", "form", "inner", "overlap", "BM", "BN", "group", "cluster",
    )  # fmt: skip

    def __getitem__(self, grid):
        return lambda **args: self._start(grid, **args)

    def _start(self, grid, form, inner, BM, BN, cluster, num_warps, num_stages, enable_fp_fusion, **args):
        x = args["x"]
        plan = Plan(NAMES[x.dtype], BM, BN, args["across"], form, inner)
        cluster_m, cluster_n = (cluster, 1) if BN >= BM else (1, cluster)
        vectors = {f"{n}_kind": KINDS[args[n].dtype] for n in ("d_in", "d_out", "bias") if args[n] is not None}
        pairs = ((n, args[n]) for n in ("x", "w", "s", "b", "a"))
        rows = {f"{n}_stride": t.stride(0) for n, t in pairs if t is not None}
        call = Call(
            **args, **vectors, **rows, dtype=KINDS[x.dtype], cluster_m=cluster_m, cluster_n=cluster_n,
            processors=grid[0], seed_of_order=EMULATOR["seed"], device=x.device.index,
            stream=base.kernels().launch.stream(x.device),
        )  # fmt: skip
        extension.call(plan.name, call, not x.is_cuda)
        pointers = {getattr(Call, n).offset: t for n, t in args.items() if isinstance(t, Tensor)}
        return extension.Started(plan.name, call, not x.is_cuda, pointers)


GEMM = _Gemm()
EMULATOR = {"seed": 0, "processors": 4}  # the emulator's order of events, and how many blocks it runs


@cache
def _broken(emulated: bool) -> str | None:
    """Why csrc/ is not to be had; builds what every call needs to know."""
    try:
        extension.probe(emulated)
    except extension.BuildError as e:
        return str(e)
    return None


def fits(x, w, N: int, update, c, d_in, d_out, bias, mask, dual: bool, u) -> bool:
    """Whether csrc/ takes the GEMM that ``kernels.gemm_lowrank.gemm`` is asked for."""
    k = base.kernels()
    if not hopper.fits(x, w, N, c, dual, u):
        return False
    if any(v is not None and (v.data_ptr() % 16 or v.dtype not in KINDS) for v in (d_in, d_out, bias)):
        return False
    if update is None:
        return True
    inline = isinstance(update, k.gemm_lowrank.Inline)
    if update.B.shape[1] % 8 or (not inline and not _rows(update.S)):
        return False
    if inline:
        return _inlines(update.A.shape[0], mask, update.a, update.G, update.h, d_in) and _rows(w)
    return not update.masked or (d_in is None and not _rows(w))


def _cast(x: Tensor, *factors: tuple[Tensor, float]) -> list[Tensor]:
    """Each factor times its scale as contiguous rows of x's dtype, rounded once; one that is so already as it is."""
    launch, found, jobs, pointers = base.kernels().launch, [], [], {}
    for t, scale in factors:
        fine = t.dtype == x.dtype and scale == 1 and _rows(t)
        found.append(t if fine else torch.empty(t.shape, dtype=x.dtype, device=x.device))
        if not fine:
            at = Cast.factors.offset + len(jobs) * ctypes.sizeof(Factor)
            pointers |= {at + Factor.source.offset: t, at + Factor.to.offset: found[-1]}
            jobs.append(
                Factor(
                    source=t, to=found[-1], row_stride=t.stride(0), column_stride=t.stride(1), rows=t.shape[0],
                    columns=t.shape[1], kind=KINDS[t.dtype], scale=scale,
                )
            )  # fmt: skip
    if jobs and not launch.recording():
        cast = Cast(
            factors=(Factor * 2)(*jobs), dtype=KINDS[x.dtype], device=x.device.index, stream=launch.stream(x.device)
        )
        with launch.on(x.device):
            extension.call(CAST, cast, not x.is_cuda)
        launch.tell(None, None, None, None, extension.Started(CAST, cast, not x.is_cuda, pointers))
    return found


def _inlines(r: int, mask, a, G, h: str, d_in) -> bool:
    """Whether T can be made inside the GEMM: nothing on x before it, nothing after it."""
    plain = mask is None and a is None and G is None and d_in is None and h == "identity"
    return plain and r <= max(plans.INNER)


class Cuda(hopper.Hopper):
    name = "cuda"
    overlaps = True

    def available(self) -> list[str]:
        found = super().available()
        if not found and (known := extension.failure(not torch.cuda.is_available())):
            found = [known]
        return found

    def reasons(self, problem: Problem) -> list[str]:
        found = super().reasons(problem)
        if not found and (broken := _broken(problem.device != "cuda")):
            found.append(broken)
        return found

    def unfit(self, problem: Problem) -> list[str]:
        found = super().unfit(problem)
        if problem.r % 8:
            found.append(f"r={problem.r} is not a multiple of 8, so that S's rows are not whole 16 bytes")
        return found

    def factor(self, B: Tensor, scale: float, x: Tensor) -> tuple[Tensor, float]:
        """The GEMM reads rows of x's dtype, the scale in them; what it cannot read anyway stays as it is."""
        if B.shape[1] % 8 or x.dtype not in HALF:
            return B, scale
        return _cast(x, (B, scale))[0], 1.0

    def inlines(self, o, x: Tensor, mask) -> bool:
        if super().inlines(o, x, mask):
            return True
        r = o.A.shape[0]
        return (
            x.shape[0] >= LEAST
            and r % 8 == 0
            and _inlines(r, mask, o.a, o.G, o.h, o.d_in)
            and fits(x, o.w, o.w.shape[0], None, o.c, None, o.d_out, o.bias, None, False, None)
            and _rows(o.w)
            and config_for(x.device, x.shape[0], *o.w.shape, r).inline
        )

    def ways(self, p: Problem) -> dict[str, dict]:
        """Where T can be made inside the GEMM or before it, both, for calibration to test and time: fields of its
        config, by names that begin with the backend's."""
        if p.present & {"a", "d_in", "c"} or p.G != "none" or p.h != "identity" or p.p or p.groups or p.stored:
            return {}
        if "w" not in p.present or p.M < LEAST or p.r % 8 or not 0 < p.r <= max(plans.INNER):
            return {}
        return {"cuda INLINE": {"inline": True}, "cuda LATE": {"inline": False}}

    def tiles(self, p: Problem) -> tuple[str, configs.Config]:
        """The key in a record's tiles that a call's forward GEMM goes by, and the config that it now has."""
        of = "gemm_cuda", p.arch or (9, 0), 16, p.M, p.N, p.K, p.r
        return configs.key(*of), configs.choose(*of)

    def product(
        self, x, w, like, update=None, c=None, d_in=None, d_out=None, bias=None, bias_inside=True, mask=None,
        dual=False, u=None, want_y=True, want_z=False,
    ):  # fmt: skip
        k, (M, N) = base.kernels(), like
        if not fits(x, w, N, update, c, d_in, d_out, bias, mask, dual, u):
            return super().product(x, w, like, update, c, d_in, d_out, bias, bias_inside, mask, dual, u, want_y, want_z)
        inline, across = isinstance(update, k.gemm_lowrank.Inline), not _rows(w)
        R = 0 if update is None else update.B.shape[1]
        K = x.shape[1]
        config = config_for(x.device, M, N, K, R)
        inner = 0
        if inline:
            inner = min(n for n in plans.INNER if n >= R)
        BM, BN = plans.tile_for(config.BM, config.BN, inner)
        A = B = S = T = None
        if inline:
            B, A = _cast(x, (update.B, update.scale), (update.A, 1.0))
            T = x.new_empty(M, R)
        elif update is not None:
            (B,), S = _cast(x, (update.B, update.scale)), update.S
        masked = update is not None and not inline and update.masked
        form = "INLINE" if inline else "MASKED" if masked else "SCALED" if d_in is not None else "LATE"
        out = lambda wanted: x.new_empty(M, N) if wanted else None  # noqa: E731
        y, z = out(want_y), out(want_z)
        args = {
            "x": x, "w": w.t() if across else w, "s": S, "b": B, "a": A, "t": T, "d_in": d_in, "d_out": d_out,
            "bias": bias, "seed": mask.seed if masked else None, "y": y, "z": z, "M": M, "N": N, "K": K, "R": R,
            "threshold": mask.threshold if masked else 0, "bias_inside": bias_inside, "across": across, "form": form,
            "inner": inner, "overlap": S is not None, "BM": BM, "BN": BN, "group": config.group,
            "cluster": config.cluster,
        }  # fmt: skip
        processors = k.launch.processors(x.device)
        if not x.is_cuda:
            processors = min(processors, EMULATOR["processors"])
        k.launch.submit(GEMM, (processors,), args, config, x.device)
        return k.gemm_lowrank.Result(y, z, None, T)
