"""Prompt lookup: drafts are what followed the last tokens when they were met before."""

from __future__ import annotations

from collections.abc import Iterable

FIRST_DRAFTS = 3  # at first, and after a failure


class NgramDrafter:
    """Drafts for one sequence. Each token costs a look-up for each n-gram size, however long the sequence.

    It learns from its failures: after drafts of which none was right it pauses for 1, 2, 4 ... 64 tokens and then
    tries FIRST_DRAFTS again; after others it drafts one more than twice what was accepted. So a sequence that does
    not repeat itself costs next to nothing.

    Args:
        tokens: the sequence so far.
        num_drafts: most drafts at once.
        smallest, largest: sizes of n-grams; the largest that was met before is followed.
    """

    __slots__ = ("_tokens", "_ends", "_sizes", "_most", "_width", "_pause", "_wait")

    def __init__(self, tokens: Iterable[int], num_drafts: int, smallest: int, largest: int) -> None:
        self._tokens: list[int] = []
        self._sizes = range(largest, smallest - 1, -1)
        self._ends: list[dict[tuple[int, ...], int]] = [{} for _ in self._sizes]
        self._most = num_drafts
        self._width = min(FIRST_DRAFTS, num_drafts)
        self._pause = self._wait = 0
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """The sequence has grown by ``token``. Files the n-grams that end before it, so none finds itself."""
        tokens = self._tokens
        at = len(tokens)
        for size, ends in zip(self._sizes, self._ends, strict=True):
            if at >= size:
                ends[tuple(tokens[at - size :])] = at
        tokens.append(token)
        if self._wait:
            self._wait -= 1

    @property
    def waiting(self) -> bool:
        """Whether it pauses after failures."""
        return self._wait > 0

    def draft(self) -> list[int]:
        """Guesses of the next tokens, best first; none while it pauses or when nothing was met before."""
        if self._wait:
            return []
        tokens = self._tokens
        for size, ends in zip(self._sizes, self._ends, strict=True):
            found = ends.get(tuple(tokens[-size:])) if len(tokens) >= size else None
            if found is not None:
                return self._copy(found)
        return []

    def _copy(self, at: int) -> list[int]:
        """``_width`` tokens from ``at`` on; past the end of the sequence the drafts themselves go on (a loop)."""
        tokens = self._tokens
        found = tokens[at : at + self._width]
        period = len(tokens) - at
        while len(found) < self._width:
            found.append(found[len(found) - period])
        return found

    def learn(self, proposed: int, accepted: int) -> None:
        """Of ``proposed`` drafts ``accepted`` were right."""
        if accepted:
            self._pause = 0
            self._width = min(self._most, 2 * accepted + 1)
        elif proposed:
            self._pause = min(64, 2 * self._pause or 1)
            self._wait = self._pause
            self._width = min(FIRST_DRAFTS, self._most)
