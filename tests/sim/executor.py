"""SimModel: an executor whose cache stores what was written and whose next token is a hash of what it reads back.

A cell holds (value, token, position). Steps run in the order of their launch, at launch or as late as when they are
finished; either way nobody sees a result before ``finish``. Faults come from outside: ``fail`` is asked at every
launch and finish whether to raise, and where.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from ridgeline.core.types import POOL, Batch, StepOutput, Ticket, TokenMasks
from ridgeline.engine.engine import EngineLimits
from tests.sim.batches import BatchReader, Step, Work, need
from tests.sim.model import CELL, Row, Rules, best, logprob, sample, see, state_row, took

POISON = -(2**40)


class Fault(RuntimeError):
    """A failure injected by the simulation."""


@dataclass(slots=True)
class Sampled:
    """A row's result."""

    token: int
    accepted: int
    row: Row
    hidden: int


@dataclass(slots=True)
class Memory:
    """What the executor remembers of a slot: the token it sampled last, and hashes of its log's beginnings."""

    last: int = -1
    log: list[int] = field(default_factory=lambda: [0])


@dataclass
class Counts:
    """What the simulation did, for bounds on work; ``built``: batches that share nothing with the one before."""

    steps: int = 0
    tokens: int = 0
    drafts: int = 0
    accepted: int = 0
    copies: int = 0
    most_requests: int = 0
    most_open: int = 0
    built: int = 0


