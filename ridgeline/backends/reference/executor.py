"""Runs naive graphs and compiled plans in numpy, over a paged cache, with sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from ridgeline.backends.reference.cache import PagedCache, StepContext, copy_blocks
from ridgeline.backends.reference.numerics import Array, rounded
from ridgeline.backends.reference.ops import run_op
from ridgeline.backends.reference.sampling import NO_TOKEN, Sampled, sample
from ridgeline.backends.reference.slots import SlotLog, adjusted
from ridgeline.core.types import POOL, Batch, Int32, StepOutput, Ticket, TokenMasks
from ridgeline.graph.ir import Graph, Value, WeightInfo
from ridgeline.graph.plan import Plan, final_norm


class HasValues(Protocol):
    """A weight that can be dequantized; ``models.load.Weight`` is one."""

    def values(self) -> Array:
        """Float32, rows in the graph's order: [N, K] or [N]."""
        ...

    def bf16_terms(self) -> Array:
        """The same of a quantized matrix, with the roundings of a bf16 product."""
        ...


def weight_array(info: WeightInfo, weights: Mapping[str, HasValues], dtype: Any, terms: bool = False) -> Array:
    """The dequantized weight of a graph: its parts concatenated along N, or interleaved; ``terms``: rounded as a bf16
    product rounds quantized weights."""
    parts = [(weights[n].bf16_terms() if terms else weights[n].values()).astype(dtype) for n in info.parts]
    if info.interleave:
        blocks = [p.reshape(-1, 1, info.interleave, p.shape[-1]) for p in parts]
        return np.concatenate(blocks, axis=1).reshape(-1, parts[0].shape[-1])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


@dataclass
class _Step:
    batch: Batch
    tokens: Int32  # [T], -1 resolved
    logits: Array
    hidden: Array  # [S, hidden size]; empty unless rows are pooled
    sampled: list[Sampled | None]
    accepted: Int32


