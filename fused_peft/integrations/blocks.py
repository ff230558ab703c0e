"""Weights of codes with a scale, and perhaps a zero, for each block of them: W = (code - zero) * scale of its block.

    FP8Linear                   Transformers': float8_e4m3fn codes, a scale a block of e.g. 128 x 128, or one for all
    Int8Tensor                  torchao's weight-only int8, a scale a row or one for all
    Float8Tensor                torchao's weight-only float8
    IntxUnpackedToInt8Tensor    torchao's weight-only integers of 1 to 8 bits, held in int8, a scale a group

Known by the names of their classes and attributes, so nothing is imported. A torchao weight that quantises x as well is
none of them: its own product stays. FP8Linear quantises x too, and the fused call does not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import frozen
from ..core.frozen import Coded, Stored
from .quantised import CHUNK, Packed

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def _blocks(codes: Tensor, scales: Tensor, zeros: Tensor | None, block: tuple[int, int], dtype: torch.dtype) -> Stored:
    """A weight of codes (N, K) with a scale and a zero for each ``block`` of them, whose values are read in dtype."""
    shape = tuple(-(-n // b) for n, b in zip(codes.shape, block, strict=True))
    parts = (codes, *(t.reshape(shape) for t in (scales, zeros) if t is not None))
    return Stored(parts, f"blocks:{block[0]},{block[1]}", tuple(codes.shape), dtype)


def _why_not_blocks(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> str | None:
    """Why scales do not fit codes (N, K) in blocks of that shape, or None."""
    need = tuple(-(-n // b) for n, b in zip(codes.shape, block, strict=True))
    if scales.numel() == need[0] * need[1]:
        return None
    return (
        f"its scales have shape {tuple(scales.shape)}, but blocks of {tuple(block)} of a weight {tuple(codes.shape)} "
        f"need {need}; load the model anew"
    )


def decode_blocks(parts: tuple[Tensor, ...], rest: str, dtype: torch.dtype) -> Tensor:
    """W (N, K) of codes (N, K) and, for each block, of N and K as ``rest`` says, a scale and perhaps a zero, (⌈N/bn⌉,
    ⌈K/bk⌉). Rounded once, from fp32."""
    codes, *each = parts
    N, K = codes.shape
    bn, bk = map(int, rest.split(","))
    per_row = K if bk >= K else bk if K % bk == 0 else 1
    scales, *zeros = (_spread(t.float(), bn, bk, per_row, N, K) for t in each)
    W = torch.empty(N, K // per_row, per_row, dtype=dtype, device=codes.device)
    step = max(1, CHUNK // K) if codes.device.type == "cpu" else N  # in its cache
    for i in range(0, N, step):
        some = codes[i : i + step].reshape(-1, K // per_row, per_row)
        if zeros:
            W[i : i + step] = (some.float() - zeros[0][i : i + step]).mul_(scales[i : i + step])
        else:  # codes of 8 bits are exact in every dtype
            W[i : i + step].copy_(some).mul_(scales[i : i + step])
    return W.view(N, K)


def _spread(t: Tensor, bn: int, bk: int, per_row: int, N: int, K: int) -> Tensor:
    """A value a block as (N, K / per_row, 1)."""
    t = t.expand(N, -1) if t.shape[0] == 1 else t if bn == 1 else t.repeat_interleave(bn, 0)[:N]
    if per_row == 1 and bk > 1:
        t = t.repeat_interleave(bk, 1)[:, :K]
    return t.unsqueeze(-1)


def _about(codes: str, block: tuple[int, int], shape: tuple[int, int]) -> str:
    (bn, bk), (N, K) = block, shape
    if bn >= N and bk >= K:
        return f"{codes} with one scale"
    return f"{codes} with a scale " + ("a row" if (bn, bk) == (1, K) else f"for {bn} x {bk} values")


class Fp8(Packed):
    """Transformers' FP8Linear."""

    layer, library = "FP8Linear", "transformers"

    def reads(self, module: nn.Module) -> bool | str:
        return getattr(getattr(module, "weight", None), "dtype", None) in (*_FLOAT8, torch.int8) and super().reads(
            module
        )

    def block(self, module: nn.Module) -> tuple[int, int]:
        return tuple(self.shape(module) if module.block_size is None else module.block_size)

    def why_not(self, module: nn.Module) -> str | None:
        if module.weight.dtype not in _FLOAT8:
            return (
                "its weight is FP4, two values in one int8, through which Transformers passes no gradient; exclude it"
            )
        return _why_not_blocks(module.weight, module.weight_scale_inv, self.block(module))

    def stored(self, module: nn.Module) -> Stored:
        dtype = torch.float32 if module.bias is None else module.bias.dtype
        return _blocks(module.weight.detach(), module.weight_scale_inv.detach(), None, self.block(module), dtype)

    def about(self, module: nn.Module) -> str:
        return _about(str(module.weight.dtype).removeprefix("torch."), self.block(module), self.shape(module))


class Torchao(Packed):
    """nn.Linear whose weight is one of torchao's tensors that quantise the weight alone."""

    layer, library = "Linear", "torch"
    quantises_x = ("act_quant_kwargs", "activation_quantization", "act_pre_scale")  # attributes, None where it does not

    def holds(self, weight: Tensor) -> bool:
        named = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
        ours = type(weight).__name__ in named and type(weight).__module__.partition(".")[0] == "torchao"
        return ours and weight.dim() == 2 and all(getattr(weight, n, None) is None for n in self.quantises_x)

    def reads(self, module: nn.Module) -> bool | str:
        return self.holds(getattr(module, "weight", None)) and super().reads(module)

    def block(self, weight: Tensor) -> tuple[int, int]:
        if block := getattr(weight, "block_size", None):
            return tuple(block)
        rows, columns = weight.scale.shape if weight.scale.dim() == 2 else (1, 1)
        return -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)

    def why_not(self, module: nn.Module) -> str | None:
        return _why_not_blocks(module.weight.qdata, module.weight.scale, self.block(module.weight))

    def stored(self, module: nn.Module) -> Stored:
        w = module.weight
        return _blocks(w.qdata, w.scale, getattr(w, "zero_point", None), self.block(w), w.dtype)

    def about(self, module: nn.Module) -> str:
        w = module.weight
        codes = str(getattr(w, "target_dtype", w.qdata.dtype)).removeprefix("torch.")
        return _about(codes, self.block(w), tuple(w.shape))


frozen.register_kinds(Fp8(), Torchao(), blocks=(decode_blocks, Coded.blocks))
