"""Tables of operators: what binds a row, what a table says, and the page made of it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from math import log10

import pytest

from ridgeline.api.profile import as_dict, render
from ridgeline.core.hardware import Peaks
from ridgeline.graph.cost import Load
from ridgeline.graph.roofline import roofline
from ridgeline.perf.operators import ADVICE, OpRow, OpTable, operator_costs, ordered
from ridgeline.perf.page import make_page
from tests.invariance.small_models import model_of

PEAKS = Peaks(100e9, 2e12, 1e12, 0.5e12)


def row(name: str = "linear x", seconds: float = 1.0, **values: object) -> OpRow:
    return OpRow(name, **{"kind": "operator", "calls": 1, "seconds": seconds, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "binds"),
    [
        ({"bound": 0.7, "limit": "memory"}, "memory"),
        ({"bound": 0.7, "limit": "compute"}, "compute"),
        ({"bound": 0.3, "limit": "memory"}, "instructions"),
        ({}, "instructions"),
        ({"bound": 0.7, "limit": "memory", "waiting": 0.4}, "overhead"),
        ({"bound": 0.2, "limit": "memory", "waiting": 0.31, "imbalance": 0.4}, "imbalance"),
        ({"bound": 0.3, "limit": "memory", "occupancy": 0.1}, "occupancy"),
        ({"bound": 0.3, "limit": "memory", "occupancy": 0.5}, "instructions"),
        ({"bound": 0.7, "limit": "memory", "occupancy": 0.1}, "memory"),
        ({"kind": "host"}, "host"),
        ({"kind": "runtime"}, "overhead"),
    ],
)
def test_what_binds_a_row(values: dict[str, object], binds: str) -> None:
    assert row(**values).binds == binds
    assert binds in ADVICE


def table() -> OpTable:
    rows = [
        row("prepare", 0.05, kind="runtime"),
        row("linear <q&k>", 0.5, bytes=40e9, ops=80e9, bound=0.4, limit="memory", calls=30, waiting=0.02),
        row("attention", 0.2, bytes=5e9, ops=5e9, bound=0.05, limit="memory", imbalance=0.1),
        row("norm", 0.1),
        row("schedule", 0.1, kind="host"),
    ]
    return OpTable("decode, batch 1", 1.0, 4, ordered(rows), PEAKS, 8, 4, (0.005, -0.01, 0.02), ("a note",))


def test_rows_in_order_and_what_is_in_none() -> None:
    made = table()
    assert [r.name for r in made.rows] == ["linear <q&k>", "attention", "norm", "prepare", "schedule"]
    assert made.unattributed == pytest.approx(0.05)
    assert made.total("operator") == pytest.approx(0.8)
    assert made.share == pytest.approx(0.45)
    assert made.verdict().startswith("50% of the step is memory bandwidth") and made.verdict().endswith("linear <q&k>")


def test_the_text() -> None:
    text = "\n".join(render(table()))
    assert "decode, batch 1: 1000.000 ms, 4 tokens/s, 45% of the roofline" in text
    linear = next(line for line in text.splitlines() if line.startswith("linear"))
    assert linear.split()[2:] == ["30", "500000.0", "50.0%", "80.0", "160", "80%", "4%", "0%", "memory"]
    assert "counters on, a step takes +0.50% (-1.00% to +2.00% with 95% confidence: median of 8 pairs" in text
    assert "a note" in text
    assert as_dict(table())["rows"][0]["roofline_share"] == pytest.approx(0.8)


class Pieces(HTMLParser):
    """Tags and addresses of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_stands_alone_and_its_plot_is_well_formed() -> None:
    page = make_page([table(), table()], "a <model>")
    pieces = Pieces()
    pieces.feed(page)
    assert pieces.addresses == [] and "@import" not in page and "url(" not in page and "script" not in pieces.tags
    assert "Profile of a &lt;model&gt;" in page and "linear &lt;q&amp;k&gt;" in page and "<q&k>" not in page
    assert pieces.tags.count("svg") == 2
    plot = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    dots = plot.findall("circle")
    assert len(dots) == 2  # the norm streams nothing
    assert all(0 < float(dot.attrib["cx"]) < 860 and 0 < float(dot.attrib["cy"]) < 430 for dot in dots)
    words = "".join(text.text or "" for text in plot.findall("text"))
    assert "100.0 GB/s" in words and "int8 2,000 GOP/s" in words and "attention" in words


def test_a_dot_lies_on_the_slope_where_its_operator_is_at_the_roofline() -> None:
    """At 80% of the roofline a dot is log10(0.8) of a decade under the line, wherever it is."""
    page = make_page([table()], "x")
    plot = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    slope = next(p for p in plot.findall("path") if "L" in p.attrib["d"])
    (x0, y0), (x1, y1) = (map(float, part.split()) for part in slope.attrib["d"][1:].split("L"))
    ridge, start = 20.0, 0.1  # operations for each byte at the ends of the slope
    at = x0 + (x1 - x0) * log10(2.0 / start) / log10(ridge / start)  # the linear's intensity is 2
    decade = (y0 - y1) / log10(ridge / start)
    dot = plot.findall("circle")[0]
    assert float(dot.attrib["cx"]) == pytest.approx(at, abs=0.2)
    line = y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    assert float(dot.attrib["cy"]) - line == pytest.approx(-log10(0.8) * decade, abs=0.2)


def test_a_table_without_a_plot() -> None:
    made = OpTable("t", 1.0, 1, (row("norm"),), PEAKS)
    assert "No operator here" in make_page([made], "x")
    assert OpTable("t", 1.0, 1, (), PEAKS).verdict() == "nothing was measured"


def test_costs_by_label_are_the_plans() -> None:
    plan, _ = model_of("q4_1", "generic")
    loads = [Load.of([(0, 8)]), Load.of([(8, 8)])]
    costs = operator_costs(plan, loads, PEAKS)
    total = sum(cost.streamed_bytes for cost, _, _ in costs.values())
    assert total == pytest.approx(sum(plan.cost(load).streamed_bytes for load in loads))
    assert costs["attention"][0].kv_read > 0 and costs["rope_kv_write"][2] == ""
    one = [op for s in plan.segments for op in s.ops if op.label == "linear q+k+v"]
    assert len(one) == 2
    expected = sum(roofline(op.cost(load), PEAKS).seconds for op in one for load in loads)
    assert costs["linear q+k+v"][1] == pytest.approx(expected)
