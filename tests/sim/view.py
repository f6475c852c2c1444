"""All that the simulation reads of an engine's inside, in one place.

The oracles count for themselves: from here they take who holds which block and which blocks nobody holds, nothing
that an engine concludes from it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from zlib import crc32

from ridgeline.engine.engine import Engine
from ridgeline.engine.request import Request
from ridgeline.kvcache.prefix import Node
from ridgeline.scheduler.sequence import State


def truncate_hashes(engine: Engine, bits: int) -> None:
    """Hash blocks to so few ``bits`` that contents collide, by their own tokens alone (and whatever Python's hash
    of bytes and of None is in this process)."""
    engine._cache.index._hasher = lambda parent, tokens: crc32(tokens) & ((1 << bits) - 1)


def table(request: Request, group: int) -> list[int]:
    """A running request's table: block ids by index, -1 where it holds none any more."""
    assert request.table is not None
    return request.table.blocks[group]


def free(engine: Engine, group: int) -> list[int]:
    """Blocks that nobody holds and nobody may read."""
    return engine._cache.pools[group]._free


def cached(engine: Engine, group: int) -> list[int]:
    """Blocks that nobody holds, kept for their content, the one to be given out first in front."""
    return list(engine._cache.pools[group]._cached)


def count(engine: Engine, group: int, block: int) -> int:
    """How many holders the engine thinks a block has."""
    return engine._cache.pools[group].count(block)


def is_indexed(engine: Engine, group: int, block: int) -> bool:
    """Whether a block may be found by its content."""
    return engine._cache.pools[group].is_kept(block)


def indexed(engine: Engine, group: int) -> Iterator[tuple[int, list[bytes]]]:
    """Every block that may be found by its content, with the token bytes of all blocks up to and including it."""
    for block, node in engine._cache.index._at[group].items():
        path = []
        while node.parent is not None:
            path.append(node.tokens)
            node = node.parent
        yield block, path[::-1]


def content(engine: Engine, group: int) -> dict[int, Node]:
    """What every block that may be found by its content holds: nodes, which are equal only to themselves."""
    return engine._cache.index._at[group]


def nodes(engine: Engine) -> Iterator[Node]:
    """Every block's worth of tokens that the prefix index knows, whether or not a block holds it."""
    return iter(engine._cache.index._nodes.values())


class Chains:
    """The nodes of the prefix index by what is before them, as they are now, whatever their hashes."""

    def __init__(self, engine: Engine) -> None:
        self._roots = engine._cache.index._roots
        self._after = {(id(node.parent), node.tokens): node for node in nodes(engine)}

    def follow(self, salt: Hashable, pieces: Sequence[bytes]) -> list[list[int]]:
        """Of each of ``pieces`` that is in the index after those before it, the block of every group (-1: none)."""
        node, found = self._roots.get(salt), []
        for piece in pieces if node is not None else ():
            node = self._after.get((id(node), piece))
            if node is None:
                break
            found.append(node.blocks)
        return found


def open_steps(engine: Engine) -> int:
    """Steps launched and not finished."""
    return len(engine._open)


def parked(request: Request) -> bool:
    """Whether it waits for another request to compute what it shares with it."""
    return request.state is State.PARKED


def queued(request: Request) -> bool:
    """Whether it waits for its turn."""
    return request.state in (State.WAITING, State.PREEMPTED)
