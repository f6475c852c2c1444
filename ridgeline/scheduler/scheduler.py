"""The scheduler: which sequences run, and which of their tokens the next step computes.

There are no phases, only tokens not yet computed. ``schedule`` gives every running sequence its next tokens within
a budget: those that decode first, then prompts, then, from the queue, whoever fits. When blocks run out the
sequence that comes last in the order of the queue starts again later. ``settle`` takes what a step has computed.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass

from ridgeline.kvcache.cache import BlockTable, KVCache
from ridgeline.kvcache.prefix import Node
from ridgeline.scheduler.budget import StepBudget
from ridgeline.scheduler.plan import Chunk, StepPlan
from ridgeline.scheduler.queue import WaitingQueue
from ridgeline.scheduler.sequence import NEVER, Sequence, State


@dataclass
class Stats:
    """Counters since the start.

    Attributes:
        steps: steps planned. tokens_computed: tokens of those steps, drafts included.
        prefix_hit_tokens: tokens that were in the cache when their sequence started; forks included.
        preemptions: sequences that had to start again.
        drafts_proposed, drafts_accepted: tokens of speculation.
    """

    steps: int = 0
    tokens_computed: int = 0
    prefix_hit_tokens: int = 0
    preemptions: int = 0
    drafts_proposed: int = 0
    drafts_accepted: int = 0


class Scheduler:
    """Plans steps for sequences that are submitted, over a KVCache.

    Args:
        cache: pools, tables and prefix index.
        max_running: sequences that may run at once, so slots.
        max_rows: rows that a step may sample or score, at least ``max_running``.
        budget: tokens of a step.
        max_preemptions: after so many a sequence comes before all others, so that it ends.
        aging_steps: steps of waiting that outweigh one level of priority.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        max_running: int,
        max_rows: int,
        budget: StepBudget,
        max_preemptions: int = 4,
        aging_steps: int = 256,
    ) -> None:
        self.cache = cache
        self.max_running, self.max_rows = max_running, max_rows
        self.budget = budget
        self.max_preemptions = max_preemptions
        self.stats = Stats()
        self.queue = WaitingQueue(aging_steps)
        self._number = 0
        self.reset()

    def reset(self) -> None:
        """Drop every sequence and everything they hold. Steps under way are forgotten."""
        self.cache.reset()
        self.queue.clear()
        self.running: list[Sequence] = []  # in the order of the queue
        self.parked: dict[int, Sequence] = {}  # by id()
        self._free_slots = list(range(self.max_running - 1, -1, -1))
        self._finished_step = self._number
        self._leaving: deque[tuple[int, int, BlockTable]] = deque()  # (last step that may write, slot, table)
        self._promoted: Sequence | None = None
        self._steady = False  # the last plan decoded everything that runs, and nothing has changed since
        self._last: StepPlan | None = None

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs."""
        return bool(self.running or self.parked or self.queue)

    def submit(self, sequence: Sequence) -> None:
        """Queue a sequence behind those of its priority that wait already."""
        sequence.move(State.WAITING)
        self.queue.arrive(sequence, self._number)
        self._steady = False

    def end(self, sequence: Sequence) -> None:
        """A sequence is over, whatever its state; what it holds is let go."""
        state = sequence.state
        sequence.move(State.FINISHED)
        if state is State.RUNNING:
            self.running.remove(sequence)
            self._release(sequence)
        elif state is State.PARKED:
            self._unpark(sequence)
        elif state in (State.WAITING, State.PREEMPTED):
            self.queue.forget(sequence)
        self._steady = False

    # -- one step ------------------------------------------------------------------------------------------------

    def schedule(self, now_us: int) -> StepPlan:
        """The next step; one without tokens when everything waits for a step under way, or nothing is there."""
        self._wake()
        if self._steady and (plan := self._repeat(now_us)) is not None:
            return self._commit(plan)
        groups = len(self.cache.groups)
        self._number += 1
        plan = StepPlan(self._number, now_us, updates=[[] for _ in range(groups)], copies=[[] for _ in range(groups)])
        self._decodes_left = sum(s.prefilled for s in self.running)  # whose turn in this step is yet to come
        self._budget = self.budget.tokens(self._decodes_left)
        self._others_wait = self._decodes_left < len(self.running) or bool(self.queue and self._free_slots)
        self._spare_rows = self.max_rows - len(self.running)  # every running sequence keeps a row of its own
        self._short = False  # whether a running sequence lacks blocks, so that nobody else may have them
        first = self._promoted
        order = [s for s in self.running if s is not first]
        if first is not None:
            decoding = sum(s.prefilled for s in order)
            self._advance(plan, first, max(1, self._budget - decoding))
        for prefilled in (True, False):
            for sequence in order:
                if sequence.prefilled is prefilled and sequence.state is State.RUNNING:
                    self._advance(plan, sequence, self._budget)
        while self._budget > 0 and not self._short and self._admit(plan):
            pass
        return self._commit(plan)

    def _repeat(self, now_us: int) -> StepPlan | None:
        """The last plan once more, one token further; None when somebody has come to the end or lacks blocks."""
        last, cache = self._last, self.cache
        assert last is not None
        full = [s for s in last.decodes if s.num_computed >= s.table.capacity]  # type: ignore[union-attr]
        if full and any(pool.num_available < len(full) for pool in cache.pools):
            return None
        lookahead = self._finished_step < self._number
        if lookahead and any(s.num_computed >= s.max_len for s in last.decodes):
            return None
        self._number += 1
        plan = StepPlan(self._number, now_us, last.decodes, repeats=True, num_tokens=last.num_tokens)
        plan.updates = [[] for _ in cache.groups] if full else []
        for sequence in full:
            cache.grow(sequence.table, sequence.num_computed + 1, sequence.slot, plan.updates)  # type: ignore[arg-type]
        for sequence in last.decodes:
            sequence.num_computed += 1
            sequence.last_step = self._number
        return plan

    def _commit(self, plan: StepPlan) -> StepPlan:
        if not plan.num_tokens:
            self._number -= 1
            self._steady = False
            return plan
        self.stats.steps += 1
        self.stats.tokens_computed += plan.num_tokens
        # Short of blocks, nobody was admitted: somebody may have given way, and the next step must look at the queue.
        plain = not plan.chunks and not plan.started and not self._short
        self._steady = plain and len(plan.decodes) == len(self.running)
        if self._steady and not plan.repeats and any(s.lockstep for s in plan.decodes):
            self._steady = False
        self._last = plan
        return plan

    def _advance(self, plan: StepPlan, sequence: Sequence, budget: int) -> None:
        """Plan the next tokens of a running sequence, as many as budget, rows and blocks allow."""
        if sequence.prefilled:
            self._decodes_left -= 1
        if sequence.busy or self._budget <= 0 or (sequence.lockstep and sequence.last_step > self._finished_step):
            return
        start = sequence.num_computed
        if sequence.prefilled:
            if start >= sequence.max_len:
                return  # the last token it may generate is under way
            drafts = self._drafts(sequence) if sequence.drafts else []
            if self._make_room(plan, sequence, start + 1 + len(drafts), start + 1):
                drafts = drafts[: sequence.table.capacity - start - 1]  # type: ignore[union-attr]
                self._plan_decode(plan, sequence, drafts)
            return
        size = self._chunk_size(sequence, start, min(budget, sequence.num_tokens - start), 1 + self._spare_rows)
        if self._make_room(plan, sequence, start + size, start + 1):
            self._plan_chunk(plan, sequence, min(size, sequence.table.capacity - start))  # type: ignore[union-attr]

    def _drafts(self, sequence: Sequence) -> list[int]:
        """The drafts that the step can take: within budget, rows and what the sequence may still generate."""
        left = sequence.limit - len(sequence.output_ids) - 1
        kept = int(self._others_wait)  # a token and a row for whoever has not come so far
        number = max(0, min(self._budget - 1 - self._decodes_left - kept, self._spare_rows - kept, left))
        return sequence.drafts[:number]

    def _chunk_size(self, sequence: Sequence, start: int, size: int, rows: int) -> int:
        """``size`` tokens from ``start`` on, or fewer if each has a row of its own and there are ``rows``."""
        if sequence.num_scored >= sequence.score_until:
            return size
        return min(size, max(0, sequence.num_scored - start) + rows)

    def _plan_decode(self, plan: StepPlan, sequence: Sequence, drafts: list[int]) -> None:
        start = sequence.num_computed
        if drafts:
            plan.chunks.append(Chunk(sequence, start, 1, drafts, 0, 0, True))
            sequence.busy = True
            self._spare_rows -= len(drafts)
        else:
            plan.decodes.append(sequence)
            sequence.num_computed += 1
        self._count(plan, sequence, 1 + len(drafts))

    def _plan_chunk(self, plan: StepPlan, sequence: Sequence, size: int) -> None:
        start, stop = sequence.num_computed, sequence.num_computed + size
        score_from = min(max(start, sequence.num_scored), sequence.score_until)
        score_to = max(score_from, min(stop, sequence.score_until))
        whole = stop == sequence.num_tokens
        chunk = Chunk(sequence, start, size, [], score_from, score_to, whole and score_to < stop)
        plan.chunks.append(chunk)
        self._spare_rows -= max(0, chunk.num_rows - 1)
        sequence.num_computed, sequence.prefilled = stop, whole
        sequence.num_scored = max(sequence.num_scored, score_to)
        self._count(plan, sequence, size)

    def _count(self, plan: StepPlan, sequence: Sequence, num_tokens: int) -> None:
        sequence.last_step = plan.number
        plan.num_tokens += num_tokens
        self._budget -= num_tokens

    # -- blocks --------------------------------------------------------------------------------------------------

    def _make_room(self, plan: StepPlan, sequence: Sequence, wanted: int, least: int) -> bool:
        """Give a running sequence blocks for ``wanted`` tokens, or for as many as there are, ``least`` at any rate.

        Those who come after it in the queue, and are not in this step, give theirs up if it must be; and if there
        are none, the sequence itself does. False when it cannot go on in this step.
        """
        table = sequence.table
        assert table is not None
        while True:
            most = min(wanted, self.cache.room(table))
            if most >= least:
                return self.cache.grow(table, most, sequence.slot, plan.updates)
            self._short = True
            if self._leaving:
                return False  # blocks are about to come back
            victim = self._victim(plan, sequence)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False

    def _victim(self, plan: StepPlan, sequence: Sequence) -> Sequence | None:
        """The last in the order of the queue that may start again so that ``sequence`` can go on.

        A promoted one comes before all others, wherever it stands in the queue.
        """
        alone = True  # nobody who comes after it goes on
        for other in reversed(self.running):
            if other.promoted:
                alone = alone and other is sequence
            elif other is sequence:
                under_way = sequence.last_step > self._finished_step  # its end may bring blocks back, or tokens
                return sequence if alone and not under_way else None
            elif other.last_step == plan.number:
                alone = False
            else:
                return other
        return None

    def _preempt(self, sequence: Sequence) -> None:
        self.stats.preemptions += 1
        sequence.preemptions += 1
        sequence.move(State.PREEMPTED)
        self.running.remove(sequence)
        self._release(sequence)
        sequence.restart()
        self.queue.push(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Take slot and blocks from a sequence, as soon as no step under way may write them."""
        table = sequence.table
        assert table is not None
        self.cache.retract(table)
        if sequence.last_step > self._finished_step:
            self._leaving.append((sequence.last_step, sequence.slot, table))
        else:
            self.cache.free(table)
            self._free_slots.append(sequence.slot)
        sequence.table, sequence.slot = None, -1
        for follower in sequence.followers:
            self.cache.index.woken.append(follower)
        sequence.followers = []
        if sequence is self._promoted:
            self._promoted, sequence.promoted = None, False

    # -- admission -----------------------------------------------------------------------------------------------

    def _admit(self, plan: StepPlan) -> bool:
        """Take the first of the queue, if it can run or must wait for another; False when it stays there."""
        sequence = self.queue.first()
        taken = len(self.running) + len(self.parked)
        if sequence is None or taken >= self.max_running or not self._free_slots or self._spare_rows < 1:
            return False
        late = sequence.preemptions >= self.max_preemptions
        if late and self._promoted is not None:
            return False
        leader = sequence.leader
        if leader is not None and leader.state is State.RUNNING and not sequence.output_ids:
            if not leader.forkable:
                return self._park(sequence, leader)
            if self._fork(plan, sequence, leader):
                return True
        shareable = sequence.num_tokens
        if sequence.num_scored_done < sequence.score_until:  # the rows of the tokens from here on are still wanted
            shareable = sequence.num_scored_done + 1
        match = self.cache.find(sequence.salt, sequence.span_bytes, shareable)
        if match.pending is not None:
            return self._park(sequence, match.pending)
        table = self.cache.open(sequence.salt, match.path)
        if not self._start(plan, sequence, table, table.capacity):
            self.cache.retract(table)
            self.cache.free(table)
            return False
        if late:
            self._promoted, sequence.promoted = sequence, True
        return True

    def _start(self, plan: StepPlan, sequence: Sequence, table: BlockTable, hit: int) -> bool:
        """Run a sequence whose first ``hit`` tokens are in ``table``, if there are blocks for its next chunk."""
        size = self._chunk_size(sequence, hit, min(self._budget, sequence.num_tokens - hit), self._spare_rows)
        room = self.cache.room(table, len(self.running)) - hit  # one block more for each who runs already
        if room < (size if self.running else 1):
            return False
        self._run(plan, sequence, table, hit)
        size = min(size, room)
        self.cache.grow(table, hit + size, sequence.slot, plan.updates)
        self.cache.announce(table, sequence.span_bytes, sequence.num_tokens)
        self._plan_chunk(plan, sequence, size)
        return True

    def _run(self, plan: StepPlan, sequence: Sequence, table: BlockTable, hit: int) -> None:
        """Move the first of the queue to those that run; ``table`` has the blocks of its first ``hit`` tokens."""
        self.queue.pop()
        sequence.move(State.RUNNING)
        insort(self.running, sequence, key=lambda s: s.key)
        sequence.slot, sequence.table = self._free_slots.pop(), table
        for group, updates in enumerate(plan.updates):
            first = table.first[group]
            updates.extend((sequence.slot, first + i, block) for i, block in enumerate(table.held(group)))
        sequence.num_computed = sequence.num_settled = hit
        sequence.first_step = plan.number
        self._spare_rows -= 1
        plan.started.append(sequence)
        self.stats.prefix_hit_tokens += hit

    def _fork(self, plan: StepPlan, sequence: Sequence, leader: Sequence) -> bool:
        """Start a sequence from its leader's blocks: all its prompt but the last token is computed there."""
        shared = len(sequence.prompt) - 1
        if shared < 1 or not self.cache.can_fork(leader.table, shared, len(self.running) + 1):  # type: ignore[arg-type]
            return False
        table = self.cache.fork(leader.table, shared, plan.copies)  # type: ignore[arg-type]
        self._run(plan, sequence, table, shared)
        self.cache.grow(table, shared + 1, sequence.slot, plan.updates)
        self._plan_chunk(plan, sequence, 1)
        return True

    def _park(self, sequence: Sequence, on: Node | Sequence) -> bool:
        """Take the first of the queue out of it until ``on``, a prefix node or its leader, lets it go on."""
        self.queue.pop()
        sequence.move(State.PARKED)
        sequence.parked_on = on
        waiters = on.followers if isinstance(on, Sequence) else on.waiters
        waiters.append(sequence)
        self.parked[id(sequence)] = sequence
        return True

    def _unpark(self, sequence: Sequence) -> None:
        on, sequence.parked_on = sequence.parked_on, None
        assert on is not None
        del self.parked[id(sequence)]
        waiters = on.followers if isinstance(on, Sequence) else on.waiters
        if sequence in waiters:
            waiters.remove(sequence)

    def _wake(self) -> None:
        """Queue those again whose wait for another sequence is over."""
        woken = self.cache.index.woken
        for sequence in woken:
            if sequence.state is State.PARKED:
                self._unpark(sequence)
                sequence.move(State.WAITING)
                self.queue.push(sequence)
                self._steady = False
        woken.clear()

    # -- results -------------------------------------------------------------------------------------------------

    def finish_step(self, plan: StepPlan, took_us: int) -> None:
        """A step has ended (steps end in the order they were planned); call ``settle`` for its sequences after.

        What ended sequences held until no step under way could write it is free from now on.
        """
        self._finished_step = plan.number
        drafted = sum(bool(chunk.drafts) for chunk in plan.chunks)
        self.budget.observe(took_us, plan.num_tokens, len(plan.decodes) + drafted)
        while self._leaving and self._leaving[0][0] <= plan.number:
            _, slot, table = self._leaving.popleft()
            self.cache.free(table)
            self._free_slots.append(slot)
            self._steady = False

    def set_drafts(self, sequence: Sequence, drafts: list[int], lockstep: bool) -> None:
        """Guesses of what follows the last token of a running sequence; ``lockstep``: see Sequence."""
        sequence.drafts, sequence.lockstep = drafts, lockstep
        if drafts:
            self._steady = False

    def take_drafts(self, sequence: Sequence, chunk: Chunk, accepted: int) -> None:
        """Of the last token and the drafts in ``chunk``, the first ``accepted`` stand; the cache has no more."""
        sequence.busy, sequence.drafts = False, []
        sequence.num_computed = chunk.start + accepted
        self.stats.drafts_proposed += len(chunk.drafts)
        self.stats.drafts_accepted += accepted - 1

    def settle(self, sequence: Sequence, num_settled: int) -> None:
        """The KV of the first ``num_settled`` tokens of a running sequence is in the cache, the tokens known."""
        table = sequence.table
        assert table is not None
        sequence.num_settled = num_settled
        self.cache.register(table, sequence.span_bytes, num_settled)
        if self.cache.windows and self.cache.slide(table, num_settled) and self.queue:
            self._steady = False
        if sequence.followers and sequence.forkable:
            self.cache.index.woken += sequence.followers
            sequence.followers = []
        self._set_next_event(sequence, num_settled)

    def _set_next_event(self, sequence: Sequence, num_settled: int) -> None:
        """Number of output tokens at which it must be looked at again: it ends, or has filled a block."""
        event = sequence.limit or NEVER
        if sequence.table.node is not None or self.cache.windows:  # type: ignore[union-attr]
            full = (num_settled // self.cache.block_size + 1) * self.cache.block_size
            event = min(event, full - len(sequence.prompt) + 1)
        sequence.next_event = event

    def still_runs(self, sequence: Sequence, plan: StepPlan) -> bool:
        """Whether the results of ``plan`` still matter to a sequence: it has neither ended nor started again."""
        return sequence.state is State.RUNNING and sequence.first_step <= plan.number

    def check(self) -> None:
        """Raise AssertionError unless every invariant of queue, slots, blocks and prefix index holds."""
        from ridgeline.scheduler.invariants import check

        check(self, self._free_slots, [(slot, table) for _, slot, table in self._leaving])
