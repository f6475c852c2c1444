"""Every native operator that works on rows, on every instruction set, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases import ACTIVATION, ROW_CASES, RowCase, seed_of
from ops.accuracy import Codes, assert_accurate, decode, reference
from ops.lone import LoneGraph, NativeGraph, random_matrix, single_request

from ridgeline.backends.cpu import _native
from ridgeline.backends.reference.executor import weight_array
from ridgeline.backends.reference.numerics import Q8, quantize_q8, rounded
from ridgeline.core.formats import FORMATS
from ridgeline.graph.ir import Graph, Value
from ridgeline.weights.codecs import dequantize, quantize

ISAS = _native.available_isas()
ENOUGH_ROWS = 160  # for the straightforward error to be more than luck; the kernel runs the case's own


def numbers(case: RowCase, width: int, rng: np.random.Generator) -> np.ndarray:
    """[rows, width] float32 of the kind the case asks for; more rows than the kernel runs."""
    rows = max(case.rows, ENOUGH_ROWS)
    x = rng.standard_normal((rows, width))
    if case.numbers == "outlier":
        x[np.arange(rows), rng.integers(0, width, rows)] *= 1000
    if case.numbers == "zero":
        x[:, : width // 2 // 32 * 32 or width] = 0
    return (x * {"tiny": 1e-30, "large": 1e6}.get(case.numbers, 1)).astype(np.float32)


class Lone:
    """A row case as a graph for the kernel, and as inputs for the reference."""

    def __init__(self, case: RowCase, tiles: bool = False) -> None:
        """``tiles``: quantized weights as kernels take them that multiply tiles, with bf16 activations."""
        self.tiles = tiles
        rng = np.random.default_rng(seed_of(case))
        self.case, self.attrs = case, dict(case.attrs)
        self.graph = LoneGraph(case.rows, case.rows)
        self.inputs: list[Any] = [numbers(case, width, rng) for width in case.widths]
        values = [self.graph.activation(f"x{i}", x) for i, x in enumerate(self.inputs)]
        self.sample_rows: np.ndarray | None = None
        self.codes: Codes | None = None
        self.terms: np.ndarray | None = None
        if case.op == "select_rows":
            self.sample_rows = np.flatnonzero(rng.random(case.rows) < 0.5).astype(np.int32)
            self.inputs.append(self.sample_rows)
            values.append(self.graph.sample_rows)
        elif case.weight:
            values = self._weight(values, rng)
        self.outputs = self.graph.emit(case.op, values, self.attrs)

    def _weight(self, values: list[Value], rng: np.random.Generator) -> list[Value]:
        """Adds the matrix (or vector), and for a linear the activations it multiplies."""
        assert self.case.weight
        (name, n), g = self.case.weight, self.graph
        if name == "vector":
            vector = (1 + 0.2 * rng.standard_normal(n)).astype(np.float32)
            self.inputs.append(vector)
            return [*values, g.stored("w", (n,), FORMATS["f32"], quantize(FORMATS["f32"], vector))]
        fmt, k = FORMATS[name], self.case.widths[0]
        if self.attrs.get("epilogue"):
            shape = (n // 2, k)
            w = g.interleaved({part: random_matrix(fmt, *shape, rng) for part in ("gate", "up")}, shape, fmt)
        else:
            w = g.stored("w", (n, k), fmt, random_matrix(fmt, n, k, rng))
        self.inputs.append(weight_array(w.info, g.values, np.float32))
        if fmt.kind == "int" and self.tiles:
            self.terms = weight_array(w.info, g.values, np.float32, terms=True)
        elif fmt.kind == "int":
            parts = [Codes.of(fmt, g.values[p].tensor.data, g.values[p].tensor.shape[0]) for p in w.info.parts]
            self.codes = parts[0].interleaved(parts[1]) if len(parts) == 2 else parts[0]
        to = "bf16" if self.tiles else ACTIVATION[name]
        if to != "f32":
            x = self.inputs[0]
            self.inputs[0] = quantize_q8(x) if to == "q8" else rounded(x, to)
            values = list(g.emit("quantize", values, {"to": to}))
        return [*values, w]

    def graph_of(self, output: Value) -> Graph:
        """The graph that hands out one of the operator's results."""
        return self.graph.build(logits=output)


