"""Flat arrays of a step, allocated once and filled in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ridgeline.core.types import SAMPLING_DTYPE, Batch, Int32
from ridgeline.engine.request import Request


class BatchBuilder:
    """Builds each step's Batch in buffers of ``max_tokens`` tokens and ``max_requests`` requests.

    A batch is valid until the next one is built. A step that decodes the same requests as the last one costs
    three vector operations, whatever their number.
    """

    def __init__(self, max_tokens: int, max_requests: int, num_groups: int) -> None:
        def ints(size: int) -> Int32:
            return np.zeros(size, np.int32)

        self._tokens, self._positions = ints(max_tokens), ints(max_tokens)
        self._slots, self._starts, self._contexts = ints(max_requests), ints(max_requests + 1), ints(max_requests)
        self._rows = ints(max_requests)
        self._sampling = np.zeros(max_requests, SAMPLING_DTYPE)
        self._offsets = np.arange(max_tokens + 1, dtype=np.int32)
        self._no_updates = [np.zeros((0, 3), np.int32) for _ in range(num_groups)]
        self._last: Batch | None = None

    def again(self, sampled: Int32) -> Batch:
        """The step after one that only decoded and that nobody joined or left: ``sampled`` [B] is its output."""
        batch = self._last
        assert batch is not None
        batch.token_ids[:] = sampled
        batch.positions += 1
        batch.context_lens += 1
        batch.block_updates = self._no_updates
        return batch

    def build(
        self,
        decoding: Sequence[Request],
        prefilling: Sequence[tuple[Request, int]],
        updates: list[list[tuple[int, int, int]]],
    ) -> Batch:
        """One token of each request in ``decoding``, then ``(request, tokens)`` chunks of prompts.

        A chunk that ends its prompt samples its last row. ``updates`` holds (slot, index, block) per group.
        """
        number = len(decoding)
        self._tokens[:number] = [r.output_ids[-1] for r in decoding]
        self._positions[:number] = [r.num_computed for r in decoding]
        self._starts[: number + 1] = self._offsets[: number + 1]
        self._rows[:number] = self._offsets[:number]
        requests = number + len(prefilling)
        tokens, rows = number, number
        for b, (request, size) in enumerate(prefilling, number):
            first = request.num_computed
            self._tokens[tokens : tokens + size] = request.prompt[first : first + size]
            np.add(self._offsets[:size], first, out=self._positions[tokens : tokens + size])
            tokens += size
            self._starts[b + 1] = tokens
            if first + size == len(request.prompt):
                self._rows[rows] = tokens - 1
                rows += 1
        sampled = [*decoding] + [r for r, n in prefilling if r.num_computed + n == len(r.prompt)]
        for i, request in enumerate(sampled):
            self._sampling[i] = request.row
        self._slots[:requests] = [r.slot for r in decoding] + [r.slot for r, _ in prefilling]
        self._contexts[:requests] = [r.num_computed + 1 for r in decoding] + [r.num_computed + n for r, n in prefilling]
        self._last = Batch(
            token_ids=self._tokens[:tokens],
            positions=self._positions[:tokens],
            slots=self._slots[:requests],
            query_starts=self._starts[: requests + 1],
            context_lens=self._contexts[:requests],
            sample_rows=self._rows[:rows],
            sampling=self._sampling[:rows],
            block_updates=[
                np.array(u, np.int32) if u else none for u, none in zip(updates, self._no_updates, strict=True)
            ],
        )
        return self._last
