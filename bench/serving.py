"""Serving many requests: end to end beside OpenVINO GenAI, the engine beside its bare executor, and shared prefixes.

    python bench/compare.py --install openvino      get the peer (once)
    python bench/serving.py                         three repetitions, about 3 minutes
    python bench/serving.py --quick                 one repetition, about a minute

together  32 requests of 128 tokens in and 128 out at once, output tokens/s, both engines interleaved.
mixed     32 requests of 16 to 512 in and 16 to 256 out, likewise.
executor  the mixed set once more: LLM.generate, then the very same batches through the executor alone.
prefix    200 requests that share 1,000 tokens: how many tokens are computed.

The last line is JSON. Exit status 1: something failed, a bar is missed, or the peer is slower than it should be.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from peers import workload
from peers.client import NOISY, EngineError, Sample, Worker, calmest, observe, spread, wait_quiet
from peers.engines import RIDGELINE, Engine, engines, is_reference_machine
from rich.console import Console
from rich.table import Table

from ridgeline import LLM, SamplingParams
from ridgeline.core.types import Batch, Executor, Int32, StepOutput, Ticket, TokenMasks
from ridgeline.engine.engine import Engine as RidgelineEngine
from ridgeline.engine.request import Request

PEER = "openvino"
MAX_SEQS = 32
CONTEXT = 768  # the longest of the mixed requests
PREFIX, SHARERS = 1000, 200
VALID_SHARE = 0.8  # the peer below this share of its recorded speed makes a comparison invalid
BARS = {"together": 2.7, "mixed": 2.7, "executor": 1.08, "prefix": 1.05}
AT_MOST = {"executor", "prefix"}  # bars from above

SETS = {"together": [(128, 128)] * MAX_SEQS, "mixed": workload.mixed(MAX_SEQS)}


def requests(seed: str, shape: list[tuple[int, int]]) -> tuple[list[list[int]], list[int]]:
    """(prompts, output tokens of each) of a request set; no two prompts are alike, nor those of two seeds."""
    return [workload.prompt(f"{seed}/{i}", size) for i, (size, _) in enumerate(shape)], [out for _, out in shape]


# -- beside the peer ---------------------------------------------------------------------------------------------


def compare(chosen: list[Engine], options: argparse.Namespace, log: Console) -> dict[str, dict[str, list[Sample]]]:
    """Output tokens per second by request set and engine, one sample a repetition."""
    samples: dict[str, dict[str, list[Sample]]] = {}
    workers: dict[str, Worker] = {}
    try:
        for engine in chosen:
            log.print(f"[dim]starting {engine.label}[/]")
            workers[engine.name] = engine.start(options.threads, MAX_SEQS, CONTEXT)
        for repetition in range(options.repetitions):
            turn = repetition % len(chosen)
            for name in [name for name in SETS if name in options.parts]:
                for engine in chosen[turn:] + chosen[:turn]:
                    sample = take(workers[engine.name], f"{name}/{repetition}", SETS[name], options.patience)
                    samples.setdefault(name, {}).setdefault(engine.name, []).append(sample)
            log.print(f"[dim]repetition {repetition + 1} of {options.repetitions} done[/]")
    finally:
        for worker in workers.values():
            worker.close()
    return samples


def take(worker: Worker, seed: str, shape: list[tuple[int, int]], patience: float) -> Sample:
    """One request set, in output tokens per second."""

    def once(attempt: int) -> Sample:
        wait_quiet(patience)
        worker.generate(workload.prompts(f"{seed}/w{attempt}", 1, 128), 8)  # untimed: it was stopped
        prompts, counts = requests(f"{seed}/{attempt}", shape)
        (_, seconds), foreign = observe(lambda: worker.generate(prompts, counts), worker.cpu_seconds)
        return Sample(sum(counts) / seconds, foreign)

    return calmest(once, f"{worker.name} ({seed})")


# -- beside the executor -----------------------------------------------------------------------------------------


class Recorder:
    """An executor that keeps every batch it is handed, the tokens that came of it, and the seconds they took."""

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.clear()

    def clear(self) -> None:
        """Forget what was recorded."""
        self.batches: list[Batch] = []
        self.tokens: list[Int32] = []
        self.seconds = 0.0

    def launch(self, batch: Batch) -> Ticket:
        """Keeps the batch."""
        self.batches.append(batch)
        self.seconds -= time.perf_counter()
        ticket = self.executor.launch(batch)
        self.seconds += time.perf_counter()
        return ticket

    def finish(self, ticket: Ticket, masks: TokenMasks | None = None) -> StepOutput:
        """Keeps the tokens."""
        self.seconds -= time.perf_counter()
        output = self.executor.finish(ticket, masks)
        self.seconds += time.perf_counter()
        self.tokens.append(output.token_ids)
        return output

    def replay(self) -> None:
        """Run the batches once more; raises EngineError unless the tokens are the same."""
        outputs = [self.executor.finish(self.executor.launch(batch)).token_ids for batch in self.batches]
        if not all(np.array_equal(a, b) for a, b in zip(outputs, self.tokens, strict=True)):
            raise EngineError("the executor alone gives other tokens for the same batches")


def make_llm(options: argparse.Namespace, **more: Any) -> LLM:
    """Ridgeline in this process."""
    return LLM("smollm2", threads=options.threads, max_num_seqs=MAX_SEQS, **more)


def timed(piece: Callable[[], Any], patience: float) -> Sample:
    """Seconds that ``piece`` takes in this process."""
    wait_quiet(patience)

    def run() -> float:
        start = time.perf_counter()
        piece()
        return time.perf_counter() - start

    return Sample(*observe(run, lambda: 0.0))


def beside_executor(options: argparse.Namespace) -> dict[str, list[Sample]]:
    """Seconds of the mixed set: "engine" through LLM.generate, "executor" for the same batches alone.

    "inside" is the part of "engine" that it spent in the executor. A pair that others disturbed is taken once more.
    """
    llm = make_llm(options, max_model_len=CONTEXT, prefix_sharing=False)
    runtime = llm.runtime
    recorder = Recorder(runtime.executor)
    runtime.engine = RidgelineEngine(recorder, runtime.engine.limits, eos_ids=runtime.tokenizer.eos_ids)

    def pair(seed: str) -> tuple[Sample, Sample, Sample]:
        prompts, counts = requests(seed, SETS["mixed"])
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in counts]
        recorder.clear()
        engine = timed(lambda: llm.generate(prompts, params), options.patience)
        inside = Sample(recorder.seconds, engine.foreign)
        return engine, timed(recorder.replay, options.patience), inside

    pair("executor/warm")
    samples: dict[str, list[Sample]] = {"engine": [], "executor": [], "inside": []}
    for repetition in range(options.repetitions):
        best = pair(f"executor/{repetition}")
        if max(s.foreign for s in best) > NOISY:
            best = min(best, pair(f"executor/{repetition}"), key=lambda p: max(s.foreign for s in p))
        for name, sample in zip(samples, best, strict=True):
            samples[name].append(sample)
    llm.close()
    return samples


# -- shared prefixes ---------------------------------------------------------------------------------------------


def sharers(engine: RidgelineEngine, salt: object) -> list[Request]:
    """The requests that share a prefix: 1 to 40 tokens of their own each, 4 to 20 tokens out."""
    prefix = workload.prompt("prefix", PREFIX)
    return [
        engine.make_request(
            prefix + workload.prompt(f"sharer {i}", 1 + i * 7 % 40),
            SamplingParams(temperature=0, max_tokens=4 + i * 5 % 17, ignore_eos=True),
            cache_salt=salt,
        )
        for i in range(SHARERS)
    ]


def arrive(engine: RidgelineEngine, requests: list[Request], how: str) -> None:
    """Run requests that arrive "one after another", "one a step" or "at once"."""
    for request in requests if how != "at once" else []:
        engine.submit([request])
        engine.step()
        while how == "one after another" and engine.has_work:
            engine.step()
    if how == "at once":
        engine.submit(requests)
    while engine.has_work:
        engine.step()


def shared_prefix(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """For each way to arrive: tokens computed, the fewest possible, their ratio, seconds.

    The fewest: the full blocks of the prefix once, and of each request every token after them but the last it
    generates. Raises EngineError unless every way gives the same tokens.
    """
    llm = make_llm(options, max_model_len=1152)
    engine = llm.runtime.engine
    block = engine.limits.block_size
    shared = PREFIX // block * block
    results: dict[str, dict[str, float]] = {}
    expected: list[list[int]] = []
    for how in ("one after another", "one a step", "at once"):
        requests = sharers(engine, salt=how)
        before = engine.stats().tokens_computed
        seconds = timed(lambda r=requests, h=how: arrive(engine, r, h), options.patience).value  # type: ignore[misc]
        computed = engine.stats().tokens_computed - before
        outputs = [r.output_ids for r in requests]
        if any(len(r.output_ids) != r.limit for r in requests) or outputs != (expected or outputs):
            raise EngineError(f"requests that arrive {how} give other tokens")
        expected = outputs
        fewest = shared + sum(r.num_tokens - 1 - shared for r in requests)
        results[how] = {"computed": computed, "fewest": fewest, "ratio": computed / fewest, "seconds": seconds}
    llm.close()
    return results


# -- report ------------------------------------------------------------------------------------------------------


def summarize(
    options: argparse.Namespace,
    peers: dict[str, dict[str, list[Sample]]],
    alone: dict[str, list[Sample]],
    prefix: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """Everything the table shows, as one JSON-ready object."""
    result: dict[str, Any] = {"threads": options.threads, "repetitions": options.repetitions, "invalid": []}
    recorded = next(e.recorded for e in engines() if e.name == PEER) if is_reference_machine(options.threads) else {}
    ratios: dict[str, float] = {}
    for name, cells in peers.items():
        values = {engine: spread([s.value for s in samples]) for engine, samples in cells.items()}
        ratio = spread([a.value / b.value for a, b in zip(cells[RIDGELINE], cells[PEER], strict=True)])
        result[name] = {"output_tokens_per_s": values, "ratio": ratio}
        ratios[name] = ratio["median"]
        floor = VALID_SHARE * recorded.get(name, 0.0)
        if values[PEER]["median"] < floor:
            result["invalid"].append(f"{PEER} {name}: {values[PEER]['median']:.0f} is under {floor:.0f} tok/s")
    if alone:
        seconds = {name: spread([s.value for s in samples]) for name, samples in alone.items()}
        ratio = spread([a.value / b.value for a, b in zip(alone["engine"], alone["executor"], strict=True)])
        outside = spread([1 - b.value / a.value for a, b in zip(alone["engine"], alone["inside"], strict=True)])
        result["executor"] = {"seconds": seconds, "ratio": ratio, "outside": outside}
        ratios["executor"] = ratio["median"]
    if prefix:
        result["prefix"] = prefix
        ratios["prefix"] = max(cell["ratio"] for cell in prefix.values())
    result["missed"] = [
        f"{name}: {ratio:.3f}, the bar is {BARS[name]}"
        for name, ratio in ratios.items()
        if (ratio > BARS[name] if name in AT_MOST else ratio < BARS[name])
    ]
    foreign = [s.foreign for cells in [*peers.values(), alone] for samples in cells.values() for s in samples]
    result["foreign_cores"] = {"mean": sum(foreign) / max(1, len(foreign)), "max": max(foreign, default=0.0)}
    return result


def show(result: dict[str, Any], seconds: float, console: Console) -> None:
    """The table: medians with their range, and each ratio beside its bar."""
    foreign = result["foreign_cores"]
    table = Table(
        title=f"SmolLM2-135M, {result['threads']} threads, {result['repetitions']} interleaved repetitions",
        caption=f"median (least to most) · {seconds:.0f} s in all · "
        f"others took {foreign['mean']:.2f} cores on average, {foreign['max']:.2f} at most",
        show_lines=True,
    )
    for heading in ("", "Ridgeline", "beside", "ratio", "bar"):
        table.add_column(heading, justify="left" if not heading else "right")

    def cell(stats: dict[str, float], digits: int) -> str:
        low, high = f"{stats['min']:,.{digits}f}", f"{stats['max']:,.{digits}f}"
        return f"{stats['median']:,.{digits}f}\n[dim]{low} to {high}[/]"

    for name, label in (("together", "32 x 128 in, 128 out\ntok/s"), ("mixed", "32 mixed requests\ntok/s")):
        if name in result:
            values = result[name]["output_tokens_per_s"]
            row = (cell(values[RIDGELINE], 0), cell(values[PEER], 0), cell(result[name]["ratio"], 2))
            table.add_row(label + f" beside {PEER}", *row, f">= {BARS[name]}")
    if "executor" in result:
        values = result["executor"]["seconds"]
        row = (cell(values["engine"], 3), cell(values["executor"], 3), cell(result["executor"]["ratio"], 3))
        outside = f"{result['executor']['outside']['median']:.1%} of it outside the executor"
        label = f"32 mixed requests\ns beside the executor alone\n[dim]{outside}[/]"
        table.add_row(label, *row, f"<= {BARS['executor']}")
    for how, stats in result.get("prefix", {}).items():
        row = (f"{stats['computed']:,.0f}", f"{stats['fewest']:,.0f}", f"{stats['ratio']:.3f}")
        label = f"{SHARERS} sharing {PREFIX:,} tokens, {how}\ntokens computed beside the fewest"
        table.add_row(label, *row, f"<= {BARS['prefix']}")
    console.print(table)
    for kind in ("missed", "invalid"):
        for line in result[kind]:
            console.print(f"[red]{kind}:[/] {line}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(BARS), help="comma separated (default: all): %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, help="default 3, quick 1")
    parser.add_argument("--quick", action="store_true", help="one repetition: a rough answer")
    parser.add_argument("--patience", type=float, default=2.0, help="seconds to wait for a quiet machine, each time")
    options = parser.parse_args()
    options.repetitions = options.repetitions or (1 if options.quick else 3)
    options.parts = options.parts.split(",")
    for part in options.parts:
        if part not in BARS:
            parser.error(f"{part!r} is not one of {', '.join(BARS)}")
    return options


def main() -> int:
    """Measure; 0 when every bar is met and the comparison is valid."""
    options = arguments()
    log, console = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 120)
    chosen = [engine for engine in engines() if engine.name in (RIDGELINE, PEER)]
    start = time.monotonic()
    peers: dict[str, dict[str, list[Sample]]] = {}
    try:
        if set(SETS) & set(options.parts):
            for engine in chosen:
                if missing := engine.missing():
                    raise EngineError(
                        f"{engine.label} lacks {missing}: python bench/compare.py --install {engine.peer}"
                    )
            peers = compare(chosen, options, log)
        alone = beside_executor(options) if "executor" in options.parts else {}
        prefix = shared_prefix(options) if "prefix" in options.parts else {}
    except EngineError as error:
        log.print(str(error), style="red", markup=False)
        return 1
    result = summarize(options, peers, alone, prefix)
    result["seconds"] = time.monotonic() - start
    show(result, result["seconds"], console)
    print(json.dumps(result))
    return 1 if result["missed"] or result["invalid"] else 0


if __name__ == "__main__":
    sys.exit(main())
