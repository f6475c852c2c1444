"""A request's text as it grows: stop strings found, and text held back while it may become one."""

from __future__ import annotations

from typing import Protocol


class Detokenizer(Protocol):
    """Turns tokens into text as they come, never splitting a character."""

    def push(self, token_id: int) -> str:
        """The text that this token completes (often none)."""
        ...

    def finish(self) -> str:
        """The text still held back once no token follows."""
        ...


class TextStream:
    """Collects text; ends it at the first stop string, which is not part of it.

    ``text`` never takes back a character that ``take`` has handed out: an end that may be the start of a stop
    string is handed out only once it is known not to be.
    """

    def __init__(self, detokenizer: Detokenizer, stop: tuple[str, ...]) -> None:
        self.text = ""
        self._detokenizer = detokenizer
        self._stop = stop
        self._longest = max((len(s) for s in stop), default=0)
        self._taken = 0
        self._ended = False
        self._from = 0  # stop strings are looked for from here on

    def push(self, token_id: int, may_stop: bool = True) -> bool:
        """Add one token's text; True when a stop string has ended the text.

        Without ``may_stop`` no stop string is looked for up to the end of this token, not even later.
        """
        piece = self._detokenizer.push(token_id)
        if not self._stop:
            self.text += piece
            return False
        if may_stop:
            return self._add(piece)
        self.text += piece
        self._from = len(self.text)
        return False

    def finish(self) -> bool:
        """Add what the detokenizer still holds; True when a stop string has ended the text."""
        if not self._ended:
            self._add(self._detokenizer.finish())
        stopped, self._ended = self._ended, True
        return stopped

    def _add(self, piece: str) -> bool:
        if not piece:
            return False
        start = max(self._from, len(self.text) - self._longest + 1)
        self.text += piece
        if not self._stop:
            return False
        # The stop string that is complete first wins, as if the text had come character by character.
        ends = ((at + len(s), at) for s in self._stop if (at := self.text.find(s, start)) >= 0)
        first = min(ends, default=None)
        if first is None:
            return False
        self.text = self.text[: first[1]]
        self._ended = True
        return True

    def take(self) -> str:
        """The text that is new since the last call and certain to stay."""
        end = len(self.text)
        if self._stop and not self._ended:
            end -= self._held_back()
        piece = self.text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        for length in range(min(self._longest - 1, len(self.text) - self._from), 0, -1):
            tail = self.text[-length:]
            if any(s.startswith(tail) for s in self._stop):
                return length
        return 0
