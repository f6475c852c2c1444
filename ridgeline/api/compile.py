"""``ridgeline compile``: the GPU kernels that a model will need, compiled ahead, on any machine."""

from __future__ import annotations

import os
import time
from typing import Annotated, Any

import typer

from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import ConfigError, RidgelineError

Model = Annotated[str, typer.Argument(help="an alias, a GGUF file, a config.json or a folder with one")]


def compile_model(
    model: Model,
    arch: Annotated[str, typer.Option("--arch", help="what to compile for: sm_80 (A100), sm_90 (H100)")] = "sm_90",
    jobs: Annotated[int | None, typer.Option("--jobs", help="processes (default: as many as cores)")] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="plan for matrices in this format (bf16, q4_1, ...)")
    ] = None,
    *,
    engine: dict[str, Any],
) -> None:
    """Compile every GPU kernel variant that a model can ask for, into the cache that launches read; needs no GPU."""
    from ridgeline.api.kernels import require_toolchain

    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {jobs}")
    require_toolchain()
    os.environ.pop("TRITON_INTERPRET", None)
    config = EngineConfig(model=model, **{**engine, "backend": "cuda"})
    from ridgeline.backends.cuda.compiled import Compiled, Order, compile_all, use_cache
    from ridgeline.backends.cuda.ladder.check import archs_of
    from ridgeline.backends.cuda.variants import reachable
    from ridgeline.engine.planning import plan_for_cuda
    from ridgeline.models.description import describe

    (wanted,) = archs_of(arch)[:1]
    start = time.perf_counter()
    described = describe(model) if weights is None else describe(model).stored_as(weights)
    plan, context = plan_for_cuda(described, config)
    orders = [
        Order.of(launch, wanted)
        for launch in reachable(plan, wanted, context, config.max_num_seqs, config.batch_invariant)
    ]

    def say(one: Compiled, done: int, of: int) -> None:
        if one.seconds:
            print(f"{done:4}/{of} {one.kernel} {one.seconds:.1f} s {one.error}", flush=True)

    found = compile_all(orders, jobs or len(os.sched_getaffinity(0)), say)
    failed = [one for one in found if one.error]
    fresh = sum(one.seconds > 0 for one in found)
    print(
        f"{len(found)} variants for {wanted}: {len(found) - fresh} were there, {fresh - len(failed)} compiled, "
        f"{len(failed)} failed, in {time.perf_counter() - start:.1f} s; {use_cache()}"
    )
    if failed:
        raise RidgelineError(f"{failed[0].kernel}: {failed[0].error}")
