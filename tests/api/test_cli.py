"""The command line as a user meets it: exit codes, and one line for each error."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "ridgeline"]


def ridgeline(*args: str, **options: str) -> subprocess.CompletedProcess[str]:
    """The result of one command; ``options`` are environment variables."""
    env = {**os.environ, **options}
    return subprocess.run([*COMMAND, *args], cwd=ROOT, capture_output=True, text=True, env=env, timeout=120)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no command given"),
        (["fly"], "No such command"),
        (["run"], "Missing argument 'MODEL'"),
        (["run", "smollm2"], "Missing option '-p'"),
        (["run", "smollm2", "-p", ""], "the prompt is empty"),
        (["run", "smollm2", "-p", "x", "-n", "0"], "max_tokens must be an integer of at least 1"),
        (["run", "smollm2", "-p", "x", "-n", "many"], "Invalid value for '-n'"),
        (["run", "smollm2", "-p", "x", "--temperature", "-1"], "temperature must be"),
        (["run", "smollm2", "-p", "x", "--top-p", "2"], "top_p must be"),
        (["run", "smollm2", "-p", "x", "--threads", "0"], "threads must be"),
        (["run", "smollm2", "-p", "x", "--frobnicate"], "No such option"),
        (["bench", "smollm2", "-b", "1;2"], "--batch must be numbers"),
        (["bench", "smollm2", "-b", "0"], "batches of at least 1"),
        (["bench", "smollm2", "-p", "-5"], "lengths of at least 0"),
        (["bench", "smollm2", "-o", "xml"], "--output must be table or json"),
        (["bench", "smollm2", "--backend", "cuda", "--device", "emulated"], "the emulated device has no speed"),
    ],
)
def test_usage_errors_are_one_line_and_code_2(args: list[str], message: str) -> None:
    result = ridgeline(*args)
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert message in result.stderr


def test_a_missing_or_broken_file_is_one_line_and_code_1(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(20))
    empty = tmp_path / "empty.gguf"
    empty.write_bytes(b"")
    for path in (tmp_path / "none.gguf", broken, empty, tmp_path, tmp_path / ("long" * 100)):
        result = ridgeline("run", str(path), "-p", "x")
        assert result.returncode == 1
        assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
        assert str(path) in result.stderr


def test_the_environment_is_checked_like_a_flag() -> None:
    result = ridgeline("run", "smollm2", "-p", "x", RIDGELINE_ISA="mmx")
    expected = "error: isa must be one of generic, avx2, avx512, amx, got 'mmx'\n"
    assert (result.returncode, result.stderr) == (2, expected)


def test_help_and_version() -> None:
    for args in (["--help"], ["run", "--help"], ["bench", "--help"]):
        result = ridgeline(*args)
        assert result.returncode == 0 and result.stderr == ""
    assert "--max-num-seqs" in ridgeline("run", "--help", COLUMNS="200").stdout
    assert re.fullmatch(r"ridgeline \d+\.\d+\.\d+\n", ridgeline("--version").stdout)


def test_run_streams_and_closes_with_one_line(smollm2_path: Path) -> None:
    result = ridgeline("run", str(smollm2_path), "-p", "The capital of France is", "-n", "8", "--temperature", "0")
    assert result.returncode == 0, result.stderr
    text, _, closing = result.stdout.rstrip("\n").rpartition("\n")
    assert text.startswith(" Paris")
    assert re.fullmatch(
        r"\[8 tokens, first after \d+\.\d\d s, \d+ tokens/s, \d+% of this machine's roofline\]", closing
    )


def test_a_prompt_beyond_the_context_is_code_1(smollm2_path: Path) -> None:
    result = ridgeline("run", "smollm2", "-p", "word " * 40, "--max-model-len", "32")
    assert result.returncode == 1
    assert re.fullmatch(r"error: the prompt has \d+ tokens and the context is 32: [^\n]+\n", result.stderr)


def _heed_interrupts() -> None:
    """What a parent ignores, its children ignore too: a shell's background jobs, for one."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_interrupt_in_the_middle_of_generation_is_code_130(smollm2_path: Path) -> None:
    command = [*COMMAND, "run", "smollm2", "-p", "Once", "-n", "8000", "--ignore-eos"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, preexec_fn=_heed_interrupts) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == b"interrupted\n"


