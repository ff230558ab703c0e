"""A table that is looked up, and the update of its rows: y = E[ids] + s · (A[:, ids]ᵀ Gᵀ) Bᵀ, times the table's scale.

E (V, N), ids (...) of any shape, A (r, V), B (N, r): the expression on one-hot rows, which nobody makes. One product
adds the update in y's dtype (in fp32 on a CPU without instructions for that). Kept for backward are the ids and A[:,
ids]; of what has the size of the vocabulary only A's own gradient is made. What the table does to its gradient
(``padding_idx``, ``scale_grad_by_freq``) it does to A's. No dropout acts: Hugging Face PEFT has none on ids either.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .factors import Factors
from .frozen import row_scale
from .torch_internals import HALF_PRODUCTS


def plus(y: Tensor, table: nn.Embedding, ids: Tensor, f: Factors) -> Tensor:
    """The table's rows y (..., N) at ids (...) with the update of factors that are A, B and maybe G and s."""
    T = F.embedding(ids, f.A.t(), table.padding_idx, scale_grad_by_freq=table.scale_grad_by_freq)
    s, by = f.s, row_scale(table)
    with ops.no_autocast(y.device.type):  # which no lookup heeds
        if f.G is not None:
            T = T * f.G if f.G.dim() == 1 else T @ f.G.t()
        if isinstance(by, Tensor):
            T = T * by.to(T.dtype)
        elif by is not None:
            s = s * by
        T = T.reshape(-1, T.shape[-1])
        if y.is_cpu and not HALF_PRODUCTS.get(y.dtype, True):  # whose products take 20 times as long as fp32's
            return torch.add(y, (T.float() @ f.B.t().float()).to(y.dtype).view(y.shape), alpha=s)
        T = T.to(y.dtype)
        return torch.addmm(y.reshape(-1, y.shape[-1]), T, f.B.t().to(y.dtype), alpha=s).view(y.shape)
