"""How a weight's numbers are stored: the one description that packing, cost and dequantization read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class WeightFormat:
    """Storage of a weight matrix, rows contiguous, groups running along K.

    A quantized weight is ``scale * (code - zero) + minimum`` with ``code`` unsigned in the native
    kernels; ``zero`` is a constant of the format, ``minimum`` is stored per group when present.

    Attributes:
        name: the field's name for the format, lower case (``"q4_1"``).
        kind: ``"float"`` or ``"int"``.
        bits: bits of one code (or of one float).
        group: weights along K that share a scale (1 for floats).
        group_bytes: bytes of one group in the file, scales included.
        zero: integer zero point of the unsigned code.
        has_minimum: whether each group stores a minimum beside its scale.
    """

    name: str
    kind: Literal["float", "int"]
    bits: int
    group: int
    group_bytes: int
    zero: int = 0
    has_minimum: bool = False

    def row_bytes(self, k: int) -> int:
        """Bytes of one row of ``k`` weights; raises ValueError when groups do not divide it."""
        if k % self.group:
            raise ValueError(f"{self.name} stores groups of {self.group}: a row of {k} does not divide")
        return k // self.group * self.group_bytes

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of an ``[n, k]`` matrix."""
        return n * self.row_bytes(k)


F32 = WeightFormat("f32", "float", 32, 1, 4)
F16 = WeightFormat("f16", "float", 16, 1, 2)
BF16 = WeightFormat("bf16", "float", 16, 1, 2)
Q8_0 = WeightFormat("q8_0", "int", 8, 32, 34, zero=128)
Q4_0 = WeightFormat("q4_0", "int", 4, 32, 18, zero=8)
Q4_1 = WeightFormat("q4_1", "int", 4, 32, 20, has_minimum=True)

FORMATS: dict[str, WeightFormat] = {f.name: f for f in (F32, F16, BF16, Q8_0, Q4_0, Q4_1)}
