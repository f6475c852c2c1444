"""The flight recorder: the engine's last steps, so that they can be run again and looked at.

A step costs it a few references to what the engine has made anyway; nothing is copied or written until a record is
asked for. A step that leaves the ring is forgotten but for the block tables, which are kept as they were when the
oldest step in the ring began. What the cache held then is not kept: it follows from the tokens of the requests.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from ridgeline.core.errors import RidgelineError
from ridgeline.core.types import Batch, Float32, Int32, StepOutput
from ridgeline.engine.limits import EngineLimits
from ridgeline.engine.request import Request
from ridgeline.scheduler.plan import StepPlan

if TYPE_CHECKING:
    from ridgeline.engine.flight import Environment, Failure, FlightRecord, LiveRequest, OutputRecord, StepRecord

HASH_BYTES = 16


class RecordedStep:
    """A step in the ring. ``stage`` is "launch", "open", "finish" or "done"; ``logits`` are hashes, one a row."""

    __slots__ = ("plan", "batch", "output", "logits", "hidden", "stage")

    def __init__(self, plan: StepPlan, batch: Batch) -> None:
        self.plan, self.batch = plan, batch
        self.output: StepOutput | None = None
        self.logits: list[bytes] | None = None
        self.hidden: bytes | None = None
        self.stage = "launch"

    def owners(self) -> list[Request]:
        """The requests of ``batch.slots``, in that order."""
        return cast(list[Request], [*self.plan.decodes, *(c.sequence for c in self.plan.chunks)])


class FlightRecorder:
    """Keeps the last steps of an engine.

    Args:
        num_steps: steps kept, at least 1; never fewer than may be under way at once.
        limits: of the engine.
        describe: what the record says of model, build and machine; called when one is written.
        directory: where a record is written when a step fails; None: nowhere.
        logits: the logits [S, vocab] of the step launched last, to be hashed after every step; None: they are not.
    """

    def __init__(
        self,
        num_steps: int,
        limits: EngineLimits,
        *,
        describe: Callable[[], Environment] | None = None,
        directory: str | os.PathLike[str] | None = None,
        logits: Callable[[], Float32] | None = None,
    ) -> None:
        self._most = max(num_steps, limits.max_open_steps)
        self._limits, self._describe, self._directory, self._logits = limits, describe, directory, logits
        self._steps: deque[RecordedStep] = deque()
        blocks = -(-limits.max_len // limits.block_size)
        # Zeros, of which only what is written takes memory; cells that nobody set are never read.
        self._tables = [np.zeros((limits.max_requests, blocks), np.int32) for _ in limits.num_blocks]
        self._failure: tuple[int, str, str] | None = None  # step, stage, error
        self._over = False

    # -- what the engine tells it, in the order of a step --------------------------------------------------------

    def launching(self, plan: StepPlan, batch: Batch) -> None:
        """A step is about to be launched."""
        steps = self._steps
        if self._over:  # after a failure nothing goes on: every request starts anew
            steps.clear()
            self._failure, self._over = None, False
        steps.append(RecordedStep(plan, batch))
        if len(steps) > self._most:
            self._leave(steps.popleft())

    def launched(self) -> None:
        """That step is under way."""
        step = self._steps[-1]
        step.stage = "open"
        if self._logits is not None:
            step.logits = row_hashes(self._logits())

    def finishing(self, plan: StepPlan) -> None:
        """The step of ``plan`` is about to be finished."""
        self._find(plan).stage = "finish"

    def finished(self, plan: StepPlan, output: StepOutput) -> None:
        """It gave ``output``, of which the hidden states are not kept."""
        step = self._find(plan)
        step.stage = "done"
        if self._logits is not None and len(output.hidden):
            step.hidden = digest(output.hidden)
        step.output = (
            StepOutput(output.token_ids, output.accepted, output.logprobs, output.top_ids, output.top_logprobs)
            if len(output.hidden)
            else output
        )

    def failed(self, error: BaseException) -> str:
        """A step, or what comes before or after it, has raised: write the record if there is somewhere to.

        Returns:
            What to tell whoever sees the error; "" for an interrupt, or when nothing was recorded.
        """
        if not self._steps or self._over:
            return ""
        self._over = True
        if not isinstance(error, Exception):
            return ""
        at = next((s for s in reversed(self._steps) if s.stage in ("launch", "finish")), None)
        stage = at.stage if at is not None else "after"
        number = (at or self._steps[-1]).plan.number
        self._failure = (number, stage, f"{type(error).__name__}: {error}")
        if self._directory is None:
            return "set flight_record_dir to have the steps before such a failure written for ridgeline replay"
        try:
            directory = Path(self._directory)
            directory.mkdir(parents=True, exist_ok=True)
            stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
            path = self.write(directory / f"ridgeline-{stamp}-{os.getpid()}-step{number}.flight")
        except Exception as trouble:  # the error that is being raised matters more
            return f"the flight record could not be written: {type(trouble).__name__}: {trouble}"
        return f"the steps before it are in {path}: run ridgeline replay on it"

    def _find(self, plan: StepPlan) -> RecordedStep:
        """The step of ``plan``, which is one of the newest."""
        for step in reversed(self._steps):
            if step.plan is plan:
                return step
        raise AssertionError(f"step {plan.number} ends and was never launched")

    def _leave(self, step: RecordedStep) -> None:
        for table, updates in zip(self._tables, step.batch.block_updates, strict=True):
            if len(updates):
                table[updates[:, 0], updates[:, 1]] = updates[:, 2]

    # -- the record ----------------------------------------------------------------------------------------------

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the steps so far. Raises RidgelineError when there are none, OSError when it cannot be written."""
        from ridgeline.engine.flight import write_record

        return write_record(self.capture(), path)

    def capture(self) -> FlightRecord:
        """The steps so far; raises RidgelineError when there are none."""
        from ridgeline.engine.flight import Environment, Failure, FlightRecord, Sizes

        if not self._steps:
            raise RidgelineError("there is nothing to record: no step has run")
        limits = self._limits
        live, seen = [], set[int]()
        ends: dict[int, int] = {}  # per slot, the longest context of any step
        for step in self._steps:
            for slot, end in zip(step.batch.slots.tolist(), step.batch.context_lens.tolist(), strict=True):
                ends[slot] = max(end, ends.get(slot, 0))
        first_tokens: list[Int32] = []
        for step in self._steps:
            started = {id(s) for s in step.plan.started}
            tokens = step.batch.token_ids
            for i, (slot, request) in enumerate(zip(step.batch.slots.tolist(), step.owners(), strict=True)):
                if slot in seen:
                    continue
                seen.add(slot)
                if id(request) not in started:
                    at = int(step.batch.query_starts[i])
                    position = int(step.batch.positions[at])
                    live.append(self._live(slot, request, position, ends[slot]))
                    tokens = _resolved(tokens, at, request, position)
            first_tokens.append(tokens)
        failure: Failure | None = None if self._failure is None else Failure(*self._failure)
        return FlightRecord(
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            environment=Environment() if self._describe is None else self._describe(),
            sizes=Sizes(
                num_slots=limits.max_requests,
                max_tokens=limits.max_tokens,
                max_len=limits.max_len,
                block_size=limits.block_size,
                num_blocks=list(limits.num_blocks),
                windows=list(limits.windows) or [0] * len(limits.num_blocks),
            ),
            live=live,
            steps=[_step(s, t) for s, t in zip(self._steps, first_tokens, strict=True)],
            failure=failure,
        )

    def _live(self, slot: int, request: Request, position: int, end: int) -> LiveRequest:
        """A request as it was when the ring began, ``position`` tokens of it being in the cache.

        Its block table is kept up to token ``end``: blocks that rejected drafts were given are used again.
        """
        from ridgeline.engine.flight import LiveRequest, as_bytes, record_slot_start

        start = None if request.start is None else request.slot_start(position, slot)
        blocks = -(-end // self._limits.block_size)
        return LiveRequest(
            slot=slot,
            tokens=request.span_bytes(0, position),
            num_prompt_tokens=len(request.prompt),
            blocks=[as_bytes(table[slot, :blocks]) for table in self._tables],
            sampling=request.row.tobytes(),
            start=None if start is None else record_slot_start(start),
        )


def _resolved(tokens: Int32, at: int, request: Request, position: int) -> Int32:
    """``tokens`` with the one at ``at``, if it is -1 for what an older step sampled, as its request knows it."""
    if tokens[at] >= 0 or position >= request.num_tokens:
        return tokens
    tokens = tokens.copy()
    tokens[at] = request.span(position, position + 1)[0]
    return tokens


def _step(step: RecordedStep, token_ids: Int32) -> StepRecord:
    from ridgeline.engine.flight import ExtraInput, Started, StepRecord, as_bytes, record_slot_start

    batch = step.batch
    first = dict(zip(batch.slots.tolist(), batch.positions[batch.query_starts[:-1]].tolist(), strict=True))
    slots = {id(r): slot for r, slot in zip(step.owners(), batch.slots.tolist(), strict=True)}
    started = [Started(slots[id(r)], r.span_bytes(0, first[slots[id(r)]])) for r in step.plan.started if id(r) in slots]
    return StepRecord(
        number=step.plan.number,
        token_ids=as_bytes(token_ids),
        positions=as_bytes(batch.positions),
        slots=as_bytes(batch.slots),
        query_starts=as_bytes(batch.query_starts),
        context_lens=as_bytes(batch.context_lens),
        sample_rows=as_bytes(batch.sample_rows),
        sampling=batch.sampling.tobytes(),
        block_updates=[as_bytes(u) for u in batch.block_updates],
        block_copies=[as_bytes(c) for c in batch.block_copies],
        slot_starts=[record_slot_start(s) for s in batch.slot_starts],
        extras={n: ExtraInput(x.dtype.str, list(x.shape), x.tobytes()) for n, x in batch.extras.items()},
        started=started,
        output=None if step.output is None else record_output(step.output, step.logits, step.hidden),
    )


def record_output(output: StepOutput, logits: list[bytes] | None, hidden: bytes | None) -> OutputRecord:
    """A step's output for the file, with the hashes of its logits and of its hidden states if there are any."""
    from ridgeline.engine.flight import OutputRecord, as_bytes

    return OutputRecord(
        token_ids=as_bytes(output.token_ids),
        accepted=as_bytes(output.accepted),
        logprobs=as_bytes(output.logprobs, "<f4"),
        top_ids=as_bytes(output.top_ids),
        top_logprobs=as_bytes(output.top_logprobs, "<f4"),
        logits=logits,
        hidden=hidden,
    )


def row_hashes(logits: Float32) -> list[bytes]:
    """A hash of each row's bits."""
    return [digest(row) for row in logits]


def digest(values: Float32) -> bytes:
    """A hash of an array's bits."""
    return hashlib.blake2b(np.ascontiguousarray(values, "<f4").tobytes(), digest_size=HASH_BYTES).digest()
