"""``ridgeline profile`` and ``explain --measure`` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ridgeline.api.commands import make_command
from ridgeline.core.errors import ConfigError, RidgelineError
from ridgeline.core.hardware import Peaks
from ridgeline.perf import profile


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks that take no time to measure."""
    monkeypatch.setattr(profile, "peaks_of", lambda *args: Peaks(1e11, 1e12, 1e12, 1e12))


def ridgeline(*args: str) -> None:
    make_command()(list(args), prog_name="ridgeline", standalone_mode=False)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-b", "1;2"], "--batch must be numbers with commas between"),
        (["-o", "xml"], "--output must be table or json"),
        (["-p", "0", "-b", ""], "nothing to profile"),
        (["--context", "0"], "a context of at least 1"),
        (["--html", "/no/such/folder/page.html"], "there is no folder /no/such/folder"),
        (["--nsys", "--ncu"], "give one of them"),
        (["--nsys"], "--nsys looks at a GPU's kernels: give --backend cuda"),
        (["--backend", "reference"], "the reference backend has no counters"),
        (["--backend", "cuda", "--device", "emulated"], "the emulated device has no time to measure"),
        (["--backend", "cuda", "--ncu", "--device", "emulated"], "the emulated device has no time to measure"),
    ],
)
def test_usage_errors(args: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ridgeline("profile", "smollm2", *args)


def test_a_tool_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RidgelineError, match="nsys is not on PATH: install NVIDIA Nsight Systems"):
        ridgeline("profile", "smollm2", "--backend", "cuda", "--nsys")


def test_the_embedded_model(smollm2_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    sizes = ["-p", "16", "-b", "2", "--context", "24", "-n", "4"]
    ridgeline("profile", str(smollm2_path), *sizes, "-o", "json", "--html", str(page))
    *text, last = capsys.readouterr().out.splitlines()
    prompt, decode = json.loads(last)
    assert prompt["title"] == "prefill, 16 tokens" and decode["title"].startswith("decode, batch 2, context 2")
    calls = {row["name"]: row["calls"] for row in decode["rows"]}
    assert calls["linear gate+up"] == 30 and calls["linear embed"] == 1
    assert sum(row["seconds"] for row in decode["rows"]) + decode["unattributed_seconds"] == pytest.approx(
        decode["seconds"]
    )
    assert any(line.startswith("linear down") for line in text)
    assert page.read_text().count("<svg") == 2


def test_explain_shows_what_was_achieved(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ridgeline("explain", str(smollm2_path), "--measure", "--context", "100", "--max-num-seqs", "2")
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("linear gate+up"))
    count, megabytes, _, _, binds, achieved, share, _ = line.removeprefix("linear gate+up").split()
    assert (count, binds) == ("30", "memory") and float(megabytes) > 30
    assert float(achieved) > 0 and share.endswith("%")
    assert "roofline: " in text and "measured: " in text


def test_only_the_files_own_weights_are_measured_here() -> None:
    for more in (["--device", "h100"], ["--weights", "q4_0"]):
        with pytest.raises(ConfigError, match="leave out --device and --weights"):
            ridgeline("explain", "smollm2", "--measure", *more)
