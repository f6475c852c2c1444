"""Compares a `ridgeline bench -o json` with a stored one: exit status 1 where it got slower.

    python bench/against_baseline.py OUTPUT BASELINE [--threshold 0.95]

OUTPUT holds the benchmark's output, whose last line is JSON. Without a BASELINE yet, this one becomes it. A figure
fails that is below the threshold times its baseline: tokens a second of prefill, and of decode at each batch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def figures(report: dict[str, Any]) -> dict[str, float]:
    """Tokens a second by test."""
    found = {"prefill": report["pp_tok_s"]} if report.get("pp_tok_s") else {}
    return found | {f"decode b={batch}": speed for batch, speed in report.get("tg_tok_s", {}).items()}


def slower(now: dict[str, float], before: dict[str, float], threshold: float) -> list[str]:
    """A line for each figure of the baseline that is missing or too slow."""
    lines = []
    for name, old in before.items():
        new = now.get(name)
        if new is None:
            lines.append(f"{name}: not measured, {old:.1f} tokens/s before")
        elif new < threshold * old:
            lines.append(f"{name}: {new:.1f} tokens/s, {old:.1f} before: {new / old:.0%}")
    return lines


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("baseline", type=Path)
    parser.add_argument("--threshold", type=float, default=0.95)
    options = parser.parse_args()
    try:
        report = json.loads(options.output.read_text().strip().splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        sys.exit(f"{options.output}: no benchmark's output: {error}")
    now = figures(report)
    if not options.baseline.exists():
        options.baseline.parent.mkdir(parents=True, exist_ok=True)
        options.baseline.write_text(json.dumps(now) + "\n")
        print(f"{options.baseline} is new: {now}")
        return
    before = json.loads(options.baseline.read_text())
    for name, speed in now.items():
        print(f"{name}: {speed:.1f} tokens/s" + (f", {speed / before[name]:.2f} of before" if name in before else ""))
    worse = slower(now, before, options.threshold)
    if worse:
        sys.exit("\n".join(worse))


if __name__ == "__main__":
    main()
