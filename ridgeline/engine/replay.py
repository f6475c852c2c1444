"""Runs a flight record again: the cache is computed anew from tokens, then the same steps run, and bits are compared.

The determinism contract is what makes this work: a token's keys and values are the same bits however its sequence is
cut into chunks, so what a recorded step finds in a block can be computed anew, and must be where the recorded block
tables say. Rebuilding uses a slot and blocks of its own, beyond the recorded ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ridgeline.core.errors import RidgelineError
from ridgeline.core.types import SAMPLING_DTYPE, Batch, Executor, Int32, StepOutput
from ridgeline.engine.flight import (
    FlightRecord,
    LiveRequest,
    OutputRecord,
    Sizes,
    Started,
    StepRecord,
    batch_of,
    ints,
    slot_start_of,
)
from ridgeline.engine.recorder import digest, record_output, row_hashes


@dataclass(frozen=True)
class Divergence:
    """The first difference: of which step, slot and position (of the row's token), what, and both values."""

    step: int
    slot: int
    position: int
    what: str
    recorded: str
    replayed: str


@dataclass
class ReplayReport:
    """What a replay found.

    Attributes:
        steps, tokens: that were run again; compared: steps of which the record has the output.
        live, started: requests that ran when the record begins, and that started in it.
        rebuilt_tokens: tokens computed anew to fill the cache.
        logits: whether hashes of logits were compared.
        differing_steps: steps whose outputs differ; first: the first difference.
        failed_again: of a step that failed when it was recorded, what it raised now; None: it ran, or there is none.
    """

    steps: int = 0
    tokens: int = 0
    compared: int = 0
    live: int = 0
    started: int = 0
    rebuilt_tokens: int = 0
    logits: bool = False
    differing_steps: int = 0
    first: Divergence | None = None
    failed_again: str | None = None

    @property
    def identical(self) -> bool:
        """Whether nothing differs."""
        return self.differing_steps == 0


@dataclass(frozen=True)
class Prefix:
    """Cache contents that must exist before the first step: ``tokens`` [N] from position 0 on, in these blocks.

    ``blocks`` has one list for each cache group; -1 where the block is not needed, or is written by a recorded step.
    """

    tokens: Int32
    blocks: list[list[int]]


@dataclass
class _Blocks:
    """Follows block tables through the steps, and which blocks they have written."""

    sizes: Sizes
    tables: list[Int32] = field(init=False)
    written: list[set[int]] = field(init=False)

    def __post_init__(self) -> None:
        shape = self.sizes.num_slots, self.sizes.max_blocks_per_slot
        self.tables = [np.full(shape, -1, np.int32) for _ in self.sizes.num_blocks]
        self.written = [set() for _ in self.sizes.num_blocks]

    def live(self, request: LiveRequest) -> Prefix:
        """What a request that runs already has in the cache."""
        tokens = ints(request.tokens)
        blocks = []
        for group, table in enumerate(self.tables):
            held = ints(request.blocks[group])
            table[request.slot, : len(held)] = held
            first, end = self._first_seen(group, len(tokens)), -(-len(tokens) // self.sizes.block_size)
            blocks.append([-1] * first + held[first:end].tolist())
        return Prefix(tokens, blocks)

    def step(self, batch: Batch, started: list[Started]) -> list[Prefix]:
        """Follows a step; what those who start in it find in blocks that no step before it has written."""
        for table, updates in zip(self.tables, batch.block_updates, strict=True):
            table[updates[:, 0], updates[:, 1]] = updates[:, 2]
        sources = [{d: s for s, d in c.tolist()} for c in batch.block_copies] or [{} for _ in self.tables]
        found = [self._hit(start.slot, ints(start.prefix), sources) for start in started if start.prefix]
        for written, copied in zip(self.written, sources, strict=True):
            written.update(copied)
        size = self.sizes.block_size
        firsts, lasts = batch.positions[batch.query_starts[:-1]], batch.context_lens - 1
        for slot, first, last in zip(batch.slots.tolist(), firsts.tolist(), lasts.tolist(), strict=True):
            for table, written in zip(self.tables, self.written, strict=True):
                written.update(table[slot, first // size : last // size + 1].tolist())
        return found

    def _hit(self, slot: int, tokens: Int32, sources: list[dict[int, int]]) -> Prefix:
        blocks = []
        for group, table in enumerate(self.tables):
            first, end = self._first_seen(group, len(tokens)), -(-len(tokens) // self.sizes.block_size)
            origin = [sources[group].get(b, b) for b in table[slot, first:end].tolist()]
            blocks.append([-1] * first + [-1 if b in self.written[group] else b for b in origin])
        return Prefix(tokens, blocks)

    def _first_seen(self, group: int, position: int) -> int:
        """Index of the first block that the token at ``position`` reads."""
        window = self.sizes.windows[group]
        return max(0, position - window + 1) // self.sizes.block_size if window else 0


def prefixes(record: FlightRecord) -> list[Prefix]:
    """All that the steps read and none of them has written before."""
    blocks = _Blocks(record.sizes)
    found = [blocks.live(request) for request in record.live]
    for step in record.steps:
        found += blocks.step(batch_of(step), step.started)
    return [p for p in found if len(p.tokens) and any(b >= 0 for group in p.blocks for b in group)]


class _Rebuilder:
    """Computes prefixes into their blocks, through a slot and blocks beyond the recorded ones."""

    def __init__(self, executor: Executor, sizes: Sizes) -> None:
        self._executor, self._sizes = executor, sizes
        self._done: list[dict[int, tuple[Int32, int]]] = [{} for _ in sizes.num_blocks]  # block -> tokens, how many
        self.num_tokens = 0

    def rebuild(self, prefix: Prefix) -> None:
        """Compute what is missing of a prefix; raises RidgelineError when another has claimed its blocks."""
        size, total = self._sizes.block_size, len(prefix.tokens)
        ready = 0
        while (ready + 1) * size <= total and all(
            self._holds(group, held[ready], prefix.tokens, (ready + 1) * size)
            for group, held in enumerate(prefix.blocks)
        ):
            ready += 1
        for group, held in enumerate(prefix.blocks):
            for index, block in enumerate(held):
                if block >= 0:
                    self._claim(group, block, prefix.tokens, min((index + 1) * size, total), index * size)
        start, slot = ready * size, self._sizes.num_slots
        updates = [
            np.array([(slot, i, spare + i if b < 0 else b) for i, b in enumerate(held)], np.int32).reshape(-1, 3)
            for spare, held in zip(self._sizes.num_blocks, prefix.blocks, strict=True)
        ]
        while start < total:
            stop = min(total, start + self._sizes.max_tokens)
            self._compute(prefix.tokens[start:stop], start, updates)
            updates = [u[:0] for u in updates]
            start = stop

    def _holds(self, group: int, block: int, tokens: Int32, end: int) -> bool:
        """Whether a block holds already the cells of ``tokens`` up to ``end``."""
        other, known = self._done[group].get(block, (tokens, 0))
        return known >= end and np.array_equal(other[:end], tokens[:end])

    def _claim(self, group: int, block: int, tokens: Int32, end: int, start: int) -> None:
        other, known = self._done[group].get(block, (tokens, start))
        common = min(known, end)
        if known <= start and other is not tokens or not np.array_equal(other[:common], tokens[:common]):
            raise RidgelineError(f"the record contradicts itself: block {block} holds two prefixes at once")
        if end > known:
            self._done[group][block] = tokens, end

    def _compute(self, tokens: Int32, start: int, updates: list[Int32]) -> None:
        number = len(tokens)
        batch = Batch(
            token_ids=np.ascontiguousarray(tokens),
            positions=np.arange(start, start + number, dtype=np.int32),
            slots=np.array([self._sizes.num_slots], np.int32),
            query_starts=np.array([0, number], np.int32),
            context_lens=np.array([start + number], np.int32),
            sample_rows=np.zeros(0, np.int32),
            sampling=np.zeros(0, SAMPLING_DTYPE),
            block_updates=updates,
        )
        self._executor.finish(self._executor.launch(batch))
        self.num_tokens += number


def replay(record: FlightRecord, executor: Executor) -> ReplayReport:
    """Run a record's steps on a fresh executor and compare.

    Args:
        record: from ``read_record`` or ``FlightRecorder.capture``.
        executor: of the same model, with one slot more than recorded and, in each cache group, as many blocks more
            as one slot's table has. ``last_logits`` is read where hashes of logits were recorded.

    Raises RidgelineError for a record that contradicts itself, or of which a step cannot be run.
    """
    report = ReplayReport(live=len(record.live))
    rebuilder = _Rebuilder(executor, record.sizes)
    for prefix in sorted(prefixes(record), key=lambda p: len(p.tokens)):
        rebuilder.rebuild(prefix)
    report.rebuilt_tokens = rebuilder.num_tokens
    waiting = {r.slot: slot_start_of(r.start) for r in record.live if r.start is not None}
    for number, step in enumerate(record.steps):
        batch = batch_of(step)
        if number == 0:
            _restore(batch, record.live)
        # Sampling state comes with a slot's first tokens, which nothing that starts anew can come before.
        starts = [waiting.pop(slot) for slot in batch.slots.tolist() if slot in waiting]
        batch.slot_starts = [*starts, *batch.slot_starts]
        if not _run(record, step, batch, executor, report):
            break
        report.steps += 1
        report.tokens += len(batch.token_ids)
        report.started += len(step.started)
    return report


def _restore(first: Batch, live: list[LiveRequest]) -> None:
    """Let the first step bring the block tables of requests that run already."""
    for group, own in enumerate(first.block_updates):
        cells = [(r.slot, i, block) for r in live for i, block in enumerate(ints(r.blocks[group]).tolist())]
        first.block_updates[group] = np.concatenate([np.array(cells, np.int32).reshape(-1, 3), own])


def _run(record: FlightRecord, step: StepRecord, batch: Batch, executor: Executor, report: ReplayReport) -> bool:
    """Run one step and compare; False when it failed, as it had when it was recorded."""
    failure = record.failure
    try:
        ticket = executor.launch(batch)
        hashed = step.output is not None and step.output.logits is not None
        logits = row_hashes(_last_logits(executor)) if hashed else None
        output = executor.finish(ticket)
    except Exception as error:
        if failure is None or failure.step != step.number or failure.stage == "after":
            raise RidgelineError(f"step {step.number} cannot be run: {type(error).__name__}: {error}") from error
        report.failed_again = f"{type(error).__name__}: {error}"
        return False
    if step.output is None:
        return True
    report.compared += 1
    report.logits = report.logits or hashed
    hidden = digest(output.hidden) if step.output.hidden is not None else None
    difference = _difference(step, batch, record_output(output, logits, hidden), output)
    if difference is not None:
        report.differing_steps += 1
        report.first = report.first or difference
    return True


def _last_logits(executor: Executor) -> Any:
    logits = getattr(executor, "last_logits", None)
    if logits is None:
        raise RidgelineError("the record has hashes of logits, and this executor keeps none")
    return logits


def _difference(step: StepRecord, batch: Batch, new: OutputRecord, output: StepOutput) -> Divergence | None:
    """The first row in which a step's output differs from the recorded one; None: there is none."""
    old = step.output
    assert old is not None
    if old == new:
        return None
    rows = len(batch.sample_rows)
    for row in range(rows):
        for what, recorded, replayed in (
            ("logits", _hash(old.logits, row), _hash(new.logits, row)),
            ("token", _cell(old.token_ids, row, rows, "<i4"), _cell(new.token_ids, row, rows, "<i4")),
            ("accepted", _cell(old.accepted, row, rows, "<i4"), _cell(new.accepted, row, rows, "<i4")),
            ("log probability", _cell(old.logprobs, row, rows, "<f4"), _cell(new.logprobs, row, rows, "<f4")),
            ("best tokens", _cell(old.top_ids, row, rows, "<i4"), _cell(new.top_ids, row, rows, "<i4")),
            ("best log probabilities", *(_cell(o.top_logprobs, row, rows, "<f4") for o in (old, new))),
        ):
            if recorded != replayed:
                token = int(batch.sample_rows[row])
                request = int(np.searchsorted(batch.query_starts, token, side="right")) - 1
                position = int(batch.positions[token])
                return Divergence(step.number, int(batch.slots[request]), position, what, recorded, replayed)
    what = f"{len(output.hidden)} pooled states"
    return Divergence(step.number, -1, -1, what, (old.hidden or b"").hex(), (new.hidden or b"").hex())


def _hash(hashes: list[bytes] | None, row: int) -> str:
    return "" if hashes is None or row >= len(hashes) else hashes[row].hex()


def _cell(data: bytes, row: int, rows: int, dtype: str) -> str:
    """What one of ``rows`` equal parts of an array holds; of floats the exact bits."""
    size = len(data) // rows
    values = np.frombuffer(data[row * size : (row + 1) * size], dtype)
    return " ".join(v.hex() if dtype == "<f4" else str(v) for v in values.tolist())
