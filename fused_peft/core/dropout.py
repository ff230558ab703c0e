"""Dropout masks as a pure function of (seed, element), so a mask is regenerated and never stored.

Element e of a tensor (row-major) takes 16 of the 32 bits that a counter-based hash gives for word e >> 1 (low half for
even e): keep(e) ⇔ half(e) ≥ threshold(p). Every backend, kernel and device computes these same bits. The kept fraction
is resolved to 2⁻¹⁶. The mixing is a three-multiply 32-bit finaliser on the word index, with the second half of the
seed injected after the first multiply so that two seeds never give shifted copies of one stream. Shifts are logical;
arithmetic is modulo 2³².
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .torch_internals import tracing, transforming

# (shift, multiplier) of each round; the last shift has no multiply. Constants of C. Wellons' triple32.
ROUNDS = ((17, 0xED5AD4BB - (1 << 32)), (11, 0xAC4C1B51 - (1 << 32)), (15, 0x31848BAB))
LAST_SHIFT = 14


def new_seed(device: torch.device) -> Tensor:
    """Two int32 words from the device's default generator: reproducible under manual_seed, no host synchronisation."""
    return torch.randint(-(1 << 31), (1 << 31) - 1, (2,), dtype=torch.int32, device=device)


def threshold(p: float) -> int:
    """The smallest signed 16-bit value that is kept."""
    return min(round(p * 65536), 65535) - 32768


def _bits(seed: Tensor, n: int) -> Tensor:
    """n signed 16-bit values, uniform."""
    h = torch.arange((n + 1) // 2, dtype=torch.int32, device=seed.device) ^ seed[0]  # batched when the seed is (vmap)

    def xor_shift(k):
        h.bitwise_xor_((h >> k).bitwise_and_((1 << (32 - k)) - 1))

    for i, (shift, multiplier) in enumerate(ROUNDS):
        xor_shift(shift)
        h.mul_(multiplier)
        if i == 0:
            h.bitwise_xor_(seed[1])
    xor_shift(LAST_SHIFT)
    if transforming():  # vmap of PyTorch 2.11 has no view as another dtype
        return torch.stack([h << 16 >> 16, h >> 16], -1).to(torch.int16).flatten()[:n]
    return h.view(torch.int16)[:n]


def keep_mask(seed: Tensor, shape, p: float) -> Tensor:
    """Boolean mask of ``shape``, True where the element is kept.

    seed: int32 (2,), as made by ``new_seed``; p: dropout probability in [0, 1).
    """
    return (_bits(seed, math.prod(shape)) >= threshold(p)).view(shape)


def in_one_launch(seed: Tensor, n: int, threshold: int) -> Tensor | None:
    """The boolean mask (n,) from a kernel, or None; a backend that has kernels replaces this function."""
    return None


class Mask:
    """The mask of one call, its bits computed once and applied to several tensors of the same shape."""

    def __init__(self, seed: Tensor, shape, p: float):
        n, self.threshold = math.prod(shape), threshold(p)
        plain = type(seed) is Tensor and not (transforming() or tracing() or is_compiling())
        keep = in_one_launch(seed, n, self.threshold) if plain else None
        self.keep = keep if keep is None else keep.view(shape)
        self.bits = _bits(seed, n).view(shape) if keep is None else None

    def rows(self, rows: slice) -> Mask:
        """The mask of these rows alone."""
        part = object.__new__(Mask)
        part.threshold = self.threshold
        part.keep, part.bits = (None if t is None else t[rows] for t in (self.keep, self.bits))
        return part

    def __call__(self, x: Tensor) -> Tensor:
        """A new tensor x ⊙ keep; the caller owes the factor 1 / (1 - p)."""
        if self.keep is not None:
            return x * self.keep
        if x.element_size() == 2:  # all 16-bit lanes: 0 or -1 as a bit mask is three times faster than a product
            keep = self.bits.clone().ge_(self.threshold).neg_()
            return keep.bitwise_and_(x.view(torch.int16)).view(x.dtype)
        keep = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        torch.ge(self.bits, self.threshold, out=keep)
        return keep.mul_(x)


def mask_of(seed: Tensor | Mask, shape, p: float) -> Mask:
    """The mask of a seed, or the one that takes its place."""
    return seed if type(seed) is Mask else Mask(seed, shape, p)
