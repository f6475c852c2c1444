"""What a step costs: operations by kind and bytes by where they go. Pure numbers, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ridgeline.graph.ir import Dim


@dataclass(frozen=True)
class Load:
    """The size of one step, all that a cost depends on besides shapes.

    Attributes:
        tokens: T, tokens computed.
        rows: S, rows sampled.
        requests: B.
        kv_tokens_read: sum over requests of the tokens in their context.
        attn_pairs: sum over tokens of the keys each attends to.
    """

    tokens: int
    rows: int
    requests: int
    kv_tokens_read: int
    attn_pairs: int

    @classmethod
    def of(cls, requests: Sequence[tuple[int, int]]) -> Load:
        """The load of ``(tokens already cached, new tokens)`` pairs, each sampling its last row."""
        pairs = sum(new * old + new * (new + 1) // 2 for old, new in requests)
        total = sum(new for _, new in requests)
        return cls(total, len(requests), len(requests), sum(old + new for old, new in requests), pairs)

    def size(self, dim: Dim) -> int:
        """A dimension's size in this step."""
        if isinstance(dim, int):
            return dim
        return {"T": self.tokens, "S": self.rows, "B": self.requests}[dim.name]


@dataclass(frozen=True)
class Cost:
    """Operations and bytes.

    Attributes:
        dot: multiply-accumulate operations (2 per multiply-add) by kind: "int8", "bf16", "f32".
        scale_ops: elementwise float operations (scales, norms, softmax).
        convert_ops: conversions between number formats.
        weight_bytes: weights as the file stores them, read once a step.
        kv_read, kv_written: cache bytes.
        act_read, act_written: activation bytes; small enough to stay in cache, so no roofline term.
    """

    dot: dict[str, float] = field(default_factory=dict)
    scale_ops: float = 0
    convert_ops: float = 0
    weight_bytes: float = 0
    kv_read: float = 0
    kv_written: float = 0
    act_read: float = 0
    act_written: float = 0

    @property
    def bytes_read(self) -> float:
        """All bytes read."""
        return self.weight_bytes + self.kv_read + self.act_read

    @property
    def bytes_written(self) -> float:
        """All bytes written."""
        return self.kv_written + self.act_written

    @property
    def streamed_bytes(self) -> float:
        """Bytes that must come from memory each step: weights and the KV read."""
        return self.weight_bytes + self.kv_read

    @property
    def dot_ops(self) -> float:
        """Dot-product operations of all kinds."""
        return sum(self.dot.values())

    def plus(self, other: Cost, sign: int = 1) -> Cost:
        """Sum (or, with ``sign=-1``, difference) of two costs."""
        dot = {k: self.dot.get(k, 0) + sign * other.dot.get(k, 0) for k in {**self.dot, **other.dot}}
        return Cost(
            dot,
            self.scale_ops + sign * other.scale_ops,
            self.convert_ops + sign * other.convert_ops,
            self.weight_bytes + sign * other.weight_bytes,
            self.kv_read + sign * other.kv_read,
            self.kv_written + sign * other.kv_written,
            self.act_read + sign * other.act_read,
            self.act_written + sign * other.act_written,
        )


def total(costs: Iterable[Cost]) -> Cost:
    """Sum of costs."""
    result = Cost()
    for cost in costs:
        result = result.plus(cost)
    return result
