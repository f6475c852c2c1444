"""``ridgeline profile``: where a step's time goes, operator by operator."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import ConfigError

if TYPE_CHECKING:
    from ridgeline.perf.operators import OpRow, OpTable
    from ridgeline.perf.work import Shape

NSIGHT_STEPS = {"nsys": 32, "ncu": 2}
"""Most steps of each shape that a tool looks at: Nsight Compute runs every kernel several times."""

Model = Annotated[str, typer.Argument(help="an alias (smollm2) or the path of a GGUF file")]


def profile(
    model: Model,
    prompt: Annotated[int, typer.Option("-p", "--prompt", help="tokens of the prefill; 0 leaves it out")] = 512,
    batch: Annotated[str, typer.Option("-b", "--batch", help="batch sizes of the decode steps, by commas")] = "1,8",
    context: Annotated[int, typer.Option("--context", help="tokens in the cache of each decoding request")] = 256,
    steps: Annotated[int, typer.Option("-n", "--steps", help="decode steps with counters (and as many without)")] = 128,
    html: Annotated[Path | None, typer.Option("--html", help="write a page with the roofline plot here")] = None,
    output: Annotated[
        str, typer.Option("-o", "--output", help="table, or json for one line of it after the tables")
    ] = "table",
    nsys: Annotated[bool, typer.Option("--nsys", help="on a GPU: time kernels with NVIDIA Nsight Systems")] = False,
    ncu: Annotated[bool, typer.Option("--ncu", help="on a GPU: count with NVIDIA Nsight Compute; slow")] = False,
    only_steps: Annotated[bool, typer.Option("--only-steps", hidden=True)] = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Show where a model's steps spend their time: each operator beside its roofline, and what binds it."""
    if output not in ("table", "json"):
        raise ConfigError(f"--output must be table or json, got {output!r}")
    batches = numbers("--batch", batch)
    if nsys and ncu:
        raise ConfigError("--nsys and --ncu are two tools: give one of them")
    if html is not None and not html.parent.is_dir():
        raise ConfigError(f"--html {html}: there is no folder {html.parent}")
    tool = "nsys" if nsys else "ncu" if ncu else None
    config = EngineConfig(model=model, **engine)
    _check_backend(config, tool)
    from ridgeline.perf.work import shapes_of

    shapes = shapes_of(prompt, batches, context)
    if only_steps:
        from ridgeline.engine.load import load_runtime
        from ridgeline.perf.profile_gpu import run_steps

        run_steps(load_runtime(config), shapes, steps)
        return
    tables = _under(tool, config, shapes, steps) if tool else _measured(config, shapes, steps)
    where = "on a GPU" if config.backend == "cuda" else f"{config.threads or 'all'} threads"
    show(tables, f"{model}, {where}{f', {tool}' if tool else ''}", html, output)


def _check_backend(config: EngineConfig, tool: str | None) -> None:
    """What has no clock or no kernels is refused before anything is loaded."""
    if config.backend == "reference":
        raise ConfigError("the reference backend has no counters: profile the cpu backend, or cuda on a GPU")
    if config.backend == "cuda" and config.device == "emulated":
        raise ConfigError("the emulated device has no time to measure: profile on a GPU, or the cpu backend")
    if tool is not None and config.backend != "cuda":
        raise ConfigError(f"--{tool} looks at a GPU's kernels: give --backend cuda, or leave it out")


def _measured(config: EngineConfig, shapes: Sequence[Shape], steps: int) -> list[OpTable]:
    """By our own clocks."""
    from ridgeline.engine.load import load_runtime

    if config.backend == "cpu":
        from ridgeline.perf.profile import run_profile

        return run_profile(load_runtime(config), shapes, steps)
    from ridgeline.perf.profile_gpu import run_gpu_profile

    return run_gpu_profile(load_runtime(config), shapes, steps)


def _under(tool: str, config: EngineConfig, shapes: Sequence[Shape], steps: int) -> list[OpTable]:
    """By Nsight, which runs this command again with ``--only-steps``."""
    from ridgeline.perf import nsight

    nsight.require_tool(tool)
    from ridgeline.backends.cuda.opening import open_device
    from ridgeline.core.hardware import datasheet_of
    from ridgeline.engine.planning import plan_for_cuda
    from ridgeline.models.description import describe

    peaks = datasheet_of(open_device("gpu").name())
    steps = min(steps, NSIGHT_STEPS[tool])
    with tempfile.TemporaryDirectory(prefix="ridgeline-") as folder:
        found = nsight.record(tool, child(config, shapes, steps), Path(folder))
    plan, _ = plan_for_cuda(describe(config.model), config)
    return nsight.tables(found, shapes, steps, plan, config.max_num_batched_tokens, peaks, tool)


