"""Profiles steps on a GPU: operators by its own events, the step by the host's clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ridgeline.core.errors import ConfigError
from ridgeline.core.hardware import Peaks, datasheet_of
from ridgeline.core.ranges import NvtxRanges, Ranges
from ridgeline.engine.load import Runtime
from ridgeline.graph.cost import Load
from ridgeline.graph.plan import Plan
from ridgeline.perf.operators import OpRow, OpTable, operator_costs, ordered
from ridgeline.perf.profile import Stopwatch
from ridgeline.perf.work import WARM, Shape, Work, check_shapes

RANGE = "profile "
"""A range of this and a shape's title holds the steps that are measured."""


def run_gpu_profile(runtime: Runtime, shapes: Sequence[Shape], steps: int) -> list[OpTable]:
    """A table for each shape, of ``steps`` steps.

    Raises ConfigError for what does not fit, a GPU without a datasheet here, or a device without time.
    """
    executor: Any = runtime.executor
    peaks = datasheet_of(executor.device.name())
    check_shapes(runtime, shapes, steps + WARM)
    most = runtime.engine.limits.max_tokens
    for shape in shapes:
        if len(shape.loads(most)) > 1:
            raise ConfigError(
                f"a prompt of {shape.length} tokens is more than one step: raise --max-num-batched-tokens"
            )
    return [_measure(runtime, shape, steps, peaks) for shape in shapes]


def _measure(runtime: Runtime, shape: Shape, steps: int, peaks: Peaks) -> OpTable:
    executor: Any = runtime.executor
    work, samples = Work(runtime, shape, steps + WARM), []
    timed: tuple[dict[str, tuple[int, float]], float] = ({}, 0.0)
    for number, step in enumerate(work.steps()):
        watch = Stopwatch()
        undo = runtime.engine.trace(watch.wrap)
        start = time.perf_counter()
        step()
        wall = time.perf_counter() - start
        undo()
        if number >= WARM:
            samples.append((wall, watch.seconds))
        if number == work.number - 1:  # what the requests hold is still in the cache
            timed = executor.time_operators()
    samples.sort(key=lambda sample: sample[0])
    kept = samples[: max(1, len(samples) // 2)]
    wall = statistics.fmean(seconds for seconds, _ in kept)
    host = {n: statistics.fmean(seconds.get(n, 0.0) for _, seconds in kept) for n in ("schedule", "batch", "launch")}
    return table_of_events(runtime.plan, work.loads, work.title, shape.tokens, *timed, wall, host, peaks)


def table_of_events(
    plan: Plan,
    loads: Sequence[Load],
    title: str,
    tokens: int,
    timed: Mapping[str, tuple[int, float]],
    together: float,
    wall: float,
    host: Mapping[str, float],
    peaks: Peaks,
) -> OpTable:
    """The table of a step whose operators took ``timed`` (launches and seconds, by label) on the device.

    Args:
        together: seconds of them all as one graph.
        wall: of the whole step; host: of Python's parts before the device has work, by name.
    """
    costs = operator_costs(plan, loads, peaks)
    rows = [operator_row(name, calls, seconds, costs) for name, (calls, seconds) in timed.items()]
    gaps = together - sum(row.seconds for row in rows)
    if gaps > 0:
        rows.append(OpRow("gaps in the graph", "runtime", 1, gaps))
    before = sum(host.values())
    rows += [OpRow(name, "host", 1, seconds) for name, seconds in host.items()]
    rows.append(OpRow("sampling, copies, results", "host", 1, max(0.0, wall - together - before)))
    note = f"the operators alone take {together * 1e3:.3f} ms as one graph; times of operators are means of replays"
    return OpTable(title, wall, tokens, ordered(rows), peaks, notes=(note,))


def operator_row(name: str, calls: float, seconds: float, costs: Mapping[str, Any], **more: Any) -> OpRow:
    """An operator's row, with its cost where it has one."""
    if name not in costs:
        return OpRow(name, "operator", calls, seconds, **more)
    cost, bound, limit = costs[name]
    values = {"bytes": cost.streamed_bytes, "ops": cost.dot_ops, "bound": bound, "limit": limit} | more
    return OpRow(name, "operator", calls, seconds, **values)


def run_steps(runtime: Runtime, shapes: Sequence[Shape], steps: int, ranges: Ranges | None = None) -> None:
    """Runs the steps of each shape and times nothing: that is up to the tool that runs this process.

    Measured steps are in a range named by the shape, and the device's profiler is told of them.
    """
    ranges = ranges or NvtxRanges()
    device = runtime.executor.device  # type: ignore[attr-defined]
    check_shapes(runtime, shapes, steps + WARM)
    for shape in shapes:
        for number, step in enumerate(Work(runtime, shape, steps + WARM).steps()):
            if number == WARM:
                device.collect(True)
                ranges.push(RANGE + shape.title)
            step()
            if number == WARM + steps - 1:
                ranges.pop()
                device.collect(False)
