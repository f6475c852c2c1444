"""The block pool against a plain model of it: a list of holders."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.kvcache.block_pool import BlockPool

STEPS = st.lists(st.tuples(st.sampled_from(["allocate", "share", "free", "reset"]), st.integers(0, 12)), max_size=60)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), STEPS)
def test_counts_equal_holders(size: int, steps: list[tuple[str, int]]) -> None:
    pool = BlockPool(size)
    tables: list[list[int]] = []
    for action, number in steps:
        if action == "allocate":
            if number <= pool.num_free:
                blocks = pool.allocate(number)
                held = {b for table in tables for b in table}
                assert len(set(blocks)) == number and not held & set(blocks)
                tables.append(blocks)
            else:
                with pytest.raises(ValueError, match="are available"):
                    pool.allocate(number)
        elif action == "share" and tables:
            table = tables[number % len(tables)]
            pool.share(table)
            tables.append(list(table))
        elif action == "free" and tables:
            pool.free(tables.pop(number % len(tables)))
        elif action == "reset":
            pool.reset()
            tables.clear()
        pool.check(tables)
        assert pool.num_free == size - len({b for table in tables for b in table})


def test_blocks_freed_last_are_used_first() -> None:
    pool = BlockPool(8)
    assert pool.allocate(3) == [0, 1, 2]
    other = pool.allocate(2)
    pool.free([0, 1, 2])
    assert pool.allocate(4) == [0, 1, 2, 5]
    pool.free(other)
    assert pool.num_free == 4


def test_wrong_holders_are_refused_and_change_nothing() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    with pytest.raises(ValueError, match="more often"):
        pool.free([blocks[0], blocks[0]])
    with pytest.raises(ValueError, match="more often"):
        pool.free([blocks[0], 3])
    with pytest.raises(ValueError, match="neither held nor cached"):
        pool.share([blocks[0], 3])
    pool.check([blocks])


def test_check_finds_a_leak_and_a_double_owner() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    with pytest.raises(AssertionError, match="counts 1 holders"):
        pool.check([])
    with pytest.raises(AssertionError, match="tables hold it 2"):
        pool.check([blocks, blocks])
    with pytest.raises(AssertionError, match="tables hold it 1"):
        pool.check([[*blocks, 3]])
