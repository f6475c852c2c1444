"""Text to token ids and back, from the vocabulary inside a GGUF file.

Two families: byte-level BPE (``tokenizer.ggml.model`` "gpt2") and SentencePiece BPE with byte fallback
("llama"). Both run on the ``tokenizers`` library; this module decides what it is told. Control tokens
are left out of the library's vocabulary altogether, so no text can become one by accident: they
are found only where ``control=True`` asks for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ridgeline.core.errors import ModelFileError, RequestError, UnsupportedError
from ridgeline.text.pretokenizers import pre_tokenizer
from ridgeline.text.vocabulary import BYTE, NORMAL, Vocabulary, read_flag, read_list

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

_SPACE = "\u2581"  # SentencePiece writes a space as this


class Tokenizer:
    """Encodes and decodes; build one with ``from_gguf``.

    Attributes:
        vocab_size: tokens in the vocabulary.
        bos_id, eos_id: begin and end of text, None if the file names none.
        eos_ids: every token that ends generation (end of text, end of turn).
        add_bos, add_eos: whether ``encode`` puts them around the text.
        control: text -> id of the control tokens.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        backend: Backend,
        *,
        byte_level: bool,
        add_bos: bool,
        add_eos: bool,
        add_space: bool,
    ) -> None:
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id, self.eos_id, self.eos_ids = vocabulary.bos_id, vocabulary.eos_id, vocabulary.eos_ids
        self.add_bos = add_bos and self.bos_id is not None
        self.add_eos = add_eos and self.eos_id is not None
        self.control = vocabulary.control
        self._control_ids = frozenset(vocabulary.control.values())
        self._tokens, self._kinds = vocabulary.tokens, vocabulary.kinds
        self._backend, self._byte_level, self._add_space = backend, byte_level, add_space
        self._bytes: dict[int, bytes] = {}
        self._whole: tuple[dict[int, str], dict[int, str]] = ({}, {})

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build the tokenizer a GGUF file describes.

        Raises:
            UnsupportedError: no tokenizer in the file, or a kind that is not supported (named).
            ModelFileError: inconsistent vocabulary, naming the key.
        """
        model = metadata.get("tokenizer.ggml.model")
        if model not in ("gpt2", "llama"):
            if model is None:
                raise UnsupportedError("the model file holds no tokenizer (no tokenizer.ggml.model): use one that does")
            raise UnsupportedError(f"tokenizer.ggml.model {model!r} is not supported (gpt2 and llama are)")
        vocabulary = Vocabulary.from_gguf(metadata)
        if model == "gpt2":
            way = pre_tokenizer(str(metadata.get("tokenizer.ggml.pre", "default")))
            backend = _byte_level_bpe(vocabulary, metadata, way.patterns, way.ignore_merges)
            add_bos, add_space = way.add_bos, False
        else:
            add_bos, add_space = True, read_flag(metadata, "tokenizer.ggml.add_space_prefix", True)
            backend = _sentencepiece_bpe(vocabulary, metadata, add_space)
        return cls(
            vocabulary,
            backend,
            byte_level=model == "gpt2",
            add_bos=read_flag(metadata, "tokenizer.ggml.add_bos_token", add_bos),
            add_eos=read_flag(metadata, "tokenizer.ggml.add_eos_token", False),
            add_space=add_space,
        )

    def encode(self, text: str, *, control: bool = False) -> list[int]:
        """Token ids of ``text``, with the begin token in front when the file asks for it.

        ``control=False``: the text is plain; "<|im_start|>" in it gives ordinary tokens. ``control=True``:
        the spelling of a control token becomes that token; only for text the program itself wrote.
        A byte-level vocabulary may lack tokens for some rare control characters: those vanish,
        as they do in every other implementation. Raises RequestError if ``text`` is not valid text.
        """
        if not control:
            return self.wrap(self.encode_plain(text))
        ids: list[int] = []
        for piece in self.split_control(text):
            ids += self.encode_plain(piece) if isinstance(piece, str) else (piece,)
        return self.wrap(ids)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of plain text alone: no begin token, never a control token."""
        if not isinstance(text, str):
            raise RequestError(f"text must be a string, got {type(text).__name__}")
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text holds a lone surrogate at character {error.start}: it is not valid Unicode"
            ) from None
        return self._backend.encode(text, add_special_tokens=False).ids

    def split_control(self, text: str) -> list[str | int]:
        """Cut ``text`` at the spellings of control tokens: plain strings, and ids for the tokens."""
        if self._control_pattern is None:
            return [text]
        pieces = self._control_pattern.split(text)  # odd places are what the group matched
        return [self.control[p] if i % 2 else p for i, p in enumerate(pieces) if p]

    def wrap(self, ids: list[int]) -> list[int]:
        """``ids`` with the begin (and end) token the file asks for, unless it is there already."""
        if self.add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        if self.add_eos and self.eos_id is not None and ids[-1:] != [self.eos_id]:
            ids = [*ids, self.eos_id]
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True, *, continuation: bool = False) -> str:
        """Text of ``ids``; bytes that are not UTF-8 show as U+FFFD.

        Args:
            ids: token ids; one outside the vocabulary raises RequestError.
            skip_special: leave control tokens out instead of spelling them.
            continuation: the ids continue some text: keep the space that SentencePiece puts before a first word.
        """
        raw = b"".join([self.token_bytes(i, skip_special) for i in ids])
        if self._add_space and not continuation:
            raw = raw.removeprefix(b" ")
        return raw.decode("utf-8", "replace")

    def token_text(self, token_id: int) -> str:
        """The spelling of one token, control tokens included, for people and templates."""
        return self.token_bytes(token_id, skip_special=False).decode("utf-8", "replace")

    def is_control(self, token_id: int) -> bool:
        """Whether ``token_id`` is a control token."""
        return token_id in self._control_ids

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """The bytes one token stands for; b"" for a control token unless ``skip_special`` is False."""
        if skip_special and token_id in self._control_ids:
            return b""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._spell(token_id)
        return found

    def whole_texts(self, skip_special: bool) -> dict[int, str]:
        """A cache shared by detokenizers: token id -> text, for tokens that are whole characters by themselves."""
        return self._whole[skip_special]

    def _spell(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocab_size:
            raise RequestError(f"token id {token_id} is outside the vocabulary of {self.vocab_size} tokens")
        text, kind = self._tokens[token_id], self._kinds[token_id]
        if kind == BYTE and (match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", text)):
            return bytes.fromhex(match[1])
        if not self._byte_level:
            return text.replace(_SPACE, " ").encode() if token_id not in self._control_ids else text.encode()
        if kind == NORMAL:
            try:
                return bytes(map(BYTE_OF_CHAR.__getitem__, text))
            except KeyError:  # not spelled in the byte alphabet: stands for itself
                pass
        return text.encode()

    @cached_property
    def _control_pattern(self) -> re.Pattern[str] | None:
        """Matches the spelling of any control token, the longest first."""
        names = sorted(self.control, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})") if names else None


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level spelling: printable Latin-1 is itself, the rest follows from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [b for b in range(256) if b not in plain]
    return {**{chr(b): b for b in plain}, **{chr(256 + i): b for i, b in enumerate(other)}}


BYTE_OF_CHAR = _byte_alphabet()


def _plain_vocabulary(vocabulary: Vocabulary) -> dict[str, int]:
    """Text -> id of every token but the control tokens; ModelFileError when two share a text."""
    ids = dict(zip(vocabulary.tokens, range(len(vocabulary.tokens)), strict=True))
    if len(ids) != len(vocabulary.tokens):
        double = next(t for i, t in enumerate(vocabulary.tokens) if ids[t] != i)
        raise ModelFileError(f"tokenizer.ggml.tokens holds the token {double!r} twice")
    for text in vocabulary.control:
        del ids[text]
    return ids


def _byte_level_bpe(
    vocabulary: Vocabulary, metadata: Mapping[str, Any], patterns: tuple[str, ...], ignore_merges: bool
) -> Backend:
    from tokenizers import Regex, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    if "tokenizer.ggml.merges" not in metadata:
        raise ModelFileError("tokenizer.ggml.merges is missing: a byte-level BPE vocabulary needs it")
    merges = [tuple(m.split(" ", 1)) for m in read_list(metadata, "tokenizer.ggml.merges", str)]
    try:
        model = models.BPE(_plain_vocabulary(vocabulary), merges, ignore_merges=ignore_merges)
    except Exception as error:  # the library raises bare Exception, naming the merge
        odd = next((m[0] for m in merges if len(m) != 2), None)
        reason = " ".join(str(error).split()) if odd is None else f"{odd[:60]!r} is no two tokens with a space between"
        raise ModelFileError(f"tokenizer.ggml.merges does not fit the vocabulary: {reason}") from None
    backend = Backend(model)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, spell])
    _add_user_defined(backend, vocabulary)
    return backend


