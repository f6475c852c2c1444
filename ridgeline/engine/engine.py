"""The seam: the scheduler's plans become batches for an executor, and its outputs tokens of requests."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from ridgeline.core.errors import ConfigError, ForkedError, QueueFullError, RequestError, RidgelineError
from ridgeline.core.ranges import Wrap, trace
from ridgeline.core.types import Executor, Int32, SamplingParams, StepOutput, Ticket
from ridgeline.engine.batching import BatchBuilder
from ridgeline.engine.intake import Intake, WordEncoder
from ridgeline.engine.limits import EngineLimits
from ridgeline.engine.recorder import FlightRecorder
from ridgeline.engine.request import Request, Scored
from ridgeline.engine.text import Detokenizer
from ridgeline.kvcache.cache import CacheGroup, KVCache
from ridgeline.scheduler.budget import StepBudget
from ridgeline.scheduler.ngram import NgramDrafter
from ridgeline.scheduler.plan import Chunk, StepPlan
from ridgeline.scheduler.scheduler import Scheduler, Stats
from ridgeline.scheduler.sequence import State

__all__ = ["Engine", "EngineLimits"]

NOT_NUMBERS = "the model's logits are not numbers (NaN): its weights are damaged, or the prompt overflows them"
NOTHING_LEFT = "bad_words leave no token to sample, or the model's logits are not numbers (NaN)"


def _microseconds() -> int:
    return time.monotonic_ns() // 1000


class Engine:
    """Runs requests on an executor. Several threads may use it: a step of one serves the requests of all, and an
    exception in one drops the requests of all.

    Args:
        executor: runs the steps; its slots and blocks are as many as ``limits`` says.
        limits: what may be held at once, and the options.
        eos_ids: tokens that end every request but those that ignore them.
        detokenizer: makes a fresh detokenizer; needed for streaming and for stop strings.
        encode_word: encodes the bad words of a request; without it they must be token ids.
        seed: draws the seeds of requests that bring none; None takes them from the system.
        clock: microseconds, for the step latency target; any that may jump.
        recorder: keeps the last steps; None: they are not kept.
    """

    def __init__(
        self,
        executor: Executor,
        limits: EngineLimits,
        *,
        eos_ids: Iterable[int] = (),
        detokenizer: Callable[[], Detokenizer] | None = None,
        encode_word: WordEncoder | None = None,
        seed: int | None = None,
        clock: Callable[[], int] | None = None,
        recorder: FlightRecorder | None = None,
    ) -> None:
        self.limits = limits
        self._lock = threading.RLock()  # held by whoever changes what is queued or runs
        self._process = os.getpid()
        self._stepping = False
        self._left: list[Request] = []  # aborted amid a step by its own thread, as a finalizer may
        self._executor = executor
        self._clock = clock or _microseconds
        self._recorder = recorder
        windows = limits.windows or [0] * len(limits.num_blocks)
        groups = [CacheGroup(n, w) for n, w in zip(limits.num_blocks, windows, strict=True)]
        self._cache = KVCache(groups, limits.block_size, sharing=limits.prefix_sharing)
        self._scheduler = Scheduler(
            self._cache,
            max_running=limits.max_requests,
            max_rows=limits.max_rows,
            budget=StepBudget(limits.max_tokens, limits.step_target_us),
            max_preemptions=limits.max_preemptions,
            aging_steps=limits.priority_aging_steps,
        )
        self._intake = Intake(limits, self._cache, eos_ids, detokenizer, encode_word, seed)
        self._builder = BatchBuilder(limits.max_requests, len(groups))
        self._open: deque[tuple[Ticket, StepPlan]] = deque()
        self._sampled: Int32 | None = None  # token ids of the step finished last
        self._finished_us = 0
        self._finished: StepPlan | None = None  # the step finished last

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs, or a step is under way."""
        return bool(self._open) or self._scheduler.has_work

    @property
    def num_running(self) -> int:
        """Requests that hold a slot."""
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue, and those that wait for another's prefix."""
        return len(self._scheduler.queue) + len(self._scheduler.parked)

    @property
    def num_cached_blocks(self) -> int:
        """Blocks that nobody holds, kept for whoever brings the same prefix; over all groups."""
        return sum(pool.num_cached for pool in self._cache.pools)

    @property
    def num_held_blocks(self) -> int:
        """Blocks that somebody holds; over all groups. None when the engine is idle."""
        return sum(pool.num_blocks - pool.num_available for pool in self._cache.pools)

    @property
    def served(self) -> list[Request]:
        """Of whom the step finished last has computed something: nobody else has a new token, or has ended by it."""
        plan = self._finished
        return [] if plan is None else cast(list[Request], [*plan.decodes, *(c.sequence for c in plan.chunks)])

    def stats(self) -> Stats:
        """Counters since the start; they go on counting in the object returned."""
        return self._scheduler.stats

    # -- requests ------------------------------------------------------------------------------------------------

    def make_request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        stream: bool = False,
        priority: int = 0,
        cache_salt: Hashable = None,
        index: int = 0,
        parent: Request | None = None,
    ) -> Request:
        """A request for one sample, checked but not yet queued. Raises RequestError for one that can never be served.

        Args:
            prompt_ids: token ids; those of ``parent`` are taken if there is one.
            params: how to sample; ``params.n`` is up to ``make_requests``.
            stream: keep its text up to date after every step.
            priority: less is earlier.
            cache_salt: it shares cached prefixes only with requests of the same salt.
            index: which of several samples of one prompt.
            parent: the first of these samples, from whose cache it starts.
        """
        return self._intake.request(prompt_ids, params, stream, priority, cache_salt, index, parent)

    def make_requests(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        stream: bool = False,
        priority: int = 0,
        cache_salt: Hashable = None,
    ) -> list[Request]:
        """``params.n`` requests for samples of one prompt; only the first reports prompt logprobs."""
        values = {"stream": stream, "priority": priority, "cache_salt": cache_salt}
        first = self.make_request(prompt_ids, params, **values)  # type: ignore[arg-type]
        return [first] + [
            self.make_request(prompt_ids, params, index=i, parent=first, **values)  # type: ignore[arg-type]
            for i in range(1, params.n)
        ]

    def make_pooling_request(self, prompt_ids: Sequence[int], pooling: str) -> Request:
        """A request for a prompt's final hidden states, their "mean" or the "last"; ``pooled`` is its result."""
        return self._intake.pooling(prompt_ids, pooling)

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests behind those that wait already.

        Raises, taking none: QueueFullError beyond the bounds, RequestError for one that was submitted before.
        """
        requests = list(requests)
        self._check_process()
        with self._lock:
            self._queue(requests)

    def _queue(self, requests: list[Request]) -> None:
        limits, queue = self.limits, self._scheduler.queue
        number, tokens = len(requests), sum(r.num_tokens for r in requests)
        for name, most, waiting, more in (
            ("max_queued_requests", limits.max_queued_requests, self.num_waiting, number),
            ("max_queued_tokens", limits.max_queued_tokens, queue.num_tokens, tokens),
        ):
            if most is not None and waiting + more > most:
                raise QueueFullError(
                    f"{waiting} {name.rpartition('_')[2]} wait and {more} more would exceed {name} ({most}): "
                    "send it again later or raise the bound"
                )
        if any(r.state is not State.NEW for r in requests) or len({id(r) for r in requests}) != number:
            raise RequestError("a request is submitted once: make a new one for each run")
        for request in requests:
            self._scheduler.submit(request)

    def abort(self, request: Request) -> None:
        """Drop a request at once, if it has not ended; what it held is free once no step may still write it."""
        if os.getpid() != self._process:  # where nobody would ever give the lock back
            return
        with self._lock:
            if self._stepping:
                self._left.append(request)
            elif request.finish_reason is None:
                self._abort(request)

    def _abort(self, request: Request) -> None:
        try:
            request.end("abort")
            self._scheduler.end(request)
        except BaseException:
            self._drop_all()
            raise

    # -- steps ---------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Launch the next step and, when as many are under way as may be, take the results of the oldest.

        Every decoding request gains a token, prompts advance as far as the budget allows. When anything goes wrong,
        Ctrl-C included, all requests are dropped and the engine is idle and usable. A note on the exception says
        where the flight record is, or how to get one.
        """
        self._check_process()
        with self._lock:
            self._stepping = True
            try:
                self._step()
            finally:
                self._stepping = False
                while self._left:
                    self.abort(self._left.pop())

    def news(self, request: Request, sent: int) -> tuple[str, list[int], list[Scored] | None, str | None]:
        """What a stream that has told ``sent`` tokens has not told yet: text, token ids, their scores if it wants them;
        and why the request has ended, None if it has not."""
        assert request.text is not None
        with self._lock:
            scores = None if request.logprobs is None else request.logprobs[sent:]
            return request.text.take(), request.output_ids[sent:], scores, request.finish_reason

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise ForkedError

    def _step(self) -> None:
        try:
            plan = self._scheduler.schedule(self._clock())
            if plan.num_tokens:
                self._launch(plan)
            if self._open and (not plan.num_tokens or len(self._open) >= self.limits.max_open_steps):
                self._finish_oldest()
            elif not plan.num_tokens and self._scheduler.has_work:
                raise RidgelineError("no request can go on: this is a bug in the scheduler, please report it")
        except BaseException as error:
            self._drop_all()
            if self._recorder is not None and (note := self._recorder.failed(error)):
                error.add_note(note)
            raise

    def trace(self, wrap: Wrap) -> Callable[[], None]:
        """Wraps each step and its parts until what is returned is called; nobody else may be stepping at either."""
        methods: list[tuple[str, Any, str]] = [("step", self, "step"), ("schedule", self._scheduler, "schedule")]
        methods += [("batch", self._builder, "build")]
        methods += [(name, self._executor, name) for name in ("launch", "finish")]
        return trace(wrap, methods)

    def dump_flight_record(self, path: str | os.PathLike[str]) -> Path:
        """Write the last steps (after a failure, those before it) to ``path``, for ``ridgeline replay``.

        Raises ConfigError when steps are not recorded, RidgelineError when none has run, OSError.
        """
        if self._recorder is None:
            raise ConfigError("steps are not recorded: set flight_record_steps to how many are wanted")
        self._check_process()
        with self._lock:
            return self._recorder.write(path)

    def _launch(self, plan: StepPlan) -> None:
        batch = self._builder.build(plan, None if self._open else self._sampled)
        recorder = self._recorder
        if recorder is not None:
            recorder.launching(plan, batch)
        self._open.append((self._executor.launch(batch), plan))
        if recorder is not None:
            recorder.launched()

    def _finish_oldest(self) -> None:
        ticket, plan = self._open.popleft()
        recorder = self._recorder
        if recorder is not None:
            recorder.finishing(plan)
        output = self._executor.finish(ticket)
        if recorder is not None:
            recorder.finished(plan, output)
        now = self._clock()
        self._scheduler.finish_step(plan, now - max(plan.time_us, self._finished_us))
        self._finished_us = now
        self._sampled = output.token_ids
        tokens: list[int] = output.token_ids.tolist()
        self._finished = plan
        self._accept_decodes(plan, tokens, output)
        row, pooled = len(plan.decodes), 0
        for chunk in plan.chunks:
            request = cast(Request, chunk.sequence)
            if self._scheduler.still_runs(request, plan):
                self._accept_chunk(request, chunk, tokens, output, row, pooled)
            row += chunk.num_rows
            pooled += chunk.num_rows if request.pooling else 0

    def _accept_decodes(self, plan: StepPlan, tokens: list[int], output: StepOutput) -> None:
        """The steady path: one token for each, and no more work than that where a token means nothing else."""
        outdated = self.limits.max_open_steps > 1  # a request may have ended since the step was launched
        for row, request in enumerate(cast(list[Request], plan.decodes)):
            if outdated and not self._scheduler.still_runs(request, plan):
                continue
            token, output_ids = tokens[row], request.output_ids
            if request.plain and 0 <= token and len(output_ids) + 1 < request.next_event:
                if token not in request.stop_ids:
                    output_ids.append(token)
                    text = request.text
                    if text is not None and text.push(token, len(output_ids) > request.params.min_tokens):
                        self._stop_early(request)
                    continue
            self._accept_token(request, token, output, row)
            if request.finish_reason is None:
                self._draft(request)

    def _stop_early(self, request: Request) -> None:
        """A stop string has ended a request whose token is taken already."""
        request.end("stop")
        self._scheduler.settle(request, request.num_tokens - 1)
        self._scheduler.end(request)

    def _accept_token(self, request: Request, token: int, output: StepOutput, row: int) -> None:
        """Hand a sampled token to its request, all tokens before it being in the cache; end it if that ends it."""
        if token < 0:
            request.fail(NOTHING_LEFT if request.params.bad_words else NOT_NUMBERS)
        else:
            request.accept(token, output, row)
        if request.finish_reason is not None or len(request.output_ids) >= request.next_event:
            if token >= 0:
                self._scheduler.settle(request, request.num_tokens - 1)
            if request.finish_reason is not None:
                self._scheduler.end(request)

    def _accept_chunk(
        self, request: Request, chunk: Chunk, tokens: list[int], output: StepOutput, row: int, pooled: int
    ) -> None:
        if chunk.drafts:
            self._accept_drafts(request, chunk, tokens, output, row)
            return
        scored, rows = chunk.score_to - chunk.score_from, chunk.num_rows
        if request.pooling:
            if rows:
                request.pool(output.hidden[pooled : pooled + rows])
        elif scored:
            request.take_scores(output, row, scored)
        request.num_scored_done = max(request.num_scored_done, chunk.score_to)
        stop = chunk.start + chunk.size
        if chunk.samples and not request.pooling:
            request.next_event = 0  # the end of the prompt is looked at in any case
            self._accept_token(request, tokens[row + scored], output, row + scored)
            if request.finish_reason is None:
                self._draft(request)
            return
        self._scheduler.settle(request, stop)
        if request.pooling and stop == len(request.prompt):
            request.end("stop")
            self._scheduler.end(request)

    def _accept_drafts(self, request: Request, chunk: Chunk, tokens: list[int], output: StepOutput, row: int) -> None:
        """Take the rows of a speculated step that stand, up to the one that ends the request."""
        number = len(chunk.drafts)
        accepted = sum(output.accepted[row : row + number + 1].tolist())  # so few that a list is faster
        self._scheduler.take_drafts(request, chunk, accepted)
        if request.drafter is not None:
            request.drafter.learn(number, accepted - 1)
        for at in range(row, row + accepted):
            self._accept_token(request, tokens[at], output, at)
            if request.finish_reason is not None:
                return
            self._draft(request, last=at == row + accepted - 1)

    def _draft(self, request: Request, last: bool = True) -> None:
        """Tell the drafter, if the request speculates, of its newest token; draft after the ``last``."""
        if self.limits.speculation is None:
            return
        drafter = request.drafter
        if drafter is None:
            limits = self.limits
            known = request.span(0, request.num_tokens)
            drafter = NgramDrafter(known, limits.num_draft_tokens, limits.ngram_min, limits.ngram_max)
            request.drafter = drafter
        else:
            drafter.push(request.output_ids[-1])
        if last:
            lockstep = self.limits.max_open_steps > 1 and not drafter.waiting
            self._scheduler.set_drafts(request, drafter.draft(), lockstep)

    def _drop_all(self) -> None:
        """End everything that has not ended, and start anew."""
        while self._open:
            with suppress(Exception):
                self._executor.finish(self._open.popleft()[0])
        scheduler = self._scheduler
        for sequence in [*scheduler.running, *scheduler.parked.values(), *scheduler.queue.members()]:
            request = cast(Request, sequence)
            if request.finish_reason is None:
                request.finish_reason = "abort"
            request.move(State.FINISHED)
            request.table, request.slot = None, -1
        scheduler.reset()
        self._builder.forget_slots()
        self._sampled = self._finished = None

    def check(self) -> None:
        """Raise AssertionError unless every invariant of the scheduler and the cache holds."""
        self._scheduler.check()
        for sequence in self._scheduler.running:
            if cast(Request, sequence).finish_reason is not None:
                raise AssertionError("a request that has ended still runs")
