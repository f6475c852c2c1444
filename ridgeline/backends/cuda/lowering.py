"""From a plan to launches: every operator's kernels over one arena, for a step of given size.

``Lowering`` is a pure function of tensors: over the meta device it says which kernel variants a plan can ever ask for
(``variants.py``), over a GPU's memory or the emulated one it is what runs, once for each bucket of sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ridgeline.backends.cuda import gemm
from ridgeline.backends.cuda.gemm import Epilogue
from ridgeline.backends.cuda.kernels import attention_decode as decode
from ridgeline.backends.cuda.kernels.attention_prefill import attention_prefill
from ridgeline.backends.cuda.kernels.gated import gated
from ridgeline.backends.cuda.kernels.gather import gather
from ridgeline.backends.cuda.kernels.norm import norm
from ridgeline.backends.cuda.kernels.rope_kv import rope_kv
from ridgeline.backends.cuda.launch import TORCH, Launch
from ridgeline.backends.cuda.weights import Matrix, Vector
from ridgeline.core.errors import UnsupportedError
from ridgeline.graph.ir import CacheInfo, Sym, Value, bound
from ridgeline.graph.plan import Plan, PlanOp

FEW_TOKENS = 8
"""A request with at most so many tokens in a step (a decode, or a guess of up to 7) is the decode kernel's."""


@dataclass(frozen=True)
class Sizes:
    """How large a step is: what a bucket fixes.

    Attributes:
        tokens, requests, rows: T, B and S, padding included.
        prefills: whether a request may have more than FEW_TOKENS tokens.
    """

    tokens: int
    requests: int
    rows: int
    prefills: bool


