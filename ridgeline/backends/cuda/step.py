"""A batch as the device reads it: one block of bytes, the same places for every step of a bucket."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.backends.cuda.kernels.sample import PROMPT_BIT
from ridgeline.backends.cuda.lowering import FEW_TOKENS, Sizes, StepTensors
from ridgeline.backends.reference.slots import SlotLog, banned
from ridgeline.core.types import POOL, Batch, Int32

PER_TOKEN = ("fed", "positions", "token_slots")
PER_REQUEST = ("slots", "context_lens", "query_starts", "row_starts")
"""The last two have one more."""
PER_ROW = (
    *("sample_rows", "next_positions", "sample_indices", "top_ks", "targets", "adjusted", "wanted"),
    *("settles", "settles_masked"),  # as targets, in the pass without masks and in that under them
)
PER_ROW_FLOAT = ("temperatures", "top_ps", "floors")

ALIGN = 4
"""Fields begin at multiples of 16 bytes, so that a kernel's variant does not hang on a bucket."""


@dataclass(frozen=True)
class Layout:
    """Where a bucket's fields lie in its block, in elements of 4 bytes."""

    sizes: Sizes

    @cached_property
    def fields(self) -> dict[str, tuple[int, int]]:
        """(first element, elements) by name."""
        t, b, s = self.sizes.tokens, self.sizes.requests, self.sizes.rows
        lengths = dict.fromkeys(PER_TOKEN, t)
        lengths |= {name: b + name.endswith("starts") for name in PER_REQUEST}
        lengths |= dict.fromkeys((*PER_ROW, *PER_ROW_FLOAT), s) | {"seeds": 2 * s}
        found, at = {}, 0
        for name, length in lengths.items():
            found[name] = (at, length)
            at += -(-length // ALIGN) * ALIGN
        return found

    @cached_property
    def nbytes(self) -> int:
        """Of the block."""
        at, length = self.fields["seeds"]
        return 4 * (at + -(-length // ALIGN) * ALIGN)

    def tensors(self, block: torch.Tensor) -> dict[str, torch.Tensor]:
        """The fields as views of a block's uint8 tensor."""
        words = block[: self.nbytes].view(torch.int32)
        found = {name: words[at : at + length] for name, (at, length) in self.fields.items()}
        found |= {name: found[name].view(torch.float32) for name in PER_ROW_FLOAT}
        return found | {"seeds": found["seeds"].view(-1, 2)}

    def arrays(self, block: npt.NDArray[np.uint8]) -> dict[str, Any]:
        """The fields as views of a block's bytes."""
        words = block[: self.nbytes].view(np.int32)
        found: dict[str, Any] = {name: words[at : at + length] for name, (at, length) in self.fields.items()}
        found |= {name: found[name].view(np.float32) for name in PER_ROW_FLOAT}
        return found | {"seeds": found["seeds"].reshape(-1, 2)}

    def step_tensors(self, block: torch.Tensor, token_ids: torch.Tensor, identity: torch.Tensor) -> StepTensors:
        """What the plan's operators read."""
        f = self.tensors(block)
        names = ("positions", "token_slots", "slots", "query_starts", "context_lens", "sample_rows")
        return StepTensors(token_ids=token_ids, identity=identity, **{name: f[name] for name in names})


def sizes_of(batch: Batch, widths: Int32) -> Sizes:
    """A batch's own sizes, without padding; ``widths``: tokens of each of its requests."""
    prefills = len(widths) > 0 and int(widths.max()) > FEW_TOKENS
    return Sizes(len(batch.token_ids), len(batch.slots), len(batch.sample_rows), prefills)


def few_first(batch: Batch, widths: Int32) -> tuple[Batch, npt.NDArray[np.intp] | None]:
    """A batch whose requests of at most FEW_TOKENS tokens come first, the decode kernel's.

    Args:
        widths: tokens of each of its requests.

    Returns:
        The batch, and for each of its rows where it was; None for one that has been so, as schedulers leave most.
    """
    many = widths > FEW_TOKENS
    if not (many[:-1] & ~many[1:]).any():
        return batch, None
    order = np.argsort(many, kind="stable")
    starts = batch.query_starts
    tokens = np.concatenate([np.arange(starts[b], starts[b + 1]) for b in order])
    where = np.empty(len(tokens), np.int64)
    where[tokens] = np.arange(len(tokens))  # of each old token, its new place
    rows = where[batch.sample_rows]
    back = np.argsort(rows, kind="stable")
    return replace(
        batch,
        token_ids=batch.token_ids[tokens],
        positions=batch.positions[tokens],
        slots=batch.slots[order],
        query_starts=np.concatenate([[0], np.cumsum(widths[order])]).astype(np.int32),
        context_lens=batch.context_lens[order],
        sample_rows=rows[back].astype(np.int32),
        sampling=batch.sampling[back],
    ), back


@dataclass(frozen=True)
class Asked:
    """What the rows of a step ask for. Most steps' rows are the last one's, so it is looked at once for them all.

    Attributes:
        rows: the bytes of ``Batch.sampling``.
        masked, pooled, filtered: whether any row waits for a mask, wants its hidden state, has top-k or top-p.
        scored, listed: whether any wants its token's log probability, and those of the most likely.
    """

    rows: bytes
    masked: bool
    pooled: bool
    filtered: bool
    scored: bool
    listed: bool


def asked(sampling: npt.NDArray[np.void], last: Asked | None) -> Asked:
    """What ``sampling`` asks for; ``last``: what was found of an earlier step's."""
    rows = sampling.tobytes()
    if last is not None and rows == last.rows:
        return last
    most = int(sampling["num_logprobs"].max(initial=-1))
    return Asked(
        rows,
        masked=bool(sampling["masked"].any()),
        pooled=bool((sampling["target"] == POOL).any()),
        filtered=bool(((sampling["top_k"] > 0) | (sampling["top_p"] < 1)).any()),
        scored=most >= 0,
        listed=most > 0,
    )


@dataclass
class Held:
    """What a block on the host holds from the step before: of that nothing is written again.

    Attributes:
        layout, counts: whose fields lie in it, and tokens, requests and rows of that step: beyond them is padding.
        rows: the bytes of its rows' parameters; None where masks or adjustments had a part in them.
    """

    layout: Layout | None = None
    counts: tuple[int, int, int] = (0, 0, 0)
    rows: bytes | None = None


def encode(batch: Batch, layout: Layout, f: Mapping[str, Any], adjusted: Int32 | None, ask: Asked, held: Held) -> None:
    """Writes a batch into a bucket's block.

    Args:
        f: the fields of ``layout`` in it (``Layout.arrays``).
        adjusted: [S] for each row, its row of token counts and bias; 0: the one without any; None: all have none.
        held: of this block; brought up to date.
    """
    t, b, s = counts = len(batch.token_ids), len(batch.slots), len(batch.sample_rows)
    pads = held.layout is not layout or held.counts != counts
    alone = t == b == s  # every request has a token and a row, if none has more: prefills and drafts have
    alone = alone and bool((batch.query_starts[1:] - batch.query_starts[:-1] == 1).all())
    owners = batch.slots if alone else np.repeat(batch.slots, np.diff(batch.query_starts))
    positions = batch.positions if alone else batch.positions[batch.sample_rows]
    row_starts = batch.query_starts if alone else np.searchsorted(batch.sample_rows, batch.query_starts)
    for name, values, rest in (
        ("fed", batch.token_ids, 0),
        ("positions", batch.positions, 0),
        ("token_slots", owners, -1),
        ("slots", batch.slots, 0),
        ("context_lens", batch.context_lens, 0),
        ("query_starts", batch.query_starts, t),
        ("row_starts", row_starts, s),
        ("sample_rows", batch.sample_rows, 0),
        ("next_positions", positions + 1, 0),
    ):
        field, n = f[name], len(values)
        field[:n] = values
        if pads:
            field[n:] = rest
    plain = adjusted is None and not ask.masked
    if pads or not plain or held.rows != ask.rows:
        _encode_rows(batch, f, adjusted)
    held.layout, held.counts, held.rows = layout, counts, ask.rows if plain else None


def _encode_rows(batch: Batch, f: Mapping[str, Any], adjusted: Int32 | None) -> None:
    """What the sampler reads of each row beside its place."""
    rows, s = batch.sampling, len(batch.sample_rows)
    _padded(f["sample_indices"], rows["sample_index"], 0)
    _padded(f["top_ks"], np.maximum(rows["top_k"], 0), 0)
    _padded(f["targets"], rows["target"], 0)
    held = held_rows(batch)
    _padded(f["settles"], np.where(held, 1, rows["target"]), 1)
    _padded(f["settles_masked"], np.where(held, rows["target"], 1), 1)
    _padded(f["adjusted"], np.zeros(s, np.int32) if adjusted is None else adjusted, 0)
    _padded(f["wanted"], np.where(rows["target"] == POOL, 0, rows["num_logprobs"]), 0)
    _padded(f["temperatures"], rows["temperature"], 0.0)
    _padded(f["top_ps"], rows["top_p"], 1.0)
    with np.errstate(divide="ignore"):
        _padded(f["floors"], np.log(rows["min_p"]), -np.inf)
    f["seeds"][:s, 0] = (rows["seed"] & np.uint64(0xFFFFFFFF)).astype(np.uint32).view(np.int32)
    f["seeds"][:s, 1] = (rows["seed"] >> np.uint64(32)).astype(np.uint32).view(np.int32)
    f["seeds"][s:] = 0


def _padded(field: Any, values: Any, rest: Any) -> None:
    n = len(values)
    field[:n] = values
    field[n:] = rest


def held_rows(batch: Batch) -> npt.NDArray[np.bool_]:
    """[S] rows of requests that are settled only under their masks: those with a flagged row."""
    masked = batch.sampling["masked"] != 0
    if not masked.any():
        return np.zeros(len(masked), bool)
    owners = np.searchsorted(batch.query_starts, batch.sample_rows, side="right")
    held: npt.NDArray[np.bool_] = np.isin(owners, owners[masked])
    return held


@dataclass(frozen=True)
class Adjustments:
    """What penalties, bias, bad words and min_tokens make of a step's rows.

    Attributes:
        rows: [S] each row's place below, from 1; 0: nothing is asked.
        cells: int32 [n, 4] (place, token, count, bits of the bias).
        penalties: fp32 [places + 1, 3]: repetition, presence, frequency; the first are neutral.
    """

    rows: Int32
    cells: Int32
    penalties: npt.NDArray[np.float32]


def adjustments(batch: Batch, logs: Mapping[int, SlotLog]) -> Adjustments | None:
    """None where no sampled row asks for anything; the logs hold this step's tokens already."""
    if not logs:
        return None
    rows = np.zeros(len(batch.sample_rows), np.int32)
    cells: list[tuple[int, int, int, int]] = []
    penalties = [(1.0, 0.0, 0.0)]
    owners = np.searchsorted(batch.query_starts, batch.sample_rows, side="right") - 1
    for row, owner in enumerate(owners):
        log = logs.get(int(batch.slots[owner]))
        if log is None or batch.sampling[row]["target"] == POOL:
            continue
        rows[row] = place = len(penalties)
        start = log.start
        penalties.append((start.repetition_penalty, start.presence_penalty, start.frequency_penalty))
        tokens = log.tokens[: int(batch.positions[batch.sample_rows[row]]) + 1]
        cells += _cells(place, log, tokens)
    if len(penalties) == 1:
        return None
    return Adjustments(rows, np.array(cells, np.int32).reshape(-1, 4), np.array(penalties, np.float32))


def _cells(place: int, log: SlotLog, tokens: Int32) -> list[tuple[int, int, int, int]]:
    counts: dict[int, int] = {}
    bias: dict[int, np.float32] = {}
    for token in np.unique(tokens[: log.start.prompt_len]).tolist():
        counts[token] = PROMPT_BIT
    for token, count in zip(*np.unique(tokens[log.start.prompt_len :], return_counts=True), strict=True):
        counts[int(token)] = counts.get(int(token), 0) + int(count)
    for token, value in zip(log.start.bias_ids.tolist(), log.start.bias, strict=True):
        bias[token] = np.float32(value)
    for token in banned(log.start, tokens):
        bias[token] = np.float32(-np.inf)
    return [
        (place, token, counts.get(token, 0), int(bias.get(token, np.float32(0)).view(np.int32)))
        for token in sorted(counts.keys() | bias.keys())
    ]


def varying(batch: Batch, adjusted: Adjustments | None) -> dict[str, npt.NDArray[Any]]:
    """What varies in length from step to step, by name."""
    parts: dict[str, npt.NDArray[Any]] = {}
    for name, groups in (("updates", batch.block_updates), ("copies", batch.block_copies)):
        for group, cells in enumerate(groups):
            if len(cells):
                parts[f"{name}{group}"] = np.ascontiguousarray(cells)
    if adjusted is not None:
        parts |= {"cells": adjusted.cells, "penalties": adjusted.penalties}
    return parts
