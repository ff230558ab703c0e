"""bitsandbytes' quantised layers, as weights that the fused call decodes by itself.

    Linear4bit     W = table[code] * absmax of its block, two codes a byte; absmax fp32, or nested: codes as well
    Linear8bitLt   W = code * SCB / 127, a scale a row

Both are known by the names of their classes and attributes, so nothing is imported. Of a weight the library's own
tensors are kept, none copied. Where bitsandbytes is loaded its own kernel decodes, else PyTorch, to the same bits.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import frozen
from ..core.frozen import Coded, Frozen, Stored

CHUNK = 1 << 20  # elements that are decoded at a time without bitsandbytes
_OWN = (torch.float32, torch.float16, torch.bfloat16)  # what its kernel decodes to
_LARGE = 2048  # elements of a block from which bitsandbytes itself leaves its kernel


@functools.cache
def library_class(kind: type, name: str, library: str) -> type | None:
    """A library's class of that name which a class is or derives from."""
    return next((k for k in kind.__mro__ if k.__name__ == name and k.__module__.partition(".")[0] == library), None)


def _was_cast(module: nn.Module) -> bool:
    """Whether 4-bit codes that were stored as numbers of a floating dtype were cast as such."""
    weight = module.weight
    size, codes = weight.element_size(), weight.numel() * weight.element_size()
    if abs(2 * codes - module.out_features * module.in_features) >= 2 * size:
        return True
    stored = getattr(weight, "quant_storage", getattr(module, "quant_storage", weight.dtype))
    return stored.is_floating_point and stored != weight.dtype


class Packed(Frozen):
    """A layer of another library whose output is x Wᵀ + b of what it stores."""

    packed = True
    layer: str  # the name of its class
    library = "bitsandbytes"

    def reads(self, module: nn.Module) -> bool | str:
        kind = library_class(type(module), self.layer, self.library)
        if kind is None or type(module).forward is not kind.forward or "forward" in module.__dict__:
            return False
        return self.why_not(module) or True

    def why_not(self, module: nn.Module) -> str | None:
        """Why its weight cannot be read now, or None."""
        raise NotImplementedError

    def stored(self, module: nn.Module) -> Stored:
        raise NotImplementedError

    def shape(self, module: nn.Module) -> tuple[int, int]:
        return module.out_features, module.in_features

    def matrix(self, module: nn.Module) -> Stored:
        """Its parts. RuntimeError where they cannot be read now."""
        if reason := self.why_not(module):
            raise RuntimeError(f"a {self.layer} cannot be computed: {reason}")
        return self.stored(module)


class Bits4(Packed):
    """Linear4bit: NF4 or FP4."""

    layer = "Linear4bit"
    requantised = "keeps 1 to 4 % (nf4) or 9 to 14 % (fp4) of an update of 1 to 3 % of its norm"

    def state(self, module: nn.Module):
        """How its weight is quantised: FSDP takes that from the parameter and leaves the module's."""
        state = getattr(module.weight, "quant_state", None)
        return getattr(module, "quant_state", None) if state is None else state

    def why_not(self, module: nn.Module) -> str | None:
        state = self.state(module)
        if state is None:
            return "its weight is not quantised yet; move the model to its device first, e.g. model.to('cuda')"
        if getattr(state, "packing_format_for_cpu", False):
            return (
                "bitsandbytes repacked its weight for inference on this CPU, and passes no gradient through that; load "
                "the model anew, and adapt it before it is called in eval mode"
            )
        if _was_cast(module):
            return (
                f"its codes were cast to {module.weight.dtype}, which loses them, by .to(dtype) of the model or by a "
                "mixed precision policy whose param_dtype is not their quant_storage; load it anew, with one dtype "
                "for both"
            )
        if state.quant_type not in ("nf4", "fp4"):
            return f"its quant_type is {state.quant_type!r}, which is neither 'nf4' nor 'fp4'"
        return None

    def stored(self, module: nn.Module) -> Stored:
        s = self.state(module)
        nested = () if s.state2 is None else (s.state2.code, s.state2.absmax, s.offset)
        N, K = self.shape(module)
        spec = f"bnb4:{s.quant_type},{s.blocksize},{s.state2.blocksize if nested else 0},{N},{K}"
        parts = (module.weight.detach(), s.absmax, s.code, *nested)
        compute = module.compute_dtype
        return Stored(parts, spec, (N, K), s.dtype if compute is None else compute, compute)

    def about(self, module: nn.Module) -> str:
        s = self.state(module)
        return f"{s.quant_type} with a scale for {s.blocksize} values"


