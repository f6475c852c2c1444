"""The Python API for asyncio: many callers, one engine in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncGenerator, Hashable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ridgeline.api.frontend import Frontend, Input, Params
from ridgeline.api.inputs import Message, Prompt, refuse_unknown
from ridgeline.api.outputs import EmbeddingOutput, RequestOutput, StreamDelta
from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import ConfigError, RequestError, RidgelineError
from ridgeline.core.types import SamplingParams
from ridgeline.engine.load import Runtime, load_runtime
from ridgeline.engine.request import Request, Scored
from ridgeline.engine.service import EngineService, Event, Job

_OPTIONS = ["priority", "cache_salt", "request_id"]


class AsyncLLM:
    """A loaded model for asyncio callers, of one event loop or of several in as many threads.

    Results are those of LLM, bit for bit. A request is dropped, and its cache is free within one step, when the task
    that awaits it is cancelled, its stream is closed, or ``abort`` is called. When the engine fails, every caller gets
    an EngineDeadError, and so does every call after.

    Args:
        model: alias ("smollm2") or path of a GGUF file.
        max_undelivered_tokens: a stream with more tokens than this that its reader has not taken ends with a
            SlowReaderError, for that reader alone.
        **options: fields of EngineConfig, such as ``threads`` or ``max_num_seqs``.

    Raises ModelFileError, UnsupportedError or ConfigError, each with what is wrong and what to do.

    Options of ``generate``, ``chat`` and ``stream``:
        priority: an integer; less is earlier.
        cache_salt: a request shares cached prefixes only with requests of the same salt.
        request_id: a name to ``abort`` it by, of no other request at the time.
    """

    def __init__(self, model: str = "smollm2", *, max_undelivered_tokens: int = 4096, **options: Any) -> None:
        bound = max_undelivered_tokens
        if isinstance(bound, bool) or not isinstance(bound, int) or bound < 1:
            raise ConfigError(f"max_undelivered_tokens must be an integer of at least 1, got {bound!r}")
        self.config = EngineConfig(model=model, **options)
        self._runtime: Runtime | None = load_runtime(self.config)
        self._service = EngineService(self._runtime.engine, max_undelivered_tokens=bound)
        self._jobs: dict[str, Job] = {}  # by request_id
        # Also when it is forgotten unclosed, and before the interpreter exits: native code must not outlive that.
        self._finalizer = weakref.finalize(self, self._service.close)

    @property
    def runtime(self) -> Runtime:
        """The parts it is made of: model, plan, executor, tokenizer; its engine is the thread's, see ``service``."""
        if self._runtime is None:
            raise RequestError("this AsyncLLM is closed: make a new one")
        return self._runtime

    @property
    def service(self) -> EngineService:
        """What runs the engine; ``service.call`` lets its thread look at it."""
        return self._service

    @property
    def _frontend(self) -> Frontend:
        frontend = Frontend(self.runtime)
        self._service.check_alive()
        return frontend

    async def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        *,
        priority: int = 0,
        cache_salt: Hashable = None,
        request_id: str | None = None,
        **unknown: Any,
    ) -> list[RequestOutput]:
        """Complete prompts; results are in the order of the prompts. Arguments and results as those of LLM.generate.

        Raises, before anything runs, RequestError when one of the prompts can never be served and QueueFullError
        beyond the queue's bounds.
        """
        refuse_unknown("AsyncLLM.generate", unknown, ["prompts", "sampling_params", *_OPTIONS])
        frontend = self._frontend
        inputs = frontend.prompts(prompts)
        groups = frontend.groups(inputs, sampling_params, priority=priority, cache_salt=cache_salt)
        return await self._outputs(frontend, inputs, groups, request_id)

    async def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        priority: int = 0,
        cache_salt: Hashable = None,
        request_id: str | None = None,
        **unknown: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of conversations, as LLM.chat; raises what ``generate`` does."""
        refuse_unknown("AsyncLLM.chat", unknown, ["messages", "sampling_params", *_OPTIONS])
        frontend = self._frontend
        inputs = frontend.conversations(messages)
        groups = frontend.groups(inputs, sampling_params, priority=priority, cache_salt=cache_salt)
        return await self._outputs(frontend, inputs, groups, request_id)

    async def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling: str = "mean",
        *,
        request_id: str | None = None,
        **unknown: Any,
    ) -> list[EmbeddingOutput]:
        """The pooled final hidden states of prompts, as LLM.embed; raises what ``generate`` does."""
        refuse_unknown("AsyncLLM.embed", unknown, ["prompts", "pooling", "request_id"])
        frontend = self._frontend
        inputs = frontend.prompts(prompts)
        requests = frontend.pooled(inputs, pooling)
        if await self._run(requests, request_id) == "abort":
            raise RidgelineError("the embedding was aborted")
        return frontend.embeddings(inputs, requests)

    def stream(
        self,
        prompt: Prompt | Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: Hashable = None,
        request_id: str | None = None,
        **unknown: Any,
    ) -> AsyncGenerator[StreamDelta]:
        """Complete one prompt (or conversation), piece by piece as it is generated.

        The request is checked at once and starts with the first ``anext``; closing the stream drops it. A reader that
        lags gets in one piece what has come meanwhile. The last piece has a ``finish_reason``.
        """
        refuse_unknown("AsyncLLM.stream", unknown, ["prompt", "sampling_params", *_OPTIONS])
        frontend = self._frontend
        request = frontend.streamed("AsyncLLM", prompt, sampling_params, priority=priority, cache_salt=cache_salt)
        return self._deltas(frontend, request, request_id)

    async def abort(self, request_id: str) -> bool:
        """Drop the request of that name; False when there is none, or it has ended.

        Its caller gets what there is so far, with finish_reason "abort" (of an embedding, a RidgelineError).
        """
        job = self._jobs.get(request_id)
        return job is not None and await asyncio.wrap_future(self._service.abort(job))

    async def dump_flight_record(self, path: str | os.PathLike[str]) -> Path:
        """Write the engine's last steps to ``path``, between two steps; see LLM.dump_flight_record."""
        return await asyncio.wrap_future(self._service.call(lambda engine: engine.dump_flight_record(path)))

    async def _deltas(
        self, frontend: Frontend, request: Request, request_id: str | None
    ) -> AsyncGenerator[StreamDelta]:
        reader = _Reader([request], stream=True)
        self._start(reader, request_id)
        try:
            while True:
                text, ids, scores, reason = await reader.read()
                yield frontend.delta(text, ids, scores, reason)
                if reason is not None:
                    return
        finally:
            self._leave(reader, request_id)

    async def _outputs(
        self, frontend: Frontend, inputs: Sequence[Input], groups: Sequence[Sequence[Request]], request_id: str | None
    ) -> list[RequestOutput]:
        await self._run([request for group in groups for request in group], request_id)
        return frontend.outputs(inputs, groups)

    async def _run(self, requests: Sequence[Request], request_id: str | None) -> str:
        """Run requests to their ends; why they ended, "abort" if they were taken back."""
        reader = _Reader(requests)
        self._start(reader, request_id)
        try:
            reason = (await reader.read())[3]
            assert reason is not None
            return reason
        finally:
            self._leave(reader, request_id)

    def _start(self, job: Job, request_id: str | None) -> None:
        if request_id is not None and self._jobs.setdefault(request_id, job) is not job:
            raise RequestError(f"request_id {request_id!r} is in use: give each running request its own")
        try:
            self._service.submit(job)
        except BaseException:
            self._forget(request_id)
            raise

    def _leave(self, job: Job, request_id: str | None) -> None:
        """The caller is done with its job, or gone."""
        self._forget(request_id)
        self._service.leave(job)

    def _forget(self, request_id: str | None) -> None:
        if request_id is not None:
            del self._jobs[request_id]

    def close(self) -> None:
        """Drop what runs, each caller getting an EngineDeadError, and let the model's memory and threads go.

        Waits for the step under way. The AsyncLLM cannot be used after.
        """
        self._runtime = None
        self._finalizer()

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)


class _Reader(Job):
    """A job as its caller sees it, in the thread of the caller's event loop."""

    def __init__(self, requests: Sequence[Request], *, stream: bool = False) -> None:
        self._loop = asyncio.get_running_loop()
        super().__init__(requests, self._loop, stream=stream)
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._scores: list[Scored] | None = None
        self._last: Event | None = None
        self._waiter: asyncio.Future[None] | None = None

    def receive(self, event: Event) -> None:
        """Keep what is new for ``read``."""
        self._texts.append(event.text)
        self._ids += event.token_ids
        if event.scores is not None:
            self._scores = self._scores or []
            self._scores += event.scores
        if event.ends:
            self._last = event
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def read(self) -> tuple[str, list[int], list[Scored] | None, str | None]:
        """All that is new: text, tokens, their scores if asked for, and the reason when that was the end.

        Raises the job's error once everything before it has been read.
        """
        while not self._ids and self._last is None:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        error = None if self._last is None else self._last.error
        if error is not None and not self._ids:
            raise error
        news = ("".join(self._texts), self._ids, self._scores)
        self.num_read += len(self._ids)
        self._texts, self._ids, self._scores = [], [], None
        return *news, None if self._last is None else self._last.reason
