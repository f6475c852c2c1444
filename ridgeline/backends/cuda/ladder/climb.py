"""What climbs the ladder: launches over real tensors, with the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.backends.cuda.launch import Launch


@dataclass(frozen=True)
class Expected:
    """One output of a case.

    Attributes:
        tensor: the torch tensor that the launches write.
        truth: float64, not rounded to the tensor's dtype, of the tensor's shape.
        plain: float32 arithmetic that rounds where the operator's declaration says, not rounded to the dtype either.
            What it loses against ``truth`` is what the kernel may lose, twice over.
        exact: the tensor must equal ``truth`` bit for bit (moved data, integers).
        step: of integer codes, 1: half of it is no error, as ``truth`` lies anywhere between two codes.
    """

    tensor: Any
    truth: npt.NDArray[np.float64]
    plain: npt.NDArray[np.float32]
    exact: bool = False
    step: float = 0.0


@dataclass(frozen=True)
class Climb:
    """One case of one operator for one architecture: what to run, in order, and what must come out."""

    launches: list[Launch]
    expected: tuple[Expected, ...]
