"""Triton's interpreter made exact: number formats, rounding, order of sums, memory.

The stock interpreter adds and multiplies bf16 as the integers it stores them in, truncates where the hardware rounds,
sums in an order that depends on shapes, and checks no address. ``ExactBuilder`` takes its place.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated, and when Triton's own library is

import triton.language as tl
from triton.runtime import interpreter as interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from ridgeline.backends.cuda.ladder.memory import Guard, KernelFault, Region

if not isinstance(tl.sum, interpreter.InterpretedFunction):
    raise ImportError("triton was imported before the interpreter was asked for: set TRITON_INTERPRET=1 beforehand")

Array = npt.NDArray[Any]

_STORED: dict[Any, Any] = {
    tl.bfloat16: ml_dtypes.bfloat16,
    tl.float8e4nv: ml_dtypes.float8_e4m3fn,
    tl.float8e5: ml_dtypes.float8_e5m2,
}
"""Formats numpy has no arithmetic for."""
_LARGEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
"""Conversions to 8 bits saturate (PTX ISA, cvt.rn.satfinite)."""


def decode(data: Array, dtype: Any) -> Array:
    """Stored bits as numbers: float32 for the formats above, as they are for others."""
    stored = _STORED.get(dtype)
    if stored is None or data.dtype == np.bool_:
        return data
    numbers: Array = np.ascontiguousarray(data).view(stored).astype(np.float32).reshape(data.shape)
    return numbers


def encode(x: Array, dtype: Any, toward_zero: bool = False) -> Array:
    """Numbers as stored bits, rounded to nearest even."""
    stored = _STORED.get(dtype)
    if stored is None:
        return x.astype(interpreter._get_np_dtype(dtype))
    single = np.ascontiguousarray(x, np.float32)
    if toward_zero and dtype == tl.bfloat16:
        return (single.view(np.uint32) >> 16).astype(np.uint16).reshape(x.shape)
    if dtype in _LARGEST:
        single = np.clip(single, -_LARGEST[dtype], _LARGEST[dtype])
    bits: Array = single.astype(stored).view(interpreter._get_np_dtype(dtype)).reshape(x.shape)
    return bits


def fused_multiply_add(x: Array, y: Array, z: Array) -> Array:
    """x * y + z of float32, rounded once: in float64, the sum rounded to odd before it is rounded to float32."""
    product, third = x.astype(np.float64) * y.astype(np.float64), z.astype(np.float64)
    total = product + third
    other = total - product
    lost = (product - (total - other)) + (third - other)
    even = (total.view(np.int64) & 1) == 0
    inexact = np.isfinite(total) & (lost != 0) & even
    toward = np.where((lost > 0) == (total > 0), 1, -1)
    odd: Array = np.where(inexact, total.view(np.int64) + toward, total.view(np.int64)).view(np.float64)
    return odd.astype(np.float32)


def to_tf32(x: Array) -> Array:
    """float32 rounded to 10 bits of fraction, ties away from zero (PTX ISA, cvt.rna.tf32)."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded: Array = np.where(np.isfinite(x), (bits + 0x1000) & 0xFFFFE000, bits).astype(np.uint32).view(np.float32)
    return rounded.reshape(x.shape)


def dot(a: Array, b: Array, acc: Array) -> Array:
    """acc + a @ b with k ascending, one rounding a step: the same bits whatever the other rows and columns."""
    if np.issubdtype(acc.dtype, np.integer):
        exact: Array = np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(np.int64).astype(acc.dtype) + acc
        return exact
    a, b, total = a.astype(acc.dtype), b.astype(acc.dtype), acc.copy()
    for k in range(a.shape[-1]):
        total += a[..., :, k : k + 1] * b[..., k : k + 1, :]
    return total


def tree(x: Array, axis: int, combine: Callable[[Array, Array], Array]) -> Array:
    """A reduction over neighbours, then over neighbouring pairs, ...: one order for every shape."""
    x = np.moveaxis(x, axis, 0)
    while len(x) > 1:
        odd = x[-1:] if len(x) % 2 else x[:0]
        x = np.concatenate([combine(x[0 : len(x) - len(odd) : 2], x[1::2]), odd])
    whole: Array = x[0]
    return whole


def _origin(*handles: TensorHandle) -> Region | None:
    for handle in handles:
        region = handle.attr.get("origin")
        if region is not None:
            found: Region = region
            return found
    return None


def _keeps(name: str) -> Callable[..., TensorHandle]:
    """A method of the stock builder whose result points into the tensor its first argument points into."""
    method = getattr(InterpreterBuilder, name)

    def keep(self: ExactBuilder, *args: Any) -> TensorHandle:
        result: TensorHandle = method(self, *args)
        region = _origin(*(a for a in args if isinstance(a, TensorHandle)))
        if region is not None:
            result.attr["origin"] = region
        return result

    return keep


