"""A request as the engine knows it."""

from __future__ import annotations

import numpy as np

from ridgeline.core.types import SAMPLING_DTYPE, Int32, SamplingParams, StepOutput
from ridgeline.engine.text import TextStream


class Request:
    """One sequence: its prompt, what it has generated, and the blocks and slot it holds while it runs.

    Attributes:
        prompt: [P] prompt tokens.
        params: how it is sampled; ``row`` is the same as one row of SAMPLING_DTYPE.
        limit: most tokens it may generate: ``max_tokens``, or fewer when the context ends first.
        output_ids: tokens generated so far, a stop token included.
        text: its text as it grows; None when nobody needs it before the end.
        logprobs: one (log probability, best ids, their log probabilities) for each output token, if asked for.
        finish_reason: None while it waits or runs, then "stop", "length" or "abort".
        slot: the small int it owns while it runs, else -1.
        blocks: block ids per cache group, in order of position.
        num_computed: tokens whose KV is in the cache.
    """

    __slots__ = (
        "prompt",
        "params",
        "row",
        "limit",
        "stop_ids",
        "output_ids",
        "text",
        "logprobs",
        "finish_reason",
        "slot",
        "blocks",
        "num_computed",
    )

    def __init__(
        self,
        prompt: Int32,
        params: SamplingParams,
        *,
        limit: int,
        seed: int,
        stop_ids: frozenset[int],
        text: TextStream | None,
    ) -> None:
        self.prompt = prompt
        self.params = params
        self.row = sampling_row(params, seed)
        self.limit = limit
        self.stop_ids = stop_ids
        self.text = text
        self.output_ids: list[int] = []
        self.logprobs: list[tuple[float, list[int], list[float]]] | None = None if params.logprobs is None else []
        self.finish_reason: str | None = None
        self.slot = -1
        self.blocks: list[list[int]] = []
        self.num_computed = 0

    @property
    def max_len(self) -> int:
        """Most tokens whose KV it can need: the last one generated is never read back."""
        return len(self.prompt) + self.limit - 1

    def accept(self, token: int, output: StepOutput, row: int) -> bool:
        """Take the token sampled by ``row`` of a step; True when the request has ended."""
        self.output_ids.append(token)
        if self.logprobs is not None:
            best = self.params.logprobs
            self.logprobs.append(
                (
                    float(output.logprobs[row]),
                    output.top_ids[row, :best].tolist(),
                    output.top_logprobs[row, :best].tolist(),
                )
            )
        if token in self.stop_ids:
            self.end("stop")
        elif self.text is not None and self.text.push(token):
            self.end("stop")
        elif len(self.output_ids) >= self.limit:
            self.end("length")
        return self.finish_reason is not None

    def end(self, reason: str) -> None:
        """Finish for ``reason`` ("stop" when a stop string turns up in the last text held back)."""
        stopped = self.text is not None and self.text.finish()
        self.finish_reason = "stop" if stopped and reason == "length" else reason


def sampling_row(params: SamplingParams, seed: int) -> np.void:
    """``params`` as one row of SAMPLING_DTYPE, with the seed that was drawn or given."""
    row = np.zeros(1, SAMPLING_DTYPE)
    row["seed"] = seed
    row["temperature"] = params.temperature
    row["top_p"] = params.top_p
    row["min_p"] = params.min_p
    row["top_k"] = max(0, params.top_k)
    row["num_logprobs"] = -1 if params.logprobs is None else params.logprobs
    value: np.void = row[0]
    return value
