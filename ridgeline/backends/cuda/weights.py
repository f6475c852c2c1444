"""Weights as GPU kernels read them: matrices of floats or of codes, and vectors of floats."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.backends.cuda.gemm import Epilogue, Scratch
from ridgeline.backends.cuda.kernels import linear as floats
from ridgeline.backends.cuda.kernels.gather import gather
from ridgeline.backends.cuda.launch import TORCH, Launch
from ridgeline.core.errors import ModelFileError, UnsupportedError
from ridgeline.graph.ir import Value, bound
from ridgeline.graph.plan import Plan
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
            found[value.name] = Vector(place(torch.tensor(np.concatenate([p.values() for p in parts]))))
        elif value.info.format.kind == "float":
            found[value.name] = FloatMatrix(place(_floats(value, parts).to(hidden)))
        else:
            raise UnsupportedError(f"weight {value.name}: no GPU kernel for {value.info.format.name}")
    return found


def _floats(value: Value, parts: Sequence[StoredWeight]) -> torch.Tensor:
    arrays = [part.values() for part in parts]
    for part, array in zip(parts, arrays, strict=True):
        if not np.isfinite(array).all():
            raise ModelFileError(f"{part.tensor.name}: the weights hold NaN or infinity; the file is damaged")
    return torch.from_numpy(merged(arrays, value.info.interleave))


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
            raise UnsupportedError(f"weight {value.name}: no GPU kernel for {value.info.format.name}")
    return found
