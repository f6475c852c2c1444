"""NVTX ranges by step, layer and operator, and operators timed apart, on the emulated device.

The nvtx package is replaced by one that writes down what is pushed; a launch is written down where it is interpreted.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ridgeline.backends.cuda import emulated
from ridgeline.backends.cuda.emulated import EmulatedDevice
from ridgeline.backends.cuda.executor import CudaExecutor
from ridgeline.core.errors import ConfigError
from ridgeline.core.hardware import Peaks
from ridgeline.core.ranges import NvtxRanges, within
from ridgeline.core.types import SamplingParams
from ridgeline.engine import load
from ridgeline.engine.engine import Engine, EngineLimits
from ridgeline.graph.cost import Load
from ridgeline.perf import profile_gpu, work
from ridgeline.perf.nsight import operator_of
from ridgeline.perf.profile_gpu import RANGE, run_steps, table_of_events
from ridgeline.perf.work import Shape
from tests.gpu.small_model import SIZES, model
from tests.graph.small_llama import Driver


class Recorder:
    """An nvtx package: the ranges open now, and a log of every launch's."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.pushed: list[str] = []
        self.launches: list[tuple[tuple[str, ...], str]] = []

    def get_domain(self, name: str) -> Recorder:
        assert name == "ridgeline"
        return self

    def get_event_attributes(self, message: str) -> SimpleNamespace:
        return SimpleNamespace(message=message)

    def push_range(self, attributes: SimpleNamespace) -> None:
        self.open.append(attributes.message)
        self.pushed.append(attributes.message)

    def pop_range(self) -> None:
        self.open.pop()


