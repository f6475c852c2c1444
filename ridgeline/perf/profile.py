"""Profiles the steps of a loaded model on the CPU executor, by its native counters and a clock around Python's parts.

Steps with and without counters alternate, so that what the counters cost is measured in the same run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.core.errors import ConfigError
from ridgeline.core.hardware import Peaks
from ridgeline.engine.load import Runtime
from ridgeline.graph.cost import Load
from ridgeline.perf.machine import Neighbours, better, peaks_of
from ridgeline.perf.operators import OpRow, OpTable, operator_costs, ordered
from ridgeline.perf.work import WARM, Shape, Work, check_shapes

BLOCK = 4
"""Steps of one kind, with counters or without, that follow each other."""

Float64 = npt.NDArray[np.float64]

RUNTIME = ("copy_blocks", "wake", "prepare", "settle")
"""Counters of the native executor that are no operator's."""


@dataclass
class Stopwatch:
    """Seconds of calls by name, those within them included."""

    seconds: dict[str, float] = field(default_factory=dict)

    def clear(self) -> None:
        """Back to zero."""
        for name in self.seconds:
            self.seconds[name] = 0.0

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """See ``core.ranges.Wrap``. A call that raises is not counted."""
        seconds, clock = self.seconds, time.perf_counter
        seconds.setdefault(name, 0.0)

        def timed(*args: Any) -> Any:
            start = clock()
            result = call(*args)
            seconds[name] += clock() - start
            return result

        return timed


@dataclass(frozen=True)
class Sample:
    """One step (or one prompt's steps) with counters.

    Attributes:
        wall: seconds, by a clock around it.
        host: seconds of ranges by name.
        native: seconds of the native executor; counters: [rows, (calls, seconds, busy, longest)] of its parts.
    """

    wall: float
    host: dict[str, float]
    native: float
    counters: Float64


