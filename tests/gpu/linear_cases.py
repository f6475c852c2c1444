"""Matrix products of every weight format: cases, tensors, answers."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from ridgeline.backends.cuda.codes import STORED
from ridgeline.backends.cuda.gemm import Epilogue, Scratch
from ridgeline.backends.cuda.kernels.gather import gather_columns, gather_quantized
from ridgeline.backends.cuda.kernels.linear import linear, linear_scratch
from ridgeline.backends.cuda.kernels.linear_fp8 import BLOCK, linear_fp8, linear_fp8_scratch, scale_shapes
from ridgeline.backends.cuda.kernels.linear_int8 import linear_int8, linear_int8_scratch
from ridgeline.backends.cuda.kernels.linear_quantized import linear_quantized, linear_quantized_scratch
from ridgeline.backends.cuda.ladder.climb import Climb, Expected
from ridgeline.backends.reference.numerics import rounded
from ridgeline.backends.reference.ops import run_op
from tests.cases import ROW_CASES, RowCase, seed_of
from tests.gpu.codes import FILES, KINDS, Codes, scales_of
from tests.gpu.row_cases import exact, numbers, tensor
from tests.ops.accuracy import plain_gate, plain_linear

EDGES = (1, 15, 16, 17, 63, 64, 65, 128, 130)
"""Rows around every tile, and around where configurations change."""


@dataclass(frozen=True)
class LinearCase:
    """A product only GPU kernels have.

    Attributes:
        op: the kernel's file.
        kind: of the weight: "f16", "bf16", "int8"; of FP8, how it is scaled; of codes, one of
            ``codes.KINDS`` or ``codes.FILES``.
        out: dtype of the output.
        after: of "bias", "silu_mul" and "residual".
        programs: so many take turns; None as launched.
    """

    op: str
    rows: int
    n: int
    k: int
    kind: str
    out: str = "f32"
    after: tuple[str, ...] = ()
    programs: int | None = None

    @property
    def name(self) -> str:
        """For test ids."""
        after = "".join(f"-{a}" for a in self.after)
        turns = f"-by{self.programs}" if self.programs else ""
        return f"{self.op}-{self.rows}x{self.k}-{self.kind}x{self.n}-{self.out}{after}{turns}"


def _fits(case: RowCase) -> bool:
    """Float weights of 16 bits, and numbers that fp16 holds; int8 groups of 32 are the CPU's activations."""
    if case.op != "linear" or case.weight is None or case.weight[0] not in ("f16", "bf16"):
        return False
    return dict(case.attrs).get("quantize") != "q8" and not (case.weight[0] == "f16" and case.numbers == "large")


EVERYTHING = ("bias", "silu_mul", "residual")


def _of_models(op: str, kinds: tuple[str, ...], widths: tuple[int, ...] = (1024, 128)) -> list[LinearCase]:
    """Whole steps of K, in parts and not, by every tile: what a model's products are."""
    gated = ((), ("silu_mul",))
    return [
        LinearCase(op, m, 64, k, kind, "bf16", after)
        for kind in kinds for m in (2, 12, 40, 80) for k in widths for after in gated
    ]  # fmt: skip


def _floats() -> list[LinearCase]:
    cases = [LinearCase("linear", rows, 96, 1100, "bf16", "bf16") for rows in EDGES]
    cases += [LinearCase("linear", rows, 96, 520, "f16", "f16", EVERYTHING) for rows in (1, 17, 65)]
    for after in (("bias",), ("residual",), ("bias", "residual"), ("silu_mul", "residual"), EVERYTHING):
        cases += [LinearCase("linear", rows, 160, 64, "bf16", out, after) for rows, out in ((2, "f32"), (70, "bf16"))]
    cases += [LinearCase("linear", 5, 33, k, "bf16", "bf16") for k in (1, 7, 8, 33, 63, 64, 65)]
    cases += _of_models("linear", ("bf16",))
    # Fewer programs than tiles, or than parts of tiles: each takes several.
    cases += [LinearCase("linear", rows, 200, 520, "bf16", "bf16", (), 3) for rows in (2, 40, 130)]
    return cases


