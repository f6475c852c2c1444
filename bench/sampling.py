"""Sampling alone: microseconds a row for several settings, beside the memory roofline and torch.

    python bench/sampling.py [--rows 32] [--vocab 150000] [--threads 2] [--isa avx512] [--seconds 0.3]

The logits are the rows of an embedding table that the step copies just before it samples, as the LM head leaves them.
Two kinds: "peaked" ones fall off as a language model's do (Zipf), "flat" ones are normal with a deviation of 1. The
roofline is reading every logit once. Torch does what one would write in it: top-k or a sort, softmax, multinomial.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ridgeline.backends.cpu import _native
from ridgeline.backends.cpu.lowering import Lowering, packed_weight_bytes
from ridgeline.core.formats import FORMATS
from ridgeline.core.types import SAMPLING_DTYPE, SlotStart
from ridgeline.graph.builder import GraphBuilder
from ridgeline.graph.plan import compile
from ridgeline.graph.target import naive_target
from ridgeline.perf.machine import measure_peaks
from ridgeline.weights.codecs import quantize

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, 5 logprobs": {"temperature": 0.0, "num_logprobs": 5},
    "temperature 1": {},
    "top-k 50": {"top_k": 50},
    "top-k 50, top-p 0.9": {"top_k": 50, "top_p": 0.9},
    "top-k 5000, top-p 0.9": {"top_k": 5000, "top_p": 0.9},
    "top-p 0.9": {"top_p": 0.9},
    "min-p 0.05": {"min_p": 0.05},
    "top-k 50, penalties": {"top_k": 50},
    "scored": {"target": 8},
}


def logits_of(kind: str, rows: int, vocab: int) -> np.ndarray:
    """[rows, vocab] float32."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((rows, vocab)).astype(np.float32)
    if kind == "flat":
        return noise
    ranks = np.stack([rng.permutation(vocab) for _ in range(rows)])
    return (noise * 0.5 - 1.5 * np.log1p(ranks)).astype(np.float32)


class Sampler:
    """A native executor that gathers rows of given logits and samples them, each row a request of its own."""

    def __init__(self, logits: np.ndarray, threads: int | None, isa: str | None) -> None:
        self.rows, self.vocab = logits.shape
        g = GraphBuilder(self.rows, self.rows)
        table = g.weight("table", logits.shape, FORMATS["f32"])
        plan = compile(g.build(logits=g.embed(g.token_ids, table)), naive_target())
        config: dict[str, Any] = {"isa": isa or "", "threads": threads or 0, "vocab": self.vocab, "layers": 1}
        config |= {"max_tokens": self.rows, "max_sampled": self.rows, "num_slots": self.rows, "kv_dtype": "f32"}
        config |= {"max_blocks_per_slot": 1, "num_blocks": self.rows, "heads": 1, "kv_heads": 1, "head_dim": 16}
        config |= {"arena_bytes": plan.arena_bytes, "weight_bytes": packed_weight_bytes(plan)}
        self.native = _native.Executor(config | {"rope_frequency": [0.0] * 8})
        stored = _native.FileMatrix([(quantize(FORMATS["f32"], logits), None)], "f32", self.vocab, 0, False)
        [matrix], *_ = self.native.pack([stored])
        Lowering(plan, self.native, {("table", True): matrix}, {}).run()

    def step(self, sampling: np.ndarray, starts: list[SlotStart]) -> float:
        """Runs one step; returns seconds spent sampling."""
        each = np.arange(self.rows + 1, dtype=np.int32)
        tables = np.stack([each[:-1], np.zeros_like(each[:-1]), each[:-1]], axis=1)
        rows, zeros = each[:-1], np.zeros(self.rows, np.int32)
        no_copies = np.zeros((0, 2), np.int32)
        self.native.set_profiling(True)
        self.native.reset_profile()
        self.native.launch(rows, zeros, rows, each, zeros + 1, rows, sampling, tables, no_copies, starts)
        self.native.finish(None)
        return next(seconds for name, _, seconds, *_ in self.native.profile()[2] if name == "sample")

    def measure(self, settings: dict[str, Any], penalized: bool, seconds: float) -> float:
        """Median seconds of sampling every row."""
        sampling = np.zeros(self.rows, SAMPLING_DTYPE)
        sampling["temperature"], sampling["top_p"], sampling["num_logprobs"] = 1.0, 1.0, -1
        sampling["seed"] = np.arange(self.rows)
        for name, value in settings.items():
            sampling[name] = value
        seen = np.random.default_rng(1).integers(0, self.vocab, 1000).astype(np.int32)
        asked = {"prompt_len": 500, "repetition_penalty": 1.1, "presence_penalty": 0.5} if penalized else {}
        starts = [SlotStart(s, tokens=seen, **asked) for s in range(self.rows)]
        times, until = [self.step(sampling, starts)], time.perf_counter() + seconds
        while time.perf_counter() < until or len(times) < 6:
            times.append(self.step(sampling, []))
        return statistics.median(times[1:])


