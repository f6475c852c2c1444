"""Faults planted in the CUDA executor, each of a kind seen in the field: the emulated device or the answers tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ridgeline.backends.cuda import executor as module
from ridgeline.backends.cuda.emulated import DeviceFault, EmulatedStream
from ridgeline.backends.cuda.executor import CudaExecutor
from tests.gpu.small_model import executor, model, reference
from tests.graph.small_llama import Driver

STEPS: list[list[tuple[int, list[int]]]] = [[(0, [3, 1, 4])], [(0, [5]), (1, [9, 2, 6])], [(1, [5]), (0, [3])]]


def run_and_compare(seed: int) -> None:
    """Steps two at a time beside the reference; raises AssertionError for other numbers."""
    _, plan, weights = model("bf16", "bf16", layers=1)
    made, right = executor(seed=seed, layers=1), reference(plan, weights)
    driver, shadow = Driver(made, 40, 16), Driver(right, 40, 16)
    driver.free, shadow.free = list(range(39, -1, -1)), list(range(39, -1, -1))  # the first block is one that is used
    open_tickets: list[Any] = []
    tokens: list[int] = []
    truth: list[int] = []
    for work in STEPS:
        open_tickets.append(made.launch(driver.batch(work)))
        truth += shadow.step(work)[0].token_ids.tolist()
        if len(open_tickets) == 2:
            tokens += made.finish(open_tickets.pop(0)).token_ids.tolist()
    tokens += made.finish(open_tickets.pop()).token_ids.tolist()
    assert tokens == truth
    assert np.abs(made.last_logits - right.last_logits).max() < 0.05 * np.abs(right.last_logits).max()


def reused_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step's inputs go through one buffer, and nobody waits for the step before."""
    launch = CudaExecutor.launch

    def hasty(self: CudaExecutor, batch: Any) -> Any:
        self._places = [replace(self._places[0], done=None) for _ in self._places]
        return launch(self, batch)

    monkeypatch.setattr(CudaExecutor, "launch", hasty)


def missing_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmulatedStream, "wait", lambda self, event: None)


def stale_block_table(monkeypatch: pytest.MonkeyPatch) -> None:
    update = module.update_cache
    calls: list[int] = []

    def stale(cache: Any, updates: Any, copies: Any) -> Any:
        calls.append(1)
        return update(cache, updates if len(calls) == 1 else None, copies)

    monkeypatch.setattr(module, "update_cache", stale)


def wrong_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EmulatedStream, "replay", _replays_the_first(EmulatedStream.replay))


def _replays_the_first(replay: Callable[..., None]) -> Callable[..., None]:
    first: list[Any] = []

    def wrong(self: EmulatedStream, graph: Any) -> None:
        first.append(graph)
        replay(self, first[0])

    return wrong


def compiled_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "every_launch_beside", lambda *args: [])


def results_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        def synchronize(self) -> None:
            pass

    monkeypatch.setattr(EmulatedStream, "record", lambda self: Done())
    monkeypatch.setattr(EmulatedStream, "wait", lambda self, event: None)


def test_without_a_fault_nothing_is_found() -> None:
    for seed in range(2):
        run_and_compare(seed)


@pytest.mark.parametrize(
    "plant",
    [reused_too_early, missing_wait, stale_block_table, wrong_bucket, compiled_late, results_not_waited_for],
)
def test_a_fault_is_found(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    executor(layers=1)  # warm: what follows fails for the fault alone
    plant(monkeypatch)
    with pytest.raises((DeviceFault, AssertionError, ValueError)):
        run_and_compare(7)
