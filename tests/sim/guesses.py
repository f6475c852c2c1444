"""Speculation: what may be guessed, how many at once, and when a request that guessed wrong may guess again."""

from __future__ import annotations

from dataclasses import dataclass

from ridgeline.engine.limits import EngineLimits
from tests.sim.batches import Work

FIRST, LONGEST_PAUSE = 3, 64


def follows(known: list[int], limits: EngineLimits) -> list[int] | None:
    """What followed the longest end of the text that was met before, the last time it was met."""
    for size in range(limits.ngram_max, limits.ngram_min - 1, -1):
        for at in range(len(known) - 1, size - 1, -1):
            if known[at - size : at] == known[-size:]:
                return known[at:]
    return None


@dataclass
class Guesser:
    """What a request's guesses so far allow it.

    Attributes:
        most: guesses that it may make at once; pause, resume: tokens it waited after its last failure, and the length
            of its output from which on it may guess again.
        last: its last step with guesses, whose outcome is not taken yet, with the length of its output and how often
            it had given way by then.
    """

    most: int = FIRST
    pause: int = 0
    resume: int = 0
    last: tuple[Work, int, int] | None = None

    def learn(self, preemptions: int) -> None:
        """Take the outcome of its last guesses, all its steps having ended; of those lost on the way none is known."""
        if self.last is None:
            return
        (work, length, gave_way), self.last = self.last, None
        right = work.stood - 1
        most = 2 * right + 1 if right else FIRST
        if preemptions > gave_way:
            self.most, self.pause, self.resume = max(most, self.most), 0, 0
            return
        self.most = most
        self.pause = 0 if right else min(LONGEST_PAUSE, 2 * self.pause or 1)
        self.resume = 0 if right else length + self.pause

    def wrong(self, drafts: list[int], known: list[int], length: int, limits: EngineLimits) -> str:
        """What is wrong with guesses after ``known`` tokens, ``length`` of them output; nothing, if all is right."""
        if len(drafts) > min(self.most, limits.num_draft_tokens):
            return "more guesses than the last ones have earned"
        if length < self.resume:
            return "guesses again too soon after wrong ones"
        follow = follows(known, limits)
        if follow is None:
            return "guesses without an earlier occurrence"
        return "" if drafts == [follow[i % len(follow)] for i in range(len(drafts))] else "guesses from nowhere"
