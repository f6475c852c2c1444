"""Norms, gated activations, gathers, rotary embedding with its cache write: cases, tensors, answers."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import torch

from ridgeline.backends.cuda.kernels.gated import gated
from ridgeline.backends.cuda.kernels.gather import gather
from ridgeline.backends.cuda.kernels.norm import norm
from ridgeline.backends.cuda.kernels.rope_kv import rope_kv
from ridgeline.backends.cuda.ladder.climb import Climb, Expected
from ridgeline.backends.reference.ops import rotate, run_op
from tests.cases import ROW_CASES, RowCase, seed_of

ROW_OPS = {"rms_norm": "norm", "add_rms_norm": "norm", "silu_mul": "gated", "embed": "gather", "select_rows": "gather"}
OLD = 3.0
"""What a cache holds where the step writes nothing."""
TORCH = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclass(frozen=True)
class GpuCase:
    """A case only GPU kernels have.

    Attributes:
        op: the kernel's file.
        rows, width: of the activations.
        kind: what is done: the function, the cache's type, ...
        dtype: of the activations.
        heads: (query heads, KV heads) of a rope case; width is then a head's.
        numbers: as in tests/cases.py.
    """

    op: str
    rows: int
    width: int
    kind: str
    dtype: str = "bf16"
    heads: tuple[int, int] = (0, 0)
    numbers: str = "normal"

    @property
    def name(self) -> str:
        """For test ids."""
        heads = f"-{self.heads[0]}x{self.heads[1]}" if self.heads[0] else ""
        numbers = "" if self.numbers == "normal" else f"-{self.numbers}"
        return f"{self.op}-{self.rows}x{self.width}{heads}-{self.kind}-{self.dtype}{numbers}"


def _own() -> list[GpuCase]:
    cases = [GpuCase("norm", rows, width, "rms", "bf16") for rows, width in ((1, 4096), (3, 128), (17, 80), (2, 5120))]
    cases += [GpuCase("norm", 3, width, "layer", dtype) for width in (64, 100, 768) for dtype in ("bf16", "f16", "f32")]
    cases += [GpuCase("norm", 5, width, kind, "bf16") for width in (64, 300) for kind in ("int8", "fp8")]
    cases += [GpuCase("gated", 3, width, kind) for width in (1, 96, 1500) for kind in ("silu", "gelu", "gelu_tanh")]
    for dim in (64, 80, 128):
        for kind in ("bf16", "int8", "fp8"):
            cases.append(GpuCase("rope_kv", 5, dim, kind, "bf16", (6, 2)))
    cases += [GpuCase("norm", 5, 96, kind, "bf16", numbers="zero") for kind in ("int8", "fp8")]
    cases += [GpuCase("gated", 2, 80, kind, "f32") for kind in ("silu", "gelu", "gelu_tanh")]
    cases.append(GpuCase("gated", 9, 2100, "silu"))  # more rows than few, as the next
    cases += [GpuCase("rope_kv", 17, 64, kind, "bf16", (18, 9)) for kind in ("bf16", "int8", "fp8")]
    cases += [GpuCase("gather", 3, width, "copy") for width in (1024, 1025, 2500)]
    cases.append(GpuCase("rope_kv", 3, 64, "int8", "bf16", (4, 3), "zero"))
    cases += [GpuCase("rope_kv", 2, 128, "f16", "f16", (9, 3)), GpuCase("rope_kv", 3, 64, "bf16", "f32", (32, 8))]
    return cases


def _fits(case: RowCase) -> bool:
    """Cases whose result is a float row: int8 groups of 32 are the CPU's activations."""
    return case.op in ROW_OPS and dict(case.attrs).get("quantize") != "q8"


CASES: list[RowCase | GpuCase] = [*(c for c in ROW_CASES if _fits(c)), *_own()]


