"""Blocks of one cache group: reference counts, a free list, and the content kept for reuse."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence


def _nobody(block: int) -> None:
    """Nobody has to know that a block's content is gone."""


class BlockPool:
    """``num_blocks`` blocks, ids 0 to num_blocks - 1, each of them free, owned or cached.

    Owned: its count is at least one. Cached: nobody owns it, but its content is in the prefix index and may be
    shared again. Free: neither. Cached blocks are given out, least recently used first, when none is free.

    The free list is a stack: the block freed last is used first, so that memory already touched is touched
    again, and blocks are first used in the order of their ids: a backend has memory for the next few ready.

    Args:
        num_blocks: at least 1.
        evicted: called with a cached block whose content is about to be overwritten.
    """

    def __init__(self, num_blocks: int, evicted: Callable[[int], None] = _nobody) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool holds at least one block, got {num_blocks}")
        self.num_blocks = num_blocks
        self._evicted = evicted
        self.reset()

    def reset(self) -> None:
        """Take every block back, whoever holds it, and forget what any of them contains."""
        self._counts = [0] * self.num_blocks
        self._kept = bytearray(self.num_blocks)  # 1: its content is in the prefix index
        self._free = list(range(self.num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds and whose content nobody wants."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds, kept for their content."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that ``allocate`` can give out: free and cached ones."""
        return len(self._free) + len(self._cached)

    def count(self, block: int) -> int:
        """How many holders ``block`` has."""
        return self._counts[block]

    def allocate(self, number: int) -> list[int]:
        """Take ``number`` blocks, each held once; raises ValueError, taking none, when fewer are available."""
        if not 0 <= number <= self.num_available:
            raise ValueError(f"{number} blocks wanted, {self.num_available} of {self.num_blocks} are available")
        blocks = [self._free.pop() if self._free else self._evict() for _ in range(number)]
        for block in blocks:
            self._counts[block] = 1
        return blocks

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        self._kept[block] = 0
        self._evicted(block)
        return block

    def share(self, blocks: Sequence[int]) -> None:
        """Hold each of ``blocks`` once more; raises ValueError, changing none, for one that is free."""
        for block in blocks:
            if not 0 <= block < self.num_blocks or not (self._counts[block] or self._kept[block]):
                raise ValueError(f"block {block} is neither held nor cached, so it cannot be shared")
        for block in blocks:
            if self._counts[block] == 0:
                del self._cached[block]
            self._counts[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        """Let each of ``blocks`` go once; raises ValueError, changing none, for more than its holders.

        Of blocks in the order of their positions the last is evicted first: a prefix is worth more than its end.
        """
        for block, number in Counter(blocks).items():
            if not 0 <= block < self.num_blocks or self._counts[block] < number:
                raise ValueError(f"block {block} is freed more often than it is held")
        for block in reversed(blocks):
            self._counts[block] -= 1
            if self._counts[block] == 0:
                if self._kept[block]:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def keep(self, block: int) -> None:
        """The content of ``block``, which somebody holds, is in the prefix index from now on."""
        if self._counts[block] == 0:
            raise ValueError(f"block {block} is not held, so its content cannot be kept")
        self._kept[block] = 1

    def is_kept(self, block: int) -> bool:
        """Whether the content of ``block`` is in the prefix index."""
        return bool(self._kept[block])

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Raise AssertionError unless counts equal what ``tables`` hold and free + owned + cached = all blocks."""
        held = Counter(block for table in tables for block in table)
        free = set(self._free)
        if len(free) != len(self._free):
            raise AssertionError("a block is on the free list twice")
        for block, count in enumerate(self._counts):
            if count != held[block]:
                raise AssertionError(f"block {block} counts {count} holders, tables hold it {held[block]} times")
            where = (count > 0) + (block in free) + (block in self._cached)
            if where != 1:
                raise AssertionError(f"block {block} with {count} holders is in {where} of: owned, free, cached")
            if bool(self._kept[block]) != (block in self._cached) and count == 0:
                raise AssertionError(f"block {block} is cached without content, or free with it")
        if any(not 0 <= block < self.num_blocks for block in held):
            raise AssertionError("a table holds a block that does not exist")
