"""A page of profile tables: one HTML file that needs nothing beside it, with a roofline plot for each table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import ceil, floor, log10

from ridgeline.perf.operators import ADVICE, OpRow, OpTable

WIDTH, HEIGHT = 860, 430
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 20, 48  # around the plot, pixels
LABEL = 13  # pixels between the lines of two labels

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfa; --ink: #1d1f21; --soft: #6a6f76; --line: #d9d9d4; --roof: #40464d;
  --memory: #2a6fb0; --compute: #b3541e; --instructions: #7d4aa8; --overhead: #a3234b; --imbalance: #a07800;
  --occupancy: #00796b; --host: #6a6f76; }
@media (prefers-color-scheme: dark) { :root { --page: #17191c; --ink: #e8e8e4; --soft: #9aa0a8; --line: #363a40;
  --roof: #b9bec5; --memory: #6db3f2; --compute: #f0955a; --instructions: #c39be8; --overhead: #f0708f;
  --imbalance: #e0b93c; --occupancy: #4fc3b0; --host: #9aa0a8; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 920px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; border-top: 1px solid var(--line);
  padding-top: 1rem; }
p.verdict { font-weight: 600; } p.soft, figcaption, dd { color: var(--soft); } figure { margin: 1rem 0; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 2px 6px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, th.text, td.text { text-align: left; }
td.bar { width: 150px; } td.bar div { display: flex; height: 9px; }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif; } svg text.soft { fill: var(--soft); }
svg { width: 100%; height: auto; }
dt { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; } dd { margin: 0; }
"""

COLUMNS = ("calls", "µs", "of step", "GB/s", "GOP/s", "of roofline")


def make_page(tables: Sequence[OpTable], title: str) -> str:
    """The page: a section for each table, with its verdict, its plot and its rows."""
    name = escape(f"Profile of {title}")
    sections = "\n".join(_section(table) for table in tables)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{STYLE}</style></head>\n'
        f"<body><h1>{name}</h1>\n{sections}\n{_legend()}</body></html>\n"
    )


def _section(table: OpTable) -> str:
    peaks = table.peaks
    facts = [
        f"{table.seconds * 1e3:.3f} ms a step",
        f"{table.tokens / table.seconds:,.0f} tokens/s",
        f"{table.share:.0%} of the roofline",
        f"peaks {peaks.bandwidth / 1e9:.1f} GB/s, int8 {peaks.int8 / 1e9:,.0f} and bf16 {peaks.bf16 / 1e9:,.0f} GOP/s",
    ]
    if table.overhead is not None:
        facts.append("counters add {:+.2%} ({:+.2%} to {:+.2%})".format(*table.overhead))
    notes = "".join(f'<p class="soft">{escape(note)}</p>' for note in table.notes)
    return (
        f"<section><h2>{escape(table.title)}</h2>\n"
        f'<p class="verdict">{escape(table.verdict())}.</p>\n<p class="soft">{escape(" · ".join(facts))}</p>{notes}\n'
        f"<figure>{_plot(table)}<figcaption>A dot for each operator that streams bytes and multiplies, its area the "
        "operator's share of the step, its colour what binds it. On the slope the memory is the limit, under a flat "
        "line arithmetic of that kind; the distance to the line is what is left to gain.</figcaption></figure>\n"
        f'<div class="wide">{_rows(table)}</div></section>'
    )


