"""The Python API: a model that generates."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ridgeline.api.frontend import Frontend, Input, Params, need_whole
from ridgeline.api.inputs import Message, Prompt, refuse_unknown
from ridgeline.api.outputs import EmbeddingOutput, RequestOutput, StreamDelta
from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import RequestError
from ridgeline.core.types import SamplingParams
from ridgeline.engine.load import Runtime, load_runtime
from ridgeline.engine.request import Request


class LLM:
    """A loaded model. Calls from several threads take turns, step by step, and an exception in one (Ctrl-C too) drops
    the requests of all; AsyncLLM is for many callers. A fork of the process has to load its own.

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

    @property
    def _frontend(self) -> Frontend:
        return Frontend(self.runtime)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        **unknown: Any,
    ) -> list[RequestOutput]:
        """Complete prompts, as many at once as fit; results are in the order of the prompts.

        Args:
            prompts: a text, a list of token ids, either as ``{"prompt": ...}`` or ``{"prompt_token_ids": ...}``, or a
                list of these.
            sampling_params: one for all, or one for each; vLLM's defaults when None.

        Raises RequestError, before anything runs, when one of them can never be served.
        """
        refuse_unknown("LLM.generate", unknown, ["prompts", "sampling_params"])
        return self._run(self._frontend.prompts(prompts), sampling_params)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        **unknown: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, a list of ``{"role": ..., "content": ...}``, or a list of conversations.

        The model's own chat template is used; what a message says never becomes a control token.
        """
        refuse_unknown("LLM.chat", unknown, ["messages", "sampling_params"])
        return self._run(self._frontend.conversations(messages), sampling_params)

    def stream(
        self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None, **unknown: Any
    ) -> Iterator[StreamDelta]:
        """Complete one prompt (or conversation), piece by piece as it is generated.

        The request is checked at once and starts with the first ``next``; closing the iterator drops it.
        """
        refuse_unknown("LLM.stream", unknown, ["prompt", "sampling_params"])
        return self._deltas(self._frontend.streamed("LLM", prompt, sampling_params))

    def _deltas(self, request: Request) -> Iterator[StreamDelta]:
        engine, frontend = self.runtime.engine, self._frontend
        sent, reason = 0, None
        engine.submit([request])
        try:
            while reason is None:
                text, ids, scores, reason = engine.news(request, sent)  # a step of another caller may have served it
                if ids:
                    sent += len(ids)
                    yield frontend.delta(text, ids, scores, reason)
                elif reason is None:
                    self.runtime.engine.step()  # raises once the LLM is closed
            need_whole(request)
        finally:
            engine.abort(request)

    def _run(self, inputs: Sequence[Input], sampling_params: Params) -> list[RequestOutput]:
        frontend = self._frontend
        groups = frontend.groups(inputs, sampling_params)
        self._serve([request for group in groups for request in group])
        return frontend.outputs(inputs, groups)

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
            need_whole(request)

    def embed(self, prompts: Prompt | Sequence[Prompt], pooling: str = "mean", **unknown: Any) -> list[EmbeddingOutput]:
        """The pooled final hidden states of prompts, in their order.

        Args:
            prompts: as of ``generate``.
            pooling: "mean" over all tokens (added up in their order, in float64) or the "last" token's.
        """
        refuse_unknown("LLM.embed", unknown, ["prompts", "pooling"])
        frontend = self._frontend
        inputs = frontend.prompts(prompts)
        requests = frontend.pooled(inputs, pooling)
        self._serve(requests)
        return frontend.embeddings(inputs, requests)

    def dump_flight_record(self, path: str | os.PathLike[str]) -> Path:
        """Write the engine's last steps to ``path``; ``ridgeline replay`` runs them again and compares every bit.

        After an exception out of a step these are the steps up to it. The file holds the tokens of prompts.
        Raises ConfigError with flight_record_steps=0, RidgelineError when no step has run, OSError.
        """
        return self.runtime.engine.dump_flight_record(path)

    def close(self) -> None:
        """Let the model's memory and threads go; the LLM cannot be used after."""
        self._runtime = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
