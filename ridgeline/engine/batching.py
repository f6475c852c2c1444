"""Flat arrays of a step, from its plan."""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from ridgeline.core.types import SAMPLING_DTYPE, Batch, Int32, SlotStart
from ridgeline.engine.request import Request
from ridgeline.scheduler.plan import Chunk, StepPlan

NO_ROWS = np.zeros(0, np.int32)


class BatchBuilder:
    """Builds each step's Batch. A batch is never changed once it is built, so a step under way may go on reading it.

    A step that decodes the same requests as the last one costs a few vector operations, whatever their number.
    """

    def __init__(self, max_requests: int, num_groups: int) -> None:
        self._params = np.zeros(max_requests, SAMPLING_DTYPE)  # of the request in each slot
        self._special = [False] * max_requests  # slots whose sampler holds more than its defaults
        self._no_updates = [np.zeros((0, 3), np.int32) for _ in range(num_groups)]
        self._last: Batch | None = None

    def forget_slots(self) -> None:
        """Batches may have been lost on their way to the executor: nobody knows what its slots hold now."""
        self._special = [True] * len(self._special)

    def build(self, plan: StepPlan, sampled: Int32 | None) -> Batch:
        """The batch of ``plan``; ``sampled`` [S] is what the step before it gave, None while that is under way."""
        batch = self._again(plan, sampled) if plan.repeats else self._flatten(plan)
        if plan.updates and any(plan.updates):
            batch.block_updates = [
                np.array(u, np.int32) if u else none for u, none in zip(plan.updates, self._no_updates, strict=True)
            ]
        if plan.copies and any(plan.copies):
            batch.block_copies = [np.array(c, np.int32).reshape(-1, 2) for c in plan.copies]
        self._last = batch
        return batch

    def _again(self, plan: StepPlan, sampled: Int32 | None) -> Batch:
        last = self._last
        assert last is not None
        return Batch(
            token_ids=np.full(len(last.token_ids), -1, np.int32) if sampled is None else sampled,
            positions=last.positions + 1,
            slots=last.slots,
            query_starts=last.query_starts,
            context_lens=last.context_lens + 1,
            sample_rows=last.sample_rows,
            sampling=last.sampling,
            block_updates=self._no_updates,
        )

    def _flatten(self, plan: StepPlan) -> Batch:
        starts = [s for s in (self._start(cast(Request, r), plan) for r in plan.started) if s is not None]
        decodes, chunks = plan.decodes, plan.chunks
        number, total = len(decodes), plan.num_tokens
        tokens, positions = np.empty(total, np.int32), np.empty(total, np.int32)
        tokens[:number] = [_next_token(cast(Request, r)) for r in decodes]
        positions[:number] = [r.num_computed - 1 for r in decodes]
        bounds = list(range(number + 1))
        row_parts: list[Int32] = [np.arange(number, dtype=np.int32)] if number else []
        row_slots = [r.slot for r in decodes]
        at = number
        for chunk in chunks:
            stop = at + chunk.size + len(chunk.drafts)
            tokens[at : at + chunk.size] = chunk.sequence.span(chunk.start, chunk.start + chunk.size)
            tokens[at + chunk.size : stop] = chunk.drafts
            positions[at:stop] = np.arange(chunk.start, chunk.start + stop - at, dtype=np.int32)
            row_parts += _rows(chunk, at)
            row_slots += [chunk.sequence.slot] * chunk.num_rows
            bounds.append(stop)
            at = stop
        query_starts = np.array(bounds, np.int32)
        return Batch(
            token_ids=tokens,
            positions=positions,
            slots=np.array([r.slot for r in decodes] + [c.sequence.slot for c in chunks], np.int32),
            query_starts=query_starts,
            context_lens=positions[query_starts[1:] - 1] + 1,
            sample_rows=row_parts[0] if len(row_parts) == 1 else np.concatenate(row_parts or [NO_ROWS]),
            sampling=self._sampling(plan, row_slots),
            block_updates=self._no_updates,
            slot_starts=starts,
        )

    def _sampling(self, plan: StepPlan, row_slots: list[int]) -> npt.NDArray[np.void]:
        sampling = self._params[row_slots]
        row = len(plan.decodes)
        for chunk in plan.chunks:
            number = chunk.score_to - chunk.score_from
            request = cast(Request, chunk.sequence)
            if number and request.pooling is None:
                scored = sampling[row : row + number]
                following = request.span(chunk.score_from + 1, chunk.score_to + 1)
                scored["target"] = 1 + np.array(following, np.int32)
                scored["num_logprobs"] = request.params.prompt_logprobs
            row += chunk.num_rows
        return sampling

    def _start(self, request: Request, plan: StepPlan) -> SlotStart | None:
        """The sampler's state for a slot with a new owner, if this one or the one before it needs any."""
        slot = request.slot
        self._params[slot] = request.row
        first = next((c.start for c in plan.chunks if c.sequence is request), 0)
        start = request.slot_start(first)
        if start is None and self._special[slot]:
            start = SlotStart(slot)
            self._special[slot] = False
        elif start is not None:
            self._special[slot] = True
        return start


def _next_token(request: Request) -> int:
    """The token that a decoding request is fed, -1 while the step that samples it is under way."""
    index = request.num_computed - 1 - len(request.prompt)
    output = request.output_ids
    return output[index] if index < len(output) else -1


def _rows(chunk: Chunk, at: int) -> list[Int32]:
    """Rows of a chunk that begins at token ``at`` of the step: those scored, then those sampled; none is empty."""
    parts = []
    if chunk.score_to > chunk.score_from:
        first = at + chunk.score_from - chunk.start
        parts.append(np.arange(first, first + chunk.score_to - chunk.score_from, dtype=np.int32))
    if chunk.samples:
        last = at + chunk.size - 1
        parts.append(np.arange(last, last + 1 + len(chunk.drafts), dtype=np.int32))
    return parts