def _rows(table: OpTable) -> str:
    last = ("", "warps") if table.counts_warps else ("waits", "idle")
    head = "".join(f"<th>{name}</th>" for name in (*COLUMNS, *last))
    longest = max((row.seconds for row in table.rows), default=1.0) or 1.0
    lines = [f'<table><tr><th>part of the step</th>{head}<th></th><th class="text">binds</th></tr>']
    for row in table.rows:
        cells = [
            f"{row.calls:.0f}",
            f"{row.seconds * 1e6:,.1f}",
            f"{row.seconds / table.seconds:.1%}",
            f"{row.gb_s:.1f}" if row.bytes else "",
            f"{row.gop_s:,.0f}" if row.ops else "",
            f"{row.share:.0%}" if row.limit else "",
            *_waits(row, table),
        ]
        numbers = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(
            f"<tr><td>{escape(row.name)}</td>{numbers}<td class=bar>{_bar(row, longest)}</td>"
            f'<td class="text" style="color:var(--{row.binds})">{row.binds}</td></tr>'
        )
    left = table.unattributed
    rest = f"<td></td><td>{left * 1e6:,.1f}</td><td>{left / table.seconds:.1%}</td>" + "<td></td>" * 7
    return "\n".join([*lines, f"<tr><td>in no row</td>{rest}</tr></table>"])


def _waits(row: OpRow, table: OpTable) -> tuple[str, str]:
    """The last two numbers of a row: waits and idle threads, or active warps."""
    if row.kind != "operator" or not row.seconds:
        return "", ""
    if table.counts_warps:
        return "", "" if row.occupancy is None else f"{row.occupancy:.0%}"
    return f"{row.waiting / row.seconds:.0%}", f"{row.imbalance / row.seconds:.0%}"


def _bar(row: OpRow, longest: float) -> str:
    """A row's time: at its roofline, beyond it, threads idle, all waiting."""
    idle, waits = min(row.imbalance, row.seconds), min(row.waiting, row.seconds)
    roof = min(row.bound, max(0.0, row.seconds - idle - waits))
    beyond = max(0.0, row.seconds - roof - idle - waits)
    kind = "host" if row.kind == "host" else "overhead" if row.kind == "runtime" else "instructions"
    parts = [(roof, row.limit or kind), (beyond, kind), (idle, "imbalance"), (waits, "overhead")]
    return "<div>" + "".join(
        f'<i style="width:{100 * seconds / longest:.2f}%;background:var(--{colour})"></i>'
        for seconds, colour in parts
        if seconds > 0
    ) + "</div>"  # fmt: skip


class _Scale:
    """A logarithmic axis from ``low`` to ``high`` onto pixels ``start`` to ``stop``."""

    def __init__(self, low: float, high: float, start: float, stop: float) -> None:
        self.low, self.high, self._start = floor(log10(low)), ceil(log10(high)), start
        self.high = max(self.high, self.low + 1)
        self._each = (stop - start) / (self.high - self.low)

    def __call__(self, value: float) -> float:
        return self._start + (log10(value) - self.low) * self._each

    def decades(self) -> list[float]:
        """Powers of ten on it."""
        return [10.0**k for k in range(self.low, self.high + 1)]


