"""Who goes first: nobody is overtaken without a reason, and nobody who could go on stands still."""

from __future__ import annotations

from tests.sim import view
from tests.sim.oracles import Oracles, Record, must


class Fairness:
    """Compares each step with who waited and ran before it."""

    def __init__(self, oracles: Oracles) -> None:
        self.oracles = oracles
        self.waited: list[Record] = []
        self.decoding: list[tuple[Record, int]] = []

    def before_step(self) -> None:
        """Note who waits and who decodes."""
        self.waited = [r for r in self.oracles.live if r.request.slot < 0]
        self.decoding = [(r, r.fed) for r in self.oracles.live if r.request.slot >= 0 and r.request.output_ids]
        self.tokens = self.oracles.model.counts.tokens
        self.steps = self.oracles.model.counts.steps

    def turn(self, record: Record) -> tuple[int, int]:
        """Its place in the queue: each level of priority is worth so many steps of waiting, then who came first."""
        aging = self.oracles.scenario.limits.priority_aging_steps
        return record.request.key[0], record.order

    def after_step(self) -> None:
        """Nobody who still waits for his turn was overtaken; in a roomy engine all who can go on have gone on."""
        started = [r for r in self.waited if r.request.slot >= 0]
        still = [r for r in self.waited if r.live and view.queued(r.request)]
        if started and still:
            first = min(map(self.turn, still))
            for record in started:
                must(self.turn(record) < first, f"case {record.case.number} has overtaken another that waits")
        scenario = self.oracles.scenario
        if not scenario.roomy or scenario.limits.max_open_steps > 1:
            return
        for record, fed in self.decoding:
            must(not record.live or record.fed > fed, "a request that decodes was left out of a step")
