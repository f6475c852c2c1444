"""Sampling state natively against the reference executor, which recomputes it from each slot's whole log: penalties,
bias, bad words, min_tokens, drafts, masks, scored rows, slots that change hands. The graph is an embedding alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ops.lone import LoneGraph, NativeGraph, batch_of
from ops.sampling_rows import is_close_call, random_rows, rows_of

from ridgeline.backends.cpu import _native
from ridgeline.backends.reference.executor import ReferenceExecutor
from ridgeline.backends.reference.slots import adjusted
from ridgeline.core.types import Batch, SlotStart, StepOutput, TokenMasks

ISAS = _native.available_isas()
SLOTS, BLOCKS = 4, 8  # of 16 tokens
ROWS = 48


class Pair:
    """The same logits (row t for token id t) on the native executor and on the reference."""

    def __init__(self, logits: np.ndarray, isa: str, threads: int) -> None:
        self.logits = np.ascontiguousarray(logits, np.float32)
        graph = LoneGraph(ROWS, ROWS)
        rows = graph.select_rows(graph.activation("logits", self.logits), graph.sample_rows)
        built = graph.build(logits=rows)
        size = {"slots": SLOTS, "blocks": BLOCKS, "vocab": len(logits)}
        self.native = NativeGraph(built, graph.values, isa=isa, threads=threads, **size)
        self.reference = ReferenceExecutor(
            built, graph.values, num_slots=SLOTS, num_blocks=[SLOTS * BLOCKS], max_blocks_per_slot=BLOCKS
        )
        self.updates = [(s, i, s * BLOCKS + i) for s in range(SLOTS) for i in range(BLOCKS)]

    def step(self, batch: Batch, masks: np.ndarray | None = None) -> tuple[StepOutput, StepOutput]:
        """What each of the two gives."""
        self.native.launch(batch)
        native = StepOutput(*self.native.native.finish(masks))
        np.testing.assert_array_equal(self.native.native.logits(), self.logits[resolved(batch, self.reference)])
        ticket = self.reference.launch(batch)
        return native, self.reference.finish(ticket, None if masks is None else TokenMasks(masks))


def resolved(batch: Batch, reference: ReferenceExecutor) -> np.ndarray:
    """Ids of the sampled rows' own tokens, -1 looked up."""
    slots = np.repeat(batch.slots, np.diff(batch.query_starts))
    return np.where(batch.token_ids < 0, reference._last_token[slots], batch.token_ids)[batch.sample_rows]


def random_start(slot: int, vocab: int, rng: np.random.Generator) -> SlotStart:
    """Any part of what can be asked, or nothing."""

    def ids(most: int) -> np.ndarray:
        return rng.integers(0, vocab, int(rng.integers(0, most))).astype(np.int32)

    def maybe(value: Any, default: Any) -> Any:
        return value if rng.random() < 0.5 else default

    bias_ids, tokens = ids(6), ids(30)
    words = [tuple(rng.integers(0, vocab, int(rng.integers(1, 4))).tolist()) for _ in range(int(rng.integers(0, 5)))]
    if len(tokens) > 1:  # one that the prefix already begins
        words.append((*tokens[-2:].tolist(), int(rng.integers(vocab))))
    none = np.zeros(0, np.int32)
    asked = SlotStart(
        slot,
        prompt_len=int(rng.integers(0, 40)),
        tokens=maybe(tokens, none),
        repetition_penalty=maybe(float(rng.choice([0.5, 1.3, 2.0])), 1.0),
        presence_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        frequency_penalty=maybe(float(rng.uniform(-2, 2)), 0.0),
        min_tokens=maybe(int(rng.integers(0, 20)), 0),
        min_tokens_ids=ids(5),
        bad_words=maybe(tuple(words), ()),
    )
    with_bias = replace(asked, bias_ids=bias_ids, bias=rng.normal(0, 5, len(bias_ids)).astype(np.float32))
    return maybe(with_bias, asked)


