"""How a benchmark's report is shown: llama-bench's table, or one line of JSON."""

from __future__ import annotations

import json
from pathlib import Path

from ridgeline.engine.load import Runtime
from ridgeline.perf.bench import Report
from ridgeline.perf.machine import usable_threads


def print_table(runtime: Runtime, report: Report) -> None:
    """Print a table in llama-bench's manner, with what each test reached of the machine."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.MARKDOWN)
    table.add_column("model")
    for name in ("size", "threads", "test", "t/s", "GB/s", "of GB/s", "GOP/s", "roofline"):
        table.add_column(name, justify="right", no_wrap=True)
    path = Path(runtime.model.file.path)
    size = f"{path.stat().st_size / 2**20:.2f} MiB"
    threads = str(runtime.config.threads or usable_threads())
    for row in report.rows:
        speed = f"{row.mean:.2f} ± {row.deviation:.2f}"
        rates = (f"{row.gb_s:.1f}", f"{row.peak_gb_s:.1f}", f"{row.gop_s:.0f}", f"{row.share:.0%}")
        table.add_row(path.stem, size, threads, row.test, speed, *rates)
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    console.print(table)
    peaks = report.peaks
    console.print(
        f"peaks: {peaks.bandwidth / 1e9:.1f} GB/s, int8 {peaks.int8 / 1e9:.0f}, bf16 {peaks.bf16 / 1e9:.0f}, "
        f"f32 {peaks.f32 / 1e9:.0f} GOP/s; load {report.load_s:.2f} s, "
        f"start to first token {report.first_token_s:.2f} s, peak memory {report.peak_rss_mb:.0f} MB",
        soft_wrap=True,
    )


def as_json(report: Report) -> str:
    """One line: pp_tok_s, tg_tok_s by batch, load_s, first_token_s, peak_rss_mb, and details by test."""
    prefill = [r for r in report.rows if r.test.startswith("pp")]
    decode = {r.test.partition(" b")[2] or "1": r for r in report.rows if r.test.startswith("tg")}
    peaks = report.peaks
    return json.dumps(
        {
            "pp_tok_s": prefill[0].mean if prefill else None,
            "tg_tok_s": {batch: r.mean for batch, r in decode.items()},
            "load_s": report.load_s,
            "first_token_s": report.first_token_s,
            "peak_rss_mb": report.peak_rss_mb,
            "tests": {
                r.test: {
                    "mean": r.mean,
                    "deviation": r.deviation,
                    "tok_s": r.rates,
                    "gb_s": r.gb_s,
                    "peak_gb_s": [b / 1e9 for b in r.bandwidths],
                    "gop_s": r.gop_s,
                    "roofline_share": r.share,
                }
                for r in report.rows
            },
            "peaks": {
                "gb_s": peaks.bandwidth / 1e9,
                "int8_gop_s": peaks.int8 / 1e9,
                "bf16_gop_s": peaks.bf16 / 1e9,
                "f32_gop_s": peaks.f32 / 1e9,
            },
        }
    )
