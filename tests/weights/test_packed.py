"""AWQ's and GPTQ's tensors against readings and writings of their bits one by one."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ridgeline.core.errors import ModelFileError, UnsupportedError
from ridgeline.weights.awq import unpack_awq
from ridgeline.weights.gptq import unpack_gptq
from ridgeline.weights.packed import ZeroCodes
from tests import packers

SHAPES = [(8, 32, 32), (16, 128, 64), (24, 96, 32), (40, 256, 128), (8, 64, 64), (32, 64, 16)]
"""N, K, group."""


def _random(*shape: int, dtype: Any = np.int32) -> np.ndarray:
    rng = np.random.default_rng(sum(shape))
    if dtype is np.int32:
        return rng.integers(-(1 << 31), 1 << 31, shape).astype(np.int32)
    return (rng.standard_normal(shape) * 0.02).astype(dtype)


def _awq_weight(qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """[N, K] float64, bit by bit."""
    k, n = qweight.shape[0], 8 * qweight.shape[1]
    w = np.zeros((n, k))

    def field(words: np.ndarray, r: int, row: int) -> int:
        # Even rows of eight are in the low half of the word, odd ones in the high half.
        at = 16 * (row % 2) + 4 * (row % 8 // 2)
        return (int(words[r, row // 8]) >> at) % 16

    for row in range(n):
        for column in range(k):
            g = column // group
            w[row, column] = (field(qweight, column, row) - field(qzeros, g, row)) * float(scales[g, row])
    return w


def _gptq_weight(
    qweight: np.ndarray, qzeros: np.ndarray, scales: np.ndarray, g_idx: np.ndarray, bits: int, add: int
) -> np.ndarray:
    """[N, K] float64, bit by bit; ``add`` to each zero."""
    per = 32 // bits
    k, n = per * qweight.shape[0], qweight.shape[1]
    w = np.zeros((n, k))
    for row in range(n):
        for column in range(k):
            g = int(g_idx[column])
            code = (int(qweight[column // per, row]) >> bits * (column % per)) % (1 << bits)
            zero = (int(qzeros[g, row // per]) >> bits * (row % per)) % (1 << bits)
            w[row, column] = (code - zero - add) * float(scales[g, row])
    return w


def _rebuilt(found: ZeroCodes) -> np.ndarray:
    """The weight as the fields are documented, in float64."""
    k = found.codes.shape[1]
    g = np.arange(k) // found.group
    w = (found.codes.astype(np.float64) - found.zeros[:, g]) * found.scales[:, g].astype(np.float64)
    result = np.zeros_like(w)
    result[:, np.arange(k) if found.order is None else found.order] = w
    return result


def _check(found: ZeroCodes, expected: np.ndarray) -> None:
    assert (found.codes.dtype, found.zeros.dtype, found.scales.dtype) == (np.uint8, np.uint8, np.float16)
    np.testing.assert_array_equal(_rebuilt(found), expected)
    assert found.values().dtype == np.float32
    np.testing.assert_array_equal(found.values().astype(np.float64), expected)


@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_awq(n: int, k: int, group: int) -> None:
    tensors = _random(k, n // 8), _random(k // group, n // 8), _random(k // group, n, dtype=np.float16)
    found = unpack_awq("up", *tensors, group=group)
    assert (found.bits, found.group, found.order) == (4, group, None)
    _check(found, _awq_weight(*tensors, group))


def test_awq_of_one_group() -> None:
    tensors = _random(24, 2), _random(1, 2), _random(1, 16, dtype=np.float16)
    _check(unpack_awq("up", *tensors, group=-1), _awq_weight(*tensors, 24))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group"), [*SHAPES, (16, 72, 32)])
def test_gptq_v2(n: int, k: int, group: int, bits: int, mixed: bool) -> None:
    groups, per = -(-k // group), 32 // bits
    tensors = _random(k // per, n), _random(groups, n // per), _random(groups, n, dtype=np.float16)
    g_idx = (np.arange(k) // group).astype(np.int32)
    if mixed:
        g_idx = np.random.default_rng(k).permutation(g_idx)
    found = unpack_gptq("up", *tensors, g_idx, bits=bits, group=group, checkpoint_format="gptq_v2")
    assert (found.order is not None) == (mixed and groups > 1)
    if found.order is not None:
        assert (np.diff(g_idx[found.order]) >= 0).all() and sorted(found.order) == list(range(k))
    _check(found, _gptq_weight(*tensors, g_idx, bits, 0))


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_adds_one_to_zeros(bits: int) -> None:
    """Of fields below the highest, the whole word's ones are each field's one."""
    per = 32 // bits
    qzeros = _random(3, 16 // per)
    top = sum(1 << at for at in range(bits - 1, 32, bits))
    qzeros &= np.array(0xFFFFFFFF - top, np.uint32).view(np.int32)
    tensors = _random(96 // per, 16), qzeros, _random(3, 16, dtype=np.float16)
    found = unpack_gptq("up", *tensors, bits=bits, group=32)
    _check(found, _gptq_weight(*tensors, np.arange(96) // 32, bits, 1))


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_reads_what_is_written(bits: int, version: str) -> None:
    """Every zero, 0 too, which borrows from its neighbour in the older format."""
    rng = np.random.default_rng(5)
    codes, zeros = rng.integers(0, 1 << bits, (24, 64)), rng.integers(0, 1 << bits, (24, 4))
    zeros[::3] = 0
    scales = _random(24, 4, dtype=np.float16)
    found = unpack_gptq("up", **packers.gptq(codes, zeros, scales, bits, version), bits=bits, group=16,
                        checkpoint_format=version)  # fmt: skip
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.zeros, zeros)
    np.testing.assert_array_equal(found.scales, scales)


def test_awq_reads_what_is_written() -> None:
    rng = np.random.default_rng(6)
    codes, zeros, scales = rng.integers(0, 16, (24, 64)), rng.integers(0, 16, (24, 4)), _random(24, 4, dtype=np.float16)
    found = unpack_awq("up", **packers.awq(codes, zeros, scales), group=16)
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(found.zeros, zeros)
    np.testing.assert_array_equal(found.scales, scales)


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric(bits: int) -> None:
    codes, middle = np.zeros((8, 32), int), np.full((8, 1), 1 << (bits - 1))
    written = packers.gptq(codes, middle, np.ones((8, 1)), bits)
    assert unpack_gptq("up", **written, bits=bits, group=32, sym=True).centered
    with pytest.raises(ModelFileError, match=r"up\.qzeros: of a symmetric 'gptq_v2' checkpoint every zero is"):
        unpack_gptq("up", **written, bits=bits, group=32, sym=True, checkpoint_format="gptq_v2")
    assert not unpack_gptq("up", **written, bits=bits, group=32, checkpoint_format="gptq_v2").centered


@pytest.mark.parametrize(("group", "smaller"), [(-1, 32), (128, 128), (128, 32), (96, 32), (-1, 128)])
def test_smaller_groups(group: int, smaller: int) -> None:
    k, width = 192, 192 if group == -1 else group
    groups = -(-k // width)
    tensors = _random(k // 8, 8), _random(groups, 1), _random(groups, 8, dtype=np.float16)
    found = unpack_gptq("up", *tensors, bits=4, group=group, checkpoint_format="gptq_v2")
    narrow = found.in_groups_of(smaller)
    assert narrow.group == smaller and narrow.scales.shape == narrow.zeros.shape == (8, -(-k // smaller))
    np.testing.assert_array_equal(narrow.values(), found.values())
    with pytest.raises(ValueError, match="do not divide into groups of 36"):
        unpack_gptq(
            "up", _random(24, 8), _random(2, 1), _random(2, 8, dtype=np.float16), bits=4, group=96
        ).in_groups_of(36)


def test_scales_are_kept_exactly_or_refused() -> None:
    tensors = _random(4, 8), _random(1, 1)
    for dtype in (ml_dtypes.bfloat16, np.float32):
        scales = np.full((1, 8), 0.25, dtype)
        assert (unpack_gptq("up", *tensors, scales, bits=4, group=32).scales == 0.25).all()
    with pytest.raises(UnsupportedError, match=r"up\.scales holds float32 scales that float16 cannot hold exactly"):
        unpack_gptq("up", *tensors, np.full((1, 8), 0.1, np.float32), bits=4, group=32)
    with pytest.raises(UnsupportedError, match="bfloat16 scales"):
        unpack_gptq("up", *tensors, np.full((1, 8), 2.0**-30, ml_dtypes.bfloat16), bits=4, group=32)
    with pytest.raises(ModelFileError, match=r"up\.scales holds NaN or infinity"):
        unpack_gptq("up", *tensors, np.full((1, 8), np.inf, np.float16), bits=4, group=32)
    with pytest.raises(ModelFileError, match=r"up\.scales is int32, wanted float16"):
        unpack_gptq("up", *tensors, _random(1, 8), bits=4, group=32)


W4 = {"qweight": (8, 16), "qzeros": (2, 2), "scales": (2, 16)}
AWQ = {"qweight": (64, 2), "qzeros": (2, 2), "scales": (2, 16)}


def _tensors(shapes: dict[str, tuple[int, ...]], **changed: Any) -> dict[str, np.ndarray]:
    made = {n: _random(*s, dtype=np.float16 if n == "scales" else np.int32) for n, s in shapes.items()}
    return made | {n: _random(*s) if isinstance(s, tuple) else s for n, s in changed.items()}


@pytest.mark.parametrize(
    ("changed", "how", "line"),
    [
        ({"qweight": (8, 16, 1)}, {}, "up.qweight is int32 (8, 16, 1), wanted int32 of two dimensions"),
        ({"qweight": np.zeros((8, 16), np.int64)}, {}, "up.qweight is int64 (8, 16), wanted int32"),
        ({"qzeros": np.zeros((2, 2), np.uint8)}, {}, "up.qzeros is uint8 (2, 2), wanted int32"),
        ({"qzeros": (2, 4)}, {}, "up.qzeros is (2, 4), wanted (2, 2): qweight is (8, 16) of 4 bits in groups of 32"),
        ({"scales": np.zeros((16, 2), np.float16)}, {}, "up.scales is (16, 2), wanted (2, 16)"),
        ({"qweight": (8, 12)}, {}, "up.qweight is (8, 12): zeros fill words, 8 do not divide its 12"),
        ({}, {"group": 64}, "up.qzeros is (2, 2), wanted (1, 2)"),
        ({}, {"group": 0}, "up: groups of 0"),
        ({"g_idx": np.arange(63)}, {}, "up.g_idx is (63,), wanted (64,)"),
        ({"g_idx": np.zeros(64)}, {}, "up.g_idx is float64, wanted int32"),
        ({"g_idx": np.zeros(64, np.int32)}, {}, "up.g_idx does not have 32 columns in each group"),
    ],
)  # fmt: skip
def test_gptq_that_does_not_fit(changed: dict[str, Any], how: dict[str, Any], line: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        unpack_gptq("up", **_tensors(W4, **changed), **{"bits": 4, "group": 32, **how})
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "how", "line"),
    [
        ({"qweight": (16, 8)}, {}, "up.qweight is (16, 8): groups of 32 do not divide its 16 rows"),
        ({"qweight": (64, 4)}, {}, "up.qzeros is (2, 2), wanted (2, 4): qweight is (64, 4) in groups of 32"),
        ({"scales": np.zeros((2, 8), np.float16)}, {}, "up.scales is (2, 8), wanted (2, 16)"),
        ({"qzeros": np.zeros((2, 2), np.float16)}, {}, "up.qzeros is float16 (2, 2), wanted int32"),
    ],
)  # fmt: skip
def test_awq_that_does_not_fit(changed: dict[str, Any], how: dict[str, Any], line: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        unpack_awq("up", **_tensors(AWQ, **changed), **{"group": 32, **how})
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_what_is_not_known_is_refused() -> None:
    for bits in (2, 3, 5):
        with pytest.raises(UnsupportedError, match=f"up: GPTQ of {bits} bits; only 4 and 8"):
            unpack_gptq("up", **_tensors(W4), bits=bits, group=32)
    with pytest.raises(UnsupportedError, match="'marlin'; only 'gptq' and 'gptq_v2'"):
        unpack_gptq("up", **_tensors(W4), bits=4, group=32, checkpoint_format="marlin")
    with pytest.raises(UnsupportedError, match="up: AWQ of 8 bits"):
        unpack_awq("up", **_tensors(AWQ), group=32, bits=8)
    with pytest.raises(UnsupportedError, match="layout 'gemv'"):
        unpack_awq("up", **_tensors(AWQ), group=32, version="GEMV".lower())
    unpack_awq("up", **_tensors(AWQ), group=32, version="GEMM")
