"""Ridgeline beside other engines: the same model, the same token ids, interleaved, every request checked.

    python bench/compare.py --install [llamacpp openvino ort]     get the peers (once)
    python bench/compare.py                                       the full comparison, about 8 minutes
    python bench/compare.py --quick                               two repetitions, about 3.5 minutes

Each engine is a process in its own environment, stopped while another is timed. A repetition measures
every engine once, in an order that rotates; ratios are taken within a repetition. Decode speed is that
of a full pass less a prefill-only pass of the same shape. A failed request ends the run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from peers import install, workload
from peers.client import NOISY, EngineError, Sample, Worker, calmest, observe, spread, wait_quiet
from peers.engines import (
    LLAMACPP_FASTEST,
    LLAMACPP_SAME_FILE,
    RIDGELINE,
    RIDGELINE_INT8,
    Engine,
    engines,
    is_reference_machine,
)
from rich.console import Console
from rich.table import Table

PROMPT_TOKENS = 128
OUT_TOKENS = 128
PREFILL_TOKENS = 512
MAX_SEQS = 32
VALID_SHARE = 0.8  # a peer below this share of its recorded speed makes a comparison invalid

OURS = {RIDGELINE: "", RIDGELINE_INT8: "int8 "}
RIVALS = {"best_peer": "x best peer", "llamacpp": "x llama.cpp", "llamacpp_fastest": "x llama.cpp Q4_0"}

METRICS = {
    "prefill": "prefill 512, tok/s",
    "decode1": "decode, batch 1, tok/s",
    "decode8": "decode, batch 8, tok/s",
    "decode32": "decode, batch 32, tok/s",
    "first": "start to first token, s",
    "memory": "peak memory, MB",
}
LOWER_IS_BETTER = {"first", "memory"}
ONE_LIFE = {"first", "memory"}  # measured on a process of its own, both on the same one


@dataclass
class Run:
    """The options of one comparison and the samples it has taken, by metric and engine name."""

    threads: int
    repetitions: int
    patience: float
    samples: dict[str, dict[str, list[Sample]]] = field(default_factory=dict)

    def add(self, metric: str, engine: Engine, sample: Sample) -> None:
        """Record one repetition's sample."""
        self.samples.setdefault(metric, {}).setdefault(engine.name, []).append(sample)


def take(run: Run, metric: str, repetition: int, worker: Worker) -> Sample:
    """One sample of a throughput metric, in tokens per second."""

    def once(seed: str) -> Sample:
        wait_quiet(run.patience)
        # Untimed: it was stopped, and the caches hold another engine's weights.
        worker.generate(workload.prompts(f"{seed}/w", 1, PROMPT_TOKENS), 8)
        if metric == "prefill":
            (_, seconds), foreign = observe(
                lambda: worker.generate(workload.prompts(seed, 1, PREFILL_TOKENS), 1), worker.cpu_seconds
            )
            return Sample(PREFILL_TOKENS / seconds, foreign)
        batch = int(metric.removeprefix("decode"))

        def passes() -> float:
            _, whole = worker.generate(workload.prompts(seed + "/d", batch, PROMPT_TOKENS), OUT_TOKENS)
            # A disturbed prefill pass would make decoding look faster: where it is short, take the middle of three.
            repeats = 3 if batch == 1 else 1
            shapes = [workload.prompts(f"{seed}/p{i}", batch, PROMPT_TOKENS) for i in range(repeats)]
            return whole - statistics.median(worker.generate(shape, 1)[1] for shape in shapes)

        seconds, foreign = observe(passes, worker.cpu_seconds)
        return Sample(batch * (OUT_TOKENS - 1) / seconds, foreign)

    return calmest(lambda attempt: once(f"{metric}/{repetition}/{attempt}"), f"{worker.name} ({metric})")


def take_life(run: Run, engine: Engine) -> tuple[Sample, Sample]:
    """(start to first token of a 16-token prompt in s, peak memory with KV for 512 tokens in MB)."""
    life = one_life(run, engine)
    if life[0].foreign > NOISY:
        life = min(life, one_life(run, engine), key=lambda samples: samples[0].foreign)
    return life


def one_life(run: Run, engine: Engine) -> tuple[Sample, Sample]:
    """``take_life`` once."""
    wait_quiet(run.patience)
    command = engine.command("once", run.threads, 1, PREFILL_TOKENS)
    start = time.perf_counter()
    worker = Worker(engine.label, command)
    try:

        def first() -> float:
            worker.read()
            return time.perf_counter() - start

        seconds, foreign = observe(first, worker.cpu_seconds)
        return Sample(seconds, foreign), Sample(worker.read()["peak_rss_mb"], foreign)
    finally:
        worker.close()


