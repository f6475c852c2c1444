"""The KV cache of all requests: block tables over one pool per group, joined by the prefix index."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from ridgeline.kvcache.block_pool import BlockPool
from ridgeline.kvcache.prefix import Node, PrefixIndex, hash_block

Span = Callable[[int, int], bytes]
"""``span(start, stop)``: int32 token ids of a sequence from position ``start`` to ``stop``, as bytes."""

Updates = list[list[tuple[int, int, int]]]
"""Per group: (slot, index in its table, block id)."""

Copies = list[list[tuple[int, int]]]
"""Per group: (source block, destination block)."""


@dataclass(frozen=True)
class CacheGroup:
    """Layers that share block tables.

    Attributes:
        num_blocks: blocks in its pool.
        window: a token sees this many tokens, itself included; 0: all before it.
    """

    num_blocks: int
    window: int = 0


class BlockTable:
    """The blocks of one sequence.

    Attributes:
        blocks: per group, block ids in order of position; -1 where a block has left the window.
        first: per group, index of the first block still held.
        capacity: tokens that the blocks can take.
        node: the prefix node of the last block registered; None when this sequence is not indexed.
        announced: nodes this sequence has said it will compute.
    """

    __slots__ = ("blocks", "first", "capacity", "node", "announced")

    def __init__(self, groups: int) -> None:
        self.blocks: list[list[int]] = [[] for _ in range(groups)]
        self.first = [0] * groups
        self.capacity = 0
        self.node: Node | None = None
        self.announced: list[Node] = []

    def held(self, group: int) -> list[int]:
        """Block ids that the table holds in ``group``."""
        return self.blocks[group][self.first[group] :]


@dataclass(frozen=True)
class Match:
    """What the prefix index knows of a sequence: ``path`` nodes whose blocks can be shared, and ``pending``, a
    node further on that another sequence is computing (None: there is none)."""

    path: Sequence[Node]
    pending: Node | None


class KVCache:
    """Every block table, pool and the prefix index of an engine. Ints only.

    Args:
        groups: one CacheGroup per group.
        block_size: tokens in a block.
        sharing: whether sequences share the blocks of equal prefixes.
        hasher: chained hash of the prefix index.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        block_size: int,
        *,
        sharing: bool = True,
        hasher: Callable[[int, bytes], int] = hash_block,
    ) -> None:
        self.groups = list(groups)
        self.block_size = block_size
        self.sharing = sharing
        self.index = PrefixIndex(len(self.groups), hasher)
        self.pools = [BlockPool(g.num_blocks, self._evictor(i)) for i, g in enumerate(self.groups)]
        self.windows = [(i, g.window) for i, g in enumerate(self.groups) if g.window]

    def _evictor(self, group: int) -> Callable[[int], None]:
        return lambda block: self.index.evict(group, block)

    def reset(self) -> None:
        """Forget every table, block and prefix."""
        self.index.reset()
        for pool in self.pools:
            pool.reset()

    def blocks_needed(self, num_tokens: int, group: int) -> int:
        """Most blocks of ``group`` that a sequence of ``num_tokens`` must hold at once, computing one by one."""
        whole = -(-num_tokens // self.block_size)
        window = self.groups[group].window
        return min(whole, -(-(window - 1) // self.block_size) + 1) if window else whole

    def find(self, salt: Hashable, span: Span, num_tokens: int) -> Match:
        """Blocks to share for a sequence, so many that at least one of its ``num_tokens`` is left to compute."""
        if not self.sharing:
            return Match((), None)
        index, size = self.index, self.block_size
        node = index.root(salt)
        path: list[Node] = []
        runs = [0] * len(self.groups)  # per group: consecutive nodes with a block, up to this one
        usable, pending = 0, None
        for start in range(0, num_tokens - size, size):
            child = index.child(node, span(start, start + size))
            if child is None:
                break
            runs = [run + 1 if block >= 0 else 0 for run, block in zip(runs, child.blocks, strict=True)]
            path.append(child)
            if all(run >= self._run_needed(g, len(path)) for g, run in enumerate(runs)):
                usable = len(path)
            if child.writer is not None:
                pending = child
            elif any(b < 0 and not g.window for b, g in zip(child.blocks, self.groups, strict=True)):
                break  # nobody has these tokens, so whatever comes after them is of no use
            node = child
        index.prune(index.root(salt))
        return Match(path[:usable], pending if pending is not None and pending.depth > usable else None)

    def _run_needed(self, group: int, depth: int) -> int:
        """Blocks before position ``depth * block_size`` that its token reads."""
        window = self.groups[group].window
        return depth - self._first_seen(window, depth * self.block_size) if window else depth

    def _first_seen(self, window: int, position: int) -> int:
        """Index of the first block that the token at ``position`` reads."""
        return max(0, position - window + 1) // self.block_size

    def open(self, salt: Hashable, path: Sequence[Node]) -> BlockTable:
        """A table that shares the blocks of ``path`` and, with ``sharing``, will add its own to the index."""
        table = BlockTable(len(self.groups))
        depth = len(path)
        for group, pool in enumerate(self.pools):
            first = depth - self._run_needed(group, depth)
            blocks = [node.blocks[group] for node in path[first:]]
            pool.share(blocks)
            table.blocks[group] = [-1] * first + blocks
            table.first[group] = first
        table.capacity = depth * self.block_size
        if self.sharing:
            table.node = path[-1] if path else self.index.root(salt)
            self.index.hold(table.node)
        return table

    def fork(self, source: BlockTable, num_tokens: int, copies: Copies) -> BlockTable:
        """A table for a sequence that equals ``source`` in its first ``num_tokens`` and then goes its own way.

        Whole blocks are shared. The block that the new sequence will write next is copied, into a block allocated
        here. Call only after ``can_fork``.
        """
        table = BlockTable(len(self.groups))
        whole, rest = divmod(num_tokens, self.block_size)
        for group, pool in enumerate(self.pools):
            blocks, first = source.blocks[group], self._fork_first(source, group, num_tokens)
            shared = blocks[first:whole]
            pool.share(shared)
            table.blocks[group] = [-1] * first + shared
            table.first[group] = first
            if rest:
                copy = pool.allocate(1)[0]
                copies[group].append((blocks[whole], copy))
                table.blocks[group].append(copy)
        table.capacity = (whole + bool(rest)) * self.block_size
        node = source.node
        if node is not None:
            while node.depth > whole:
                assert node.parent is not None
                node = node.parent
            table.node = node
            self.index.hold(node)
        return table

    def _fork_first(self, source: BlockTable, group: int, num_tokens: int) -> int:
        """Index of the first block that a fork of ``source`` at ``num_tokens`` holds in ``group``."""
        window = self.groups[group].window
        return self._first_seen(window, num_tokens) if window else 0

    def can_fork(self, source: BlockTable, num_tokens: int, spare: int) -> bool:
        """Whether ``source`` still holds what a fork needs, and ``spare`` blocks stay available after it."""
        need = bool(num_tokens % self.block_size)
        return all(
            pool.num_available >= need + spare and source.first[group] <= self._fork_first(source, group, num_tokens)
            for group, pool in enumerate(self.pools)
        )

    def room(self, table: BlockTable, spare: int = 0) -> int:
        """Tokens the table can take if it gets all available blocks but ``spare`` of each group."""
        return min(
            (len(blocks) + max(0, pool.num_available - spare)) * self.block_size
            for blocks, pool in zip(table.blocks, self.pools, strict=True)
        )

    def grow(self, table: BlockTable, num_tokens: int, slot: int, updates: Updates) -> bool:
        """Give the table blocks for ``num_tokens``; False, changing nothing, when too few are available."""
        need = -(-num_tokens // self.block_size) - table.capacity // self.block_size
        if need <= 0:
            return True
        if any(pool.num_available < need for pool in self.pools):
            return False
        for group, pool in enumerate(self.pools):
            blocks = table.blocks[group]
            start = len(blocks)
            blocks += pool.allocate(need)
            updates[group] += [(slot, i, blocks[i]) for i in range(start, start + need)]
        table.capacity += need * self.block_size
        return True

    def announce(self, table: BlockTable, span: Span, num_tokens: int) -> None:
        """Say that ``table`` will compute its first ``num_tokens``, so that others wait for them."""
        node = table.node
        if node is None:
            return
        size = self.block_size
        for start in range(node.depth * size, num_tokens - size + 1, size):
            child = self.index.add(node, span(start, start + size))
            if child is None:
                return
            if child.writer is None:
                child.writer = table
                table.announced.append(child)
            node = child

    def register(self, table: BlockTable, span: Span, num_settled: int) -> None:
        """Index the full blocks of the first ``num_settled`` tokens, whose step has ended."""
        size, index = self.block_size, self.index
        while table.node is not None and (table.node.depth + 1) * size <= num_settled:
            last = table.node
            depth = last.depth
            node = index.add(last, span(depth * size, (depth + 1) * size))
            if node is None:  # other content with the same hash: from here on this sequence is not indexed
                self.retract(table)
                return
            for group, pool in enumerate(self.pools):
                block = table.blocks[group][depth]
                if block >= 0 and node.blocks[group] < 0:
                    index.set_block(node, group, block)
                    pool.keep(block)
            index.hold(node)
            index.let_go(last)
            table.node = node
            if node.writer is not None:
                index.release_writer(node, node.writer)

    def slide(self, table: BlockTable, num_settled: int) -> bool:
        """Free the blocks that no token from position ``num_settled`` on reads; True when there were any."""
        freed = False
        for group, window in self.windows:
            first, held = self._first_seen(window, num_settled), table.first[group]
            if first > held:
                blocks = table.blocks[group]
                gone = blocks[held:first]
                self.pools[group].free(gone)
                blocks[held:first] = [-1] * len(gone)
                table.first[group] = held + len(gone)
                freed = True
        return freed

    def retract(self, table: BlockTable) -> None:
        """The table computes nothing more: wake who waits for it, and index nothing further of it."""
        for node in table.announced:
            self.index.release_writer(node, table)
        table.announced = []
        if table.node is not None:
            node, table.node = table.node, None
            self.index.let_go(node)

    def free(self, table: BlockTable) -> None:
        """Let all blocks of a table go, after ``retract`` and once no step may write them."""
        for group, pool in enumerate(self.pools):
            pool.free(table.held(group))

    def check(self, tables: Sequence[BlockTable]) -> None:
        """Raise AssertionError unless pools, tables and index agree; ``tables`` are all that hold blocks."""
        for group, pool in enumerate(self.pools):
            pool.check(table.held(group) for table in tables)
            for table in tables:
                held = table.blocks[group]
                if len(held) * self.block_size != table.capacity or any(b >= 0 for b in held[: table.first[group]]):
                    raise AssertionError("a block table has lost count of its blocks")
        self.index.check(
            lambda group, block: self.pools[group].is_kept(block), [t.node for t in tables if t.node is not None]
        )
