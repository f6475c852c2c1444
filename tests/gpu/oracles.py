"""What must hold of the CUDA executor, first what notices most for its time: ``mutate_executor.py`` runs it all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

from tests.gpu import test_engine, test_executor, test_refusals, test_scripts, test_shapes, test_step, test_weights
from tests.gpu.runs import script, serve


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


BF16: dict[str, Any] = {"fmt": "bf16", "kv_dtype": "bf16", "layers": 1}
INT8: dict[str, Any] = {"fmt": "q4_1", "kv_dtype": "int8", "windows": (12, 0)}
MIXED: dict[str, Any] = {
    **{
        "fmt": "f16",
        "kv_dtype": "bf16",
        "layers": 1,
        "changes": (("tied", False), ("num_kv_heads", 1), ("vocab_size", 150)),
    },
    "others": (("up", "q4_0"), ("v", "q8_0"), ("embed", "q8_0")),
}
HALF: dict[str, Any] = {"fmt": "f16", "kv_dtype": "f16", "hidden": "f16", "layers": 1}


ORACLES: list[Callable[[], None]] = [
    partial(script, 18, BF16),
    partial(script, 66, INT8),
    partial(script, 37, MIXED),
    *tests_of(test_scripts),
    *tests_of(test_step),
    *tests_of(test_refusals),
    *tests_of(test_shapes),
    *tests_of(test_weights),
    partial(script, 73, HALF, arch="sm_80", steps=5),
    partial(script, 81, BF16, invariant=False, steps=4),
    *tests_of(test_executor, "test_logits_lose_what_their_roundings_cost"),
    partial(serve, 1, BF16, speculation="ngram", ngram_min=1),
    partial(serve, 2, INT8),
    *tests_of(test_engine),
]
