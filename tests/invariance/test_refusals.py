"""What the native executor refuses, with which error; and that a refusal leaves it working."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from graph.small_llama import Driver, config, random_weights
from invariance.small_models import BLOCKS, SLOTS, WAYS, executor

from ridgeline.backends.cpu.executor import CpuExecutor
from ridgeline.backends.cpu.lowering import plan_target
from ridgeline.core.errors import ConfigError, ModelFileError, RidgelineError, UnsupportedError
from ridgeline.core.types import POOL, SAMPLING_DTYPE, Batch, SlotStart, Ticket, TokenMasks
from ridgeline.graph.plan import compile
from ridgeline.models import llama
from ridgeline.models.load import Weight

NAN, INF = {"f16": 0x7E00, "bf16": 0x7FC0}, {"f16": 0x7C00, "bf16": 0xFF80}


def build(weights: dict[str, Weight], block_size: int = 16, isa: str | None = None, **changes) -> CpuExecutor:
    """A small model on the native executor."""
    cfg = config(head_dim=32, **changes)
    formats = {n: w.tensor.format for n, w in weights.items()}
    graph = llama.build(cfg, formats, max_tokens=32, max_rows=8, kv_dtype="bf16", block_size=block_size)
    plan = compile(graph, plan_target("bf16", isa))
    return CpuExecutor(plan, weights, num_slots=2, num_blocks=[4], max_blocks_per_slot=2, threads=2, isa=isa)


def damage(fmt: str, data: np.ndarray, at: int, bad: str) -> np.ndarray:
    """A copy of a matrix's bytes with one NaN or infinity among its floats (or scales, or minima)."""
    data = data.copy()
    bits = {"nan": NAN, "inf": INF}[bad]
    if fmt == "f32":
        data.view("<f4")[at] = {"nan": np.nan, "inf": -np.inf}[bad]
    elif fmt in ("f16", "bf16"):
        data.view("<u2")[at] = bits[fmt]
    else:
        group = {"q8_0": 34, "q4_0": 18, "q4_1": 20}[fmt]
        header = 2 if fmt == "q4_1" and at % 2 else 0  # a minimum now and then
        groups = data.reshape(-1, group)
        groups[at % len(groups), header : header + 2] = np.array([bits["f16"]], "<u2").view(np.uint8)
    return data