class CpuProfiler:
    """Times calls of ``step`` with and without counters."""

    def __init__(self, runtime: Runtime) -> None:
        """Raises ConfigError for a runtime of another backend than the CPU's."""
        if runtime.config.backend != "cpu":
            raise ConfigError(
                f"the {runtime.config.backend} backend has no counters: profile the cpu backend, or a GPU"
            )
        self.runtime = runtime
        self.native: Any = runtime.executor.native  # type: ignore[attr-defined]
        self.native.set_profiling(False)
        self.native.reset_profile()
        self.samples: list[Sample] = []
        self.plain: list[float] = []
        self._watch = Stopwatch()
        self._undo: Callable[[], None] | None = None
        self._neighbours = Neighbours()
        self._before = self._read()

    def begin(self) -> None:
        """Forgets the steps so far, which warmed up."""
        self.samples.clear()
        self.plain.clear()
        self._neighbours = Neighbours()

    def _read(self) -> tuple[float, Float64]:
        _, total, rows = self.native.profile()
        return total, np.array([row[1:] for row in rows], np.float64)

    def switch(self, on: bool) -> None:
        """Puts counters and clocks where steps will find them, or takes them away."""
        self.native.set_profiling(on)
        if on and self._undo is None:
            self._undo = self.runtime.engine.trace(self._watch.wrap)
        elif not on and self._undo is not None:
            self._undo()
            self._undo = None

    def names(self) -> list[str]:
        """Of the counters' rows: labels of the plan's operators, then "sample" and ``RUNTIME``."""
        labels = [op.label for segment in self.runtime.plan.segments for op in segment.ops]
        return labels + [row[0] for row in self.native.profile()[2][len(labels) :]]

    def time(self, step: Callable[[], None], counted: bool) -> None:
        """Runs a step, with counters or without."""
        self.switch(counted)
        self._watch.clear()
        start = time.perf_counter()
        step()
        wall = time.perf_counter() - start
        total, rows = self._read()  # after every step, so that both kinds find the caches in the same state
        if counted:
            self.samples.append(
                Sample(wall, dict(self._watch.seconds), total - self._before[0], rows - self._before[1])
            )
        else:
            self.plain.append(wall)
        self._before = total, rows

    def notes(self) -> tuple[str, ...]:
        """What disturbed the measurement, if anything."""
        cores = self._neighbours.cores()
        if cores < 0.1:
            return ()
        return (f"others kept {cores:.1f} cores busy meanwhile: waits and idle threads may be their doing",)

    def table(self, title: str, tokens: int, loads: Sequence[Load], notes: tuple[str, ...], peaks: Peaks) -> OpTable:
        """Of the quieter half of the counted steps, which do ``loads`` each."""
        kept = sorted(self.samples, key=lambda sample: sample.wall)[: max(1, len(self.samples) // 2)]
        counters = np.mean([s.counters for s in kept], axis=0)
        rows = self._native_rows(counters, loads, peaks) + _host_rows(kept)
        ratios = [s.wall / plain for s, plain in zip(self.samples, self.plain, strict=True)]
        wall = statistics.fmean(s.wall for s in kept)
        return OpTable(
            title, wall, tokens, ordered(rows), peaks, len(self.samples), len(kept), median_of(ratios), notes
        )

    def _native_rows(self, counters: Float64, loads: Sequence[Load], peaks: Peaks) -> list[OpRow]:
        costs = operator_costs(self.runtime.plan, loads, peaks)
        merged: dict[str, Float64] = {}
        for name, row in zip(self.names(), counters, strict=True):
            merged[name] = merged.get(name, np.zeros(4)) + row
        threads, rows = self.native.threads, []
        for name, (calls, seconds, busy, longest) in merged.items():
            if name in RUNTIME:
                rows.append(OpRow(name, "runtime", calls, seconds))
                continue
            # Threads leave a barrier at different times: another's work may reach beyond this one's clock.
            longest = min(longest, seconds)
            waits = {"waiting": seconds - longest, "imbalance": max(0.0, longest - busy / threads)}
            if name not in costs:
                rows.append(OpRow(name, "operator", calls, seconds, **waits))
                continue
            cost, bound, limit = costs[name]
            rows.append(
                OpRow(name, "operator", calls, seconds, cost.streamed_bytes, cost.dot_ops, bound, limit, **waits)
            )
        return [row for row in rows if row.calls]


def median_of(ratios: Sequence[float]) -> tuple[float, float, float]:
    """The median of ratios less 1, and the two that it lies between with 95% confidence, by their ranks."""
    found, number = sorted(ratios), len(ratios)
    reach = 0.98 * number**0.5
    low, high = max(0, math.floor((number - 1) / 2 - reach)), min(number - 1, math.ceil((number - 1) / 2 + reach))
    return statistics.median(found) - 1, found[low] - 1, found[high] - 1


def _host_rows(samples: Sequence[Sample]) -> list[OpRow]:
    """Python's parts of a step, means over samples."""

    def mean(*names: str) -> float:
        return statistics.fmean(sum(s.host.get(name, 0.0) for name in names) for s in samples)

    native = statistics.fmean(s.native for s in samples)
    parts = {
        "schedule": mean("schedule"),
        "make the batch": mean("batch"),
        "launch and finish": mean("launch", "finish") - native,
        "results and records": mean("step") - mean("schedule", "batch", "launch", "finish"),
    }
    return [OpRow(name, "host", 1, max(0.0, seconds)) for name, seconds in parts.items()]


def run_profile(runtime: Runtime, shapes: Sequence[Shape], steps: int) -> list[OpTable]:
    """A table for each shape.

    Args:
        steps: decode steps with counters, and as many without; prompts are a sixteenth of that. Rounded up to fours.

    Raises ConfigError for what the engine cannot hold, or a backend without counters.
    """
    if steps < 1:
        raise ConfigError(f"profile needs at least 1 step, got {steps}")
    check_shapes(runtime, shapes, 2 * _fours(steps) + WARM)
    peaks = peaks_of(runtime)
    measured = [_measure(runtime, shape, _fours(steps if shape.decodes else steps // 16)) for shape in shapes]
    peaks = better(peaks, peaks_of(runtime))
    return [table(peaks) for table in measured]


def _fours(number: int) -> int:
    """The least multiple of ``BLOCK`` above 0 that is not under it."""
    return max(1, -(-number // BLOCK)) * BLOCK


def _measure(runtime: Runtime, shape: Shape, pairs: int) -> Callable[[Peaks], OpTable]:
    """Runs pairs of steps; what is returned makes their table."""
    profiler = CpuProfiler(runtime)
    work = Work(runtime, shape, 2 * pairs + WARM)
    for number, step in enumerate(work.steps()):
        if number == WARM:
            profiler.begin()
        # Four with counters, eight without, eight with, ...: a step after a change is slower, for Python has to find
        # the methods again. As many of each, and close together.
        profiler.time(step, counted=((number - WARM) // BLOCK + 1) // 2 % 2 == 0)
    profiler.switch(False)
    return partial(profiler.table, work.title, shape.tokens, work.loads, profiler.notes())
