"""What the kernels share inside a tile: the matrix product, the activations, the order of tiles, the update's tiles."""

import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. PRECISION: "ieee" or "tf32" for fp32 operands, "widen" to compute narrow operands in fp32."""
    if PRECISION == "widen":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def tanh(t):
    """tanh without the cancellation of its exponential form near zero."""
    e = tl.exp(-2 * tl.abs(t))
    far = (1 - e) / (1 + e)
    q = t * t
    near = 1 + q * (-0.3333333333333333 + q * (0.13333333333333333 + q * (-0.05396825396825397 + q * (
        0.021869488536155203 + q * (-0.008863235529902197 + q * 0.003592128036572481)))))  # fmt: skip
    return tl.where(q < 0.04, t * near, tl.where(t < 0, -far, far))


@triton.jit
def activate(t, H: tl.constexpr):
    """h(t), exact (erf) gelu."""
    if H == "relu":
        return tl.where(t <= 0, 0.0, t)  # NaN stays NaN
    elif H == "silu":
        return t / (1 + tl.exp(-t))
    elif H == "gelu":
        return 0.5 * t * (1 + tl.erf(t * 0.7071067811865476))
    elif H == "tanh":
        return tanh(t)
    else:
        return t


@triton.jit
def slope(t, H: tl.constexpr):
    """h'(t)."""
    if H == "relu":
        return tl.where(t <= 0, 0.0, 1.0).to(t.dtype)
    elif H == "silu":
        sigmoid = 1 / (1 + tl.exp(-t))
        return sigmoid * (1 + t * (1 - sigmoid))
    elif H == "gelu":
        return 0.5 * (1 + tl.erf(t * 0.7071067811865476)) + t * tl.exp(-0.5 * t * t) * 0.3989422804014327
    elif H == "tanh":
        u = tanh(t)
        return 1 - u * u
    else:
        return tl.full(t.shape, 1.0, t.dtype)


@triton.jit
def place(tile, M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile) of the tile-th program: bands of GROUP row tiles, so that a wave shares its operands."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = GROUP * tiles_n
    first = tile // band * GROUP
    rows = min(tiles_m - first, GROUP)
    return first + tile % band % rows, tile % band // rows


@triton.jit
def _tile(row, col, n_rows, n_cols, row_stride, col_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """(offset of the tile at (row, col), offsets in it, which of them lie inside the matrix). Only the first needs 64
    bits, and only the first changes in a loop."""
    wide = tl.full((), 0, tl.int64)
    i, j = tl.arange(0, ROWS), tl.arange(0, COLS)
    inside = (row + i < n_rows)[:, None] & (col + j < n_cols)[None, :]
    return (
        (wide + row) * row_stride + (wide + col) * col_stride,
        i[:, None] * row_stride + j[None, :] * col_stride,
        inside,
    )


@triton.jit
def matrix(ptr, row, col, n_rows, n_cols, row_stride, col_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The ROWS x COLS tile at (row, col) of a strided matrix, zero outside."""
    start, at, inside = _tile(row, col, n_rows, n_cols, row_stride, col_stride, ROWS, COLS)
    return tl.load(ptr + start + at, mask=inside, other=0.0)


@triton.jit
def places(rows_ptr, row, n_rows, ROWS: tl.constexpr):
    """Where the ROWS rows from ``row`` on stand in memory (int64): by an index, or in their order where it is None;
    somewhere inside for those past n_rows."""
    i = tl.minimum(row + tl.arange(0, ROWS), n_rows - 1)
    if rows_ptr is None:
        return i.to(tl.int64)
    else:
        return tl.load(rows_ptr + i).to(tl.int64)


@triton.jit
def picked(ptr, at, col, n_cols, row_stride, col_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile of the rows that stand at the ``places`` at and of the columns from col on, zero outside of those."""
    j = tl.arange(0, COLS)
    start = (tl.full((), 0, tl.int64) + col) * col_stride
    inside = tl.full((ROWS, 1), True, tl.int1) & (col + j < n_cols)[None, :]
    return tl.load(ptr + start + at[:, None] * row_stride + j[None, :] * col_stride, mask=inside, other=0.0)


@triton.jit
def put(ptr, value, row, col, n_rows, n_cols, row_stride, col_stride, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Store a tile at (row, col), where it lies inside the matrix."""
    start, at, inside = _tile(row, col, n_rows, n_cols, row_stride, col_stride, ROWS, COLS)
    tl.store(ptr + start + at, value, mask=inside)


@triton.jit
def vector(ptr, at, n):
    """Entries of a contiguous vector, zero outside."""
    return tl.load(ptr + at, mask=at < n, other=0.0)


@triton.jit
def gate(
    u, g_ptr, rank, R, g_in, g_out,
    GATE: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """u ⊙ g for a vector, Σᵢ u[:, i] g[i·g_in + j·g_out] for a matrix whose side one tile holds, or u."""
    if GATE == 1:
        return u * vector(g_ptr, rank + tl.arange(0, BR), R).to(u.dtype)[None, :]
    elif GATE == 2:
        g = matrix(g_ptr, 0, 0, R, R, g_in, g_out, BR, BR).to(DTYPE)
        return dot(u.to(DTYPE), g, tl.zeros(u.shape, u.dtype), PRECISION)
    else:
        return u
