"""bench/against_baseline.py: what counts as slower."""

from __future__ import annotations

from bench.against_baseline import figures, slower


def test_slower_and_missing_figures_are_named() -> None:
    now = figures({"pp_tok_s": 100.0, "tg_tok_s": {"1": 50.0, "8": 190.0}})
    assert slower(now, {"prefill": 100.0, "decode b=1": 52.0, "decode b=8": 200.0}, 0.95) == []
    lines = slower(now, {"prefill": 120.0, "decode b=32": 300.0}, 0.95)
    assert len(lines) == 2 and lines[0].startswith("prefill: 100.0") and "not measured" in lines[1]
