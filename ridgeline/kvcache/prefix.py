"""The prefix index: which block holds the KV of which tokens after which other tokens."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any


def hash_block(parent: int, tokens: bytes) -> int:
    """The chained hash of a block: of all tokens before it, through ``parent``, and its own.

    Only a guide to where to look: the index compares the tokens and the chain themselves.
    """
    return hash((parent, tokens))


class Node:
    """One block's worth of tokens after the tokens of its parent; the parent of the first is a root.

    A node is its content: it stays while anything refers to it, whether or not a block holds its KV just now.

    Attributes:
        parent: the node before it; None for a root.
        hash: chained hash of everything up to here.
        tokens: int32 token ids of this block as bytes; empty for a root.
        depth: blocks from the root up to here.
        blocks: block id per cache group, -1 where none holds this content.
        writer: whoever is computing this content now (a BlockTable), if anybody is.
        waiters: who wants to know when the writer is done with it, or gives up.
        refs: child nodes and block tables that end here.
        salt: of a root, what keeps its sequences apart from all others.
    """

    __slots__ = ("parent", "hash", "tokens", "depth", "blocks", "writer", "waiters", "refs", "salt")

    def __init__(self, parent: Node | None, hash_: int, tokens: bytes, groups: int, salt: Hashable = None) -> None:
        self.parent = parent
        self.hash = hash_
        self.tokens = tokens
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.blocks = [-1] * groups
        self.writer: Any = None
        self.waiters: list[Any] = []
        self.refs = 0
        self.salt = salt


class PrefixIndex:
    """Nodes by chained hash; a look-up follows a chain from the root of its salt and verifies every link.

    Args:
        groups: number of cache groups.
        hasher: chained hash; whatever it returns, content is never confused.
    """

    def __init__(self, groups: int, hasher: Callable[[int, bytes], int] = hash_block) -> None:
        self.groups = groups
        self._hasher = hasher
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._roots: dict[Hashable, Node] = {}
        self._nodes: dict[int, Node] = {}
        self._at: list[dict[int, Node]] = [{} for _ in range(self.groups)]  # node of each kept block
        self.woken: list[Any] = []  # waiters whose wait is over; whoever reads it empties it

    def __len__(self) -> int:
        """Nodes, roots left out."""
        return len(self._nodes)

    def root(self, salt: Hashable) -> Node:
        """Where all sequences with this salt start; the caller holds it, or lets it go with ``prune``."""
        node = self._roots.get(salt)
        if node is None:
            node = self._roots[salt] = Node(None, hash(salt), b"", self.groups, salt)
        return node

    def child(self, node: Node, tokens: bytes) -> Node | None:
        """The node of ``tokens`` after ``node``, or None."""
        found = self._nodes.get(self._hasher(node.hash, tokens))
        if found is not None and found.parent is node and found.tokens == tokens:
            return found
        return None

    def add(self, node: Node, tokens: bytes) -> Node | None:
        """The node of ``tokens`` after ``node``, made if need be; None where other content has the same hash."""
        key = self._hasher(node.hash, tokens)
        found = self._nodes.get(key)
        if found is None:
            found = self._nodes[key] = Node(node, key, tokens, self.groups)
            node.refs += 1
        elif found.parent is not node or found.tokens != tokens:
            return None
        return found

    def set_block(self, node: Node, group: int, block: int) -> None:
        """``block`` of ``group`` holds this node's content."""
        node.blocks[group] = block
        self._at[group][block] = node

    def evict(self, group: int, block: int) -> None:
        """The content of ``block`` is about to be overwritten."""
        node = self._at[group].pop(block)
        node.blocks[group] = -1
        self.prune(node)

    def release_writer(self, node: Node, writer: object) -> None:
        """``writer`` has written this node, or never will: wake those who wait for it."""
        if node.writer is writer:
            node.writer = None
            self.woken += node.waiters
            node.waiters = []
            self.prune(node)

    def hold(self, node: Node) -> None:
        """A block table ends at ``node``: keep it."""
        node.refs += 1

    def let_go(self, node: Node) -> None:
        """A block table no longer ends at ``node``."""
        node.refs -= 1
        self.prune(node)

    def prune(self, node: Node) -> None:
        """Remove ``node``, and what only it kept, unless something refers to it."""
        at: Node | None = node
        while at is not None and at.refs == 0 and at.writer is None and all(b < 0 for b in at.blocks):
            parent = at.parent
            if parent is None:
                if self._roots.get(at.salt) is at:
                    del self._roots[at.salt]
            elif self._nodes.get(at.hash) is at:
                del self._nodes[at.hash]
                parent.refs -= 1
            at = parent

    def check(self, kept: Callable[[int, int], bool], ends: list[Node]) -> None:
        """Raise AssertionError unless nodes, blocks and references agree.

        Args:
            kept: whether the pool of a group keeps a block.
            ends: the node each live block table ends at.
        """
        refs: dict[int, int] = {}
        for node in [*ends, *(n.parent for n in self._nodes.values() if n.parent is not None)]:
            refs[id(node)] = refs.get(id(node), 0) + 1
        for key, node in self._nodes.items():
            if key != node.hash or node.parent is None or node.depth != node.parent.depth + 1:
                raise AssertionError("a node of the prefix index lies under another's hash")
            if node.parent.parent is not None and self._nodes.get(node.parent.hash) is not node.parent:
                raise AssertionError("a node of the prefix index has lost its parent")
        for node in [*self._nodes.values(), *self._roots.values()]:
            if node.refs != refs.get(id(node), 0):
                raise AssertionError(f"a prefix node counts {node.refs} references and has {refs.get(id(node), 0)}")
            if node.refs == 0 and node.writer is None and all(b < 0 for b in node.blocks):
                raise AssertionError("a prefix node that nothing refers to is kept")
            for group, block in enumerate(node.blocks):
                if block >= 0 and (self._at[group].get(block) is not node or not kept(group, block)):
                    raise AssertionError(f"block {block} of group {group} is indexed without being kept")
        if sum(map(len, self._at)) != sum(b >= 0 for n in self._nodes.values() for b in n.blocks):
            raise AssertionError("a block is indexed under a node that is gone")
