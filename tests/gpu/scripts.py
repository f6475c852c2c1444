"""Random steps as an engine may ask an executor for them, and beyond: every field of a batch, drawn from a seed.

A script decides by its seed and by what the steps gave, so that two executors whose bits are the same are asked for the
same, whether they run one step at a time or two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from ridgeline.core.types import POOL, SAMPLING_DTYPE, Batch, SlotStart, StepOutput, TokenMasks

BLOCK, MOST_TOKENS, MOST_ROWS, LONGEST = 16, 32, 8, 120


@dataclass
class Owner:
    """Who has a slot.

    Attributes:
        length: tokens in the cache; blocks: by cache group, None where a window has left one behind.
        sampled: whether it has; held: the step that has drafts or masks of it; begun: the step it began with.
        special: whether its sampler holds more than its defaults.
    """

    length: int = 0
    blocks: list[list[int | None]] = field(default_factory=list)
    sampled: bool = False
    held: int = -1
    begun: int = 0
    special: bool = False


@dataclass
class Piece:
    """One request's part of a step: its tokens, which of them are rows, and these rows' sampling."""

    slot: int
    tokens: list[int]
    rows: list[int]
    params: list[dict[str, Any]]
    drafts: bool = False


class Script:
    """Draws batches for four slots of an executor with a cache group for each window, 0 for none."""

    def __init__(self, seed: int, windows: tuple[int, ...] = (0,), vocab: int = 160, num_blocks: int = 40) -> None:
        self.rng = Random(seed)
        self.windows, self.vocab = windows, vocab
        self.owners = [Owner() for _ in range(4)]
        self.free = [self.rng.sample(range(num_blocks), num_blocks) for _ in windows]
        self.number = 0
        self.pieces: dict[int, list[Piece]] = {}

    def batch(self) -> tuple[Batch, TokenMasks | None]:
        """The next step, and the masks to finish it with."""
        self.number += 1
        groups = len(self.free)
        updates: list[list[tuple[int, int, int]]] = [[] for _ in range(groups)]
        copies: list[list[tuple[int, int]]] = [[] for _ in range(groups)]
        starts: list[SlotStart] = []
        pieces: list[Piece] = []
        room, rows = MOST_TOKENS, MOST_ROWS
        able = [s for s in range(4) if self.owners[s].held < self.number - 1]
        for slot in self.rng.sample(able, self.rng.randint(1, len(able))):
            if room < 1 or rows < 1:
                break
            owner = self.owners[slot]
            if not owner.length or owner.length > LONGEST - 24 or self.rng.random() < 0.15:
                self._begin(slot, updates, copies, starts)
            piece = self._piece(slot, room, rows)
            room, rows = room - len(piece.tokens), rows - len(piece.rows)
            pieces.append(piece)
        if all(not piece.rows for piece in pieces) and self.rng.random() < 0.7:
            pieces[0].rows, pieces[0].params = [len(pieces[0].tokens) - 1], [self._params()]
        self.pieces[self.number] = pieces
        return self._flat(pieces, updates, copies, starts)

    def finished(self, number: int, output: StepOutput) -> None:
        """What a step gave: drafts that were refused are computed anew."""
        row = 0
        for piece in self.pieces.pop(number):
            if piece.drafts:
                stood = int(output.accepted[row : row + len(piece.rows)].sum())
                self.owners[piece.slot].length -= len(piece.tokens) - stood
            row += len(piece.rows)

    def _begin(self, slot: int, updates: Any, copies: Any, starts: list[SlotStart]) -> None:
        """A new owner, who may go on from a copy of what another slot has computed."""
        owner, rng = self.owners[slot], self.rng
        fresh = Owner(blocks=[[] for _ in self.free], begun=self.number)
        source = rng.choice(self.owners)
        settled = source is not owner and source.begun < self.number and source.held < self.number - 1
        forks = settled and source.length and rng.random() < 0.6
        if forks:
            length = rng.choice([source.length, rng.randint(1, source.length)])
            there = all(None not in source.blocks[g][self._first(g, length) :] for g in range(len(self.free)))
            fresh.length = length if there else 0
        for group, free in enumerate(self.free):
            if owner.blocks:
                free[:0] = [block for block in owner.blocks[group] if block is not None]
            first = self._first(group, fresh.length) if fresh.length else 0
            fresh.blocks[group] = [None] * first
            for index in range(first, -(-fresh.length // BLOCK)):
                copies[group].append((source.blocks[group][index], free[-1]))
                updates[group].append((slot, index, free[-1]))
                fresh.blocks[group].append(free.pop())
        wants = rng.random() < 0.5
        if wants or owner.special:
            starts.append(self._start(slot, fresh.length) if wants else SlotStart(slot))
        fresh.special = wants
        self.owners[slot] = fresh

    def _first(self, group: int, position: int) -> int:
        """The first block of a group that a token at a position reads."""
        window = self.windows[group]
        return max(0, position - window + 1) // BLOCK if window else 0

    def _start(self, slot: int, known: int) -> SlotStart:
        rng, ids = self.rng, np.array(self.rng.sample(range(self.vocab), 3), np.int32)
        values: dict[str, Any] = {}
        if rng.random() < 0.6:
            values |= {"repetition_penalty": rng.choice([1.7, 0.6]), "frequency_penalty": rng.choice([0.0, 0.9])}
            values |= {"presence_penalty": rng.choice([0.0, 1.5])}
        if rng.random() < 0.5:
            values |= {"bias_ids": ids, "bias": np.array([3.0, -100.0, 9.0], np.float32)}
        if rng.random() < 0.5:
            values |= {
                "min_tokens": 3,
                "min_tokens_ids": np.arange(rng.randrange(self.vocab), self.vocab, dtype=np.int32),
            }
        if rng.random() < 0.5:
            values |= {"bad_words": ((int(ids[0]),), (rng.randrange(self.vocab), int(ids[1])))}
        tokens = np.array([rng.randrange(self.vocab) for _ in range(known)], np.int32)
        return SlotStart(slot, known + rng.randint(0, 9), tokens, **values)

    def _piece(self, slot: int, room: int, rows: int) -> Piece:
        owner, rng = self.owners[slot], self.rng
        tokens = [rng.randrange(self.vocab) for _ in range(min(room, rng.choice([1, 2, 7, 8, 9, 20])))]
        if owner.sampled and rng.random() < 0.6:
            tokens = [-1]
            if rng.random() < 0.4:  # one of the drafts at least is likely to be refused
                tokens += [rng.randrange(self.vocab) for _ in range(min(rng.randint(1, 7), rows - 1, room - 1))]
        drafts = tokens[0] == -1 and len(tokens) > 1
        last = len(tokens) - 1
        if drafts:
            owner.held, wanted = self.number, list(range(len(tokens)))
        else:
            kinds = [[last], [last], [], list(range(max(0, last + 1 - rows), last + 1)), [last // 2]]
            wanted = rng.choice(kinds)
        target = 0 if drafts else rng.choice([0, 0, 0, POOL, 1])
        params = [
            self._params(target and (target if target == POOL else 1 + rng.randrange(self.vocab))) for _ in wanted
        ]
        if wanted and not drafts and wanted[-1] == last:
            params[-1] = self._params()
        masked = rng.random() < 0.25 and any(p["target"] == 0 for p in params)
        for one in params:
            one["masked"] = int(masked and one["target"] == 0 and (drafts or rng.random() < 0.7))
        if any(one["masked"] for one in params):
            owner.held = self.number
        owner.sampled = owner.sampled or any(p["target"] == 0 for p in params)
        return Piece(slot, tokens, wanted, params, drafts)

    def _params(self, target: int = 0) -> dict[str, Any]:
        rng = self.rng
        values: dict[str, Any] = {"target": target, "num_logprobs": rng.choice([-1, 0, 1, 4, 64]), "top_p": 1.0}
        if rng.random() < 0.5:
            values |= {"temperature": rng.choice([0.5, 1.3]), "seed": rng.getrandbits(64)}
            values |= rng.choice([{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}, {"sample_index": 3}])
        return values

    def _flat(self, pieces: list[Piece], updates: Any, copies: Any, starts: Any) -> tuple[Batch, TokenMasks | None]:
        tokens: list[int] = []
        positions: list[int] = []
        bounds, lens, rows = [0], [], []
        for piece in pieces:
            owner = self.owners[piece.slot]
            self._leave(owner)
            rows += [len(tokens) + row for row in piece.rows]
            tokens += piece.tokens
            positions += range(owner.length, owner.length + len(piece.tokens))
            owner.length += len(piece.tokens)
            bounds.append(len(tokens))
            lens.append(owner.length)
            for group, free in enumerate(self.free):
                while len(owner.blocks[group]) * BLOCK < owner.length:
                    updates[group].append((piece.slot, len(owner.blocks[group]), free[-1]))
                    owner.blocks[group].append(free.pop())
        flat = [params for piece in pieces for params in piece.params]
        sampling = np.zeros(len(flat), SAMPLING_DTYPE)
        for row, params in zip(sampling, flat, strict=True):
            for name, value in params.items():
                row[name] = value
        arrays = (np.array(a, np.int32) for a in (tokens, positions, [p.slot for p in pieces], bounds, lens, rows))
        cells = [np.array(u, np.int32).reshape(-1, 3) for u in updates]
        copied = [np.array(c, np.int32).reshape(-1, 2) for c in copies] if any(copies) else []
        return Batch(*arrays, sampling, cells, copied, starts), self._masks(int(sampling["masked"].sum()))

    def _leave(self, owner: Owner) -> None:
        """Gives back blocks that no window of the next step reaches; somebody else may write them in that very step."""
        for group, free in enumerate(self.free):
            for index in range(self._first(group, owner.length)):
                block = owner.blocks[group][index]
                if block is not None:
                    free.append(block)
                    owner.blocks[group][index] = None

    def _masks(self, count: int) -> TokenMasks | None:
        if not count:
            return None
        draw = np.random.default_rng(self.rng.getrandbits(32)).random((count, self.vocab)) < 0.2
        draw[:, 7] = True
        draw = np.pad(draw, ((0, 0), (0, -self.vocab % 32)))
        packed = np.packbits(draw, axis=1, bitorder="little")
        return TokenMasks(np.ascontiguousarray(packed).view("<u4").astype(np.uint32))


def play(script: Script, executor: Any, steps: int, most_open: int) -> list[StepOutput]:
    """So many steps of a script, ``most_open`` under way at once; what they gave."""
    outputs: list[StepOutput] = []
    under_way: list[tuple[int, Any, Any]] = []

    def finish() -> None:
        number, ticket, masks = under_way.pop(0)
        outputs.append(executor.finish(ticket, masks))
        script.finished(number, outputs[-1])

    for _ in range(steps):
        batch, masks = script.batch()
        under_way.append((script.number, executor.launch(batch), masks))
        while len(under_way) >= most_open:
            finish()
    while under_way:
        finish()
    return outputs


def same(some: list[StepOutput], others: list[StepOutput]) -> None:
    """Raises AssertionError unless every bit of the outputs is the same."""
    for a, b in zip(some, others, strict=True):
        for name in ("token_ids", "accepted", "logprobs", "top_ids", "top_logprobs", "hidden"):
            one, other = getattr(a, name), getattr(b, name)
            assert one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes(), name
