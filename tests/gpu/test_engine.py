"""The engine over the emulated device: however requests are served, their bits are those of each alone.

Few and short, as every step is interpreted: at most 40 steps of at most 4 requests in all.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from ridgeline import LLM, SamplingParams
from ridgeline.core.errors import ConfigError
from ridgeline.engine.engine import Engine, EngineLimits
from tests.gpu.effort import STEPS
from tests.gpu.small_model import SIZES, executor
from tests.invariance.workloads import Ask, alone, fingerprint, one_hash

MOST_STEPS = 40 - 2 * STEPS  # what test_scripts.py leaves
WINDOWS = (0, 12)


class Counted:
    """An executor that counts its steps."""

    steps = 0

    def __init__(self, made: Any) -> None:
        self._made = made

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)

    def launch(self, batch: Any) -> Any:
        """As the executor; one step more."""
        type(self).steps += 1
        return self._made.launch(batch)


def engine(seed: int, **changes: Any) -> Engine:
    """The small model, its second layer behind a window; ``changes`` of the limits."""
    values = {"max_requests": 1, "max_tokens": 32, "max_len": 60, "num_blocks": 2 * SIZES["num_blocks"], **changes}
    limits = EngineLimits(vocab_size=160, block_size=16, max_sampled_rows=8, windows=WINDOWS, **values)
    return Engine(Counted(executor(seed=seed, windows=WINDOWS)), limits, seed=1)


def test_served_together_or_alone() -> None:
    """Prefix hits, drafts, two open steps, chunks of 11 tokens, blocks for half of it all, a window: one hash."""
    rng = random.Random(3)
    stem = [rng.randrange(160) for _ in range(17)]
    repeats = [5, 6, 7] * 4
    asks = [
        Ask((*stem, 9), SamplingParams(temperature=0, max_tokens=3, logprobs=2)),
        Ask((*stem, 8, 1), SamplingParams(temperature=0.9, seed=7, max_tokens=3, repetition_penalty=1.3, top_k=9)),
        Ask(tuple(repeats), SamplingParams(temperature=0, max_tokens=5)),
    ]
    expected = alone(engine(1), asks)
    changes: Any = {"speculation": "ngram", "max_open_steps": 2, "ngram_min": 1}
    busy = engine(2, max_requests=3, max_tokens=11, num_blocks=[7, 6], **changes)
    groups = [busy.make_requests(ask.prompt, ask.params) for ask in asks]
    for group in groups:
        busy.submit(group)
        busy.step()
    while busy.has_work:
        busy.step()
    assert one_hash([[fingerprint(r) for r in group] for group in groups]) == one_hash(expected)
    assert 8 < Counted.steps <= MOST_STEPS


def test_options_of_other_backends_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes no threads"):
        LLM("smollm2", backend="cuda", threads=2)
    with pytest.raises(ConfigError, match="takes no device"):
        LLM("smollm2", device="emulated")
    with pytest.raises(ConfigError, match="keeps no f32 cache"):
        LLM("smollm2", backend="cuda", device="emulated", kv_dtype="f32")
