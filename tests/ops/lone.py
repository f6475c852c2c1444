"""Runs one operator natively: a graph of nothing else, lowered as any plan is, its result read back as bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ridgeline.backends.cpu import _native
from ridgeline.backends.cpu.lowering import Lowering, file_matrix, packed_weight_bytes, packings
from ridgeline.core.formats import FORMATS, WeightFormat
from ridgeline.core.types import SAMPLING_DTYPE, Batch
from ridgeline.graph.builder import GraphBuilder
from ridgeline.graph.ir import Graph, Value, WeightInfo, bound, row_bytes
from ridgeline.graph.plan import compile
from ridgeline.graph.target import Target
from ridgeline.models.load import Weight
from ridgeline.weights.codecs import quantize
from ridgeline.weights.tensor import WeightTensor

SLACK = 1 << 16  # bytes behind the arena: a result is read back as if it were `vocab` floats wide


class LoneGraph(GraphBuilder):
    """A builder that can also declare a merged weight, as the passes would have left it."""

    def __init__(self, max_tokens: int, max_rows: int) -> None:
        super().__init__(max_tokens, max_rows)
        self.values: dict[str, Weight] = {}

    def stored(self, name: str, shape: tuple[int, ...], fmt: WeightFormat, data: np.ndarray) -> Value:
        """A weight with its bytes."""
        self.values[name] = Weight(WeightTensor(name, shape, fmt, data))
        return self.weight(name, shape, fmt)

    def interleaved(self, parts: Mapping[str, np.ndarray], shape: tuple[int, int], fmt: WeightFormat) -> Value:
        """Gate and up of ``shape`` each, 16 rows of one and 16 of the other in turn."""
        for name, data in parts.items():
            self.values[name] = Weight(WeightTensor(name, shape, fmt, data))
        info = WeightInfo(fmt, tuple(parts), 16)
        name = "+".join(parts)
        self._weights[name] = self._value(name, (2 * shape[0], shape[1]), "weight", weight=info)
        return self._weights[name]

    def activation(self, name: str, table: np.ndarray) -> Value:
        """Row t is ``table[token_ids[t]]``, exactly."""
        data = quantize(FORMATS["f32"], table)
        return self.embed(self.token_ids, self.stored(f"{name}.table", table.shape, FORMATS["f32"], data))


def random_matrix(fmt: WeightFormat, n: int, k: int, rng: np.random.Generator) -> np.ndarray:
    """Bytes of an [n, k] matrix of numbers around 0.1: every code of an integer format, scales of both signs."""
    if fmt.kind == "float":
        return quantize(fmt, 0.1 * rng.standard_normal((n, k)))
    groups = rng.integers(0, 256, (n * (k // fmt.group), fmt.group_bytes), np.uint8)
    scale = rng.uniform(0.5, 1.5, len(groups)) * rng.choice([-1, 1], len(groups)) * 0.1 / 2 ** (fmt.bits - 1)
    scale[rng.random(len(groups)) < 0.05] = 0
    scale[rng.random(len(groups)) < 0.05] = 3e-7  # a denormal half
    groups[:, 0:2] = scale.astype("<f2").view(np.uint8).reshape(-1, 2)
    if fmt.has_minimum:
        groups[:, 2:4] = (0.1 * rng.standard_normal(len(groups))).astype("<f2").view(np.uint8).reshape(-1, 2)
    return groups.reshape(-1)


@dataclass(frozen=True)
class Heads:
    """What the native executor wants to know of a cache; the defaults serve operators that have none."""

    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 16
    kv_dtype: str = "f32"
    rope_frequency: tuple[float, ...] = (0.0,) * 8


class NativeGraph:
    """A graph on the native executor; ``run`` returns the raw rows of its output "logits"."""

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, Weight],
        *,
        isa: str,
        threads: int,
        heads: Heads | None = None,
        slots: int = 1,
        blocks: int = 64,
        vocab: int = 0,
    ) -> None:
        heads = heads or Heads()
        plan = compile(graph, Target("lone", {}, frozenset(), heads.kv_dtype))
        self.output = plan.outputs["logits"]
        self._words = -(-row_bytes(self.output) // 4)
        most = bound(plan.inputs["token_ids"].shape[0])
        config = {
            "isa": isa,
            "threads": threads,
            "max_tokens": most,
            "max_sampled": most,
            "num_slots": slots,
            "max_blocks_per_slot": blocks,
            "num_blocks": slots * blocks,
            "layers": 1,
            "heads": heads.heads,
            "kv_heads": heads.kv_heads,
            "head_dim": heads.head_dim,
            "vocab": vocab or max(self._words, *(bound(w.shape[0]) for w in plan.weights.values())),
            "kv_dtype": heads.kv_dtype,
            "arena_bytes": plan.arena_bytes + SLACK,
            "weight_bytes": packed_weight_bytes(plan),
            "rope_frequency": list(heads.rope_frequency),
        }
        assert config["vocab"] * 4 <= SLACK
        self.native = _native.Executor(config)
        wanted = packings(plan)
        packed, *_ = self.native.pack([file_matrix(w.value, w.tiles, weights) for w in wanted])
        matrices = {(w.value.name, role): m for w, m in zip(wanted, packed, strict=True) for role in w.roles}
        Lowering(plan, self.native, matrices, weights).run()

    def launch(self, batch: Batch) -> None:
        """Starts a step."""
        b = batch
        self.native.launch(
            b.token_ids,
            b.positions,
            b.slots,
            b.query_starts,
            b.context_lens,
            b.sample_rows,
            b.sampling,
            b.block_updates[0],
            b.block_copies[0] if b.block_copies else np.zeros((0, 2), np.int32),
            b.slot_starts,
        )

    def run(self, batch: Batch) -> np.ndarray:
        """One step: uint8 [rows, bytes] of the output, as they lie in the arena."""
        self.launch(batch)
        self.native.finish(None)
        floats = np.ascontiguousarray(self.native.logits()[:, : self._words])
        return floats.view(np.uint8)[:, : row_bytes(self.output)]


def batch_of(
    work: Sequence[tuple[int, int, Sequence[int]]], updates: Sequence[tuple[int, int, int]], rows: Any = None
) -> Batch:
    """A step of (slot, first position, token ids) requests; samples ``rows`` (None: every one), greedily."""
    i32 = np.int32
    starts = np.cumsum([0] + [len(ids) for _, _, ids in work]).astype(i32)
    rows = np.arange(starts[-1], dtype=i32) if rows is None else np.asarray(rows, i32)
    sampling = np.zeros(len(rows), SAMPLING_DTYPE)
    sampling["top_p"], sampling["num_logprobs"] = 1.0, -1
    return Batch(
        np.concatenate([np.asarray(ids, i32) for _, _, ids in work]),
        np.concatenate([np.arange(at, at + len(ids), dtype=i32) for _, at, ids in work]),
        np.array([slot for slot, _, _ in work], i32),
        starts,
        np.array([at + len(ids) for _, at, ids in work], i32),
        rows,
        sampling,
        [np.array(updates, i32).reshape(-1, 3)],
    )


def single_request(rows: int, sample_rows: Any = None) -> Batch:
    """Tokens 0 .. rows - 1 of one request in slot 0."""
    updates = [(0, i, i) for i in range(-(-rows // 16))]
    return batch_of([(0, 0, range(rows))], updates, sample_rows)


def with_sampling(batch: Batch, sampling: np.ndarray) -> Batch:
    """The batch with other sampling parameters."""
    return replace(batch, sampling=sampling)
