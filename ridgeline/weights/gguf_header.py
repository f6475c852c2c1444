"""The header of a GGUF file, parsed with nothing taken on trust.

Every count is compared with the bytes that are left before anything is allocated for it, so a lying
header costs no memory; every error names the file and the key or tensor. Plain Python in tight loops:
the vocabulary of a model is 50 to 250 thousand strings, and start-up waits for them.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ridgeline.core.errors import ModelFileError, UnsupportedError
from ridgeline.core.formats import BF16, F16, F32, Q4_0, Q4_1, Q8_0, WeightFormat

MAX_DIMS = 4
MAX_ARRAY_DEPTH = 4
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20
MAX_NAME_BYTES = 65535

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")

# Value types of the specification: struct and numpy codes of the fixed-size ones.
_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: dict[int, struct.Struct] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: _U32,
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    _BOOL: struct.Struct("<B"),
    10: _U64,
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}

_FORMATS: dict[int, WeightFormat] = {0: F32, 1: F16, 2: Q4_0, 3: Q4_1, 8: Q8_0, 30: BF16}

# Names of ggml's tensor types, so that a refusal can say what the file holds.
_TYPE_NAMES: dict[int, str] = {
    **{6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"},
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"},
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``offset`` and ``nbytes`` in the file, ``shape`` in numpy order."""

    name: str
    shape: tuple[int, ...]
    format: WeightFormat
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """All of a GGUF file but its tensor data; tensors in file order."""

    version: int
    metadata: dict[str, Any]
    tensors: list[TensorInfo]


