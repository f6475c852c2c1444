"""Blocks of the KV cache: a free list and reference counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence


class BlockPool:
    """``num_blocks`` blocks, ids 0 to num_blocks - 1; a block is free exactly when its count is zero.

    The free list is a stack: the block freed last is used first, so that memory already touched is touched
    again and an untouched block costs nothing.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool holds at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self.reset()

    def reset(self) -> None:
        """Take every block back, whoever holds it."""
        self._counts = [0] * self.num_blocks
        self._free = list(range(self.num_blocks - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def count(self, block: int) -> int:
        """How many holders ``block`` has."""
        return self._counts[block]

    def allocate(self, number: int) -> list[int]:
        """Take ``number`` free blocks, each held once; raises ValueError, taking none, when fewer are free."""
        if not 0 <= number <= len(self._free):
            raise ValueError(f"{number} blocks wanted, {len(self._free)} of {self.num_blocks} are free")
        if number == 0:
            return []
        blocks = self._free[: -number - 1 : -1]
        del self._free[-number:]
        for block in blocks:
            self._counts[block] = 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Hold each of ``blocks`` once more; raises ValueError, changing none, for one that is free."""
        blocks = list(blocks)
        for block in blocks:
            if not 0 <= block < self.num_blocks or self._counts[block] == 0:
                raise ValueError(f"block {block} is not held, so it cannot be shared")
        for block in blocks:
            self._counts[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Let each of ``blocks`` go once; raises ValueError, changing none, for more than its holders."""
        for block, number in Counter(blocks).items():
            if not 0 <= block < self.num_blocks or self._counts[block] < number:
                raise ValueError(f"block {block} is freed more often than it is held")
        for block in reversed(blocks):  # so that the next allocation gets them in the same order
            self._counts[block] -= 1
            if self._counts[block] == 0:
                self._free.append(block)

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Raise AssertionError unless the counts equal what ``tables`` hold and free + owned = all blocks."""
        held = Counter(block for table in tables for block in table)
        free = set(self._free)
        if len(free) != len(self._free):
            raise AssertionError("a block is on the free list twice")
        for block, count in enumerate(self._counts):
            if count != held[block]:
                raise AssertionError(f"block {block} counts {count} holders, tables hold it {held[block]} times")
            if (count == 0) != (block in free):
                raise AssertionError(f"block {block} has {count} holders and is {'' if block in free else 'not '}free")
        if any(not 0 <= block < self.num_blocks for block in held):
            raise AssertionError("a table holds a block that does not exist")
