"""Rung 1: launches run by the exact interpreter, over real tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ridgeline.backends.cuda.ladder.exact import exact, interpreter
from ridgeline.backends.cuda.ladder.memory import Guard
from ridgeline.backends.cuda.launch import Launch


def run(launches: Sequence[Launch], seed: int | None = None) -> int:
    """Runs launches one after another, programs of each in order, or shuffled if ``seed`` is given.

    Before a launch its outputs are poisoned (NaN, or all bits set); after it every element of them must have been
    written. Returns the bytes of global memory that all programs asked for, re-reads included; raises ``KernelFault``
    for a bad access.
    """
    return sum(_run(launch, np.random.default_rng(seed) if seed is not None else None) for launch in launches)


def _run(launch: Launch, rng: np.random.Generator | None) -> int:
    guard = Guard()
    for name in launch.writes:
        poison(base_of(launch.args[name]))
    for name, arg in launch.args.items():
        tensor = base_of(arg)
        if hasattr(tensor, "data_ptr"):
            writes = name in launch.writes
            guard.add(name, tensor, holds=not writes, writable=writes or name in launch.updates)
    kernel, values = launch.kernel, {**launch.args, **launch.config.meta}
    scope = interpreter._patch_lang(kernel.fn)
    try:
        with exact(guard) as builder:
            function = kernel.rewrite()
            constexprs = {
                n for n, p in inspect.signature(kernel.fn).parameters.items() if "constexpr" in str(p.annotation)
            }
            args = {n: v if n in constexprs else interpreter._implicit_cvt(v) for n, v in values.items()}
            grid = (*launch.grid, 1, 1)[:3]
            builder.set_grid_dim(*grid)
            for program, index in _programs(grid, rng):
                guard.program = program
                builder.set_grid_idx(*index)
                function(**args)
    except interpreter.InterpreterError as error:  # raised around what a device function raises
        raise _cause(error) from None
    finally:
        scope.restore()
    guard.finish([base_of(launch.args[name]) for name in launch.writes])
    return guard.traffic


def _cause(error: BaseException) -> BaseException:
    while isinstance(error, interpreter.InterpreterError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def base_of(arg: Any) -> Any:
    """The tensor of a tensor descriptor; anything else as it is."""
    return getattr(arg, "base", arg) if type(arg).__name__ == "TensorDescriptor" else arg


def poison(tensor: Any) -> None:
    """NaN in every element, or all bits set."""
    if tensor.dtype.is_floating_point and tensor.element_size() > 1:
        tensor.fill_(float("nan"))
    elif tensor.dtype.is_floating_point:
        tensor.view(torch.uint8).fill_(0x7F)
    else:
        tensor.fill_(-1 if tensor.dtype.is_signed else 255)


def _programs(grid: Sequence[int], rng: np.random.Generator | None) -> Iterator[tuple[int, tuple[int, int, int]]]:
    count = grid[0] * grid[1] * grid[2]
    for program in range(count) if rng is None else rng.permutation(count):
        rest, z = divmod(int(program), grid[2])
        x, y = divmod(rest, grid[1])
        yield int(program), (x, y, z)
