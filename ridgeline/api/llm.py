"""The Python API: a model that generates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from ridgeline.api.outputs import CompletionOutput, EmbeddingOutput, Logprob, RequestOutput, StreamDelta
from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import RequestError, RidgelineError
from ridgeline.core.types import SamplingParams, unknown_argument
from ridgeline.engine.load import Runtime, load_runtime
from ridgeline.engine.request import Request, Scored

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A loaded model. Not for use from several threads at once.

    Args:
        model: alias ("smollm2") or path of a GGUF file.
        **options: fields of EngineConfig, such as ``threads`` or ``max_num_seqs``.

    Raises ModelFileError, UnsupportedError or ConfigError, each with what is wrong and what to do.
    """

    def __init__(self, model: str = "smollm2", **options: Any) -> None:
        self.config = EngineConfig(model=model, **options)
        self._runtime: Runtime | None = load_runtime(self.config)

    @property
    def runtime(self) -> Runtime:
        """The parts it is made of: model, plan, executor, engine, tokenizer. Raises RequestError once closed."""
        if self._runtime is None:
            raise RequestError("this LLM is closed: make a new one")
        return self._runtime

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **unknown: Any,
    ) -> list[RequestOutput]:
        """Complete prompts, as many at once as fit; results are in the order of the prompts.

        Args:
            prompts: a text, a list of token ids, or a list of these.
            sampling_params: one for all, or one for each; vLLM's defaults when None.

        Raises RequestError, before anything runs, when one of them can never be served.
        """
        _refuse("LLM.generate", unknown, ["prompts", "sampling_params"])
        inputs = _as_prompts(prompts)
        return self._run([(p if isinstance(p, str) else None, self._encode(p)) for p in inputs], sampling_params)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **unknown: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, a list of ``{"role": ..., "content": ...}``, or a list of conversations.

        The model's own chat template is used; what a message says never becomes a control token.
        """
        _refuse("LLM.chat", unknown, ["messages", "sampling_params"])
        return self._run([(None, self._encode_chat(c)) for c in _as_conversations(messages)], sampling_params)

    def stream(
        self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None, **unknown: Any
    ) -> Iterator[StreamDelta]:
        """Complete one prompt (or conversation), piece by piece as it is generated.

        The request is checked at once and starts with the first ``next``; closing the iterator drops it.
        """
        _refuse("LLM.stream", unknown, ["prompt", "sampling_params"])
        if not isinstance(prompt, str) and not _is_list(prompt):
            raise RequestError(
                f"prompt must be a text, a list of token ids or a list of messages, got {type(prompt).__name__}"
            )
        params = _params_for(1, sampling_params)[0]
        if params.n != 1 or params.prompt_logprobs is not None:
            raise RequestError("LLM.stream gives one completion and no prompt_logprobs: use LLM.generate for these")
        ids = self._encode_chat(prompt) if _is_chat(prompt) else self._encode(prompt)  # type: ignore[arg-type]
        request = self.runtime.engine.make_request(ids, params, stream=True)
        return self._deltas(request)

    def _deltas(self, request: Request) -> Iterator[StreamDelta]:
        engine, text = self.runtime.engine, request.text
        assert text is not None
        sent = 0
        engine.submit([request])
        try:
            while True:
                if sent == len(request.output_ids):
                    if request.finish_reason is not None:
                        break
                    engine.step()
                ids = request.output_ids[sent:]  # another stream's step may have served this one too
                if ids:
                    sent += len(ids)
                    yield StreamDelta(text.take(), ids, request.finish_reason)
            _need_whole(request)
        finally:
            engine.abort(request)

    def _run(
        self,
        inputs: Sequence[tuple[str | None, Sequence[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[RequestOutput]:
        engine = self.runtime.engine
        params = _params_for(len(inputs), sampling_params)
        groups = [engine.make_requests(ids, p) for (_, ids), p in zip(inputs, params, strict=True)]
        self._serve([request for group in groups for request in group])
        return [
            RequestOutput(prompt, list(ids), [self._completion(r) for r in group], self._prompt_logprobs(group[0]))
            for (prompt, ids), group in zip(inputs, groups, strict=True)
        ]

    def _serve(self, requests: Sequence[Request]) -> None:
        """Run requests to their ends; raises RidgelineError when one of them failed."""
        engine = self.runtime.engine
        try:
            engine.submit(requests)
            while any(r.finish_reason is None for r in requests):
                engine.step()
        finally:
            for request in requests:
                engine.abort(request)
        for request in requests:
            _need_whole(request)

    def embed(self, prompts: Prompt | Sequence[Prompt], pooling: str = "mean", **unknown: Any) -> list[EmbeddingOutput]:
        """The pooled final hidden states of prompts, in their order.

        Args:
            prompts: a text, a list of token ids, or a list of these.
            pooling: "mean" over all tokens (added up in their order, in float64) or the "last" token's.
        """
        _refuse("LLM.embed", unknown, ["prompts", "pooling"])
        inputs = [(p if isinstance(p, str) else None, self._encode(p)) for p in _as_prompts(prompts)]
        requests = [self.runtime.engine.make_pooling_request(ids, pooling) for _, ids in inputs]
        self._serve(requests)
        return [
            EmbeddingOutput(prompt, list(ids), r.pooled.tolist() if r.pooled is not None else [])
            for (prompt, ids), r in zip(inputs, requests, strict=True)
        ]

    def _completion(self, request: Request) -> CompletionOutput:
        tokenizer = self.runtime.tokenizer
        ids = request.output_ids
        if request.text is not None:
            text = request.text.text
        else:
            kept = ids[:-1] if ids and ids[-1] in request.stop_ids else ids
            text = tokenizer.decode(kept, continuation=True)
        return CompletionOutput(request.index, text, ids, self._logprobs(request), request.finish_reason)

    def _logprobs(self, request: Request) -> list[dict[int, Logprob]] | None:
        if request.logprobs is None:
            return None
        return [self._ranked(t, s) for t, s in zip(request.output_ids, request.logprobs, strict=True)]

    def _prompt_logprobs(self, request: Request) -> list[dict[int, Logprob] | None] | None:
        if request.prompt_logprobs is None:
            return None
        following = request.prompt[1:]
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
        return self.runtime.tokenizer.decode([token], skip_special=False, continuation=True)

    def _encode(self, prompt: Prompt) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        if not prompt:
            raise RequestError("the prompt is empty: give at least one token")
        return self.runtime.tokenizer.encode(prompt)

    def _encode_chat(self, messages: Sequence[Message]) -> Sequence[int]:
        return self.runtime.chat_template().encode(list(messages), self.runtime.tokenizer, add_generation_prompt=True)

    def close(self) -> None:
        """Let the model's memory and threads go; the LLM cannot be used after."""
        self._runtime = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _refuse(owner: str, unknown: Mapping[str, Any], known: list[str]) -> None:
    for name in unknown:
        raise RequestError(unknown_argument(owner, name, known))


