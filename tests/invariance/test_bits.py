"""A prompt's logits, and what is sampled from them, never change by a bit: not with the batch, not with the chunks
of its prefill, not with slots and blocks, not with the number of threads; on every instruction set here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from invariance.mixes import assert_same, run_alone, run_mix, run_steps
from invariance.small_models import MAX_ROWS, MODELS, SLOTS, WAYS, executor, target_of

from ridgeline.backends.cpu.executor import CpuExecutor
from ridgeline.graph.plan import compile
from ridgeline.models.load import load_model


def prompts(seed: int, lengths: tuple[int, ...], vocab: int = 80) -> list[np.ndarray]:
    """Random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab, n).astype(np.int32) for n in lengths]


LENGTHS = (1, 16, 45, 130, 258, 530, 33, 7, 2, 64)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_random_mixes_give_the_bits_of_a_request_alone(way: str, name: str) -> None:
    ids = prompts(len(name), LENGTHS)
    size = {"slots": SLOTS, "max_tokens": 200, "max_rows": MAX_ROWS}
    first = run_mix(executor(name, way, 2), ids, 1, **size)
    alone = run_alone(executor(name, way, 1), ids, list(first)[:60], max_rows=MAX_ROWS)
    assert_same(first, alone)
    for seed, threads in ((2, 1), (3, 3), (4, 2), (5, 4), (6, 2)):
        assert_same(first, run_mix(executor(name, way, threads), ids, seed, **size))


@pytest.mark.parametrize("name", ["q4_1", "q8_0-f16", "q4_0-f32", "q8_0-int8"])
@pytest.mark.parametrize("way", WAYS)
def test_long_contexts_decode_to_the_bits_of_prefill(way: str, name: str) -> None:
    """One request past 512 tokens: its keys are split over threads in single decodes, not in prefill."""
    ids = prompts(9, (689,))
    wanted = [(0, p) for p in (250, 255, 256, 259, 502, 511, 512, 513, 519, 595, 604, 686, 688)]
    prefilled = run_alone(executor(name, way, 2), ids, wanted, max_rows=MAX_ROWS)
    for threads in (1, 2, 3, 4):
        steps = [250, *[1] * 10, 240, *[1] * 20, 75, *[1] * 10, 80, 1, 1, 1, 1]
        decoded = run_steps(executor(name, way, threads), ids[0], steps)
        assert set(wanted) <= decoded.keys()
        assert_same(prefilled, decoded)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path):
    """The embedded model's graph and weights."""
    model = load_model(smollm2_path)
    yield model.graph(max_tokens=544, max_rows=8, kv_dtype="bf16", block_size=16), model.weights
    model.file.close()


@pytest.mark.parametrize("way", WAYS)
def test_the_embedded_model_keeps_its_bits(way: str, smollm2) -> None:
    graph, weights = smollm2
    plan = compile(graph, target_of("bf16", way))
    lengths = (530, 40, 17, 5) if way != "generic" else (20, 9, 3)  # the portable path is slow
    ids = prompts(3, lengths, 49152)
    size = {"num_slots": 4, "num_blocks": [4 * 34], "max_blocks_per_slot": 34}
    runs = []
    for seed, threads in ((1, 1), (2, 2), (3, 3 if way != "generic" else 2)):
        native = CpuExecutor(plan, weights, **size, threads=threads, isa=way.split()[0])
        runs.append(run_mix(native, ids, seed, slots=4, max_tokens=320, max_rows=8, chunks=(1, 3, 20, 70, 256)))
        if seed > 1:
            assert_same(runs[0], runs[-1])
    assert_same(runs[-1], run_alone(native, ids, list(runs[-1])[-4:], max_rows=8))
