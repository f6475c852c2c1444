"""A batch on its way to the device: put in order, padded and laid out; properties of it, over random batches."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from ridgeline.backends.cuda.beside import sample_and_settle
from ridgeline.backends.cuda.kernels.sample import PROMPT_BIT
from ridgeline.backends.cuda.lowering import FEW_TOKENS, Sizes
from ridgeline.backends.cuda.step import Held, Layout, adjustments, asked, encode, few_first, held_rows, sizes_of
from ridgeline.backends.cuda.variants import key
from ridgeline.backends.reference.slots import SlotLog, banned
from ridgeline.core.types import POOL, SAMPLING_DTYPE, Batch, SlotStart
from tests.gpu.scripts import Script, play
from tests.gpu.small_model import executor, model, reference

SEEDS = range(40)


def random_batch(seed: int) -> Batch:
    """Up to six requests of 1 to 12 tokens in any order, with rows anywhere."""
    rng = np.random.default_rng(seed)
    widths = rng.choice([1, 2, 7, 8, 9, 12], rng.integers(1, 7))
    starts = np.concatenate([[0], np.cumsum(widths)]).astype(np.int32)
    first = rng.integers(0, 50, len(widths))
    rows = np.flatnonzero(rng.random(starts[-1]) < 0.4).astype(np.int32)
    sampling = np.zeros(len(rows), SAMPLING_DTYPE)
    for name, values in (("target", [0, 0, 5, POOL]), ("masked", [0, 0, 1]), ("top_k", [0, -1, 7])):
        sampling[name] = rng.choice(values, len(rows))
    sampling["top_p"], sampling["min_p"] = rng.choice([1.0, 0.8], len(rows)), rng.choice([0.0, 0.1], len(rows))
    sampling["seed"] = rng.integers(0, 1 << 64, len(rows), dtype=np.uint64)
    sampling["temperature"], sampling["sample_index"] = rng.random(len(rows)), rng.integers(0, 9, len(rows))
    sampling["num_logprobs"] = rng.integers(-1, 9, len(rows))
    return Batch(
        rng.integers(-1, 99, starts[-1]).astype(np.int32),
        np.concatenate([np.arange(f, f + w) for f, w in zip(first, widths, strict=True)]).astype(np.int32),
        rng.permutation(9)[: len(widths)].astype(np.int32),
        starts,
        (first + widths).astype(np.int32),
        rows,
        sampling,
        [np.zeros((0, 3), np.int32)],
    )


def requests(batch: Batch) -> dict[int, Any]:
    """What a batch asks, by slot."""
    found = {}
    for b, slot in enumerate(batch.slots.tolist()):
        first, end = batch.query_starts[b : b + 2]
        own = (batch.sample_rows >= first) & (batch.sample_rows < end)
        tokens, positions = batch.token_ids[first:end].tolist(), batch.positions[first:end].tolist()
        rows = (batch.sample_rows[own] - first).tolist(), batch.sampling[own].tobytes()
        found[slot] = (tokens, positions, int(batch.context_lens[b]), *rows)
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_requests_of_few_tokens_come_first_and_nothing_else_changes(seed: int) -> None:
    batch = random_batch(seed)
    moved, back = few_first(batch, np.diff(batch.query_starts))
    wide = np.diff(moved.query_starts) > FEW_TOKENS
    assert not (wide[:-1] & ~wide[1:]).any()
    assert requests(moved) == requests(batch)
    assert (np.diff(moved.sample_rows) > 0).all() and moved.query_starts.dtype == moved.sample_rows.dtype == np.int32
    many = np.diff(batch.query_starts) > FEW_TOKENS
    assert moved.slots.tolist() == [*batch.slots[~many], *batch.slots[many]]
    if back is None:
        assert moved is batch
    else:
        assert not np.array_equal(moved.slots, batch.slots)
        assert moved.sampling.tobytes() == batch.sampling[back].tobytes()
        tokens = batch.positions[batch.sample_rows[back]]
        assert np.array_equal(moved.positions[moved.sample_rows], tokens)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_batch_fills_its_fields_and_padding_asks_for_nothing(seed: int) -> None:
    batch = random_batch(seed)
    t, b, s = len(batch.token_ids), len(batch.slots), len(batch.sample_rows)
    most = int(np.diff(batch.query_starts).max())
    assert sizes_of(batch, np.diff(batch.query_starts)) == Sizes(t, b, s, most > FEW_TOKENS)
    layout = Layout(Sizes(t + 3, b + 2, s + 2, True))
    f = layout.arrays(np.full(layout.nbytes, 0xA5, np.uint8))
    adjusted = np.arange(s, dtype=np.int32)
    encode(batch, layout, f, adjusted, asked(batch.sampling, None), Held())
    rows, held = batch.sampling, held_rows(batch)
    owners = np.repeat(np.arange(b), np.diff(batch.query_starts))
    for row in range(s):
        mine = owners[batch.sample_rows] == owners[batch.sample_rows[row]]
        assert held[row] == rows["masked"][mine].any()
    right = {
        **{"fed": batch.token_ids, "positions": batch.positions, "token_slots": batch.slots[owners]},
        **{"slots": batch.slots, "context_lens": batch.context_lens, "query_starts": batch.query_starts},
        "row_starts": [(batch.sample_rows < start).sum() for start in batch.query_starts],
        **{"sample_rows": batch.sample_rows, "next_positions": batch.positions[batch.sample_rows] + 1},
        **{"sample_indices": rows["sample_index"], "top_ks": rows["top_k"].clip(0), "targets": rows["target"]},
        **{"temperatures": rows["temperature"], "top_ps": rows["top_p"], "adjusted": adjusted},
        "wanted": np.where(rows["target"] == POOL, 0, rows["num_logprobs"]),
    }
    for name, values in right.items():
        assert np.array_equal(f[name][: len(values)], values), name
    assert ((f["settles"][:s] == 0) == ((rows["target"] == 0) & ~held)).all()
    assert ((f["settles_masked"][:s] == 0) == ((rows["target"] == 0) & held)).all()
    with np.errstate(divide="ignore"):
        assert np.array_equal(f["floors"][:s], np.log(rows["min_p"]))
    words = f["seeds"][:s].view(np.uint32).astype(np.uint64)
    assert np.array_equal(words[:, 0] | words[:, 1] << np.uint64(32), rows["seed"])
    counts = {"T": t, "B": b, "S": s}
    padding = {name: values[counts[_of(name)] + name.endswith("starts") :] for name, values in f.items()}
    assert (padding["token_slots"] == -1).all() and (padding["context_lens"] == 0).all()
    assert (padding["query_starts"] == t).all() and (padding["row_starts"] == s).all()
    assert (padding["settles"] != 0).all() and (padding["settles_masked"] != 0).all()
    for name in ("fed", "positions", "slots", "sample_rows", "next_positions", "top_ks", "adjusted", "wanted"):
        assert (padding[name] == 0).all(), name
    assert (padding["temperatures"] == 0).all() and (padding["top_ps"] == 1).all()


def changed(batch: Batch, rng: np.random.Generator) -> Batch:
    """The next step of the same requests, or of others, or with rows that ask for something else."""
    if rng.random() < 0.3:
        return random_batch(int(rng.integers(1000)))
    sampling = batch.sampling.copy()
    if len(sampling) and rng.random() < 0.3:
        field, value = [("temperature", 0.25), ("masked", 1), ("target", POOL)][rng.integers(3)]
        sampling[field][rng.integers(len(sampling))] = value
    step = int(rng.integers(2))
    return replace(batch, positions=batch.positions + step, context_lens=batch.context_lens + step, sampling=sampling)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_block_that_held_other_steps_holds_the_next_as_a_new_one_would(seed: int) -> None:
    """Whatever is not written again is still right: steps one after another in two layouts of one block."""
    rng = np.random.default_rng(seed)
    layouts = [Layout(Sizes(80, 9, 80, True)), Layout(Sizes(76, 8, 77, False))]
    block, held, batch, ask = np.full(layouts[0].nbytes, 0xA5, np.uint8), Held(), random_batch(seed), None
    for _ in range(12):
        batch, layout = changed(batch, rng), layouts[int(rng.random() < 0.2)]
        rows = len(batch.sample_rows)
        adjusted = rng.integers(0, 5, rows).astype(np.int32) if rng.random() < 0.3 else None
        ask = asked(batch.sampling, ask)
        assert ask == asked(batch.sampling, None)
        encode(batch, layout, layout.arrays(block), adjusted, ask, held)
        fresh = np.zeros(layout.nbytes, np.uint8)
        encode(batch, layout, layout.arrays(fresh), adjusted, ask, Held())
        for name, values in layout.arrays(block).items():
            assert np.array_equal(values, layout.arrays(fresh)[name]), name


@pytest.mark.parametrize("seed", SEEDS)
def test_what_rows_ask_for_is_told(seed: int) -> None:
    rows = random_batch(seed).sampling
    ask = asked(rows, None)
    assert asked(rows.copy(), ask) is ask
    assert ask.filtered == any(r["top_k"] > 0 or r["top_p"] < 1 for r in rows)
    assert ask.masked == any(r["masked"] for r in rows) and ask.pooled == any(r["target"] == POOL for r in rows)
    assert ask.scored == any(r["num_logprobs"] >= 0 for r in rows)
    assert ask.listed == any(r["num_logprobs"] > 0 for r in rows)


def _of(name: str) -> str:
    if name in ("fed", "positions", "token_slots"):
        return "T"
    return "B" if name in ("slots", "context_lens", "query_starts", "row_starts") else "S"


@pytest.mark.parametrize("seed", SEEDS)
def test_adjustments_count_what_each_row_has_seen(seed: int) -> None:
    """Tokens of prompt and output up to the row's own, bias, and what is ruled out, token by token."""
    batch, rng = random_batch(seed), np.random.default_rng(seed)
    logs = {}
    for b, slot in enumerate(batch.slots.tolist()):
        if rng.random() < 0.7:
            length = int(batch.context_lens[b])
            bias = {"bias_ids": rng.permutation(12)[:3].astype(np.int32), "bias": rng.random(3).astype(np.float32)}
            minimum = {"min_tokens": 4, "min_tokens_ids": rng.permutation(12)[:2].astype(np.int32)}
            words = {"bad_words": ((3,), (int(rng.integers(12)), 5))}
            asked: dict[str, Any] = {"repetition_penalty": 1.5, "presence_penalty": rng.random()}
            for more in (bias, minimum, words):
                asked |= more if rng.random() < 0.6 else {}
            logs[slot] = SlotLog(SlotStart(slot, int(rng.integers(length + 3)), **asked))
            logs[slot].feed(0, rng.integers(0, 12, length).astype(np.int32))
    found = adjustments(batch, logs)
    owners = np.repeat(batch.slots, np.diff(batch.query_starts))[batch.sample_rows]
    wanted = [int(s) in logs and target != POOL for s, target in zip(owners, batch.sampling["target"], strict=True)]
    assert (found is not None) == any(wanted)
    if found is None:
        return
    assert ((found.rows > 0) == wanted).all() and len(set(found.rows.tolist()) - {0}) == sum(wanted)
    assert found.penalties[0].tolist() == [1, 0, 0] and len(found.penalties) == sum(wanted) + 1
    assert set(found.cells[:, 0].tolist()) <= set(found.rows.tolist()) - {0}
    for row in np.flatnonzero(wanted):
        log, place = logs[int(owners[row])], found.rows[row]
        start, tokens = log.start, log.tokens[: batch.positions[batch.sample_rows[row]] + 1]
        penalties = (start.repetition_penalty, start.presence_penalty, start.frequency_penalty)
        assert np.array_equal(found.penalties[place], np.float32(penalties))
        mine = {int(token): cell for _, token, *cell in found.cells[found.cells[:, 0] == place]}
        prompt, output = tokens[: start.prompt_len].tolist(), tokens[start.prompt_len :].tolist()
        bias = dict(zip(start.bias_ids.tolist(), start.bias, strict=True))
        bias |= dict.fromkeys(banned(start, tokens), np.float32(-np.inf))
        assert set(mine) == {*prompt, *output, *bias}
        for token, (count, bits) in mine.items():
            assert count == (PROMPT_BIT if token in prompt else 0) + output.count(token)
            assert np.int32(bits).view(np.float32) == bias.get(token, 0)


