"""A small model asked for a script of steps, or serving requests: beside numpy, and again in other company."""

from __future__ import annotations

from random import Random
from typing import Any

from ridgeline.backends.cuda.emulated import EmulatedDevice
from ridgeline.backends.cuda.executor import CudaExecutor
from ridgeline.engine.engine import Engine, EngineLimits
from tests.gpu.scripts import Script, play, same
from tests.gpu.shadow import Shadowed
from tests.gpu.small_model import model, sizes_for
from tests.graph.small_llama import Driver
from tests.invariance.workloads import alone, one_hash, together, workload


def made_of(kind: dict[str, Any], seed: int, arch: str = "sm_90", invariant: bool = True) -> CudaExecutor:
    """An executor of a small model (arguments of ``small_model.model``) on a device whose streams a seed orders."""
    _, plan, weights = model(**kind)
    return CudaExecutor(plan, weights, EmulatedDevice(arch, seed), batch_invariant=invariant, **sizes_for(plan))


def script(seed: int, kind: dict[str, Any], steps: int = 8, arch: str = "sm_90", invariant: bool = True) -> None:
    """A script one step at a time beside numpy, then two at a time: the same bits."""
    windows = tuple(dict.fromkeys(kind.get("windows") or (0,)))
    vocab = dict(kind.get("changes", ())).get("vocab_size", 160)
    quiet = Shadowed(made_of(kind, seed, arch, invariant), *model(**kind))
    first = play(Script(seed, windows, vocab), quiet, steps, 1)
    if invariant:
        same(play(Script(seed, windows, vocab), made_of(kind, seed + 1, arch), steps, 2), first)


def long(seed: int, kind: dict[str, Any], tokens: int, arch: str = "sm_90") -> int:
    """A request of so many tokens, decoded with others beside it, every step beside numpy. Returns the steps."""
    rng = Random(seed)
    ids = [rng.randrange(150) for _ in range(tokens)]
    beside = Shadowed(made_of(kind, seed, arch), *model(**kind))
    driver = Driver(beside, sum(sizes_for(model(**kind)[1])["num_blocks"]), 16, seed)
    while (at := driver.lengths.get(0, 0)) < tokens - 3:
        driver.step([(0, ids[at : min(at + 32, tokens - 3)])])
    driver.step([(0, ids[-3:-2])])
    driver.step([(1, ids[:5]), (0, ids[-2:-1])])
    driver.step([(0, ids[-1:]), (1, ids[5:6])])
    return beside.steps


def serve(seed: int, kind: dict[str, Any], requests: int = 3, **changes: Any) -> int:
    """A workload's requests alone beside numpy, then all at once: the same bits. Returns the steps."""
    windows = tuple(dict.fromkeys(kind.get("windows") or (0,)))
    vocab = dict(kind.get("changes", ())).get("vocab_size", 160)
    asks = workload(seed, requests, vocab, 40, (2, 5))
    sizes = {"vocab_size": vocab, "block_size": 16, "max_sampled_rows": 8, "max_len": 60, "windows": windows}
    quiet = EngineLimits(max_requests=1, max_tokens=32, num_blocks=[40] * len(windows), **sizes)  # type: ignore[arg-type]
    beside = Shadowed(made_of(kind, seed), *model(**kind))
    expected = alone(Engine(beside, quiet, seed=seed), asks)
    values = {"max_requests": 4, "max_tokens": 20, "num_blocks": [9] * len(windows), "max_open_steps": 2} | changes
    busy = made_of(kind, seed + 1)
    served = together(Engine(busy, EngineLimits(**sizes, **values), seed=seed + 1), asks, seed)  # type: ignore[arg-type]
    assert one_hash(served) == one_hash(expected)
    return beside.steps + busy._count
