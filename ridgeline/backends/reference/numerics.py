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
        codes: [rows, K] int8 in -127..127.
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
    """Scale = amax / 127, code = nearest (ties to even) of x * (127 / amax); all in float32.

    ``x`` is [rows, K] with K a multiple of 32. A group of zeros has scale 0 and codes 0.
    """
    groups = x.astype(np.float32).reshape(x.shape[0], x.shape[1] // Q8_GROUP, Q8_GROUP)
    amax = np.abs(groups).max(axis=2)
    scales = amax / np.float32(127)
    inverse = np.zeros_like(amax)
    with np.errstate(over="ignore"):  # 127 / denormal is infinite; the codes saturate
        np.divide(np.float32(127), amax, out=inverse, where=amax > 0)
    with np.errstate(invalid="ignore"):
        codes = np.clip(np.rint(groups * inverse[:, :, None]), -127, 127)
    return Q8(np.nan_to_num(codes).astype(np.int8).reshape(x.shape), scales)
