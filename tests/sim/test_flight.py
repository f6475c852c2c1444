"""Flight records of random runs: replayed on a fresh model, whose cache holds only what the replay rebuilt."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import msgspec
import pytest

from ridgeline.engine.flight import FlightRecord, LiveRequest, batch_of
from ridgeline.engine.recorder import FlightRecorder
from ridgeline.engine.replay import ReplayReport, prefixes, replay
from tests.sim.executor import SimModel
from tests.sim.simulation import Simulation
from tests.sim.workload import Scenario, draw

SEEDS = 200


def model_for(scenario: Scenario) -> SimModel:
    """A fresh model with the slot and the blocks that a replay needs beyond the recorded ones."""
    limits = scenario.limits
    spare = -(-limits.max_len // limits.block_size)
    rows = None if limits.max_sampled_rows is None else limits.max_sampled_rows + 1
    roomier = replace(
        limits,
        max_requests=limits.max_requests + 1,
        max_tokens=limits.max_tokens + 1,
        max_sampled_rows=rows,
        num_blocks=[n + spare for n in limits.num_blocks],
    )
    model = SimModel(roomier, scenario.rules)
    model.reader.failed = True  # starts of slots before the record are unknown to it
    return model


class Recorded(Simulation):
    """A run that writes a record every few steps, and after every failure."""

    def __init__(self, scenario: Scenario, num_steps: int) -> None:
        super().__init__(scenario)
        self.recorder = FlightRecorder(num_steps, scenario.limits)
        self.engine._recorder = self.recorder
        self.choice = Random(scenario.seed + 1)
        self.reports: list[tuple[FlightRecord, ReplayReport]] = []

    def advance(self) -> None:
        """One step, and now and then a replay of the last ones."""
        failed_before, self.failed = self.failed, False
        super().advance()
        if self.failed or self.choice.random() < 0.15:
            record = self.recorder.capture()
            report = replay(record, model_for(self.scenario))
            assert report.identical, report.first
            assert report.compared == sum(s.output is not None for s in record.steps)
            assert self.failed == (record.failure is not None)
            self.reports.append((record, report))
        self.failed |= failed_before


@pytest.fixture(scope="module")
def runs() -> list[Recorded]:
    """Many random runs, each replayed at several points, for rings of 1 to 12 steps."""
    found = []
    for seed in range(SEEDS):
        run = Recorded(draw(seed), 1 + seed % 12)
        run.run()
        found.append(run)
    return found


def test_random_runs_replay_to_the_same_bits(runs: list[Recorded]) -> None:
    """That nothing differs is asserted as they run; here, that they were worth it."""
    reports = [r for run in runs for _, r in run.reports]
    records = [r for run in runs for r, _ in run.reports]
    assert len(reports) > 2 * SEEDS
    assert sum(r.compared for r in reports) > 1000 and sum(r.rebuilt_tokens for r in reports) > 3000
    steps = [s for r in records for s in r.steps]
    assert sum(any(len(c) for c in s.block_copies) for s in steps) > 10, "forks"
    assert sum(start.prefix != b"" for s in steps for start in s.started) > 50, "prefix hits"
    assert sum(s.output is None for s in steps) > 30, "steps under way"
    assert sum(len(r.live) for r in records) > 300
    assert sum(x.start is not None for r in records for x in r.live) > 20, "sampling state"
    assert sum(r.failure is not None for r in records) > 5, "failures"
    assert any(min(batch_of(s).token_ids) < 0 for s in steps), "tokens not known at launch"


def test_what_is_not_rebuilt_is_missed(runs: list[Recorded]) -> None:
    """Planted fault: a record whose live requests have another token in the cache does not replay to the same bits."""
    tried = missed = 0
    for run in runs:
        for record, report in run.reports:
            rules = run.scenario.rules
            if not record.live or not report.rebuilt_tokens or rules.windows != (0,) or rules.loopy > 8:
                continue  # where most tokens follow from the last alone, it hardly matters what the cache holds
            live = record.live[0]
            if len(live.tokens) < 8 or not prefixes(record) or not _sampled(record, live.slot):
                continue
            wrong = bytes([live.tokens[0] ^ 1]) + live.tokens[1:]
            altered = FlightRecord(
                record.created, record.environment, record.sizes, [_with(live, wrong), *record.live[1:]],
                record.steps, record.failure,
            )  # fmt: skip
            tried += 1
            try:
                missed += replay(altered, model_for(run.scenario)).identical
            except Exception:
                continue  # another request shares the block, and the contradiction is seen
    assert tried > 30 and missed <= tried // 20, f"{missed} of {tried}"


def _sampled(record: FlightRecord, slot: int) -> bool:
    """Whether anything that the request in a slot gave is compared."""
    for step in record.steps:
        if any(start.slot == slot for start in step.started):
            return False
        batch = batch_of(step)
        at = batch.slots.tolist().index(slot) if slot in batch.slots else -1
        rows = batch.sample_rows
        if at >= 0 and step.output is not None:
            if ((rows >= batch.query_starts[at]) & (rows < batch.query_starts[at + 1])).any():
                return True
    return False


def _with(live: LiveRequest, tokens: bytes) -> LiveRequest:
    return msgspec.structs.replace(live, tokens=tokens)
