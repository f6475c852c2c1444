"""Runs a flight record from its file, and tells what that found."""

from __future__ import annotations

import time

from ridgeline.engine.flight import FlightRecord, read_record
from ridgeline.engine.load_replay import load_replay
from ridgeline.engine.replay import ReplayReport, replay


def replay_file(file: str, model: str | None, isa: str | None, threads: int | None) -> tuple[str, bool]:
    """Run a flight record again: the report as text, and whether every bit was the same.

    Arguments as those of ``load_replay``; raises what ``read_record``, ``load_replay`` and ``replay`` do.
    """
    record = read_record(file)
    setup = load_replay(record, model=model, isa=isa, threads=threads)
    start = time.perf_counter()
    report = replay(record, setup.executor)
    return render(record, report, setup.notes, time.perf_counter() - start), report.identical


def render(record: FlightRecord, report: ReplayReport, notes: list[str], seconds: float) -> str:
    """A report as lines of text."""
    environment, steps = record.environment, record.steps
    name = "no model file" if environment.model is None else environment.model.path
    kind = " ".join(filter(None, (environment.isa or environment.backend, environment.activation_dtype)))
    lines = [
        f"record   {record.created}, ridgeline {environment.ridgeline}, {kind}, {environment.threads} threads, "
        f"KV cache in {environment.kv_dtype}",
        f"model    {name}",
        f"steps    {steps[0].number} to {steps[-1].number}: {report.steps} run again with {report.tokens} tokens, "
        f"{report.compared} compared, in {seconds:.1f} s",
        f"requests {report.live} ran already ({report.rebuilt_tokens} tokens of cache rebuilt), "
        f"{report.started} started",
    ]
    lines += [f"note     {note}" for note in notes]
    if record.failure is not None:
        failure = record.failure
        where = f"after step {failure.step}" if failure.stage == "after" else f"step {failure.step} ({failure.stage})"
        lines.append(f"failure  {where}: {failure.error}")
        if failure.stage != "after":
            lines.append("         " + (f"here too: {report.failed_again}" if report.failed_again else "here it runs"))
    lines.append(f"result   {_verdict(report)}")
    return "\n".join(lines)


def _verdict(report: ReplayReport) -> str:
    compared = "tokens, log probabilities and logits" if report.logits else "tokens and log probabilities"
    if not report.compared:
        return "nothing to compare: the record has no step that ended"
    if report.first is None:
        return f"identical: {compared}, bit for bit"
    first = report.first
    place = f"step {first.step}" + (f", slot {first.slot}, position {first.position}" if first.slot >= 0 else "")
    return (
        f"DIFFERENT in {report.differing_steps} of {report.compared} steps; first at {place}: {first.what} "
        f"was {first.recorded or 'none'}, is {first.replayed or 'none'}"
    )
