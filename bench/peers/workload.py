"""The one workload every engine runs: token ids only, so that no tokenizer is measured.

Greedy, end of text ignored, and every prompt of every repetition distinct, so that a prefix cache
gives nobody anything. Standard library only: it is imported inside every peer's environment.
"""

from __future__ import annotations

import random

VOCAB_LOW, VOCAB_HIGH = 100, 40_000  # plain text ids of the 49,152 of SmolLM2

SANITY_PROMPT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]
"""The chat prompt "What is the capital of France?"; SANITY_TOKEN is " Paris"."""
SANITY_TOKEN = 7042
SANITY_STEPS = 16


def prompt(seed: str, length: int) -> list[int]:
    """``length`` token ids that depend on ``seed`` alone."""
    source = random.Random(f"prompt {seed}")
    return [source.randint(VOCAB_LOW, VOCAB_HIGH) for _ in range(length)]


def prompts(seed: str, count: int, length: int) -> list[list[int]]:
    """``count`` distinct prompts."""
    return [prompt(f"{seed}/{i}", length) for i in range(count)]


def mixed(count: int = 32) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens) of ``count`` requests: 16 to 512 and 16 to 256, evenly spread and shuffled."""
    last = max(1, count - 1)
    lengths = [16 + i * (512 - 16) // last for i in range(count)]
    outputs = [16 + i * (256 - 16) // last for i in range(count)]
    source = random.Random("mixed")
    source.shuffle(lengths)
    source.shuffle(outputs)
    return list(zip(lengths, outputs, strict=True))
