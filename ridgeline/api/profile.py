"""``ridgeline profile``: where a step's time goes, operator by operator."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import ConfigError

if TYPE_CHECKING:
    from ridgeline.perf.operators import OpRow, OpTable

Model = Annotated[str, typer.Argument(help="an alias (smollm2) or the path of a GGUF file")]


def profile(
    model: Model,
    prompt: Annotated[int, typer.Option("-p", "--prompt", help="tokens of the prefill; 0 leaves it out")] = 512,
    batch: Annotated[str, typer.Option("-b", "--batch", help="batch sizes of the decode steps, by commas")] = "1,8",
    context: Annotated[int, typer.Option("--context", help="tokens in the cache of each decoding request")] = 256,
    steps: Annotated[int, typer.Option("-n", "--steps", help="decode steps with counters (and as many without)")] = 128,
    html: Annotated[Path | None, typer.Option("--html", help="write a page with the roofline plot here")] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", help="table, or json for one line of it after the tables")
    ] = "table",
    *,
    engine: dict[str, Any],
) -> None:
    """Show where a model's steps spend their time: each operator beside its roofline, and what binds it."""
    if output not in ("table", "json"):
        raise ConfigError(f"--output must be table or json, got {output!r}")
    batches = numbers("--batch", batch)
    if html is not None and not html.parent.is_dir():
        raise ConfigError(f"--html {html}: there is no folder {html.parent}")
    EngineConfig(model=model, **engine)  # refused before anything is loaded
    from ridgeline.api.llm import LLM
    from ridgeline.perf.profile import run_profile

    tables = run_profile(LLM(model, **engine).runtime, prompt, batches, context, steps)
    show(tables, f"{model}, {engine['threads'] or 'all'} threads", html, output)


def numbers(flag: str, text: str) -> list[int]:
    """Numbers with commas between; empty for none. Raises ConfigError."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"{flag} must be numbers with commas between, such as 1,8, got {text!r}") from None


def show(tables: Sequence[OpTable], title: str, html: Path | None, output: str) -> None:
    """Prints tables, and writes the page and the line of JSON that are asked for."""
    for table in tables:
        print("\n".join(render(table)), end="\n\n")
    if html is not None:
        from ridgeline.perf.page import make_page

        html.write_text(make_page(tables, title))
        print(f"page: {html}")
    if output == "json":
        print(json.dumps([as_dict(table) for table in tables]))


def render(table: OpTable) -> list[str]:
    """A table as lines of text."""
    lines = [
        f"{table.title}: {table.seconds * 1e3:.3f} ms, {table.tokens / table.seconds:,.0f} tokens/s, "
        f"{table.share:.0%} of the roofline",
        f"{'':24}{'calls':>6}{'us':>10}{'step':>7}{'GB/s':>8}{'GOP/s':>8}{'roof':>6}{'waits':>7}{'idle':>6}  binds",
    ]
    lines += [_line(row, table) for row in table.rows]
    lines.append(f"{'(in no row)':30}{table.unattributed * 1e6:>10.1f}{table.unattributed / table.seconds:>7.1%}")
    parts = [f"operators {table.total('operator') / table.seconds:.1%}"]
    parts += [f"{kind} {table.total(kind) / table.seconds:.1%}" for kind in ("runtime", "host") if table.of_kind(kind)]
    lines.append(f"sum: {', '.join(parts)} of the step; mean of the quieter {table.kept} of {table.steps} steps")
    if table.overhead is not None:
        lines.append(f"counters on, a step takes {table.overhead:+.2%} (median of {table.steps} pairs on and off)")
    lines += table.notes
    return [*lines, table.verdict()]


def _line(row: OpRow, table: OpTable) -> str:
    timed = f"{row.name[:24]:24}{row.calls:>6.0f}{row.seconds * 1e6:>10.1f}{row.seconds / table.seconds:>7.1%}"
    if row.kind != "operator":
        return f"{timed}{'':35}  {row.binds}"
    rates = f"{row.gb_s:>8.1f}" if row.bytes else f"{'':8}"
    rates += f"{row.gop_s:>8.0f}" if row.ops else f"{'':8}"
    rates += f"{row.share:>6.0%}" if row.limit else f"{'':6}"
    return f"{timed}{rates}{row.waiting / row.seconds:>7.0%}{row.imbalance / row.seconds:>6.0%}  {row.binds}"


def as_dict(table: OpTable) -> dict[str, Any]:
    """A table for JSON: times in seconds a step, rates in 1e9 a second."""
    return {
        "title": table.title,
        "seconds": table.seconds,
        "tokens": table.tokens,
        "roofline_share": table.share,
        "operators_share": table.total("operator") / table.seconds,
        "unattributed_seconds": table.unattributed,
        "counter_overhead": table.overhead,
        "steps": table.steps,
        "bottleneck": table.verdict(),
        "rows": [
            {
                "name": row.name,
                "kind": row.kind,
                "calls": row.calls,
                "seconds": row.seconds,
                "gb_s": row.gb_s,
                "gop_s": row.gop_s,
                "bound_seconds": row.bound,
                "roofline_share": row.share,
                "waiting_seconds": row.waiting,
                "imbalance_seconds": row.imbalance,
                "occupancy": row.occupancy,
                "binds": row.binds,
            }
            for row in table.rows
        ],
        "peaks": {
            "gb_s": table.peaks.bandwidth / 1e9,
            "int8_gop_s": table.peaks.int8 / 1e9,
            "bf16_gop_s": table.peaks.bf16 / 1e9,
            "f32_gop_s": table.peaks.f32 / 1e9,
        },
    }
