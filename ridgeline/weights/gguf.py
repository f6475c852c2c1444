"""GGUF reader: memory-mapped, every length and offset checked before it is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little endian).
A file is: magic, version, counts · metadata pairs · tensor descriptions · padding · tensor data.
Nothing is copied but the metadata: a tensor is a view of the mapped file.
"""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.core.errors import ModelFileError
from ridgeline.weights.gguf_header import read_header
from ridgeline.weights.tensor import WeightTensor


class GGUFFile:
    """An open GGUF file; use as a context manager or call ``close``.

    Attributes:
        path: where it lies.
        size: its bytes.
        version: GGUF version, 2 or 3.
        metadata: key -> int, float, bool, str, or list of these.
        mapped: all of its bytes, as they are mapped; None once closed.
        tensors: name -> WeightTensor, in file order; ``data`` views ``mapped``.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Map and check ``path``; raises ModelFileError or UnsupportedError with one line that says why."""
        self.path = Path(path)
        self._map = _map_file(self.path)
        self.size = len(self._map)
        try:
            header = read_header(self._map, str(self.path))
        except BaseException:
            self._map.close()
            raise
        self.version = header.version
        self.metadata: dict[str, Any] = header.metadata
        self.mapped: npt.NDArray[np.uint8] | None = np.frombuffer(self._map, dtype=np.uint8)
        whole = self.mapped
        self.tensors: dict[str, WeightTensor] = {
            info.name: WeightTensor(info.name, info.shape, info.format, whole[info.offset : info.offset + info.nbytes])
            for info in header.tensors
        }

    def close(self) -> None:
        """Forget the tensors and unmap the file; views still held elsewhere keep the mapping alive."""
        self.tensors, self.mapped = {}, None
        try:
            self._map.close()
        except BufferError:
            pass  # a caller still holds a tensor's data: the mapping goes when that view does

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open and check a GGUF file.

    Raises:
        ModelFileError: missing, not a regular file, truncated, misshapen or lying about itself.
        UnsupportedError: a version, byte order, split file or tensor type that this build does not read.
    """
    return GGUFFile(path)


def _map_file(path: Path) -> mmap.mmap:
    """Map a whole regular file read-only; every failure is one clear line."""
    try:
        mode = path.stat().st_mode  # before opening: opening a pipe would wait for its writer
        if stat.S_ISDIR(mode):
            raise ModelFileError(f"{path}: a directory, not a GGUF file; give the path of the .gguf file in it")
        if not stat.S_ISREG(mode):
            raise ModelFileError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ModelFileError(f"{path}: empty file, not a GGUF model; download it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelFileError(f"{path}: no such file; check the path of the model") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelFileError(f"{str(path)!r}: cannot read the model file: {reason}") from None