class Work:
    """Random steps over a few slots: owners come and go, each is fed chunks, single tokens, or drafts that may be
    replaced by others in the next step."""

    def __init__(self, vocab: int, rng: np.random.Generator) -> None:
        self.vocab, self.rng = vocab, rng
        self.length = [0] * SLOTS  # tokens known to be in the sequence
        self.sampled = [False] * SLOTS

    def batch(self) -> tuple[Batch, np.ndarray | None]:
        """The next step and its masks."""
        rng, starts, work = self.rng, [], []
        for slot in rng.permutation(SLOTS)[: int(rng.integers(1, SLOTS + 1))]:
            if not self.sampled[slot] or self.length[slot] > 90 or rng.random() < 0.15:
                start = random_start(int(slot), self.vocab, rng)
                starts.append(start)
                self.length[slot], self.sampled[slot] = len(start.tokens), False
            count = int(rng.choice([1, 1, 2, 5, 9]))
            ids = rng.integers(0, self.vocab, count)
            if self.sampled[slot] and rng.random() < 0.5:
                ids[0] = -1
            work.append((int(slot), self.length[slot], ids))
        rows = [r for r in range(sum(len(w[2]) for w in work)) if rng.random() < 0.6]
        batch = replace(batch_of(work, [], rows), sampling=random_rows(len(rows), rng), slot_starts=starts)
        batch.sampling["target"] = np.where(rng.random(len(rows)) < 0.2, 1 + rng.integers(0, self.vocab, len(rows)), 0)
        batch.sampling["masked"] = (rng.random(len(rows)) < 0.2) & (batch.sampling["target"] == 0)
        allowed = rng.random((int(batch.sampling["masked"].sum()), -(-self.vocab // 32) * 32)) < 0.3
        allowed[:, : self.vocab // 2 : 7] = True
        bits = np.packbits(allowed, axis=1, bitorder="little").view("<u4") if len(allowed) else None
        return batch, bits

    def take(self, batch: Batch, output: StepOutput) -> None:
        """Some of what was fed becomes part of the sequences; the rest were drafts."""
        for b, slot in enumerate(batch.slots):
            first, end = batch.query_starts[b], batch.query_starts[b + 1]
            rows = (batch.sample_rows >= first) & (batch.sample_rows < end) & (batch.sampling["target"] == 0)
            self.sampled[slot] |= bool((rows & (output.token_ids >= 0) & (output.accepted == 1)).any())
            self.length[slot] += int(self.rng.integers(1, end - first + 1))


def assert_agree(pair: Pair, batch: Batch, masks: np.ndarray | None, native: StepOutput, expected: StepOutput) -> bool:
    """Equal but for a token that rounding decides; then False, for what follows need not agree."""
    flagged = np.cumsum(batch.sampling["masked"]) - 1
    for i in range(len(batch.sample_rows)):
        if native.token_ids[i] != expected.token_ids[i]:
            assert min(native.token_ids[i], expected.token_ids[i]) >= 0
            row = int(batch.sample_rows[i])
            position = int(batch.positions[row]) + 1
            request = int(np.searchsorted(batch.query_starts, row, side="right")) - 1
            log = pair.reference._logs[int(batch.slots[request])]
            logits = adjusted(pair.logits[log.tokens[position - 1]], log.start, log.tokens[:position])
            allowed = None
            if batch.sampling["masked"][i]:
                assert masks is not None
                bits = masks[flagged[i]].view(np.uint8)
                allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
            tokens = int(native.token_ids[i]), int(expected.token_ids[i])
            assert is_close_call(logits, batch.sampling[i], position, *tokens, allowed)
            return False
    np.testing.assert_array_equal(native.accepted, expected.accepted)
    np.testing.assert_array_equal(native.top_ids, expected.top_ids)
    np.testing.assert_allclose(native.logprobs, expected.logprobs, rtol=1e-6, atol=3e-6)
    np.testing.assert_allclose(native.top_logprobs, expected.top_logprobs, rtol=1e-6, atol=3e-6)
    return True


@pytest.mark.parametrize("vocab", [23, 64, 600])
@pytest.mark.parametrize("isa", ISAS)
def test_everything_in_every_combination(isa: str, vocab: int) -> None:
    """Vocabularies so small that tokens repeat; 40 runs of 12 steps, on 1 to 3 threads."""
    apart = 0
    for seed in range(40):
        rng = np.random.default_rng([vocab, seed])
        logits = rng.standard_normal((vocab, vocab)).astype(np.float32) * rng.choice([1, 4], (vocab, 1))
        pair, work = Pair(logits, isa, threads=1 + seed % 3), Work(vocab, rng)
        for number in range(12):
            batch, masks = work.batch()
            if number == 0:
                batch.block_updates = [np.array(pair.updates, np.int32)]
            native, expected = pair.step(batch, masks)
            if not assert_agree(pair, batch, masks, native, expected):
                apart += 1
                break
            work.take(batch, native)
    assert apart <= 2, "close calls are rare"


@pytest.fixture
def flat() -> Pair:
    """Equal logits of 0 but for token 5 (1.0) and 6 (0.5): greedy is easily moved."""
    logits = np.zeros((32, 32), np.float32)
    logits[:, 5], logits[:, 6] = 1.0, 0.5
    return Pair(logits, ISAS[0], 2)


def greedy(pair: Pair, slot: int, first: int, ids: list[int], *starts: SlotStart) -> list[int]:
    """Samples every row of one request greedily; the reference must agree."""
    batch = replace(batch_of([(slot, first, ids)], pair.updates), slot_starts=starts)
    native, expected = pair.step(batch)
    assert native.token_ids.tolist() == expected.token_ids.tolist()
    assert native.accepted.tolist() == expected.accepted.tolist()
    return native.token_ids.tolist()


def test_penalties_see_the_log_up_to_their_row_and_forget_rejected_drafts(flat: Pair) -> None:
    start = SlotStart(1, prompt_len=2, presence_penalty=2.0)
    assert greedy(flat, 1, 0, [5, 5], start) == [5, 5], "the prompt is no output"
    assert greedy(flat, 1, 2, [5, 6, 7]) == [6, 0, 0], "each row sees its own token and the drafts before it"
    assert greedy(flat, 1, 3, [8]) == [6], "the draft 6 at position 3 has been replaced"
    assert greedy(flat, 1, 3, [6]) == [0]


def test_repetition_counts_the_prompt_and_what_was_in_the_cache(flat: Pair) -> None:
    prefix = SlotStart(0, prompt_len=3, tokens=np.array([5, 1], np.int32), repetition_penalty=4.0)
    assert greedy(flat, 0, 2, [1], prefix) == [6]
    assert greedy(flat, 0, 2, [6], replace(prefix, repetition_penalty=1.01)) == [5]


def test_bad_words_look_back_over_prompt_and_output(flat: Pair) -> None:
    start = SlotStart(0, prompt_len=2, bad_words=((3, 4, 5), (9, 9, 9, 6), (6, 6)))
    assert greedy(flat, 0, 0, [3, 4], start) == [5, 6]
    assert greedy(flat, 0, 2, [9, 3, 4, 6]) == [5, 5, 6, 5]
    assert greedy(flat, 0, 6, [3, 4, 9, 4], SlotStart(0, bad_words=((5,),), tokens=np.zeros(6, np.int32))) == [6] * 4


def test_min_tokens_counts_output_only(flat: Pair) -> None:
    start = SlotStart(0, prompt_len=3, min_tokens=2, min_tokens_ids=np.array([5], np.int32))
    assert greedy(flat, 0, 0, [1, 2, 3], start)[-1] == 6
    assert greedy(flat, 0, 3, [6, 6, 6]) == [6, 5, 5]
    resumed = replace(start, tokens=np.array([1, 2, 3, 6], np.int32))
    assert greedy(flat, 2, 4, [6], replace(resumed, slot=2)) == [5], "a request that starts over goes on counting"


def test_a_slot_forgets_its_last_owner(flat: Pair) -> None:
    demanding = SlotStart(3, bias_ids=np.array([30], np.int32), bias=np.array([9.0], np.float32), presence_penalty=1.0)
    assert greedy(flat, 3, 0, [1], demanding) == [30]
    assert greedy(flat, 3, 0, [5, 5], SlotStart(3)) == [5, 5]
    assert greedy(flat, 3, 0, [1], demanding) == [30]
    assert greedy(flat, 3, 20, [5], SlotStart(3)) == [5], "an owner that asks nothing may start behind a prefix hit"
    assert greedy(flat, 3, 0, [7, 7], replace(demanding, bias=np.array([1.5], np.float32))) == [30, 30]
    assert greedy(flat, 3, 0, [5], SlotStart(3, presence_penalty=2.0)) == [6]


def test_nothing_left_to_sample_gives_no_token(flat: Pair) -> None:
    everything = SlotStart(0, min_tokens=9, min_tokens_ids=np.arange(32, dtype=np.int32))
    assert greedy(flat, 0, 0, [5], everything) == [-1]
    assert greedy(flat, 1, 0, [5]) == [5]


def test_rows_stand_up_to_the_first_draft_that_was_not_sampled(flat: Pair) -> None:
    rows = rows_of(5, temperature=0, target=[0, 0, 9, 0, 0], num_logprobs=0)
    batch = replace(batch_of([(0, 0, [1, 5, 6, 5, 5])], flat.updates), sampling=rows)
    native, expected = flat.step(batch)
    assert native.accepted.tolist() == expected.accepted.tolist() == [1, 1, 1, 0, 0]
    assert native.token_ids.tolist() == [5, 5, 8, 5, 5]
    np.testing.assert_allclose(native.logprobs[2], -np.log(np.exp([1.0, 0.5]).sum() + 30), rtol=1e-6)


def test_minus_one_is_the_last_row_that_stands() -> None:
    logits = np.eye(16, dtype=np.float32)[(np.arange(16) * 3 + 1) % 16]  # after t comes 3t + 1
    pair = Pair(logits, ISAS[0], 2)
    assert greedy(pair, 0, 0, [0, 1, 4, 9, 9]) == [1, 4, 13, 12, 12]
    assert greedy(pair, 0, 3, [-1]) == [8], "13 was sampled where 9 had been drafted"
    batch = replace(batch_of([(0, 4, [-1])], []), sampling=rows_of(1, temperature=0, target=1 + 2))
    pair.step(batch)
    assert greedy(pair, 0, 4, [-1]) == [9], "a scored row is not sampled"