def read_header(buffer: mmap.mmap | bytes, file: str) -> Header:
    """Parse and check the header of the whole file in ``buffer``; ``file`` is its name in messages.

    Raises:
        ModelFileError: not GGUF, truncated, or inconsistent.
        UnsupportedError: a version, byte order, split file or tensor type not read here.
    """
    version = _check_magic(buffer, file)
    reader = _Reader(buffer, file, 8)
    num_tensors = reader.u64("the tensor count")
    num_keys = reader.u64("the metadata count")
    # The smallest tensor description takes 32 bytes (1-character name), the smallest pair 13.
    if num_tensors * 32 + num_keys * 13 > len(buffer):
        raise ModelFileError(
            f"{file}: claims {num_tensors} tensors and {num_keys} metadata keys, "
            f"more than its {len(buffer)} bytes can hold"
        )
    metadata: dict[str, Any] = {}
    for index in range(num_keys):
        key = reader.string(f"metadata key {index}")
        if key in metadata:
            raise ModelFileError(f"{file}: metadata key {key!r} appears twice")
        metadata[key] = reader.value(reader.u32(f"the type of {key!r}"), f"metadata {key!r}")
    if isinstance(count := metadata.get("split.count"), int) and count > 1:
        raise UnsupportedError(
            f"{file}: one of {count} parts of a split model; join them first (llama-gguf-split --merge)"
        )
    alignment = _alignment(metadata, file)
    tensors = [_read_tensor(reader, index, alignment) for index in range(num_tensors)]
    start = -(-reader.pos // alignment) * alignment
    return Header(version, metadata, _place(tensors, start, len(buffer), file))


def _check_magic(buffer: mmap.mmap | bytes, file: str) -> int:
    if buffer[:4] != b"GGUF":
        raise ModelFileError(f"{file}: not a GGUF file (it starts with {bytes(buffer[:4])!r}, not b'GGUF')")
    if len(buffer) < 24:
        raise ModelFileError(f"{file}: truncated: {len(buffer)} bytes do not hold a GGUF header; download it again")
    version = _U32.unpack_from(buffer, 4)[0]
    if version & 0xFFFF == 0 and version:
        raise UnsupportedError(f"{file}: big-endian GGUF is not supported; convert it to little endian")
    if version not in (2, 3):
        raise UnsupportedError(
            f"{file}: GGUF version {version} is not supported (2 and 3 are); convert the model again"
        )
    return int(version)


def _alignment(metadata: dict[str, Any], file: str) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    whole = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not whole or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise ModelFileError(f"{file}: metadata 'general.alignment' must be a power of two from 8 to {MAX_ALIGNMENT}")
    return int(alignment)


def _read_tensor(reader: _Reader, index: int, alignment: int) -> TensorInfo:
    """One description; ``offset`` is still relative to the start of the data."""
    file, name = reader.file, reader.string(f"the name of tensor {index}")
    if not name or len(name) > MAX_NAME_BYTES:
        raise ModelFileError(f"{file}: tensor {index} has a name of {len(name)} characters")
    num_dims = reader.u32(f"the dimensions of tensor {name!r}")
    if not 1 <= num_dims <= MAX_DIMS:
        raise ModelFileError(f"{file}: tensor {name!r} claims {num_dims} dimensions (1 to {MAX_DIMS} are possible)")
    dims = tuple(reader.u64(f"the shape of tensor {name!r}") for _ in range(num_dims))
    type_id = reader.u32(f"the type of tensor {name!r}")
    offset = reader.u64(f"the offset of tensor {name!r}")
    format = _FORMATS.get(type_id)
    if format is None:
        known = ", ".join(f.name.upper() for f in _FORMATS.values())
        what = _TYPE_NAMES.get(type_id, f"number {type_id}")
        raise UnsupportedError(f"{file}: tensor {name!r} has the unsupported type {what} (supported: {known})")
    weights = 1
    for dim in dims:  # Python ints: a product cannot wrap
        weights *= dim
    if weights == 0 or weights > len(reader.buffer) * 8:
        raise ModelFileError(f"{file}: tensor {name!r} claims the shape {list(dims)}, which the file cannot hold")
    if dims[0] % format.group:
        raise ModelFileError(
            f"{file}: tensor {name!r} has rows of {dims[0]}, "
            f"not a multiple of {format.name.upper()}'s group of {format.group}"
        )
    if offset % alignment:
        raise ModelFileError(f"{file}: tensor {name!r} starts at {offset}, not a multiple of the alignment {alignment}")
    return TensorInfo(name, dims[::-1], format, offset, format.nbytes(weights // dims[0], dims[0]))


def _place(tensors: list[TensorInfo], start: int, size: int, file: str) -> list[TensorInfo]:
    """Absolute offsets, once names are unique and every tensor lies in the file apart from all others."""
    placed: dict[str, TensorInfo] = {}
    for t in tensors:
        if t.name in placed:
            raise ModelFileError(f"{file}: tensor {t.name!r} appears twice")
        if start + t.offset + t.nbytes > size:
            raise ModelFileError(
                f"{file}: tensor {t.name!r} ends at byte {start + t.offset + t.nbytes} but the file has {size}: "
                "truncated or damaged; download it again"
            )
        placed[t.name] = TensorInfo(t.name, t.shape, t.format, start + t.offset, t.nbytes)
    order = sorted(placed.values(), key=lambda t: t.offset)
    for before, after in zip(order, order[1:], strict=False):
        if before.offset + before.nbytes > after.offset:
            raise ModelFileError(f"{file}: tensors {before.name!r} and {after.name!r} overlap")
    return list(placed.values())


class _Reader:
    """A position in the buffer and checked reads of the specification's primitive types."""

    def __init__(self, buffer: mmap.mmap | bytes, file: str, pos: int) -> None:
        self.buffer, self.file, self.pos, self.size = buffer, file, pos, len(buffer)

    def truncated(self, what: str) -> ModelFileError:
        return ModelFileError(
            f"{self.file}: {what} runs past the end of the file ({self.size} bytes): "
            "truncated or damaged; download it again"
        )

    def u32(self, what: str) -> int:
        return int(self.scalar(_U32, what))

    def u64(self, what: str) -> int:
        return int(self.scalar(_U64, what))

    def scalar(self, kind: struct.Struct, what: str) -> Any:
        if self.pos + kind.size > self.size:
            raise self.truncated(what)
        value = kind.unpack_from(self.buffer, self.pos)[0]
        self.pos += kind.size
        return value

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def value(self, type_id: int, what: str, depth: int = 0) -> Any:
        """One metadata value of the given type; arrays become lists."""
        if type_id == _STRING:
            return self.string(what)
        if type_id == _ARRAY:
            return self.array(what, depth)
        kind = _SCALARS.get(type_id)
        if kind is None:
            raise ModelFileError(f"{self.file}: {what} has the unknown value type {type_id}")
        value = self.scalar(kind, what)
        return bool(value) if type_id == _BOOL else value

    def array(self, what: str, depth: int) -> list[Any]:
        type_id, count = self.u32(what), self.u64(what)
        kind = _SCALARS.get(type_id)
        least = kind.size if kind else 8 if type_id == _STRING else 12
        if count * least > self.size - self.pos:
            raise self.truncated(f"{what}, which claims {count} values,")
        if kind:
            values = np.frombuffer(self.buffer, np.dtype(kind.format), count, self.pos) if count else np.zeros(0)
            self.pos += count * kind.size
            return [v != 0 for v in values.tolist()] if type_id == _BOOL else list(values.tolist())
        if type_id == _STRING:
            return self.strings(count, what)
        if depth >= MAX_ARRAY_DEPTH:
            raise ModelFileError(f"{self.file}: {what} nests arrays more than {MAX_ARRAY_DEPTH} deep")
        return [self.value(type_id, what, depth + 1) for _ in range(count)]

    def strings(self, count: int, what: str) -> list[str]:
        """``count`` strings in a row, each an 8-byte length and its UTF-8 bytes."""
        buffer, pos, size = self.buffer, self.pos, self.size
        length_at: Callable[..., tuple[int]] = _U64.unpack_from
        values: list[str] = []
        append = values.append
        try:
            for _ in range(count):
                start = pos + 8
                pos = start + length_at(buffer, pos)[0]
                if pos > size:  # a slice past the end would come back short instead of failing
                    raise self.truncated(what)
                append(str(buffer[start:pos], "utf-8"))
        except struct.error:
            raise self.truncated(what) from None
        except UnicodeDecodeError:
            raise ModelFileError(f"{self.file}: {what} holds a string that is not UTF-8") from None
        self.pos = pos
        return values
