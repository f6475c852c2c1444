"""The closed set of kernel variants that a plan can ask for: what is compiled before an engine is ready, and no more.

Triton compiles a kernel anew for every combination of its constants, of its arguments' types, and of what it knows of
them: that a pointer or an integer is a multiple of 16, that an integer is 1. ``key`` is that combination. Steps run in
buckets of sizes (``buckets``), so the keys of all buckets are all there is.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch

from ridgeline.backends.cuda import weights as packed
from ridgeline.backends.cuda.kernels.step import resolve
from ridgeline.backends.cuda.launch import TORCH, Key, Launch
from ridgeline.backends.cuda.lowering import (
    FEW_TOKENS,
    Cache,
    Lowering,
    Sizes,
    StepTensors,
    Workspace,
    workspace_sizes,
)
from ridgeline.graph.ir import bound
from ridgeline.graph.plan import Plan


def buckets(max_tokens: int, max_requests: int, max_rows: int) -> list[Sizes]:
    """Step sizes that are padded to: powers of two, with and without prefills.

    Requests and rows are as many as the tokens, up to their own bounds. A step without prefills has at most 8 tokens
    of each request, so it needs no bucket beyond that.
    """
    found = []
    tokens = 1
    while True:
        tokens = min(tokens, max_tokens)
        for prefills in (False, True):
            sizes = Sizes(tokens, min(tokens, max_requests), min(tokens, max_rows), prefills)
            if fits(sizes, max_requests):
                found.append(sizes)
        if tokens == max_tokens:
            return found
        tokens *= 2


def fits(sizes: Sizes, max_requests: int) -> bool:
    """Whether any step is of this kind: prefills have more than 8 tokens, and others at most 8 a request."""
    if sizes.prefills:
        return sizes.tokens > FEW_TOKENS
    return sizes.tokens < 2 * FEW_TOKENS * max_requests


@lru_cache
def _unspecialized(kernel: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Names of a kernel's constants, and of the arguments whose value Triton is told not to look at."""
    parameters = inspect.signature(kernel.fn).parameters
    constants = frozenset(n for n, p in parameters.items() if "constexpr" in str(p.annotation))
    listed = getattr(kernel, "do_not_specialize", None)
    if listed is None:  # interpreted
        listed = kernel.kwargs.get("do_not_specialize")
    names = list(parameters)
    return constants, frozenset(names[n] if isinstance(n, int) else n for n in listed or ())


def key(launch: Launch) -> Key:
    """What Triton would look a launch's compiled kernel up by."""
    constants, unseen = _unspecialized(launch.kernel)
    config = launch.config
    args = tuple((name, _known(value, name in unseen)) for name, value in launch.args.items() if name not in constants)
    fixed = tuple(sorted((name, repr(value)) for name, value in config.meta.items()))
    options = (config.num_warps, config.num_stages, config.fuse)
    return (launch.kernel.fn.__module__, launch.kernel.fn.__name__, fixed, args, options)


def _known(value: Any, unseen: bool) -> Any:
    """What of an argument reaches the compiler."""
    if isinstance(value, torch.Tensor):
        address = value.data_ptr() or value.storage_offset() * value.element_size()  # of shapes, the offset is all
        return str(value.dtype), address % 16 == 0
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        width = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
        return width if unseen else 1 if value == 1 else (width, value % 16 == 0)
    if isinstance(value, float):
        return "fp32"
    if type(value).__name__ == "TensorDescriptor":
        return str(value.base.dtype), tuple(value.block_shape)
    return repr(value)


def over_shapes(plan: Plan, arch: str, most: Sizes, context: int, invariant: bool = True) -> Lowering:
    """A plan's lowering over tensors on the meta device, for steps of up to ``most``."""

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device="meta")

    matrices = packed.shapes(plan)
    caches = []
    for spec in plan.caches:
        blocks = max(1, context // spec.block_size)
        shape = (len(spec.layers), blocks, spec.num_kv_heads, spec.block_size, spec.head_dim)
        k = torch.empty(shape, dtype=TORCH[spec.dtype], device="meta")
        scales = floats(*shape[:-1]) if spec.dtype == "int8" else None
        caches.append(Cache(k, k, ints(most.requests, blocks), scales, scales))
    partials, counters = workspace_sizes(plan, matrices, most, context, arch)
    tokens, requests = most.tokens, most.requests
    step = StepTensors(
        token_ids=ints(tokens),
        positions=ints(tokens),
        token_slots=ints(tokens),
        slots=ints(requests),
        query_starts=ints(requests + 1),
        context_lens=ints(requests),
        sample_rows=ints(most.rows),
        identity=ints(tokens),
    )
    half = plan.caches[0].head_dim // 2
    return Lowering(
        plan,
        arch,
        torch.empty(plan.arena_bytes, dtype=torch.uint8, device="meta"),
        matrices,
        caches,
        step,
        (floats(context, half), floats(context, half)),
        Workspace(floats(partials), ints(counters)),
        context,
        invariant,
    )


def reachable(plan: Plan, arch: str, context: int, max_requests: int, invariant: bool = True) -> list[Launch]:
    """Every variant that an executor of the plan can ask for, each once, as a launch over shapes that asks for it.

    Args:
        context: tokens of the longest sequence.
        max_requests: that run at once.
    """
    from ridgeline.backends.cuda.beside import every_launch_beside
    from ridgeline.backends.cuda.step import Layout

    tokens, rows = bound(plan.inputs["token_ids"].shape[0]), bound(plan.outputs["logits"].shape[0])
    most = Sizes(tokens, min(max_requests, tokens), rows, True)
    lowering = over_shapes(plan, arch, most, context, invariant)
    found: dict[Key, Launch] = {}
    step = lowering.step
    launches = resolve(step.token_ids, step.token_slots, step.slots, step.identity)
    for bucket in buckets(most.tokens, most.requests, most.rows):
        launches += lowering.launches(bucket)
    launches += every_launch_beside(plan, Layout(most), lowering.caches, arch)
    for launch in launches:
        found.setdefault(key(launch), launch)
    return list(found.values())