def _plot(table: OpTable) -> str:
    dots = [row for row in table.of_kind("operator") if row.bytes and row.ops and row.seconds]
    bandwidth = table.peaks.bandwidth
    kinds = [(n, p) for n in ("int8", "bf16", "f32") if (p := getattr(table.peaks, n)) > 0]
    if not dots or bandwidth <= 0:
        return "<p class=soft>No operator here both streams bytes and multiplies.</p>"
    ridges = [peak / bandwidth for _, peak in kinds]
    intensities = [row.ops / row.bytes for row in dots]
    rates = [row.ops / row.seconds for row in dots]
    x = _Scale(min(intensities + ridges) / 2, max(intensities + ridges) * 3, LEFT, WIDTH - RIGHT)
    y = _Scale(min(rates) / 2e9, max(p for _, p in kinds) * 1.5e-9, HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Roofline of {escape(table.title)}">']
    parts += _axes(x, y) + _roofs(x, y, kinds, bandwidth) + _dots(x, y, dots, table.seconds)
    return "\n".join([*parts, "</svg>"])


def _axes(x: _Scale, y: _Scale) -> list[str]:
    right, low, parts = WIDTH - RIGHT, HEIGHT - BOTTOM, []
    for value in x.decades():
        at = x(value)
        parts.append(f'<path d="M{at:.1f} {TOP}V{low}" stroke="var(--line)"/>')
        parts.append(f'<text class="soft" x="{at:.1f}" y="{low + 16}" text-anchor="middle">{value:g}</text>')
    for value in y.decades():
        at = y(value)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{right}" stroke="var(--line)"/>')
        parts.append(f'<text class="soft" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:,g}</text>')
    under, middle = (LEFT + right) / 2, (TOP + low) / 2
    parts.append(f'<text x="{under}" y="{HEIGHT - 8}" text-anchor="middle">operations for each byte of memory</text>')
    parts.append(
        f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">10⁹ operations/s</text>'
    )
    return parts


def _roofs(x: _Scale, y: _Scale, kinds: Sequence[tuple[str, float]], bandwidth: float) -> list[str]:
    """The slope that the memory allows, up to the highest peak, and a flat line for each kind of arithmetic."""
    top = max(peak for _, peak in kinds)
    first = max(10.0**x.low, 10.0**y.low * 1e9 / bandwidth)
    start, ridge = (x(first), y(first * bandwidth / 1e9)), (x(top / bandwidth), y(top / 1e9))
    parts = [
        f'<path d="M{start[0]:.1f} {start[1]:.1f}L{ridge[0]:.1f} {ridge[1]:.1f}" stroke="var(--roof)" '
        'stroke-width="2" fill="none"/>'
    ]
    for name, peak in kinds:
        at, end = (x(peak / bandwidth), y(peak / 1e9)), WIDTH - RIGHT
        parts.append(f'<path d="M{at[0]:.1f} {at[1]:.1f}H{end}" stroke="var(--roof)" stroke-width="2"/>')
        parts.append(f'<text x="{end - 4}" y="{at[1] - 5:.1f}" text-anchor="end">{name} {peak / 1e9:,.0f} GOP/s</text>')
    half = (start[0] + ridge[0]) / 2, (start[1] + ridge[1]) / 2
    parts.append(
        f'<text x="{half[0] - 8:.1f}" y="{half[1] - 8:.1f}" text-anchor="end">{bandwidth / 1e9:.1f} GB/s</text>'
    )
    return parts


def _dots(x: _Scale, y: _Scale, rows: Sequence[OpRow], step: float) -> list[str]:
    parts: list[str] = []
    taken: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda r: y(r.ops / r.seconds / 1e9)):
        cx, cy = x(row.ops / row.bytes), y(row.ops / row.seconds / 1e9)
        radius = 3 + 16 * (row.seconds / step) ** 0.5
        left = cx > WIDTH * 0.7
        tx, ty = cx + (-radius - 5 if left else radius + 5), cy + 4
        while any(abs(ty - other[1]) < LABEL and abs(tx - other[0]) < 130 for other in taken):
            ty += 2
        taken.append((tx, ty))
        what = f"{row.name}: {row.seconds * 1e6:,.1f} µs, {row.share:.0%} of its roofline, {row.binds}"
        parts.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{radius:.1f}" fill="var(--{row.binds})" fill-opacity=".55" '
            f'stroke="var(--{row.binds})"><title>{escape(what)}</title></circle>'
        )
        if abs(ty - cy - 4) > LABEL:
            end = tx + (2 if left else -2)
            parts.append(
                f'<path d="M{cx:.1f} {cy:.1f}L{end:.1f} {ty - 4:.1f}" stroke="var(--soft)" stroke-width=".6"/>'
            )
        anchor = "end" if left else "start"
        parts.append(f'<text x="{tx:.1f}" y="{ty:.1f}" text-anchor="{anchor}">{escape(row.name)}</text>')
    return parts


def _legend() -> str:
    entries = "".join(
        f'<dt style="color:var(--{name})">{name}</dt><dd>{escape(text)}</dd>' for name, text in ADVICE.items()
    )
    return (
        "<section><h2>What binds, and what helps</h2>\n"
        '<p class="soft">A bar is a row\'s time: at its roofline in the colour of memory or compute, beyond it in that '
        "of instructions, then threads idle while another worked (imbalance), then all waiting (overhead).</p>\n"
        f"<dl>{entries}</dl></section>\n"
    )
