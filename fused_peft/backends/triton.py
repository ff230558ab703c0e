"""The fused backend: a Problem becomes launches of the Triton kernels.

forward   down (S), then gemm_lowrank (y, z); one launch where rows are few, with S made inside the GEMM
backward  down (dT), gemm_lowrank (dx, and what dd_in sums up), outer (dA, dB, da, dbias, dd_out), add_up
hadamard  one GEMM each way with the weight's tiles formed in it, and the tiles of E reduced to dA and dB

What trains the frozen weight itself (dW, a full GEMM) is the eager backend's.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import dropout, eager, records
from ..core.groups import Groups
from ..core.operands import Operands, Problem
from ..core.torch_internals import unsafe_view
from . import grouped, rates

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
MAX_RANK = 512
MARGIN = 1.03  # a later backend runs where it was measured faster by more than this
_eager = eager.Eager()
_aten = torch.ops.aten


@cache
def kernels() -> ModuleType:
    """``kernel_modules``, imported on first use."""
    from . import kernel_modules

    return kernel_modules


@cache
def _missing() -> str | None:
    try:
        import triton
    except ImportError as e:
        return f"Triton is not installed ({e}); pip install triton"
    version = tuple(int(n) for n in triton.__version__.split(".")[:2])
    return None if version >= (3, 6) else f"Triton {triton.__version__} is older than 3.6; pip install -U triton"


def _rows(t: Tensor | None) -> Tensor | None:
    """t as a matrix whose rows the kernels read fast: copied where its rows overlap (an expanded gradient), are not
    contiguous or aligned though a copy's are, or lie so far apart that offsets in a tile exceed 32 bits."""
    if t is None:
        return None
    t = t if t.dim() == 2 else t.reshape(-1, t.shape[-1])
    row, col = t.stride()
    fine = col == 1 and t.shape[1] <= row < 1 << 23 and (row * t.itemsize % 16 == 0 or t.shape[1] * t.itemsize % 16)
    return t if fine or t.shape[0] <= 1 else t.contiguous()


def _fits(o: Operands) -> None:
    """RuntimeError where x does not fit, before a kernel reads beyond an operand; ``ops`` words it."""
    w = o.A if o.w is None else o.w
    if w is not None and (o.x.shape[-1] != w.shape[1] or (o.w is not None and o.x.dtype != o.w.dtype)):
        raise RuntimeError(f"x {tuple(o.x.shape)} {o.x.dtype} does not fit the weight {tuple(w.shape)} {w.dtype}")


def _dense(o: Operands) -> Operands:
    """The operands with every vector contiguous, as the kernels read them; a learned scalar comes as an expanded G."""
    vectors = {n: getattr(o, n) for n in ("bias", "d_in", "d_out", "a", "G")}
    strided = {n: t.contiguous() for n, t in vectors.items() if t is not None and t.dim() == 1 and t.stride(0) != 1}
    return o._replace(**strided) if strided else o


def _plain(o: Operands) -> bool:
    """One GEMM and nothing to fuse into it: cuBLAS's."""
    return o.A is None and o.d_in is None and o.d_out is None


_MASKS: dict[torch.device, bool] = {}  # of GPUs: what ``_makes_masks`` found


def _makes_masks(device: torch.device) -> bool:
    """Whether the kernel for masks runs on a GPU and makes those of plain PyTorch, which stays where it does not."""
    if _missing() or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    seed, n, p = torch.tensor([-5, 77], dtype=torch.int32, device=device), 1001, 0.3
    try:
        return torch.equal(kernels().dropout.mask(seed, n, dropout.threshold(p)), dropout.keep_mask(seed, (n,), p))
    except Exception:  # the compiler's or the driver's, where eager must go on
        return False


def _mask(seed: Tensor, n: int, threshold: int) -> Tensor | None:
    """For ``core.dropout``: the mask in one launch on a GPU, or on paper."""
    if seed.is_cuda:
        if seed.device not in _MASKS and not torch.cuda.is_current_stream_capturing():
            _MASKS[seed.device] = _makes_masks(seed.device)
        fits = n < 1 << 32 and _MASKS.get(seed.device, False)
    else:
        fits = seed.is_meta and not _missing() and kernels().launch.recording()
    return kernels().dropout.mask(seed, n, threshold) if fits else None


dropout.in_one_launch = _mask


