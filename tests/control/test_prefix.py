"""The prefix index and the cache over it: whatever the hash says, only equal content is shared."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.kvcache.cache import BlockTable, CacheGroup, KVCache


class Sequence:
    """Tokens with a table; ``content`` of the blocks is kept by the test."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = array("i", tokens)
        self.table: BlockTable | None = None

    def span(self, start: int, stop: int) -> bytes:
        return self.tokens[start:stop].tobytes()


def fill(cache: KVCache, sequence: Sequence, salt: object = None) -> int:
    """Run a sequence up to its end as a scheduler would; the tokens found in the cache."""
    match = cache.find(salt, sequence.span, len(sequence.tokens))
    table = sequence.table = cache.open(salt, match.path)
    hit = table.capacity
    assert cache.grow(table, len(sequence.tokens), 0, [[] for _ in cache.groups])
    cache.announce(table, sequence.span, len(sequence.tokens))
    cache.register(table, sequence.span, len(sequence.tokens))
    return hit


def drop(cache: KVCache, sequence: Sequence) -> None:
    assert sequence.table is not None
    cache.retract(sequence.table)
    cache.free(sequence.table)
    sequence.table = None


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(TOKENS, st.sampled_from([None, "a"]), st.booleans()), max_size=14),
    st.sampled_from([lambda p, t: 0, lambda p, t: len(t) & 1, lambda p, t: sum(t) % 3, lambda p, t: hash((p, t))]),
    st.sampled_from([[0], [0, 3], [3]]),
)
def test_a_hit_is_always_the_same_content(steps, hasher, windows) -> None:  # type: ignore[no-untyped-def]
    cache = KVCache([CacheGroup(9, w) for w in windows], 2, hasher=hasher)
    written: list[dict[int, tuple[object, tuple[int, ...]]]] = [{} for _ in windows]
    live: list[Sequence] = []
    for tokens, salt, keep in steps:
        sequence = Sequence(tokens)
        match = cache.find(salt, sequence.span, len(tokens))
        for group, window in enumerate(windows):
            for depth, node in enumerate(match.path, 1):
                if not window or depth * 2 > len(match.path) * 2 - window + 1:
                    assert written[group][node.blocks[group]] == (salt, tuple(tokens[: depth * 2]))
        if cache.room(BlockTable(len(windows))) < len(tokens) + 2 * len(match.path):
            while live:
                drop(cache, live.pop())
        fill(cache, sequence, salt)
        assert sequence.table is not None
        for group in range(len(windows)):
            for i in range(sequence.table.first[group], len(tokens) // 2):
                written[group][sequence.table.blocks[group][i]] = (salt, tuple(tokens[: i * 2 + 2]))
        cache.slide(sequence.table, len(tokens))
        live.append(sequence)
        if not keep:
            drop(cache, live.pop())
        cache.check([s.table for s in live if s.table is not None])


def test_a_prefix_is_found_up_to_the_last_token_and_only_under_its_salt() -> None:
    cache = KVCache([CacheGroup(16)], 4)
    first = Sequence(list(range(8)))
    assert fill(cache, first) == 0
    assert fill(cache, Sequence(list(range(8)))) == 4, "the last token is computed anew: its row is wanted"
    assert fill(cache, Sequence([*range(8), 9])) == 8
    assert fill(cache, Sequence([*range(8), 9]), "other") == 0
    assert fill(cache, Sequence([1, *range(1, 8), 9])) == 0


def test_least_recently_used_content_goes_first_and_the_end_of_a_prefix_before_its_start() -> None:
    cache = KVCache([CacheGroup(4)], 2)
    old, new = Sequence([1, 2, 3, 4]), Sequence([5, 6, 7, 8])
    for sequence in (old, new):
        fill(cache, sequence)
        drop(cache, sequence)
    assert cache.pools[0].num_cached == 4
    third = Sequence([9])
    fill(cache, third)
    assert len(cache.find(None, Sequence([1, 2, 3, 4, 0]).span, 5).path) == 1
    assert len(cache.find(None, Sequence([5, 6, 7, 8, 0]).span, 5).path) == 2


def test_content_comes_back_under_a_parent_that_was_evicted() -> None:
    cache = KVCache([CacheGroup(8)], 2)
    first = Sequence([1, 2, 3, 4, 5])
    fill(cache, first)
    cache.index.evict(0, first.table.blocks[0][0])  # type: ignore[union-attr]
    cache.pools[0]._kept[first.table.blocks[0][0]] = 0  # type: ignore[union-attr]
    assert len(cache.find(None, first.span, 5).path) == 0
    second = Sequence([1, 2, 0])
    fill(cache, second)
    assert len(cache.find(None, first.span, 5).path) == 2


@pytest.mark.parametrize(("window", "hit"), [(0, 8), (3, 8), (1, 8)])
def test_a_window_group_needs_only_the_blocks_in_its_window(window: int, hit: int) -> None:
    cache = KVCache([CacheGroup(8), CacheGroup(8, window)], 4)
    first = Sequence(list(range(8)))
    fill(cache, first)
    cache.slide(first.table, 8)  # type: ignore[arg-type]
    held = len(first.table.held(1))  # type: ignore[union-attr]
    assert held == {0: 2, 3: 1, 1: 0}[window]
    second = Sequence([*range(8), 50])
    assert fill(cache, second) == hit
    cache.check([first.table, second.table])  # type: ignore[list-item]
