"""Chat templates: a conversation becomes token ids, and what people wrote stays plain text.

A GGUF file carries its template (jinja2) in ``tokenizer.chat_template``; variables, filters and whitespace
rules are those of transformers' ``apply_chat_template``. The template comes with a downloaded file,
so it runs in jinja2's sandbox with bounds; messages come from users, so none of their text
may become a control token:

1. In every string of the messages, the first character of each control token's spelling (and of
   an unfinished one at the end, which the next string might finish) is swapped for a private
   character that occurs nowhere else.
2. The template is rendered and the result cut at control tokens: all of them are the template's.
3. In the pieces between, the characters are swapped back, and each piece is encoded as plain text.

Cutting nowhere else keeps the ids those of encoding the whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ridgeline.core.errors import ModelFileError, RequestError, UnsupportedError
from ridgeline.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

MAX_TEMPLATE_CHARS = 1 << 18
MAX_OUTPUT_CHARS = 1 << 24

_ROLES = frozenset("system developer user assistant tool function ipython model observation environment".split())
_PRIVATE = range(0xE000, 0xF900)  # Unicode's private use area: stand-ins for the swapped characters


class ChatTemplate:
    """The chat template of a model; build one with ``from_gguf``. jinja2 is imported at first use."""

    def __init__(self, source: str) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise ModelFileError(
                f"tokenizer.chat_template has {len(source)} characters, more than {MAX_TEMPLATE_CHARS}"
            )
        self.source = source

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> ChatTemplate:
        """The template in a GGUF file; raises UnsupportedError when it has none."""
        source = metadata.get("tokenizer.chat_template")
        if source is None:
            raise UnsupportedError(
                "the model file has no chat template (tokenizer.chat_template): use generate, not chat"
            )
        if not isinstance(source, str):
            raise ModelFileError(f"tokenizer.chat_template must be a string, got {type(source).__name__}")
        return cls(source)

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, ready for the model to go on.

        Args:
            messages: mappings with "role" and "content" (a string, or a list of ``{"type": "text"}`` parts,
                joined by newlines), and whatever else the template reads.
            tokenizer: the model's; its control tokens are the only ones the template can place.
            add_generation_prompt: end with the opening of the assistant's turn.
            variables: more template variables (``tools``, ``enable_thinking``); strings in them are plain text too.

        Raises:
            RequestError: messages of the wrong shape, or refused by the template.
            ModelFileError: the template itself is broken.
        """
        cleaned = _clean_messages(messages, tokenizer)
        swap = _Swap(tokenizer.control, [cleaned, variables or {}, self.source])
        context = {
            **swap.hide(dict(variables or {})),
            "messages": swap.hide(cleaned),
            "add_generation_prompt": add_generation_prompt,
            **_named_tokens(tokenizer),
        }
        text = self._render(context)
        ids: list[int] = []
        for piece in tokenizer.split_control(text):
            ids += tokenizer.encode_plain(swap.show(piece)) if isinstance(piece, str) else (piece,)
        # The begin token alone: the conversation goes on, so no end token follows it.
        begin = tokenizer.bos_id if tokenizer.add_bos else None
        return ids if begin is None or ids[:1] == [begin] else [begin, *ids]

    def _render(self, context: Mapping[str, Any]) -> str:
        from ridgeline.text.sandbox import STEPS

        pieces: list[str] = []
        total = 0
        template = self._template
        try:
            for piece in template.generate({**context, STEPS: [0]}):
                pieces.append(piece)
                total += len(piece)
                if total > MAX_OUTPUT_CHARS:
                    raise RequestError(
                        f"the chat template wrote more than {MAX_OUTPUT_CHARS} characters: shorten the messages"
                    )
        except RequestError:
            raise
        except Exception as error:  # templates can raise anything Python can
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(f"the model's chat template does not accept these messages: {reason}") from None
        return "".join(pieces)

    @cached_property
    def _template(self) -> Template:
        from ridgeline.text.sandbox import compile_template

        return compile_template(self.source)


def _named_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """``bos_token`` and ``eos_token`` as templates expect them; absent ones are not defined."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return {name: tokenizer.token_text(i) for name, i in ids.items() if i is not None}


def _clean_messages(messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Checked copies of the messages, text parts joined."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Iterable):
        raise RequestError('messages must be a list of {"role": ..., "content": ...}')
    cleaned = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(f"message {index} must be a mapping with role and content, got {type(message).__name__}")
        _check_role(index, message.get("role"), tokenizer)
        copy = dict(message)
        if isinstance(copy.get("content"), (list, tuple)):
            copy["content"] = "\n".join(_part_text(index, part) for part in copy["content"])
        elif not isinstance(copy.get("content"), (str, type(None))):
            raise RequestError(f"the content of message {index} must be text, got {type(copy['content']).__name__}")
        cleaned.append(copy)
    if not cleaned:
        raise RequestError("messages is empty: give at least one message")
    return cleaned


def _check_role(index: int, role: object, tokenizer: Tokenizer) -> None:
    """Templates write '<|' + role + '|>': a role must not be able to choose a control token of another meaning."""
    if not isinstance(role, str) or not re.fullmatch(r"[\w.\-]{1,64}", role):
        raise RequestError(f"the role of message {index} must be a word such as 'user' or 'assistant', got {role!r}")
    if role not in _ROLES and any(role in name for name in tokenizer.control):
        raise RequestError(f"the role of message {index}, {role!r}, is part of a control token: use another name")


def _part_text(index: int, part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RequestError(f"message {index} has a content part of type {kind!r}: only text is supported")


class _Swap:
    """Hides the spellings of control tokens in user text, one character for one, and shows them again."""

    def __init__(self, control: Iterable[str], seen: object) -> None:
        self.control = sorted(control, key=len, reverse=True)
        used = {c for text in _strings(seen) for c in text if ord(c) in _PRIVATE}
        free = (chr(c) for c in _PRIVATE if chr(c) not in used)
        starts = sorted({name[0] for name in self.control})
        try:
            self.hidden = {start: next(free) for start in starts}
        except StopIteration:
            raise RequestError(
                "the messages use every private Unicode character: there is none left to mark them"
            ) from None
        self.shown = str.maketrans({private: start for start, private in self.hidden.items()})
        # Every occurrence, overlapping ones too: a look-ahead consumes just the character to swap.
        pattern = "|".join(f"{re.escape(start)}(?={_rest(start, self.control)})" for start in starts)
        self.whole = re.compile(pattern) if starts else None
        self.longest = len(self.control[0]) if self.control else 0

    def hide(self, value: Any) -> Any:
        """A copy of nested messages with every string made harmless."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, Mapping):
            return {self.hide(k): self.hide(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(v) for v in value]
        return value

    def _hide_text(self, text: str) -> str:
        if self.whole is None:
            return text
        text = self.whole.sub(lambda match: self.hidden[match[0]], text)
        body = text.rstrip()  # a template may trim, and so bring an unfinished token to the end
        for start in range(max(0, len(body) - self.longest), len(body)):
            tail = body[start:]
            if tail[0] in self.hidden and any(name.startswith(tail) for name in self.control):
                text = text[:start] + self.hidden[tail[0]] + text[start + 1 :]
        return text

    def show(self, text: str) -> str:
        """``text`` with the user's own characters back in place."""
        return text.translate(self.shown)


def _rest(start: str, control: list[str]) -> str:
    """Alternatives of what follows ``start`` in the control tokens that begin with it."""
    return "|".join(re.escape(name[1:]) for name in control if name[0] == start)


def _strings(value: object) -> Iterable[str]:
    """Every string inside nested messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _strings(key)
            yield from _strings(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings(inner)
