"""Codecs of the weight formats: bytes of a file to float32 and back, vectorised in numpy.

The layouts are those of ggml (https://github.com/ggml-org/ggml, ``ggml-common.h``): a group of 32
weights stores an fp16 scale (q4_1: and an fp16 minimum), then its codes; 4-bit codes put weight i
in the low half of byte i and weight i + 16 in the high half. Dequantization is exact; quantization
rounds as ggml's reference does, so a file written here is the file llama.cpp's quantizer writes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ridgeline.core.errors import UnsupportedError
from ridgeline.core.formats import WeightFormat

Bytes = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

GROUP = 32  # weights that share a scale, in every quantized format below


def dequantize(format: WeightFormat, data: Bytes, shape: tuple[int, ...]) -> Float32:
    """Float32 values of a stored tensor, exact.

    Args:
        format: how ``data`` is stored.
        data: the tensor's bytes (uint8, any shape, contiguous).
        shape: the result's shape; groups run along its last dimension.

    Returns:
        A new float32 array of ``shape``.

    Raises:
        UnsupportedError: no codec for ``format``.
        ValueError: the bytes are not as many as ``shape`` needs, or groups do not divide a row.
    """
    decode = _codec(format)[0]
    rows, k = _rows(shape)
    flat = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
    if flat.size != format.nbytes(rows, k):
        raise ValueError(f"{format.name} {shape} takes {format.nbytes(rows, k)} bytes, got {flat.size}")
    return decode(flat).reshape(shape)


def quantize(format: WeightFormat, values: npt.ArrayLike) -> Bytes:
    """Bytes of ``values`` stored as ``format``, rounded as ggml's reference rounds.

    Args:
        format: the storage wanted.
        values: ``[..., K]`` numbers, taken as float32; groups run along K.

    Returns:
        A flat uint8 array of ``format.nbytes(rows, K)`` bytes.

    Raises:
        UnsupportedError: no codec for ``format``.
        ValueError: groups do not divide K.
    """
    encode = _codec(format)[1]
    array = np.ascontiguousarray(values, dtype=np.float32)
    format.nbytes(*_rows(array.shape))  # raises when groups do not divide a row
    return encode(array.reshape(-1))


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, row length) of an array of ``shape``; Python ints, so nothing wraps."""
    rows = 1
    for dim in shape[:-1]:
        rows *= int(dim)
    return rows, int(shape[-1]) if shape else 1


@dataclass(frozen=True)
class Codes:
    """A quantized matrix taken apart: weight = (code - zero of its format) * scale + minimum.

    Attributes:
        codes: uint8 [N, K].
        scales: float16 [N, K / group].
        minimums: float16 [N, K / group]; None where the format has none.
    """

    codes: Bytes
    scales: npt.NDArray[np.float16]
    minimums: npt.NDArray[np.float16] | None