def torch_sampler(logits: np.ndarray, settings: dict[str, Any], threads: int) -> Callable[[], Any] | None:
    """The same settings as one writes them in torch; None where there is no counterpart."""
    import torch

    torch.set_num_threads(threads)
    x = torch.from_numpy(logits)
    k, p, t = settings.get("top_k", 0), settings.get("top_p", 1.0), settings.get("temperature", 1.0)
    if set(settings) - {"top_k", "top_p", "temperature"}:
        return None

    def run() -> Any:
        if t == 0:
            return x.argmax(dim=-1)
        values, ids = (x.topk(k) if k else x.sort(descending=True)) if k or p < 1 else (x, None)
        probabilities = torch.softmax(values / t, dim=-1)
        if p < 1:
            before = probabilities.cumsum(dim=-1) - probabilities
            probabilities = torch.where(before < p, probabilities, 0.0)
        drawn = torch.multinomial(probabilities, 1)
        return drawn if ids is None else ids.gather(-1, drawn)

    return run


def median_of(run: Callable[[], Any], repeats: int = 3) -> float:
    """Median seconds of a call after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Prints one table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=150_000)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--isa", default=None)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--no-torch", action="store_true")
    args = parser.parse_args()
    if args.vocab < args.rows:
        parser.error("the vocabulary must be at least as large as the rows: token ids name rows")
    bandwidth = measure_peaks(args.threads, args.isa).bandwidth
    results: dict[str, Any] = {}
    print(f"{args.rows} rows of {args.vocab} logits; memory reads at {bandwidth / 1e9:.1f} GB/s")
    print(f"{'logits':8}{'settings':24}{'ms a step':>10}{'us a row':>10}{'GB/s':>8}{'roofline':>10}{'torch':>9}")
    for kind in ("peaked", "flat"):
        logits = logits_of(kind, args.rows, args.vocab)
        sampler = Sampler(logits, args.threads, args.isa)
        for name, settings in SETTINGS.items():
            seconds = sampler.measure(settings, "penalties" in name, args.seconds)
            rate = logits.nbytes / seconds
            run = None if args.no_torch else torch_sampler(logits, settings, sampler.native.threads)
            peer = median_of(run) / seconds if run and "penalties" not in name else None
            results[f"{kind}: {name}"] = {"ms": seconds * 1e3, "torch_ratio": peer}
            print(
                f"{kind:8}{name:24}{seconds * 1e3:10.3f}{seconds / args.rows * 1e6:10.1f}{rate / 1e9:8.1f}"
                f"{rate / bandwidth:10.0%}" + (f"{peer:8.1f}x" if peer else f"{'':9}")
            )
    print(json.dumps({"rows": args.rows, "vocab": args.vocab, "gb_s": bandwidth / 1e9, "results": results}))


if __name__ == "__main__":
    main()
