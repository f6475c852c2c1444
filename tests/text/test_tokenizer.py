"""Tokenizers against ids that llama.cpp gives, a plain SentencePiece, and their own promises."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.core.errors import ModelFileError, RequestError, UnsupportedError
from ridgeline.text.tokenizer import BYTE_OF_CHAR, Tokenizer
from tests.text.vocabularies import byte_level, sentencepiece, smollm2

# Ids printed by llama.cpp (llama_tokenize, parse_special=false) for the embedded model's vocabulary: as it
# is for the texts, and with tokenizer.ggml.pre renamed for the probe.
LLAMA_CPP = json.loads((Path(__file__).parent / "llama_cpp_ids.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_gguf(smollm2())


@pytest.mark.parametrize("text, ids", LLAMA_CPP["texts"])
def test_ids_are_llama_cpps(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("pre", LLAMA_CPP["probe_ids"])
def test_pre_tokenizers(pre: str) -> None:
    tokenizer = Tokenizer.from_gguf({**smollm2(), "tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": False})
    assert tokenizer.encode(LLAMA_CPP["probe"]) == LLAMA_CPP["probe_ids"][pre]


@pytest.mark.parametrize(
    "pre, text, words",
    [
        ("gpt-2", "it's 12345 x", ["it", "'s", " 12345", " x"]),
        ("smollm", "it's 123 x", ["it", "'s", " ", "1", "2", "3", " x"]),
        ("llama-bpe", "IT'S 12345x\n\n a", ["IT", "'S", " ", "123", "45", "x", "\n\n", " a"]),
        ("qwen2", "(abc 12", ["(abc", " ", "1", "2"]),
        ("tekken", "fooBarBAZ 12/", ["foo", "Bar", "BAZ", " ", "1", "2", "/"]),
        ("gpt-4o", "don'T fooBar 1234/\n", ["don'T", " foo", "Bar", " ", "123", "4", "/\n"]),
        ("deepseek-v3", "1234日本abc", ["123", "4", "日本", "abc"]),
        ("falcon", "1234 a`b", ["123", "4", " a", "`", "b"]),
    ],
)
def test_words(pre: str, text: str, words: list[str]) -> None:
    """Where each family cuts, written down by hand."""
    tokenizer = Tokenizer.from_gguf(byte_level(**{"tokenizer.ggml.pre": pre}))
    spelled = tokenizer._backend.pre_tokenizer.pre_tokenize_str(text)
    assert [bytes(BYTE_OF_CHAR[c] for c in word).decode() for word, _ in spelled] == words


def test_control_tokens_only_on_request(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer.encode(text, control=True) == [1, 4093, 198, 26843, 2, 198]
    plain = tokenizer.encode(text)
    assert not any(tokenizer.is_control(i) for i in plain)
    assert tokenizer.decode(plain) == text
    assert tokenizer.decode([1, 4093, 2]) == "user"
    assert tokenizer.decode([1, 4093, 2], skip_special=False) == "<|im_start|>user<|im_end|>"


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (49152, 1, 2)
    assert tokenizer.eos_ids == {0, 2} and not tokenizer.add_bos
    assert tokenizer.control["<|im_start|>"] == 1 and len(tokenizer.control) == 17


texts = st.text(max_size=60) | st.lists(
    st.sampled_from(
        ["<|im_start|>", "<|im_end|>", "<s>", "[INST]", "<think>", "<|im_", "end|>", " ", "a", "é", "🌍", "\n", "1"]
    ),
    max_size=12,
).map("".join)


@given(texts)
@settings(max_examples=300, deadline=None)
def test_plain_text_round_trips_and_is_never_control(text: str) -> None:
    tokenizer = TINY
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not any(tokenizer.is_control(i) for i in ids)
    marked = tokenizer.encode(text, control=True)
    assert tokenizer.decode(marked, skip_special=False) == text


TINY = Tokenizer.from_gguf(byte_level(("h e", "l l", "he ll", "hell o", "< |", "<| i")))


def test_user_defined_tokens_match_in_any_text() -> None:
    think = TINY.vocab_size - 1
    assert think in TINY.encode("a<think>b") and TINY.decode([think]) == "<think>"


def test_user_defined_that_looks_control_is_control() -> None:
    metadata = byte_level()
    kinds = list(metadata["tokenizer.ggml.token_type"])
    kinds[metadata["tokenizer.ggml.tokens"].index("<|im_end|>")] = 4
    tokenizer = Tokenizer.from_gguf({**metadata, "tokenizer.ggml.token_type": kinds})
    assert tokenizer.is_control(tokenizer.eos_id or -1)
    assert tokenizer.eos_id not in tokenizer.encode("<|im_end|>")


def test_begin_and_end_tokens() -> None:
    tokenizer = Tokenizer.from_gguf(
        byte_level(**{"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True})
    )
    ids = tokenizer.encode("a")
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id and len(ids) == 3
    assert tokenizer.encode("<s>a", control=True) == ids  # not twice
    assert tokenizer.encode("", control=False) == [tokenizer.bos_id, tokenizer.eos_id]


# -- SentencePiece ----------------------------------------------------------------------------------------------------


def _sentencepiece_ids(metadata: dict[str, Any], text: str) -> list[int]:
    """The algorithm as its paper states it: join the neighbouring pair whose whole scores best, leftmost first."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    normal = {t: i for i, t in enumerate(tokens) if metadata["tokenizer.ggml.token_type"][i] == 1}
    pieces = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [
            (scores[normal[a + b]], -i)
            for i, (a, b) in enumerate(zip(pieces, pieces[1:], strict=False))
            if a + b in normal
        ]
        if not pairs:
            break
        at = -max(pairs)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    ids = []
    for piece in pieces:
        ids += [normal[piece]] if piece in normal else [3 + b for b in piece.encode()]
    return ids