def reads_codes(case: RowCase) -> bool:
    """Whether a case multiplies quantized weights, which there are two ways to do."""
    return case.op == "linear" and case.weight is not None and FORMATS[case.weight[0]].kind == "int"


def run_everywhere(lone: Lone, output: Value) -> dict[str, np.ndarray]:
    """Raw rows by instruction set; the number of threads must not matter."""
    results = {}
    batch = single_request(lone.case.rows, lone.sample_rows)
    for isa in ISAS if not lone.tiles else ["amx"]:
        by_threads = [
            NativeGraph(lone.graph_of(output), lone.graph.values, isa=isa, threads=threads).run(batch)
            for threads in (1, 2)
        ]
        np.testing.assert_array_equal(by_threads[0], by_threads[1])
        results[isa] = by_threads[0]
    return results


WAYS = [(case, False) for case in ROW_CASES if case.op != "embed"]
if "amx" in ISAS:
    WAYS += [(case, True) for case in ROW_CASES if reads_codes(case)]


@pytest.mark.parametrize(("case", "tiles"), WAYS, ids=lambda value: getattr(value, "name", "tiles" if value else ""))
def test_row_operator(case: RowCase, tiles: bool) -> None:
    lone = Lone(case, tiles)
    if case.op == "quantize":  # the truth before rounding is the input itself
        expected = [(lone.inputs[0].astype(np.float64), lone.inputs[0])]
    else:
        expected = reference(case.op, lone.inputs, lone.attrs, codes=lone.codes, terms=lone.terms)
    for output, (truth, straightforward) in zip(lone.outputs, expected, strict=True):
        for raw in run_everywhere(lone, output).values():
            assert_accurate(raw, output.dtype, truth, straightforward)


@pytest.mark.parametrize("case", [c for c in ROW_CASES if c.op == "quantize"], ids=lambda c: c.name)
def test_quantized_activations_are_exactly_as_declared(case: RowCase) -> None:
    """From the same fp32 numbers, every backend must make the same codes and scales."""
    lone = Lone(case)
    x = lone.inputs[0][: case.rows]
    for raw in run_everywhere(lone, lone.outputs[0]).values():
        got = decode(raw, lone.outputs[0].dtype)
        if isinstance(got, Q8):
            expected = quantize_q8(x)
            np.testing.assert_array_equal(got.codes, expected.codes)
            np.testing.assert_array_equal(got.scales, expected.scales)
        else:
            np.testing.assert_array_equal(got, rounded(x, "bf16"))


@pytest.mark.parametrize("case", [c for c in ROW_CASES if c.op == "embed"], ids=lambda c: c.name)
def test_embedding_is_exact(case: RowCase) -> None:
    assert case.weight
    fmt, width = FORMATS[case.weight[0]], case.weight[1]
    rng = np.random.default_rng(seed_of(case))
    data = random_matrix(fmt, 75, width, rng)
    graph = LoneGraph(case.rows, case.rows)
    output = graph.embed(graph.token_ids, graph.stored("table", (75, width), fmt, data))
    batch = single_request(case.rows)
    batch.token_ids[:] = ids = rng.integers(0, 75, case.rows)
    for isa in ISAS:
        raw = NativeGraph(graph.build(logits=output), graph.values, isa=isa, threads=2).run(batch)
        np.testing.assert_array_equal(decode(raw, "f32"), dequantize(fmt, data, (75, width))[ids])


