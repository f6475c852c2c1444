"""Rounding: quantized activations and the cache's number formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ridgeline.graph.ir import Q8_GROUP

Array = npt.NDArray[Any]

_STORED: dict[str, Any] = {
    "bf16": ml_dtypes.bfloat16,
    "f16": np.float16,
    "f32": np.float32,
    "fp8": ml_dtypes.float8_e4m3fn,
}


def rounded(x: Array, dtype: str) -> Array:
    """``x`` rounded to "bf16", "f16", "f32" or "fp8" (nearest, ties to even), still in its own array type. FP8 is e4m3,
    which has no infinity: what is beyond 448 becomes that."""
    if dtype == "fp8":
        x = np.clip(x, -448, 448)
    with np.errstate(over="ignore"):  # beyond 65504, f16 is infinity, as the hardware rounds
        stored = x.astype(np.float32).astype(_STORED[dtype])
    result: Array = stored.astype(x.dtype)
    return result


def fixed_point(x: Array, most: int) -> Array:
    """``x`` as whole multiples of largest / ``most`` (nearest, ties to even), the largest magnitude being that of the
    last axis; computed in float32, returned in the array's own type."""
    exact = x.astype(np.float32)
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    inverse = np.zeros_like(largest)
    with np.errstate(over="ignore"):
        np.divide(np.float32(most), largest, out=inverse, where=largest > 0)
    codes = np.rint(exact * np.minimum(inverse, np.finfo(np.float32).max))
    result: Array = codes.astype(x.dtype) * (largest / np.float32(most)).astype(x.dtype)
    return result


@dataclass(frozen=True)
class Q8:
    """Activations quantized to int8 per 32 of K.

    Attributes:
        codes: [rows, K] int8 in -112..127.
        scales: [rows, K / 32] float32.
    """

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]

    def values(self, dtype: Any = np.float32) -> Array:
        """codes * scales: [rows, K]."""
        y: Array = self.codes.astype(dtype) * np.repeat(self.scales, Q8_GROUP, axis=1).astype(dtype)
        return y

    def rows(self, index: Array) -> Q8:
        """Some of the rows."""
        return Q8(self.codes[index], self.scales[index])


def quantize_q8(x: Array) -> Q8:
    """Codes of -112 to 127, nearest (ties to even), the greatest magnitude positive; all in float32.

    A group's extent is its greatest magnitude, or 127/112 of the greatest of the other sign if that is more. The scale
    is extent / 127, negated where the greatest magnitude is a negative number's; csrc/cpu/packed.h says what for.
    ``x`` is [rows, K] with K a multiple of 32. A group of zeros has scale 0 and codes 0; one NaN makes the scale NaN.
    """
    groups = x.astype(np.float32).reshape(x.shape[0], x.shape[1] // Q8_GROUP, Q8_GROUP)
    positive, negative = (np.maximum(sign * groups, 0).max(axis=2) for sign in (np.float32(1), np.float32(-1)))
    most, ratio = np.float32(127), np.float32(127) / np.float32(112)
    sign = np.where(negative > positive, np.float32(-1), np.float32(1))
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # 127 / denormal is infinite
        extent = np.maximum(np.minimum(positive, negative) * ratio, np.maximum(positive, negative))
        inverse = np.minimum(most / extent, np.finfo(np.float32).max)
        codes = np.rint(groups * (sign * inverse)[:, :, None])
    return Q8(np.nan_to_num(codes).astype(np.int8).reshape(x.shape), sign * extent / most)