def child(config: EngineConfig, shapes: Sequence[Shape], steps: int) -> list[str]:
    """The command line of the process that Nsight looks at: the same steps, in ranges, without graphs."""
    from ridgeline.perf.bench import flags_of

    values = {f.name: getattr(config, f.name) for f in fields(config)} | {"nvtx": True, "cuda_graphs": False}
    prompts = [shape.length for shape in shapes if not shape.decodes]
    decodes = [shape for shape in shapes if shape.decodes]
    words = [sys.executable, "-m", "ridgeline", "profile", config.model, "--only-steps", "-n", str(steps)]
    words += ["-p", str(prompts[0] if prompts else 0), "-b", ",".join(str(shape.batch) for shape in decodes)]
    words += ["--context", str(decodes[0].length)] if decodes else []
    return words + flags_of(EngineConfig(**values))


def numbers(flag: str, text: str) -> list[int]:
    """Numbers with commas between; empty for none. Raises ConfigError."""
    try:
        return [int(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"{flag} must be numbers with commas between, such as 1,8, got {text!r}") from None


def show(tables: Sequence[OpTable], title: str, html: Path | None, output: str) -> None:
    """Prints tables, and writes the page and the line of JSON that are asked for."""
    for table in tables:
        print("\n".join(render(table)), end="\n\n")
    if html is not None:
        from ridgeline.perf.page import make_page

        html.write_text(make_page(tables, title))
        print(f"page: {html}")
    if output == "json":
        print(json.dumps([as_dict(table) for table in tables]))


def render(table: OpTable) -> list[str]:
    """A table as lines of text."""
    lines = [
        f"{table.title}: {table.seconds * 1e3:.3f} ms, {table.tokens / table.seconds:,.0f} tokens/s, "
        f"{table.share:.0%} of the roofline",
        f"{'':24}{'calls':>6}{'us':>10}{'step':>7}{'GB/s':>8}{'GOP/s':>8}{'roof':>6}"
        + (f"{'':7}{'warps':>6}  binds" if table.counts_warps else f"{'waits':>7}{'idle':>6}  binds"),
    ]
    lines += [_line(row, table) for row in table.rows]
    lines.append(f"{'(in no row)':30}{table.unattributed * 1e6:>10.1f}{table.unattributed / table.seconds:>7.1%}")
    operators, runtime = table.total("operator"), table.total("runtime")
    parts = [f"operators {operators / table.seconds:.1%}"]
    if runtime:
        parts[0] += f" ({operators / (operators + runtime):.1%} of the executor's part)"
    parts += [f"{kind} {table.total(kind) / table.seconds:.1%}" for kind in ("runtime", "host") if table.of_kind(kind)]
    lines.append(f"sum: {', '.join(parts)} of the step; mean of the quieter {table.kept} of {table.steps} steps")
    if table.overhead is not None:
        more = "{:+.2%} ({:+.2%} to {:+.2%} with 95% confidence".format(*table.overhead)
        lines.append(f"counters on, a step takes {more}: median of {table.steps} pairs on and off)")
    lines += table.notes
    return [*lines, table.verdict()]


def _line(row: OpRow, table: OpTable) -> str:
    timed = f"{row.name[:24]:24}{row.calls:>6.0f}{row.seconds * 1e6:>10.1f}{row.seconds / table.seconds:>7.1%}"
    if row.kind != "operator":
        return f"{timed}{'':35}  {row.binds}"
    rates = f"{row.gb_s:>8.1f}" if row.bytes else f"{'':8}"
    rates += f"{row.gop_s:>8.0f}" if row.ops else f"{'':8}"
    rates += f"{row.share:>6.0%}" if row.limit else f"{'':6}"
    if table.counts_warps:
        waits = f"{'':7}" + (f"{'':6}" if row.occupancy is None else f"{row.occupancy:>6.0%}")
    else:
        waits = f"{row.waiting / row.seconds:>7.0%}{row.imbalance / row.seconds:>6.0%}" if row.seconds else f"{'':13}"
    return f"{timed}{rates}{waits}  {row.binds}"


def as_dict(table: OpTable) -> dict[str, Any]:
    """A table for JSON: times in seconds a step, rates in 1e9 a second."""
    return {
        "title": table.title,
        "seconds": table.seconds,
        "tokens": table.tokens,
        "roofline_share": table.share,
        "operators_share": table.total("operator") / table.seconds,
        "unattributed_seconds": table.unattributed,
        "counter_overhead": table.overhead,
        "steps": table.steps,
        "bottleneck": table.verdict(),
        "rows": [
            {
                "name": row.name,
                "kind": row.kind,
                "calls": row.calls,
                "seconds": row.seconds,
                "gb_s": row.gb_s,
                "gop_s": row.gop_s,
                "bound_seconds": row.bound,
                "roofline_share": row.share,
                "waiting_seconds": row.waiting,
                "imbalance_seconds": row.imbalance,
                "occupancy": row.occupancy,
                "binds": row.binds,
            }
            for row in table.rows
        ],
        "peaks": {
            "gb_s": table.peaks.bandwidth / 1e9,
            "int8_gop_s": table.peaks.int8 / 1e9,
            "bf16_gop_s": table.peaks.bf16 / 1e9,
            "f32_gop_s": table.peaks.f32 / 1e9,
        },
    }
