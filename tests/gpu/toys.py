"""Small kernels that the interpreter's own tests run."""

from __future__ import annotations

import triton
import triton.language as tl

from ridgeline.backends.cuda import e4m3


@triton.jit
def binary(a, b, out, N: tl.constexpr, WHICH: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    if WHICH == 0:
        z = x + y
    elif WHICH == 1:
        z = x - y
    elif WHICH == 2:
        z = x * y
    elif WHICH == 3:
        z = (x / y).to(out.dtype.element_ty)
    elif WHICH == 4:
        z = tl.maximum(x, y)
    elif WHICH == 5:
        z = tl.minimum(x, y)
    elif WHICH == 6:
        z = (x < y).to(out.dtype.element_ty)
    else:
        z = tl.where(x < y, -x, tl.abs(y))
    tl.store(out + i, z)


@triton.jit
def convert(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def encode_e4m3(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, e4m3.encode(tl.load(x + i)))


@triton.jit
def product(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    c = tl.dot(tl.load(a + m * K + k[None, :]), tl.load(b + k[:, None] * N + n), out_dtype=out.dtype.element_ty)
    tl.store(out + m * N + n, c)


@triton.jit
def reductions(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(out + i, tl.where(i == 0, tl.sum(v, axis=0), tl.max(v, axis=0)))
    tl.store(out + N + i, tl.cumsum(v, axis=0))
    tl.store(out + 2 * N + i, tl.argmax(v, axis=0).to(tl.float32) + tl.zeros([N], tl.float32))


@triton.jit
def faulty(x, out, N: tl.constexpr, WHICH: tl.constexpr):
    i = tl.arange(0, N)
    if WHICH == 1:
        tl.store(out + i, tl.load(x + i + 1))
    elif WHICH == 2:
        tl.store(out + i - 1, tl.load(x + i))
    elif WHICH == 3:
        tl.store(out + i, tl.load(x + i), mask=i < N - 1)
    elif WHICH == 4:
        tl.store(out + i, tl.load(out + i))
    elif WHICH == 5:
        tl.store(out + i // 2, tl.load(x + i))
    else:
        tl.store(x + i, tl.load(x + i))


@triton.jit
def last_one_sums(partials, count, out, N: tl.constexpr, RELEASE: tl.constexpr):
    p = tl.program_id(0)
    i = tl.arange(0, N)
    tl.store(partials + p * N + i, tl.zeros([N], tl.float32) + p)
    arrived = tl.atomic_add(count, 1, sem="acq_rel" if RELEASE else "relaxed")
    if arrived == tl.num_programs(0) - 1:
        total = tl.zeros([N], tl.float32)
        for q in range(tl.num_programs(0)):
            total += tl.load(partials + q * N + i)
        tl.store(out + i, total)
