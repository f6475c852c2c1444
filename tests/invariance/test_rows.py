"""What a row may ask for besides a token (its hidden state, the score of a given token), and copies of KV blocks, on
whole small models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from graph.small_llama import config, graph, random_weights
from invariance.small_models import BLOCKS, MODELS, SLOTS, WAYS, executor, model_of
from ops.lone import batch_of
from ops.sampling_rows import rows_of

from ridgeline.backends.reference.executor import ReferenceExecutor
from ridgeline.core.types import POOL, Batch, StepOutput

SIZE: dict[str, Any] = {"num_slots": SLOTS, "num_blocks": [SLOTS * BLOCKS], "max_blocks_per_slot": BLOCKS}
TABLE = [(s, i, s * BLOCKS + i) for s in range(SLOTS) for i in range(BLOCKS)]
IDS = np.random.default_rng(1).integers(0, 80, (SLOTS, 400)).astype(np.int32)


def step(runs: Any, work: list[tuple[int, int, int]], rows: Any = None, **fields: Any) -> tuple[StepOutput, Batch]:
    """Runs (slot, first position, tokens) requests over ``IDS``; ``fields`` of sampling, those of the batch aside."""
    batch = batch_of([(s, at, IDS[s, at : at + n]) for s, at, n in work], TABLE, rows)
    changes = {k: fields.pop(k) for k in ("block_updates", "block_copies", "token_ids") if k in fields}
    batch = replace(batch, sampling=rows_of(len(batch.sample_rows), **{"temperature": 0, **fields}), **changes)
    return runs.finish(runs.launch(batch)), batch


@pytest.mark.parametrize("name", MODELS)
def test_pooled_rows_are_as_near_the_truth_as_plain_float32(name: str) -> None:
    """Though the head of an integer model reads them quantized: error at most twice that of numpy's float32."""
    work, rows = [(0, 0, 9), (1, 0, 33)], [2, 8, 9, 30, 41]
    for way in WAYS:
        plan, weights = model_of(name, way)
        truth, plain = (
            step(ReferenceExecutor(plan, weights, **SIZE, dtype=d), work, rows, target=POOL)[0].hidden.astype(float)
            for d in (np.float64, np.float32)
        )
        allowed = 2 * np.abs(plain - truth).max()
        output, _ = step(executor(name, way, 2), work, rows, target=POOL)
        assert output.hidden.shape == truth.shape == (5, truth.shape[1])
        assert np.abs(output.hidden - truth).max() <= allowed
        assert (output.token_ids == -1).all() and (output.accepted == 1).all() and np.isnan(output.logprobs).all()


def test_the_plan_and_the_naive_graph_pool_the_same_rows() -> None:
    cfg = config()
    weights = random_weights(cfg, "f32")
    naive = ReferenceExecutor(graph(cfg, weights), weights, num_slots=2, num_blocks=[30], max_blocks_per_slot=8)
    batch = batch_of([(0, 0, [1, 2, 3])], [(0, 0, 0)], [0, 2])
    output = naive.finish(naive.launch(replace(batch, sampling=rows_of(2, target=[POOL, 0], temperature=0))))
    table = weights["embed"].values()
    assert output.hidden.shape == (1, cfg.hidden_size)
    np.testing.assert_allclose(output.hidden[0] @ table.T, naive.last_logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["q4_1", "bf16", "f32"])
