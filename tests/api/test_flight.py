"""Flight records of the embedded model: written on request and on failure, replayed from the command line."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ridgeline import LLM, SamplingParams
from ridgeline.api.replay import replay_file
from ridgeline.backends.cpu import _native
from ridgeline.core.errors import ConfigError, ModelFileError, RidgelineError
from ridgeline.engine.flight import FlightRecord, read_record, write_record
from ridgeline.engine.load_replay import load_replay
from ridgeline.engine.replay import replay

ROOT = Path(__file__).parents[2]
SHARED = "The quick brown fox jumps over the lazy dog, and the lazy dog does not mind at all. " * 2
PROMPTS = [SHARED + "Why?", "1, 2, 3, 1, 2, 3, 1, 2,", SHARED + "What then?", "Once upon a time", "A"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=24, logprobs=3, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=1, max_tokens=20, repetition_penalty=1.2, frequency_penalty=0.3),
    SamplingParams(temperature=1.0, seed=2, n=3, max_tokens=16, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=3, max_tokens=40, logit_bias={284: 2.0}, ignore_eos=True),
]
OPTIONS: dict[str, Any] = {
    "max_num_seqs": 4,
    "max_num_batched_tokens": 24,
    "speculation": "ngram",
    "flight_record_steps": 12,
    "flight_record_logits": True,
}


@pytest.fixture(scope="module")
def written(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[Path]]]:
    """Records of a busy engine, one every few steps: forks, prefix hits, speculation, penalties, preemption."""
    folder = tmp_path_factory.mktemp("flight")
    paths = []
    with LLM(str(smollm2_path), num_kv_blocks=7, **OPTIONS) as llm:
        engine = llm.runtime.engine
        encode = llm.runtime.tokenizer.encode
        groups = [engine.make_requests(encode(p), s) for p, s in zip(PROMPTS, PARAMS, strict=True)]
        engine.submit([r for group in groups for r in group])
        step = 0
        while engine.has_work:
            engine.step()
            step += 1
            if step > 12 and step % 9 == 0:
                paths.append(llm.dump_flight_record(folder / f"{step}.flight"))
        assert engine.stats().preemptions and engine.stats().prefix_hit_tokens and engine.stats().drafts_accepted
    yield folder, paths


def test_every_record_replays_to_the_same_bits(written: tuple[Path, list[Path]]) -> None:
    _, paths = written
    assert len(paths) >= 3
    records = [read_record(p) for p in paths]
    executor = None
    for record in records:
        setup = load_replay(record)
        report = replay(record, setup.executor)
        assert report.identical, report.first
        assert report.logits and report.compared == len(record.steps) == 12 and not setup.notes
        executor = setup.executor
    assert executor is not None
    assert any(r.live for r in records) and any(s.started for r in records for s in r.steps)


def test_threads_do_not_matter_and_a_changed_bit_is_found(written: tuple[Path, list[Path]]) -> None:
    _, paths = written
    text, identical = replay_file(str(paths[1]), None, None, 1)
    assert identical and "identical: tokens, log probabilities and logits, bit for bit" in text
    record = read_record(paths[1])
    step = record.steps[5]
    assert step.output is not None
    changed = bytes([step.output.token_ids[0] ^ 1]) + step.output.token_ids[1:]
    output = msgspec.structs.replace(step.output, token_ids=changed, logits=None)
    steps = [msgspec.structs.replace(s, output=output) if s is step else s for s in record.steps]
    report = replay(msgspec.structs.replace(record, steps=steps), load_replay(record).executor)
    assert report.differing_steps == 1 and report.first is not None
    assert (report.first.step, report.first.what) == (step.number, "token")
    assert report.first.slot >= 0 and report.first.position >= 0


def command(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ridgeline", "replay", *args], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_the_command_reports_and_exits(written: tuple[Path, list[Path]]) -> None:
    folder, paths = written
    result = command(str(paths[0]))
    assert result.returncode == 0, result.stderr
    assert "12 run again" in result.stdout and "bit for bit" in result.stdout
    record = read_record(paths[0])
    step = record.steps[-1]
    assert step.output is not None
    output = msgspec.structs.replace(step.output, accepted=b"\2\0\0\0" + step.output.accepted[4:], logits=None)
    changed = msgspec.structs.replace(record, steps=[*record.steps[:-1], msgspec.structs.replace(step, output=output)])
    result = command(str(write_record(changed, folder / "changed.flight")))
    assert result.returncode == 1 and result.stderr == ""
    assert re.search(rf"DIFFERENT in 1 of 12 steps; first at step {step.number}, slot \d, position \d+", result.stdout)


def test_wrong_files_are_one_line(written: tuple[Path, list[Path]], tmp_path: Path) -> None:
    data = written[1][0].read_bytes()
    for name, content, message in (
        ("none", b"GGUF" + bytes(100), "is not a flight record"),
        ("empty", b"", "is not a flight record"),
        ("short", data[:12], "is cut off"),
        ("cut", data[:-100], "is cut off"),
        ("flipped", data[:-9] + bytes([data[-9] ^ 4]) + data[-8:], "is damaged"),
        ("version", data[:8] + b"\7\0" + data[10:], "has format version 7, and this build reads version 1"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(RidgelineError, match=message) as caught:
            read_record(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    result = command(str(tmp_path / "missing"))
    assert result.returncode == 1 and re.fullmatch(r"error: cannot read [^\n]+\n", result.stderr)


def with_environment(record: FlightRecord, **changes: Any) -> FlightRecord:
    """The record with another environment."""
    return msgspec.structs.replace(record, environment=msgspec.structs.replace(record.environment, **changes))


def test_another_version_model_or_instruction_set_is_refused(
    written: tuple[Path, list[Path]], tmp_path: Path, smollm2_path: Path
) -> None:
    record = read_record(written[1][0])
    with pytest.raises(RidgelineError, match="is of ridgeline 0.0.7 and this is"):
        load_replay(with_environment(record, ridgeline="0.0.7"))
    with pytest.raises(ConfigError, match="needs instruction set neon, which this machine lacks; --isa "):
        load_replay(with_environment(record, isa="neon"))
    with pytest.raises(ConfigError, match="cannot run on this machine"):
        load_replay(record, isa="mmx")
    other = tmp_path / "other.gguf"
    other.write_bytes(smollm2_path.read_bytes()[:-1])
    with pytest.raises(ModelFileError, match="is not the recorded model"):
        load_replay(record, model=str(other))
    with pytest.raises(ModelFileError, match="no model file .* --model"):
        load_replay(with_environment(record, options=record.environment.options | {"model": "/nowhere.gguf"}))
    others = [name for name in _native.available_isas() if name != record.environment.isa]
    if others:
        assert "bits may differ" in load_replay(record, isa=others[0]).notes[0]
    assert "another build" in load_replay(with_environment(record, build="0" * 64)).notes[0]


def fail_at(llm: LLM, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the executor raise at that launch."""
    executor = llm.runtime.executor
    right, count = executor.launch, 0

    def launch(batch: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            raise RidgelineError("out of luck")
        return right(batch)

    monkeypatch.setattr(executor, "launch", launch)


def test_a_failure_writes_a_record_that_names_the_step(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(str(smollm2_path), max_num_seqs=2, flight_record_dir=str(tmp_path / "new")) as llm:
        fail_at(llm, 4, monkeypatch)
        with pytest.raises(RidgelineError, match="out of luck") as caught:
            llm.generate("One, two,", SamplingParams(temperature=0, max_tokens=9))
        (path,) = (tmp_path / "new").iterdir()
        assert str(path) in caught.value.__notes__[0] and path.stat().st_mode & 0o77 == 0
        record = read_record(path)
        assert record.failure is not None and (record.failure.step, record.failure.stage) == (4, "launch")
        assert len(record.steps) == 4 and record.steps[-1].output is None
        result = command(str(path))
        assert result.returncode == 0, result.stderr
        assert "step 4 (launch): RidgelineError: out of luck" in result.stdout and "here it runs" in result.stdout
        llm.generate("One, two,", SamplingParams(temperature=0, max_tokens=2))
        again = read_record(llm.dump_flight_record(tmp_path / "later"))
        assert again.failure is None and len(again.steps) == 2, "a new record begins after a failure"


def test_without_a_folder_the_error_says_how_to_get_a_record(
    smollm2_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(str(smollm2_path), max_num_seqs=2) as llm:
        with pytest.raises(RidgelineError, match="no step has run"):
            llm.dump_flight_record(tmp_path / "none")
        fail_at(llm, 2, monkeypatch)
        with pytest.raises(RidgelineError) as caught:
            llm.generate("One, two,", SamplingParams(temperature=0, max_tokens=9))
        assert "set flight_record_dir" in caught.value.__notes__[0]
        record = read_record(llm.dump_flight_record(tmp_path / "late"))
        assert record.failure is not None and record.failure.error == "RidgelineError: out of luck"


def test_options_that_cannot_work_are_refused() -> None:
    for options, message in (
        ({"flight_record_steps": -1}, "flight_record_steps must be an integer of at least 0"),
        ({"flight_record_steps": 0, "flight_record_dir": "x"}, "flight_record_dir needs recorded steps"),
        ({"flight_record_steps": 0, "flight_record_logits": True}, "flight_record_logits needs recorded steps"),
        ({"flight_record_dir": ""}, "flight_record_dir must be a path"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM("smollm2", **options)


def test_without_recording_there_is_no_record(smollm2_path: Path, tmp_path: Path) -> None:
    with LLM(str(smollm2_path), max_num_seqs=2, flight_record_steps=0) as llm:
        with pytest.raises(ConfigError, match="set flight_record_steps"):
            llm.dump_flight_record(tmp_path / "none")
