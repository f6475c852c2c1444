"""Reads a Batch the strict way: what the contract forbids raises, what it allows becomes plain ints."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ridgeline.core.types import POOL, SAMPLING_DTYPE, Batch, Int32, SlotStart
from ridgeline.engine.engine import EngineLimits
from tests.sim.model import Row, Rules, Sampler, sampler_of


class ContractError(AssertionError):
    """A batch that no executor may be given."""


def need(ok: bool, what: str) -> None:
    """Raise ContractError unless ``ok``."""
    if not ok:
        raise ContractError(what)


@dataclass(slots=True)
class Work:
    """What one request does in a step.

    Attributes:
        slot: whose it is.
        first: position of its first token.
        tokens: what it feeds; -1 first where that is what the slot sampled last.
        rows: (index into ``tokens``, sampling) of every row wanted.
        blocks: for each cache group, the slot's table as this step sees it.
        sampler: what the slot's owner asked of the sampler.
        stood: how many of the tokens stand, once the step has run.
    """

    slot: int
    first: int
    tokens: list[int]
    rows: list[tuple[int, Row]]
    blocks: list[list[int]]
    sampler: Sampler | None = None
    stood: int = 0

    @property
    def end(self) -> int:
        """Position after its last token."""
        return self.first + len(self.tokens)

    @property
    def drafts(self) -> bool:
        """Whether it samples a row before its last, so that tokens of it may be rejected."""
        return any(i + 1 < len(self.tokens) and row.target == 0 for i, row in self.rows)

    def written(self, block_size: int) -> range:
        """Indices into its tables of the blocks it writes."""
        return range(self.first // block_size, (self.end - 1) // block_size + 1)

    def read(self, block_size: int, window: int) -> range:
        """Indices into a table of the blocks it reads back, of a group with this window."""
        low = max(0, self.first - window + 1) if window else 0
        return range(low // block_size, -(-self.first // block_size))


@dataclass(slots=True)
class Step:
    """A launched step.

    Attributes:
        copies: (source, destination) blocks per cache group, or no groups at all.
    """

    work: list[Work]
    copies: list[list[list[int]]]
    starts: list[SlotStart]


@dataclass(slots=True)
class Slot:
    """What the contract makes of a slot once every launched step has run.

    Attributes:
        next: position after what it was fed last.
        samples: whether a token for ``next`` is or will be sampled, so that -1 may follow.
        drafting: open steps with drafts of its own, after which nothing may be launched.
        sampler: its sampling state, if its owner asked for any.
        started: whether any owner ever brought a SlotStart.
    """

    next: int = 0
    samples: bool = False
    drafting: bool = False
    sampler: Sampler | None = None
    started: bool = False


@dataclass
class BatchReader:
    """Checks each batch against the contract and against what the slots did before."""

    limits: EngineLimits
    rules: Rules
    table_len: int = field(init=False)
    slots: list[Slot] = field(init=False)
    tables: list[list[list[int]]] = field(init=False)
    failed: bool = False

    def __post_init__(self) -> None:
        self.table_len = -(-self.limits.max_len // self.limits.block_size)
        self.slots = [Slot() for _ in range(self.limits.max_requests)]
        self.tables = [[[-1] * self.table_len for _ in self.slots] for _ in self.limits.num_blocks]

    def read(self, batch: Batch) -> Step:
        """The step that ``batch`` asks for."""
        limits = self.limits
        arrays = (batch.token_ids, batch.positions, batch.slots, batch.query_starts, batch.context_lens)
        for array in (*arrays, batch.sample_rows):
            need(array.dtype == np.int32 and array.ndim == 1 and array.flags.c_contiguous, "not flat int32")
        tokens, positions, slots, starts, contexts = (a.tolist() for a in arrays)
        need(0 < len(tokens) <= limits.max_tokens, f"{len(tokens)} tokens in a step of at most {limits.max_tokens}")
        need(len(positions) == len(tokens), "a position for each token")
        need(0 < len(slots) <= limits.max_requests and len(set(slots)) == len(slots), "a slot is in the step twice")
        need(len(starts) == len(slots) + 1 and starts[0] == 0 and starts[-1] == len(tokens), "query_starts")
        need(len(contexts) == len(slots), "a context length for each request")
        need(0 <= min(slots) and max(slots) < limits.max_requests, "a slot that does not exist")
        need(len(batch.sample_rows) <= limits.max_rows, "more rows than a step may sample")
        need(not batch.extras, "inputs that the model does not have")
        rows = self._rows(batch, len(tokens))
        self._update(batch.block_updates)
        copies = self._copies(batch.block_copies)
        opened = self._starts(batch.slot_starts, slots)
        step = Step([], copies, list(batch.slot_starts))
        at = 0
        for b, slot in enumerate(slots):
            low, high = starts[b], starts[b + 1]
            need(low < high, "a request without tokens")
            first = positions[low]
            need(positions[low:high] == list(range(first, first + high - low)), "positions are not consecutive")
            need(contexts[b] == first + high - low, "context length")
            mine = []
            while at < len(rows) and rows[at][0] < high:
                mine.append((rows[at][0] - low, rows[at][1]))
                at += 1
            work = Work(
                slot,
                first,
                tokens[low:high],
                mine,
                [t[slot][: -(-contexts[b] // limits.block_size)] for t in self.tables],
            )
            self._check(work, opened.get(slot))
            step.work.append(work)
        self._owners(step)
        return step

    def _rows(self, batch: Batch, tokens: int) -> list[tuple[int, Row]]:
        """(index, sampling) of the sampled rows, ascending."""
        need(batch.sampling.dtype == SAMPLING_DTYPE and batch.sampling.ndim == 1, "sampling rows of another type")
        rows = batch.sample_rows.tolist()
        need(len(batch.sampling) == len(rows), "a sampling row for each sampled row")
        need(all(a < b for a, b in zip([-1, *rows], rows, strict=False)), "sampled rows do not ascend")
        need(not rows or rows[-1] < tokens, "a sampled row outside the step")
        sampling = [Row(*row) for row in batch.sampling.tolist()]
        for row in sampling:
            need(row.masked == 0, "masks are not simulated")
            need(row.target == POOL or 0 <= row.target <= self.rules.vocab, "target")
            need(-1 <= row.num_logprobs <= 64 and row.sample_index >= 0, "num_logprobs or sample_index")
        return list(zip(rows, sampling, strict=True))

    def _update(self, updates: list[Int32]) -> None:
        need(len(updates) == len(self.tables), "block updates for each group")
        for table, cells, blocks in zip(self.tables, updates, self.limits.num_blocks, strict=True):
            need(cells.dtype == np.int32 and cells.ndim == 2 and cells.shape[1] == 3, "block updates are [N, 3] int32")
            for slot, index, block in cells.tolist():
                need(0 <= slot < len(self.slots) and 0 <= index < self.table_len, "an update outside the tables")
                need(0 <= block < blocks, f"block {block} of {blocks}")
                table[slot][index] = block

    def _copies(self, copies: list[Int32]) -> list[list[list[int]]]:
        need(len(copies) in (0, len(self.tables)), "block copies for each group, or none")
        found = []
        for pairs, blocks in zip(copies, self.limits.num_blocks, strict=False):
            need(pairs.dtype == np.int32 and pairs.ndim == 2 and pairs.shape[1] == 2, "block copies are [N, 2] int32")
            listed = pairs.tolist()
            need(all(0 <= b < blocks for pair in listed for b in pair), "a copy of a block that does not exist")
            targets = [d for _, d in listed]
            need(len(set(targets)) == len(targets), "two copies into one block")
            need(not set(targets) & {s for s, _ in listed}, "a block is copied from and to")
            found.append(listed)
        return found

    def _starts(self, starts: object, slots: list[int]) -> dict[int, SlotStart]:
        """The slots that start anew."""
        opened: dict[int, SlotStart] = {}
        for start in starts:  # type: ignore[attr-defined]
            need(start.slot in slots, "a slot starts without a token in the step")
            need(start.slot not in opened, "a slot starts twice")
            opened[start.slot] = start
            slot, sampler = self.slots[start.slot], sampler_of(start)
            lost = self.failed  # a batch, and with it perhaps a start: then nobody can know what the slot has
            need(sampler is not None or slot.started or lost, "a start that asks for nothing, on a slot that had none")
            slot.sampler, slot.started = sampler, True
            slot.samples = False
        return opened

    def _check(self, work: Work, start: SlotStart | None) -> None:
        """One request's tokens against its slot, which then is as this step leaves it."""
        slot, limits = self.slots[work.slot], self.limits
        need(work.end <= limits.max_len, "tokens past the context")
        need(not slot.drafting, "a slot with drafts in flight is launched again")
        need(all(t >= 0 for t in work.tokens[1:]), "only the first token can be what the slot sampled last")
        need(max(work.tokens) < self.rules.vocab and work.tokens[0] >= -1, "a token outside the vocabulary")
        if work.tokens[0] == -1:
            need(
                start is None and work.first == slot.next and slot.samples, "-1, and the slot has sampled nothing here"
            )
        if start is not None and slot.sampler is not None:
            need(work.first == len(start.tokens), "a slot starts where its log does not end")
            need(0 < start.prompt_len <= limits.max_len, "prompt_len")
        elif slot.sampler is not None:
            need(work.first == slot.next, "a slot with a log goes on elsewhere, without a start")
        for i, row in work.rows:
            last = i + 1 == len(work.tokens)
            if row.target > 0 and not last:
                need(work.tokens[i + 1] == row.target - 1, "a scored token is not the one that follows")
        sampled = [i for i, row in work.rows if row.target == 0]
        if sampled:
            need(sampled == list(range(sampled[0], len(work.tokens))), "drafts are the last tokens, each with a row")
        work.sampler = slot.sampler
        slot.next, slot.samples, slot.drafting = work.end, bool(sampled), work.drafts

    def _owners(self, step: Step) -> None:
        """No block is written by two, or written by one and read by another in the same step."""
        size = self.limits.block_size
        for group, window in enumerate(self.rules.windows):
            writer: dict[int, int] = {d: -1 for _, d in (step.copies[group] if step.copies else ())}
            copied = set(writer)
            for work in step.work:
                for i in work.written(size):
                    block = work.blocks[group][i]
                    need(block >= 0, f"a token at a place of slot {work.slot}'s table that was never set")
                    need(writer.get(block, -1) == -1, f"block {block} is written by two slots")
                    writer[block] = work.slot
            for work in step.work:
                for i in work.read(size, window):
                    block = work.blocks[group][i]
                    need(block >= 0, f"slot {work.slot} reads a place of its table that was never set")
                    owner = writer.get(block, work.slot)
                    need(
                        owner == work.slot or (owner == -1 and block in copied),
                        f"block {block} is read by {work.slot} and written by {owner}",
                    )

    def finished(self, work: Work) -> None:
        """Tell the slot how many of its tokens stood, once a step with drafts is done."""
        if work.drafts:
            slot = self.slots[work.slot]
            slot.drafting = False
            slot.next = work.first + work.stood
