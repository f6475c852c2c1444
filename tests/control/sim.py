"""An executor whose cache stores what was written and whose next token is a hash of what it reads back.

Whatever reaches the wrong cell, is read through a stale table, or is left behind by another request changes the
tokens, so "the batch's output equals the request's alone" is an exact test of the engine and its block pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ridgeline.core.types import POOL, Batch, SamplingParams, StepOutput, Ticket, TokenMasks
from ridgeline.engine.engine import EngineLimits

MASK = 2**64 - 1
HIDDEN = 3


def mix(chain: int, token: int, position: int) -> int:
    """The chain hash after ``token`` at ``position``."""
    return ((chain ^ (token * 0x9E3779B97F4A7C15 + position)) * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) & MASK


def sample(chain: int, seed: int, vocab: int) -> int:
    """The token that follows ``chain``; of seeds that are multiples of 5 one that soon repeats itself."""
    if seed % 5 == 0:
        return (chain >> 60) % 3 % vocab
    return (((chain ^ seed) * 0x2545F4914F6CDD1D & MASK) >> 33) % vocab


def score(chain: int, token: int) -> float:
    """The log probability of ``token`` after ``chain``."""
    return -float((chain ^ token) % 1000) / 100


def state(chain: int) -> list[float]:
    """The hidden state after ``chain``."""
    return [float(chain >> shift & 0xFF) for shift in range(0, 8 * HIDDEN, 8)]


def chains(tokens: Sequence[int]) -> list[int]:
    """The chain hash after each of ``tokens``."""
    result, chain = [], 0
    for position, token in enumerate(tokens):
        chain = mix(chain, token, position)
        result.append(chain)
    return result


def solo(
    prompt: Sequence[int], params: SamplingParams, vocab: int, max_len: int, eos_ids: frozenset[int], index: int = 0
) -> tuple[list[int], str]:
    """What one request must give, computed from its tokens alone: tokens and finish reason."""
    chain = chains(prompt)[-1]
    output: list[int] = []
    stop = set(params.stop_token_ids) | (set() if params.ignore_eos else eos_ids)
    limit = min(params.max_tokens, max_len - len(prompt))
    while True:
        token = sample(chain, (params.seed or 0) + 7 * index, vocab)
        output.append(token)
        if token in stop:
            return output, "stop"
        if len(output) == limit:
            return output, "length"
        chain = mix(chain, token, len(prompt) + len(output) - 1)


class SimExecutor:
    """Implements core.types.Executor; ``fail_at`` raises in the middle of that step. Steps run when finished."""

    def __init__(self, limits: EngineLimits, *, error: BaseException | None = None, fail_at: int = -1) -> None:
        self.limits = limits
        groups = len(limits.num_blocks)
        table = -(-limits.max_len // limits.block_size)
        self.tables = [np.full((limits.max_requests, table), -1, np.int64) for _ in range(groups)]
        self.cells = [np.zeros((n, limits.block_size, 3), np.uint64) for n in limits.num_blocks]
        self.windows = list(limits.windows) or [0] * groups
        self.last = [-1] * limits.max_requests
        self.steps = self.launched = self.largest = self.copied = 0
        self.error, self.fail_at = error, fail_at
        self.open: dict[int, Batch] = {}

    def launch(self, batch: Batch) -> Ticket:
        """Checks a step and keeps it."""
        self._check(batch)
        self.launched += 1
        if self.launched == self.fail_at and self.error is not None:
            raise self.error
        self.open[self.launched] = batch
        return Ticket(self.launched)

    def finish(self, ticket: Ticket, masks: TokenMasks | None = None) -> StepOutput:
        """Runs the step, which must be the oldest under way."""
        assert ticket.number == min(self.open)
        self.steps += 1
        return self._run(self.open.pop(ticket.number))

    def _run(self, batch: Batch) -> StepOutput:
        for table, updates in zip(self.tables, batch.block_updates, strict=True):
            for slot, index, block in updates.tolist():
                table[slot, index] = block
        for cells, copies in zip(self.cells, batch.block_copies, strict=False):
            self.copied += len(copies)
            cells[copies[:, 1]] = cells[copies[:, 0]]
        rows = {int(row): i for i, row in enumerate(batch.sample_rows)}
        tokens, accepted = np.zeros(len(rows), np.int32), np.ones(len(rows), np.int32)
        logprobs = np.full(len(rows), np.nan, np.float32)
        hidden: list[list[float]] = []
        for b, slot in enumerate(batch.slots.tolist()):
            stands, previous = 1, None
            for t in range(batch.query_starts[b], batch.query_starts[b + 1]):
                token = int(batch.token_ids[t])
                token = self.last[slot] if token < 0 else token
                if previous is not None and previous != token:
                    stands = 0
                previous = None
                chain = self._write(slot, token, int(batch.positions[t]))
                if t in rows:
                    i, params = rows[t], batch.sampling[rows[t]]
                    target = int(params["target"])
                    if target == POOL:
                        hidden.append(state(chain))
                        tokens[i] = -1
                    elif target:
                        tokens[i], logprobs[i] = target - 1, score(chain, target - 1)
                    else:
                        seed = int(params["seed"]) + 7 * int(params["sample_index"])
                        tokens[i] = previous = sample(chain, seed, self.limits.vocab_size)
                        accepted[i] = stands
                        if stands:
                            self.last[slot] = int(tokens[i])
            assert batch.context_lens[b] == batch.positions[batch.query_starts[b + 1] - 1] + 1
        none = np.zeros((len(rows), 0))
        states = np.array(hidden, np.float32).reshape(len(hidden), HIDDEN)
        return StepOutput(tokens, accepted, logprobs, none.astype(np.int32), none.astype(np.float32), states)

    def _check(self, batch: Batch) -> None:
        limits = self.limits
        self.largest = max(self.largest, len(batch.slots))
        assert 0 < len(batch.token_ids) <= limits.max_tokens
        assert len(batch.slots) <= limits.max_requests
        assert len(batch.sample_rows) <= limits.max_rows
        assert len(set(batch.slots.tolist())) == len(batch.slots)
        assert len(self.open) < limits.max_open_steps, "a ticket was never finished"
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
        for table, cells, window in zip(self.tables, self.cells, self.windows, strict=True):
            first = max(0, position - window + 1) if window else 0
            chain = None if first else 0
            for at in range(first, position):
                stored, where, chain_at = cells[table[slot, at // size], at % size].tolist()
                assert where == at, "read a cell that holds another position"
                chain = chain_at if chain is None else mix(chain, stored, at)
                assert chain == chain_at, "read a cell that another sequence wrote"
            # A window of one token sees nothing before it: the other groups say what came before.
            chain = mix(chain, token, position) if chain is not None else mix(result, token, position)
            cells[table[slot, position // size], position % size] = (token, position, chain)
            result = chain
        return result