def test_chat_answers_each_line_with_what_was_said_before(smollm2_path: Path) -> None:
    result = subprocess.run(
        [*COMMAND, "chat", "smollm2", "-n", "12", "--temperature", "0"],
        cwd=ROOT,
        input="Which city is the capital of Japan?\nAnd of Italy?\n",  # answers far ahead of the next best
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "Tokyo" in result.stdout and "Rome" in result.stdout


def test_chat_goes_on_after_a_message_that_does_not_fit(smollm2_path: Path) -> None:
    result = subprocess.run(
        [*COMMAND, "chat", "smollm2", "-n", "8", "--temperature", "0", "--max-model-len", "80"],
        cwd=ROOT,
        input="word " * 90 + "\nWhich city is the capital of Japan?\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0
    assert re.fullmatch(r"error: the prompt has \d+ tokens and the context is 80: [^\n]+\n", result.stderr)
    assert "Tokyo" in result.stdout


def test_chat_forgets_the_oldest_turns_when_the_context_is_full(smollm2_path: Path) -> None:
    result = subprocess.run(
        [*COMMAND, "chat", "smollm2", "-n", "8", "--temperature", "0", "--max-model-len", "80"],
        cwd=ROOT,
        input="hello\n" * 3 + "word " * 90 + "\nWhich city is the capital of Japan?\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0 and "The capital" in result.stdout
    refused, told = (
        r"error: the prompt has [^\n]+\n",
        r"\(the context is full: turns forgotten, the oldest first: \d\)\n",
    )
    # What is refused forgets nothing, so the turns before it are there to be forgotten for the last question.
    assert re.fullmatch(rf"({told})*{refused}{told}", result.stderr), result.stderr


def test_chat_fails_when_the_last_question_of_a_file_is_refused(smollm2_path: Path) -> None:
    command = [*COMMAND, "chat", "smollm2", "--max-model-len", "80"]
    result = subprocess.run(command, cwd=ROOT, input="word " * 90, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1 and result.stdout == ""
    assert re.fullmatch(r"error: the prompt has [^\n]+\n", result.stderr)


@pytest.mark.parametrize(
    ("streams", "code", "message"),
    [
        ("<&-", 0, ""),
        ("</dev/null >&-", 1, "error: standard output is closed: nobody could read the result\n"),
        ("</dev/null 2>&-", 0, ""),
    ],
)
def test_streams_that_are_closed_from_the_start(smollm2_path: Path, streams: str, code: int, message: str) -> None:
    for words in ("--version", "chat smollm2"):
        line = f"exec {' '.join(COMMAND)} {words} {streams}"
        result = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert (result.returncode, result.stderr) == (code, message)


def test_output_that_cannot_be_written_is_one_line_and_code_1(smollm2_path: Path) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*COMMAND, "--version"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert result.returncode == 1
    assert re.fullmatch(r"error: [^\n]*No space left[^\n]*\n", result.stderr), result.stderr


def test_more_memory_than_there_is_is_a_usage_error(smollm2_path: Path) -> None:
    for flag, value, found in [
        ("--num-kv-blocks", 2**31 - 1, "num_kv_blocks 2147483647[^\\n]+this machine has"),
        ("--num-kv-blocks", 10**8, "num_kv_blocks 100000000[^\\n]+this machine has"),
        ("--max-num-batched-tokens", 2**28, "for a step's [^\\n]+this machine has"),
    ]:
        result = ridgeline("run", "smollm2", "-p", "x", flag, str(value))
        assert result.returncode == 2
        assert re.fullmatch(rf"error: there is not enough memory [^\n]*{found}[^\n]+\n", result.stderr), result.stderr


def test_bench_prints_a_table_and_one_line_of_json(smollm2_path: Path) -> None:
    result = ridgeline("bench", "smollm2", "-p", "32", "-n", "4", "-b", "1,2", "-r", "2", "-o", "json")
    assert result.returncode == 0, result.stderr
    *table, last = result.stdout.splitlines()
    report = json.loads(last)
    assert report["pp_tok_s"] > 0 and set(report["tg_tok_s"]) == {"1", "2"}
    assert all(report[key] > 0 for key in ("load_s", "first_token_s", "peak_rss_mb"))
    assert report["peak_rss_mb"] < smollm2_path.stat().st_size / 1e6 + 150
    assert all(0 < test["roofline_share"] for test in report["tests"].values())
    rows = [line for line in table if "pp32" in line or "tg4" in line]
    assert len(rows) == 3 and all("±" in row and "%" in row for row in rows)


def test_bench_refuses_what_cannot_fit(smollm2_path: Path) -> None:
    result = ridgeline("bench", "smollm2", "-b", "64", "--max-num-seqs", "31")
    assert result.returncode == 2
    assert result.stderr == "error: a batch of 64 needs --max-num-seqs 64 (now 31)\n"
    result = ridgeline("bench", "smollm2", "-b", "64", "--num-kv-blocks", "512")
    assert result.returncode == 2
    assert "there are 512: lower -n or -b, or give --num-kv-blocks 1152" in result.stderr