def _precise(function: Callable[[Array], Array]) -> Callable[..., TensorHandle]:
    """A function of float32 computed in float64: correctly rounded but for the rarest of ties."""

    def unary(self: ExactBuilder, arg: TensorHandle) -> TensorHandle:
        return TensorHandle(function(arg.data.astype(np.float64)).astype(arg.data.dtype), arg.dtype.scalar)

    return unary


def _anything(shape: tuple[int, ...], dtype: Any) -> TensorHandle:
    """What dead lanes may hold: a large number in one, NaN in the next, as a maximum passes over NaN."""
    stored = interpreter._get_np_dtype(dtype)
    if stored == np.bool_:
        return TensorHandle(np.ones(shape, bool), dtype)
    data = np.full(int(np.prod(shape)) * stored.itemsize, 0x7B, np.uint8).view(stored)
    if dtype in _STORED or np.issubdtype(stored, np.floating):
        data[1::2] = np.full(stored.itemsize, 0x7F if stored.itemsize < 8 else 0xFF, np.uint8).view(stored)
    return TensorHandle(data.reshape(shape), dtype)


class ExactBuilder(InterpreterBuilder):  # type: ignore[misc]
    """The builder that the interpreter's operations go through, with ``guard`` watching memory."""

    guard: Guard

    for _name in ("addptr", "splat", "unsplat", "broadcast", "expand_dims", "reshape", "trans", "select"):
        locals()[f"create_{_name}"] = _keeps(f"create_{_name}")
    create_exp, create_exp2 = _precise(np.exp), _precise(np.exp2)
    create_log, create_log2 = _precise(np.log), _precise(np.log2)
    create_sin, create_cos = _precise(np.sin), _precise(np.cos)
    create_sqrt = create_precise_sqrt = _precise(np.sqrt)
    create_rsqrt = _precise(lambda x: 1 / np.sqrt(x))

    def get_bf16(self, value: float) -> TensorHandle:
        """A bf16 constant, which the stock builder lacks."""
        return TensorHandle(encode(np.array([value], np.float32), tl.bfloat16), tl.bfloat16)

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        """Any operation of two: in float32 for narrow formats, truth values as such."""
        dtype = lhs.dtype.scalar
        output = op(decode(lhs.data, dtype), decode(rhs.data, rhs.dtype.scalar))
        if output.dtype == np.bool_:
            return TensorHandle(output, tl.int1)
        return TensorHandle(encode(output, dtype), dtype)

    def create_fneg(self, arg: TensorHandle) -> TensorHandle:
        """The sign flipped (Triton 3.9; before, 0 - x)."""
        dtype = arg.dtype.scalar
        return TensorHandle(encode(-decode(arg.data, dtype), dtype), dtype)

    def create_minnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        """The smaller; the number if one is NaN."""
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        """The larger; the number if one is NaN."""
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, x: TensorHandle, low: TensorHandle, high: TensorHandle, nans: Any) -> TensorHandle:
        """x between low and high."""
        dtype = x.dtype.scalar
        return TensorHandle(encode(np.clip(*(decode(h.data, dtype) for h in (x, low, high))), dtype), dtype)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        """x * y + z, rounded once."""
        dtype = z.dtype.scalar
        parts = [decode(h.data, dtype) for h in (x, y, z)]
        if parts[2].dtype != np.float32:
            return TensorHandle(encode(parts[0] * parts[1] + parts[2], dtype), dtype)
        return TensorHandle(encode(fused_multiply_add(*np.broadcast_arrays(*parts)), dtype), dtype)

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        """Conversions round to nearest even; to integers toward zero, saturating, NaN to 0 (PTX ISA, cvt)."""
        source, target = src.dtype.scalar, dst_type.scalar
        x = decode(src.data, source)
        if np.issubdtype(x.dtype, np.floating) and not target.is_floating():
            info = np.iinfo(interpreter._get_np_dtype(target))
            exact = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0)
            top = np.nextafter(float(info.max), 0) if info.bits == 64 else float(info.max)
            return TensorHandle(np.clip(exact, float(info.min), top).astype(info.dtype), target)
        return TensorHandle(encode(x, target), target)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        """Between number formats."""
        zero = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
        x = decode(src.data, src.dtype.scalar)
        return TensorHandle(encode(x, dst_type.scalar, toward_zero=zero), dst_type.scalar)

    def create_bitcast(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        """The same bits as another type."""
        data = np.ascontiguousarray(src.data).view(interpreter._get_np_dtype(dst_type))
        handle = TensorHandle(data, dst_type.scalar)
        if "origin" in src.attr:
            handle.attr["origin"] = src.attr["origin"]
        return handle

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, _: Any) -> TensorHandle:
        """d + a @ b in a fixed order of k."""
        left, right = decode(a.data, a.dtype.scalar), decode(b.data, b.dtype.scalar)
        if a.dtype.scalar == tl.float32 and precision == interpreter._ir.INPUT_PRECISION.TF32:
            left, right = to_tf32(left), to_tf32(right)
        dtype = d.dtype.scalar
        return TensorHandle(encode(dot(left, right, decode(d.data, dtype)), dtype), dtype)

    def create_masked_load(
        self, ptrs: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *how: Any, **named: Any
    ) -> TensorHandle:
        """A load whose live lanes are checked; the others, given no value, hold what a register may hold: anything.

        ``how``, ``named``: cache hints, of which Triton 3.9 has one fewer than 3.7.
        """
        self.guard.load(self._region(ptrs), self._live(ptrs, mask), self._item(ptrs))
        if other is None:
            other = _anything(ptrs.data.shape, ptrs.get_element_ty())
        result: TensorHandle = super().create_masked_load(ptrs, mask, other, *how, **named)
        return result

    def create_masked_store(
        self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *how: Any, **named: Any
    ) -> Any:
        """A store whose live lanes are checked."""
        self.guard.store(self._region(ptrs), self._live(ptrs, mask), self._item(ptrs))
        return super().create_masked_store(ptrs, value, mask, *how, **named)

    def create_atomic_rmw(
        self, op: Any, ptr: TensorHandle, val: TensorHandle, mask: TensorHandle, sem: Any, scope: Any
    ) -> TensorHandle:
        """Read, modify, write, as one."""
        self._atomic(ptr, mask, sem)
        result: TensorHandle = super().create_atomic_rmw(op, ptr, val, mask, sem, scope)
        return result

    def create_atomic_cas(
        self, ptr: TensorHandle, cmp: TensorHandle, val: TensorHandle, sem: Any, scope: Any
    ) -> TensorHandle:
        """Compare and swap."""
        self._atomic(ptr, TensorHandle(np.ones(ptr.data.shape, bool), tl.int1), sem)
        result: TensorHandle = super().create_atomic_cas(ptr, cmp, val, sem, scope)
        return result

    def _atomic(self, ptr: TensorHandle, mask: TensorHandle, sem: Any) -> None:
        live, names = self._live(ptr, mask), interpreter._ir.MEM_SEMANTIC
        self.guard.fence(sem in (names.ACQUIRE, names.ACQUIRE_RELEASE), sem in (names.RELEASE, names.ACQUIRE_RELEASE))
        self._region(ptr).elements(live, self._item(ptr), "atomic on")
        self.guard.store(self._region(ptr), live, self._item(ptr), atomic=True)
        # What comes with the atomic is as visible as what came before it.
        self.guard.fence(False, sem in (names.RELEASE, names.ACQUIRE_RELEASE))
        self.guard.fence(sem in (names.ACQUIRE, names.ACQUIRE_RELEASE), False)

    @staticmethod
    def _region(ptrs: TensorHandle) -> Region:
        region = _origin(ptrs)
        if region is None:
            raise KernelFault("a pointer that comes from no argument")
        return region

    @staticmethod
    def _live(ptrs: TensorHandle, mask: TensorHandle) -> npt.NDArray[np.uint64]:
        live: npt.NDArray[np.uint64] = ptrs.data[np.broadcast_to(mask.data.astype(bool), ptrs.data.shape)]
        return live

    @staticmethod
    def _item(ptrs: TensorHandle) -> int:
        return max(1, int(ptrs.get_element_ty().primitive_bitwidth) // 8)


def _to_tensor(self: Any, ret: Any, dtype: Any) -> Any:
    array = np.asarray(ret)
    if dtype.scalar in _STORED and np.issubdtype(array.dtype, np.floating):
        array = encode(array, dtype.scalar)
    array = array.astype(interpreter._get_np_dtype(dtype))
    if array.shape:
        return tl.core.tensor(TensorHandle(array, dtype.scalar), tl.block_type(dtype, list(array.shape)))
    return tl.core.tensor(TensorHandle(array.reshape(1), dtype.scalar), dtype)


def _fold(self: Any, x: Array, combine: Callable[[Array, Array], Array]) -> Array:
    axis = self.axis
    if axis is None:
        result = tree(x.reshape(-1), 0, combine)
        return result.reshape((1,) * x.ndim) if self.keep_dims else result
    result = tree(x, axis, combine)
    return np.expand_dims(result, axis) if self.keep_dims else result


def _sum(self: Any, input: Any) -> Any:
    x = decode(input.handle.data, input.dtype.scalar)
    return self.to_tensor(_fold(self, x, np.add), input.dtype)


def _min_max(self: Any, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
    input = input[0] if isinstance(input, tuple) else input
    x = decode(input.handle.data, input.dtype.scalar)
    pick = np.fmin if val_reduce_op in (np.min, np.nanmin) else np.fmax
    value = self.to_tensor(_fold(self, x, pick), input.dtype)
    if idx_reduce_op is None:
        return value
    return value, self.to_tensor(idx_reduce_op(x, axis=self.axis, keepdims=self.keep_dims), tl.int32)


def _combine(self: Any, left: list[Array], right: list[Array], types: list[Any]) -> list[Array]:
    out = self.combine_fn.fn(*(self.to_tensor(x, t) for x, t in zip([*left, *right], [*types, *types], strict=True)))
    out = out if isinstance(out, tuple) else (out,)
    return [o.handle.data.reshape(x.shape) for o, x in zip(out, left, strict=True)]


def _generic_reduce(self: Any, input: Any) -> Any:
    types = [arg.dtype for arg in input]
    axis, rank = self.axis, input[0].handle.data.ndim
    parts = [np.moveaxis(a.handle.data if axis is not None else a.handle.data.reshape(-1), axis or 0, 0) for a in input]
    while len(parts[0]) > 1:
        parts = _combine(self, [p[0::2] for p in parts], [p[1::2] for p in parts], types)
    parts = [p[0] for p in parts]
    if self.keep_dims:
        parts = [np.expand_dims(p, axis) if axis is not None else p.reshape((1,) * rank) for p in parts]
    return [self.to_tensor(p, t) for p, t in zip(parts, types, strict=True)]


def _generic_scan(self: Any, input: Any) -> Any:
    types = [arg.dtype for arg in input]
    parts = [np.moveaxis(arg.handle.data, self.axis, 0) for arg in input]
    results = [p.copy() for p in parts]
    for i in range(1, len(parts[0])):
        steps = _combine(self, [r[i - 1 : i] for r in results], [p[i : i + 1] for p in parts], types)
        for result, step in zip(results, steps, strict=True):
            result[i : i + 1] = step
    return [self.to_tensor(np.moveaxis(r, 0, self.axis), t) for r, t in zip(results, types, strict=True)]


def _cumsum(self: Any, input: Any) -> Any:
    x = decode(input.handle.data, input.dtype.scalar)
    return [self.to_tensor(np.cumsum(x, axis=self.axis, dtype=x.dtype), dtype=input.dtype)]


def _descriptor_pointers(original: Any) -> Any:
    def materialize(self: Any, *args: Any) -> Any:
        pointers, masks = original(self, *args)
        pointers.attr["origin"] = self.base.attr.get("origin")
        # A bare array before Triton 3.9.
        return pointers, masks if isinstance(masks, TensorHandle) else TensorHandle(masks, tl.int1)

    return materialize


def _tracked(original: Any, guard: Guard) -> Any:
    def convert(arg: Any) -> Any:
        result = original(arg)
        if hasattr(arg, "data_ptr"):
            result.handle.attr["origin"] = guard.region(arg)
        return result

    return convert


@contextmanager
def exact(guard: Guard) -> Iterator[ExactBuilder]:
    """The interpreter with exact arithmetic and ``guard`` watching every access."""
    reduce, scan, base = interpreter.ReduceOps, interpreter.ScanOps, interpreter.ReduceScanOpInterface
    descriptor = interpreter.TensorDescHandle
    changes: list[tuple[Any, str, Any]] = [
        (interpreter, "_implicit_cvt", _tracked(interpreter._implicit_cvt, guard)),
        (base, "to_tensor", _to_tensor),
        (reduce, "sum", _sum),
        (reduce, "min_max", _min_max),
        (reduce, "generic_reduce", _generic_reduce),
        (scan, "cumsum", _cumsum),
        (scan, "generic_scan", _generic_scan),
        (descriptor, "materialize_pointers", _descriptor_pointers(descriptor.materialize_pointers)),
    ]
    builder = interpreter.interpreter_builder
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    builder.__class__, builder.guard = ExactBuilder, guard
    try:
        with np.errstate(all="ignore"):  # a GPU raises nothing
            yield builder
    finally:
        builder.__class__ = InterpreterBuilder
        for owner, name, value in before:
            setattr(owner, name, value)