def included(metric: str, engine: Engine, everything: bool) -> bool:
    """Whether a cell is measured: the slow same-file llama.cpp is nobody's rival in large batches, and what is for a
    lone stream has none."""
    lone = engine.name in (LLAMACPP_SAME_FILE, RIDGELINE_INT8)
    return everything or not lone or metric not in ("decode8", "decode32")


def measure(chosen: list[Engine], metrics: list[str], run: Run, everything: bool, log: Console) -> None:
    """Fill ``run.samples``; raises EngineError on the first failure of anything."""
    workers: dict[str, Worker] = {}
    try:
        if any(metric not in ONE_LIFE for metric in metrics):
            for engine in chosen:
                log.print(f"[dim]starting {engine.label}[/]")
                workers[engine.name] = engine.start(run.threads, MAX_SEQS, PREFILL_TOKENS + 1)
        for repetition in range(run.repetitions):
            turn = repetition % len(chosen)
            order = chosen[turn:] + chosen[:turn]
            for metric in metrics:
                for engine in order:
                    if metric not in ONE_LIFE and included(metric, engine, everything):
                        run.add(metric, engine, take(run, metric, repetition, workers[engine.name]))
            for engine in order if ONE_LIFE & set(metrics) else []:
                for metric, sample in zip(("first", "memory"), take_life(run, engine), strict=True):
                    if metric in metrics:
                        run.add(metric, engine, sample)
            log.print(f"[dim]repetition {repetition + 1} of {run.repetitions} done[/]")
    finally:
        for worker in workers.values():
            worker.close()


def median(samples: list[Sample]) -> float:
    """Median value of the samples."""
    return statistics.median(sample.value for sample in samples)


def ratios(metric: str, ours: list[Sample], theirs: list[Sample]) -> dict[str, float]:
    """How many times better ours is: median, least and most of the ratios within a repetition."""
    pairs = [(a.value, b.value) for a, b in zip(ours, theirs, strict=True)]
    values = [b / a if metric in LOWER_IS_BETTER else a / b for a, b in pairs]
    return spread(values)


def best_peer(metric: str, cells: dict[str, list[Sample]]) -> str | None:
    """Name of the peer with the best median."""
    peers = {name: median(samples) for name, samples in cells.items() if name not in OURS}
    pick = min if metric in LOWER_IS_BETTER else max
    return pick(peers, key=lambda name: peers[name]) if peers else None


def summarize(run: Run, chosen: list[Engine]) -> dict[str, Any]:
    """Everything the table shows, as one JSON-ready object."""
    result: dict[str, Any] = {
        "threads": run.threads,
        "repetitions": run.repetitions,
        "metrics": {},
    }
    too_slow: list[str] = []
    recorded = {engine.name: engine.recorded for engine in chosen} if is_reference_machine(run.threads) else {}
    for metric, cells in run.samples.items():
        values = {name: [s.value for s in samples] for name, samples in cells.items()}
        best = best_peer(metric, cells)
        entry: dict[str, Any] = {"best_peer": best, "engines": {}, "ratio": {}}
        rivals = {"best_peer": best, "llamacpp": LLAMACPP_SAME_FILE, "llamacpp_fastest": LLAMACPP_FASTEST}
        for name, row in values.items():
            entry["engines"][name] = spread(row)
            floor = VALID_SHARE * recorded.get(name, {}).get(metric, 0.0)
            if statistics.median(row) < floor:
                too_slow.append(f"{name} {metric}: {statistics.median(row):.0f} is under {floor:.0f} tok/s")
        for ours in OURS.keys() & cells.keys():
            found = {key: ratios(metric, cells[ours], cells[name]) for key, name in rivals.items() if name in cells}
            entry["ratio"] |= {OURS[ours] + key: ratio for key, ratio in found.items()}
        entry["foreign_cores"] = max(sample.foreign for samples in cells.values() for sample in samples)
        result["metrics"][metric] = entry
    everyone = [s.foreign for cells in run.samples.values() for samples in cells.values() for s in samples]
    result["foreign_cores"] = {"mean": statistics.fmean(everyone), "max": max(everyone)}
    result["invalid"] = too_slow
    return result


def number(metric: str, value: float) -> str:
    """A value with the digits that mean something."""
    return f"{value:.2f}" if metric == "first" else f"{value:,.0f}"