class Triton:
    name = "triton"
    takes_groups = True  # whether its GEMM is that of rows in groups
    overlaps = False  # whether its GEMM waits for S itself, so that it may begin before the launch that makes S ends

    def available(self) -> list[str]:
        if _missing():
            return [_missing()]
        if torch.version.hip:
            return ["the kernels are tuned and tested for NVIDIA GPUs; this PyTorch is built for AMD"]
        if not torch.cuda.is_available() and not kernels().launch.interpreting():
            return ["no CUDA device is available"]
        return []

    def reasons(self, problem: Problem) -> list[str]:
        interpreting = not _missing() and kernels().launch.interpreting()
        found = []
        if problem.device != "cuda" and not (interpreting and problem.device == "cpu"):
            found.append(f"x is on {problem.device}, the kernels run on cuda; move the model and its inputs with .to()")
        if problem.elsewhere:
            found.append(f"x is on {problem.device} but {', '.join(sorted(problem.elsewhere))}; move them with .to()")
        if problem.subclasses:
            found.append(f"{', '.join(sorted(problem.subclasses))}: a tensor subclass has no memory of its own to read")
        if problem.arch is not None and problem.arch < (8, 0):
            found.append(f"sm_{problem.arch[0]}{problem.arch[1]} is older than sm_80")
        if problem.dtype not in _FLOATS and not (interpreting and problem.dtype == torch.float64):
            found.append(f"{problem.dtype} is not float16, bfloat16 or float32")
        if problem.adapter_dtype not in (None, problem.dtype, *_FLOATS):
            found.append(f"the adapter's {problem.adapter_dtype} is not float16, bfloat16 or float32")
        if problem.r > MAX_RANK:
            found.append(f"r={problem.r} is above {MAX_RANK}")
        if problem.G == "matrix" and problem.r > 128:
            found.append(f"a matrix between A and B of side {problem.r} is above one tile (128)")
        if problem.hadamard and (problem.present & {"d_in", "d_out", "a", "G"} or problem.p):
            found.append("scales, dropout or a gate beside a product of weights")
        if problem.p and problem.M * problem.K >= 1 << 32:
            found.append(f"dropout on {problem.M} x {problem.K} elements, above 2^32")
        if problem.groups:
            found += grouped.reasons(problem) if self.takes_groups else ["its GEMM has no groups of rows; triton's has"]
        if not found and (why := records.failed(problem, self.name)):
            found.append(why)
        return found

    def slower(self, problem: Problem) -> str | None:
        measured = records.measured(problem, self.name)
        if measured is None:
            return self.predicted_slower(problem)
        ratio, where = measured
        return (
            f"measured to take {ratio:.2f} times as long as the fastest after it, {where}" if ratio > MARGIN else None
        )

    def predicted_slower(self, problem: Problem) -> str | None:
        """``slower`` where nothing near was measured."""
        if problem.groups:
            return rates.grouped_slower(problem)
        return rates.slower_than_eager(problem) or rates.slower(problem)

    def basis(self, problem: Problem) -> str:
        """What speaks for this backend once it is chosen, in words."""
        measured = records.measured(problem, self.name)
        tested = "" if records.tested(problem, self.name) else "; not self-tested on this GPU"
        if measured is None:
            return f"{self.name}: predicted{rates.said(problem) if self.name == 'triton' else ''}, not measured{tested}"
        return f"{self.name}: measured to take {measured[0]:.2f} of the fastest after it, {measured[1]}{tested}"

    def inlines(self, o: Operands, x: Tensor, mask) -> bool:
        """Whether one launch makes S and y."""
        k = kernels()
        return x.shape[0] <= k.gemm_lowrank.INLINE_ROWS and o.A.shape[0] <= k.gemm_lowrank.INLINE_RANK

    def factor(self, B: Tensor, scale: float, x: Tensor) -> tuple[Tensor, float]:
        """scale·B as the GEMM for x reads it: a tensor and the scale that is left to apply."""
        return B, scale

    def gemm(
        self, x, w, like, update=None, c=None, d_in=None, d_out=None, bias=None, bias_inside=True, mask=None,
        dual=False, u=None, want_y=True, want_z=False,
    ):  # fmt: skip
        """``kernels.gemm_lowrank.gemm``; of many rows, what slows its K loop down or its end is a pass of its own."""
        k = kernels()
        if not self.apart(x, w, like, update, c, d_in, dual, u):
            return self.product(x, w, like, update, c, d_in, d_out, bias, bias_inside, mask, dual, u, want_y, want_z)
        x, w = k.scale.absorbed(x, w, d_in)
        if u is None:
            return self.product(
                x, w, like, update, None, None, d_out, bias, bias_inside, mask, False, None, want_y, want_z
            )  # fmt: skip
        y = self.product(x, w, like, update, None, None, None, None, True, mask).y
        return k.gemm_lowrank.gemm(
            None, None, like, None, y, None, d_out, bias, bias_inside, None, False, u, want_y, want_z
        )  # fmt: skip

    def apart(self, x, w, like, update, c, d_in, dual, u) -> bool:
        """Whether x's scale becomes W's, or x's in a copy, and u's column sums are taken from the stored product."""
        if (d_in is None and u is None) or dual or c is not None:
            return False
        return not isinstance(update, kernels().gemm_lowrank.Inline) and self.many(x, w, like, c)

    @staticmethod
    def many(x, w, like, c) -> bool:
        """Whether the TMA kernel takes the GEMM, and its rows are so many that passes over memory cost less."""
        return rates.many(*like) and kernels().gemm_lowrank.fits_tma(x, w, c, like[1])

    def product(
        self, x, w, like, update=None, c=None, d_in=None, d_out=None, bias=None, bias_inside=True, mask=None,
        dual=False, u=None, want_y=True, want_z=False,
    ):  # fmt: skip
        """``gemm`` in one launch, ``kernels.gemm_lowrank.gemm``; z and y of many rows in two, since a tile that stores
        both is half as wide, and takes half as long again."""
        one = kernels().gemm_lowrank
        both = want_z and want_y and isinstance(update, one.Update) and not dual and u is None
        if not (both and self.many(x, w, like, c)):
            return one.gemm(x, w, like, update, c, d_in, d_out, bias, bias_inside, mask, dual, u, want_y, want_z)
        z = one.gemm(x, w, like, update, c, d_in, None, bias if bias_inside else None, True, mask).y
        last = None if bias_inside else bias
        return one.Result(one.gemm(None, None, like, None, z, None, d_out, last, False).y, z, None, None)

    def forward(self, o: Operands, keep_z: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if _plain(o):
            return _eager.forward(o, keep_z)
        _fits(o)
        k, o = kernels(), _dense(o)
        x, c = _rows(o.x), _rows(o.c)
        lead = (x if c is None else c).shape[0] if o.x.dim() == 2 else o.x.shape[:-1]
        if o.hadamard:
            y = k.hadamard.product(x, o.w, o.B, o.A, o.s, o.bias)
            return y if o.x.dim() == 2 else unsafe_view(y, (*lead, y.shape[1])), None, None
        N = next(t for t in (o.w, o.B) if t is not None).shape[0] if c is None else c.shape[1]
        mask, rest, T, update = None, None, None, None
        if o.seed is not None:
            mask = k.gemm_lowrank.Mask(o.seed, dropout.threshold(o.p), 1 / (1 - o.p))
            if o.drop_base and o.w is not None:  # two GEMMs: what is kept goes on, what is dropped joins at the end
                x = x if o.d_in is None else x * o.d_in.to(x.dtype)
                x, rest = k.dropout.parts(x.contiguous(), *mask)
                o, mask = o._replace(d_in=None, seed=None), None
        if o.A is not None:
            if o.w is not None and rest is None and self.inlines(o, x, mask):
                update = k.gemm_lowrank.Inline(o.A, o.a, o.G, o.h, o.B, o.s)
            else:
                threshold, rescale = (0, 1.0) if mask is None else mask[1:]
                B, scale = self.factor(o.B, o.s, x)
                T, S = k.down.project(x, o.d_in, o.A, o.a, o.G, o.h, o.seed, threshold, rescale, self.overlaps)
                update = k.gemm_lowrank.Update(S, B, scale)
        result = self.gemm(
            x, o.w, (x.shape[0], N), update, c, o.d_in, o.d_out, o.bias, o.d_out is None or o.scale_bias,
            mask if isinstance(update, k.gemm_lowrank.Inline) else None, want_z=keep_z,
        )  # fmt: skip
        if rest is not None:
            result.y.add_(F.linear(rest, o.w))
        y = result.y if o.x.dim() == 2 else unsafe_view(result.y, (*lead, N))  # a view of nothing
        return y, result.T if T is None else T, result.z

    def backward(
        self, dy: Tensor, o: Operands, T: Tensor | None, z: Tensor | None, need: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        if _plain(o):
            return _eager.backward(dy, o, T, z, need)
        k, o, want = kernels(), _dense(o), Operands(*need)
        lead, dy, x = dy.shape[:-1], _rows(dy), _rows(o.x)
        into_x = want.x or want.d_in
        grads = Operands()
        if want.w:
            only_w = tuple(name == "w" and n for name, n in zip(Operands._fields, need, strict=False))
            grads = grads._replace(w=_eager.backward(dy, o._replace(x=x), T, z, only_w)[1])
        if want.c:
            dc = dy if o.d_out is None else dy * o.d_out.to(dy.dtype)
            grads = grads._replace(c=dc.view(*lead, dc.shape[1]))
        if o.hadamard:
            return self._hadamard_backward(dy, lead, x, o, want, grads)[: len(need)]

        M, mask, dual, dT = dy.shape[0], None, False, None
        if o.seed is not None:
            mask = k.gemm_lowrank.Mask(o.seed, dropout.threshold(o.p), 1 / (1 - o.p))
            dual = o.drop_base and o.w is not None
        parts: dict[str, Tensor] = {}  # partial sums, (shares, n): what each becomes
        if o.A is not None and (into_x or want.A or want.a):
            masked = mask is not None and not dual
            A, rescale = self.factor(o.A.t(), mask.rescale if masked else 1.0, dy) if into_x else (None, 1.0)
            alone = (want.B or want.G) and not (want.bias or want.d_out)  # else dy is read again anyway
            where, processors = k.launch.arch_of(dy.device), k.launch.processors(dy.device)
            if alone and k.outer.one_read(where, *dy.shape, o.A.shape[0], processors):
                dT, parts["dB"] = k.outer.project_back(dy, o.d_out, o.B, o.G, o.h, T, o.s, self.overlaps)
            else:
                dT = k.down.project_back(dy, o.d_out, o.B, o.G, o.h, T, o.s, self.overlaps)
        if into_x and (o.w is not None or dT is not None):
            update = None
            if dT is not None:
                update = k.gemm_lowrank.Update(dT, A, rescale, masked)
            K = (o.w if o.w is not None else o.A).shape[1]
            result = self.gemm(
                dy, None if o.w is None else o.w.t(), (M, K), update, None, o.d_out, o.d_in, None, True, mask, dual,
                x if want.d_in else None, want_y=want.x,
            )  # fmt: skip
            if want.x:
                grads = grads._replace(x=result.y.view(*lead, K))
            if want.d_in:
                parts["d_in"] = result.sums if M else dy.new_zeros(1, K)
        return self._reductions(dy, x, o, T, z, dT, mask, want, grads, parts)[: len(need)]

    def grouped_forward(self, o: Operands, groups: Groups, keep_z: bool):
        return grouped.forward(kernels(), o, groups, keep_z)

    def grouped_backward(self, dy, o: Operands, groups: Groups, T, z, need: tuple[bool, ...]) -> list[Tensor | None]:
        return grouped.backward(kernels(), dy, o, groups, T, z, need)

    @staticmethod
    def _reductions(dy, x, o, T, z, dT, mask, want, grads, parts) -> Operands:
        """The gradients that are sums over rows."""
        k, first, second = kernels(), None, None
        into_b = want.B or want.G
        if into_b or want.bias or want.d_out:
            first = k.outer.OverDy(
                dy, T if into_b else None, o.h, o.d_out, o.s, want.bias, o.scale_bias and o.d_out is not None,
                z if want.d_out else None, "dB" in parts,
            )  # fmt: skip
        da = torch.sum(dT, 0, dtype=o.a.dtype) if want.a and not want.A else None  # x is not kept then
        if da is not None:
            grads = grads._replace(a=da)
        if want.A:
            seed = () if mask is None else mask
            second = k.outer.OverX(x, dT, o.d_in, *seed, sums=want.a)
        sums, others = k.outer.reduce_rows(first, second, *parts.values())
        sums |= dict(zip(parts, others, strict=True))
        found = {"bias": "sum", "d_in": "d_in", "d_out": "dot", "A": "dA", "a": "da"}
        found = {name: sums.get(key) for name, key in found.items()}
        if into_b:
            BG = sums["dB"].view(o.B.shape).to(o.B.dtype)
            if o.G is None:
                found["B"] = BG
            elif o.G.dim() == 1:
                found |= {"B": BG * o.G, "G": (BG * o.B).sum(0)}
            else:
                found |= {"B": BG @ o.G.t(), "G": o.B.t() @ BG}
        wanted = {n: t for n, t in found.items() if t is not None and getattr(want, n)}
        return grads._replace(**{n: t.to(getattr(o, n).dtype) for n, t in wanted.items()})

    @staticmethod
    def _hadamard_backward(dy, lead, x, o, want, grads) -> Operands:
        k = kernels()
        if want.x:
            dx = k.hadamard.product(dy, o.w.t(), o.A.t(), o.B.t(), o.s, None)
            grads = grads._replace(x=dx.view(*lead, dx.shape[1]))
        if want.bias:
            grads = grads._replace(bias=torch.sum(dy, 0, dtype=o.bias.dtype))
        if want.A or want.B:
            dA, dB = k.hadamard.gradients(dy, x, o.w, o.A, o.B, o.s)
            grads = grads._replace(
                A=dA.to(o.A.dtype) if want.A else None, B=dB.to(o.B.dtype) if want.B else None
            )  # fmt: skip
        return grads

    def row_norm(self, W: Tensor, squared: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
        k = kernels()
        if A.shape[0] > k.row_norm.MAX_RANK:
            return eager.row_norm(W, squared, A, B, s)
        return k.row_norm.norm(W, squared, A, B, s)