def kernels_of(case: RowCase | GpuCase) -> tuple[str]:
    """The kernel file that a case runs."""
    return (ROW_OPS[case.op] if isinstance(case, RowCase) else case.op,)


KERNELS_OF = kernels_of


def numbers(rng: np.random.Generator, shape: tuple[int, ...], kind: str = "normal") -> np.ndarray:
    """Activations as tests/cases.py describes them."""
    x = rng.standard_normal(shape).astype(np.float32)
    if kind == "outlier":
        x[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] *= 1000
    if kind == "zero":
        x[:, : shape[1] // 2] = 0
        x[0] = 0
    return x * np.float32({"tiny": 1e-30, "large": 1e6}.get(kind, 1.0))


def tensor(x: np.ndarray, dtype: str) -> torch.Tensor:
    """A torch tensor of rounded values, its rows padded so that strides matter."""
    padded = torch.full((*x.shape[:-1], x.shape[-1] + 16), float("nan"), dtype=TORCH[dtype])
    padded[..., : x.shape[-1]] = torch.from_numpy(x)
    return padded[..., : x.shape[-1]]


def exact(x: torch.Tensor) -> np.ndarray:
    """What a tensor holds, in float32."""
    return x.to(torch.float32).numpy()


def build(case: RowCase | GpuCase, arch: str, only: int | None = None) -> Climb:
    """``only``: the row to compute alone, of the same numbers."""
    if isinstance(case, RowCase):
        rng = np.random.default_rng(seed_of(case))
        return {"norm": _row_norm, "gated": _row_gated, "gather": _row_gather}[ROW_OPS[case.op]](case, arch, rng, only)
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    return {"norm": _norm, "gated": _gated, "gather": _gather, "rope_kv": _rope}[case.op](case, arch, rng, only)


def _pick(x: np.ndarray, only: int | None) -> np.ndarray:
    return x if only is None else x[only : only + 1]


def _both(op: str, inputs: list[np.ndarray], attrs: dict, at: int) -> tuple[np.ndarray, np.ndarray]:
    truth, plain = (run_op(op, inputs, attrs, t)[at] for t in (np.float64, np.float32))
    return truth, plain


def _row_norm(case: RowCase, arch: str, rng: np.random.Generator, only: int | None) -> Climb:
    attrs = dict(case.attrs)
    out_dtype = attrs.pop("quantize") or "f32"
    data = [_pick(numbers(rng, (case.rows, w), case.numbers), only) for w in case.widths]
    weight = tensor(1 + 0.1 * rng.standard_normal(case.widths[0]).astype(np.float32), "f32")
    xs = [tensor(x, "f32") for x in data]
    out = tensor(np.zeros_like(data[0]), out_dtype)
    total = tensor(np.zeros_like(data[0]), "f32") if case.op == "add_rms_norm" else None
    delta = xs[1] if total is not None else None
    launches = norm(xs[0], weight, out, eps=attrs["eps"], delta=delta, total=total, arch=arch)
    inputs = [*data, exact(weight)]
    expected = [Expected(out, *_both(case.op, inputs, attrs, -1))]
    if total is not None:
        expected.append(Expected(total, *_both(case.op, inputs, attrs, 0)))
    return Climb(launches, tuple(expected))


def _row_gated(case: RowCase, arch: str, rng: np.random.Generator, only: int | None) -> Climb:
    gate, up = (_pick(numbers(rng, (case.rows, w), case.numbers), only) for w in case.widths)
    out = tensor(np.zeros_like(gate), dict(case.attrs).get("quantize") or "f32")
    launches = gated(tensor(gate, "f32"), tensor(up, "f32"), out, arch=arch)
    return Climb(launches, (Expected(out, *_both("silu_mul", [gate, up], {}, 0)),))


def _row_gather(case: RowCase, arch: str, rng: np.random.Generator, only: int | None) -> Climb:
    width = case.widths[0] if case.widths else 64
    dtype = case.weight[0] if case.weight and case.weight[0] in TORCH else "bf16"
    table = tensor(numbers(rng, (50, width)), dtype)
    index = _pick(rng.integers(0, 50, case.rows).astype(np.int32), only)
    out = tensor(np.zeros((len(index), width), np.float32), dtype)
    truth = exact(table)[index]
    launches = gather(table, torch.from_numpy(index), out, arch=arch)
    return Climb(launches, (Expected(out, truth.astype(np.float64), truth, exact=True),))


def _gather(case: GpuCase, arch: str, rng: np.random.Generator, only: int | None) -> Climb:
    row = RowCase("select_rows", case.rows, (case.width,))
    return _row_gather(row, arch, rng, only)


def _norm_numbers(x: np.ndarray, w: np.ndarray, b: np.ndarray | None, eps: float, center: bool, t: type) -> np.ndarray:
    x, w = x.astype(t), w.astype(t)
    if center:
        x = x - x.mean(axis=1, keepdims=True, dtype=t)
    y = x * (1 / np.sqrt(np.mean(x * x, axis=1, keepdims=True, dtype=t) + t(eps))) * w
    return y if b is None else y + b.astype(t)


def _norm(case: GpuCase, arch: str, rng: np.random.Generator, only: int | None) -> Climb:
    x = tensor(_pick(numbers(rng, (case.rows, case.width), case.numbers), only), case.dtype)
    weight = tensor(1 + 0.1 * rng.standard_normal(case.width).astype(np.float32), case.dtype)
    center = case.kind == "layer"
    bias = tensor(rng.standard_normal(case.width).astype(np.float32), case.dtype) if center else None
    b = None if bias is None else exact(bias)
    truth, plain = (_norm_numbers(exact(x), exact(weight), b, 1e-5, center, t) for t in (np.float64, np.float32))
    if case.kind not in ("int8", "fp8"):
        out = tensor(np.zeros_like(plain), case.dtype)
        launches = norm(x, weight, out, eps=1e-5, bias=bias, center=center, arch=arch)
        return Climb(launches, (Expected(out, truth, plain),))
    out = torch.zeros(x.shape, dtype=torch.int8 if case.kind == "int8" else torch.float8_e4m3fn)
    scales = torch.zeros(len(x))
    launches = norm(x, weight, out, eps=1e-5, scales=scales, arch=arch)
    most = np.float32(127 if case.kind == "int8" else 448)
    # A few rows' scales are too small a sample of what float32 costs: that is taken from all their values.
    largest, cost = np.abs(truth).max(axis=1), np.abs(plain - truth).max()
    rows = (largest / most, ((largest + cost) / most).astype(np.float32))
    # Codes near the middle between two may fall either way: they are checked as the numbers they stand for.
    codes = Expected(out, _over(truth, rows[0][:, None]), _codes(plain, most, case.kind), step=case.kind == "int8")
    return Climb(launches, (Expected(scales, *rows), codes))


def _over(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)


def _codes(plain: np.ndarray, most: np.float32, kind: str) -> np.ndarray:
    largest = np.abs(plain).max(axis=-1, keepdims=True)
    scaled = plain * _over(np.full_like(largest, most), largest)
    return np.rint(scaled) if kind == "int8" else scaled.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def _gated(case: GpuCase, arch: str, rng: np.random.Generator, only: int | None) -> Climb:
    both = tensor(_pick(numbers(rng, (case.rows, 2 * case.width)), only), case.dtype)
    gate, up = both[:, : case.width], both[:, case.width :]
    out = tensor(np.zeros((len(both), case.width), np.float32), case.dtype)

    def answer(t: torch.dtype) -> np.ndarray:
        g, u = gate.to(t), up.to(t)
        act = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}.get(case.kind)
        a = act(g) if act else torch.nn.functional.gelu(g, approximate="tanh")
        return (a * u).numpy()

    launches = gated(gate, up, out, function=case.kind, arch=arch)
    return Climb(launches, (Expected(out, answer(torch.float64), answer(torch.float32)),))


