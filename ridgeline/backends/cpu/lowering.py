"""From a plan's operators to the native interpreter's: buffers become places, weights packed matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ridgeline.backends.cpu import _native
from ridgeline.core.errors import ModelFileError, UnsupportedError
from ridgeline.core.types import Float32
from ridgeline.graph.ir import Sym, Value, bound
from ridgeline.graph.plan import Plan, PlanOp, final_norm
from ridgeline.graph.target import Target, cpu_target

Place = tuple[int, int]


def damaged(names: Sequence[str]) -> ModelFileError:
    """What to raise for tensors with a NaN or an infinity among their weights."""
    return ModelFileError(f"{', '.join(names)}: the weights hold NaN or infinity; the file is damaged: get it again")


def best_isa() -> str:
    """The instruction set that is used where none is asked for."""
    return _native.available_isas()[0]


def best_activation_dtype(isa: str | None) -> str:
    """What multiplies quantized weights fastest on ``isa`` (None: the best here) from a few rows on: bf16 on tiles."""
    return "bf16" if (isa or best_isa()) == "amx" else "int8"


def plan_target(kv_dtype: str, isa: str | None = None, activation_dtype: str = "auto") -> Target:
    """What plans for ``isa`` (None: the best here) are compiled for."""
    return cpu_target(kv_dtype, best_activation_dtype(isa) if activation_dtype == "auto" else activation_dtype)


class Packing(NamedTuple):
    """A matrix in one layout: as tiles, which quantized weights that multiply bf16 activations take, or not; and whom
    it serves, embeddings that look its rows up (True), linears (False) or both."""

    value: Value
    tiles: bool
    roles: tuple[bool, ...]


def packings(plan: Plan) -> list[Packing]:
    """The matrices of a plan as they are packed: one that is looked up and multiplied twice where no layout serves
    both, since the tiles of four-bit weights hold their minima rounded."""
    ops = [op for segment in plan.segments for op in segment.ops]
    gathered = {op.inputs[1] for op in ops if op.op == "embed"}
    by_bf16 = {op.inputs[1] for op in ops if op.op == "linear" and op.inputs[0].dtype == "bf16"}
    result = []
    for value in plan.weights.values():
        if len(value.shape) != 2:
            continue
        tiles = value in by_bf16 and value.info.format.kind == "int"
        if tiles and value in gathered and value.info.format.name != "q8_0":
            result += [Packing(value, False, (True,)), Packing(value, True, (False,))]
        else:
            result.append(Packing(value, tiles, (True, False)))
    return result


def file_matrix(value: Value, tiles: bool, weights: Mapping[str, Any]) -> _native.FileMatrix:
    """A matrix of a plan as its file has it, to be packed; UnsupportedError when its parts do not fit together."""
    parts = [weights[name] for name in value.info.parts]
    sources = [(part.tensor.data, part.row_order) for part in parts]
    try:
        return _native.FileMatrix(sources, value.info.format.name, bound(value.shape[1]), value.info.interleave, tiles)
    except ValueError as error:
        raise UnsupportedError(f"{', '.join(part.tensor.name for part in parts)}: {error}") from None


def packed_weight_bytes(plan: Plan) -> int:
    """Bytes of all matrices of a plan once packed. Raises UnsupportedError for a shape without a layout."""
    total = 0
    for value, tiles, _ in packings(plan):
        n, k = bound(value.shape[0]), bound(value.shape[1])
        try:
            total += _native.packed_bytes(value.info.format.name, n, k, tiles)
        except ValueError as error:
            raise UnsupportedError(f"weight {value.name}: {error}") from None
    return total


class Lowering:
    """Adds every operator of ``plan`` to ``native``, in order. One method per operator, by its name.

    ``matrices`` are by name and by whether they are looked up in (True) or multiplied (False).
    """

    def __init__(
        self,
        plan: Plan,
        native: _native.Executor,
        matrices: Mapping[tuple[str, bool], _native.PackedMatrix],
        weights: Mapping[str, Any],
    ) -> None:
        self._plan, self._native, self._matrices, self._weights = plan, native, matrices, weights
        self._ops = [op for segment in plan.segments for op in segment.ops]
        final = final_norm(plan.graph)
        self._final_norm = final if final and _rows(final.outputs[-1]) == "S" else None
        self._own = self._own_rows()

    def run(self) -> None:
        """Raises UnsupportedError for an operator without a native kernel, ModelFileError for a damaged norm."""
        for op in self._ops:
            method: Callable[[PlanOp, str], None] | None = getattr(self, f"_lower_{op.op}", None)
            if method is None:
                raise UnsupportedError(f"the CPU executor has no kernel for operator {op.op!r}")
            try:
                method(op, op.outputs[0].name or op.op)
            except ValueError as error:
                raise UnsupportedError(f"operator {op.op!r}: {error}") from None
        logits = self._plan.outputs["logits"]
        self._native.set_logits(self._place(logits))
        if self._final_norm and self._ops[-1].op == "linear" and logits in self._ops[-1].outputs:
            self._native.set_head(len(self._ops) - 1)

    def _place(self, value: Value) -> Place:
        buffer = self._plan.buffers[value.id]
        return buffer.offset, buffer.row_bytes

    def _vector(self, value: Value) -> Float32:
        parts = [self._weights[name] for name in value.info.parts]
        vector = np.ascontiguousarray(np.concatenate([part.values() for part in parts]), np.float32)
        if not np.isfinite(vector).all():
            raise damaged([part.tensor.name for part in parts])
        return vector

    def _lower_embed(self, op: PlanOp, name: str) -> None:
        self._native.add_embed(f"embed {name}", self._place(op.outputs[0]), self._matrices[op.inputs[1].name, True])

    def _lower_rms_norm(self, op: PlanOp, name: str) -> None:
        x, weight = op.inputs
        self._norm(op, name, x, None, None, weight, op.outputs[0])

    def _lower_add_rms_norm(self, op: PlanOp, name: str) -> None:
        x, delta, weight = op.inputs
        total, out = op.outputs
        self._norm(op, name, x, delta, total, weight, out)

    def _norm(
        self, op: PlanOp, name: str, x: Value, delta: Value | None, total: Value | None, weight: Value, out: Value
    ) -> None:
        self._native.add_norm(
            f"norm {name}",
            self._place(x),
            self._place(delta) if delta else None,
            self._place(total) if total else None,
            self._place(out),
            self._vector(weight),
            op.attrs["eps"],
            out.dtype,
            _rows(out),
            out in self._own,
            x in self._own,
            self._final_norm is not None and out in self._final_norm.outputs,
        )

    def _own_rows(self) -> set[Value]:
        """What norms make of which a lone row is computed by every thread for itself, in a row of the buffer for each,
        which saves a barrier: their result is read by the linear that follows and by nothing else. Not where a sum
        would replace a row that other threads read."""
        own: set[Value] = set()
        for op, following in pairwise(self._ops):
            out = op.outputs[-1]
            if op.op not in ("rms_norm", "add_rms_norm") or following.op != "linear" or out not in following.inputs:
                continue
            alone = sum(out in reader.inputs for reader in self._ops) == 1
            over = self._place(op.outputs[0]) == self._place(op.inputs[0]) and op.inputs[0] not in own
            if alone and not over and bound(out.shape[0]) >= self._native.threads:
                own.update(op.outputs)
        return own

    def _lower_quantize(self, op: PlanOp, name: str) -> None:
        (x,), (out,) = op.inputs, op.outputs
        self._native.add_quantize(
            f"quantize {name}", self._place(x), self._place(out), bound(x.shape[1]), out.dtype, _rows(out)
        )

    def _lower_linear(self, op: PlanOp, name: str) -> None:
        x, weight = op.inputs
        out = op.outputs[0]
        gated = op.attrs["epilogue"] == "silu_mul"
        self._native.add_linear(
            f"linear {weight.name}",
            self._place(x),
            self._place(out),
            self._matrices[weight.name, False],
            gated,
            out.dtype,
            _rows(out),
            x in self._own,
        )

    def _lower_rope_kv_write(self, op: PlanOp, name: str) -> None:
        qkv, _, cache = op.inputs
        self._native.add_rope_kv(f"rope_kv {name}", self._place(qkv), self._place(op.outputs[0]), _layer(cache))

    def _lower_attention(self, op: PlanOp, name: str) -> None:
        q, cache = op.inputs
        out = op.outputs[0]
        if op.attrs["window"] is not None:
            raise UnsupportedError("the CPU executor has no sliding-window attention")
        at = self._ops.index(op)
        rope = self._ops[at - 1]
        if rope.op != "rope_kv_write" or rope.outputs != (q, cache):  # they share their work when decoding
            raise UnsupportedError("the CPU executor has no attention but directly after its rope_kv_write")
        self._native.add_attention(
            f"attention {name}",
            self._place(rope.inputs[0]),
            self._place(q),
            self._place(out),
            _layer(cache),
            op.attrs["scale"],
            out.dtype,
        )

    def _lower_select_rows(self, op: PlanOp, name: str) -> None:
        self._native.add_select(f"select {name}", self._place(op.inputs[0]), self._place(op.outputs[0]))

    def _lower_concat(self, op: PlanOp, name: str) -> None:
        out = op.outputs[0]
        parts = [(self._place(v), bound(v.shape[1])) for v in op.inputs]
        self._native.add_concat(f"concat {name}", parts, self._place(out), _rows(out))

    def _elementwise(self, op: PlanOp, name: str) -> None:
        out = op.outputs[0]
        x, y = op.inputs[0], op.inputs[-1]
        self._native.add_elementwise(
            f"{op.op} {name}",
            op.op,
            self._place(x),
            self._place(y),
            self._place(out),
            bound(out.shape[1]),
            out.dtype,
            _rows(out),
        )

    _lower_add = _lower_mul = _lower_silu = _lower_silu_mul = _elementwise


def _layer(cache: Value) -> int:
    assert cache.cache is not None, f"{cache.name} is not a cache"
    return cache.cache.layer


def _rows(value: Value) -> str:
    rows = value.shape[0]
    if not isinstance(rows, Sym):
        raise UnsupportedError(f"{value.name} has {rows} rows: the CPU executor runs values with T or S rows")
    return rows.name
