"""The intermediate representation: a graph is a list of nodes over typed values, in topological order.

Everything is immutable but the builder: a pass reads one ``Graph`` and returns another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ridgeline.core.formats import WeightFormat

DTYPE_BYTES: dict[str, int] = {"f32": 4, "bf16": 2, "f16": 2, "i32": 4, "fp8": 1}
"""Bytes per element of the plain activation and cache dtypes ("q8" rows are sized by ``row_bytes``)."""

Q8_GROUP = 32
"""Values along K that share one scale in a "q8" activation row."""

INTERLEAVE = 16
"""Rows of gate and of up in turn in their merged weight: the width of the native kernels' column tile."""


@dataclass(frozen=True)
class Sym:
    """A dimension known only at run time ("T" tokens, "S" sampled rows), at most ``bound``."""

    name: str
    bound: int


Dim = int | Sym


def bound(dim: Dim) -> int:
    """The most a dimension can be."""
    return dim if isinstance(dim, int) else dim.bound


@dataclass(frozen=True)
class WeightInfo:
    """Where a weight's rows come from.

    Attributes:
        format: storage format of every part.
        parts: names of the model's weights, in order of N; one name unless a pass merged several.
        interleave: 0 for parts one after another; 16 for 16 rows of part 0, 16 of part 1, alternating.
    """

    format: WeightFormat
    parts: tuple[str, ...]
    interleave: int = 0


def kv_row_bytes(dtype: str, head_dim: int) -> int:
    """Bytes of one token's key, or value, of one head in the cache; int8 codes have a float32 scale beside them."""
    return head_dim + 4 if dtype == "int8" else head_dim * DTYPE_BYTES[dtype]


@dataclass(frozen=True)
class CacheInfo:
    """Which part of the paged KV cache a "cache" value stands for.

    Attributes:
        group: index into ``Graph.caches``.
        layer: index of the layer within the group.
        dtype: what keys and values are rounded to when written: "f32", "bf16", "f16", "fp8" (e4m3, saturated) or
            "int8" (a scale for each token and head).
        num_kv_heads, head_dim: shape of one token's keys (and values).
    """

    group: int
    layer: int
    dtype: str
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class CacheSpec:
    """What the cache manager knows of a group of layers that share block tables.

    Attributes:
        layers: model layers in the group.
        kind: what is kept per token.
        bytes_per_token: bytes of one token in all layers of the group, keys and values.
        block_size: tokens in a block.
        dtype, num_kv_heads, head_dim: of one layer's keys (and values).
    """

    layers: tuple[int, ...]
    kind: Literal["full", "window", "latent", "state"]
    bytes_per_token: int
    block_size: int
    dtype: str
    num_kv_heads: int
    head_dim: int


class Adder(Protocol):
    """What makes ``+`` and ``*`` on values work: the builder they came from."""

    def add(self, a: Value, b: Value) -> Value:
        """Elementwise sum."""
        ...

    def mul(self, a: Value, b: Value) -> Value:
        """Elementwise product."""
        ...


@dataclass(frozen=True, eq=False)
class Value:
    """The result of a node, an input, a weight or a state of the cache; compared by identity.

    Attributes:
        id: unique within a graph and everything derived from it.
        shape: row-major; the first dimension of an activation is its rows.
        dtype: "f32" | "bf16" | "f16" | "i32" | "q8" for activations, else "weight" or "cache".
        weight: set when dtype is "weight"; cache: set when dtype is "cache".
        maker: the builder, while a model is being written.
    """

    id: int
    name: str
    shape: tuple[Dim, ...]
    dtype: str
    weight: WeightInfo | None = None
    cache: CacheInfo | None = None
    maker: Adder | None = field(default=None, repr=False)

    def __add__(self, other: Value) -> Value:
        assert self.maker is not None, "only values of a graph being built can be added"
        return self.maker.add(self, other)

    def __mul__(self, other: Value) -> Value:
        assert self.maker is not None, "only values of a graph being built can be multiplied"
        return self.maker.mul(self, other)

    @property
    def info(self) -> WeightInfo:
        """Of a weight; raises TypeError for anything else."""
        if self.weight is None:
            raise TypeError(f"{self.name} is {self.dtype}, not a weight")
        return self.weight


@dataclass(frozen=True, eq=False)
class Node:
    """One application of an operator declared in ``ops.py``."""

    op: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    attrs: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in topological order, with named inputs, outputs and weights.

    ``inputs`` holds the batch's arrays and each layer's cache as it was; ``outputs`` holds "logits" and
    each layer's cache as it becomes, which is what keeps cache writes alive. ``next_id`` is the first
    unused value id.
    """

    nodes: tuple[Node, ...]
    inputs: Mapping[str, Value]
    outputs: Mapping[str, Value]
    weights: Mapping[str, Value]
    caches: tuple[CacheSpec, ...]
    next_id: int


def row_elements(value: Value) -> int:
    """Elements in one row of an activation (1 for a vector such as ``positions``)."""
    count = 1
    for dim in value.shape[1:]:
        count *= bound(dim)
    return count


def row_bytes(value: Value) -> int:
    """Bytes of the payload of one row, before padding.

    A "q8" row holds for every 32 values their int8 codes, a float32 scale, the float32 product scale * sum(codes), the
    int32 sum and an int32 that only some kernels want (csrc/cpu/packed.h): 48 bytes.
    """
    elements = row_elements(value)
    if value.dtype == "q8":
        return 48 * (elements // Q8_GROUP)
    return elements * DTYPE_BYTES[value.dtype]