class Bits8(Packed):
    """Linear8bitLt that holds int8 alone; x is not quantised, which it is in some of bitsandbytes' own forwards."""

    layer = "Linear8bitLt"
    requantised = "puts an error of 25 to 94 % into an update of 1 to 3 % of its norm"

    def reads(self, module: nn.Module) -> bool | str:
        return not getattr(getattr(module, "weight", None), "has_fp16_weights", True) and super().reads(module)

    def scales(self, module: nn.Module) -> Tensor | None:
        """SCB (N,): the weight's, or, from its first forward on, the state's."""
        own = getattr(module.weight, "SCB", None)
        return module.state.SCB if own is None else own

    def why_not(self, module: nn.Module) -> str | None:
        if module.weight.dtype != torch.int8:
            return "its weight is not quantised yet; move the model to its device first, e.g. model.to('cuda')"
        if self.scales(module) is None:
            return "its weight has lost the scales (SCB); load the model anew"
        return None

    def stored(self, module: nn.Module) -> Stored:
        return Stored((module.weight.detach(), self.scales(module)), "bnb8", self.shape(module), torch.float32)

    def about(self, module: nn.Module) -> str:
        return "int8 with a scale a row"


def decode_4bit(parts: Sequence[Tensor], rest: str, dtype: torch.dtype) -> Tensor:
    """W (N, K) of codes two a byte, absmax a block, table (16,), and for nested absmax its table (256,), absmax and
    offset; ``rest``: type, elements a block, blocks a nested block (0: not nested), N, K. Rounded once, from fp32."""
    codes, absmax, table, *nested = parts
    kind, block, block2, N, K = _of_4bit(rest)
    codes = codes.reshape(-1).view(torch.uint8)
    own = torch.ops.bitsandbytes if "bitsandbytes" in sys.modules else None
    if nested:
        table2, absmax2, offset = nested
        if own is not None:  # one operation: on a busy CPU each one waits for its threads
            absmax = own.dequantize_blockwise.default(absmax, absmax2, table2, block2, torch.float32).add_(offset)
        else:
            absmax = (table2[absmax.int()] * absmax2.repeat_interleave(block2)[: absmax.numel()]).add_(offset)
    absmax = absmax.float()
    if own is not None and _kernel_takes(block, K):
        to = dtype if dtype in _OWN else torch.float32
        return own.dequantize_4bit.default(codes, absmax, block, kind, (N, K), to).to(dtype)
    return _looked_up(codes, absmax, table.float(), block, N * K, dtype).view(N, K)


def coded_4bit(parts: Sequence[Tensor], rest: str, whole: bool) -> Coded | None:
    """The weight of ``decode_4bit``; None where bitsandbytes' own kernel decodes it whole."""
    codes, absmax, table, *nested = parts
    _, block, block2, N, K = _of_4bit(rest)
    if whole and "bitsandbytes" in sys.modules and _kernel_takes(block, K):
        return None
    return Coded(codes, absmax, (N, K), block, table.float(), nested=(*nested, block2) if nested else None)


def _of_4bit(rest: str) -> tuple[str, int, int, int, int]:
    kind, *sizes = rest.split(",")
    return kind, *map(int, sizes)


def _kernel_takes(block: int, K: int) -> bool:
    """Whether bitsandbytes decodes 4 bits by its kernel."""
    return block < _LARGE and K % 2 == 0


def _looked_up(codes: Tensor, absmax: Tensor, table: Tensor, block: int, n: int, dtype: torch.dtype) -> Tensor:
    """The n values of codes, first the high half of each byte."""
    out = torch.empty(n, dtype=dtype, device=codes.device)
    pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)  # a byte's two values
    step = max(1, CHUNK // block) * block
    for i in range(0, n, step):
        end = min(i + step, n)
        values = pairs[codes[i // 2 : (end + 1) // 2].int()].view(-1)[: end - i]
        scales = absmax[i // block : -(-end // block)]
        whole = (end - i) // block * block
        values[:whole].view(-1, block).mul_(scales[: whole // block, None])
        values[whole:].mul_(scales[-1])
        out[i:end] = values
    return out


def decode_8bit(parts: Sequence[Tensor], rest: str, dtype: torch.dtype) -> Tensor:
    """W (N, K) of codes (N, K) in int8 and SCB (N,), as bitsandbytes' backward makes it."""
    codes, scales = parts
    return codes.to(dtype).mul_(scales[:, None].mul(1.0 / 127.0))


def coded_8bit(parts: Sequence[Tensor], rest: str, whole: bool) -> Coded:
    """The weight of ``decode_8bit``."""
    codes, scales = parts
    return Coded(codes, scales, tuple(codes.shape), (1, codes.shape[1]), by=1.0 / 127.0)


frozen.register_kinds(Bits4(), Bits8(), bnb4=(decode_4bit, coded_4bit), bnb8=(decode_8bit, coded_8bit))
