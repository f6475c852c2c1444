"""What LLM and AsyncLLM have in common: from a caller's input to requests, from requests to outputs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from ridgeline.api.inputs import (
    Message,
    Plain,
    Prompt,
    as_conversations,
    as_params,
    as_prompt,
    as_prompts,
    is_chat,
    is_list,
)
from ridgeline.api.outputs import CompletionOutput, EmbeddingOutput, Logprob, RequestOutput, StreamDelta
from ridgeline.core.errors import RequestError, RidgelineError
from ridgeline.core.types import SamplingParams
from ridgeline.engine.load import Runtime
from ridgeline.engine.request import Request, Scored

Params = SamplingParams | Sequence[SamplingParams] | None
Input = tuple[str | None, Sequence[int]]
"""A prompt's text (None where token ids were given) and its token ids."""


class Frontend:
    """Checks input and makes requests of it; shapes requests that have ended. Queues and runs nothing.

    Its methods keep no state between calls and only read the engine's limits, so that any thread may call them.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    # -- requests ------------------------------------------------------------------------------------------------

    def prompts(self, prompts: Prompt | Sequence[Prompt]) -> list[Input]:
        """One or several prompts, encoded; raises RequestError for what is none."""
        return [(p if isinstance(p, str) else None, self._encode(p)) for p in as_prompts(prompts)]

    def conversations(self, messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Input]:
        """One or several conversations through the chat template; raises RequestError for what is none."""
        return [(None, self._encode_chat(c)) for c in as_conversations(messages)]

    def groups(
        self, inputs: Sequence[Input], params: Params, *, priority: int = 0, cache_salt: Hashable = None
    ) -> list[list[Request]]:
        """For each input the requests of its ``n`` samples; raises RequestError if one can never be served."""
        make = self._runtime.engine.make_requests
        return [
            make(ids, p, priority=priority, cache_salt=cache_salt)
            for (_, ids), p in zip(inputs, as_params(len(inputs), params), strict=True)
        ]

    def streamed(
        self,
        owner: str,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None,
        *,
        priority: int = 0,
        cache_salt: Hashable = None,
    ) -> Request:
        """The request of ``owner``'s stream of a prompt or conversation; raises RequestError if it cannot be served."""
        if not isinstance(prompt, str | Mapping) and not is_list(prompt):
            raise RequestError(
                f"prompt must be a text, a list of token ids or a list of messages, got {type(prompt).__name__}"
            )
        one = as_params(1, params)[0]
        if one.n != 1 or one.prompt_logprobs is not None:
            raise RequestError(
                f"{owner}.stream gives one completion and no prompt_logprobs: use {owner}.generate for these"
            )
        if isinstance(prompt, Mapping):
            ids = self._encode(as_prompt(prompt))
        else:
            ids = self._encode_chat(prompt) if is_chat(prompt) else self._encode(prompt)  # type: ignore[arg-type]
        return self._runtime.engine.make_request(ids, one, stream=True, priority=priority, cache_salt=cache_salt)

    def pooled(self, inputs: Sequence[Input], pooling: str) -> list[Request]:
        """Requests for the inputs' hidden states; raises RequestError if one can never be served."""
        return [self._runtime.engine.make_pooling_request(ids, pooling) for _, ids in inputs]

    def _encode(self, prompt: Plain) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if not prompt:
            raise RequestError("the prompt is empty: give at least one token")
        return self._runtime.tokenizer.encode(prompt)

    def _encode_chat(self, messages: Sequence[Message]) -> Sequence[int]:
        template = self._runtime.chat_template()
        return template.encode(list(messages), self._runtime.tokenizer, add_generation_prompt=True)

    # -- outputs -------------------------------------------------------------------------------------------------

    def outputs(self, inputs: Sequence[Input], groups: Sequence[Sequence[Request]]) -> list[RequestOutput]:
        """The results of ``groups`` that have all ended."""
        return [
            RequestOutput(prompt, list(ids), [self._completion(r) for r in group], self._prompt_logprobs(group[0]))
            for (prompt, ids), group in zip(inputs, groups, strict=True)
        ]

    def embeddings(self, inputs: Sequence[Input], requests: Sequence[Request]) -> list[EmbeddingOutput]:
        """The results of pooling requests that have all ended."""
        return [
            EmbeddingOutput(prompt, list(ids), r.pooled.tolist() if r.pooled is not None else [])
            for (prompt, ids), r in zip(inputs, requests, strict=True)
        ]

    def delta(self, text: str, ids: Sequence[int], scores: Sequence[Scored] | None, reason: str | None) -> StreamDelta:
        """A piece of a stream: new text, the tokens behind it and, if asked for, one Scored for each."""
        return StreamDelta(text, ids, reason, self._logprobs(ids, scores))

    def _completion(self, request: Request) -> CompletionOutput:
        ids = request.output_ids
        if request.text is not None:
            text = request.text.text
        else:
            kept = ids[:-1] if ids and ids[-1] in request.stop_ids else ids
            text = self._runtime.tokenizer.decode(kept, continuation=True)
        logprobs = self._logprobs(ids, request.logprobs)
        return CompletionOutput(request.index, text, ids, logprobs, request.finish_reason)

    def _logprobs(self, ids: Sequence[int], scores: Sequence[Scored] | None) -> list[dict[int, Logprob]] | None:
        if scores is None:
            return None
        return [self._ranked(t, s) for t, s in zip(ids, scores, strict=True)]

    def _prompt_logprobs(self, request: Request) -> list[dict[int, Logprob] | None] | None:
        if request.prompt_logprobs is None:
            return None
        following = request.prompt[1 : 1 + len(request.prompt_logprobs)]  # fewer of one that was aborted
        return [None, *(self._ranked(t, s) for t, s in zip(following, request.prompt_logprobs, strict=True))]

    def _ranked(self, token: int, scored: Scored) -> dict[int, Logprob]:
        """A token's log probability and those of the best at its place, by token id."""
        own, best, values = scored
        ranked: dict[int, tuple[float, int | None]] = {
            t: (value, rank) for rank, (t, value) in enumerate(zip(best, values, strict=True), 1)
        }
        ranked.setdefault(token, (own, None))
        return {t: Logprob(v, rank, self._token_text(t)) for t, (v, rank) in ranked.items()}

    def _token_text(self, token: int) -> str:
        return self._runtime.tokenizer.decode([token], skip_special=False, continuation=True)


def need_whole(request: Request) -> None:
    """Raise RidgelineError for a request that failed, or was dropped with a step that did."""
    if request.error is not None:
        raise RidgelineError(request.error)
    if request.finish_reason == "abort":
        raise RidgelineError("the request was dropped because a step beside it failed: send it again")
