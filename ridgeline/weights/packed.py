"""What AWQ's and GPTQ's files have in common: small integers in the words of an int32 tensor, scales and zeros."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.core.errors import ModelFileError, UnsupportedError

WORD = 32  # bits of the words that codes and zeros are packed into


@dataclass(frozen=True, eq=False)
class ZeroCodes:
    """A matrix [N, K] taken apart: weight = (code - zero) * scale, exactly.

    Attributes:
        codes: uint8 [N, K], below 2^bits.
        scales: float16 [N, ceil(K / group)].
        zeros: uint8, as scales.
        bits: of a code.
        group: values along K that share a scale and a zero.
        order: int32 [K]: column j of ``codes`` is column ``order[j]`` of the weight, so that x is multiplied as
            x[:, order]. None: columns are in order.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]
    zeros: npt.NDArray[np.uint8]
    bits: int
    group: int
    order: npt.NDArray[np.int32] | None = None

    @property
    def centered(self) -> bool:
        """Whether every zero is the middle of the codes, 2^(bits - 1), and need not be stored."""
        return bool((self.zeros == 1 << (self.bits - 1)).all())

    def values(self) -> npt.NDArray[np.float32]:
        """The weight, float32 [N, K], columns as the model has them; exact."""
        k = self.codes.shape[1]
        scales, zeros = (np.repeat(t.astype(np.float32), self.group, axis=1)[:, :k] for t in (self.scales, self.zeros))
        found = (self.codes.astype(np.float32) - zeros) * scales
        if self.order is None:
            return found
        result = np.empty_like(found)
        result[:, self.order] = found
        return result

    def in_groups_of(self, group: int) -> ZeroCodes:
        """The same weight in smaller groups: scales and zeros are repeated.

        Raises ValueError for a size that does not divide the group (a group as wide as K is divided by any).
        """
        k = self.codes.shape[1]
        if self.group % group and self.group < k:
            raise ValueError(f"groups of {self.group} do not divide into groups of {group}")
        at = np.arange(-(-k // group)) * group // self.group
        return replace(self, scales=self.scales[:, at], zeros=self.zeros[:, at], group=group)


def words(name: str, tensor: npt.NDArray[Any]) -> npt.NDArray[np.uint32]:
    """The words of a packed tensor, without a sign; raises ModelFileError unless it is int32 of two dimensions."""
    if tensor.ndim != 2 or tensor.dtype != np.int32:
        raise ModelFileError(f"{name} is {tensor.dtype} {tensor.shape}, wanted int32 of two dimensions")
    return np.ascontiguousarray(tensor).view(np.uint32)


def along_columns(packed: npt.NDArray[np.uint32], bits: int) -> npt.NDArray[np.uint8]:
    """The integers of [R, C] words, [R, C * 32 / bits]: those of a word lie side by side, lowest bits first."""
    shifts = np.arange(0, WORD, bits, dtype=np.uint32)
    # Word by word into place: no intermediate as wide as the words times their integers.
    found = np.empty((*packed.shape, len(shifts)), np.uint8)
    for j, shift in enumerate(shifts):
        found[:, :, j] = (packed >> shift) & np.uint32((1 << bits) - 1)
    return found.reshape(packed.shape[0], -1)


def check_shape(name: str, tensor: npt.NDArray[Any], shape: tuple[int, ...], why: str) -> None:
    """Raises ModelFileError for another shape; ``why`` ends the line."""
    if tensor.shape != shape:
        raise ModelFileError(f"{name} is {tensor.shape}, wanted {shape}: {why}")


def half_scales(name: str, tensor: npt.NDArray[Any]) -> npt.NDArray[np.float16]:
    """Scales as float16, exactly.

    Raises ModelFileError for what is no finite float, UnsupportedError for a number that float16 does not have.
    """
    if tensor.dtype.name not in ("float16", "bfloat16", "float32"):
        raise ModelFileError(f"{name} is {tensor.dtype}, wanted float16, bfloat16 or float32")
    wide = tensor.astype(np.float32)
    if not np.isfinite(wide).all():
        raise ModelFileError(f"{name} holds NaN or infinity; the file is damaged")
    with np.errstate(over="ignore"):
        half = wide.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), wide):
        raise UnsupportedError(f"{name} holds {tensor.dtype} scales that float16 cannot hold exactly")
    return half


def group_of(name: str, group: int, k: int) -> int:
    """Values that share a scale, where -1 stands for all ``k``; raises ModelFileError for what is no size."""
    if group == -1:
        return k
    if group < 1:
        raise ModelFileError(f"{name}: groups of {group}, wanted -1 or a positive number")
    return group
