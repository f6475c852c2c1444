"""Weights as GPU kernels read them: matrices of floats or of codes, and vectors of floats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.backends.cuda.codes import BITS, GROUPS, Offset, pack, pack_scales, packed_shapes
from ridgeline.backends.cuda.gemm import Epilogue, Scratch
from ridgeline.backends.cuda.kernels import linear as floats
from ridgeline.backends.cuda.kernels import linear_quantized as quantized
from ridgeline.backends.cuda.kernels.gather import gather, gather_quantized
from ridgeline.backends.cuda.launch import TORCH, Launch
from ridgeline.core.errors import ModelFileError, UnsupportedError
from ridgeline.core.formats import WeightFormat
from ridgeline.graph.ir import Value, bound
from ridgeline.graph.plan import Plan
from ridgeline.weights.codecs import codes_of
from ridgeline.weights.tensor import WeightTensor


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

    def values(self) -> npt.NDArray[np.float32]:
        """Dequantized, in the plan's order."""
        ...


@dataclass(frozen=True)
class Vector:
    """A norm's weight: fp32 [N]."""

    values: torch.Tensor

    def nbytes(self) -> int:
        """Of device memory."""
        return self.values.nbytes


class Matrix(ABC):
    """A matrix [N, K] in some storage, and the kernels that read it."""

    @abstractmethod
    def linear(
        self, x: torch.Tensor, out: torch.Tensor, arch: str, after: Epilogue, scratch: dict[str, Any], invariant: bool
    ) -> list[Launch]:
        """out = after(x @ w.T): x [M, K], out [M, N or N / 2]."""

    @abstractmethod
    def gather(self, ids: torch.Tensor, out: torch.Tensor, arch: str) -> list[Launch]:
        """out[t] = w[ids[t]]: ids int32 [T], out [T, K]."""

    @abstractmethod
    def scratch(self, m: int) -> Scratch:
        """What ``linear`` of ``m`` rows needs beside its operands."""

    @abstractmethod
    def nbytes(self) -> int:
        """Of device memory."""


@dataclass(frozen=True)
class FloatMatrix(Matrix):
    """Rows in the activations' own dtype."""

    w: torch.Tensor

    def linear(
        self, x: torch.Tensor, out: torch.Tensor, arch: str, after: Epilogue, scratch: dict[str, Any], invariant: bool
    ) -> list[Launch]:
        """See ``kernels/linear.py``."""
        return floats.linear(x, self.w, out, arch, after=after, batch_invariant=invariant, **scratch)

    def gather(self, ids: torch.Tensor, out: torch.Tensor, arch: str) -> list[Launch]:
        """See ``kernels/gather.py``."""
        return gather(self.w, ids, out, arch=arch)

    def scratch(self, m: int) -> Scratch:
        """See ``kernels/linear.py``."""
        return floats.linear_scratch(m, *self.w.shape)

    def nbytes(self) -> int:
        """Of device memory."""
        return self.w.numel() * self.w.element_size()


@dataclass(frozen=True)
class QuantizedMatrix(Matrix):
    """Codes and their scales, in the layout of ``codes.py``.

    Attributes:
        k: columns, padding left out.
        group, bits, offset: as there.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    k: int
    group: int
    bits: int
    offset: Offset

    def linear(
        self, x: torch.Tensor, out: torch.Tensor, arch: str, after: Epilogue, scratch: dict[str, Any], invariant: bool
    ) -> list[Launch]:
        """See ``kernels/linear_quantized.py``."""
        return quantized.linear_quantized(
            x,
            self.codes,
            self.scales,
            out,
            arch,
            group=self.group,
            bits=self.bits,
            offset=self.offset,
            after=after,
            batch_invariant=invariant,
            **scratch,
        )

    def gather(self, ids: torch.Tensor, out: torch.Tensor, arch: str) -> list[Launch]:
        """See ``kernels/gather.py``."""
        how: dict[str, Any] = {"group": self.group, "bits": self.bits, "offset": self.offset}
        return gather_quantized(self.codes, self.scales, ids, out, arch=arch, **how)

    def scratch(self, m: int) -> Scratch:
        """See ``kernels/linear_quantized.py``."""
        return quantized.linear_quantized_scratch(m, self.codes.shape[0], self.k, self.group, self.bits)

    def nbytes(self) -> int:
        """Of device memory."""
        return self.codes.nbytes + self.scales.nbytes


Place = Callable[[torch.Tensor], torch.Tensor]
"""Takes a tensor of the host to the device."""


def load(plan: Plan, weights: Mapping[str, StoredWeight], place: Place) -> dict[str, Matrix | Vector]:
    """Every weight of a plan, packed and on the device, in the order the plan reads them.

    Raises ModelFileError for a weight that holds NaN or infinity, UnsupportedError for a format without a kernel.
    """
    hidden = TORCH[plan.target.hidden]
    found: dict[str, Matrix | Vector] = {}
    for value in plan.weights.values():
        parts = [weights[name] for name in value.info.parts]
        if len(value.shape) == 1:
            found[value.name] = Vector(place(_finite(parts)))
        elif value.info.format.kind == "float":
            found[value.name] = FloatMatrix(place(_finite(parts, value.info.interleave).to(hidden)))
        else:
            found[value.name] = _codes(value, parts, place)
    return found


def _offset(form: WeightFormat, name: str) -> Offset:
    """How a format's codes become numbers; raises UnsupportedError where no kernel does it."""
    if form.bits in BITS and form.group in GROUPS:
        if form.has_minimum:
            return "minimum"
        if form.zero == 1 << (form.bits - 1):
            return "middle"
    raise UnsupportedError(f"weight {name}: no GPU kernel for {form.name}")


