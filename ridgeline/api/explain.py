"""``ridgeline explain``: what a model becomes on a device, and what that will cost."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import ConfigError
from ridgeline.core.hardware import DATASHEET, DEVICES, Peaks

if TYPE_CHECKING:
    from ridgeline.perf.operators import OpTable

MEASURED_STEPS = 64
"""Decode steps that ``--measure`` counts."""

Model = Annotated[str, typer.Argument(help="an alias, a GGUF file, a config.json or a folder with one")]


def explain(
    model: Model,
    device: Annotated[str, typer.Option("--device", help=f"cpu, {', '.join(DEVICES)}")] = "cpu",
    batch: Annotated[int, typer.Option("--batch", help="requests of a decode step")] = 1,
    context: Annotated[int | None, typer.Option("--context", help="tokens in the cache of each")] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="plan for matrices in this format (bf16, q4_1, ...)")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="on this CPU: run the steps, and show the time of each operator too")
    ] = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Show a model's passes, kernels, memory and predicted speed; a GPU's on any machine, with no weights."""
    if batch < 1 or (context is not None and context < 1):
        raise ConfigError("--batch and --context must be at least 1")
    if measure and (device != "cpu" or weights is not None):
        raise ConfigError("--measure runs the model's file on this CPU: leave out --device and --weights")
    from ridgeline.models.description import describe

    described = describe(model) if weights is None else describe(model).stored_as(weights)
    gpu = device != "cpu"
    options = {**engine, "backend": "cuda" if gpu else "cpu", "device": None}
    if gpu:
        options |= {"threads": None, "isa": None}
    options["max_num_seqs"] = max(batch, options["max_num_seqs"])
    options["max_num_batched_tokens"] = max(options["max_num_seqs"], options["max_num_batched_tokens"])
    config = EngineConfig(model=model, **options)
    length = config.model_len(described.config.context_length)
    context = min(length, 2048) if context is None else context
    if context > length:
        raise ConfigError(f"--context {context} is beyond the model's {length} tokens")
    measured = _measure(config, batch, context) if measure else None
    print("\n".join(_report(described, config, device, batch, context, measured)))