@dataclass(frozen=True)
class StepTensors:
    """What a step's operators read beside the arena, int32, each as long as the largest step needs.

    Attributes:
        token_ids, positions, token_slots: [T]; a padding token has slot -1.
        slots, context_lens: [B]; query_starts: [B + 1]; a padding request has no tokens and no context.
        sample_rows: [S].
        identity: 0, 1, 2, ...: [T].
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    token_slots: torch.Tensor
    slots: torch.Tensor
    query_starts: torch.Tensor
    context_lens: torch.Tensor
    sample_rows: torch.Tensor
    identity: torch.Tensor


@dataclass(frozen=True)
class Cache:
    """The paged cache of one group.

    Attributes:
        k, v: [layers, blocks, kv_heads, page, head_dim]; equal strides.
        k_scales, v_scales: fp32 [layers, blocks, kv_heads, page] of an int8 cache.
        tables: int32 [slots, blocks of a request].
    """

    k: torch.Tensor
    v: torch.Tensor
    tables: torch.Tensor
    k_scales: torch.Tensor | None = None
    v_scales: torch.Tensor | None = None


@dataclass(frozen=True)
class Workspace:
    """Memory that operators use one after another.

    Attributes:
        partials: fp32; counters: int32, zero between launches.
    """

    partials: torch.Tensor
    counters: torch.Tensor


@dataclass
class Lowering:
    """Launches of a plan.

    Attributes:
        arena: uint8 [plan.arena_bytes].
        weights: matrices and vectors by name.
        angles: cos and sin, fp32 [positions, head_dim / 2].
        max_context: the longest context of a request.
    """

    plan: Plan
    arch: str
    arena: torch.Tensor
    weights: Mapping[str, Matrix | Vector]
    caches: list[Cache]
    step: StepTensors
    angles: tuple[torch.Tensor, torch.Tensor]
    workspace: Workspace
    max_context: int
    batch_invariant: bool = True
    sizes: Sizes = field(default_factory=lambda: Sizes(1, 1, 1, False))

    def launches(self, sizes: Sizes) -> list[Launch]:
        """Every operator's launches for a step of these sizes, in order.

        Raises UnsupportedError for an operator, a format or a shape without a kernel.
        """
        self.sizes = sizes
        found: list[Launch] = []
        layer: int | None = None
        for op in (op for segment in self.plan.segments for op in segment.ops):
            if any(v.cache is not None or v.dtype == "weight" for v in op.inputs):
                layer = op.layer  # others belong to that of the operator before them
            label = (op.label,) if layer is None else (f"layer {layer}", op.label)
            found += [replace(launch, label=label) for launch in self.lower(op)]
        return found

    def lower(self, op: PlanOp) -> list[Launch]:
        """One operator's launches."""
        method: Callable[[PlanOp], list[Launch]] | None = getattr(self, f"_lower_{op.op}", None)
        if method is None:
            raise UnsupportedError(f"the CUDA executor has no kernel for operator {op.op!r}")
        try:
            return method(op)
        except ValueError as error:
            raise UnsupportedError(f"operator {op.op!r}: {error}") from None

    def view(self, value: Value) -> torch.Tensor:
        """An activation's rows of this step: [rows, columns] in the arena."""
        buffer = self.plan.buffers[value.id]
        dtype, columns = TORCH[value.dtype], bound(value.shape[1])
        item = dtype.itemsize
        rows = self._rows(value)
        flat = self.arena[buffer.offset : buffer.offset + rows * buffer.row_bytes].view(dtype)
        return flat.as_strided((rows, columns), (buffer.row_bytes // item, 1))

    def _rows(self, value: Value) -> int:
        rows = value.shape[0]
        if not isinstance(rows, Sym):
            raise ValueError(f"{value.name} has {rows} rows, expected T or S")
        return self.sizes.tokens if rows.name == "T" else self.sizes.rows

    def _heads(self, value: Value, head_dim: int) -> torch.Tensor:
        rows = self.view(value)
        return rows.view(rows.shape[0], rows.shape[1] // head_dim, head_dim)

    def _matrix(self, value: Value) -> Matrix:
        matrix = self.weights[value.name]
        if not isinstance(matrix, Matrix):
            raise ValueError(f"{value.name} is no matrix")
        return matrix

    def _vector(self, value: Value) -> torch.Tensor:
        vector = self.weights[value.name]
        if not isinstance(vector, Vector):
            raise ValueError(f"{value.name} is no vector")
        return vector.values

    def _cache(self, value: Value) -> tuple[Cache, CacheInfo]:
        if value.cache is None:
            raise ValueError(f"{value.name} is no cache")
        return self.caches[value.cache.group], value.cache

    @staticmethod
    def _scales(cache: Cache, info: CacheInfo) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of an int8 cache's keys and values in one layer."""
        if cache.k_scales is None or cache.v_scales is None:
            return None
        return cache.k_scales[info.layer], cache.v_scales[info.layer]

    def _lower_embed(self, op: PlanOp) -> list[Launch]:
        table = self._matrix(op.inputs[1])
        ids = self.step.token_ids[: self.sizes.tokens]
        return table.gather(ids, self.view(op.outputs[0]), self.arch)

    def _lower_rms_norm(self, op: PlanOp) -> list[Launch]:
        x, weight = op.inputs
        out = self.view(op.outputs[0])
        return norm(self.view(x), self._vector(weight), out, eps=op.attrs["eps"], arch=self.arch)

    def _lower_add_rms_norm(self, op: PlanOp) -> list[Launch]:
        x, delta, weight = op.inputs
        total, out = (self.view(v) for v in op.outputs)
        eps, both = op.attrs["eps"], (self.view(x), self.view(delta))
        return norm(both[0], self._vector(weight), out, eps=eps, delta=both[1], total=total, arch=self.arch)

    def _lower_linear(self, op: PlanOp) -> list[Launch]:
        x, weight = op.inputs
        after = Epilogue(silu_mul=op.attrs["epilogue"] == "silu_mul")
        scratch = {"workspace": self.workspace.partials, "counters": self.workspace.counters}
        return self._matrix(weight).linear(
            self.view(x), self.view(op.outputs[0]), self.arch, after, scratch, self.batch_invariant
        )

    def _lower_rope_kv_write(self, op: PlanOp) -> list[Launch]:
        qkv, _, value = op.inputs
        cache, info = self._cache(value)
        tokens, step = self.sizes.tokens, self.step
        return rope_kv(
            self.view(qkv),
            *self.angles,
            step.positions[:tokens],
            step.token_slots[:tokens],
            cache.tables,
            self._heads(op.outputs[0], info.head_dim),
            cache.k[info.layer],
            cache.v[info.layer],
            scales=self._scales(cache, info),
            arch=self.arch,
        )

    def _lower_attention(self, op: PlanOp) -> list[Launch]:
        q, value = op.inputs
        cache, info = self._cache(value)
        requests, step = self.sizes.requests, self.step
        common: dict[str, Any] = {
            "q": self._heads(q, info.head_dim),
            "k_cache": cache.k[info.layer],
            "v_cache": cache.v[info.layer],
            "block_tables": cache.tables,
            "slots": step.slots[:requests],
            "query_starts": step.query_starts[: requests + 1],
            "context_lens": step.context_lens[:requests],
            "out": self._heads(op.outputs[0], info.head_dim),
            "scale": op.attrs["scale"],
            "window": op.attrs["window"],
            "scales": self._scales(cache, info),
            "arch": self.arch,
        }
        few = decode.attention_decode(
            **common,
            **self._attention_workspace(op.attrs["num_heads"], info),
            max_context=self.max_context,
            up_to=FEW_TOKENS,
            few=few_tokens(self.sizes),
        )
        return few + (attention_prefill(**common, longer_than=FEW_TOKENS) if self.sizes.prefills else [])

    def _attention_workspace(self, heads: int, info: CacheInfo) -> dict[str, Any]:
        """Pieces of the shared workspace in the shapes that the decode kernel asks for."""
        shape = (heads, info.num_kv_heads, info.head_dim, self.max_context)
        sizes = decode.workspace(few_tokens(self.sizes), self.sizes.requests, *shape, self.arch)
        partials, stats, counters = (torch.Size(size) for size in sizes)
        first, second = partials.numel(), partials.numel() + stats.numel()
        floats = self.workspace.partials
        return {
            "partials": floats[:first].view(partials),
            "stats": floats[first:second].view(stats),
            "counters": self.workspace.counters[: counters.numel()],
        }

    def _lower_select_rows(self, op: PlanOp) -> list[Launch]:
        rows = self.step.sample_rows[: self.sizes.rows]
        return gather(self.view(op.inputs[0]), rows, self.view(op.outputs[0]), arch=self.arch)

    def _lower_concat(self, op: PlanOp) -> list[Launch]:
        out, at, found = self.view(op.outputs[0]), 0, []
        for part in map(self.view, op.inputs):
            to = out[:, at : at + part.shape[1]]
            found += gather(part, self.step.identity[: len(part)], to, arch=self.arch)
            at += part.shape[1]
        return found

    def _lower_silu_mul(self, op: PlanOp) -> list[Launch]:
        gate, up = map(self.view, op.inputs)
        return gated(gate, up, self.view(op.outputs[0]), arch=self.arch)


def few_tokens(sizes: Sizes) -> int:
    """Tokens, at most, of requests with few: these come first in a step (``step.few_first``)."""
    return min(sizes.tokens, sizes.requests * FEW_TOKENS)


def workspace_sizes(plan: Plan, weights: Mapping[str, Matrix | Vector], most: Sizes, context: int, arch: str) -> Any:
    """Elements of ``Workspace.partials`` and ``counters`` that no step of up to ``most`` goes beyond."""
    partials = counters = 0
    for op in (op for segment in plan.segments for op in segment.ops):
        if op.op == "linear":
            matrix = weights[op.inputs[1].name]
            assert isinstance(matrix, Matrix)
            for rows in (gemm.MOST_SPLIT_ROWS, most.tokens, most.rows):
                needed = matrix.scratch(min(rows, max(most.tokens, most.rows)))
                partials, counters = max(partials, needed.partials), max(counters, needed.counters)
        elif op.op == "attention":
            info = op.inputs[1].cache
            assert info is not None
            heads = (op.attrs["num_heads"], info.num_kv_heads, info.head_dim)
            shapes = decode.workspace(few_tokens(most), most.requests, *heads, context, arch)
            sizes = [torch.Size(shape).numel() for shape in shapes]
            partials, counters = max(partials, sizes[0] + sizes[1]), max(counters, sizes[2])
    return partials, counters
