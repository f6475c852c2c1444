"""Tokens of a step under a latency target: as many as the rule says, no fewer while a prompt could use them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tests.sim import view
from tests.sim.batches import Step
from tests.sim.oracles import Oracles, Record, must


@dataclass
class Level:
    """The rule, as the documentation has it: a step in which something decodes and more is done sets the level.

    One that took too long cuts it in proportion to the excess, one that used all of it and did not raises it by an
    eighth. A time that is not positive says nothing.
    """

    most: int
    target_us: int
    tokens: int

    def observe(self, took_us: int, tokens: int, decodes: int) -> None:
        """A step has ended."""
        if not 0 < decodes < tokens or took_us <= 0:
            return
        if took_us > self.target_us:
            self.tokens = max(1, int(min(self.tokens, tokens) * self.target_us / took_us))
        elif tokens >= self.tokens:
            self.tokens = min(self.most, self.tokens + 1 + int(self.tokens / 8))


class Allowance:
    """Follows the level of one engine, from what it launches and from the clock that it reads."""

    def __init__(self, oracles: Oracles, clock: Callable[[], int]) -> None:
        self.oracles, self.clock = oracles, clock
        limits = oracles.scenario.limits
        self.limits, self.target = limits, limits.step_target_us
        self.level = Level(limits.max_tokens, limits.step_target_us or 0, limits.max_tokens)
        self.decoding: set[int] = set()  # by id(), before the step
        self.open: deque[tuple[int, int, int]] = deque()  # time of launch, tokens, how many decoded
        self.finished = 0
        if self.target is not None:
            oracles.watchers.append(self.launched)

    def before_step(self) -> None:
        """Note who decodes."""
        self.decoding = {id(r) for r in self.oracles.live if r.request.slot >= 0 and r.caught_up}

    def launched(self, step: Step) -> None:
        """A step has as many tokens as it may have, or leaves nothing behind that it could compute."""
        tokens = sum(len(w.tokens) for w in step.work)
        running = {r.request.slot: r for r in self.oracles.live if r.request.slot >= 0}
        decodes = sum(id(running[w.slot]) in self.decoding for w in step.work)
        most = self.limits.max_tokens
        if self.decoding:
            most = min(most, max(self.level.tokens, len(self.decoding) + 1))
        must(tokens <= most, f"a step of {tokens} tokens, {most} keep it within its time")
        if tokens < most:
            must(
                not any(map(self.cut, running.values())),
                f"a step of {tokens} tokens leaves a prompt behind, {most} fit",
            )
        self.open.append((self.clock(), tokens, decodes))

    def cut(self, record: Record) -> bool:
        """Whether a request reads less than it could, though it has blocks and rows for more and is none of those
        that others make way for, at times for nothing."""
        if record.caught_up or record.case.pooling == "mean" or record.case.params.prompt_logprobs is not None:
            return False
        at, table = self.oracles.model.reader.slots[record.request.slot].next, view.table(record.request, 0)
        comes_first = record.request.preemptions >= self.limits.max_preemptions
        return at < len(table) * self.limits.block_size and not comes_first

    def after_step(self) -> None:
        """Take the time of the step that has ended, if one has."""
        while len(self.open) > len(self.oracles.model.open):
            launched, tokens, decodes = self.open.popleft()
            now = self.clock()
            self.level.observe(now - max(launched, self.finished), tokens, decodes)
            self.finished = now

    def dropped(self) -> None:
        """Nothing is known of the steps that were under way."""
        self.open.clear()