def test_sentencepiece_joins_the_best_pair_first() -> None:
    metadata = sentencepiece()
    tokenizer, rng = Tokenizer.from_gguf(metadata), random.Random(5)
    alphabet = ["the", "a", "b", "ab", " ", "  ", "hello", "l", "in", "wh", "\n", "é", "日", "🌍", "w", "th", "er"]
    for _ in range(500):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(0, 14)))
        ids = tokenizer.encode(text)
        assert ids == [1, *_sentencepiece_ids(metadata, text)], text
        assert tokenizer.decode(ids) == text


def test_sentencepiece_details() -> None:
    tokenizer = Tokenizer.from_gguf(sentencepiece())
    assert tokenizer.add_bos and tokenizer.eos_ids == {2}
    assert 2 not in tokenizer.encode("</s>") and tokenizer.decode(tokenizer.encode("</s>")) == "</s>"
    the = sentencepiece()["tokenizer.ggml.tokens"].index("▁the")
    assert tokenizer.decode([the]) == "the" and tokenizer.decode([the], continuation=True) == " the"
    bare = Tokenizer.from_gguf(sentencepiece(**{"tokenizer.ggml.add_space_prefix": False}))
    assert bare.decode(bare.encode(" the")) == " the"
    tool = len(sentencepiece()["tokenizer.ggml.tokens"]) - 1
    assert tool in tokenizer.encode("a <tool> b")


# -- what is refused --------------------------------------------------------------------------------------------------

BROKEN: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, UnsupportedError, "no tokenizer"),
    ({"tokenizer.ggml.model": "bert"}, UnsupportedError, "'bert' is not supported"),
    ({"tokenizer.ggml.model": "gpt2"}, UnsupportedError, "no tokenizer.ggml.tokens"),
    (byte_level(**{"tokenizer.ggml.pre": "martian"}), UnsupportedError, "tokenizer.ggml.pre 'martian'"),
    (byte_level(**{"tokenizer.ggml.merges": None}), ModelFileError, "merges is missing"),
    (byte_level(**{"tokenizer.ggml.merges": ["zz qq"]}), ModelFileError, "merges does not fit"),
    (byte_level(**{"tokenizer.ggml.merges": ["nospace"]}), ModelFileError, "merges does not fit"),
    (byte_level(**{"tokenizer.ggml.merges": [1, 2]}), ModelFileError, "must be a list of str"),
    (byte_level(**{"tokenizer.ggml.tokens": []}), ModelFileError, "tokens is empty"),
    (byte_level(**{"tokenizer.ggml.tokens": "abc"}), ModelFileError, "must be a list of str"),
    (
        byte_level(**{"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": None}),
        ModelFileError,
        "outside the vocab",
    ),
    (byte_level(**{"tokenizer.ggml.token_type": [1, 2]}), ModelFileError, "has 2 entries for 261 tokens"),
    (byte_level(**{"tokenizer.ggml.token_type": [9] * 261}), ModelFileError, "token_type holds values"),
    (byte_level(**{"tokenizer.ggml.eos_token_id": 999}), ModelFileError, "eos_token_id is 999, outside"),
    (byte_level(**{"tokenizer.ggml.bos_token_id": "x"}), ModelFileError, "bos_token_id must be a token id"),
    (byte_level(**{"tokenizer.ggml.add_bos_token": 3}), ModelFileError, "add_bos_token must be true or false"),
    (sentencepiece(**{"tokenizer.ggml.scores": None}), ModelFileError, "scores is missing"),
    (sentencepiece(**{"tokenizer.ggml.scores": [1.0]}), ModelFileError, "scores has 1 entries"),
]


@pytest.mark.parametrize("metadata, kind, message", BROKEN)
def test_broken_vocabularies(metadata: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Tokenizer.from_gguf(metadata)


def test_a_token_twice() -> None:
    metadata = byte_level()
    metadata["tokenizer.ggml.tokens"] = ["b", *metadata["tokenizer.ggml.tokens"][1:]]
    with pytest.raises(ModelFileError, match="holds the token 'b' twice"):
        Tokenizer.from_gguf(metadata)


def test_bad_text_and_ids(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(RequestError, match="must be a string"):
        tokenizer.encode(b"a")  # type: ignore[arg-type]
    for bad in (-1, 49152):
        with pytest.raises(RequestError, match="outside the vocabulary"):
            tokenizer.decode([bad])


def test_imports_stay_light() -> None:
    code = "import sys, ridgeline.text.chat, ridgeline.text.detokenizer; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"jinja2", "tokenizers", "torch", "transformers"} & set(loaded)
