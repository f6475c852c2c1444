"""A sequence as the scheduler knows it, and the one table of how its state may change."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from collections.abc import Sequence as Several
from enum import Enum

from ridgeline.kvcache.cache import BlockTable
from ridgeline.kvcache.prefix import Node


class State(Enum):
    """Where a sequence stands. Only a running one holds a slot and blocks."""

    NEW = "new"
    WAITING = "waiting"  # in the queue
    PARKED = "parked"  # out of the queue until another sequence has computed what it can share
    RUNNING = "running"
    PREEMPTED = "preempted"  # in the queue again, to be computed anew
    FINISHED = "finished"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.NEW: frozenset({State.WAITING, State.FINISHED}),
    State.WAITING: frozenset({State.RUNNING, State.PARKED, State.FINISHED}),
    State.PARKED: frozenset({State.WAITING, State.FINISHED}),
    State.RUNNING: frozenset({State.PREEMPTED, State.FINISHED}),
    State.PREEMPTED: frozenset({State.RUNNING, State.PARKED, State.FINISHED}),
    State.FINISHED: frozenset(),
}
"""From each state, the states that may follow."""

NEVER = 2**62
"""A number of output tokens that no sequence reaches."""


class Sequence:
    """Tokens to compute and to generate, with what it holds while it runs.

    Attributes:
        prompt: [P] token ids.
        output_ids: tokens generated so far.
        limit: most tokens to generate; 0 for a sequence that is only read (pooling).
        priority: less is earlier; ``key`` orders the queue and is fixed when it is submitted.
        salt: sequences share prefixes only with those of the same salt.
        leader: the first of n samples of the same prompt, from which this one forks; None for that one itself.
        score_until: the row of each position below this is wanted (prompt logprobs, pooled states).
        num_scored: positions whose rows are under way or done; num_scored_done: done.
        num_computed: tokens whose KV is in the cache or being computed by a step under way.
        num_settled: tokens whose KV is in the cache (kept up to date while it reads its prompt).
        prefilled: all tokens known are computed or under way: from now on it is fed what it sampled.
        busy: a step with drafts is under way, so how far it has come is not known yet.
        drafts: guesses of the tokens after the last.
        lockstep: it must not be launched while a step of it is under way, so that it can be drafted for.
        last_step: number of the last step that computes some of it; first_step: of the first since it was admitted.
        next_event: number of output tokens at which it ends or fills a block.
        preemptions: how often it had to start again; promoted: so often that it comes first now.
    """

    __slots__ = (
        "prompt",
        "output_ids",
        "limit",
        "priority",
        "key",
        "salt",
        "state",
        "leader",
        "followers",
        "parked_on",
        "slot",
        "table",
        "score_until",
        "num_scored",
        "num_scored_done",
        "num_computed",
        "num_settled",
        "prefilled",
        "busy",
        "drafts",
        "lockstep",
        "first_step",
        "last_step",
        "next_event",
        "preemptions",
        "promoted",
    )

    def __init__(
        self,
        prompt: Several[int],
        limit: int,
        *,
        priority: int = 0,
        salt: Hashable = None,
        leader: Sequence | None = None,
        score_until: int = 0,
    ) -> None:
        self.prompt = prompt if isinstance(prompt, array) else array("i", prompt)
        self.output_ids: list[int] = []
        self.limit = limit
        self.priority = priority
        self.key = (0, 0)
        self.salt = salt
        self.state = State.NEW
        self.leader = leader
        self.followers: list[Sequence] = []  # parked until this one has computed its prompt
        self.parked_on: Node | Sequence | None = None
        self.slot = -1
        self.table: BlockTable | None = None
        self.score_until = score_until
        self.num_scored_done = 0
        self.preemptions = 0
        self.promoted = False
        self.restart()

    def restart(self) -> None:
        """Nothing of it is computed."""
        self.num_computed = self.num_settled = 0
        self.num_scored = self.num_scored_done
        self.prefilled = self.busy = self.lockstep = False
        self.drafts: list[int] = []
        self.first_step = self.last_step = 0
        self.next_event = self.limit or NEVER

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.prompt) + len(self.output_ids)

    @property
    def max_len(self) -> int:
        """Most tokens whose KV it can need: the last one generated is never read back."""
        return len(self.prompt) + max(0, self.limit - 1)

    def move(self, state: State) -> None:
        """Change state; raises AssertionError for a change that is not in the table."""
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"a sequence cannot go from {self.state.value} to {state.value}")
        self.state = state

    def span(self, start: int, stop: int) -> array[int]:
        """Token ids from position ``start`` to ``stop``, all of them known."""
        prompt, size = self.prompt, len(self.prompt)
        if stop <= size:
            return prompt[start:stop]
        if start >= size:
            return array("i", self.output_ids[start - size : stop - size])
        return prompt[start:] + array("i", self.output_ids[: stop - size])

    def span_bytes(self, start: int, stop: int) -> bytes:
        """``span`` as the bytes of int32."""
        return self.span(start, stop).tobytes()

    @property
    def forkable(self) -> bool:
        """Whether all of its prompt but the last token is in the cache, so that others can go on from there."""
        return self.num_settled >= len(self.prompt) - 1
