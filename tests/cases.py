"""The one list of operator cases: plain data, no backend in it. Every kernel, on every backend, climbs it.

A case names an operator, its sizes and attributes and the shape of its numbers; ``seed_of`` makes the random
numbers of a case the same everywhere. Matrices are random bytes of their format, so that every code occurs.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

FORMATS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1")
KV_DTYPES = ("bf16", "f16", "f32", "int8")
ACTIVATION = {"f32": "f32", "f16": "f32", "bf16": "bf16", "q8_0": "q8", "q4_0": "q8", "q4_1": "q8"}
"""What a linear of a weight format reads, but bf16 for all three quantized ones where tiles multiply them (AMX)."""

ROWS = (1, 2, 3, 5, 6, 7, 8, 9, 16, 17, 31, 32, 33, 65, 130)
"""Rows around every register block, and around where kernels change the way they share work."""


@dataclass(frozen=True)
class RowCase:
    """An operator that works on rows: ``widths`` are the columns of its activations, all fp32 at first.

    Attributes:
        rows: T.
        weight: format and N of the matrix it multiplies, or "vector" for a norm's.
        attrs: as in ``graph/ops.py``.
        numbers: "normal"; "outlier" (one value in a row 1000 times the others); "zero" (whole groups of
            zeros); "tiny" (scaled by 1e-30); "large" (scaled by 1e6).
    """

    op: str
    rows: int
    widths: tuple[int, ...]
    weight: tuple[str, int] | None = None
    attrs: tuple[tuple[str, Any], ...] = ()
    numbers: str = "normal"

    @property
    def name(self) -> str:
        """For test ids."""
        weight = f"-{self.weight[0]}x{self.weight[1]}" if self.weight else ""
        attrs = "".join(f"-{v}" for k, v in self.attrs if k != "eps" and v is not None)
        numbers = "" if self.numbers == "normal" else f"-{self.numbers}"
        return f"{self.op}-{self.rows}x{'+'.join(map(str, self.widths))}{weight}{attrs}{numbers}"


@dataclass(frozen=True)
class AttentionCase:
    """Rotary embedding, cache write and attention together, over blocks scattered on purpose.

    Attributes:
        requests: (tokens in the cache before the step, tokens of the step) of each; all in one step.
        scale_up: factor on queries: large ones make the softmax sharp.
    """

    heads: int
    kv_heads: int
    head_dim: int
    kv_dtype: str
    requests: tuple[tuple[int, int], ...]
    quantize: str | None = None
    theta: float = 10000.0
    freq_factors: tuple[float, ...] | None = None
    scale_up: float = 1.0
    op: str = field(default="attention", init=False)

    @property
    def name(self) -> str:
        """For test ids."""
        work = "_".join(f"{cached}+{new}" for cached, new in self.requests[:3])
        more = f"_and{len(self.requests) - 3}" if len(self.requests) > 3 else ""
        extra = f"-{self.quantize}" if self.quantize else ""
        extra += f"-up{self.scale_up:g}" if self.scale_up != 1 else ""
        extra += "-factors" if self.freq_factors else ""
        return f"{self.heads}x{self.kv_heads}x{self.head_dim}-{self.kv_dtype}-{work}{more}{extra}"


def seed_of(case: RowCase | AttentionCase) -> int:
    """A seed for the random numbers of a case, the same in every process."""
    return zlib.crc32(repr(case).encode())


def _linears() -> list[RowCase]:
    cases = []
    for fmt in FORMATS:
        cases += [RowCase("linear", rows, (96,), (fmt, 50)) for rows in ROWS]
        cases += [RowCase("linear", 3, (64,), (fmt, n)) for n in (1, 15, 16, 17, 31, 32, 33, 64, 97, 200)]
        cases += [RowCase("linear", 2, (k,), (fmt, 40)) for k in (32, 576, 1024)]
        cases += [RowCase("linear", 9, (64,), (fmt, 40), numbers=n) for n in ("outlier", "zero", "large")]
        gated: tuple[tuple[str, Any], ...] = (("epilogue", "silu_mul"),)
        cases += [RowCase("linear", rows, (96,), (fmt, 96), gated) for rows in (1, 2, 8, 9, 33)]
        cases += [RowCase("linear", 3, (64,), (fmt, n), gated) for n in (32, 64, 160)]
        for quantize in ("q8", "bf16"):
            attrs = (*gated, ("quantize", quantize))
            cases += [RowCase("linear", rows, (64,), (fmt, 192), attrs) for rows in (1, 5, 17, 33)]
    cases += [RowCase("linear", 3, (k,), (fmt, 33)) for fmt in ("f32", "f16") for k in (1, 7, 33, 100)]
    cases += [RowCase("linear", 3, (k,), ("bf16", 33)) for k in (2, 34, 100)]
    return cases


def _norms() -> list[RowCase]:
    cases = []
    for op, inputs in (("rms_norm", 1), ("add_rms_norm", 2)):
        for quantize in (None, "bf16", "q8"):
            attrs = (("eps", 1e-5), ("quantize", quantize))
            widths = (32, 64, 576, 2048) if quantize == "q8" else (1, 16, 31, 33, 100, 576)
            cases += [RowCase(op, 3, (k,) * inputs, ("vector", k), attrs) for k in widths]
            cases += [RowCase(op, rows, (64,) * inputs, ("vector", 64), attrs) for rows in (1, 8, 33)]
            for numbers in ("outlier", "zero", "tiny", "large"):
                cases.append(RowCase(op, 5, (96,) * inputs, ("vector", 96), attrs, numbers))
    return cases


def _elementwise() -> list[RowCase]:
    cases = []
    for width in (1, 15, 16, 33, 96, 1536):
        cases += [RowCase(op, 3, (width,) * n) for op, n in (("add", 2), ("mul", 2), ("silu", 1), ("silu_mul", 2))]
    cases += [RowCase("silu_mul", rows, (64, 64), attrs=(("quantize", q),)) for rows in (1, 9) for q in ("q8", "bf16")]
    cases += [RowCase("silu_mul", 3, (96, 96), numbers=numbers) for numbers in ("outlier", "large", "zero")]
    for rows, width in ((1, 32), (3, 96), (33, 576)):
        cases += [RowCase("quantize", rows, (width,), attrs=(("to", to),)) for to in ("q8", "bf16")]
    for numbers in ("outlier", "zero", "tiny", "large"):
        cases += [RowCase("quantize", 5, (128,), attrs=(("to", to),), numbers=numbers) for to in ("q8", "bf16")]
    cases.append(RowCase("quantize", 3, (33,), attrs=(("to", "bf16"),)))
    cases += [RowCase("concat", rows, widths) for rows in (1, 5) for widths in ((7, 33), (16, 16, 48), (64, 1, 15))]
    cases += [RowCase("select_rows", rows, (width,)) for rows in (1, 7, 33) for width in (1, 48, 96)]
    return cases


def _embeds() -> list[RowCase]:
    return [RowCase("embed", rows, (), (fmt, 64)) for fmt in FORMATS for rows in (1, 5, 33)]


LENGTHS = (1, 15, 16, 17, 255, 256, 257, 511, 513, 700)
"""Contexts around a block of 16, a chunk of 256 keys, two chunks, and beyond."""


def _attentions() -> list[AttentionCase]:
    cases = []
    decodes = tuple((n - 1, 1) for n in LENGTHS)
    prefills = ((0, 37), (250, 20), (5, 1), (0, 1))
    for dtype in KV_DTYPES:
        cases.append(AttentionCase(6, 2, 32, dtype, decodes))
        cases.append(AttentionCase(6, 2, 32, dtype, prefills))
        cases += [AttentionCase(2, 1, 64, dtype, ((n - 1, 1),)) for n in (17, 257, 700)]  # one request: keys split
        cases.append(AttentionCase(4, 1, 64, dtype, ((0, 300),)))
        for group in (1, 3, 4, 8):
            cases.append(AttentionCase(2 * group, 2, 32, dtype, ((30, 1), (0, 9), (270, 3))))
        for dim in (16, 48, 64, 80, 96, 128, 256):
            cases.append(AttentionCase(3, 1, dim, dtype, ((40, 1), (0, 18), (260, 2))))
        cases.append(AttentionCase(3, 3, 64, dtype, ((270, 5), (12, 1)), scale_up=30.0))
        for quantize in ("q8", "bf16"):
            cases.append(AttentionCase(4, 2, 32, dtype, ((0, 17), (300, 1)), quantize))
        cases.append(AttentionCase(2, 2, 32, dtype, ((100, 2),), theta=500000.0, freq_factors=(1.0, 8.0) * 8))
    return cases


ROW_CASES = _linears() + _norms() + _elementwise() + _embeds()
ATTENTION_CASES = _attentions()