@pytest.mark.parametrize("way", WAYS)
def test_pooled_rows_keep_their_bits_in_any_company(way: str, name: str) -> None:
    """Alone, all rows at once, in chunks beside sampled rows, decoded one by one: the same hidden states."""
    whole, _ = step(executor(name, way, 2), [(2, 0, 24)], target=POOL)
    mixed = executor(name, way, 3)
    parts = [step(mixed, [(0, 0, 40), (2, 0, 10)], [39, *range(40, 50)], target=[0, *[POOL] * 10])]
    parts.append(step(mixed, [(2, 10, 13), (0, 40, 1)], [*range(13), 13], target=[*[POOL] * 13, 0]))
    parts.append(step(mixed, [(2, 23, 1)], target=POOL))
    np.testing.assert_array_equal(np.concatenate([o.hidden for o, _ in parts]), whole.hidden)
    assert [o.token_ids[i] >= 0 for o, i in ((parts[0][0], 0), (parts[1][0], -1))] == [True, True]
    alone = executor(name, way, 1)
    step(alone, [(2, 0, 23)], [])
    assert step(alone, [(2, 23, 1)], target=POOL)[0].hidden.tobytes() == whole.hidden[23:].tobytes()
    assert np.isnan(alone.last_logits).all(), "a step that only pools has no logits"
    token = step(alone, [(2, 23, 1)])[0].token_ids
    assert token == step(executor(name, way, 1), [(2, 0, 24)], [23])[0].token_ids


@pytest.mark.parametrize("way", WAYS)
def test_scored_rows_are_the_log_softmax_of_their_logits(way: str) -> None:
    native = executor("q4_1", way, 2)
    targets = np.arange(24) * 3
    output, _ = step(native, [(0, 0, 14), (1, 0, 10)], target=1 + targets, num_logprobs=np.arange(24) % 4 - 1)
    logits = native.last_logits.astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert output.token_ids.tolist() == targets.tolist() and (output.accepted == 1).all()
    np.testing.assert_allclose(output.logprobs, expected[np.arange(24), targets], rtol=1e-6, atol=2e-6)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    np.testing.assert_array_equal(output.top_ids[3], best[3])
    assert output.top_ids[2].tolist() == [best[2, 0], -1] and (output.top_ids[0] == -1).all()


def copies_of(pairs: list[tuple[int, int]]) -> list[np.ndarray]:
    """One group's block copies."""
    return [np.array(pairs, np.int32).reshape(-1, 2)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", [*MODELS, "reference"])
def test_copied_blocks_hold_the_same_keys_and_values(name: str, threads: int) -> None:
    """Slot 0's 40 tokens, copied into blocks of slot 1, which goes on with its own tokens in the copy of the last,
    partly filled block within the same step; then slot 0 goes on in the original, untouched by that."""

    def make() -> Any:
        if name == "reference":
            return ReferenceExecutor(*model_of("q4_1", "generic"), **SIZE)
        return executor(name, WAYS[0], threads)

    runs, alone = make(), make()
    step(runs, [(0, 0, 40)], [])
    pairs = [(0, BLOCKS + 5), (1, BLOCKS + 17), (2, 2 * BLOCKS + 30)]  # over 16 blocks and below
    table = np.array([(1, i, to) for i, (_, to) in enumerate(pairs)], np.int32)
    work, ids = [(1, 40, 4), (0, 40, 2)], np.concatenate([IDS[1, 40:44], IDS[0, 40:42]])
    copied, _ = step(runs, work, [3, 5], block_copies=copies_of(pairs), block_updates=[table])
    logits = runs.last_logits.copy()
    step(alone, [(0, 0, 40)], [])
    for row, (first, last) in enumerate(((0, 4), (4, 6))):
        batch = batch_of([(0, 40, ids[first:last])], [], [last - first - 1])
        alone.finish(alone.launch(batch))
        if name == "reference":  # BLAS rounds by the number of rows
            np.testing.assert_allclose(alone.last_logits[0], logits[row], rtol=1e-3, atol=1e-3)
        else:
            np.testing.assert_array_equal(alone.last_logits[0], logits[row])
    assert copied.accepted.tolist() == [1, 1]


def test_chained_copies_are_refused_by_the_reference_too() -> None:
    reference = ReferenceExecutor(*model_of("q4_1", "generic"), **SIZE)
    for pairs in ([(0, 1), (1, 2)], [(0, 2), (1, 2)], [(3, 3)]):
        with pytest.raises(ValueError, match="copied"):
            step(reference, [(0, 0, 3)], block_copies=copies_of(pairs))
