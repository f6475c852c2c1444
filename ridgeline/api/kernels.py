"""``ridgeline kernels``: check GPU kernels on the ladder, show and keep their cards."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ridgeline.core.errors import ConfigError

ARCHS = "sm_80,sm_90"
RUNGS = "interpret,compile,gpu"
PAGE = Path("docs/gpu-cards.md")
Archs = Annotated[str, typer.Option("--arch", help="architectures, by commas")]


def make_app() -> typer.Typer:
    """The sub-commands."""
    app = typer.Typer(help="GPU kernels: check them with or without a GPU.")
    app.command("check")(check)
    app.command("cards")(cards)
    app.command("bench")(bench)
    app.callback(invoke_without_command=True)(_no_command)
    return app


def _no_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        raise ConfigError("no kernels command given: check, cards or bench (ridgeline kernels --help tells more)")


def require_toolchain() -> None:
    """Raises ConfigError unless torch and triton can be imported."""
    missing = [name for name in ("torch", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not installed: pip install 'ridgeline[cuda]'")


def _prepare(root: Path) -> None:
    """Kernels are interpreted in this process, and cases live beside the package."""
    require_toolchain()
    os.environ["TRITON_INTERPRET"] = "1"
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))


def check(
    op: Annotated[
        str | None, typer.Argument(help="an operator, path/to/file.py:kernel, or the beginning of a case's name")
    ] = None,
    arch: Archs = ARCHS,
    rung: Annotated[str, typer.Option("--rung", help="rungs, by commas")] = RUNGS,
    root: Annotated[Path, typer.Option("--root", help="the checkout with the cases")] = Path("."),
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="only what fails or is skipped, and the sum")] = False,
) -> None:
    """Climb the ladder: exit code 0 if every case passes every rung that can run here, else 1."""
    _prepare(root.resolve())
    from ridgeline.backends.cuda.ladder.check import RUNGS as known
    from ridgeline.backends.cuda.ladder.check import archs_of, climb

    rungs = [r.strip() for r in rung.split(",")]
    for name in rungs:
        if name not in known:
            raise ConfigError(f"no rung is called {name}: {', '.join(known)}")
    failed = passed = 0
    for outcome in climb(root.resolve(), op, archs_of(arch), rungs):
        failed += outcome.status == "FAILED"
        passed += outcome.status == "ok"
        if not quiet or outcome.status != "ok":
            print(
                f"{outcome.status:8}{outcome.arch:6} {outcome.rung:10}{outcome.seconds:6.2f} s  "
                f"{outcome.case}: {outcome.detail}",
                flush=True,
            )
    print(f"{passed} passed, {failed} failed")
    if failed:
        raise typer.Exit(1)


def cards(
    op: Annotated[str | None, typer.Argument(help="an operator; all if none")] = None,
    arch: Archs = ARCHS,
    write: Annotated[bool, typer.Option("--write", help="replace the table of docs/gpu-cards.md")] = False,
) -> None:
    """Compile every kernel for the shapes of an 8B Llama and show what its machine code says; 1 if it got worse."""
    _prepare(Path(".").resolve())
    from ridgeline.backends.cuda.ladder import table
    from ridgeline.backends.cuda.ladder.check import archs_of

    ops = table.names()
    if op is not None and op not in ops:
        raise ConfigError(f"no kernel file is called {op}: {', '.join(ops)}")
    if not PAGE.exists():
        raise ConfigError(f"no {PAGE} here to compare with: run this in a checkout of the repository")
    rows = table.make([op] if op else ops, archs_of(arch))
    print(table.render(rows))
    page = PAGE.read_text()
    if write:
        made = {(row.kernel, row.arch) for row in rows}
        kept = [r for r in table.read(page) if r.kernel in ops and (r.kernel, r.arch) not in made]
        head = page.split("\n| kernel |")[0].rstrip()
        merged = sorted([*kept, *rows], key=lambda row: (ops.index(row.kernel), row.arch))
        PAGE.write_text(f"{head}\n\n{table.render(merged)}")
        return
    worse = table.regressions(table.read(page), rows)
    print("\n".join(worse) if worse else "nothing got worse")
    if worse:
        raise typer.Exit(1)


def bench(op: Annotated[str | None, typer.Argument(help="an operator; all if none")] = None) -> None:
    """Time kernels on this machine's GPU beside PyTorch's: us, TFLOPS, GB/s, share of the roofline, x library."""
    require_toolchain()
    from ridgeline.backends.cuda.ladder import gpu, table

    ops = table.names()
    if op is not None and op not in ops:
        raise ConfigError(f"no kernel file is called {op}: {', '.join(ops)}")
    arch = gpu.device_arch()
    print(gpu.render(gpu.timings([op] if op else ops), arch))
