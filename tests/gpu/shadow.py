"""An executor whose every step is repeated by the reference: numbers near the truth, samples exactly as they must."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ridgeline.backends.reference.executor import ReferenceExecutor
from ridgeline.core.types import POOL, Batch, StepOutput, Ticket, TokenMasks
from ridgeline.graph.ir import Graph
from ridgeline.graph.plan import Plan
from ridgeline.models.load import Weight
from tests.gpu.small_model import reference, sizes_for


def relative(values: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference over the truth's root mean square."""
    return float(np.abs(values - truth).max() / np.sqrt(np.mean(truth**2))) if truth.size else 0.0


class Sampler(ReferenceExecutor):
    """The reference's sampling, over logits that are given."""

    given: Any = None

    def _run(self, batch: Any, tokens: Any, context: Any) -> Any:
        return self.given, np.zeros((len(batch.sample_rows), 1), np.float32)


class Shadowed:
    """Runs steps one at a time, each beside three of numpy.

    The truth is the naive graph in float64. Logits and hidden states may be off by twice what the plan is that numpy
    runs, which rounds where the plan says: the largest error of it in any step so far. Tokens, what stands and the best
    tokens are exactly those that the reference samples from the executor's own logits; log probabilities are within
    float32's rounding of a sum over the vocabulary.
    """

    def __init__(self, made: Any, graph: Graph, plan: Plan, weights: dict[str, Weight]) -> None:
        self.made = made
        self._truth, self._plain = reference(graph, weights, np.float64), reference(plan, weights)
        self._sampler = Sampler(plan, weights, **sizes_for(plan))
        self._last: dict[int, int] = {}
        self._allowed = 0.0
        self._batches: dict[Ticket, Batch] = {}
        self.steps = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.made, name)

    def launch(self, batch: Batch) -> Ticket:
        """As the executor."""
        ticket: Ticket = self.made.launch(batch)
        self._batches[ticket] = batch
        self.steps += 1
        return ticket

    def finish(self, ticket: Ticket, masks: TokenMasks | None = None) -> StepOutput:
        """As the executor; raises AssertionError for what the reference has otherwise."""
        output: StepOutput = self.made.finish(ticket, masks)
        batch = self._batches.pop(ticket)
        owners = np.repeat(batch.slots, np.diff(batch.query_starts))
        last = [self._last.get(int(slot), 0) for slot in owners]
        batch = replace(batch, token_ids=np.where(batch.token_ids < 0, last, batch.token_ids).astype(np.int32))
        logits, _ = self._near(batch, masks, output)
        self._sampler.given = logits
        right = self._sampler.finish(self._sampler.launch(batch), masks)
        assert np.array_equal(output.token_ids, right.token_ids)
        assert np.array_equal(output.accepted, right.accepted)
        assert np.array_equal(output.top_ids, right.top_ids)
        right.logprobs[batch.sampling["num_logprobs"] < 0] = np.nan
        for found, wanted in ((output.logprobs, right.logprobs), (output.top_logprobs, right.top_logprobs)):
            assert found.dtype == wanted.dtype and np.allclose(found, wanted, atol=1e-4, equal_nan=True)
        sampled = (batch.sampling["target"] == 0) & (output.accepted != 0)
        for row, slot, token in zip(batch.sample_rows, owners[batch.sample_rows], output.token_ids, strict=True):
            if sampled[np.searchsorted(batch.sample_rows, row)]:
                self._last[int(slot)] = int(token)
        return output

    def _near(self, batch: Batch, masks: TokenMasks | None, output: StepOutput) -> tuple[Any, Any]:
        """The executor's logits, once they and the pooled rows are as near the truth as they must be."""
        logits = self.made.last_logits
        found = []
        for one in (self._truth, self._plain):
            made = one.finish(one.launch(batch), masks)
            found.append((one.last_logits, made.hidden))
        (truth, pooled_truth), (plain, pooled_plain) = found
        assert logits.shape == truth.shape and logits.dtype == np.float32
        self._allowed = max(self._allowed, relative(plain, truth), relative(pooled_plain, pooled_truth))
        assert relative(logits, truth) <= 2 * self._allowed
        if (batch.sampling["target"] == POOL).any():
            assert output.hidden.shape == pooled_truth.shape and output.hidden.dtype == np.float32
            assert relative(output.hidden, pooled_truth) <= 2 * self._allowed
        else:
            assert output.hidden.shape == (0, 0)
        return logits, output.hidden
