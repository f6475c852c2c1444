"""A GGUF file's vocabulary, checked: tokens, their kinds, and the ids that mean something special.

Keys and token types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (tokenizer section).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ridgeline.core.errors import ModelFileError, UnsupportedError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TOKEN_KINDS = range(0, 7)

# Tokens that end a turn or a text under any model that has them; files often name just one of several.
_END_TOKENS = (
    "<|im_end|> <|endoftext|> <|eot_id|> <|eom_id|> <|end_of_text|> <|end|> <|return|> <|call|> "
    "<end_of_turn> <end_of_utterance> <eos> </s> <EOT> _<EOT> [EOT] [EOS] <｜end▁of▁sentence｜>"
).split()


@dataclass(frozen=True)
class Vocabulary:
    """What a file says about its tokens.

    Attributes:
        tokens: text of every token by id, in the vocabulary's own spelling.
        kinds: token type by id (NORMAL, CONTROL, ...).
        control: text -> id of tokens that user text must never become.
        user_defined: text -> id of whole-word tokens that any text may contain.
        bos_id, eos_id: begin and end of text, None if the file names none.
        eos_ids: every token that ends generation.
    """

    tokens: list[str]
    kinds: list[int]
    control: dict[str, int]
    user_defined: dict[str, int]
    bos_id: int | None
    eos_id: int | None
    eos_ids: frozenset[int]

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Vocabulary:
        """Read and check ``tokenizer.ggml.*``; raises ModelFileError naming the key, UnsupportedError if absent."""
        if "tokenizer.ggml.tokens" not in metadata:
            raise UnsupportedError("the model file holds no tokenizer (no tokenizer.ggml.tokens): use one that does")
        tokens = read_list(metadata, "tokenizer.ggml.tokens", str)
        if not tokens:
            raise ModelFileError("tokenizer.ggml.tokens is empty")
        kinds = read_list(metadata, "tokenizer.ggml.token_type", int, len(tokens)) or [NORMAL] * len(tokens)
        if not all(kind in TOKEN_KINDS for kind in set(kinds)):
            raise ModelFileError(f"tokenizer.ggml.token_type holds values outside {TOKEN_KINDS.start} to 6")
        bos, eos = _token_id(metadata, "bos", len(tokens)), _token_id(metadata, "eos", len(tokens))
        ends = {i for name in ("eos", "eot", "eom") if (i := _token_id(metadata, name, len(tokens))) is not None}
        control: dict[str, int] = {}
        user_defined: dict[str, int] = {}
        for i, kind in enumerate(kinds):
            if kind == NORMAL or kind == BYTE or not tokens[i]:
                continue
            if kind in (CONTROL, UNKNOWN) or (kind == USER_DEFINED and (i in ends or _looks_control(tokens[i]))):
                control[tokens[i]] = i
            elif kind == USER_DEFINED:
                user_defined[tokens[i]] = i
        ends.update(control[name] for name in _END_TOKENS if name in control)
        return cls(tokens, kinds, control, user_defined, bos, eos, frozenset(ends))


def _looks_control(text: str) -> bool:
    """Some converters mark chat markers as user defined: by their spelling they are control tokens all the same."""
    return text.startswith(("<|", "<｜")) and text.endswith(("|>", "｜>")) or text in _END_TOKENS


def _token_id(metadata: Mapping[str, Any], name: str, num_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    value = metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ModelFileError(f"{key} must be a token id, got {value!r}")
    if value in (0xFFFFFFFF, -1):  # how converters write "none"
        return None
    if not 0 <= value < num_tokens:
        raise ModelFileError(f"{key} is {value}, outside the vocabulary of {num_tokens} tokens")
    return value


def read_list(metadata: Mapping[str, Any], key: str, kind: type, length: int | None = None) -> list[Any]:
    """A list of ``kind`` (and ``length``) under ``key``, [] if absent; raises ModelFileError naming the key."""
    values = metadata.get(key, [])
    if not isinstance(values, list) or (values and set(map(type, values)) != {kind}):
        raise ModelFileError(f"{key} must be a list of {kind.__name__}")
    if values and length is not None and len(values) != length:
        raise ModelFileError(f"{key} has {len(values)} entries for {length} tokens")
    return values


def read_flag(metadata: Mapping[str, Any], key: str, default: bool) -> bool:
    """A bool under ``key``; raises ModelFileError when it is something else."""
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise ModelFileError(f"{key} must be true or false, got {value!r}")
    return value