def codes_of(format: WeightFormat, data: Bytes, shape: tuple[int, int]) -> Codes:
    """The codes and scales of a quantized matrix [N, K], as they are.

    Raises UnsupportedError for a format that is not quantized.
    """
    if format.kind != "int" or format.bits not in (4, 8):
        raise UnsupportedError(f"weight format {format.name} has no codes")
    n, k = shape
    groups = np.ascontiguousarray(data).view(np.uint8).reshape(n, k // format.group, format.group_bytes)
    scales = groups[:, :, 0:2].copy().view("<f2")[:, :, 0]
    head = 4 if format.has_minimum else 2
    minimums = groups[:, :, 2:4].copy().view("<f2")[:, :, 0] if format.has_minimum else None
    body = groups[:, :, head:]
    # Signed bytes plus 128 are unsigned codes around a zero of 128.
    codes = np.concatenate([body & 15, body >> 4], axis=2) if format.bits == 4 else body ^ np.uint8(128)
    return Codes(codes.reshape(n, k), scales, minimums)


def bf16_terms(format: WeightFormat, data: Bytes, shape: tuple[int, int]) -> Float32:
    """A quantized matrix [N, K] as bf16 products take it: code times scale, rounded, plus the minimum, rounded.

    Four-bit codes count from 0, those of a negative scale from 15 down, so that their products are never negative.
    """
    parts = codes_of(format, data, shape)
    codes = parts.codes.astype(np.float32)
    scales = np.repeat(parts.scales.astype(np.float32), format.group, axis=1)
    if format.bits == 8:
        return _bf16((codes - 128) * scales)
    minimums = -8 * scales
    if parts.minimums is not None:
        minimums = np.repeat(parts.minimums.astype(np.float32), format.group, axis=1)
    turned = scales < 0
    codes, minimums = np.where(turned, 15 - codes, codes), np.where(turned, minimums + 15 * scales, minimums)
    return _bf16(codes * np.abs(scales)) + _bf16(minimums)


def _bf16(values: Float32) -> Float32:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def _decode_f32(flat: Bytes) -> Float32:
    return flat.view("<f4").astype(np.float32)


def _encode_f32(values: Float32) -> Bytes:
    return values.astype("<f4").view(np.uint8)


def _decode_f16(flat: Bytes) -> Float32:
    return flat.view("<f2").astype(np.float32)


def _encode_f16(values: Float32) -> Bytes:
    with np.errstate(over="ignore"):  # beyond 65504 is infinity, as the hardware rounds
        return values.astype("<f2").view(np.uint8)


def _decode_bf16(flat: Bytes) -> Float32:
    return (flat.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _encode_bf16(values: Float32) -> Bytes:
    """Round to nearest even; a NaN stays a (quiet) NaN instead of carrying into infinity."""
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> 16
    quiet = (bits >> 16) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype("<u2").view(np.uint8)


def _inverse(scale: Float32) -> Float32:
    """1 / scale in fp32, 0 where the scale is 0 (a group of equal weights)."""
    result = np.zeros_like(scale)
    with np.errstate(over="ignore"):
        np.divide(np.float32(1), scale, out=result, where=scale != 0)
    return result


def _half(scale: Float32) -> Bytes:
    """fp16 bytes of a per-group number: [groups, 1] float32 -> [groups, 2] uint8."""
    with np.errstate(over="ignore"):
        return scale.astype("<f2").view(np.uint8)


def _field(groups: Bytes, offset: int) -> Float32:
    """The fp16 number at ``offset`` of every group, as float32 [groups, 1]."""
    return np.ascontiguousarray(groups[:, offset : offset + 2]).view("<f2").astype(np.float32)


def _decode_q8_0(flat: Bytes) -> Float32:
    groups = flat.reshape(-1, 2 + GROUP)
    return groups[:, 2:].view(np.int8).astype(np.float32) * _field(groups, 0)


def _encode_q8_0(values: Float32) -> Bytes:
    groups = values.reshape(-1, GROUP)
    scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
    scaled = groups * _inverse(scale)
    whole = np.trunc(scaled)
    codes = whole + np.where(np.abs(scaled - whole) >= 0.5, np.sign(scaled), np.float32(0))  # halves go outwards
    return np.concatenate([_half(scale), codes.astype(np.int8).view(np.uint8)], axis=1).reshape(-1)


def _unpack_nibbles(packed: Bytes) -> Bytes:
    """[groups, 16] bytes -> [groups, 32] codes 0..15."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=1)


def _pack_nibbles(codes: Bytes) -> Bytes:
    """[groups, 32] codes 0..15 -> [groups, 16] bytes."""
    return codes[:, : GROUP // 2] | (codes[:, GROUP // 2 :] << np.uint8(4))


def _codes(scaled: Float32) -> Bytes:
    """Truncate non-negative numbers to codes of 4 bits."""
    return np.clip(np.trunc(scaled), 0, 15).astype(np.uint8)


def _decode_q4_0(flat: Bytes) -> Float32:
    groups = flat.reshape(-1, 2 + GROUP // 2)
    codes = _unpack_nibbles(groups[:, 2:]).astype(np.float32) - np.float32(8)
    return codes * _field(groups, 0)


def _encode_q4_0(values: Float32) -> Bytes:
    groups = values.reshape(-1, GROUP)
    # The weight of largest magnitude, sign kept, becomes code 0 (that is, -8): the range is asymmetric.
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=1, keepdims=True), axis=1)
    scale = extreme / np.float32(-8)
    codes = _codes(groups * _inverse(scale) + np.float32(8.5))
    return np.concatenate([_half(scale), _pack_nibbles(codes)], axis=1).reshape(-1)


def _decode_q4_1(flat: Bytes) -> Float32:
    groups = flat.reshape(-1, 4 + GROUP // 2)
    codes = _unpack_nibbles(groups[:, 4:]).astype(np.float32)
    return codes * _field(groups, 0) + _field(groups, 2)


def _encode_q4_1(values: Float32) -> Bytes:
    groups = values.reshape(-1, GROUP)
    low = groups.min(axis=1, keepdims=True)
    scale = (groups.max(axis=1, keepdims=True) - low) / np.float32(15)
    codes = _codes((groups - low) * _inverse(scale) + np.float32(0.5))
    return np.concatenate([_half(scale), _half(low), _pack_nibbles(codes)], axis=1).reshape(-1)


_CODECS: dict[str, tuple[Callable[[Bytes], Float32], Callable[[Float32], Bytes]]] = {
    "f32": (_decode_f32, _encode_f32),
    "f16": (_decode_f16, _encode_f16),
    "bf16": (_decode_bf16, _encode_bf16),
    "q8_0": (_decode_q8_0, _encode_q8_0),
    "q4_0": (_decode_q4_0, _encode_q4_0),
    "q4_1": (_decode_q4_1, _encode_q4_1),
}


def _codec(format: WeightFormat) -> tuple[Callable[[Bytes], Float32], Callable[[Float32], Bytes]]:
    try:
        return _CODECS[format.name]
    except KeyError:
        raise UnsupportedError(f"weight format {format.name} has no codec (known: {', '.join(_CODECS)})") from None