@pytest.mark.parametrize("isa", ISAS)
def test_groups_with_two_extremes_are_quantized_as_declared(isa: str) -> None:
    """Signs, ties, and the other sign's greatest magnitude around 112/127 of the greatest."""
    rng = np.random.default_rng(1)
    x = rng.uniform(-0.5, 0.5, (48, 64)).astype(np.float32)
    x[:, 3::32] = rng.choice([1, -1], (48, 2))
    x[:, 20::32] = -x[:, 3::32] * (rng.choice([0, 100, 111, 112, 113, 120, 127], (48, 2)) / np.float32(127))
    x[5], x[6], x[7, :32] = np.abs(x[5]), -np.abs(x[6]), 0
    graph = LoneGraph(48, 48)
    (out,) = graph.emit("quantize", [graph.activation("x", x)], {"to": "q8"})
    got = decode(NativeGraph(graph.build(logits=out), graph.values, isa=isa, threads=1).run(single_request(48)), "q8")
    assert isinstance(got, Q8)
    np.testing.assert_array_equal(got.codes, quantize_q8(x).codes)
    np.testing.assert_array_equal(got.scales, quantize_q8(x).scales)


@pytest.mark.parametrize("fill", ["1", "-1", "mixed"])
@pytest.mark.parametrize(
    ("fmt", "code"),
    [("q4_0", 0xFF), ("q4_0", 0x00), ("q4_1", 0xFF), ("q4_1", 0x0F), ("q4_1", 0xF0), ("q8_0", 0x7F), ("q8_0", 0x80)],
)
def test_sums_of_the_largest_products_do_not_overflow(fmt: str, code: int, fill: str) -> None:
    """Where products are first summed in 16 bits, or codes added in 8, these are the sums that fill them."""
    rows, n, k = 70, 40, 64
    info = FORMATS[fmt]
    head = np.array([1, 0][: 1 + info.has_minimum], "<f2").view(np.uint8)  # scale 1, minimum 0
    group = np.concatenate([head, np.full(32 if fmt == "q8_0" else 16, code, np.uint8)])
    data = np.tile(group, n * k // 32)
    graph = LoneGraph(rows, rows)
    extremes = np.random.default_rng(0).choice(np.float32([127, -112]), (rows, k)) / np.float32(127)
    x = extremes if fill == "mixed" else np.full((rows, k), float(fill), np.float32)
    values = graph.emit("quantize", [graph.activation("x", x)], {"to": "q8"})
    (output,) = graph.emit("linear", [*values, graph.stored("w", (n, k), info, data)], {})
    weights = dequantize(info, data, (n, k)).T.astype(np.float64)
    expected, most = x.astype(np.float64) @ weights, np.abs(x).astype(np.float64) @ np.abs(weights)
    for isa in ISAS:
        raw = NativeGraph(graph.build(logits=output), graph.values, isa=isa, threads=2).run(single_request(rows))
        assert (np.abs(decode(raw, "f32") - expected) <= 1e-6 * most).all()


@pytest.mark.parametrize("fmt", ["f32", "bf16", "q4_0", "q4_1", "q8_0", "q4_1 tiles", "q8_0 tiles"])
@pytest.mark.parametrize("isa", ISAS)
def test_a_row_does_not_depend_on_the_rows_beside_it(isa: str, fmt: str) -> None:
    """One row alone, and the same row anywhere among others, whatever register block it falls into."""
    fmt, _, tiles = fmt.partition(" ")
    if tiles and isa != "amx":
        pytest.skip("multiplies no tiles")
    lone = Lone(RowCase("linear", 150, (64,), (fmt, 170)), bool(tiles))
    graph = lone.graph_of(lone.outputs[0])
    whole = NativeGraph(graph, lone.graph.values, isa=isa, threads=1).run(single_request(150))
    for threads in (1, 2, 3, 4, 6):
        native = NativeGraph(graph, lone.graph.values, isa=isa, threads=threads)
        for rows in (*range(1, 27), 30, 31, 32, 33, 64, 65, 97, 130, 137, 150):
            np.testing.assert_array_equal(native.run(single_request(rows)), whole[:rows])


@pytest.mark.parametrize(
    ("fmt", "width"), [("bf16", 12288), ("q4_1", 12288), ("q8_0", 12288), ("q4_1", 36864), ("q4_1", 49152)]
)
def test_long_rows_are_multiplied_a_few_at_a_time(fmt: str, width: int) -> None:
    """What does not fit a thread's scratch memory at once gives the same bits in pieces."""
    lone = Lone(RowCase("linear", 70, (width,), (fmt, 40)), ISAS[0] == "amx" and fmt[0] == "q")
    graph = lone.graph_of(lone.outputs[0])
    native = NativeGraph(graph, lone.graph.values, isa=ISAS[0], threads=1)
    whole = native.run(single_request(70))
    for rows in (1, 20, 40):
        np.testing.assert_array_equal(native.run(single_request(rows)), whole[:rows])


@pytest.mark.parametrize("isa", ISAS)
def test_numbers_too_small_to_invert_still_quantize(isa: str) -> None:
    """127 / extent overflows below 4e-37; the codes must stay in range and the numbers as good as zero."""
    lone = Lone(RowCase("quantize", 4, (64,), attrs=(("to", "q8"),)))
    table = lone.graph.values["x0.table"].tensor.data
    scaled = table.view(np.float32) * np.float32(1e-39)
    lone.graph.stored("x0.table", (ENOUGH_ROWS, 64), FORMATS["f32"], quantize(FORMATS["f32"], scaled))
    raw = NativeGraph(lone.graph_of(lone.outputs[0]), lone.graph.values, isa=isa, threads=1).run(single_request(4))
    got = decode(raw, "q8")
    assert isinstance(got, Q8) and np.abs(got.values()).max() < np.finfo(np.float32).tiny


@pytest.mark.parametrize("isa", ISAS)
def test_one_nan_anywhere_makes_its_group_nan(isa: str) -> None:
    """Numbers that are not must reach the logits, where the engine refuses them: codes alone would hide them."""
    g = LoneGraph(32, 32)
    overflow = np.full((32, 64), 1.0, np.float32)
    np.fill_diagonal(overflow, 3e38)  # row t is infinite, then NaN, at column t
    x = g.activation("overflow", overflow)
    nan = g.mul(g.mul(x, x), g.activation("zero", np.zeros((32, 64), np.float32)))
    (out,) = g.emit("quantize", [nan], {"to": "q8"})
    raw = NativeGraph(g.build(logits=out), g.values, isa=isa, threads=1).run(single_request(32))
    groups = np.ascontiguousarray(raw).view(np.uint8).reshape(len(raw), -1, 48)
    scales = np.ascontiguousarray(groups[:, :, 32:36]).view(np.float32)[..., 0]
    assert np.isnan(scales[:, 0]).all() and (scales[:, 1] == 0).all()


@pytest.mark.parametrize("isa", ISAS)
def test_codes_beside_infinities_stay_in_range(isa: str) -> None:
    """Kernels count on the range of the codes even where the result can be no number."""
    g = LoneGraph(32, 32)
    overflow = np.random.default_rng(0).uniform(-1, 1, (32, 64)).astype(np.float32)
    np.fill_diagonal(overflow, 3e38)
    x = g.activation("overflow", overflow)
    for sign in (1, -1):
        infinite = g.mul(g.mul(x, x), g.activation(f"sign {sign}", np.full((32, 64), sign, np.float32)))
        (out,) = g.emit("quantize", [infinite], {"to": "q8"})
        raw = NativeGraph(g.build(logits=out), g.values, isa=isa, threads=1).run(single_request(32))
        with np.errstate(invalid="ignore"):
            got = decode(raw, "q8")  # which checks the range
        assert isinstance(got, Q8) and np.isinf(got.scales[:, 0]).all() and np.isfinite(got.scales[:, 1]).all()