class ReferenceExecutor:
    """The executor contract of ``core.types.Executor`` in numpy.

    Attributes:
        last_logits: [S, vocab] of the last step launched.
    """

    def __init__(
        self,
        plan: Plan | Graph,
        weights: Mapping[str, HasValues],
        *,
        num_slots: int,
        num_blocks: list[int],
        max_blocks_per_slot: int,
        threads: int | None = None,
        isa: str | None = None,
        dtype: Any = np.float32,
    ) -> None:
        """Dequantizes the weights and allocates the cache.

        Args:
            plan: a compiled plan, or a model's graph as it is.
            weights: by name.
            num_slots: requests that may run at once.
            num_blocks: blocks of each cache group.
            max_blocks_per_slot: most blocks of one request.
            threads, isa: taken for likeness with native executors; results never depend on them.
            dtype: compute type of every operator.
        """
        self.graph = plan.graph if isinstance(plan, Plan) else plan
        self._dtype = dtype
        self._weights: dict[Value, Array] = {
            v: weight_array(v.info, weights, dtype) for v in self.graph.weights.values()
        }
        self._narrow = isinstance(plan, Plan) and plan.target.hidden != "f32"
        if isinstance(plan, Plan) and self._narrow:  # a matrix multiplies as what it multiplies
            for value in (v for v in self._weights if len(v.shape) == 2):
                self._weights[value] = rounded(self._weights[value], plan.target.hidden)
        terms = {w: weight_array(w.info, weights, dtype, terms=True) for w in self._rounded_to_multiply()}
        self._multiplied = self._weights | terms  # what linears read
        self._caches = {v: self._empty_cache(v, num_blocks) for v in self.graph.inputs.values() if v.cache}
        self._tables: list[Int32] = [np.zeros((num_slots, max_blocks_per_slot), np.int32) for _ in num_blocks]
        self._last_token = np.zeros(num_slots, np.int32)
        self._logs: dict[int, SlotLog] = {}
        self._final_norm = final_norm(self.graph)
        self._steps: dict[int, _Step] = {}
        self._launched = 0
        self._dead_after = _dead_after(self.graph)
        self.last_logits: Array = np.empty((0, 0), np.float32)

    def _rounded_to_multiply(self) -> set[Value]:
        """Quantized matrices that multiply bf16 activations among float32 ones, as tiles do. Float64 rounds nothing."""
        linears = (node.inputs for node in self.graph.nodes if node.op == "linear" and self._dtype == np.float32)
        return {w for x, w in linears if x.dtype == "bf16" and w.info.format.kind == "int" and not self._narrow}

    def _empty_cache(self, value: Value, num_blocks: list[int]) -> PagedCache:
        info = value.cache
        assert info is not None
        size = self.graph.caches[info.group].block_size
        return PagedCache.empty(
            num_blocks[info.group], size, info.num_kv_heads, info.head_dim, info.dtype, info.group, self._dtype
        )

    def launch(self, batch: Batch) -> Ticket:
        """Runs a step and samples every row not flagged as masked."""
        for table, updates in zip(self._tables, batch.block_updates, strict=True):
            table[updates[:, 0], updates[:, 1]] = updates[:, 2]
        for cache in self._caches.values():
            if batch.block_copies:
                copy_blocks(cache, batch.block_copies[cache.group])
        context = StepContext.of(batch, self._tables)
        tokens = np.where(batch.token_ids < 0, self._last_token[context.token_slots()], batch.token_ids)
        self._feed_logs(batch, tokens)
        logits, hidden = self._run(batch, tokens, context)
        self.last_logits = logits
        rows = len(batch.sample_rows)
        step = _Step(batch, tokens, logits, hidden, [None] * rows, np.ones(rows, np.int32))
        for i in range(rows):
            if not batch.sampling[i]["masked"]:
                self._sample(step, i, None)
        for request in range(len(batch.slots)):
            self._settle(step, request, pending=False)
        self._launched += 1
        self._steps[self._launched] = step
        return Ticket(self._launched)

    def finish(self, ticket: Ticket, masks: TokenMasks | None = None) -> StepOutput:
        """Samples flagged rows under ``masks`` (in row order) and hands out the step's tokens.

        Raises ValueError for a ticket not open, or masks that do not match the flagged rows.
        """
        step = self._steps.pop(ticket.number, None)
        if step is None:
            raise ValueError(f"ticket {ticket.number} is not open")
        flagged = [i for i, s in enumerate(step.sampled) if s is None]
        if len(flagged) != (0 if masks is None else len(masks.bits)):
            raise ValueError(
                f"{len(flagged)} rows wait for a token mask, got {0 if masks is None else len(masks.bits)}"
            )
        for i, row in enumerate(flagged):
            assert masks is not None
            bits = np.unpackbits(masks.bits[i].astype("<u4").view(np.uint8), bitorder="little")
            self._sample(step, row, bits[: step.logits.shape[1]].astype(bool))
        for request in range(len(step.batch.slots)):
            self._settle(step, request, pending=True)
        output = _output([s for s in step.sampled if s is not None])
        pooled = step.hidden[step.batch.sampling["target"] == POOL]
        return replace(output, accepted=step.accepted, hidden=pooled.astype(np.float32))

    def _feed_logs(self, batch: Batch, tokens: Int32) -> None:
        for start in batch.slot_starts:
            self._logs.pop(start.slot, None)
            if not start.asks_nothing:
                self._logs[start.slot] = SlotLog(start)
        for b, slot in enumerate(batch.slots):
            if int(slot) in self._logs:
                first, end = batch.query_starts[b], batch.query_starts[b + 1]
                self._logs[int(slot)].feed(int(batch.positions[first]), tokens[first:end])

    def _sample(self, step: _Step, i: int, allowed: Any) -> None:
        batch = step.batch
        row, params = int(batch.sample_rows[i]), batch.sampling[i]
        if params["target"] == POOL:
            step.sampled[i] = NO_TOKEN
            return
        next_position = int(batch.positions[row]) + 1
        log = self._logs.get(int(batch.slots[self._request_of(batch, row)]))
        changed = None if log is None else adjusted(step.logits[i], log.start, log.tokens[:next_position])
        step.sampled[i] = sample(step.logits[i], params, next_position, allowed, changed)

    @staticmethod
    def _request_of(batch: Batch, row: int) -> int:
        return int(np.searchsorted(batch.query_starts, row, side="right")) - 1

    def _settle(self, step: _Step, request: int, pending: bool) -> None:
        """Decides which rows of a request stand and what its slot sampled last, once all of them are sampled;
        ``pending``: only if some had to wait for a mask."""
        batch, end = step.batch, int(step.batch.query_starts[request + 1])
        rows = [i for i, r in enumerate(batch.sample_rows) if self._request_of(batch, int(r)) == request]
        if any(batch.sampling[i]["masked"] for i in rows) != pending:
            return
        stands = True
        for i in rows:
            if batch.sampling[i]["target"] != 0:
                continue
            sampled, after = step.sampled[i], int(batch.sample_rows[i]) + 1
            assert sampled is not None
            step.accepted[i] = stands
            if stands and sampled.token >= 0:
                self._last_token[batch.slots[request]] = sampled.token
            stands = stands and (after >= end or int(step.tokens[after]) == sampled.token)

    def _run(self, batch: Batch, tokens: Int32, context: StepContext) -> tuple[Array, Array]:
        """The step's logits [S, vocab] and, if rows are pooled, final hidden states [S, hidden size]."""
        pools = bool((batch.sampling["target"] == POOL).any())
        if pools and self._final_norm is None:
            raise ValueError("this graph has no final norm whose rows could be pooled")
        hidden: Array = np.empty((len(batch.sample_rows), 0))
        arrays = {"token_ids": tokens, "positions": batch.positions, "sample_rows": batch.sample_rows, **batch.extras}
        live: dict[Value, Any] = {v: arrays[name] for name, v in self.graph.inputs.items() if not v.cache}
        live.update(self._caches)
        for step, node in enumerate(self.graph.nodes):
            matrices = self._multiplied if node.op == "linear" else self._weights
            inputs = [matrices[v] if v.dtype == "weight" else live[v] for v in node.inputs]
            outputs = run_op(node.op, inputs, node.attrs, self._dtype, context)
            if pools and node is self._final_norm:
                hidden = run_op(node.op, inputs, {**node.attrs, "quantize": None}, self._dtype, context)[-1]
                if node.outputs[-1].shape[0] != self.graph.inputs["sample_rows"].shape[0]:
                    hidden = hidden[batch.sample_rows]
                if node.attrs["quantize"] is None:
                    hidden = _as_stored(node.outputs[-1], hidden)
            live.update((v, _as_stored(v, y)) for v, y in zip(node.outputs, outputs, strict=True))
            for value in self._dead_after[step]:
                live.pop(value, None)
        logits: Array = live[self.graph.outputs["logits"]].astype(np.float32)
        return logits, hidden