def _need_whole(request: Request) -> None:
    if request.error is not None:
        raise RidgelineError(request.error)
    if request.finish_reason == "abort":
        raise RidgelineError("the request was dropped because a step beside it failed: send it again")


def _is_list(value: Any) -> bool:
    """Whether a value can be a list of something: text, bytes, mappings and sets are not."""
    wrong = (str, bytes, bytearray, memoryview, Mapping)
    return (isinstance(value, Sequence) or getattr(value, "ndim", 0) > 0) and not isinstance(value, wrong)


def _as_conversations(messages: Any) -> list[Sequence[Message]]:
    """One or several conversations as a list of conversations."""
    what = 'a list of {"role": ..., "content": ...} messages, or a list of such lists'
    if not _is_list(messages):
        raise RequestError(f"messages must be {what}, got {type(messages).__name__}")
    if len(messages) == 0:
        raise RequestError("there are no messages: give at least one")
    several = _is_list(messages[0])
    for entry in messages:
        if not (_is_list(entry) if several else isinstance(entry, Mapping)):
            raise RequestError(f"messages must be {what}, got one of type {type(entry).__name__}")
    return list(messages) if several else [messages]


def _is_chat(prompt: Any) -> bool:
    return not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _as_prompts(prompts: Any) -> list[Prompt]:
    """One or several prompts as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    if not _is_list(prompts):
        raise RequestError(
            f"prompts must be a text, a list of token ids or a list of these, got {type(prompts).__name__}"
        )
    items = list(prompts)
    if items and all(not isinstance(p, str) and not hasattr(p, "__len__") for p in items):
        return [items]
    for prompt in items:
        if not isinstance(prompt, str) and not _is_list(prompt):
            raise RequestError(f"a prompt must be a text or a list of token ids, got {type(prompt).__name__}")
    return items


def _params_for(number: int, params: SamplingParams | Sequence[SamplingParams] | None) -> list[SamplingParams]:
    """``number`` sampling parameters from none, one for all, or one for each."""
    if params is None:
        params = SamplingParams()
    several = list(params) if isinstance(params, Sequence) else [params] * number
    if len(several) != number:
        raise RequestError(f"{number} prompts came with {len(several)} sampling parameters: give one, or one for each")
    for p in several:
        if not isinstance(p, SamplingParams):
            raise RequestError(f"sampling_params must be SamplingParams, got {type(p).__name__}")
    return several