@pytest.fixture
def nvtx(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Ranges go here, and launches are logged with those they are queued in."""
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "nvtx", recorder)
    queue = emulated.EmulatedStream._queue

    def logged(self: Any, name: str, *more: Any) -> None:
        recorder.launches.append((tuple(recorder.open), name))
        queue(self, name, *more)

    monkeypatch.setattr(emulated.EmulatedStream, "_queue", logged)
    return recorder


def made(traced: bool, graphs: bool, layers: int = 1) -> CudaExecutor:
    """The small model; ``traced`` as ``engine.load`` does it."""
    _, plan, weights = model("bf16", "bf16", layers=layers)
    device = EmulatedDevice("sm_90", 0)
    device.ranges = NvtxRanges() if traced else None
    runs = CudaExecutor(plan, weights, device, graphs=graphs, **SIZES)
    if device.ranges is not None:
        runs.trace(device.ranges)
    return runs


def test_every_launch_is_in_the_range_of_its_layer_and_operator(nvtx: Recorder) -> None:
    runs = made(True, graphs=False, layers=2)
    nvtx.launches.clear()
    Driver(runs, 40, 16).step([(0, [1, 2, 3])])
    assert nvtx.open == []
    stacks = [stack for stack, name in nvtx.launches if stack[:1] == ("operators",)]
    assert stacks[1] == ("operators", "embed embed")  # the first feeds tokens
    assert ("operators", "layer 0", "linear q+k+v") in stacks and ("operators", "layer 1", "attention") in stacks
    assert stacks[-1] == ("operators", "linear embed")
    ops = [op.label for segment in runs.plan.segments for op in segment.ops]
    assert {operator_of(stack) for stack in stacks} == {*ops, "other kernels"}
    others = {stack for stack, name in nvtx.launches} - set(stacks)
    assert {("inputs",), ("sample",)} <= others


def test_a_graph_has_its_ranges_when_it_is_captured_and_none_when_it_runs(nvtx: Recorder) -> None:
    runs = made(True, graphs=True)
    assert {"layer 0", "linear q+k+v"} <= set(nvtx.pushed) and nvtx.open == []
    nvtx.pushed.clear()
    Driver(runs, 40, 16).step([(0, [1, 2, 3])])
    assert nvtx.pushed == ["inputs", "operators", "sample", "wait"]


def test_without_ranges_nothing_is_pushed_or_wrapped(nvtx: Recorder) -> None:
    runs = made(False, graphs=False)
    Driver(runs, 40, 16).step([(0, [1, 2, 3])])
    assert nvtx.pushed == []
    assert not any(name.startswith("_") and callable(value) for name, value in vars(runs).items())


def test_launched_one_by_one_the_bits_are_the_graphs() -> None:
    apart, together = (Driver(made(False, graphs=graphs), 40, 16) for graphs in (False, True))
    for tokens in ([1, 2, 3], [4]):
        left, right = apart.step([(0, tokens)]), together.step([(0, tokens)])
        assert (left[1] == right[1]).all() and (left[0].token_ids == right[0].token_ids).all()


def runtime_of(runs: CudaExecutor) -> Any:
    """An engine over it."""
    limits = EngineLimits(2, 32, 60, 160, 16, SIZES["num_blocks"], max_sampled_rows=8)
    return SimpleNamespace(engine=Engine(runs, limits), executor=runs, plan=runs.plan)


def test_steps_for_nsight_are_in_a_range_of_their_shape(nvtx: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (work, profile_gpu):
        monkeypatch.setattr(module, "WARM", 1)  # each step is interpreted
    runtime = runtime_of(made(True, graphs=False))
    runtime.engine.trace(within(NvtxRanges()))
    told: list[tuple[bool, tuple[str, ...]]] = []
    runtime.executor.device.collect = lambda on: told.append((on, tuple(nvtx.open)))
    shape = Shape(1, 8)
    nvtx.launches.clear()
    run_steps(runtime, [shape], 1)
    assert told == [(True, ()), (False, ())]
    inside = [stack for stack, _ in nvtx.launches if stack[:1] == (RANGE + shape.title,)]
    assert (RANGE + shape.title, "step", "launch", "operators", "layer 0", "attention") in inside
    assert nvtx.pushed.count("step") > 1 and nvtx.open == []


def test_operators_are_timed_apart_with_all_their_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = made(False, graphs=True, layers=2)
    with pytest.raises(Exception, match="no step has run"):
        runs.time_operators()
    Driver(runs, 40, 16).step([(0, [1, 2, 3])])
    with pytest.raises(ConfigError, match="the emulated device has no time"):
        runs.time_operators()
    # A device on which every launch takes a millisecond.
    monkeypatch.setattr(emulated.EmulatedStream, "time", lambda self, graph, n: 1e-3 * len(graph.launches))
    timed, together = runs.time_operators()
    count, seconds = timed["linear q+k+v"]
    assert count >= 2 and seconds == pytest.approx(count * 1e-3)
    assert timed["feed tokens"] == (1, pytest.approx(1e-3))
    assert together == pytest.approx(sum(seconds for _, seconds in timed.values()))
    table = table_of_events(
        runs.plan, [Load.of([(2, 1)])], "t", 1, timed, together + 5e-3, 0.1, {"launch": 1e-2}, Peaks(1e12, 1, 1e15, 1)
    )
    rows = {row.name: row for row in table.rows}
    assert rows["gaps in the graph"].seconds == pytest.approx(5e-3) and rows["attention"].bytes > 0
    assert table.unattributed == pytest.approx(0, abs=1e-9)
    assert rows["sampling, copies, results"].seconds == pytest.approx(0.1 - together - 1.5e-2)


def test_options_reach_the_executor(nvtx: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """``nvtx`` and ``cuda_graphs`` of the engine's configuration."""
    from ridgeline.core.config import EngineConfig

    graph, _, weights = model("bf16", "bf16", layers=1)
    stored = SimpleNamespace(weights=weights)
    config = EngineConfig(
        backend="cuda", device="emulated", nvtx=True, cuda_graphs=False, max_num_seqs=4, max_num_batched_tokens=32
    )
    _, build = load._plan_cuda_executor(config, stored, graph, "bf16", dict(SIZES))  # type: ignore[arg-type]
    runs = build()
    engine = Engine(runs, EngineLimits(2, 32, 60, 160, 16, SIZES["num_blocks"], max_sampled_rows=8))
    request = engine.make_request([1, 2], SamplingParams(temperature=0, max_tokens=1))
    engine.submit([request])
    engine.step()
    assert nvtx.pushed[:2] == ["inputs", "operators"] and "layer 0" in nvtx.pushed
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.raises(ConfigError, match="nvtx is not installed"):
        NvtxRanges()