def _codes(value: Value, parts: Sequence[StoredWeight], place: Place) -> QuantizedMatrix:
    form, k = value.info.format, bound(value.shape[1])
    offset = _offset(form, value.name)
    taken = []
    for part in parts:
        rows, columns = part.tensor.shape
        found = codes_of(part.tensor.format, part.tensor.data, (rows, columns))
        order = slice(None) if part.row_order is None else part.row_order
        arrays: list[npt.NDArray[Any]] = [found.codes[order], found.scales[order]]
        arrays += [] if found.minimums is None else [found.minimums[order]]
        if not all(np.isfinite(a).all() for a in arrays[1:]):
            raise ModelFileError(f"{part.tensor.name}: the weights hold NaN or infinity; the file is damaged")
        taken.append(arrays)
    whole = [torch.from_numpy(merged(list(column), value.info.interleave)) for column in zip(*taken, strict=True)]
    codes = pack(whole[0], form.group, form.bits)
    scales = pack_scales(whole[1], whole[2] if form.has_minimum else None, k, form.group, form.bits, offset)
    return QuantizedMatrix(place(codes), place(scales), k, form.group, form.bits, offset)


def _finite(parts: Sequence[StoredWeight], interleave: int = 0) -> torch.Tensor:
    """Floats of several parts, merged."""
    arrays = [part.values() for part in parts]
    for part, array in zip(parts, arrays, strict=True):
        if not np.isfinite(array).all():
            raise ModelFileError(f"{part.tensor.name}: the weights hold NaN or infinity; the file is damaged")
    return torch.from_numpy(merged(arrays, interleave))


def merged(parts: Sequence[npt.NDArray[Any]], interleave: int) -> npt.NDArray[Any]:
    """Rows of several parts one part after another, or taking turns every ``interleave`` rows."""
    if interleave:
        blocks = [p.reshape(-1, 1, interleave, p.shape[-1]) for p in parts]
        return np.concatenate(blocks, axis=1).reshape(-1, parts[0].shape[-1])
    return np.concatenate(parts)


def shapes(plan: Plan) -> dict[str, Matrix | Vector]:
    """Every weight of a plan as tensors on the meta device: nothing is read or allocated."""
    hidden = TORCH[plan.target.hidden]
    found: dict[str, Matrix | Vector] = {}
    for value in plan.weights.values():
        size = [bound(d) for d in value.shape]
        if len(size) == 1:
            found[value.name] = Vector(torch.empty(size, dtype=torch.float32, device="meta"))
        elif value.info.format.kind == "float":
            found[value.name] = FloatMatrix(torch.empty(size, dtype=hidden, device="meta"))
        else:
            form = value.info.format
            offset = _offset(form, value.name)
            packed = packed_shapes(size[0], size[1], form.group, form.bits, offset)
            codes = torch.empty(packed[0], dtype=torch.uint8, device="meta")
            scales = torch.empty(packed[1], dtype=torch.int32, device="meta")
            found[value.name] = QuantizedMatrix(codes, scales, size[1], form.group, form.bits, offset)
    return found
