"""Where a step's time goes: seconds per kind of operator at several batch shapes, beside the roofline.

    python bench/step_budget.py [--model smollm2] [--threads 2] [--shapes 1,8,32,512] [--context 192] [--scatter]

A shape of up to 64 is that many requests decoding at --context; a larger one is a prompt of that length.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np

from ridgeline.backends.cpu.executor import CpuExecutor
from ridgeline.backends.cpu.lowering import plan_target
from ridgeline.core.config import ACTIVATION_DTYPES
from ridgeline.core.types import SAMPLING_DTYPE, Batch
from ridgeline.graph.cost import Load
from ridgeline.graph.plan import compile
from ridgeline.graph.roofline import roofline
from ridgeline.models.load import load_model
from ridgeline.perf.machine import measure_peaks

DECODE_AT_MOST = 64
BLOCK = 16
PREFILL = 512  # tokens of a step that only fills the cache


def shapes_of(text: str) -> list[int]:
    """The numbers of a list with commas."""
    try:
        shapes = [int(s) for s in text.split(",")]
    except ValueError:
        shapes = [0]
    if min(shapes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers from 1 on, such as 1,8,32")
    return shapes


def make_batch(slots: list[int], first: int, each: int, tables: np.ndarray, vocab: int, seed: int) -> Batch:
    """A request for each slot with tokens at positions ``first`` to ``first + each``.

    Its blocks are ``tables[slot]``.
    """
    requests, blocks = len(slots), -(-(first + each) // BLOCK)
    sampling = np.zeros(requests, SAMPLING_DTYPE)
    sampling["num_logprobs"] = -1
    updates = [(s, i, tables[s, i]) for s in slots for i in range(blocks)]
    return Batch(
        token_ids=np.random.default_rng(seed).integers(0, vocab, requests * each).astype(np.int32),
        positions=np.tile(np.arange(first, first + each, dtype=np.int32), requests),
        slots=np.array(slots, np.int32),
        query_starts=np.arange(0, requests * each + 1, each, dtype=np.int32),
        context_lens=np.full(requests, first + each, np.int32),
        sample_rows=np.arange(each - 1, requests * each, each, dtype=np.int32),
        sampling=sampling,
        block_updates=[np.array(updates, np.int32)],
    )


def measure(
    executor: CpuExecutor, shape: int, context: int, tables: np.ndarray, vocab: int, seconds: float
) -> tuple[float, dict[str, float]]:
    """Median step in seconds, and the mean seconds per kind of operator."""

    def run(slots: list[int], first: int, each: int, seed: int = 0) -> float:
        batch = make_batch(slots, first, each, tables, vocab, seed)
        start = time.perf_counter()
        executor.finish(executor.launch(batch))
        return time.perf_counter() - start

    decode = shape <= DECODE_AT_MOST
    shaped = (list(range(shape)), context - 1, 1) if decode else ([0], 0, shape)
    # Compute what the decodes continue: an untouched cache is one page of zeros and is not read from memory.
    for slot in range(shape if decode else 0):
        for first in range(0, context, PREFILL):
            run([slot], first, min(PREFILL, context - first))
    run(*shaped)
    steps: list[float] = []
    executor.native.set_profiling(True)
    executor.native.reset_profile()
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(steps) < 5:
        steps.append(run(*shaped, seed=len(steps)))
    kinds: dict[str, float] = {}
    for name, _, spent, *_ in executor.native.profile()[2]:
        kind = name.split()[0]
        if kind == "linear":
            kind = "linear " + name.split(".")[-1].split()[-1]
        kinds[kind] = kinds.get(kind, 0.0) + spent / len(steps)
    executor.native.set_profiling(False)
    return statistics.median(steps), kinds


def main() -> None:
    """Prints one table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--isa", default=None)
    parser.add_argument("--activation-dtype", default="auto", choices=ACTIVATION_DTYPES)
    parser.add_argument("--kv-dtype", default="bf16")
    parser.add_argument("--shapes", default="1,8,32,512", type=shapes_of)
    parser.add_argument("--context", type=int, default=192)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--scatter", action="store_true", help="blocks at random places, as after hours of serving")
    args = parser.parse_args()
    model = load_model(args.model)
    target = plan_target(args.kv_dtype, args.isa, args.activation_dtype)
    shapes = args.shapes
    longest = max(PREFILL, args.context, *shapes)
    if args.context < 1 or longest > model.config.context_length:
        parser.error(f"shapes and context must be from 1 to the model's context, {model.config.context_length}")
    table = -(-longest // BLOCK)
    plan = compile(model.graph(max(PREFILL, *shapes), DECODE_AT_MOST, args.kv_dtype, BLOCK), target)
    executor = CpuExecutor(
        plan,
        model.weights,
        num_slots=DECODE_AT_MOST,
        num_blocks=[DECODE_AT_MOST * table],
        max_blocks_per_slot=table,
        threads=args.threads,
        isa=args.isa,
    )
    blocks = np.arange(DECODE_AT_MOST * table)
    tables = (np.random.default_rng(0).permutation(blocks) if args.scatter else blocks).reshape(DECODE_AT_MOST, table)
    peaks = measure_peaks(args.threads, args.isa)
    print(
        f"{args.model}, {executor.isa}, {executor.threads} threads: {peaks.bandwidth / 1e9:.1f} GB/s, "
        f"int8 {peaks.int8 / 1e9:.0f} GOP/s, bf16 {peaks.bf16 / 1e9:.0f} GFLOP/s"
    )
    results = {}
    for shape in shapes:
        step, kinds = measure(executor, shape, args.context, tables, model.config.vocab_size, args.seconds)
        requests = [(args.context - 1, 1)] * shape if shape <= DECODE_AT_MOST else [(0, shape)]
        least = roofline(plan.cost(Load.of(requests)), peaks).seconds
        results[str(shape)] = {"step_ms": step * 1e3, "roofline_share": least / step}
        print(
            f"\nM = {shape}: {step * 1e3:.3f} ms a step, {shape / step:,.0f} tokens/s, {least / step:.0%} of roofline"
        )
        for kind, spent in sorted(kinds.items(), key=lambda item: -item[1]):
            results[str(shape)][kind] = spent * 1e3
            print(f"  {kind:<22}{spent * 1e3:9.3f} ms {spent / sum(kinds.values()):6.1%}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
