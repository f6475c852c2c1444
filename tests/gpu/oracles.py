"""What must hold of the CUDA executor, cheapest first: what ``mutate_executor.py`` runs against every mutant."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

from ridgeline.backends.cuda.emulated import EmulatedDevice
from ridgeline.backends.cuda.executor import CudaExecutor
from ridgeline.engine.engine import Engine, EngineLimits
from tests.gpu import test_engine, test_executor, test_scripts, test_shapes, test_weights
from tests.gpu.scripts import Script, play, same
from tests.gpu.shadow import Shadowed
from tests.gpu.small_model import model, sizes_for
from tests.invariance.workloads import alone, one_hash, together, workload


def cases(function: Any) -> list[Callable[[], None]]:
    """A test function once for each of its parameters' combinations."""
    axes = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            names, values = mark.args
            names = names.split(",") if isinstance(names, str) else names
            axes.append([dict(zip(names, v if len(names) > 1 else [v], strict=True)) for v in values])
    return [partial(function, **{k: v for part in parts for k, v in part.items()}) for parts in product(*axes)]


def tests_of(module: ModuleType, *without: str) -> list[Callable[[], None]]:
    """Every case of a module's tests that need no fixture."""
    found: list[Callable[[], None]] = []
    for name, function in vars(module).items():
        if name.startswith("test_") and name not in without:
            made = cases(function)
            keywords = made[0].keywords if made and isinstance(made[0], partial) else {}
            if set(inspect.signature(function).parameters) <= set(keywords):
                found += made
    return found


def made_of(kind: dict[str, Any], seed: int, arch: str = "sm_90", invariant: bool = True) -> CudaExecutor:
    """An executor of a small model (arguments of ``small_model.model``) on a device whose streams a seed orders."""
    _, plan, weights = model(**kind)
    return CudaExecutor(plan, weights, EmulatedDevice(arch, seed), batch_invariant=invariant, **sizes_for(plan))


def script(seed: int, kind: dict[str, Any], steps: int = 8, arch: str = "sm_90", invariant: bool = True) -> None:
    """A script one step at a time beside numpy, then two at a time: the same bits."""
    windows = tuple(dict.fromkeys(kind.get("windows", (0,))))
    quiet = Shadowed(made_of(kind, seed, arch, invariant), *model(**kind))
    first = play(Script(seed, windows), quiet, steps, 1)
    if invariant:
        same(play(Script(seed, windows), made_of(kind, seed + 1, arch), steps, 2), first)


def serve(seed: int, kind: dict[str, Any], requests: int = 3, **changes: Any) -> int:
    """A workload's requests alone beside numpy, then all at once: the same bits. Returns the steps."""
    windows = tuple(dict.fromkeys(kind.get("windows", (0,))))
    asks = workload(seed, requests, 160, 40, (2, 5))
    sizes = {"vocab_size": 160, "block_size": 16, "max_sampled_rows": 8, "max_len": 60, "windows": windows}
    quiet = EngineLimits(max_requests=1, max_tokens=32, num_blocks=[40] * len(windows), **sizes)  # type: ignore[arg-type]
    beside = Shadowed(made_of(kind, seed), *model(**kind))
    expected = alone(Engine(beside, quiet, seed=seed), asks)
    values = {"max_requests": 4, "max_tokens": 20, "num_blocks": [9] * len(windows), "max_open_steps": 2} | changes
    busy = made_of(kind, seed + 1)
    served = together(Engine(busy, EngineLimits(**sizes, **values), seed=seed + 1), asks, seed)  # type: ignore[arg-type]
    assert one_hash(served) == one_hash(expected)
    return beside.steps + busy._count


BF16: dict[str, Any] = {"fmt": "bf16", "kv_dtype": "bf16", "layers": 1}
INT8: dict[str, Any] = {"fmt": "q4_1", "kv_dtype": "int8", "windows": (12, 0)}
MIXED: dict[str, Any] = {
    **{"fmt": "f16", "kv_dtype": "bf16", "layers": 1, "changes": (("tied", False), ("num_kv_heads", 1))},
    "others": (("up", "q4_0"), ("v", "q8_0"), ("embed", "q8_0")),
}
HALF: dict[str, Any] = {"fmt": "f16", "kv_dtype": "f16", "hidden": "f16", "layers": 1}


ORACLES: list[Callable[[], None]] = [
    *tests_of(test_shapes),
    *tests_of(test_weights),
    *tests_of(test_scripts),
    *tests_of(test_executor, "test_logits_lose_what_their_roundings_cost"),
    partial(script, 18, BF16),
    partial(script, 66, INT8),
    partial(script, 37, MIXED),
    partial(script, 73, HALF, arch="sm_80", steps=5),
    partial(script, 81, BF16, invariant=False, steps=4),
    *tests_of(test_engine),
    partial(serve, 1, BF16, speculation="ngram", ngram_min=1),
    partial(serve, 2, INT8),
]
