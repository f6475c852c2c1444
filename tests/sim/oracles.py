"""What must hold whatever happens: counted from the outside, after every step and at every launch.

Each oracle is general: none knows of a particular bug.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ridgeline.engine.engine import Engine
from ridgeline.engine.request import Request
from tests.sim import view
from tests.sim.batches import Step, Work
from tests.sim.executor import SimModel
from tests.sim.guesses import Guesser
from tests.sim.model import Solo
from tests.sim.workload import Case, Scenario


class Violation(AssertionError):
    """An engine has done what it must not do."""


def must(ok: bool, what: str) -> None:
    """Raise Violation unless ``ok``."""
    if not ok:
        raise Violation(what)


@dataclass
class Record:
    """A request as the outside knows it.

    Attributes:
        index: which of the samples of its case.
        submitted: step before which it was queued; ``order``: how many were queued before it, ``launches``: how many
            steps had been launched by then.
        leader: the first of the samples of its prompt.
        started: number of the first launched step with tokens of it; ``hit``: tokens found in the cache then.
        fed, drafted: tokens of it in all steps, and how many of those were guesses.
        ended: what it had come to when it ended: (reason, tokens, text), which nothing may change.
        reads: its text as a reader got it, in pieces.
        aborted: whether an abort was asked for while it had not ended.
        last, tables: number of the last launched step with tokens of it, and its block tables then.
        caught_up: whether all its known tokens have been launched, since it started the last time.
        gave_way: how often it had been preempted when it was launched last.
        guesser: what its guesses so far allow it.
    """

    case: Case
    request: Request
    index: int
    submitted: int
    order: int
    launches: int
    leader: Record | None
    started: int | None = None
    hit: int = 0
    fed: int = 0
    drafted: int = 0
    ended: tuple[str, list[int]] | None = None
    reads: str = ""
    aborted: bool = False
    last: int = 0
    tables: list[list[int]] = field(default_factory=list)
    caught_up: bool = False
    gave_way: int = 0
    guesser: Guesser = field(default_factory=Guesser)

    @property
    def live(self) -> bool:
        """Whether it has not ended."""
        return self.request.finish_reason is None

    def tokens(self) -> list[int]:
        """Its prompt and output so far."""
        return self.case.prompt + self.request.output_ids


def common(a: list[int], b: list[int]) -> int:
    """Length of the longest common beginning."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