def _rope(case: GpuCase, arch: str, rng: np.random.Generator, only: int | None) -> Climb:
    (heads, kv_heads), dim, page = case.heads, case.width, 16
    qkv = tensor(_pick(numbers(rng, (case.rows, (heads + 2 * kv_heads) * dim), case.numbers), only), case.dtype)
    positions = rng.integers(0, 100, case.rows).astype(np.int32)
    positions[0] = 99  # the last of the angles: a lane past its row is out of bounds
    positions = _pick(positions, only)
    slots = _pick(np.arange(case.rows, dtype=np.int32), only)
    tables = rng.permutation(case.rows * 8).astype(np.int32).reshape(case.rows, 8)
    angles = np.arange(100)[:, None] * 10000.0 ** (-np.arange(dim // 2) / (dim // 2))
    cos, sin = (torch.from_numpy(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    q_out = torch.zeros(len(qkv), heads, dim, dtype=TORCH["bf16" if case.dtype == "f32" else case.dtype])
    kind = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.get(case.kind, TORCH.get(case.kind))
    caches = [torch.full((case.rows * 8, kv_heads, page, dim), OLD).to(kind) for _ in range(2)]
    scales = [torch.full((case.rows * 8, kv_heads, page), OLD) for _ in range(2)]
    launches = rope_kv(
        qkv,
        cos,
        sin,
        torch.from_numpy(positions),
        torch.from_numpy(slots),
        torch.from_numpy(tables),
        q_out,
        *caches,
        scales=(scales[0], scales[1]) if case.kind == "int8" else None,
        tensor_scales=(0.5, 2.0) if case.kind == "fp8" else (1.0, 1.0),
        arch=arch,
    )
    results = [_rope_numbers(exact(qkv), positions, heads, kv_heads, dim, t) for t in (np.float64, np.float32)]
    expected = [Expected(q_out, results[0][0], results[1][0])]
    for i, cache in enumerate(caches):
        place = (tables[slots, positions // page], slice(None), positions % page)
        expected += _stored(cache, scales[i], place, results[0][1 + i], results[1][1 + i], case.kind, (0.5, 2.0)[i])
    return Climb(launches, tuple(expected))


def _rope_numbers(qkv: np.ndarray, positions: np.ndarray, heads: int, kv_heads: int, dim: int, t: type) -> list:
    q, k, v = np.split(qkv.astype(t), [heads * dim, (heads + kv_heads) * dim], axis=1)
    q, k = (rotate(x, positions, dim, 10000.0, None) for x in (q, k))
    return [x.reshape(len(x), -1, dim) for x in (q, k, v)]


def _stored(
    cache: torch.Tensor,
    scales: torch.Tensor,
    place: tuple,
    truth: np.ndarray,
    plain: np.ndarray,
    kind: str,
    tensor_scale: float,
) -> list[Expected]:
    """What the whole cache must hold: what it held before but where the step's tokens lie."""
    whole = [np.full(cache.shape, OLD, t) for t in (np.float64, np.float32)]
    if kind == "int8":
        rows = [np.abs(x).max(axis=2) / x.dtype.type(127) for x in (truth, plain)]
        whole[0][place] = _over(truth, rows[0][..., None])
        whole[1][place] = _codes(plain, np.float32(127), "int8")
        tables = [np.full(scales.shape, OLD, t) for t in (np.float64, np.float32)]
        tables[0][place], tables[1][place] = rows
        return [Expected(cache, *whole, step=1.0), Expected(scales, *tables)]
    factor = tensor_scale if kind == "fp8" else 1.0
    whole[0][place], whole[1][place] = truth / factor, plain / np.float32(factor)
    if kind == "fp8":
        whole[1] = whole[1].astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return [Expected(cache, *whole)]
