"""Streaming detokenization: text as soon as it is certain, never half a character."""

from __future__ import annotations

import codecs

from ridgeline.text.tokenizer import Tokenizer

_new_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Turns one request's tokens into text, one at a time.

    The pieces ``push`` returns, followed by ``finish``, join to ``tokenizer.decode(ids, continuation=True)``.
    A character whose bytes are spread over several tokens comes with the last of them; bytes that can
    no longer become a character show as U+FFFD, as in ``decode``.
    """

    __slots__ = ("_tokenizer", "_skip_special", "_whole", "_decoder", "_pending")

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._whole = tokenizer.whole_texts(skip_special)
        self._decoder = _new_decoder("replace")
        self._pending = False

    def push(self, token_id: int) -> str:
        """Text that is complete now that ``token_id`` has come ("" while a character is unfinished)."""
        if not self._pending:
            text = self._whole.get(token_id)  # most tokens are whole characters: one look-up
            if text is not None:
                return text
        raw = self._tokenizer.token_bytes(token_id, self._skip_special)
        if not self._pending:
            try:
                text = self._whole[token_id] = raw.decode()
                return text
            except UnicodeDecodeError:
                pass
        text = self._decoder.decode(raw)
        self._pending = bool(self._decoder.getstate()[0])
        return text

    def finish(self) -> str:
        """The end of the text: U+FFFD for a character left unfinished, else "". Ready for a new text after it."""
        self._pending = False
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text