def _narrow(op: str, kinds: tuple[str, ...]) -> list[LinearCase]:
    cases = []
    for kind in kinds:
        cases += [LinearCase(op, rows, 80, 272, kind) for rows in (EDGES if kind == kinds[0] else (1, 17, 65))]
        cases += [LinearCase(op, rows, 40, 2080, kind, "bf16") for rows in (1, 17, 65)]
        cases += [LinearCase(op, rows, 32, 2048, kind, "bf16") for rows in (2, 66)]  # whole steps, in whole parts
        cases += [LinearCase(op, rows, 48, 192, kind, "bf16") for rows in (3, 18, 67)]  # whole words, and half a step
        cases += [LinearCase(op, 3, n, 144, kind) for n in (1, 31, 129)]
        cases += [LinearCase(op, 2, 33, k, kind) for k in (1, 31, 128, 130)]
        cases += [LinearCase(op, rows, 160, 128, kind, "bf16", EVERYTHING) for rows in (2, 66)]
        cases += [LinearCase(op, rows, 130, 1040, kind, "bf16", (), 2) for rows in (2, 66)]
    return cases


def _codes_above() -> list[LinearCase]:
    """Codes of 5 and 6 bits, of a book and in groups of 16: every tile, parts of steps, one step and several."""
    cases, op = [], "linear_quantized"
    for i, kind in enumerate(KINDS[7:]):
        cases += [LinearCase(op, rows, 80, 272, kind, "bf16") for rows in (2, 17, 66)]
        cases += [LinearCase(op, 3, 33, k, kind) for k in ((1, 130), (31, 128), (33, 257))[i % 3]]
        cases += [LinearCase(op, rows, 32, 1040 - 16 * (i % 2), kind, "bf16", (), 2) for rows in (1, 66)]
        cases += [LinearCase(op, (2, 40, 80)[i % 3], 64, 512, kind, "bf16", EVERYTHING)]
    return cases


CASES: list[RowCase | LinearCase] = [
    *(c for c in ROW_CASES if _fits(c)),
    *_floats(),
    *_narrow("linear_int8", ("int8",)),
    *_narrow("linear_fp8", ("tensor", "row", "block")),
    *_narrow("linear_quantized", KINDS[:7]),
    *_codes_above(),
    *_of_models(
        "linear_quantized", ("4-32-middle", "4-32-minimum", "8-32-middle"), (1024, 128, 192)
    ),  # 192: one and a half
    *(LinearCase("linear_quantized", m, 48, 384, kind, "bf16") for kind in FILES for m in (2, 70)),
    *(LinearCase("gather", 5, 40, k, kind, "bf16") for kind in KINDS for k in (96, 1100)),
    *(LinearCase("gather", 3, 40, k, "columns", out) for k, out in ((100, "bf16"), (1100, "f32"))),
]


def build(case: RowCase | LinearCase, arch: str, only: int | None = None) -> Climb:
    """``only``: the row to compute alone, of the same numbers."""
    if isinstance(case, RowCase):
        assert case.weight is not None
        attrs = dict(case.attrs)
        after = ("silu_mul",) if attrs.get("epilogue") else ()
        rng, (kind, n) = np.random.default_rng(seed_of(case)), case.weight
        twin = LinearCase("linear", case.rows, n, case.widths[0], kind, attrs.get("quantize") or "f32", after)
        return _linear(twin, arch, rng, only, case.numbers)
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    built = MAKERS[case.op](case, arch, rng, only)
    if case.programs is None:
        return built
    return Climb([replace(launch, grid=(case.programs,)) for launch in built.launches], built.expected)


def _pick(x: np.ndarray, only: int | None) -> np.ndarray:
    return x if only is None else x[only : only + 1]


class _After:
    """The tensors of what follows a sum, and what they make of it."""

    def __init__(self, case: LinearCase, rng: np.random.Generator, only: int | None) -> None:
        width = case.n // 2 if "silu_mul" in case.after else case.n
        self.gate = "silu_mul" in case.after
        bias, residual = numbers(rng, (case.n,)), _pick(numbers(rng, (case.rows, width)), only)
        self.bias = torch.from_numpy(bias) if "bias" in case.after else None
        self.residual = tensor(residual, "bf16" if case.out == "f32" else case.out)
        self.residual = self.residual if "residual" in case.after else None
        self.out = tensor(np.zeros_like(residual), case.out)

    @property
    def epilogue(self) -> Epilogue:
        return Epilogue(self.bias, self.gate, self.residual)

    def expected(self, truth: np.ndarray, plain: np.ndarray) -> Expected:
        """From the scaled sums, in float64 and in float32."""
        return Expected(self.out, self._apply(truth, np.float64), self._apply(plain, np.float32))

    def _apply(self, y: np.ndarray, t: type) -> np.ndarray:
        assert y.dtype == t
        if self.bias is not None:
            y = y + exact(self.bias).astype(t)
        if self.gate:
            y = plain_gate(y) if t is np.float32 else _gate(y)
        return y if self.residual is None else y + exact(self.residual).astype(t)


