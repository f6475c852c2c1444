"""Stop strings and the text held back for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ridgeline.engine.text import TextStream


class Letters:
    """Each token is a letter; None of it is held back but the tail given."""

    def __init__(self, tail: str = "") -> None:
        self.tail = tail

    def push(self, token_id: int) -> str:
        return chr(token_id)

    def finish(self) -> str:
        return self.tail


class Pieces(Letters):
    def __init__(self, pieces: list[str]) -> None:
        super().__init__()
        self.pieces = pieces

    def push(self, token_id: int) -> str:
        return self.pieces[token_id]


@given(
    st.lists(st.text("ab", max_size=5), max_size=10),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_stop_string_that_is_complete_first(pieces: list[str], stop: list[str]) -> None:
    stream = TextStream(Pieces(pieces), tuple(stop))
    taken = ""
    stopped = False
    for token in range(len(pieces)):
        stopped = stream.push(token)
        taken += stream.take()
        assert stream.text.startswith(taken)
        if stopped:
            break
    stopped = stream.finish() or stopped
    taken += stream.take()
    whole = "".join(pieces)
    ends = [(whole.find(s) + len(s), whole.find(s)) for s in stop if s in whole]
    assert stopped == bool(ends)
    assert taken == stream.text == (whole[: min(ends)[1]] if ends else whole)


def test_text_is_handed_out_as_soon_as_no_stop_string_can_begin_in_it() -> None:
    stream = TextStream(Letters(), ("END",))
    taken = []
    for letter in "xEEyEN":
        stream.push(ord(letter))
        taken.append(stream.take())
    assert taken == ["x", "", "E", "Ey", "", ""]
    assert not stream.finish()
    assert stream.take() == "EN"


@pytest.mark.parametrize(("stop", "text"), [((), "ab!"), (("b!",), "a")])
def test_finish_adds_what_the_detokenizer_holds(stop: tuple[str, ...], text: str) -> None:
    stream = TextStream(Letters(tail="!"), stop)
    assert not stream.push(ord("a")) and not stream.push(ord("b"))
    assert stream.finish() == bool(stop)
    assert stream.text == text
