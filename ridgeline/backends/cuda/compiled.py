"""Kernels compiled ahead: in parallel processes, with no GPU needed, into a cache on disk that launches read.

The cache is Triton's own, which names an entry by the kernel's source and all it calls, its options, the toolchain and
what is known of its arguments; a launch of the same variant finds it there. Beside it lies a manifest of ours by the
same things, so that what is already there is told without starting Triton's compiler.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from ridgeline.backends.cuda.ladder.compile import compile_kernel, in_process
from ridgeline.backends.cuda.launch import Config, Launch
from ridgeline.backends.cuda.variants import key, reachable
from ridgeline.core.errors import RidgelineError
from ridgeline.graph.plan import Plan

MANIFEST = "ridgeline.json"


@dataclass(frozen=True)
class Order:
    """A launch over shapes that another process can compile: its kernel by name."""

    module: str
    kernel: str
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    config: Config
    writes: tuple[str, ...]
    updates: tuple[str, ...]
    arch: str

    @classmethod
    def of(cls, launch: Launch, arch: str) -> Order:
        """Of a launch over the meta device."""
        function = launch.kernel.fn
        where = (function.__module__, function.__name__)
        return cls(*where, launch.grid, launch.args, launch.config, launch.writes, launch.updates, arch)

    def launch(self) -> Launch:
        """The launch, its kernel as this process has it."""
        kernel = getattr(import_module(self.module), self.kernel)
        return Launch(kernel, self.grid, self.args, self.config, self.writes, self.updates)


@dataclass(frozen=True)
class Compiled:
    """What became of an order.

    Attributes:
        name: of the manifest's entry.
        entry: the directory of Triton's cache that holds it.
        seconds: 0 for one that was there.
        error: why it does not compile; "" for one that does.
        local_bytes: of a thread: spilled registers, mostly.
    """

    name: str
    kernel: str
    entry: str
    seconds: float
    error: str = ""
    local_bytes: int = 0


def cache_dir() -> Path:
    """$TRITON_CACHE_DIR, or ridgeline/kernels in the user's cache folder."""
    given = os.environ.get("TRITON_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ridgeline" / "kernels"


def use_cache() -> Path:
    """Makes this process's Triton, and those of its children, keep their kernels in ``cache_dir``."""
    path = cache_dir()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RidgelineError(
            f"{path}: {error.strerror}: set TRITON_CACHE_DIR to a folder that can be written"
        ) from None
    os.environ["TRITON_CACHE_DIR"] = str(path)
    return path


@lru_cache
def _toolchain() -> str:
    """Triton's version and the size of its compiler; Triton itself hashes all its files, which takes seconds."""
    import triton

    library = next(Path(triton.__file__).parent.glob("_C/libtriton*"))
    return f"{triton.__version__} {library.stat().st_size}"


@lru_cache
def _source(kernel: Any) -> str:
    """A hash of a kernel's text and of all that it calls."""
    return str(kernel.cache_key)


def name_of(order: Order) -> str:
    """What a compiled kernel hangs on: source, variant, architecture, toolchain."""
    launch = order.launch()
    text = repr((key(launch), _source(launch.kernel), order.arch, _toolchain()))
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, str]:
    """Entries by name; none for a manifest that is not there or cannot be read."""
    try:
        found = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):
        return {}
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _write_manifest(path: Path, entries: Mapping[str, str]) -> None:
    """Whole or not at all; what another process has added meanwhile stays."""
    merged = read_manifest(path) | dict(entries)
    new = path / f"{MANIFEST}.{os.getpid()}"
    new.write_text(json.dumps(merged, indent=0, sort_keys=True))
    new.replace(path / MANIFEST)


def there(path: Path, entry: str) -> bool:
    """Whether Triton's cache has a kernel's machine code."""
    return any((path / entry).glob("*.cubin"))


def compile_all(
    orders: Iterable[Order], workers: int, progress: Callable[[Compiled, int, int], None] | None = None
) -> list[Compiled]:
    """Compiles what is not in the cache yet.

    Args:
        orders: variants over shapes.
        workers: processes.
        progress: called with each result, how many are done and how many there are.

    Raises:
        RidgelineError: the cache cannot be written.
    """
    path = use_cache()
    named = {name_of(order): order for order in orders}
    manifest = read_manifest(path)
    done: list[Compiled] = []

    def add(one: Compiled) -> None:
        done.append(one)
        if progress is not None:
            progress(one, len(done), len(named))

    missing = []
    for name, order in named.items():
        if name in manifest and there(path, manifest[name]):
            add(Compiled(name, order.kernel, manifest[name], 0.0))
        else:
            missing.append(order)
    if missing:
        for one in _compiled(missing, workers):
            add(one)
            if not one.error:
                _write_manifest(path, {one.name: one.entry})
    return done


def compile_for(plan: Plan, arch: str, context: int, max_requests: int, invariant: bool) -> None:
    """Everything that an executor of the plan can launch, before it starts; arguments as ``reachable`` takes them.

    Raises RidgelineError for a variant that does not compile.
    """
    orders = [Order.of(launch, arch) for launch in reachable(plan, arch, context, max_requests, invariant)]

    def say(one: Compiled, done: int, of: int) -> None:
        if one.seconds:
            print(f"compiling GPU kernels: {done} of {of}", file=sys.stderr, flush=True)

    for one in compile_all(orders, len(os.sched_getaffinity(0)), say):
        if one.error:
            raise RidgelineError(f"{one.kernel}: {one.error}")


def _compiled(orders: list[Order], workers: int) -> Iterator[Compiled]:
    return in_process(compile_order, orders, workers)


def compile_order(order: Order) -> Compiled:
    """Compiles one variant; runs in a process that compiles."""
    start, name = time.perf_counter(), name_of(order)
    try:
        kernel, local = compile_kernel(order.launch(), order.arch)
    except RidgelineError as error:
        return Compiled(name, order.kernel, "", time.perf_counter() - start, str(error))
    from triton.runtime.cache import get_cache_manager

    entry = Path(get_cache_manager(kernel.metadata.hash).cache_dir).name
    return Compiled(name, order.kernel, entry, time.perf_counter() - start, local_bytes=local)
