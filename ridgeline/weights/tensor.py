"""One weight as it lies in a model file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ridgeline.core.formats import WeightFormat


@dataclass(frozen=True, eq=False)
class WeightTensor:
    """A named tensor whose bytes stay in the memory-mapped file.

    Attributes:
        name: the tensor's name in the file.
        shape: row-major (numpy) order: ``(N, K)`` for a matrix of N output rows of K inputs, ``(N,)`` for a vector.
        format: how the numbers are stored; groups run along the last dimension.
        data: flat read-only uint8 view of the file, exactly the bytes of the tensor.
    """

    name: str
    shape: tuple[int, ...]
    format: WeightFormat
    data: npt.NDArray[np.uint8]
