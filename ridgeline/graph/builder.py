"""Writes a graph the way the paper writes the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ridgeline.core.formats import WeightFormat
from ridgeline.graph.ir import CacheInfo, CacheSpec, Dim, Graph, Node, Sym, Value, WeightInfo
from ridgeline.graph.ops import OPS


class GraphBuilder:
    """Collects nodes; every method adds one and returns its result.

    Inputs made from the start: ``token_ids`` [T], ``positions`` [T] and ``sample_rows`` [S], all int32.
    Shape mistakes raise ValueError where they are made.
    """

    def __init__(self, max_tokens: int, max_rows: int) -> None:
        self._nodes: list[Node] = []
        self._next_id = 0
        self._inputs: dict[str, Value] = {}
        self._weights: dict[str, Value] = {}
        self._caches: list[CacheSpec] = []
        self._cache_outputs: dict[str, Value] = {}
        self.tokens = Sym("T", max_tokens)
        self.rows = Sym("S", max_rows)
        self.token_ids = self._input("token_ids", (self.tokens,), "i32")
        self.positions = self._input("positions", (self.tokens,), "i32")
        self.sample_rows = self._input("sample_rows", (self.rows,), "i32")

    def _value(self, name: str, shape: tuple[Dim, ...], dtype: str, **info: Any) -> Value:
        value = Value(self._next_id, name, shape, dtype, maker=self, **info)
        self._next_id += 1
        return value

    def _input(self, name: str, shape: tuple[Dim, ...], dtype: str, **info: Any) -> Value:
        self._inputs[name] = self._value(name, shape, dtype, **info)
        return self._inputs[name]

    def weight(self, name: str, shape: tuple[int, ...], fmt: WeightFormat) -> Value:
        """A weight by its name in the model; asked for twice (tied embeddings), it is the same value."""
        if name not in self._weights:
            self._weights[name] = self._value(name, shape, "weight", weight=WeightInfo(fmt, (name,)))
        return self._weights[name]

    def cache_group(self, spec: CacheSpec) -> list[Value]:
        """Declares a group of layers sharing block tables; returns each layer's cache."""
        group = len(self._caches)
        self._caches.append(spec)
        infos = [CacheInfo(group, i, spec.dtype, spec.num_kv_heads, spec.head_dim) for i in range(len(spec.layers))]
        return [self._input(f"cache.{group}.{i.layer}", (), "cache", cache=i) for i in infos]

    def emit(self, op: str, inputs: Sequence[Value], attrs: Mapping[str, Any]) -> tuple[Value, ...]:
        """Adds a node of any operator; returns its outputs."""
        spec = OPS[op]
        full = spec.complete(attrs)
        cache = next((v.cache for v in inputs if v.cache), None)
        outputs = tuple(
            self._value(f"{op}.{self._next_id}", shape, dtype, cache=cache if dtype == "cache" else None)
            for shape, dtype in spec.infer(inputs, full)
        )
        self._nodes.append(Node(op, tuple(inputs), outputs, full))
        return outputs

    def embed(self, token_ids: Value, table: Value) -> Value:
        """Rows of ``table`` [V, H]: [T, H]."""
        return self.emit("embed", (token_ids, table), {})[0]

    def rms_norm(self, x: Value, w: Value, eps: float) -> Value:
        """Root-mean-square norm of each row, times ``w``."""
        return self.emit("rms_norm", (x, w), {"eps": eps})[0]

    def linear(self, x: Value, w: Value) -> Value:
        """``x`` [T, K] times the transpose of ``w`` [N, K]: [T, N]."""
        return self.emit("linear", (x, w), {})[0]

    def rope(self, x: Value, positions: Value, **attrs: Any) -> Value:
        """Rotary embedding of ``num_heads`` heads of ``head_dim``, pairs (i, i + head_dim / 2)."""
        return self.emit("rope", (x, positions), attrs)[0]

    def kv_write(self, cache: Value, k: Value, v: Value) -> Value:
        """The cache with each token's keys and values written."""
        written = self.emit("kv_write", (cache, k, v), {})[0]
        assert cache.cache is not None
        self._cache_outputs[f"cache.{cache.cache.group}.{cache.cache.layer}"] = written
        return written

    def attention(self, q: Value, cache: Value, **attrs: Any) -> Value:
        """Causal attention of ``q`` [T, num_heads * head_dim] over each request's cached tokens."""
        return self.emit("attention", (q, cache), attrs)[0]

    def silu(self, x: Value) -> Value:
        """x times sigmoid(x)."""
        return self.emit("silu", (x,), {})[0]

    def add(self, a: Value, b: Value) -> Value:
        """Elementwise sum; also ``a + b``."""
        return self.emit("add", (a, b), {})[0]

    def mul(self, a: Value, b: Value) -> Value:
        """Elementwise product; also ``a * b``."""
        return self.emit("mul", (a, b), {})[0]

    def select_rows(self, x: Value, rows: Value) -> Value:
        """Rows of ``x`` by index: [S, ...]."""
        return self.emit("select_rows", (x, rows), {})[0]

    def build(self, **outputs: Value) -> Graph:
        """The graph with these named outputs and every cache's last state."""
        return Graph(
            tuple(self._nodes),
            dict(self._inputs),
            {**outputs, **self._cache_outputs},
            dict(self._weights),
            tuple(self._caches),
            self._next_id,
        )
