"""What a caller may hand in as prompts, conversations and sampling parameters; anything else is refused in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from ridgeline.core.errors import RequestError
from ridgeline.core.types import SamplingParams, unknown_argument

Plain = str | Sequence[int]
"""A text or token ids."""

Prompt = Plain | Mapping[str, Any]
"""A text or token ids, or either in vLLM's form: ``{"prompt": text}``, ``{"prompt_token_ids": ids}``."""

Message = Mapping[str, Any]
"""``{"role": ..., "content": ...}``."""


def refuse_unknown(owner: str, unknown: Mapping[str, Any], known: list[str]) -> None:
    """Raise RequestError for the first of ``unknown`` arguments of ``owner``, with the nearest it does know."""
    for name in unknown:
        raise RequestError(unknown_argument(owner, name, known))


def as_prompt(prompt: Any) -> Plain:
    """A prompt as text or token ids; raises RequestError for what is none. Of a mapping that has both, the ids."""
    if isinstance(prompt, Mapping):
        for key in prompt:
            if key not in ("prompt", "prompt_token_ids"):
                raise RequestError(f'a prompt has no {key!r}, only "prompt" or "prompt_token_ids"; chat takes messages')
        ids = prompt.get("prompt_token_ids")
        if isinstance(ids, str):
            raise RequestError('"prompt_token_ids" must be a list of token ids, got a text: that is "prompt"')
        prompt = prompt.get("prompt") if ids is None else ids
        if prompt is None:
            raise RequestError(
                'a prompt must be a text or a list of token ids: "prompt" and "prompt_token_ids" are missing'
            )
    if isinstance(prompt, str):
        return prompt
    if not is_list(prompt):
        raise RequestError(f"a prompt must be a text or a list of token ids, got {type(prompt).__name__}")
    tokens: Sequence[int] = prompt
    return tokens


def as_prompts(prompts: Any) -> list[Plain]:
    """One or several prompts as a list of prompts; raises RequestError for what is neither."""
    if isinstance(prompts, str | Mapping):
        return [as_prompt(prompts)]
    if not is_list(prompts):
        raise RequestError(
            f"prompts must be a text, a list of token ids or a list of these, got {type(prompts).__name__}"
        )
    items = list(prompts)
    if items and all(not hasattr(p, "__len__") for p in items):
        return [items]
    return [as_prompt(prompt) for prompt in items]


def as_conversations(messages: Any) -> list[Sequence[Message]]:
    """One or several conversations as a list of conversations; raises RequestError for what is neither."""
    what = 'a list of {"role": ..., "content": ...} messages, or a list of such lists'
    if not is_list(messages):
        raise RequestError(f"messages must be {what}, got {type(messages).__name__}")
    if len(messages) == 0:
        raise RequestError("there are no messages: give at least one")
    several = is_list(messages[0])
    for entry in messages:
        if not (is_list(entry) if several else isinstance(entry, Mapping)):
            raise RequestError(f"messages must be {what}, got one of type {type(entry).__name__}")
    return list(messages) if several else [messages]


def as_params(number: int, params: Any) -> list[SamplingParams]:
    """``number`` sampling parameters from None (the defaults), one for all, or one for each; or RequestError."""
    if params is None:
        params = SamplingParams()
    several = list(params) if isinstance(params, Sequence) else [params] * number
    if len(several) != number:
        raise RequestError(f"{number} prompts came with {len(several)} sampling parameters: give one, or one for each")
    for p in several:
        if not isinstance(p, SamplingParams):
            raise RequestError(f"sampling_params must be SamplingParams, got {type(p).__name__}")
    return several


def is_list(value: Any) -> bool:
    """Whether a value can be a list of something: text, bytes, mappings and sets are not."""
    wrong = (str, bytes, bytearray, memoryview, Mapping)
    return (isinstance(value, Sequence) or getattr(value, "ndim", 0) > 0) and not isinstance(value, wrong)


def is_chat(prompt: Plain | Sequence[Message]) -> TypeGuard[Sequence[Message]]:
    """Whether it is a list of messages."""
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