def _gate(y: np.ndarray) -> np.ndarray:
    """silu(gate) * up of columns that alternate every 16, in float64."""
    result: np.ndarray = run_op("linear", [y, np.eye(y.shape[1])], {"epilogue": "silu_mul"}, np.float64)[0]
    return result


def _scratch(needed: Scratch) -> dict[str, torch.Tensor]:
    workspace, counters = needed.tensors("cpu")
    return {"workspace": workspace, "counters": counters}


def _linear(
    case: LinearCase, arch: str, rng: np.random.Generator, only: int | None, kind_of_numbers: str = "normal"
) -> Climb:
    x = tensor(_pick(numbers(rng, (case.rows, case.k), kind_of_numbers), only), case.kind)
    # Rows of w lie further apart than those of x, as in a merged matrix: a stride cannot stand for the other.
    w = tensor(rng.standard_normal((case.n, case.k + 16)).astype(np.float32), case.kind)[:, : case.k]
    after = _After(case, rng, only)
    scratch = _scratch(linear_scratch(len(x), case.n, case.k))
    launches = linear(x, w, after.out, arch, after=after.epilogue, **scratch)
    truth = exact(x).astype(np.float64) @ exact(w).astype(np.float64).T
    return Climb(launches, (after.expected(truth, plain_linear(exact(x), exact(w), None)),))


