"""What generation returns, in vLLM's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Logprob:
    """One token's log probability on the raw logits, before temperature and filters.

    ``rank`` counts from 1, the most likely; None for a sampled token outside the best that were asked for.
    """

    logprob: float
    rank: int | None
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One completion of a prompt.

    ``token_ids`` ends with the token that stopped it, if one did; ``text`` holds neither that nor a stop string.
    ``logprobs`` has one dict for each token, by token id: the sampled one and the best asked for.
    ``finish_reason`` is "stop" (end of text, stop token or stop string), "length" or "abort".
    """

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None


@dataclass(frozen=True)
class RequestOutput:
    """A prompt (``prompt`` is None when token ids were given) and its ``n`` completions.

    ``prompt_logprobs``, if asked for, has None for the first prompt token and a dict like those of
    ``CompletionOutput.logprobs`` for each other.
    """

    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None


@dataclass(frozen=True)
class EmbeddingOutput:
    """A prompt and the pooled final hidden state of its tokens, [hidden_size] numbers, not normalized."""

    prompt: str | None
    prompt_token_ids: Sequence[int]
    embedding: list[float]


@dataclass(frozen=True)
class StreamDelta:
    """What is new: text certain to stay, and the tokens behind it. ``str()`` of it is the text.

    ``logprobs``, if asked for, are those of the tokens, as in ``CompletionOutput``; ``finish_reason`` comes with the
    last piece.
    """

    text: str
    token_ids: Sequence[int]
    finish_reason: str | None
    logprobs: list[dict[int, Logprob]] | None = None

    def __str__(self) -> str:
        return self.text
