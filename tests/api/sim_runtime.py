"""A runtime over the simulated executor whose tokens are ASCII codes, for tests of LLM and AsyncLLM."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from ridgeline.core.types import SamplingParams
from ridgeline.engine.engine import Engine, EngineLimits
from tests.sim.small import SimExecutor, solo

LIMITS = EngineLimits(4, 16, 64, 128, 4, [64])
EOS = frozenset({3})


class AsciiTokenizer:
    """A token is an ASCII code; those below 32 are control tokens."""

    eos_ids = EOS

    def encode(self, text: str) -> list[int]:
        return list(text.encode("ascii"))

    def decode(self, ids: Iterable[int], skip_special: bool = True, *, continuation: bool = False) -> str:
        return "".join(chr(i) for i in ids if i >= 32 or not skip_special)

    def push(self, token_id: int) -> str:
        return self.decode([token_id])

    def finish(self) -> str:
        return ""


class Template:
    def encode(
        self, messages: list[dict[str, str]], tokenizer: AsciiTokenizer, add_generation_prompt: bool
    ) -> list[int]:
        return tokenizer.encode("".join(m["content"] for m in messages)) + [2] * add_generation_prompt


def sim_runtime(limits: EngineLimits = LIMITS, executor: SimExecutor | None = None) -> Any:
    """As much of a Runtime as LLM and AsyncLLM use."""
    tokenizer = AsciiTokenizer()
    engine = Engine(executor or SimExecutor(limits), limits, eos_ids=EOS, detokenizer=lambda: tokenizer, seed=0)
    return SimpleNamespace(engine=engine, tokenizer=tokenizer, chat_template=Template)


def expected(prompt: str | list[int], params: SamplingParams, limits: EngineLimits = LIMITS) -> tuple[list[int], str]:
    """Tokens and finish reason of a prompt by itself."""
    ids = list(prompt.encode()) if isinstance(prompt, str) else prompt
    return solo(ids, params, limits.vocab_size, limits.max_len, EOS)
