"""The native executor's counters: what ran, how often, and that every tick of a step is in one row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ridgeline.backends.cpu.executor import CpuExecutor
from ridgeline.core.types import POOL, SAMPLING_DTYPE, TokenMasks
from tests.graph.small_llama import Driver
from tests.invariance.small_models import executor, model_of

BLOCKS = 8
EXTRAS = ["sample", "copy_blocks", "wake", "prepare", "settle"]


def made(threads: int = 2) -> tuple[CpuExecutor, Driver]:
    """A small model and what feeds it."""
    runs = executor("q4_1", "generic", threads)
    return runs, Driver(runs, BLOCKS, 16)


def rows_of(runs: CpuExecutor) -> dict[str, np.ndarray]:
    """By name: calls, seconds, busy, longest."""
    return {name: np.array(values) for name, *values in runs.native.profile()[2]}


def sampling(count: int, **values: Any) -> np.ndarray:
    """Greedy rows."""
    rows = np.zeros(count, SAMPLING_DTYPE)
    rows["num_logprobs"] = -1
    for name, value in values.items():
        rows[name] = value
    return rows


def test_rows_are_the_plans_operators_then_the_runtimes_parts() -> None:
    runs, _ = made()
    plan, _ = model_of("q4_1", "generic")
    names = [row[0] for row in runs.native.profile()[2]]
    assert names == []  # nothing was counted yet
    runs.native.set_profiling(True)
    names = [row[0] for row in runs.native.profile()[2]]
    operators = [op for segment in plan.segments for op in segment.ops]
    assert names == [*runs.native.op_names(), *EXTRAS]
    assert len(names) == len(operators) + len(EXTRAS)
    kinds = {"rms_norm": "norm", "add_rms_norm": "norm", "rope_kv_write": "rope_kv", "select_rows": "select"}
    assert [n.split()[0] for n in names[: len(operators)]] == [kinds.get(op.op, op.op) for op in operators]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_tick_of_a_step_is_in_one_row(threads: int) -> None:
    runs, driver = made(threads)
    driver.step([(0, [1, 2, 3])])
    runs.native.set_profiling(True)
    for work in ([(0, [4]), (1, list(range(20)))], [(0, [5]), (1, [6])], [(1, [7])]):
        driver.step(work)
    steps, total, listed = runs.native.profile()
    assert steps == 3
    assert sum(seconds for _, _, seconds, _, _ in listed) == pytest.approx(total, rel=1e-6)
    rows = rows_of(runs)
    for name in runs.native.op_names():
        calls, seconds, busy, longest = rows[name]
        assert calls == 3 and 0 <= longest <= busy <= threads * longest * 1.0001
    assert rows["copy_blocks"][0] == 0 and rows["wake"][0] == rows["settle"][0] == 3
    runs.native.reset_profile()
    assert runs.native.profile()[0] == 0 and not any(row.any() for row in rows_of(runs).values())


def test_steps_are_counted_only_while_profiling_is_on_and_bits_stay() -> None:
    runs, driver = made()
    plain, plain_driver = made()
    steps = [[(0, [1, 2, 3])], [(0, [4]), (1, [5, 6])], [(0, [7]), (1, [8])]]
    for number, work in enumerate(steps):
        runs.native.set_profiling(number == 1)
        output, logits = driver.step(work)
        right, expected = plain_driver.step(work)
        assert np.array_equal(logits, expected) and np.array_equal(output.token_ids, right.token_ids)
    assert runs.native.profile()[0] == 1


def test_the_head_is_not_called_where_no_logits_are_wanted() -> None:
    runs, driver = made()
    runs.native.set_profiling(True)
    driver.step([(0, [1, 2])], sampling(1, target=POOL))
    calls = [rows_of(runs)[name][0] for name in runs.native.op_names()]
    assert calls[-1] == 0 and set(calls[:-1]) == {1}


def test_copies_have_a_row_of_their_own() -> None:
    runs, driver = made()
    driver.step([(0, [1, 2])])
    runs.native.set_profiling(True)
    batch = driver.batch([(0, [3])])
    batch.block_copies = [np.array([[int(driver.free[0]), int(driver.free[1])]], np.int32)]
    runs.finish(runs.launch(batch))
    assert rows_of(runs)["copy_blocks"][0] == 1


def test_rows_sampled_under_a_mask_count_as_the_same_step() -> None:
    runs, driver = made()
    runs.native.set_profiling(True)
    bits = np.full((1, 3), 0xFFFFFFFF, np.uint32)
    driver.step([(0, [1]), (1, [2])], sampling(2, masked=[1, 0]), TokenMasks(bits))
    steps, total, listed = runs.native.profile()
    assert steps == 1 and rows_of(runs)["sample"][0] == 2
    assert sum(seconds for _, _, seconds, _, _ in listed) == pytest.approx(total, rel=1e-6)