def times(prefix: str, ratio: dict[str, float]) -> str:
    """One of our engines' ratios to a rival: the median, and its range below."""
    return f"{prefix}[bold]{ratio['median']:.2f}[/]\n[dim]{ratio['min']:.2f} to {ratio['max']:.2f}[/]"


def show(result: dict[str, Any], chosen: list[Engine], seconds: float, console: Console) -> None:
    """The table: medians with their range, and how far ahead of the best peer and of llama.cpp we are."""
    foreign = result["foreign_cores"]
    table = Table(
        title=f"SmolLM2-135M, {result['threads']} threads, {result['repetitions']} interleaved repetitions",
        caption=f"median (least to most) · {seconds:.0f} s in all · "
        f"others took {foreign['mean']:.2f} cores on average, {foreign['max']:.2f} at most",
        show_lines=True,
    )
    table.add_column("")
    for engine in chosen:
        table.add_column(engine.label, justify="right", style="bold" if engine.name in OURS else "")
    seen = {key.split()[-1] for entry in result["metrics"].values() for key in entry["ratio"]}
    shown = [key for key in RIVALS if key in seen]
    for key in shown:
        table.add_column(RIVALS[key], justify="right")
    for metric, entry in result["metrics"].items():
        cells = [METRICS[metric]]
        for engine in chosen:
            stats = entry["engines"].get(engine.name)
            if stats is None:
                cells.append("[dim]-[/]")
                continue
            low, high = number(metric, stats["min"]), number(metric, stats["max"])
            mark = "[green]" if engine.name == entry["best_peer"] else "[default]"
            cells.append(f"{mark}{number(metric, stats['median'])}[/]\n[dim]{low} to {high}[/]")
        for key in shown:
            found = {prefix: entry["ratio"].get(prefix + key) for prefix in OURS.values()}
            cells.append("\n".join(times(prefix, ratio) for prefix, ratio in found.items() if ratio) or "-")
        table.add_row(*cells)
    console.print(table)
    console.print("[dim]green: the best peer of the row. A ratio above 1 means that Ridgeline is better.[/]")
    if RIDGELINE_INT8 in {engine.name for engine in chosen}:
        console.print("[dim]int8: with --activation-dtype int8, which ridgeline run and chat take.[/]")
    for line in result["invalid"]:
        console.print(f"[red]invalid:[/] {line}, {VALID_SHARE:.0%} of what it reaches when the machine is quiet")


def arguments() -> argparse.Namespace:
    """The command line."""
    names = [engine.name for engine in engines()]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--install", nargs="*", metavar="PEER", choices=list(install.RECIPES), help="get peers, then end"
    )
    parser.add_argument("--metrics", default=",".join(METRICS), help="comma separated (default: all): %(default)s")
    parser.add_argument("--engines", default=",".join(names), help="comma separated (default: all): %(default)s")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, help="default 5, quick 2")
    parser.add_argument("--quick", action="store_true", help="two repetitions: a rough answer")
    parser.add_argument("--all", action="store_true", help="also llama.cpp's same file in large batches (slow)")
    parser.add_argument("--patience", type=float, default=2.0, help="seconds to wait for a quiet machine, each time")
    options = parser.parse_args()
    for given, known in ((options.metrics, METRICS), (options.engines, names)):
        for name in given.split(","):
            if name not in known:
                parser.error(f"{name!r} is not one of {', '.join(known)}")
    return options


def main() -> int:
    """Run the comparison; 0 when it is valid, 1 when something failed or a peer was too slow to be believed."""
    options = arguments()
    if options.install is not None:
        install.install(options.install)
        return 0
    log, console = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 160)
    chosen = [engine for engine in engines() if engine.name in options.engines.split(",")]
    for engine in chosen:
        if missing := engine.missing():
            log.print(
                f"{engine.label} is not installed (no {missing}): python bench/compare.py --install {engine.peer}"
            )
            return 1
    repetitions = options.repetitions or (2 if options.quick else 5)
    run = Run(options.threads, repetitions, options.patience)
    metrics = [metric for metric in METRICS if metric in options.metrics.split(",")]
    start = time.monotonic()
    try:
        measure(chosen, metrics, run, options.all, log)
    except EngineError as error:
        log.print(str(error), style="red", markup=False)
        return 1
    result = summarize(run, chosen)
    result["seconds"] = time.monotonic() - start
    show(result, chosen, result["seconds"], console)
    print(json.dumps(result))
    return 1 if result["invalid"] else 0


if __name__ == "__main__":
    sys.exit(main())