@pytest.mark.parametrize("bad", ["nan", "inf"])
@pytest.mark.parametrize("fmt", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1"])
def test_damaged_weights_are_refused_by_name(fmt: str, bad: str) -> None:
    for name, at in (("embed", 0), ("layers.1.attn.k", 77), ("layers.0.mlp.up", 95), ("layers.1.mlp.down", 1001)):
        weights = random_weights(config(head_dim=32), fmt)
        tensor = weights[name].tensor
        weights[name] = replace(weights[name], tensor=replace(tensor, data=damage(fmt, tensor.data, at, bad)))
        with pytest.raises(ModelFileError, match=tensor.name):
            build(weights)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_norms_are_refused_by_name(bad: float) -> None:
    weights = random_weights(config(head_dim=32), "q8_0")
    name = next(n for n, w in weights.items() if n.startswith("layers.1") and len(w.tensor.shape) == 1)
    tensor = weights[name].tensor
    data = tensor.data.copy()
    data.view("<f4")[3] = bad
    weights[name] = replace(weights[name], tensor=replace(tensor, data=data))
    with pytest.raises(ModelFileError, match=tensor.name):
        build(weights)


def test_codes_that_look_like_nan_are_only_codes() -> None:
    weights = random_weights(config(head_dim=32), "q4_1")
    tensor = weights["layers.0.attn.q"].tensor
    data = tensor.data.copy().reshape(-1, 20)
    data[:, 4:] = 0xFF
    weights["layers.0.attn.q"] = replace(weights["layers.0.attn.q"], tensor=replace(tensor, data=data.reshape(-1)))
    logits = Driver(build(weights), 4, block_size=16).step([(0, [1, 2])])[1]
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("head_dim", [8, 24, 272])
def test_head_sizes_without_a_kernel_are_refused(head_dim: int) -> None:
    cfg = config(head_dim=head_dim)
    weights = random_weights(cfg, "f32")
    formats = {n: w.tensor.format for n, w in weights.items()}
    graph = llama.build(cfg, formats, max_tokens=8, max_rows=8, kv_dtype="f32", block_size=16)
    plan = compile(graph, plan_target("f32", None))
    with pytest.raises(UnsupportedError, match="head"):
        CpuExecutor(plan, weights, num_slots=1, num_blocks=[2], max_blocks_per_slot=2)


def test_a_plan_for_tiles_is_refused_where_there_are_none() -> None:
    weights = random_weights(config(head_dim=32), "q4_1")
    formats = {n: w.tensor.format for n, w in weights.items()}
    graph = llama.build(config(head_dim=32), formats, max_tokens=8, max_rows=8, kv_dtype="bf16", block_size=16)
    plan = compile(graph, plan_target("bf16", "amx"))
    with pytest.raises(UnsupportedError, match="token_embd.weight: .* generic multiplies quantized weights by int8"):
        CpuExecutor(plan, weights, num_slots=1, num_blocks=[2], max_blocks_per_slot=2, isa="generic")


def test_options_that_cannot_work_are_refused() -> None:
    weights = random_weights(config(head_dim=32), "q8_0")
    with pytest.raises(ConfigError, match="16 tokens"):
        build(weights, block_size=32)
    with pytest.raises(ConfigError, match="isa 'neon'"):
        build(weights, isa="neon")


def i32(*values: int) -> np.ndarray:
    """A flat int32 array."""
    return np.array(values, np.int32)


def with_rows(batch: Batch, **fields: list[int]) -> Batch:
    """The batch with other fields of its two sampling rows."""
    sampling = batch.sampling.copy()
    for name, values in fields.items():
        sampling[name] = values
    return replace(batch, sampling=sampling)


def with_copies(batch: Batch, *pairs: tuple[int, int]) -> Batch:
    """The batch with block copies."""
    return replace(batch, block_copies=[i32(*(block for pair in pairs for block in pair)).reshape(-1, 2)])


def asking(**changes: Any) -> SlotStart:
    """A start of slot 0 that biases a token."""
    return SlotStart(**{"slot": 0, "bias_ids": i32(7), "bias": np.ones(1, np.float32), **changes})


MALFORMED: dict[str, Callable[[Batch], Batch]] = {
    "token id at the vocabulary's end": lambda b: replace(b, token_ids=i32(1, 2, 80, 4)),
    "huge token id": lambda b: replace(b, token_ids=i32(1, 2, 2**31 - 1, 4)),
    "nothing sampled yet": lambda b: replace(b, token_ids=i32(1, 2, 3, -1)),
    "positions with a gap": lambda b: replace(b, positions=i32(0, 1, 3, 0)),
    "negative position": lambda b: replace(b, positions=i32(-1, 0, 1, 0)),
    "position past the table": lambda b: replace(b, positions=i32(32 * 16, 513, 514, 0)),
    "overflowing positions": lambda b: replace(b, positions=i32(2**31 - 2, 2**31 - 1, -(2**31), 0)),
    "positions too few": lambda b: replace(b, positions=b.positions[:-1]),
    "slot too high": lambda b: replace(b, slots=i32(0, SLOTS)),
    "negative slot": lambda b: replace(b, slots=i32(-1, 1)),
    "one slot twice": lambda b: replace(b, slots=i32(1, 1)),
    "query_starts down": lambda b: replace(b, query_starts=i32(0, 5, 4)),
    "query_starts far out": lambda b: replace(b, query_starts=i32(0, 2**30, 4)),
    "query_starts negative": lambda b: replace(b, query_starts=i32(0, -7, 4)),
    "query_starts not from 0": lambda b: replace(b, query_starts=i32(1, 3, 4)),
    "query_starts short of T": lambda b: replace(b, query_starts=i32(0, 2, 3)),
    "an empty request": lambda b: replace(b, query_starts=i32(0, 4, 4)),
    "context_lens not the last position": lambda b: replace(b, context_lens=i32(4, 1)),
    "sample row past T": lambda b: replace(b, sample_rows=i32(2, 4)),
    "negative sample row": lambda b: replace(b, sample_rows=i32(-1, 3)),
    "sampling too short": lambda b: replace(b, sampling=b.sampling[:1]),
    "sampling of another layout": lambda b: replace(b, sampling=np.zeros(2, np.float32)),
    "update of a slot that is not": lambda b: replace(b, block_updates=[i32(SLOTS, 0, 0).reshape(1, 3)]),
    "update past the table": lambda b: replace(b, block_updates=[i32(0, BLOCKS, 0).reshape(1, 3)]),
    "block that is not": lambda b: replace(b, block_updates=[i32(0, 0, SLOTS * BLOCKS).reshape(1, 3)]),
    "negative block": lambda b: replace(b, block_updates=[i32(0, 0, -1).reshape(1, 3)]),
    "no blocks at all": lambda b: replace(b, block_updates=[np.zeros((0, 3), np.int32)]),
    "sample rows that descend": lambda b: replace(b, sample_rows=i32(3, 2)),
    "a row sampled twice": lambda b: replace(b, sample_rows=i32(3, 3)),
    "target past the vocabulary": lambda b: with_rows(b, target=[0, 81]),
    "target that is nothing": lambda b: with_rows(b, target=[-2, 0]),
    "a scored row under a mask": lambda b: with_rows(b, target=[0, 4], masked=[0, 1]),
    "a pooled row under a mask": lambda b: with_rows(b, target=[POOL, 0], masked=[1, 0]),
    "copy from a block that is not": lambda b: with_copies(b, (SLOTS * BLOCKS, 2)),
    "copy to a negative block": lambda b: with_copies(b, (1, -1)),
    "two copies into a block": lambda b: with_copies(b, (1, 3), (2, 3)),
    "a chain of copies": lambda b: with_copies(b, (1, 2), (2, 3)),
    "half a copy": lambda b: replace(b, block_copies=[i32(1, 2, 3)]),
    "copies of a group that is not": lambda b: replace(b, block_copies=[i32(1, 2).reshape(1, 2)] * 2),
    "start of a slot that is not": lambda b: replace(b, slot_starts=[SlotStart(SLOTS)]),
    "two starts of a slot": lambda b: replace(b, slot_starts=[SlotStart(1), SlotStart(1)]),
    "start with a gap": lambda b: replace(b, positions=i32(1, 2, 3, 0), context_lens=i32(4, 1), slot_starts=[asking()]),
    "start with a token that is not": lambda b: replace(b, slot_starts=[asking(tokens=i32(80))]),
    "negative prompt": lambda b: replace(b, slot_starts=[asking(prompt_len=-1)]),
    "no repetition penalty": lambda b: replace(b, slot_starts=[asking(repetition_penalty=0.0)]),
    "infinite repetition penalty": lambda b: replace(b, slot_starts=[asking(repetition_penalty=np.inf)]),
    "presence penalty that is no number": lambda b: replace(b, slot_starts=[asking(presence_penalty=np.nan)]),
    "infinite frequency penalty": lambda b: replace(b, slot_starts=[asking(frequency_penalty=-np.inf)]),
    "biases too few": lambda b: replace(b, slot_starts=[asking(bias_ids=i32(1, 2))]),
    "bias of a token that is not": lambda b: replace(b, slot_starts=[asking(bias_ids=i32(-1))]),
    "infinite bias": lambda b: replace(b, slot_starts=[asking(bias=np.array([np.inf], np.float32))]),
    "min_tokens below 0": lambda b: replace(b, slot_starts=[asking(min_tokens=-1)]),
    "min_tokens id that is not": lambda b: replace(b, slot_starts=[asking(min_tokens_ids=i32(80))]),
    "empty bad word": lambda b: replace(b, slot_starts=[asking(bad_words=((),))]),
    "bad word that is not": lambda b: replace(b, slot_starts=[asking(bad_words=((1, 80),))]),
    "bad words that are no tokens": lambda b: replace(b, slot_starts=[asking(bad_words="the")]),
    "no tokens": lambda b: replace(b, token_ids=i32(), positions=i32(), slots=i32(), query_starts=i32(0)),
}


def good_batch() -> Batch:
    """Three tokens of slot 0 and one of slot 1, the last of each sampled."""
    sampling = np.zeros(2, SAMPLING_DTYPE)
    sampling["num_logprobs"] = -1
    updates = i32(0, 0, 5, 1, 0, 9).reshape(2, 3)
    return Batch(i32(1, 2, 3, 4), i32(0, 1, 2, 0), i32(0, 1), i32(0, 3, 4), i32(3, 1), i32(2, 3), sampling, [updates])


@pytest.fixture(scope="module")
def native() -> CpuExecutor:
    """One executor for all refusals: each must leave it working."""
    return executor("q4_1", WAYS[0], 2)


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_batches_are_refused(what: str) -> None:
    fresh = executor("q4_1", WAYS[0], 2)
    with pytest.raises(RidgelineError):
        fresh.launch(MALFORMED[what](good_batch()))
    output = fresh.finish(fresh.launch(good_batch()))
    expected = executor("q4_1", WAYS[0], 1)
    assert output.token_ids.tolist() == expected.finish(expected.launch(good_batch())).token_ids.tolist()
    np.testing.assert_array_equal(fresh.last_logits, expected.last_logits)


def test_tickets_and_masks_must_match(native: CpuExecutor) -> None:
    ticket = native.launch(good_batch())
    with pytest.raises(RidgelineError, match="one step at a time"):
        native.launch(good_batch())
    with pytest.raises(RidgelineError, match="not open"):
        native.finish(Ticket(ticket.number + 1))
    native.finish(ticket)
    with pytest.raises(RidgelineError, match="not open"):
        native.finish(ticket)
    masked = good_batch()
    masked.sampling["masked"] = [0, 1]
    for masks in (None, np.full((2, 3), 2**32 - 1, np.uint32), np.full((1, 2), 2**32 - 1, np.uint32)):
        ticket = native.launch(masked)
        with pytest.raises(RidgelineError, match="mask"):
            native.finish(ticket, None if masks is None else TokenMasks(masks))
    assert native.finish(native.launch(good_batch())).token_ids.min() >= 0
