"""Streaming detokenization equals decoding the whole, and never splits a character."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.text.detokenizer import Detokenizer
from ridgeline.text.tokenizer import Tokenizer
from tests.text.vocabularies import byte_level, sentencepiece, smollm2

BYTES = Tokenizer.from_gguf(byte_level(("Ã ©", "ð Ł", "a b")))  # tokens that are characters, parts of them, and neither
PIECES = Tokenizer.from_gguf(sentencepiece())


def _stream(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip_special)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


@given(st.sampled_from([BYTES, PIECES]), st.data(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_any_tokens_join_to_the_whole(tokenizer: Tokenizer, data: st.DataObject, skip: bool) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    assert "".join(_stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip, continuation=True)


@given(st.text(max_size=40))
@settings(max_examples=300, deadline=None)
def test_text_comes_back_whole_with_no_replacement_on_the_way(text: str) -> None:
    pieces = _stream(BYTES, BYTES.encode(text.replace("\ufffd", "")))
    assert "".join(pieces) == text.replace("\ufffd", "")
    assert pieces[-1] == "" and "\ufffd" not in "".join(pieces)


def test_a_character_comes_with_its_last_byte() -> None:
    ids = BYTES.encode("x🌍y")
    assert len(ids) > 3
    assert [p for p in _stream(BYTES, ids) if p] == ["x", "🌍", "y"]


def test_unfinished_and_broken_characters() -> None:
    earth = BYTES.encode("🌍")
    assert _stream(BYTES, earth[:-1])[-1] == "\ufffd"
    assert "".join(_stream(BYTES, [*earth[:-1], *BYTES.encode("a")])) == "\ufffda"
    alone = next(i for i in range(256) if BYTES.token_bytes(i) == b"\xff")
    assert _stream(BYTES, [alone]) == ["\ufffd", ""]


def test_control_tokens_are_skipped_even_inside_a_character() -> None:
    control = BYTES.control["<|im_end|>"]
    first, *rest = BYTES.encode("🌍")
    assert "".join(_stream(BYTES, [first, control, *rest, control])) == "🌍"
    assert "".join(_stream(BYTES, [control], skip_special=False)) == "<|im_end|>"


def test_usable_again_after_finish() -> None:
    detokenizer = Detokenizer(BYTES)
    detokenizer.push(BYTES.encode("🌍")[0])
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.push(BYTES.encode("a")[0]) == "a" and detokenizer.finish() == ""


def test_embedded_vocabulary_streams_unicode() -> None:
    tokenizer = Tokenizer.from_gguf(smollm2())
    text = "naïve 日本語 🌍👩\u200d👩\u200d👧 Привет ไทย" * 3
    pieces = _stream(tokenizer, tokenizer.encode(text))
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
