"""One engine for callers in many threads and event loops: a thread of its own runs it and hands out what is new.

Only that thread touches the engine. Callers put commands into its inbox, which it empties between two steps, and
read what it posts to their event loops: after each step one call per loop, whatever the number of requests. With
nothing to do it sleeps until a command comes.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from ridgeline.core.errors import EngineDeadError, ForkedError, RidgelineError, SlowReaderError
from ridgeline.engine.engine import Engine
from ridgeline.engine.request import Request, Scored

T = TypeVar("T")


class Loop(Protocol):
    """As much of an asyncio event loop as is needed here."""

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> object:
        """Have the loop's thread call ``callback``; raises RuntimeError when the loop is closed."""
        ...


@dataclass(frozen=True, slots=True)
class Event:
    """News of a job. The one that ends it has a ``reason`` or an ``error``, and is the last.

    Attributes:
        text, token_ids, scores: what is new of a stream; ``scores`` is None unless logprobs were asked for.
        reason: why the job has ended, "abort" if it was taken back.
        error: what its caller is to get instead of a result.
    """

    text: str = ""
    token_ids: Sequence[int] = ()
    scores: Sequence[Scored] | None = None
    reason: str | None = None
    error: RidgelineError | None = None

    @property
    def ends(self) -> bool:
        """Whether it is the last of its job."""
        return self.reason is not None or self.error is not None


class Job:
    """Requests of one caller, submitted together; a subclass says what becomes of its events.

    Args:
        requests: new ones; a stream has exactly one, made with ``stream=True``.
        loop: in whose thread ``receive`` is called.
        stream: whether each step's news is wanted, or only the end.

    ``num_read`` counts the tokens that the reader of a stream has taken; the reader keeps it, the service reads it.
    """

    def __init__(self, requests: Sequence[Request], loop: Loop, *, stream: bool = False) -> None:
        self.requests, self.loop, self.stream = requests, loop, stream
        self.num_read = 0
        # What follows is written by the service's thread alone.
        self.num_left = len(requests)  # that have not ended
        self.num_sent = 0  # tokens
        self.done = False

    def receive(self, event: Event) -> None:
        """Take the next event."""
        raise NotImplementedError