@pytest.mark.parametrize("vocab", [160, 176, 1000])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_variants_told_from_shapes_are_those_of_the_device(vocab: int, arch: str) -> None:
    """What samples over a bucket's own logits, in every combination, has been announced."""
    made = executor(arch=arch, layers=1, changes=(("vocab_size", vocab),))
    device, memory = made.device, made.memory
    for bucket in made._buckets:
        fields_, rows = bucket.layout.tensors(memory.inputs), bucket.layout.sizes.rows
        counts, bias = memory.adjusted(3, made._compute)
        penalties = device.memory(36).view(torch.float32).view(3, 3)
        mask = device.memory(4 * rows * -(-vocab // 32)).view(torch.int32).view(rows, -1)
        for filters in (False, True):
            for adjusted in (None, (counts, bias, penalties)):
                for allowed in (None, mask):
                    results = memory.results[:, :rows]
                    common = (bucket.logits, results, memory.last_tokens, adjusted, allowed, filters, arch)
                    for settles in ("settles", "settles_masked"):
                        made_ = sample_and_settle(fields_, settles, *common)
                        assert {key(launch) for launch in made_} <= device._known  # type: ignore[attr-defined]


def test_scripts_draw_what_batches_may_be() -> None:
    """Every field of a batch is used by some script; lengths, rows and blocks fit."""
    _, plan, weights = model("bf16", "bf16", layers=1)
    used: set[str] = set()
    runs = reference(plan, weights)
    launch = runs.launch

    def looked_at(batch: Batch) -> Any:
        assert len(batch.token_ids) <= 32 and len(batch.sample_rows) <= 8 and len(set(batch.slots)) == len(batch.slots)
        assert (np.diff(batch.query_starts) > 0).all() and (np.diff(batch.sample_rows) > 0).all()
        used.update(f.name for f in fields(Batch) if len(getattr(batch, f.name)))
        return launch(batch)

    runs.launch = looked_at  # type: ignore[method-assign]
    for seed in range(4):
        play(Script(seed), runs, 8, 1)
    assert used == {f.name for f in fields(Batch)} - {"extras"}
