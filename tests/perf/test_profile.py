"""Profiles of a small model on the CPU executor: every operator is there as often as the plan has it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import ConfigError, RidgelineError
from ridgeline.core.hardware import Peaks
from ridgeline.core.ranges import trace, within
from ridgeline.engine.engine import Engine, EngineLimits
from ridgeline.perf import profile
from ridgeline.perf.work import WARM, Shape, Work, check_shapes, shapes_of
from tests.invariance.small_models import BLOCKS, SLOTS, executor, model_of


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A small model's engine: 4 requests and 64 tokens a step."""
    monkeypatch.setattr(profile, "peaks_of", lambda *args: Peaks(1e11, 1e12, 1e12, 1e12))
    runs = executor("q4_1", "generic", 2)
    limits = EngineLimits(4, 64, 512, 80, 16, [SLOTS * BLOCKS])
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64)
    return SimpleNamespace(
        engine=Engine(runs, limits), executor=runs, plan=model_of("q4_1", "generic")[0], config=config
    )


def test_tables_of_a_prompt_and_of_decode_steps(runtime: Any) -> None:
    prompt, decode = profile.run_profile(runtime, [Shape(0, 150), Shape(3, 40)], 5)
    assert prompt.title == "prefill, 150 tokens" and prompt.steps == 4 and prompt.kept == 2
    calls = {row.name: row.calls for row in prompt.rows}
    assert calls["linear gate+up"] == 2 * 3  # two layers, three chunks of up to 64 tokens
    assert calls["linear embed"] == 3 and calls["sample"] == 3
    assert decode.title.startswith("decode, batch 3, context ") and decode.steps == 8 and decode.tokens == 3
    calls = {row.name: row.calls for row in decode.rows}
    assert calls["add_rms_norm norm"] == 4 and calls["attention"] == 2 and calls["prepare"] == 1
    assert {"schedule", "make the batch", "launch and finish"} <= calls.keys()
    attention = next(row for row in decode.rows if row.name == "attention")
    assert attention.bytes > 0 and attention.limit == "memory"
    for row in [*prompt.rows, *decode.rows]:
        assert row.seconds >= 0 and 0 <= row.waiting + row.imbalance <= row.seconds * 1.0001
    assert runtime.executor.native.profile()[0] > 0
    assert "step" not in vars(runtime.engine)  # nothing is traced any more


def test_the_middle_of_decode_steps_is_the_context(runtime: Any) -> None:
    work = Work(runtime, Shape(2, 100), 20)
    for step in work.steps():
        step()
    assert work.title in ("decode, batch 2, context 100", "decode, batch 2, context 101")
    assert work.loads[0].requests == 2 and work.loads[0].kv_tokens_read in range(198, 206)
    assert runtime.engine.num_running == 0


def test_a_prompts_steps(runtime: Any) -> None:
    work = Work(runtime, Shape(0, 100), 3)
    assert [load.tokens for load in work.loads] == [64, 36]
    for step in work.steps():
        step()
    assert not runtime.engine.has_work


def test_a_request_that_stands_still_ends_the_run(runtime: Any) -> None:
    work = Work(runtime, Shape(1, 20), 6).steps()
    with pytest.raises(RidgelineError, match="not every one of 1 requests decoded 6 tokens"):
        for _ in work:
            pass
    assert runtime.engine.num_running == 0


@pytest.mark.parametrize(
    ("shape", "steps", "message"),
    [
        (Shape(5, 16), 8, "a batch of 5 needs --max-num-seqs 5"),
        (Shape(1, 512), 8, "the context is 512: lower -b or --context"),
        (Shape(0, 512), 8, "lower -p"),
        (Shape(1, 16), WARM, "at least 1 step"),
    ],
)
def test_what_does_not_fit_is_refused(runtime: Any, shape: Shape, steps: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_shapes(runtime, [shape], steps)


def test_the_median_and_what_it_lies_between() -> None:
    median, low, high = profile.median_of([1 + i / 100 for i in range(101)])
    assert median == pytest.approx(0.5) and (low, high) == (pytest.approx(0.4), pytest.approx(0.6))
    assert profile.median_of([1.5]) == (0.5, 0.5, 0.5)


def test_shapes() -> None:
    assert shapes_of(8, [1, 2], 16) == [Shape(0, 8), Shape(1, 16), Shape(2, 16)]
    with pytest.raises(ConfigError, match="nothing to profile"):
        shapes_of(0, [], 16)
    with pytest.raises(ConfigError, match="at least 1"):
        shapes_of(8, [0], 16)


def test_another_backend_has_no_counters(runtime: Any) -> None:
    runtime.config = EngineConfig(backend="reference")
    with pytest.raises(ConfigError, match="the reference backend has no counters"):
        profile.CpuProfiler(runtime)


def test_ranges_nest_and_end_whatever_happens() -> None:
    seen: list[str] = []

    class Recorder:
        def push(self, name: str) -> None:
            seen.append(name)

        def pop(self) -> None:
            seen.append("end")

    class Owner:
        def outer(self) -> int:
            return self.inner() + 1

        def inner(self) -> int:
            raise ValueError

    owner = Owner()
    methods = [("out", owner, "outer"), ("in", owner, "inner")]
    first = trace(within(Recorder()), methods)
    second = trace(within(Recorder()), methods)
    with pytest.raises(ValueError):
        owner.outer()
    assert seen == ["out", "out", "in", "in", "end", "end", "end", "end"]
    second()
    seen.clear()
    with pytest.raises(ValueError):
        owner.outer()
    assert seen == ["out", "in", "end", "end"]
    first()
    assert vars(owner) == {}