@dataclass
class Oracles:
    """Watches one engine; ``live`` are the requests submitted that have not ended."""

    scenario: Scenario
    engine: Engine
    model: SimModel
    records: list[Record] = field(default_factory=list)
    live: list[Record] = field(default_factory=list)
    epoch: int = 0  # records before this one were dropped by a fault, with all that was cached
    poisoned: list[set[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.poisoned = [set() for _ in self.scenario.rules.windows]
        self.model.watch = self.launched
        self.watchers: list[Callable[[Step], None]] = []  # told every step as it is launched
        self.launching: list[Work] = []  # of the step that they are told of

    def turn(self, record: Record) -> tuple[int, int]:
        """Its place in the queue: each level of priority is worth so many steps of waiting, then who came first."""
        return record.launches + record.case.priority * self.scenario.limits.priority_aging_steps, record.order

    # -- at a launch -------------------------------------------------------------------------------------------------

    def launched(self, step: Step) -> None:
        """Who may write what, and whether every slot's table is that of its request."""
        size = self.scenario.limits.block_size
        owners = {r.request.slot: r for r in self.live if r.request.slot >= 0}
        for group, window in enumerate(self.scenario.rules.windows):
            holders = Counter(b for r in owners.values() for b in view.table(r.request, group) if b >= 0)
            written: set[int] = {d for _, d in (step.copies[group] if step.copies else ())}
            for work in step.work:
                must(work.slot in owners, f"slot {work.slot} runs, and no request owns it")
                mine = view.table(owners[work.slot].request, group)
                for i in (*work.read(size, window), *work.written(size)):
                    must(work.blocks[group][i] == mine[i], f"slot {work.slot} has a stale table in group {group}")
                written |= {mine[i] for i in work.written(size)}
            for block in written:
                must(holders[block] == 1, f"block {block} is written and held {holders[block]} times")
                must(not view.is_indexed(self.engine, group, block), f"block {block} is written and in the index")
            self._no_conflict(step, group, window, written)
        for work in step.work:
            record = owners[work.slot]
            self._account(record, work)
            record.last = self.model.counts.steps + 1
            record.tables = [list(view.table(record.request, group)) for group in range(len(self.poisoned))]
        self.launching = step.work
        for watcher in self.watchers:
            watcher(step)
        self.launching = []

    def _no_conflict(self, step: Step, group: int, window: int, written: set[int]) -> None:
        """Nothing is written that a step under way reads or writes for another slot."""
        size = self.scenario.limits.block_size
        writers = {w.blocks[group][i]: w.slot for w in step.work for i in w.written(size)}
        for other in self.model.open.values():
            for work in other.work:
                for i in (*work.read(size, window), *work.written(size)):
                    block = work.blocks[group][i]
                    if block in written and writers.get(block) != work.slot:
                        raise Violation(f"block {block} is written while slot {work.slot} uses it in an open step")

    def _account(self, record: Record, work: Work) -> None:
        record.fed += len(work.tokens)
        request, guesser = record.request, record.guesser
        if record.gave_way != request.preemptions:
            record.gave_way, record.caught_up = request.preemptions, False
        record.caught_up |= work.end >= len(record.tokens())
        guesser.learn(request.preemptions)
        if work.drafts:
            drafts, length = work.tokens[work.rows[0][0] + 1 :], len(request.output_ids)
            record.drafted += len(drafts)
            wrong = guesser.wrong(drafts, record.tokens(), length, self.scenario.limits)
            must(not wrong, wrong)
            guesser.last = work, length, request.preemptions
        if record.started is None:
            record.started = self.model.counts.steps + 1
            record.hit = work.first
            must(
                work.first <= self.largest_hit(record), "tokens were found in the cache that nobody with this salt had"
            )
            if self.shares_exactly(record):
                expected = self.expected_hit(record)
                must(work.first >= expected, f"{expected} tokens are cached, {work.first} were used")

    def shares_exactly(self, record: Record) -> bool:
        """Whether it can be said how much a request must find in the cache."""
        scenario, case = self.scenario, record.case
        exact = scenario.roomy and scenario.limits.prefix_sharing and scenario.hash_bits is None
        return exact and case.pooling is None and case.params.prompt_logprobs is None

    def largest_hit(self, record: Record) -> int:
        """Most tokens that it can find in the cache: what it shares with others of its salt that came before."""
        others = (r for r in self.records[self.epoch :] if r.started is not None and r.case.salt == record.case.salt)
        return max((common(record.case.prompt, r.tokens()) for r in others if r is not record), default=0)

    def expected_hit(self, record: Record) -> int:
        """Tokens that others before it have computed or are computing, in whole blocks, one token left over."""
        size, prompt = self.scenario.limits.block_size, record.case.prompt
        most = 0
        for other in self.records[self.epoch :]:
            if other is record or other.started is None or other.case.salt != record.case.salt:
                continue
            request = other.request
            computed = len(other.tokens()) - 1 if request.finish_reason in ("stop", "length") else 0
            if other.live or other.request.output_ids:
                computed = max(computed, len(other.case.prompt))
            most = max(most, common(prompt, other.tokens()[:computed]))
        return min(most, len(prompt) - 1) // size * size

    # -- between two steps -------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Every invariant, once a step is done."""
        self.engine.check()
        open_work = [w for s in self.model.open.values() for w in s.work]
        must(len(self.model.open) == view.open_steps(self.engine), "the engine has lost count of its open steps")
        for group in range(len(self.poisoned)):
            self._blocks(group, open_work)
        self._reported()
        slots = [r.request.slot for r in self.live if r.request.slot >= 0]
        must(len(set(slots)) == len(slots), "two requests own one slot")
        for record in self.live:
            must(
                record.request.preemptions <= self.scenario.limits.max_preemptions,
                "a request was preempted more often than may be",
            )
            must(
                not self.scenario.roomy or not record.request.preemptions,
                "a request gave way though there is room for all",
            )

    def _reported(self) -> None:
        """What the engine says of itself."""
        engine, groups = self.engine, range(len(self.poisoned))
        running = sum(r.request.slot >= 0 for r in self.live)
        told = (engine.num_running, engine.num_waiting)
        must(told == (running, len(self.live) - running), f"{told} are said to run and to wait")
        cached = sum(len(view.cached(engine, g)) for g in groups)
        idle = cached + sum(len(view.free(engine, g)) for g in groups)
        held = sum(self.scenario.limits.num_blocks) - idle
        must((engine.num_cached_blocks, engine.num_held_blocks) == (cached, held), "blocks are miscounted")

    def _blocks(self, group: int, open_work: list[Work]) -> None:
        """Recount the blocks of one group, and overwrite those that became free."""
        engine, limits = self.engine, self.scenario.limits
        held = Counter(b for r in self.live if r.request.slot >= 0 for b in view.table(r.request, group) if b >= 0)
        free, cached = set(view.free(engine, group)), set(view.cached(engine, group))
        must(not free & cached and not held.keys() & (free | cached), "a block is in two of: free, cached, held")
        known = len(free) + len(cached) + len(held)
        if not open_work:
            must(known == limits.num_blocks[group], f"{limits.num_blocks[group] - known} blocks have leaked")
            for block, number in held.items():
                must(view.count(engine, group, block) == number, f"block {block} counts the wrong number of holders")
        else:
            size, window = limits.block_size, self.scenario.rules.windows[group]
            used = {w.blocks[group][i] for w in open_work for i in (*w.read(size, window), *w.written(size))}
            must(not used & (free | cached), "a block that an open step uses was let go")
            gone = (r for r in self.records if r.last in self.model.open and r.request.slot < 0)
            loose = {b for r in gone for b in r.tables[group] if b >= 0} - held.keys()
            rest = limits.num_blocks[group] - known
            exact = window == 0  # what it sees no more may have been let go before
            must(rest <= len(loose) if not exact else rest == len(loose), f"{rest} blocks are held by nobody")
        # Steps run in order, so a block that an open step only copies from may be let go: whoever writes it does so
        # after the copy. It is overwritten here once no open step needs it.
        free -= {s for step in self.model.open.values() if step.copies for s, _ in step.copies[group]}
        self.model.poison(group, free - self.poisoned[group])
        self.poisoned[group] = free

    def contents(self) -> None:
        """Every block in the prefix index holds what its tokens say."""
        limits, rules = self.scenario.limits, self.scenario.rules
        known: dict[tuple[bytes, ...], list[list[int]]] = {}
        for group in range(len(rules.windows)):
            for block, path in view.indexed(self.engine, group):
                key = tuple(path)
                if key not in known:
                    solo = Solo(rules)
                    for token in memoryview(b"".join(path)).cast("i"):
                        solo.feed(token)
                    known[key] = solo.cells
                size = limits.block_size
                must(
                    self.model.values[group][block * size : (block + 1) * size] == known[key][group][-size:],
                    f"block {block} of group {group} is indexed under tokens that it does not hold",
                )
