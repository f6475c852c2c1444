"""Runs a plan on the CPU: lowers it once to the native interpreter, then hands it flat batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ridgeline.backends.cpu import _native
from ridgeline.backends.cpu.lowering import Lowering, damaged, file_matrix, packed_weight_bytes, packings
from ridgeline.core.errors import ConfigError, RidgelineError, UnsupportedError
from ridgeline.core.types import Batch, Float32, StepOutput, Ticket, TokenMasks
from ridgeline.graph.ir import Value, bound
from ridgeline.graph.plan import Plan
from ridgeline.weights.tensor import WeightTensor

NO_UPDATES = np.zeros((0, 3), np.int32)
NO_COPIES = np.zeros((0, 2), np.int32)


class StoredWeight(Protocol):
    """A weight as it lies in its file; ``models.load.Weight`` is one."""

    @property
    def tensor(self) -> WeightTensor:
        """Its bytes, shape and format."""
        ...

    @property
    def row_order(self) -> Any:
        """Row i of the plan's weight is row ``row_order[i]`` of the tensor; None: the same."""
        ...

    def values(self) -> Float32:
        """Dequantized, in the plan's order."""
        ...


class CpuExecutor:
    """The executor contract of ``core.types.Executor`` on native kernels; one step at a time.

    A step runs inside ``launch``; ``finish`` samples the rows flagged as masked and hands the results over.
    The bits of a row depend on neither the rows beside it, nor the chunks its prompt came in, nor the threads.

    Attributes:
        native: the extension's executor.
        isa: instruction set in use; threads: size of the team.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, StoredWeight],
        *,
        num_slots: int,
        num_blocks: list[int],
        max_blocks_per_slot: int,
        threads: int | None = None,
        isa: str | None = None,
        mapped: npt.NDArray[np.uint8] | None = None,
    ) -> None:
        """Allocates the cache and packs the weights.

        Args:
            plan: compiled for ``plan_target`` of the instruction set.
            weights: by the names the plan uses.
            num_slots: requests that may run at once.
            num_blocks: blocks of 16 tokens in each cache group (one group).
            max_blocks_per_slot: most blocks of one request.
            threads: size of the team; None takes what affinity and cgroup allow.
            isa: "amx", "avx512", "avx2" or "generic"; None takes the best this processor has.
            mapped: the mapped file that the weights view: its pages are given back as they are packed.

        Raises:
            ConfigError: an instruction set this machine lacks, or a block size the kernels do not have.
            UnsupportedError: an operator, format, head size or layout of weights without a native kernel.
            ModelFileError: a weight that holds NaN or infinity, by name.
        """
        if len(plan.caches) != 1 or plan.caches[0].kind != "full":
            raise UnsupportedError("the CPU executor runs models with one group of full-attention layers")
        if plan.caches[0].block_size != 16:
            raise ConfigError(f"the CPU kernels keep 16 tokens in a KV block, not {plan.caches[0].block_size}")
        isas = _native.available_isas()
        if isa is not None and isa not in isas:
            raise ConfigError(f"isa {isa!r} cannot run on this machine: use {' or '.join(isas)}")
        config = _geometry(plan) | {
            "isa": isa or "",
            "threads": threads or 0,
            "num_slots": num_slots,
            "max_blocks_per_slot": max_blocks_per_slot,
            "num_blocks": num_blocks[0],
        }
        try:
            self.native = _native.Executor(config)
        except ValueError as error:
            raise UnsupportedError(str(error)) from None
        except RuntimeError as error:
            raise ConfigError(f"cannot start {threads or 'the'} threads ({error}): lower threads") from None
        self.isa, self.threads = self.native.isa, self.native.threads
        lowering = Lowering(plan, self.native, self._pack(plan, weights, mapped), weights)
        lowering.run()
        self._open: Ticket | None = None
        self._count = 0

    def _pack(
        self, plan: Plan, weights: Mapping[str, StoredWeight], mapped: npt.NDArray[np.uint8] | None
    ) -> dict[tuple[str, bool], _native.PackedMatrix]:
        """Packs every matrix of the plan, in the order the plan reads them."""
        wanted = packings(plan)
        packed, first_damaged, refusal = self.native.pack(
            [file_matrix(w.value, w.tiles, weights) for w in wanted], mapped
        )
        if first_damaged >= 0:
            raise damaged(_tensors(wanted[first_damaged].value, weights))
        if refusal is not None:
            raise UnsupportedError(f"{', '.join(_tensors(wanted[len(packed)].value, weights))}: {refusal}")
        return {(w.value.name, role): matrix for w, matrix in zip(wanted, packed, strict=True) for role in w.roles}

    @property
    def last_logits(self) -> Float32:
        """[S, vocab] of the last step; NaN where it only pooled."""
        return self.native.logits()

    def launch(self, batch: Batch) -> Ticket:
        """Runs a step. Raises RidgelineError when the last one is not finished or the batch is malformed."""
        if self._open is not None:
            raise RidgelineError("the CPU executor runs one step at a time: finish the open ticket first")
        if max(len(batch.block_updates), len(batch.block_copies)) > 1:
            raise RidgelineError("malformed batch: block updates and copies of more groups than the model has")
        updates = batch.block_updates[0] if batch.block_updates else NO_UPDATES
        copies = batch.block_copies[0] if batch.block_copies else NO_COPIES
        try:
            self.native.launch(
                batch.token_ids,
                batch.positions,
                batch.slots,
                batch.query_starts,
                batch.context_lens,
                batch.sample_rows,
                batch.sampling,
                updates,
                copies,
                batch.slot_starts,
            )
        except (ValueError, TypeError, RuntimeError) as error:  # pybind11's own for a value of another type
            raise RidgelineError(f"malformed batch: {error}") from None
        self._count += 1
        self._open = Ticket(self._count)
        return self._open

    def finish(self, ticket: Ticket, masks: TokenMasks | None = None) -> StepOutput:
        """Samples flagged rows under ``masks`` and returns the step's results."""
        if ticket != self._open:
            raise RidgelineError(f"ticket {ticket.number} is not open: finish each ticket exactly once")
        self._open = None
        try:
            return StepOutput(*self.native.finish(None if masks is None else masks.bits))
        except ValueError as error:
            raise RidgelineError(str(error)) from None