class EngineService:
    """Runs an engine in a thread of its own until it is closed or the engine fails.

    Args:
        engine: nobody else may use it from now on, but to make requests.
        max_undelivered_tokens: a stream with more tokens than this that its reader has not taken is dropped.
    """

    def __init__(self, engine: Engine, *, max_undelivered_tokens: int) -> None:
        self._engine = engine
        self._bound = max_undelivered_tokens
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._jobs: dict[Request, Job] = {}  # of every request that has not ended
        self._posts: dict[Loop, list[tuple[Job, Event]]] = {}
        self._process = os.getpid()
        self._gate = threading.RLock()  # reentrant: a finalizer may close the service amid a command of its thread
        self._death: str | None = None  # why no command is taken any more
        self._cause: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="ridgeline-engine", daemon=True)
        self._thread.start()

    # -- for any thread ------------------------------------------------------------------------------------------

    def submit(self, job: Job) -> None:
        """Queue a job's requests; every job gets one last event. Raises EngineDeadError when nothing runs any more.

        A job that would exceed the queue's bounds gets QueueFullError as its event, and runs not at all.
        """
        self._put(lambda: self._submit(job))

    def abort(self, job: Job) -> Future[bool]:
        """Drop a job before the next step; the result says whether it had not ended, and its blocks are free then.

        Blocks that a step under way may still write are free when that has ended. When nothing runs any more the
        result is False.
        """
        future: Future[bool] = Future()

        def command() -> None:
            wanted = future.set_running_or_notify_cancel()  # a caller that gave up waiting still wants it dropped
            try:
                dropped = self._abort(job, Event(reason="abort"))
            except BaseException as error:
                if wanted:
                    future.set_exception(error)
                raise  # a failure of the engine
            if wanted:
                future.set_result(dropped)

        try:
            self._put(command)
        except EngineDeadError:
            future.set_result(False)
        return future

    def leave(self, job: Job) -> None:
        """Its caller is gone: drop the job if it has not ended."""
        if not job.done:
            self.abort(job)

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Have the engine's thread call ``function`` between two steps; raises EngineDeadError as ``submit`` does.

        What it raises is the future's exception and does not harm the service.
        """
        future: Future[T] = Future()

        def command() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function(self._engine))
            except Exception as error:
                future.set_exception(error)

        self._put(command)
        return future

    def check_alive(self) -> None:
        """Raise EngineDeadError when nothing runs any more."""
        if self._death is not None:
            raise self._dead()

    def close(self) -> None:
        """End what runs, each job with an EngineDeadError, and wait for the thread. Does nothing the second time, and
        nothing in a fork."""
        if os.getpid() != self._process:
            return
        with self._gate:
            if self._death is None:
                self._inbox.put(self._close)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _put(self, command: Callable[[], None]) -> None:
        if os.getpid() != self._process:
            raise ForkedError
        with self._gate:
            self.check_alive()
            self._inbox.put(command)

    def _dead(self) -> EngineDeadError:
        error = EngineDeadError(self._death)
        error.__cause__ = self._cause
        return error

    # -- for its own thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                self._take_commands()
                if self._engine.has_work and not self._closing:
                    self._engine.step()
                    self._look_at(self._engine.served)
                self._post()
            self._die("the engine was closed: make a new one", None)
        except BaseException as error:  # whatever it is, callers must not wait for ever
            notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
            self._die(f"the engine has failed ({type(error).__name__}: {error}{notes}): make a new one", error)

    def _take_commands(self) -> None:
        """Run what is in the inbox; wait for something to be if the engine has nothing to do."""
        inbox = self._inbox
        if not self._engine.has_work:
            inbox.get()()
        while not inbox.empty():
            inbox.get()()

    def _submit(self, job: Job) -> None:
        if self._death is not None:
            self._end(job, Event(error=self._dead()))
            return
        try:
            self._engine.submit(job.requests)
        except RidgelineError as error:
            self._end(job, Event(error=error))
            return
        self._jobs.update((request, job) for request in job.requests)
        if not job.requests:
            self._end(job, Event(reason="stop"))

    def _abort(self, job: Job, event: Event) -> bool:
        """Drop a job that has not ended, with ``event`` as its last; False if it had."""
        if job.done:
            return False
        for request in job.requests:
            self._engine.abort(request)
        self._end(job, event)
        return True

    def _end(self, job: Job, event: Event) -> None:
        """Post the last event of a job, none of whose requests runs any more."""
        if event.error is None and job.stream:
            event = self._news(job, event.reason)
        job.done = True
        for request in job.requests:
            self._jobs.pop(request, None)
        self._posts.setdefault(job.loop, []).append((job, event))

    def _look_at(self, served: Iterable[Request]) -> None:
        """Collect the news of requests that a step has computed something of."""
        jobs, posts = self._jobs, self._posts
        for request in served:
            job = jobs.get(request)
            if job is None:  # it ended when it was aborted
                continue
            reason = request.finish_reason
            if job.stream and len(request.output_ids) - job.num_read > self._bound:
                self._abort(job, Event(error=self._too_slow(job)))
            elif reason is not None:
                del jobs[request]
                job.num_left -= 1
                if not job.num_left:
                    self._end(job, _last_event(job, reason))
            elif job.stream and len(request.output_ids) > job.num_sent:
                posts.setdefault(job.loop, []).append((job, self._news(job, None)))

    def _news(self, job: Job, reason: str | None) -> Event:
        """What is new of a stream since the last time."""
        text, ids, scores, _ = self._engine.news(job.requests[0], job.num_sent)
        job.num_sent += len(ids)
        return Event(text, ids, scores, reason)

    def _too_slow(self, job: Job) -> SlowReaderError:
        return SlowReaderError(
            f"the stream was dropped: {job.num_sent - job.num_read} tokens of it wait to be read and "
            f"max_undelivered_tokens is {self._bound}: read faster or raise it"
        )

    def _post(self) -> None:
        """Hand each loop what was collected for it."""
        posts, self._posts = self._posts, {}
        for loop, events in posts.items():
            try:
                loop.call_soon_threadsafe(_deliver, events)
            except RuntimeError:  # the loop is closed and all who waited on it are gone
                for job, _ in events:
                    self._abort(job, Event(reason="abort"))

    def _close(self) -> None:
        self._closing = True

    def _die(self, message: str, cause: BaseException | None) -> None:
        """Take no command any more; every job that has not ended gets an error."""
        with self._gate:
            self._death, self._cause = message, cause
        while not self._inbox.empty():
            self._inbox.get()()
        for job in dict.fromkeys(self._jobs.values()):
            if cause is None:
                self._abort(job, Event(error=self._dead()))
            else:  # the engine has dropped them, and is not to be asked again
                self._end(job, Event(error=self._dead()))
        self._post()


def _last_event(job: Job, reason: str) -> Event:
    """The last event of a job whose requests have all ended: an error if one of them failed."""
    error = next((r.error for r in job.requests if r.error is not None), None)
    return Event(reason=reason) if error is None else Event(error=RidgelineError(error))


def _deliver(events: Iterable[tuple[Job, Event]]) -> None:
    """Runs in the loop's thread."""
    for job, event in events:
        job.receive(event)
