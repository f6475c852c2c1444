"""Who goes first: nobody is overtaken or parked without a reason, and nobody who could go on stands still."""

from __future__ import annotations

from tests.sim import view
from tests.sim.oracles import Oracles, Record, common, must


class Fairness:
    """Compares each step with who waited and ran before it."""

    def __init__(self, oracles: Oracles) -> None:
        self.oracles = oracles
        self.limits = oracles.scenario.limits
        self.waited: list[Record] = []
        self.running: list[tuple[Record, int, bool]] = []  # with tokens fed so far, and whether it decodes
        self.excused: set[int] = set()  # by id(): those that wait for what another computes
        self.fed: dict[int, int] = {}  # by id(): tokens of each before the step
        self.tokens = 0

    def before_step(self) -> None:
        """Note who waits and who runs."""
        live, counts = self.oracles.live, self.oracles.model.counts
        self.waited = [r for r in live if r.request.slot < 0]
        self.running = [(r, r.fed, r.caught_up and not r.case.pooling) for r in live if r.request.slot >= 0]
        self.fed = {id(r): r.fed for r in live}
        self.excused = {id(r) for r in self.waited if self.may_park(r)}
        self.tokens = counts.tokens

    def may_park(self, record: Record) -> bool:
        """Whether somebody who runs computes what it shares with him: a block at least, or the same prompt."""
        for other in self.oracles.records:
            runs = other.live and other.request.slot >= 0 or other.fed > self.fed.get(id(other), other.fed)
            if other is record or not runs or other.case.salt != record.case.salt:
                continue
            if other is record.leader or common(record.tokens(), other.tokens()) >= self.limits.block_size:
                return True
        return False

    def after_step(self) -> None:
        """Nobody who waits for his turn was overtaken, and nobody is parked for nothing."""
        started = [r for r in self.waited if r.request.slot >= 0 or r.fed > self.fed[id(r)]]
        still = [r for r in self.waited if r.live and view.queued(r.request)]
        if started and still:
            first = min(map(self.oracles.turn, still))
            for record in started:
                must(self.oracles.turn(record) < first, f"case {record.case.number} has overtaken another that waits")
        parked = [r for r in self.waited if r.live and view.parked(r.request)]
        for record in parked:
            must(id(record) in self.excused or self.may_park(record), "a request is parked, and nobody computes for it")
        if self.oracles.scenario.roomy and self.limits.max_open_steps == 1 and self.limits.max_preemptions:
            self.nobody_stands_still(len(started), len(parked), still)

    def scored(self) -> bool:
        """Whether rows of prompts were wanted, of which a step has only so many."""
        live = (r for r in self.oracles.records if id(r) in self.fed)
        return any(r.case.pooling or r.case.params.prompt_logprobs is not None for r in live)

    def nobody_stands_still(self, started: int, parked: int, still: list[Record]) -> None:
        """With blocks for all: everybody decodes, and while there is budget prompts advance and requests start."""
        for record, fed, decodes in self.running:
            must(not decodes or not record.live or record.fed > fed, "a request that decodes was left out of a step")
        counts, limits = self.oracles.model.counts, self.limits
        if self.scored():
            return
        if limits.step_target_us is not None or counts.tokens - self.tokens >= limits.max_tokens:
            return
        for record, _, _ in self.running:
            whole = record.hit + record.fed >= len(record.case.prompt)
            must(whole or not record.live, "a prompt was left behind though the step had budget")
        full = len(self.running) + started + parked >= limits.max_requests
        drafting = limits.speculation is not None and started > 0  # drafts leave a row to one newcomer, not to more
        must(full or not still or drafting, "a request was left waiting though there was room for it")