def _measure(config: EngineConfig, batch: int, context: int) -> OpTable:
    """Decode steps of the model, timed."""
    from ridgeline.engine.load import load_runtime
    from ridgeline.perf.profile import run_profile
    from ridgeline.perf.work import Shape

    if config.num_kv_blocks is None and config.kv_cache_bytes is None:
        blocks = batch * -(-(context + 8 * MEASURED_STEPS) // config.block_size)
        options = {f.name: getattr(config, f.name) for f in fields(config)}
        config = EngineConfig(**{**options, "num_kv_blocks": blocks})
    return run_profile(load_runtime(config), [Shape(batch, context)], MEASURED_STEPS)[0]


def _report(
    described: Any, config: EngineConfig, device: str, batch: int, context: int, measured: OpTable | None
) -> list[str]:
    from ridgeline.engine.planning import plan_for_cpu, plan_for_cuda
    from ridgeline.graph.cost import Load
    from ridgeline.perf import explain as perf

    gpu = device != "cpu"
    plan = plan_for_cuda(described, config)[0] if gpu else plan_for_cpu(described, config)
    peaks, launched = measured.peaks if measured else _peaks(device), None
    memory = perf.Memory(0, described.weight_bytes, plan.arena_bytes, 0, perf.cache_per_token(plan))
    if gpu:
        launched, memory = _on_gpu(plan, config, device, batch, context)
        perf.check_fits(memory, described, config, batch, context, device)
    load = Load.of([(context - 1, 1)] * batch)
    ops = perf.op_lines(plan, load, peaks, launched)
    lines = [f"{described.name} on {device}: {batch} requests decoding at a context of {context} tokens", ""]
    lines += _passes(perf.pass_lines(plan, context)) + [""] + _operators(ops, gpu, measured) + [""]
    lines += _memory(memory, context, batch, gpu) + [""]
    seconds = perf.step_seconds(ops)
    lines.append(
        f"predicted: {seconds * 1e3:.3f} ms a step, {batch / seconds:,.0f} tokens/s, "
        f"{sum(line.launches for line in ops)} launches" if gpu else
        f"roofline: {seconds * 1e3:.3f} ms a step, {batch / seconds:,.0f} tokens/s, from peaks measured here"
    )  # fmt: skip
    if gpu:
        lines += ["assumed: " + "; ".join(perf.ASSUMPTIONS)]
    if measured:
        lines.append(
            f"measured: {measured.seconds * 1e3:.3f} ms a step, {batch / measured.seconds:,.0f} tokens/s, "
            f"{measured.share:.0%} of the roofline; operators take "
            f"{measured.total('operator') / measured.seconds:.1%} of it"
        )
        lines += [*measured.notes, measured.verdict()]
    return lines


def _peaks(device: str) -> Peaks:
    if device == "cpu":
        from ridgeline.perf.machine import measure_peaks

        return measure_peaks(seconds=0.1)
    if device not in DEVICES:
        raise ConfigError(f"no device is called {device}: cpu, {', '.join(DEVICES)}")
    return DATASHEET[DEVICES[device]]


def _on_gpu(plan: Any, config: EngineConfig, device: str, batch: int, context: int) -> tuple[Any, Any]:
    """Launches of each operator by label, and the ledger of the device."""
    from ridgeline.perf import explain as perf

    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not installed, which kernels are written in: 'ridgeline[cuda]'")
    from ridgeline.backends.cuda import choices
    from ridgeline.backends.cuda.budget import budget_of
    from ridgeline.backends.cuda.memory import Limits

    arch = "sm_80" if device.startswith("a100") else "sm_90"
    longest = -(-context // config.block_size) * config.block_size
    launched = {}
    for op, launches in choices.chosen(plan, arch, batch, False, longest, config.max_num_seqs):
        launched[op.label] = (len(launches), *choices.describe(launches))
    limits = Limits.of(plan, config.max_num_seqs, [], longest // config.block_size)
    budget = budget_of(plan, arch, limits, longest)
    beside = budget.workspace + budget.steps + budget.asked
    total = perf.device_memory(device)
    return launched, perf.Memory(total, budget.weights, budget.arena, beside, perf.cache_per_token(plan))


def _passes(found: list[Any]) -> list[str]:
    lines = [f"{'pass':24}{'operators':>14}{'saved a token':>18}"]
    for one in found:
        lines.append(f"{one.name:24}{one.before:>7} -> {one.after:<4}{one.saved_bytes / 1024:>14.1f} KiB")
    return lines


def _operators(found: list[Any], gpu: bool, measured: OpTable | None) -> list[str]:
    head = f"{'operator':28}{'count':>6}{'launches':>9}{'MB read':>10}{'GOP':>9}{'us':>9}  binds    kernel"
    lines = [head if gpu else head.replace("launches", "        ").replace("kernel", "")]
    achieved = {row.name: row for row in measured.of_kind("operator")} if measured else {}
    if measured:
        lines[0] += f"{'achieved us':>12}{'share':>7}  binds there"
    for one in found:
        read = (one.cost.weight_bytes + one.cost.kv_read) / 1e6
        launches = str(one.launches) if gpu else ""
        why = f"{one.kernel} ({one.reason})" if one.reason else one.kernel
        if row := achieved.get(one.name):
            why += f"{row.seconds * 1e6:>12.1f}" + (f"{row.share:>7.0%}" if row.limit else f"{'':7}") + f"  {row.binds}"
        lines.append(
            f"{one.name:28}{one.count:>6}{launches:>9}{read:>10.1f}{one.cost.dot_ops / 1e9:>9.2f}"
            f"{one.seconds * 1e6:>9.1f}  {one.binds:8} {why}".rstrip()
        )
    return lines


def _memory(memory: Any, context: int, batch: int, gpu: bool) -> list[str]:
    from ridgeline.core.hardware import GPU_RESERVED
    from ridgeline.perf.explain import gib

    lines = [
        f"memory: weights {gib(memory.weights)}, arena {gib(memory.arena)}, workspace {gib(memory.workspace)}, "
        f"cache {memory.cache_per_token:,} bytes a token, {gib(memory.cache(batch, context))} for these requests"
    ]
    if gpu:
        lines.append(
            f"        of {gib(memory.total)}, {gib(GPU_RESERVED)} kept for the driver: {gib(memory.free)} for the "
            f"cache, at most {memory.largest_batch(context):,} requests of {context} tokens"
        )
    return lines
