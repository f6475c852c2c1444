"""The benchmark refuses what cannot be measured, and never times requests that stood still."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import ConfigError, RidgelineError
from ridgeline.core.hardware import Peaks
from ridgeline.engine.engine import Engine, EngineLimits
from ridgeline.graph.cost import Cost
from ridgeline.perf import bench
from tests.sim.small import SimExecutor


def runtime(engine_type: type[Engine] = Engine, max_len: int = 512, blocks: int = 128) -> Any:
    """A runtime over the simulated executor, 4 requests and 64 tokens a step."""
    limits = EngineLimits(4, 64, max_len, 128, 4, [blocks])
    return SimpleNamespace(
        engine=engine_type(SimExecutor(limits), limits), config=EngineConfig(max_num_seqs=4, max_num_batched_tokens=64)
    )


@pytest.mark.parametrize(
    ("prompt", "generate", "batches", "limits", "message"),
    [
        (0, 8, [8], {}, "a batch of 8 needs --max-num-seqs 8"),
        (512, 0, [1], {}, "513 tokens and the context is 512: lower -p"),
        (0, 380, [1], {}, "513 tokens and the context is 512: lower -n or -b"),  # 128 + 380, 4 to read, 1
        (511, 0, [1], {"blocks": 127}, "128 blocks of KV cache and there are 127: lower -p, or give --num-kv-blocks"),
        (0, 8, [1, 4], {}, "148 blocks of KV cache and there are 128"),
        (-1, 8, [1], {}, "lengths of at least 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    prompt: int, generate: int, batches: list[int], limits: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.run_bench(runtime(**limits), prompt, generate, batches, 1, fresh=False)


def test_a_request_that_stands_still_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Still(Engine):
        def step(self) -> None:
            if self.num_waiting or any(not s.prefilled for s in self._scheduler.running):
                super().step()

    monkeypatch.setattr(bench, "peaks_of", lambda *args: Peaks(1.0, 1.0, 1.0, 1.0))
    with pytest.raises(RidgelineError, match="not every one of 2 requests decoded 8 tokens"):
        bench.run_bench(runtime(Still), 0, 8, [2], 1, fresh=False)


def test_a_repetition_is_held_against_the_bandwidth_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two looks for each of two repetitions; eight steps take 8 bytes' time at the mean of a repetition's two."""
    peaks, looks = Peaks(9.0, 1.0, 1.0, 1.0), iter([1.0, 3.0, 4.0, 4.0])
    monkeypatch.setattr(bench, "peaks_of", lambda *args: peaks)
    monkeypatch.setattr(bench, "peaks_now", lambda runtime, peaks: replace(peaks, bandwidth=next(looks)))
    monkeypatch.setattr(bench, "roofline", lambda cost, peaks: SimpleNamespace(seconds=1 / peaks.bandwidth))
    run = runtime()
    run.plan, run.load_seconds = SimpleNamespace(cost=lambda load: Cost()), 0.0
    report = bench.run_bench(run, 0, 8, [2], 2, fresh=False)
    (row,) = report.rows
    assert row.bandwidths == (2.0, 4.0) and row.bound_seconds == (4.0, 2.0)
    assert row.share == 6.0 / sum(row.seconds) and row.peak_gb_s == 3e-9
    assert report.peaks == peaks and next(looks, None) is None


def test_a_fresh_process_gets_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RIDGELINE_ISA", raising=False)
    config = EngineConfig(model="x", kv_dtype="f32", max_model_len=99, threads=1, max_num_seqs=32)
    assert bench.flags_of(config) == ["--threads", "1", "--kv-dtype", "f32", "--max-model-len", "99"]
