"""Profiles the steps of a loaded model on the CPU executor, by its native counters and a clock around Python's parts.

Steps with and without counters alternate, so that what the counters cost is measured in the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.core.errors import ConfigError, RidgelineError
from ridgeline.core.hardware import Peaks
from ridgeline.engine.load import Runtime
from ridgeline.graph.cost import Load
from ridgeline.perf.bench import greedy, need_room, random_prompt
from ridgeline.perf.machine import Neighbours, better, measure_peaks
from ridgeline.perf.operators import OpRow, OpTable, operator_costs, ordered

Float64 = npt.NDArray[np.float64]

RUNTIME = ("copy_blocks", "wake", "prepare", "settle")
"""Counters of the native executor that are no operator's."""


@dataclass
class Stopwatch:
    """Seconds of ranges by name (``core.ranges.Ranges``), those within included."""

    seconds: dict[str, float] = field(default_factory=dict)
    _open: list[tuple[str, float]] = field(default_factory=list)

    def push(self, name: str) -> None:
        """See ``Ranges``."""
        self._open.append((name, time.perf_counter()))

    def pop(self) -> None:
        """See ``Ranges``."""
        name, start = self._open.pop()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


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

    def names(self) -> list[str]:
        """Of the counters' rows: labels of the plan's operators, then "sample" and ``RUNTIME``."""
        labels = [op.label for segment in self.runtime.plan.segments for op in segment.ops]
        return labels + [row[0] for row in self.native.profile()[2][len(labels) :]]

    def time(self, step: Callable[[], None], counted: bool) -> None:
        """Runs a step, with counters or without."""
        watch = Stopwatch()
        if counted:
            undo = self.runtime.engine.trace(watch)
            self.native.set_profiling(True)
        start = time.perf_counter()
        step()
        wall = time.perf_counter() - start
        if counted:
            self.native.set_profiling(False)
            undo()
        total, rows = self._read()  # after every step, so that both kinds find the caches in the same state
        if counted:
            self.samples.append(Sample(wall, watch.seconds, total - self._before[0], rows - self._before[1]))
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
        overhead = statistics.median(ratios) - 1
        return OpTable(title, wall, tokens, ordered(rows), peaks, len(self.samples), len(kept), overhead, notes)

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


def run_profile(runtime: Runtime, prompt: int, batches: Sequence[int], context: int, steps: int) -> list[OpTable]:
    """Tables of a prefill of ``prompt`` tokens (0: none) and of decode steps at each batch size.

    Args:
        context: tokens in the cache of each request halfway through the decode steps.
        steps: decode steps with counters, and as many without; prefills are a sixteenth of that, at least 4.

    Raises ConfigError for what the engine cannot hold, or a backend without counters.
    """
    check_profile(runtime, prompt, batches, context, steps)
    peaks = measure_peaks(runtime.config.threads, runtime.config.isa)
    measured = [profile_prefill(runtime, prompt, max(4, steps // 16))] if prompt else []
    measured += [profile_decode(runtime, batch, context, steps) for batch in batches]
    peaks = better(peaks, measure_peaks(runtime.config.threads, runtime.config.isa))
    return [table(peaks) for table in measured]


def check_profile(runtime: Runtime, prompt: int, batches: Sequence[int], context: int, steps: int) -> None:
    """Raises ConfigError for sizes that make no sense or do not fit."""
    limits = runtime.engine.limits
    if prompt < 0 or context < 1 or steps < 1 or min(batches, default=1) < 1:
        raise ConfigError("profile needs a prompt of at least 0, and batches, a context and steps of at least 1")
    if not prompt and not batches:
        raise ConfigError("nothing to profile: give -p a prompt's tokens, or -b batch sizes")
    if max(batches, default=1) > limits.max_requests:
        raise ConfigError(f"a batch of {max(batches)} needs --max-num-seqs {max(batches)} (now {limits.max_requests})")
    if prompt:
        need_room(runtime, 1, prompt + 1, "-p")
    for batch in batches:
        need_room(
            runtime, batch, _start_at(context, steps) + _tokens(runtime, batch, context, steps), "-b or --context"
        )


def _start_at(context: int, steps: int) -> int:
    """Tokens of the prompt, so that the steps' middle is at ``context``."""
    return max(1, context - steps - 2)


def _tokens(runtime: Runtime, batch: int, context: int, steps: int) -> int:
    """Tokens a request may decode: warm-up, timed steps, and what it does while others still read their prompts."""
    reading = batch * _start_at(context, steps) // max(1, runtime.engine.limits.max_tokens - batch) + 2
    return 2 * steps + 4 + reading


def profile_prefill(runtime: Runtime, length: int, pairs: int) -> Callable[[Peaks], OpTable]:
    """Measures all steps that read a prompt; what is returned makes their table."""
    engine, profiler = runtime.engine, CpuProfiler(runtime)

    def read(counted: bool, number: int) -> None:
        request = engine.make_request(random_prompt(runtime, length, number), greedy(1), cache_salt=object())
        engine.submit([request])

        def steps() -> None:
            while request.finish_reason is None:
                engine.step()

        profiler.time(steps, counted)

    for warm in (False, True):
        read(warm, 0)
    profiler.begin()
    for pair in range(pairs):
        for counted in (pair % 2 == 0, pair % 2 == 1):
            read(counted, 1 + pair)
    size = engine.limits.max_tokens
    loads = [Load.of([(first, min(size, length - first))]) for first in range(0, length, size)]
    return partial(profiler.table, f"prefill, {length} tokens", length, loads, profiler.notes())


def profile_decode(runtime: Runtime, batch: int, context: int, steps: int) -> Callable[[Peaks], OpTable]:
    """Measures steps in which ``batch`` requests decode a token each; what is returned makes their table."""
    engine, profiler = runtime.engine, CpuProfiler(runtime)
    params = greedy(_tokens(runtime, batch, context, steps))
    prompts = [random_prompt(runtime, _start_at(context, steps), i) for i in range(batch)]
    requests = [engine.make_request(prompt, params, cache_salt=object()) for prompt in prompts]
    engine.submit(requests)
    while any(not r.output_ids for r in requests):
        engine.step()
    for warm in (False, True):
        profiler.time(lambda: engine.step(), warm)
    profiler.begin()
    before = [r.num_computed for r in requests]
    for pair in range(steps):
        for counted in (pair % 2 == 0, pair % 2 == 1):
            profiler.time(lambda: engine.step(), counted)  # looked up late: tracing wraps it
    if any(r.num_computed != n + 2 * steps for r, n in zip(requests, before, strict=True)):
        raise RidgelineError(f"not every one of {batch} requests decoded {2 * steps} tokens: the times mean nothing")
    # Cost is linear in the context, so the middle stands for all.
    load = Load.of([(n + steps - 1, 1) for n in before])
    middle = round(statistics.fmean(before)) + steps
    notes = profiler.notes()
    for request in requests:
        engine.abort(request)
    return partial(profiler.table, f"decode, batch {batch}, context {middle}", batch, [load], notes)
