"""The determinism contract of docs/determinism.md: however a request is served, its bits are those of it run alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from invariance.small_models import BLOCKS, MAX_ROWS, SLOTS, WAYS, executor
from invariance.workloads import (
    Ahead,
    Ask,
    alone,
    engine_of,
    fingerprint_of_stream,
    fingerprints,
    one_hash,
    together,
    workload,
)

from ridgeline import LLM, AsyncLLM
from ridgeline.engine.engine import Engine, EngineLimits

VOCAB, LONGEST, OUTPUTS = 80, 150, (6, 24)
SERVINGS = 4  # of each small workload


def must_equal(
    served: Sequence[Sequence[str]], expected: Sequence[Sequence[str]], asks: Sequence[Ask], how: Any
) -> None:
    """One hash for all; where it differs, the requests that do and how they were served."""
    if one_hash(served) == one_hash(expected):
        return
    wrong = [(i, asks[i]) for i in range(len(asks)) if list(served[i]) != list(expected[i])]
    shown = "\n".join(f"request {i}: prompt of {len(a.prompt)}, {a.params}" for i, a in wrong[:5])
    raise AssertionError(f"{len(wrong)} of {len(asks)} requests differ from those run alone, under {how}:\n{shown}")


def small_limits(**changes: Any) -> EngineLimits:
    values = {"max_requests": 1, "max_tokens": 512, "max_len": LONGEST + OUTPUTS[1], "num_blocks": [SLOTS * BLOCKS]}
    return EngineLimits(vocab_size=VOCAB, block_size=16, max_sampled_rows=MAX_ROWS, **{**values, **changes})


def serving(rng: random.Random) -> tuple[int, dict[str, Any]]:
    """A way to serve: threads, and what it changes of the limits."""
    return rng.choice([1, 2, 3]), {
        "max_requests": rng.choice([2, 4, SLOTS]),
        "max_tokens": rng.choice([7, 23, 64, 512]),
        "num_blocks": [rng.choice([12, 16, 30, SLOTS * BLOCKS])],
        "prefix_sharing": rng.random() < 0.7,
        "speculation": rng.choice([None, "ngram"]),
        "max_open_steps": rng.choice([1, 2]),
        "ngram_min": rng.choice([1, 2]),
    }


@pytest.mark.parametrize("name", ["q4_1", "q8_0-f16", "bf16", "f32", "q8_0-int8", "mixed"])
@pytest.mark.parametrize("way", WAYS)
def test_small_models_however_they_are_served(way: str, name: str) -> None:
    rng = random.Random(f"{way} {name}")
    asks = workload(rng.getrandbits(32), 14, VOCAB, LONGEST, OUTPUTS)
    quiet = small_limits(prefix_sharing=False)
    expected = alone(engine_of(executor(name, way, 1), quiet), asks)
    for _ in range(SERVINGS):
        threads, changes = serving(rng)
        seed = rng.getrandbits(32)
        served = together(engine_of(executor(name, way, threads), small_limits(**changes)), asks, seed)
        must_equal(served, expected, asks, (way, name, threads, changes, seed))


def test_the_servings_reach_what_they_are_for() -> None:
    """Prefixes found, requests preempted, drafts taken and refused, two steps under way."""
    asks = workload(1, 14, VOCAB, LONGEST, OUTPUTS)
    limits = small_limits(max_requests=4, max_tokens=23, num_blocks=[14], speculation="ngram", max_open_steps=2)
    ahead = Ahead(executor("q4_1", WAYS[0], 2))
    engine = Engine(ahead, limits)
    together(engine, asks, 1)
    stats = engine.stats()
    assert stats.prefix_hit_tokens > 100 and stats.preemptions > 0 and ahead.most == 2
    assert 0 < stats.drafts_accepted < stats.drafts_proposed


@pytest.fixture(scope="module")
def large(smollm2_path: Path) -> tuple[list[Ask], list[list[str]]]:
    """A workload for the embedded model, and its fingerprints when each request runs alone on one thread."""
    with LLM(str(smollm2_path), threads=1, max_num_seqs=1, prefix_sharing=False) as llm:
        asks = workload(7, 72, llm.runtime.model.config.vocab_size, 64, (5, 16))
        return asks, alone(llm.runtime.engine, asks)


LARGE = {
    "all at once": {"threads": 2, "max_num_seqs": 96, "max_num_batched_tokens": 4096},
    "small chunks, few blocks, speculation": {
        **{"threads": 3, "max_num_seqs": 24, "max_num_batched_tokens": 61, "num_kv_blocks": 24},
        **{"speculation": "ngram", "ngram_min": 1},
    },
}


@pytest.mark.parametrize("how", LARGE)
def test_smollm2_through_llm(
    how: str, large: tuple[list[Ask], list[list[str]]], smollm2_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks, expected = large
    order = random.Random(how).sample(range(len(asks)), len(asks))
    with LLM(str(smollm2_path), **LARGE[how]) as llm:
        launch, most = llm.runtime.executor.launch, [0]

        def counted(batch: Any) -> Any:
            most[0] = max(most[0], len(batch.slots))
            return launch(batch)

        monkeypatch.setattr(llm.runtime.executor, "launch", counted)
        outputs = llm.generate([list(asks[i].prompt) for i in order], [asks[i].params for i in order])
        stats = llm.runtime.engine.stats()
    served = {i: fingerprints(output) for i, output in zip(order, outputs, strict=True)}
    must_equal([served[i] for i in range(len(asks))], expected, asks, how)
    assert stats.prefix_hit_tokens > 300
    assert most[0] >= 64 if how == "all at once" else stats.drafts_accepted > 50


def test_smollm2_through_async_llm(large: tuple[list[Ask], list[list[str]]], smollm2_path: Path) -> None:
    """Callers that come when they like, half of them reading streams."""
    asks, expected = large
    rng = random.Random(3)

    async def call(llm: AsyncLLM, ask: Ask, delay: float, streams: bool) -> list[str]:
        await asyncio.sleep(delay)
        if streams and ask.params.n == 1 and ask.params.prompt_logprobs is None:
            return [fingerprint_of_stream([d async for d in llm.stream(list(ask.prompt), ask.params)])]
        return fingerprints((await llm.generate(list(ask.prompt), ask.params))[0])

    async def run() -> list[list[str]]:
        llm = AsyncLLM(str(smollm2_path), threads=2, max_num_seqs=40, max_num_batched_tokens=200)
        try:
            calls = [call(llm, ask, rng.random() / 2, rng.random() < 0.5) for ask in asks]
            return await asyncio.gather(*calls)
        finally:
            llm.close()

    must_equal(asyncio.run(run()), expected, asks, "AsyncLLM")