def _tensors(value: Value, weights: Mapping[str, StoredWeight]) -> list[str]:
    """The names in the file of what a matrix is made of."""
    return [weights[name].tensor.name for name in value.info.parts]


def _geometry(plan: Plan) -> dict[str, Any]:
    """What the native executor must know of the model and the largest step."""
    spec, ops = plan.caches[0], [op for segment in plan.segments for op in segment.ops]
    attention = next(op for op in ops if op.op == "attention")
    rope = next(op for op in ops if op.op == "rope_kv_write")
    logits = plan.outputs["logits"]
    return {
        "max_tokens": bound(plan.inputs["token_ids"].shape[0]),
        "max_sampled": bound(logits.shape[0]),
        "layers": len(spec.layers),
        "heads": attention.attrs["num_heads"],
        "kv_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "vocab": bound(logits.shape[1]),
        "kv_dtype": spec.dtype,
        "arena_bytes": plan.arena_bytes,
        "weight_bytes": packed_weight_bytes(plan),
        "rope_frequency": _rope_frequencies(rope.attrs),
    }


def _rope_frequencies(attrs: Mapping[str, Any]) -> list[float]:
    dim = attrs["head_dim"]
    exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
    frequencies = attrs["theta"] ** -exponents
    if attrs["freq_factors"] is not None:
        frequencies = frequencies / np.asarray(attrs["freq_factors"], np.float64)
    return [float(f) for f in frequencies]
