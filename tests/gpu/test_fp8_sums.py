"""How far FP8 sums may stay in Hopper's tensor cores, whose accumulator keeps 14 bits: by simulation."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ridgeline.backends.cuda.kernels.linear_fp8 import BLOCK, PART, WHOLE

STEP = 32
"""Values of K of one QGMMA."""
KEPT = 13
"""Bits below the largest addend's leading one (DeepSeek-V3's report, 2024, section 3.3.2)."""


def e4m3(values: np.ndarray) -> np.ndarray:
    """Rows scaled to the format's largest number and rounded to it."""
    scaled = values / np.abs(values).max(axis=1, keepdims=True) * 448
    return scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def summed(x: np.ndarray, w: np.ndarray, part: int) -> np.ndarray:
    """Row-wise dot products: parts of K by the tensor core, added up in fp32."""
    total = np.zeros(len(x), np.float32)
    for start in range(0, x.shape[1], part):
        acc = np.zeros(len(x))
        for k in range(start, start + part, STEP):
            addends = np.concatenate([x[:, k : k + STEP] * w[:, k : k + STEP], acc[:, None]], axis=1)
            last = 2.0 ** (np.floor(np.log2(np.abs(addends).max(axis=1, keepdims=True))) - KEPT)
            acc = (np.trunc(addends / last) * last).sum(axis=1)
        total += acc.astype(np.float32)
    return total.astype(np.float64)


def test_parts_cost_less_than_rounding_the_result() -> None:
    rng = np.random.default_rng(0)
    x, w = (e4m3(rng.standard_normal((1000, 4096))) for _ in range(2))
    exact = (x * w).sum(axis=1)
    rounding = np.sqrt(np.mean((exact.astype(ml_dtypes.bfloat16).astype(np.float64) - exact) ** 2))
    errors = {part: np.sqrt(np.mean((summed(x, w, part) - exact) ** 2)) for part in (BLOCK, PART, 4096)}
    assert errors[BLOCK] < errors[PART] < rounding / 2 < errors[4096]


def test_what_is_cut_off_adds_up_where_products_have_one_sign() -> None:
    rng = np.random.default_rng(0)
    x, w = (e4m3(np.abs(rng.standard_normal((200, 4096)))) for _ in range(2))
    exact = (x * w).sum(axis=1)
    bias = {part: np.mean(1 - summed(x, w, part) / exact) for part in (BLOCK, PART, 4096)}
    assert 0 < bias[BLOCK] < 0.001 and 0.01 < bias[PART] < 0.02 and bias[4096] > 0.05


@pytest.mark.parametrize("arch", WHOLE)
def test_a_part_is_whole_steps(arch: str) -> None:
    assert all(PART % tile.block_k == 0 for tile in WHOLE[arch])
