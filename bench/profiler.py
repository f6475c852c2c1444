"""What profiling costs: CPU microseconds that counters and clocks add to a step, whatever else the machine does.

    python bench/profiler.py [--pairs 1000] [--layers 30]

A model of so many layers, each so small that it stays in the caches, runs decode steps on one thread; with one thread
its CPU time is what it computes, and time that others take from it does not count. Blocks of twenty steps
with and without profiling alternate. ``ridgeline profile`` reports the share of a real step, by the wall clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from types import SimpleNamespace

import numpy as np

from ridgeline.backends.cpu.executor import CpuExecutor
from ridgeline.backends.cpu.lowering import plan_target
from ridgeline.core.formats import FORMATS
from ridgeline.core.types import SamplingParams
from ridgeline.engine.engine import Engine, EngineLimits
from ridgeline.graph.plan import compile
from ridgeline.models import llama
from ridgeline.perf.profile import Stopwatch
from ridgeline.weights.codecs import quantize
from ridgeline.weights.tensor import WeightTensor

VOCAB, BLOCK = 256, 20


def make_engine(layers: int, steps: int) -> tuple[Engine, CpuExecutor]:
    """Random weights of hidden size 64."""
    config = llama.LlamaConfig(VOCAB, 64, 96, layers, 4, 2, 16, steps + 64, 1e-5, 10000.0, True)
    weights, rng = {}, np.random.default_rng(0)
    for name, entry in llama.weight_entries(config).items():
        form = FORMATS["f32" if len(entry.shape) == 1 else "q8_0"]
        values = rng.standard_normal(entry.shape).astype(np.float32) * 0.2
        tensor = WeightTensor(entry.tensor, entry.shape, form, quantize(form, values))
        weights[name] = SimpleNamespace(tensor=tensor, row_order=None, values=lambda v=values: v)
    formats = {name: weight.tensor.format for name, weight in weights.items()}
    plan = compile(
        llama.build(config, formats, max_tokens=64, max_rows=8, kv_dtype="bf16", block_size=16),
        plan_target("bf16", None),
    )
    blocks = -(-(steps + 64) // 16)
    runs = CpuExecutor(plan, weights, num_slots=1, num_blocks=[blocks], max_blocks_per_slot=blocks, threads=1)
    return Engine(runs, EngineLimits(1, 64, steps + 64, VOCAB, 16, [blocks])), runs


def main() -> None:
    """Prints a line for each part of profiling, and one of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=30)
    args = parser.parse_args()
    modes = ("off", "counters", "clocks", "both")
    engine, runs = make_engine(args.layers, 2 * len(modes) * args.pairs)
    params = SamplingParams(temperature=0, max_tokens=2 * len(modes) * args.pairs, ignore_eos=True)
    engine.submit([engine.make_request([1, 2, 3], params)])
    engine.step()
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    random = np.random.default_rng(0)
    for _ in range(args.pairs // BLOCK):
        for mode in random.permutation(modes).tolist():
            undo = engine.trace(Stopwatch().wrap) if mode in ("clocks", "both") else None
            runs.native.set_profiling(mode in ("counters", "both"))
            for number in range(1 + BLOCK):
                start = time.thread_time()
                engine.step()
                if number:  # after a change Python has to find its methods again
                    times[mode].append((time.thread_time() - start) * 1e6)
            if undo is not None:
                undo()
    operators = len(runs.native.op_names())
    print(f"{operators} operators, 1 thread, {len(times['off'])} steps of each kind; a step without: "
          f"{statistics.median(times['off']):.1f} us of CPU time")  # fmt: skip
    added = {}
    for mode in modes[1:]:
        differences = [a - b for a, b in zip(times[mode], times["off"], strict=True)]
        low, middle, high = np.percentile(differences, [25, 50, 75])
        added[mode] = float(middle)
        print(f"  {mode:9} {middle:+6.1f} us a step (quartiles {low:+.1f} to {high:+.1f})")
    print(f"  counters: {added['counters'] / operators * 1e3:.0f} ns an operator")
    print(json.dumps({"operators": operators, "added_us": added}))


if __name__ == "__main__":
    main()