def _codes(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return rng.integers(-127, 128, shape).astype(np.int8)


def _padded(x: np.ndarray, like: torch.dtype, more: int = 16) -> torch.Tensor:
    """Rows of bytes as a tensor of ``like`` whose rows have 16 or ``more``, all bits set."""
    wide = torch.full((x.shape[0], x.shape[1] + more), 255, dtype=torch.uint8)
    wide[:, : x.shape[1]] = torch.from_numpy(x.view(np.uint8))
    return wide.view(like)[:, : x.shape[1]]


def _int8(case: LinearCase, arch: str, rng: np.random.Generator, only: int | None) -> Climb:
    codes, w_codes = _pick(_codes(rng, (case.rows, case.k)), only), _codes(rng, (case.n, case.k))
    scales, w_scales = _pick(scales_of(rng, (case.rows,)), only), scales_of(rng, (case.n,))
    x, w = _padded(codes, torch.int8), _padded(w_codes, torch.int8, 32)
    x_scale, w_scale = torch.from_numpy(scales.copy()), torch.from_numpy(w_scales)
    after = _After(case, rng, only)
    scratch = _scratch(linear_int8_scratch(len(x), case.n, case.k))
    launches = linear_int8(x, w, x_scale, w_scale, after.out, arch, after=after.epilogue, **scratch)
    total = codes.astype(np.int64) @ w_codes.astype(np.int64).T
    truth = total * (scales[:, None].astype(np.float64) * w_scales)
    plain = total.astype(np.float32) * scales[:, None] * w_scales
    return Climb(launches, (after.expected(truth, plain),))


def _e4m3(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Random bytes without the two codes for NaN: every number of the format occurs."""
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    return np.where(codes & 0x7F == 0x7F, np.uint8(0), codes)


def _fp8(case: LinearCase, arch: str, rng: np.random.Generator, only: int | None) -> Climb:
    scaling = case.kind
    shapes = scale_shapes(case.rows, case.n, case.k, scaling)
    more = 64 if case.k % 64 == 0 else 16  # whole words of codes, where sm_80 reads them so
    x = _padded(_pick(_e4m3(rng, (case.rows, case.k)), only), torch.float8_e4m3fn, more)
    w = _padded(_e4m3(rng, (case.n, case.k)), torch.float8_e4m3fn, 2 * more)
    scales, w_scales = (scales_of(rng, shape) for shape in shapes)
    scales = scales if scaling == "tensor" else _pick(scales, only)
    after = _After(case, rng, only)
    scratch = _scratch(linear_fp8_scratch(len(x), case.n, case.k, scaling, arch))
    launches = linear_fp8(
        x,
        w,
        torch.from_numpy(scales.copy()),
        torch.from_numpy(w_scales),
        after.out,
        arch,
        scaling=scaling,
        after=after.epilogue,
        **scratch,
    )
    truth, plain = (_fp8_numbers(exact(x), exact(w), scales, w_scales, scaling, t) for t in (np.float64, np.float32))
    return Climb(launches, (after.expected(truth, plain),))


def _fp8_numbers(
    x: np.ndarray, w: np.ndarray, x_scale: np.ndarray, w_scale: np.ndarray, scaling: str, t: type
) -> np.ndarray:
    """Sums of products scaled once, or of 128 values scaled as they are added."""

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return plain_linear(a, b, None) if t is np.float32 else a.astype(t) @ b.astype(t).T

    x_scale, w_scale = x_scale.astype(t), w_scale.astype(t)
    if scaling != "block":
        scale = x_scale[:, None] if scaling == "row" else x_scale
        return product(x, w) * scale * w_scale
    y = np.zeros((len(x), len(w)), t)
    for g in range(x_scale.shape[1]):
        at = slice(BLOCK * g, BLOCK * g + BLOCK)
        columns = np.repeat(w_scale[:, g], BLOCK)[: len(w)]
        y = y + product(x[:, at], w[:, at]) * (x_scale[:, g : g + 1] * columns)
    return y


def _quantized(case: LinearCase, arch: str, rng: np.random.Generator, only: int | None) -> Climb:
    w = Codes.of(case.kind, case.n, case.k, rng)
    dtype = "bf16" if w.how["offset"] in STORED else "f16"
    x = tensor(_pick(numbers(rng, (case.rows, case.k)), only), dtype)
    met = x if w.order is None else torch.empty_like(x)
    after = _After(case, rng, only)
    scratch = _scratch(linear_quantized_scratch(len(x), case.n, case.k, w.how["group"], w.how["bits"]))
    launches = [] if w.order is None else gather_columns(x, w.order, met, arch=arch)
    launches += linear_quantized(met, w.packed, w.scales, after.out, arch, after=after.epilogue, **scratch, **w.how)
    truth = exact(x).astype(np.float64) @ w.numbers.T
    plain = plain_linear(exact(x), rounded(w.numbers.astype(np.float32), dtype), None)
    return Climb(launches, (after.expected(truth, plain),))


def _gathered(case: LinearCase, arch: str, rng: np.random.Generator, only: int | None) -> Climb:
    """Rows of a quantized weight by index, as an embedding takes them."""
    if case.kind == "columns":
        return _columns(case, arch, rng, only)
    w = Codes.of(case.kind, case.n, case.k, rng)
    index = rng.integers(0, case.n, case.rows).astype(np.int32)
    index[-1] = case.n - 1  # past whose end nothing may be read
    index = _pick(index, only)
    out = tensor(np.zeros((len(index), case.k), np.float32), case.out)
    launches = gather_quantized(w.packed, w.scales, torch.from_numpy(index), out, arch=arch, **w.how)
    truth = w.numbers[index]
    return Climb(launches, (Expected(out, truth, truth.astype(np.float32)),))


def _columns(case: LinearCase, arch: str, rng: np.random.Generator, only: int | None) -> Climb:
    """Columns of activations in another order."""
    x = tensor(_pick(numbers(rng, (case.rows, case.k)), only), case.out)
    order = rng.permutation(case.k).astype(np.int32)
    out = tensor(np.zeros(x.shape, np.float32), case.out)
    truth = exact(x)[:, order]
    launches = gather_columns(x, torch.from_numpy(order), out, arch=arch)
    return Climb(launches, (Expected(out, truth.astype(np.float64), truth),))


MAKERS: dict[str, Callable[..., Climb]] = {
    "linear": _linear,
    "linear_int8": _int8,
    "linear_fp8": _fp8,
    "linear_quantized": _quantized,
    "gather": _gathered,
}