class SimModel:
    """Implements core.types.Executor over ``rules``.

    Args:
        limits: slots, tokens and blocks of the engine it serves.
        rules: the model.
        lazy: run a step only when it is finished.
        fail: told "launch", "middle" (half the step has run) or "finish", says whether to raise Fault there.
        watch: told every step as it is launched, after the checks of the contract.
        elapse: told how long a step has taken, when it is finished.
    """

    def __init__(
        self,
        limits: EngineLimits,
        rules: Rules,
        *,
        lazy: bool = False,
        fail: Callable[[str], bool] = lambda where: False,
        watch: Callable[[Step], None] = lambda step: None,
        elapse: Callable[[int], None] = lambda microseconds: None,
    ) -> None:
        self.limits, self.rules, self.lazy, self.fail, self.watch = limits, rules, lazy, fail, watch
        self.elapse = elapse
        self.reader = BatchReader(limits, rules)
        size = limits.block_size
        self.values = [[POISON] * (n * size) for n in limits.num_blocks]
        self.tokens = [[-1] * (n * size) for n in limits.num_blocks]
        self.positions = [[-1] * (n * size) for n in limits.num_blocks]
        self.memory = [Memory() for _ in range(limits.max_requests)]
        self.iota = list(range(limits.max_len + 1))
        self.open: dict[int, Step] = {}
        self.results: dict[int, list[Sampled]] = {}
        self.counts = Counts()
        self.launches = 0  # those that failed as well
        self.slots: object = None  # of the last batch

    def launch(self, batch: Batch) -> Ticket:
        """Check a step, take what it needs out of the batch's buffers, and run it now or later."""
        self.launches += 1
        need(len(self.open) < self.limits.max_open_steps, "more steps are open than may be")
        self._fail("launch")
        step = self.reader.read(batch)
        self.watch(step)
        counts = self.counts
        counts.steps += 1
        counts.tokens += sum(len(w.tokens) for w in step.work)
        counts.drafts += sum(len(w.rows) - 1 for w in step.work if w.drafts)
        counts.copies += sum(len(pairs) for pairs in step.copies)
        counts.built += batch.slots is not self.slots
        self.slots = batch.slots
        counts.most_requests = max(counts.most_requests, len(step.work))
        number = counts.steps
        if self.fail("middle"):
            self._drain()
            self._run(Step(step.work[: len(step.work) // 2], step.copies, step.starts))
            for work in step.work:
                self.reader.slots[work.slot].drafting = False
            self.reader.failed = True
            raise Fault("middle")
        self.open[number] = step
        counts.most_open = max(counts.most_open, len(self.open))
        if not self.lazy:
            self._drain()
        return Ticket(number)

    def finish(self, ticket: Ticket, masks: TokenMasks | None = None) -> StepOutput:
        """A step's result; every ticket is taken once."""
        need(masks is None, "masks are not simulated")
        need(ticket.number in self.open, f"ticket {ticket.number} is not open")
        self._drain(ticket.number)
        step, sampled = self.open.pop(ticket.number), self.results.pop(ticket.number)
        self.elapse(took(sum(len(w.tokens) for w in step.work)))
        for work in step.work:
            self.reader.finished(work)
            self.counts.accepted += work.stood - 1 if work.drafts else 0
        self._fail("finish")
        return self._output(sampled)

    def _fail(self, where: str) -> None:
        if self.fail(where):
            self.reader.failed = True
            raise Fault(where)

    def poison(self, group: int, blocks: set[int]) -> None:
        """Overwrite blocks that nobody may read any more."""
        size = self.limits.block_size
        for block in blocks:
            self.values[group][block * size : (block + 1) * size] = [POISON] * size
            self.positions[group][block * size : (block + 1) * size] = [-1] * size

    def _drain(self, until: int | None = None) -> None:
        """Run the steps that have not run, in order, up to ``until``."""
        for number, step in self.open.items():
            if number not in self.results:
                self.results[number] = self._run(step)
            if number == until:
                return

    def _run(self, step: Step) -> list[Sampled]:
        size = self.limits.block_size
        for group, pairs in enumerate(step.copies):
            for cells in (self.values[group], self.tokens[group], self.positions[group]):
                for source, target in pairs:
                    cells[target * size : (target + 1) * size] = cells[source * size : (source + 1) * size]
        for start in step.starts:
            memory = self.memory[start.slot]
            memory.log = [0]
            for token in start.tokens.tolist():
                memory.log.append(hash((memory.log[-1], token)))
        out: list[Sampled] = []
        for work in step.work:
            out += self._request(work)
        return out

    def _request(self, work: Work) -> list[Sampled]:
        """Feed one request's tokens and sample its rows."""
        memory = self.memory[work.slot]
        if work.tokens[0] < 0:
            work.tokens[0] = memory.last
        reads = [self._feed(group, work) for group in range(len(self.rules.windows))]
        sampler = work.sampler
        if sampler is not None:
            del memory.log[work.first + 1 :]
            need(len(memory.log) == work.first + 1, "a slot's log has a hole")
            for token in work.tokens:
                memory.log.append(hash((memory.log[-1], token)))
        out: list[Sampled] = []
        stands = 1
        for i, row in work.rows:
            position = work.first + i
            hidden = see(tuple(r[i] for r in reads), position)
            if row.target == POOL:
                token = -1
            elif row.target > 0:
                token = row.target - 1
            else:
                log = 0 if sampler is None else memory.log[position + 1]
                token = sample(self.rules, hidden, position, work.tokens[i], row, sampler, log)
                if stands:
                    memory.last = max(0, token)
            out.append(Sampled(token, stands, row, hidden))
            if row.target == 0 and i + 1 < len(work.tokens):
                stands = stands if token == work.tokens[i + 1] else 0
        work.stood = work.rows[0][0] + sum(s.accepted for s in out) if work.drafts else len(work.tokens)
        return out

    def _feed(self, group: int, work: Work) -> list[int]:
        """Write the tokens into one group's cache; returns what each of them sees there, itself included."""
        size, window = self.limits.block_size, self.rules.windows[group]
        values, tokens, positions = self.values[group], self.tokens[group], self.positions[group]
        table, first = work.blocks[group], work.first
        low = max(0, first - window + 1) if window else 0
        seen: list[int] = []
        where: list[int] = []
        for index in work.read(size, window):
            start = table[index] * size
            a = start + max(0, low - index * size)
            b = start + min(size, first - index * size)
            seen += values[a:b]
            where += positions[a:b]
        need(where == self.iota[low:first], f"slot {work.slot} reads cells of other positions: {where}, from {low}")
        total = sum(seen)
        out = []
        for position, token in enumerate(work.tokens, first):
            cell = hash((total, token, position, group)) & CELL
            at = table[position // size] * size + position % size
            values[at], tokens[at], positions[at] = cell, token, position
            total += cell
            out.append(total)
            if window:
                seen.append(cell)
                if position + 1 >= window:
                    total -= seen[position + 1 - window - low]
        return out

    def _output(self, sampled: list[Sampled]) -> StepOutput:
        wanted = max((s.row.num_logprobs for s in sampled), default=-1)
        width = max(0, wanted)
        number = len(sampled)
        logprobs = np.full(number, np.nan, np.float32)
        top_ids, top_logprobs = np.zeros((number, width), np.int32), np.zeros((number, width), np.float32)
        if wanted >= 0:
            for i, s in enumerate(sampled):
                if s.row.num_logprobs >= 0:
                    logprobs[i] = logprob(s.hidden, s.token)
                    top_ids[i], top_logprobs[i] = best(self.rules, s.hidden, width)
        hidden = [state_row(s.hidden) for s in sampled if s.row.target == POOL]
        return StepOutput(
            np.array([s.token for s in sampled], np.int32),
            np.array([s.accepted for s in sampled], np.int32),
            logprobs,
            top_ids,
            top_logprobs,
            np.array(hidden, np.float32).reshape(len(hidden), 3),
        )