def _sentencepiece_bpe(vocabulary: Vocabulary, metadata: Mapping[str, Any], add_space: bool) -> Backend:
    """SentencePiece's BPE has no list of merges: two pieces join if the whole is a token, the best score first."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers

    scores = read_list(metadata, "tokenizer.ggml.scores", float, len(vocabulary.tokens))
    if not scores:
        raise ModelFileError("tokenizer.ggml.scores is missing: a SentencePiece vocabulary needs it")
    ids = _plain_vocabulary(vocabulary)
    normal = [i for i, kind in enumerate(vocabulary.kinds) if kind == NORMAL]
    normal.sort(key=scores.__getitem__, reverse=True)
    merges = []
    for token in map(vocabulary.tokens.__getitem__, normal):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((left, right))
    bytes_missing = [b for b in range(256) if f"<0x{b:02X}>" not in ids]
    if bytes_missing:
        raise UnsupportedError(
            f"a SentencePiece vocabulary without the byte token <0x{bytes_missing[0]:02X}> is not supported"
        )
    backend = Backend(models.BPE(ids, merges, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    prefix = [normalizers.Prepend(_SPACE)] if add_space else []
    backend.normalizer = normalizers.Sequence([*prefix, spaces])
    _add_user_defined(backend, vocabulary)
    return backend


def _add_user_defined(backend: Backend, vocabulary: Vocabulary) -> None:
    """Tokens that match as whole strings in any text, before it is cut into words."""
    if vocabulary.user_defined:
        from tokenizers import AddedToken

        backend.add_tokens([AddedToken(text, normalized=False, special=False) for text in vocabulary.user_defined])
