"""What a flight record says of its model file, build and machine."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ridgeline
from ridgeline.core.config import EngineConfig
from ridgeline.engine.planning import activation_dtype

if TYPE_CHECKING:
    from ridgeline.engine.flight import Environment, ModelIdentity

_WHOLE = 2**20  # bytes from the start that are hashed (and a page more): a GGUF's header and more
_SAMPLES, _PAGE = 256, 4096


def environment(config: EngineConfig, kv_dtype: str, model: Path, executor: Any) -> Environment:
    """The environment of an engine on ``executor``; reads a part of the model's file. Raises OSError."""
    from ridgeline.engine.flight import Environment

    return Environment(
        ridgeline=ridgeline.__version__,
        build=native_build() if config.backend == "cpu" else "",
        backend=config.backend,
        isa=getattr(executor, "isa", ""),
        activation_dtype=activation_dtype(config) if config.backend == "cpu" else "",
        kv_dtype=kv_dtype,
        threads=getattr(executor, "threads", 1),
        model=identify(model),
        options=asdict(config),
    )


def identify(path: str | os.PathLike[str]) -> ModelIdentity:
    """A model file's size and hash: of its size, its first MiB, and 256 pages spread evenly to its end.

    So it takes milliseconds, whatever the size; a file changed on purpose between the pages is not noticed.
    """
    from ridgeline.engine.flight import ModelIdentity

    path = Path(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        sha = hashlib.sha256(size.to_bytes(8, "little"))
        sha.update(file.read(_WHOLE + _PAGE))
        last = size - _PAGE
        if last > _WHOLE:
            for i in range(_SAMPLES):
                file.seek(_WHOLE + (last - _WHOLE) * i // (_SAMPLES - 1))
                sha.update(file.read(_PAGE))
    return ModelIdentity(str(path.resolve()), size, sha.hexdigest())


def native_build() -> str:
    """The sha256 of the native extension."""
    from ridgeline.backends.cpu import _native

    return hashlib.sha256(Path(_native.__file__).read_bytes()).hexdigest()