def _as_stored(value: Value, y: Any) -> Any:
    """What an operator made, rounded to the dtype its output has."""
    return rounded(y, value.dtype) if value.dtype in ("bf16", "f16") else y


def _dead_after(graph: Graph) -> list[list[Value]]:
    """Per node, the values nobody reads after it."""
    last: dict[Value, int] = {}
    for step, node in enumerate(graph.nodes):
        last.update({v: step for v in (*node.inputs, *node.outputs)})
    dead: list[list[Value]] = [[] for _ in graph.nodes]
    outputs = set(graph.outputs.values())
    for value, step in last.items():
        if value not in outputs and value.dtype not in ("weight", "cache"):
            dead[step].append(value)
    return dead


def _output(sampled: list[Sampled]) -> StepOutput:
    width = max((len(s.top_ids) for s in sampled), default=0)
    top_ids = np.full((len(sampled), width), -1, np.int32)
    top_logprobs = np.full((len(sampled), width), np.nan, np.float32)
    for i, s in enumerate(sampled):
        top_ids[i, : len(s.top_ids)] = s.top_ids
        top_logprobs[i, : len(s.top_ids)] = s.top_logprobs
    return StepOutput(
        np.array([s.token for s in sampled], np.int32),
        np.ones(len(sampled), np.int32),
        np.array([s.logprob for s in sampled], np.float32),
        top_ids,
        top_logprobs,
    )
