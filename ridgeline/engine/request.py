"""A request as the engine knows it: a sequence with its sampling, its text and what it has to report."""

from __future__ import annotations

from array import array
from collections.abc import Hashable
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.core.types import POOL, SAMPLING_DTYPE, SamplingParams, SlotStart, StepOutput
from ridgeline.engine.text import TextStream
from ridgeline.scheduler.ngram import NgramDrafter
from ridgeline.scheduler.sequence import Sequence

Scored = tuple[float, list[int], list[float]]
"""Log probability of a token, the ids of the best, their log probabilities."""


class Request(Sequence):
    """One prompt and one output (or pooled state), from ``make_request`` to its end.

    Attributes (and those of Sequence):
        params: how it is sampled; ``row`` is the same as one row of SAMPLING_DTYPE.
        index: which of the n samples of its prompt.
        output_ids: tokens generated so far, a stop token included.
        text: its text as it grows; None when nobody needs it before the end.
        logprobs: one Scored for each output token, if asked for.
        prompt_logprobs: one Scored for each prompt token but the first, if asked for.
        pooling: "mean" or "last" for a request that wants hidden states instead of tokens; ``pooled``: its result,
            [hidden_size] float64.
        finish_reason: None while it waits or runs, then "stop", "length", "abort" or "error".
        error: what went wrong, for "error".
        start: what the sampler must know of it beyond ``row``; None: nothing.
        drafter: its speculation, made when it starts to generate.
        plain: a token means nothing more for it than one entry of output_ids, and some text.
    """

    __slots__ = (
        "params",
        "row",
        "index",
        "stop_ids",
        "text",
        "logprobs",
        "prompt_logprobs",
        "pooling",
        "pooled",
        "finish_reason",
        "error",
        "start",
        "drafter",
        "plain",
    )

    def __init__(
        self,
        prompt: array[int],
        params: SamplingParams,
        *,
        limit: int,
        seed: int = 0,
        index: int = 0,
        stop_ids: frozenset[int] = frozenset(),
        text: TextStream | None = None,
        start: SlotStart | None = None,
        speculates: bool = False,
        priority: int = 0,
        salt: Hashable = None,
        parent: Request | None = None,
        pooling: str | None = None,
    ) -> None:
        scored = params.prompt_logprobs is not None and parent is None
        score_until = len(prompt) if pooling == "mean" else len(prompt) - 1 if scored else 0
        super().__init__(prompt, limit, priority=priority, salt=salt, leader=parent, score_until=score_until)
        self.params = params
        self.row = sampling_row(params, seed, index)
        self.index = index
        self.stop_ids = stop_ids
        self.text = text
        self.logprobs: list[Scored] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list[Scored] | None = [] if scored else None
        self.pooling = pooling
        self.pooled: npt.NDArray[np.float64] | None = None
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.start = start
        self.drafter: NgramDrafter | None = None
        self.plain = self.logprobs is None and not speculates

    def accept(self, token: int, output: StepOutput, row: int) -> None:
        """Take the token sampled by ``row`` of a step, which may end the request."""
        self.output_ids.append(token)
        if self.logprobs is not None:
            assert self.params.logprobs is not None
            self.logprobs.append(_scored(output, row, self.params.logprobs))
        number = len(self.output_ids)
        if token in self.stop_ids:
            self.end("stop")
        elif self.text is not None and self.text.push(token, number > self.params.min_tokens):
            self.end("stop")
        elif number >= self.limit:
            self.end("length")

    def take_scores(self, output: StepOutput, row: int, number: int) -> None:
        """Rows ``row`` to ``row + number`` of a step are the next prompt tokens' log probabilities."""
        best = self.params.prompt_logprobs
        assert self.prompt_logprobs is not None and best is not None
        self.prompt_logprobs += [_scored(output, i, best) for i in range(row, row + number)]

    def pool(self, hidden: npt.NDArray[np.float32]) -> None:
        """Add the states [N, hidden_size] of the next positions, in their order, in float64."""
        if self.pooled is None:
            self.pooled = np.zeros(hidden.shape[1], np.float64)
        if self.pooling == "last":
            self.pooled = hidden[-1].astype(np.float64)
        else:
            for state in hidden:  # one by one: the sum must not depend on how the prompt was cut into chunks
                self.pooled += state

    def end(self, reason: str) -> None:
        """Finish for ``reason`` ("stop" when a stop string turns up in the last text held back)."""
        if self.pooling == "mean" and self.pooled is not None and reason == "stop":
            self.pooled /= len(self.prompt)
        stopped = self.text is not None and self.text.finish()
        self.finish_reason = "stop" if stopped and reason == "length" else reason

    def fail(self, message: str) -> None:
        """End it alone, with what went wrong."""
        self.error = message
        self.end("error")

    def slot_start(self, num_cached: int, slot: int | None = None) -> SlotStart | None:
        """What the sampler must know of its slot when its first ``num_cached`` tokens are in the cache.

        ``slot``: another than it holds now.
        """
        if self.start is None:
            return None
        values: dict[str, Any] = vars(self.start) | {
            "slot": self.slot if slot is None else slot,
            "prompt_len": len(self.prompt),
            "tokens": np.array(self.span(0, num_cached), np.int32),
        }
        return SlotStart(**values)


def _scored(output: StepOutput, row: int, best: int) -> Scored:
    return (
        float(output.logprobs[row]),
        output.top_ids[row, :best].tolist(),
        output.top_logprobs[row, :best].tolist(),
    )


def sampling_row(params: SamplingParams, seed: int, index: int = 0) -> np.void:
    """``params`` as one row of SAMPLING_DTYPE, with the seed that was drawn or given."""
    row = np.zeros(1, SAMPLING_DTYPE)
    row["seed"] = seed
    row["temperature"] = params.temperature
    row["top_p"] = params.top_p
    row["min_p"] = params.min_p
    row["top_k"] = max(0, params.top_k)
    row["sample_index"] = index
    row["num_logprobs"] = -1 if params.logprobs is None else params.logprobs
    value: np.void = row[0]
    return value


def pooling_row() -> np.void:
    """The row of SAMPLING_DTYPE that asks for a hidden state."""
    row = np.zeros(1, SAMPLING_DTYPE)
    row["num_logprobs"] = -1
    row["target"] = POOL
    value: np.void = row[0]
    return value
