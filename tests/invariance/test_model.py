"""Whole small models natively against the reference: the fused plan, every format, prefill and decode together."""

from __future__ import annotations

import numpy as np
import pytest
from graph.small_llama import Driver
from invariance.small_models import BLOCKS, MODELS, SLOTS, WAYS, executor, model_of

from ridgeline.backends.reference.executor import ReferenceExecutor
from ridgeline.core.types import SAMPLING_DTYPE

STEPS: list[list[tuple[int, int]]] = [
    [(0, 40), (3, 7)],
    [(3, 1), (0, 1), (1, 270)],
    [(1, 1)],
    [(1, 2), (0, 30), (3, 1), (5, 17)],
    [(5, 1), (1, 1), (0, 1), (3, 1)],
]
"""(slot, tokens) of each request, step by step."""


def logits_of(runs, seed: int) -> np.ndarray:
    """All logits the steps give, one row after another."""
    rng, driver = np.random.default_rng(seed), Driver(runs, SLOTS * BLOCKS, block_size=16, seed=seed)
    rows = [driver.step([(slot, rng.integers(0, 80, n)) for slot, n in step])[1] for step in STEPS]
    return np.concatenate(rows).astype(np.float64)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_as_near_the_truth_as_plain_float32(name: str) -> None:
    """Error against float64 at most twice that of numpy in float32 on the same plan, roundings included."""
    size = {"num_slots": SLOTS, "num_blocks": [SLOTS * BLOCKS], "max_blocks_per_slot": BLOCKS}
    for way in WAYS:
        plan, weights = model_of(name, way)
        truth = logits_of(ReferenceExecutor(plan, weights, **size, dtype=np.float64), 7)
        plain = np.abs(logits_of(ReferenceExecutor(plan, weights, **size), 7) - truth).max()
        error = np.abs(logits_of(executor(name, way, 2), 7) - truth).max()
        assert error <= 2 * plain, f"{way}: {error:.3g}, plain float32 {plain:.3g}"


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_samples_nothing(way: str) -> None:
    """A chunk of a prompt that is not its last: no rows, no logits, and the next step is as if it had been one."""
    ids = np.random.default_rng(0).integers(0, 80, 50).astype(np.int32)
    whole, chunked = (Driver(executor("q4_1", way, 2), 60, block_size=16) for _ in range(2))
    expected = whole.step([(2, ids)])[1]
    batch = chunked.batch([(2, ids[:33])], np.zeros(0, SAMPLING_DTYPE))
    batch.sample_rows = batch.sample_rows[:0]
    output = chunked.executor.finish(chunked.executor.launch(batch))
    assert output.token_ids.shape == (0,) and chunked.executor.last_logits.shape == (0, 80)
    np.testing.assert_array_equal(chunked.step([(2, ids[33:])])[1], expected)


@pytest.mark.parametrize("way", WAYS)
def test_minus_one_is_what_the_slot_sampled_last(way: str) -> None:
    by_value, by_slot = (Driver(executor("q8_0-f16", way, 2), 60, block_size=16) for _ in range(2))
    first = [(4, [5, 6, 7]), (0, [9])]
    sampled = by_value.step(first)[0].token_ids
    by_slot.step(first)
    expected = by_value.step([(0, [int(sampled[1])]), (4, [int(sampled[0])])])[1]
    np.testing.assert_array_equal(by_slot.step([(0, [-1]), (4, [-1])])[1], expected)
