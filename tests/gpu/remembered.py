"""Interpreted launches remembered by what they hang on, so that the same work is not interpreted twice.

What a launch writes hangs on its kernel, grid, constants, numbers, and the elements of its tensors: the interpreter's
guard lets it touch nothing else. Where two runs do the same, the second takes what the first one wrote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ridgeline.backends.cuda.ladder import interpret
from ridgeline.backends.cuda.launch import Launch

_kept: dict[bytes, list[torch.Tensor]] = {}
_real: Callable[..., int] = interpret.run


def remember() -> None:
    """From here on launches of this process, and of children it forks, are remembered."""
    interpret.run = _run


@contextmanager
def remembering() -> Iterator[None]:
    """Within it launches are remembered, and for whoever comes after."""
    before = interpret.run
    remember()
    try:
        yield
    finally:
        interpret.run = before


def clear() -> None:
    """Forgets it all."""
    _kept.clear()


def read(path: Path) -> None:
    """Takes what another run of the same kernels has written; nothing if there is no such file, or kernels changed."""
    if path.exists():
        found = torch.load(path)
        if found["kernels"] == _kernels():
            _kept.update(found["kept"])


def write(path: Path) -> None:
    """For ``read``."""
    torch.save({"kernels": _kernels(), "kept": _kept}, path)


def _kernels() -> str:
    """Of the source of the kernels and of what interprets them."""
    home = Path(interpret.__file__).parents[1]
    files = [*home.glob("kernels/*.py"), *home.glob("ladder/*.py"), home / "gemm.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()


def _run(launches: Sequence[Launch], seed: int | None = None) -> int:
    if seed is not None:
        return _real(launches, seed)
    for launch in launches:
        name = _digest(launch)
        outputs = [interpret.base_of(launch.args[n]) for n in (*launch.writes, *launch.updates)]
        if name not in _kept:
            _real([launch])
            _kept[name] = [tensor.clone() for tensor in outputs]
        else:
            for tensor, values in zip(outputs, _kept[name], strict=True):
                _bytes(tensor).copy_(_bytes(values))
    return 0


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Integers of the same size, so that NaN keep their bits."""
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def _digest(launch: Launch) -> bytes:
    """Of all that a launch's results hang on."""
    state = hashlib.blake2b(digest_size=20)
    meta = sorted(launch.config.meta.items())
    state.update(repr((launch.kernel.fn.__module__, launch.kernel.fn.__name__, launch.grid, meta)).encode())
    tensors: list[tuple[int, int]] = []
    for name, arg in sorted(launch.args.items()):
        tensor: Any = interpret.base_of(arg)
        if not isinstance(tensor, torch.Tensor):
            state.update(repr((name, arg)).encode())
            continue
        how = (name in launch.writes, name in launch.updates, getattr(arg, "block_shape", None))
        start, size = tensor.data_ptr(), _extent(tensor)
        shared = [(start - other) for other, length in tensors if start < other + length and other < start + size]
        state.update(repr((name, tensor.dtype, tuple(tensor.shape), tensor.stride(), how, shared)).encode())
        tensors.append((start, size))
        if name not in launch.writes:
            whole = np.ascontiguousarray(_bytes(tensor).numpy())
            state.update(whole.tobytes() if whole.size else b"")
    return state.digest()


def _extent(tensor: torch.Tensor) -> int:
    if not tensor.numel():
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return int(last + 1) * tensor.element_size()
