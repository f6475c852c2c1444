"""Codecs against the ``gguf`` package, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from ridgeline.core.errors import UnsupportedError
from ridgeline.core.formats import FORMATS, WeightFormat
from ridgeline.weights.codecs import codes_of, dequantize, quantize

gguf = pytest.importorskip("gguf")


def _values(k: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    rows = [
        rng.standard_normal(k),
        rng.standard_normal(k) * 1e-3,
        rng.standard_normal(k) * 300,
        np.zeros(k),
        np.full(k, 0.75),
        np.full(k, -3.0),
        np.linspace(-1, 1, k),
        rng.integers(-127, 128, k) + 0.5,  # halves: which way they round
        rng.standard_normal(k) * 1e-7,  # scales below the fp16 normals
        np.where(np.arange(k) % 32 == 5, 4.0, 0.0),
    ]
    return np.stack(rows).astype(np.float32)


def _oracle_type(name: str):  # type: ignore[no-untyped-def]
    return gguf.GGMLQuantizationType[name.upper()]


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("k", [32, 96, 576])
def test_quantize_matches_gguf(name: str, k: int) -> None:
    values = _values(k)
    expected = np.ascontiguousarray(gguf.quants.quantize(values, _oracle_type(name))).view(np.uint8).reshape(-1)
    np.testing.assert_array_equal(quantize(FORMATS[name], values), expected)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_dequantize_matches_gguf(name: str) -> None:
    format, values = FORMATS[name], _values(64)
    data = quantize(format, values)
    ours = dequantize(format, data, values.shape)
    theirs = gguf.quants.dequantize(data.reshape(len(values), -1), _oracle_type(name))
    np.testing.assert_array_equal(ours.view(np.uint32), np.asarray(theirs, np.float32).view(np.uint32))


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
def test_every_byte_decodes_as_gguf_does(name: str) -> None:
    """Random codes under ordinary scales: every code value in every place of a group."""
    format = FORMATS[name]
    rng = np.random.default_rng(3)
    groups = rng.integers(0, 256, (400, format.group_bytes), dtype=np.uint8)
    header = 4 if format.has_minimum else 2
    groups[:, :header] = rng.standard_normal((400, header // 2)).astype(np.float16).view(np.uint8)
    ours = dequantize(format, groups.reshape(-1), (400, 32))
    theirs = gguf.quants.dequantize(groups, _oracle_type(name))
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_bf16_specials() -> None:
    values = np.array([np.nan, -np.nan, np.inf, -np.inf, 3.4e38, -0.0, 1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    back = dequantize(FORMATS["bf16"], quantize(FORMATS["bf16"], values), values.shape)
    assert np.isnan(back[:2]).all()
    np.testing.assert_array_equal(back[2:], np.array([np.inf, -np.inf, np.inf, -0.0, 1, 1 + 2**-6], np.float32))


def test_floats_round_trip() -> None:
    values = _values(33)
    np.testing.assert_array_equal(dequantize(FORMATS["f32"], quantize(FORMATS["f32"], values), values.shape), values)


def test_errors() -> None:
    with pytest.raises(ValueError, match="groups of 32"):
        quantize(FORMATS["q4_0"], np.zeros((2, 48), np.float32))
    with pytest.raises(ValueError, match="takes 40 bytes, got 39"):
        dequantize(FORMATS["q4_1"], np.zeros(39, np.uint8), (2, 32))
    with pytest.raises(UnsupportedError, match="q9_9"):
        dequantize(WeightFormat("q9_9", "int", 9, 32, 40), np.zeros(40, np.uint8), (32,))


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
def test_codes_and_scales_are_what_is_dequantized(name: str) -> None:
    form = FORMATS[name]
    data = quantize(form, np.random.default_rng(0).standard_normal((6, 96)))
    parts = codes_of(form, data, (6, 96))

    def spread(x: np.ndarray) -> np.ndarray:
        return np.repeat(x.astype(np.float32), form.group, axis=1)

    values = (parts.codes.astype(np.float32) - form.zero) * spread(parts.scales)
    if parts.minimums is not None:
        values += spread(parts.minimums)
    assert np.array_equal(values, dequantize(form, data, (6, 96)))
    with pytest.raises(UnsupportedError, match="f16 has no codes"):
        codes_of(FORMATS["f16"], data, (6, 96))
