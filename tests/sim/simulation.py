"""Runs a scenario: the production engine over SimModel, every oracle after every step.

    run(draw(seed))

raises Violation, ContractError or whatever the engine itself raises when anything is wrong.
"""

from __future__ import annotations

from random import Random

import numpy as np

from ridgeline.core.errors import QueueFullError, RequestError
from ridgeline.engine.engine import Engine
from ridgeline.engine.request import Request
from tests.sim import view
from tests.sim.allowance import Allowance
from tests.sim.executor import Fault, SimModel
from tests.sim.fairness import Fairness
from tests.sim.model import NAN_SEED, Answer, Letters, Row, answer, row_of, state_row, states
from tests.sim.oracles import Oracles, Record, must
from tests.sim.pressure import Pressure
from tests.sim.reuse import Reuse
from tests.sim.workload import Case, Scenario, blocks_for


class Clock:
    """Microseconds that go by as the model works, and jump when told to."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        """The time."""
        return self.now

    def elapse(self, microseconds: int) -> None:
        """Time goes by."""
        self.now += microseconds


class Faults:
    """Fails calls of the executor: of each kind the so-manyth, counted from the one that failed before."""

    def __init__(self, planned: list[tuple[str, int]]) -> None:
        self.left: dict[str, list[int]] = {}
        for where, calls in planned:
            self.left.setdefault(where, []).append(calls)

    def __call__(self, where: str) -> bool:
        """Whether the call must fail."""
        left = self.left.get(where)
        if not left:
            return False
        left[0] -= 1
        if left[0] == 0:
            del left[0]
            return True
        return False


class Simulation:
    """One run of a scenario."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.clock = Clock()
        self.rng = Random(scenario.seed)
        self.model = SimModel(
            scenario.limits, scenario.rules, lazy=scenario.lazy, fail=Faults(scenario.faults), elapse=self.clock.elapse
        )
        self.engine = Engine(
            self.model,
            scenario.limits,
            eos_ids=scenario.eos_ids,
            detokenizer=Letters,
            seed=scenario.seed,
            clock=self.clock,
        )
        if scenario.hash_bits is not None:
            view.truncate_hashes(self.engine, scenario.hash_bits)
        self.oracles = Oracles(scenario, self.engine, self.model)
        self.fairness = Fairness(self.oracles)
        self.pressure = Pressure(self.oracles)
        self.reuse = Reuse(self.oracles)
        self.allowance = Allowance(self.oracles, self.clock)
        self.late: list[tuple[int, list[Request], Record]] = []  # samples to come: step, requests, the first
        self.step = 0
        self.failed = False

    # -- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run to the end, and compare everything with what it must be."""
        arriving = sorted(self.scenario.cases, key=lambda c: (c.arrival, c.number), reverse=True)
        last = max((c.arrival + c.late for c in arriving), default=0)
        while arriving or self.late or self.engine.has_work:
            while arriving and arriving[-1].arrival <= self.step:
                self.arrive(arriving.pop())
            self.arrive_late()
            self.abort_some()
            self.clock.now += self.scenario.jumps.get(self.step, 0)
            if self.engine.has_work:
                self.advance()
            elif self.rng.random() < 0.5:
                self.stand_still()
            self.after_step()
            self.step += 1
            must(self.step <= last + self.most_steps(), f"after {self.step} steps requests still wait")
        self.at_the_end()

    def advance(self) -> None:
        """One step of the engine; when it fails, it must have dropped everything, and serve again."""
        oracles = self.oracles
        self.fairness.before_step()
        self.pressure.before_step()
        self.reuse.before_step()
        self.allowance.before_step()
        try:
            self.engine.step()
        except Fault:
            self.failed = True
            self.allowance.dropped()
            must(not self.engine.has_work, "a failed step leaves work behind")
            for record in oracles.live:
                must(record.request.finish_reason == "abort", "a request survives a failed step")
                record.aborted = True
            must(not self.model.open, "a failed step leaves a step open")
            dropped = oracles.live
            oracles.epoch = len(oracles.records)
            self.after_step()
            for record in dropped:
                if record.index == 0:
                    self.arrive(record.case)
        else:
            self.fairness.after_step()
            self.allowance.after_step()

    def stand_still(self) -> None:
        """A step of an idle engine does nothing."""
        launches, steps = self.model.launches, self.engine.stats().steps
        self.engine.step()
        must(not self.engine.has_work and self.model.launches == launches, "an idle engine launches a step")
        must(self.engine.stats().steps == steps, "an idle engine counts a step")

    def most_steps(self) -> int:
        """Steps in which everything must be over, were it served one by one, preempted as often as may be."""
        limits = self.scenario.limits
        alone = sum(len(r.case.prompt) + r.request.limit + 2 for r in self.oracles.records)
        alone += sum(step for step, _, _ in self.late)
        return 10 + alone * (2 + limits.max_preemptions) * limits.max_open_steps

    def after_step(self) -> None:
        """All oracles; readers read; whoever has ended leaves."""
        oracles = self.oracles
        ended = [r for r in oracles.live if not r.live]
        for record in ended:
            request = record.request
            assert request.finish_reason is not None
            record.ended = (request.finish_reason, list(request.output_ids))
            must(request.slot == -1 and request.table is None, "a request that has ended holds something")
        if ended:
            oracles.live = [r for r in oracles.live if r.live]
        oracles.check()
        for record in oracles.live:
            reader = record.case.reader
            if record.request.text is not None and (reader == "eager" or reader == "lazy" and self.rng.random() < 0.2):
                record.reads += record.request.text.take()

    def abort_some(self) -> None:
        """Abort what is due, ended or not, one or more samples of a case, once or twice."""
        for record in self.oracles.records:
            after = record.case.abort_after
            if after is None or record.aborted or self.step != record.submitted + after:
                continue
            if record.index and self.rng.random() < 0.5:
                continue
            ended = record.request.finish_reason
            self.engine.abort(record.request)
            if self.rng.random() < 0.3:
                self.engine.abort(record.request)
            must(record.request.finish_reason == (ended or "abort"), "an abort changes how a request ended, or is lost")
            record.aborted = ended is None

    # -- arrivals ----------------------------------------------------------------------------------------------------

    def arrive(self, case: Case) -> None:
        """Submit a case, if it is possible; its samples after the first may come later."""
        requests = self.make(case)
        if requests is None:
            return
        now = 1 if case.late else len(requests)
        leader = self.submit(case, requests[:now], None)
        if leader is not None and requests[now:]:
            self.late.append((self.step + case.late, requests[now:], leader))

    def arrive_late(self) -> None:
        """Submit the samples that are due, whatever has become of the first."""
        due = [x for x in self.late if x[0] <= self.step]
        self.late = [x for x in self.late if x[0] > self.step]
        for _, requests, leader in due:
            self.submit(leader.case, requests, leader)

    def submit(self, case: Case, requests: list[Request], leader: Record | None) -> Record | None:
        """Submit requests; refused may be only what is too many. Returns the first of the samples of their prompt."""
        waiting = [r.request for r in self.oracles.live if r.request.slot < 0]
        limits, first = self.scenario.limits, 0 if leader is None else 1
        tokens = sum(r.num_tokens for r in waiting if not view.parked(r)) + len(requests) * len(case.prompt)
        full = limits.max_queued_requests is not None and len(waiting) + len(requests) > limits.max_queued_requests
        full |= limits.max_queued_tokens is not None and tokens > limits.max_queued_tokens
        try:
            self.engine.submit(requests)
        except QueueFullError:
            must(full, "a request was refused though the queue has room")
            return None
        must(not full, "more requests wait than may")
        self.submit_again(requests)
        for index, request in enumerate(requests, first):
            record = Record(case, request, index, self.step, len(self.oracles.records), self.model.launches, leader)
            leader = leader or record
            self.oracles.records.append(record)
            self.oracles.live.append(record)
        return leader

    def submit_again(self, requests: list[Request]) -> None:
        """A request that was submitted is refused from then on."""
        if self.rng.random() < 0.1:
            try:
                self.engine.submit(requests)
            except RequestError:
                return
            must(False, "a request was taken twice")

    def make(self, case: Case) -> list[Request] | None:
        """The requests of a case; None when it was refused, which it must be only if it can never be served."""
        limits, rules = self.scenario.limits, self.scenario.rules
        limit = 0 if case.pooling else min(case.params.max_tokens, limits.max_len - len(case.prompt))
        most = len(case.prompt) + max(0, limit - 1)
        fits = all(
            blocks_for(most, window, limits.block_size) <= blocks
            for window, blocks in zip(rules.windows, limits.num_blocks, strict=True)
        )
        try:
            if case.pooling:
                requests = [self.engine.make_pooling_request(case.prompt, case.pooling)]
            else:
                requests = self.engine.make_requests(
                    case.prompt, case.params, stream=case.stream, priority=case.priority, cache_salt=case.salt
                )
        except RequestError as error:
            must(not fits, f"a request that fits was refused: {error}")
            return None
        must(fits, "a request that can never be served was taken")
        must(len(requests) == (1 if case.pooling else case.params.n), "as many requests as samples")
        return requests

    # -- the end -----------------------------------------------------------------------------------------------------

    def at_the_end(self) -> None:
        """Every answer is right, nothing is held, the counters tell what happened."""
        must(not self.engine.has_work and not self.oracles.live, "an engine without work has live requests")
        must(not self.model.open, "an idle engine has an open step")
        self.stand_still()
        for group, blocks in enumerate(self.scenario.limits.num_blocks):
            idle = len(view.free(self.engine, group)) + len(view.cached(self.engine, group))
            must(idle == blocks, f"an idle engine holds {blocks - idle} blocks of group {group}")
        for record in self.oracles.records:
            self.judge(record)
        self.oracles.contents()
        if not self.failed:
            self.count()

    def count(self) -> None:
        """The engine's statistics are what the model saw."""
        stats, counts = self.engine.stats(), self.model.counts
        must(stats.steps == counts.steps and stats.tokens_computed == counts.tokens, "steps or tokens are miscounted")
        records = self.oracles.records
        must(stats.preemptions == sum(r.request.preemptions for r in records), "preemptions are miscounted")
        if not any(r.aborted or r.request.preemptions for r in records):
            got = stats.drafts_proposed, stats.drafts_accepted
            must(got == (counts.drafts, counts.accepted), f"drafts are miscounted: {got}")
        if not stats.preemptions:
            must(stats.prefix_hit_tokens == sum(r.hit for r in records), "tokens found in the cache are miscounted")

    def judge(self, record: Record) -> None:
        """One request's output against what it must be, computed from its tokens alone."""
        request, case = record.request, record.case
        must(record.ended == (request.finish_reason, request.output_ids), "a request changes after it has ended")
        if case.pooling:
            self.judge_pooled(record)
            return
        right = self.answer(record)
        if request.finish_reason == "abort":
            must(record.aborted, "a request was aborted though nobody asked for it")
            must(request.output_ids == right.tokens[: len(request.output_ids)], "wrong tokens before an abort")
            return
        got, want = (request.finish_reason, request.output_ids), (right.reason, right.tokens)
        must(
            (request.error is not None) == (right.reason == "error"),
            "an error without a message, or a message without one",
        )
        must(got == want, f"case {case.number}, sample {record.index}: got {got}, must be {want}")
        must(request.logprobs in (None, right.logprobs), "wrong logprobs")
        must(request.prompt_logprobs in (None, right.prompt_logprobs), "wrong prompt logprobs")
        if request.text is not None and right.reason != "error":
            record.reads += request.text.take()
            must(record.reads == right.text, f"text {record.reads!r}, must be {right.text!r}")
        self.judge_work(record)

    def judge_work(self, record: Record) -> None:
        """A request that never started again computes each token once, and one more for a step it did not need."""
        request = record.request
        if request.preemptions == 0:
            needed = len(record.case.prompt) + len(request.output_ids) - 1 - record.hit
            spare = self.scenario.limits.max_open_steps - 1
            if request.finish_reason == "error":
                spare += 1
            must(
                needed <= record.fed <= needed + spare + record.drafted,
                f"{record.fed} tokens computed, {needed} needed, {record.drafted} guesses",
            )

    def answer(self, record: Record) -> Answer:
        """What a request must give."""
        case, scenario = record.case, self.scenario
        limit = min(case.params.max_tokens, scenario.limits.max_len - len(case.prompt))
        row: Row = row_of(case.params, case.params.seed or 0, record.index)
        return answer(scenario.rules, case.prompt, case.params, row, limit=limit, eos_ids=scenario.eos_ids)

    def judge_pooled(self, record: Record) -> None:
        """A pooled request gives the mean or the last of the hidden states of its prompt."""
        request, case = record.request, record.case
        if request.finish_reason == "abort":
            must(record.aborted, "a request was aborted though nobody asked for it")
            return
        must(request.finish_reason == "stop" and not request.output_ids, "a pooled request ends otherwise")
        rows = np.array([state_row(h) for h in states(self.scenario.rules, case.prompt)], np.float64)
        want = rows[-1] if case.pooling == "last" else rows.sum(axis=0) / len(rows)
        must(request.pooled is not None and request.pooled.tolist() == want.tolist(), "wrong pooled state")


def run(scenario: Scenario) -> Simulation:
    """Run a scenario to its end; raises when anything is wrong."""
    simulation = Simulation(scenario)
    simulation.run()
    return simulation


__all__ = ["NAN_SEED", "Simulation", "run"]
