"""When blocks, rows or tokens run short: who gives way, who may start, and that nobody stands still for nothing."""

from __future__ import annotations

from dataclasses import dataclass

from tests.sim import view
from tests.sim.batches import Step
from tests.sim.oracles import Oracles, Record, must


@dataclass
class Ran:
    """A request that ran before the step.

    Attributes:
        turn: its place in the queue. preemptions: how often it had given way by then.
        blocks: length of its table.
    """

    record: Record
    turn: tuple[int, int]
    preemptions: int
    blocks: int


class Pressure:
    """Compares each step with who ran and what was available before it."""

    def __init__(self, oracles: Oracles) -> None:
        self.oracles, self.engine = oracles, oracles.engine
        self.limits, self.groups = oracles.scenario.limits, range(len(oracles.scenario.rules.windows))
        self.ran: list[Ran] = []
        self.available: list[int] = []
        oracles.watchers.append(self.launched)

    def before_step(self) -> None:
        """Note who runs and what is available."""
        self.available = self.count()
        self.ran = [
            Ran(r, self.oracles.turn(r), r.request.preemptions, len(view.table(r.request, 0)))
            for r in self.oracles.live
            if r.request.slot >= 0
        ]

    def count(self) -> list[int]:
        """Blocks of each group that can be given out."""
        return [len(view.free(self.engine, g)) + len(view.cached(self.engine, g)) for g in self.groups]

    def launched(self, step: Step) -> None:
        """All oracles, once a step is planned."""
        slots = {w.slot for w in step.work}
        running = [r for r in self.oracles.live if r.request.slot >= 0]
        victims = [x for x in self.ran if x.record.request.preemptions > x.preemptions]
        stay = [x for x in self.ran if x.record.request.slot >= 0]
        absent = [x.record for x in stay if x.record.request.slot not in slots]
        available = self.count()
        if victims:
            self.gave_way(victims, stay, slots)
        elif self.limits.max_open_steps == 1:
            self.left_out(step, absent, available)
        if len(running) > max(1, len(stay)):
            must(min(available) >= len(running) - 1, "a request has started with blocks that those who run may need")
        if not victims and not absent:
            self.left_waiting(step, running, available)

    def gave_way(self, victims: list[Ran], stay: list[Ran], slots: set[int]) -> None:
        """Who gives way does so because blocks are short, is the last who can, and does it for one before him."""
        wanted = sum(self.wanted(x) for x in self.ran)
        must(min(self.available) < wanted, "a request gave way though there were blocks for all")
        for victim in victims:
            later = [x for x in stay if x.turn > victim.turn]
            for other in later:
                excused = other.record.request.slot in slots or self.comes_first(other)
                must(excused, "a request gave way, and one that comes after it did not")
            earlier = [x for x in self.ran if x is not victim and (x.turn < victim.turn or self.comes_first(x))]
            lack = any(x.record.request.slot not in slots for x in earlier)
            must(
                not later or lack or self.taken(stay) > min(self.available),
                "a request gave way to one that comes after it",
            )

    def taken(self, stay: list[Ran]) -> int:
        """Blocks of each group that the step has given to those who ran before it."""
        return sum(len(view.table(x.record.request, 0)) - x.blocks for x in stay)

    def wanted(self, ran: Ran) -> int:
        """Most blocks that a step could give it: for all its tokens, those under way, and guesses."""
        limits = self.limits
        guesses = limits.num_draft_tokens if limits.speculation else 0
        tokens = len(ran.record.tokens()) + limits.max_open_steps + guesses
        return max(0, -(-tokens // limits.block_size) - ran.blocks)

    def comes_first(self, ran: Ran) -> bool:
        """Whether it has given way so often that it does so no more."""
        return ran.preemptions >= self.limits.max_preemptions

    def left_out(self, step: Step, absent: list[Record], available: list[int]) -> None:
        """Who runs and is not in a step lacks a block, or reads its prompt while the step's tokens are used up."""
        limits, model = self.limits, self.oracles.model
        tokens = sum(len(w.tokens) for w in step.work)
        readers = []
        for record in absent:
            at = model.reader.slots[record.request.slot].next
            full = len(view.table(record.request, 0)) * limits.block_size <= at
            if full and min(available) == 0:
                continue
            decodes = bool(record.request.output_ids) and at + 1 == len(record.tokens())
            must(not decodes, "a request that decodes was left out of a step though there was a block for it")
            must(tokens >= limits.max_tokens or limits.step_target_us is not None, "a prompt was left out of a step")
            readers.append(record)
        if readers and any(w.drafts for w in step.work):
            owners = {x.record.request.slot: x.record for x in self.ran}
            reads = any(
                not w.drafts and w.first + 1 < len(owners[w.slot].tokens()) for w in step.work if w.slot in owners
            )
            must(reads, "guesses took the tokens of those who read their prompts")

    def left_waiting(self, step: Step, running: list[Record], available: list[int]) -> None:
        """The first of the queue starts when there are a slot, a row, a token and blocks for all that it has."""
        limits, live = self.limits, self.oracles.live
        queued = [r for r in live if view.queued(r.request)]
        if not queued or limits.step_target_us is not None:
            return
        first = min(queued, key=self.oracles.turn)
        if first.request.preemptions >= limits.max_preemptions:
            return
        parked = sum(view.parked(r.request) for r in live)
        open_steps = [step, *self.oracles.model.open.values()]
        slots = {r.request.slot for r in running} | {w.slot for s in open_steps for w in s.work}
        rows = limits.max_rows - len(running) - sum(max(0, len(w.rows) - 1) for w in step.work)
        tokens = limits.max_tokens - sum(len(w.tokens) for w in step.work)
        room = min(tokens, rows, limits.max_requests - max(len(slots), len(running) + parked))
        spare = min(available) - len(running)
        must(room <= 0 or spare < self.to_start(first, tokens), "a request was left waiting though it could start")

    def to_start(self, record: Record, tokens: int) -> int:
        """Most blocks that it takes for a request to start: those that it finds cached, and those of so many tokens."""
        size, known = self.limits.block_size, len(record.tokens())
        whole = -(-known // size)
        if record.started is not None:
            return whole
        found = self.oracles.largest_hit(record) // size if self.limits.prefix_sharing else 0
        return min(whole, found - (-min(tokens, known) // size))
