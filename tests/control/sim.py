"""An executor whose cache stores what was written and whose next token is a hash of what it reads back.

Whatever reaches the wrong cell, is read through a stale table, or is left behind by another request changes the
tokens, so "the batch's output equals the request's alone" is an exact test of the engine and its block pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ridgeline.core.types import Batch, SamplingParams, StepOutput, Ticket, TokenMasks
from ridgeline.engine.engine import EngineLimits

MASK = 2**64 - 1


def mix(chain: int, token: int, position: int) -> int:
    """The chain hash after ``token`` at ``position``."""
    return ((chain ^ (token * 0x9E3779B97F4A7C15 + position)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & MASK


def sample(chain: int, seed: int, vocab: int) -> int:
    """The token that follows ``chain``."""
    return (((chain ^ seed) * 0x2545F4914F6CDD1D & MASK) >> 33) % vocab


def solo(
    prompt: Sequence[int], params: SamplingParams, vocab: int, max_len: int, eos_ids: frozenset[int]
) -> tuple[list[int], str]:
    """What one request must give, computed from its tokens alone: tokens and finish reason."""
    chain = 0
    for position, token in enumerate(prompt):
        chain = mix(chain, token, position)
    output: list[int] = []
    stop = set(params.stop_token_ids) | (set() if params.ignore_eos else eos_ids)
    limit = min(params.max_tokens, max_len - len(prompt))
    while True:
        token = sample(chain, params.seed or 0, vocab)
        output.append(token)
        if token in stop:
            return output, "stop"
        if len(output) == limit:
            return output, "length"
        chain = mix(chain, token, len(prompt) + len(output) - 1)


class SimExecutor:
    """Implements core.types.Executor; ``fail_at`` raises in the middle of that step."""

    def __init__(self, limits: EngineLimits, *, error: BaseException | None = None, fail_at: int = -1) -> None:
        self.limits = limits
        groups = len(limits.num_blocks)
        table = -(-limits.max_len // limits.block_size)
        self.tables = [np.full((limits.max_requests, table), -1, np.int64) for _ in range(groups)]
        self.cells = [np.zeros((n, limits.block_size, 3), np.uint64) for n in limits.num_blocks]
        self.steps = 0
        self.largest = 0
        self.error, self.fail_at = error, fail_at
        self.open: dict[int, StepOutput] = {}

    def launch(self, batch: Batch) -> Ticket:
        self._check(batch)
        for table, updates in zip(self.tables, batch.block_updates, strict=True):
            for slot, index, block in updates.tolist():
                table[slot, index] = block
        rows = {int(row): i for i, row in enumerate(batch.sample_rows)}
        tokens = np.zeros(len(rows), np.int32)
        for b, slot in enumerate(batch.slots.tolist()):
            for t in range(batch.query_starts[b], batch.query_starts[b + 1]):
                chain = self._write(slot, int(batch.token_ids[t]), int(batch.positions[t]))
                if t in rows:
                    seed = int(batch.sampling["seed"][rows[t]])
                    tokens[rows[t]] = sample(chain, seed, self.limits.vocab_size)
            assert batch.context_lens[b] == batch.positions[batch.query_starts[b + 1] - 1] + 1
        self.steps += 1
        if self.steps == self.fail_at and self.error is not None:
            raise self.error
        number = len(tokens)
        none = np.zeros((number, 0))
        self.open[self.steps] = StepOutput(
            tokens,
            np.ones(number, np.int32),
            np.zeros(number, np.float32),
            none.astype(np.int32),
            none.astype(np.float32),
        )
        return Ticket(self.steps)

    def finish(self, ticket: Ticket, masks: TokenMasks | None = None) -> StepOutput:
        return self.open.pop(ticket.number)

    def _check(self, batch: Batch) -> None:
        limits = self.limits
        self.largest = max(self.largest, len(batch.slots))
        assert 0 < len(batch.token_ids) <= limits.max_tokens
        assert len(batch.slots) <= limits.max_requests
        assert len(set(batch.slots.tolist())) == len(batch.slots)
        assert not self.open, "a ticket was never finished"
        assert batch.query_starts[0] == 0 and batch.query_starts[-1] == len(batch.token_ids)
        assert (np.diff(batch.query_starts) > 0).all()
        assert (np.diff(batch.sample_rows) > 0).all()
        assert len(batch.sampling) == len(batch.sample_rows)
        arrays = (batch.token_ids, batch.positions, batch.slots, batch.query_starts, batch.context_lens)
        assert all(a.dtype == np.int32 and a.flags.c_contiguous for a in (*arrays, batch.sample_rows))

    def _write(self, slot: int, token: int, position: int) -> int:
        """Write one token and return the chain hash read back through the table of every cache group."""
        size = self.limits.block_size
        result = 0
        for table, cells in zip(self.tables, self.cells, strict=True):
            chain = 0
            for at in range(position):
                stored, where, chain_at = cells[table[slot, at // size], at % size].tolist()
                assert where == at, "read a cell that holds another position"
                chain = mix(chain, stored, at)
                assert chain == chain_at, "read a cell that another sequence wrote"
            chain = mix(chain, token, position)
            cells[table[slot, position // size], position % size] = (token, position, chain)
            result = chain
        return result
