"""The flight record's file: the engine's last steps as msgpack, with all that is needed to run them again.

Layout: magic, format version (u16), length of the payload (u64), its CRC-32 (u32), little endian; then the payload, a
FlightRecord. Arrays are the bytes of little-endian int32 unless their field says otherwise.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ridgeline.core.errors import RidgelineError
from ridgeline.core.types import SAMPLING_DTYPE, Batch, Int32, SlotStart

MAGIC = b"RIDGEREC"
FORMAT_VERSION = 1
_HEAD = struct.Struct("<8sHQI")


class ModelIdentity(msgspec.Struct, frozen=True):
    """Which file the weights came from: its path, bytes, and the sha256 of ``fingerprint``."""

    path: str
    size: int
    sha256: str


class Environment(msgspec.Struct, frozen=True):
    """What the bits depend on beyond the steps, and what they do not (threads, options), for the record.

    Attributes:
        ridgeline: version; build: sha256 of the native extension, "" for other backends.
        backend, isa, activation_dtype, kv_dtype: as they were resolved, never "auto"; "" where the backend has none.
        threads: size of the team.
        model: None for an engine without a model file.
        options: every field of EngineConfig.
    """

    ridgeline: str = ""
    build: str = ""
    backend: str = ""
    isa: str = ""
    activation_dtype: str = ""
    kv_dtype: str = ""
    threads: int = 0
    model: ModelIdentity | None = None
    options: dict[str, Any] = {}


class Sizes(msgspec.Struct, frozen=True):
    """What the executor held; see EngineLimits. ``windows`` has one entry for each cache group, 0 for full ones."""

    num_slots: int
    max_tokens: int
    max_len: int
    block_size: int
    num_blocks: list[int]
    windows: list[int]

    @property
    def max_blocks_per_slot(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_len // self.block_size)


class SlotStartRecord(msgspec.Struct, frozen=True):
    """A core.types.SlotStart; ``bias`` is float32."""

    slot: int
    prompt_len: int
    tokens: bytes
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    bias_ids: bytes
    bias: bytes
    min_tokens: int
    min_tokens_ids: bytes
    bad_words: list[list[int]]


class LiveRequest(msgspec.Struct, frozen=True):
    """A request that held its slot when the first step of the record began, and has a part in one of them.

    Attributes:
        slot: its slot.
        tokens: the tokens whose KV was in the cache, prompt first; num_prompt_tokens: of its prompt, in all.
        blocks: per cache group, its block table then, as far as any of the steps goes; what lies beyond ``tokens``
            may be outdated, and is set anew by the steps before they use it.
        sampling: its row of SAMPLING_DTYPE.
        start: its sampling state, if it has any beyond that row.
    """

    slot: int
    tokens: bytes
    num_prompt_tokens: int
    blocks: list[bytes]
    sampling: bytes
    start: SlotStartRecord | None


class Started(msgspec.Struct, frozen=True):
    """A request that got its slot in a step; ``prefix``: its first tokens, whose KV it found in the cache."""

    slot: int
    prefix: bytes


class ExtraInput(msgspec.Struct, frozen=True):
    """One of ``Batch.extras``; ``dtype`` is numpy's name of it."""

    dtype: str
    shape: list[int]
    data: bytes


class OutputRecord(msgspec.Struct, frozen=True):
    """A core.types.StepOutput; log probabilities are float32.

    ``logits`` has a hash for each row and ``hidden`` one of all pooled states, if these were recorded.
    """

    token_ids: bytes
    accepted: bytes
    logprobs: bytes
    top_ids: bytes
    top_logprobs: bytes
    logits: list[bytes] | None
    hidden: bytes | None


class StepRecord(msgspec.Struct, frozen=True):
    """One step's Batch, who started in it, and its output: None if it failed or had not ended."""

    number: int
    token_ids: bytes
    positions: bytes
    slots: bytes
    query_starts: bytes
    context_lens: bytes
    sample_rows: bytes
    sampling: bytes
    block_updates: list[bytes]
    block_copies: list[bytes]
    slot_starts: list[SlotStartRecord]
    extras: dict[str, ExtraInput]
    started: list[Started]
    output: OutputRecord | None


class Failure(msgspec.Struct, frozen=True):
    """What ended the record: ``error`` in ``step``, while it was in ``stage`` (launch, finish or after)."""

    step: int
    stage: str
    error: str


class FlightRecord(msgspec.Struct, frozen=True):
    """The engine's last steps in the order they were launched, from the state in ``live``; ``created`` is UTC."""

    created: str
    environment: Environment
    sizes: Sizes
    live: list[LiveRequest]
    steps: list[StepRecord]
    failure: Failure | None


def write_record(record: FlightRecord, path: str | os.PathLike[str]) -> Path:
    """Write a record, readable by its owner alone: it holds the tokens of prompts. Raises OSError."""
    payload = msgspec.msgpack.encode(record)
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(_HEAD.pack(MAGIC, FORMAT_VERSION, len(payload), zlib.crc32(payload)))
            file.write(payload)
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return target


def read_record(path: str | os.PathLike[str]) -> FlightRecord:
    """Read a record; raises RidgelineError for a file that is none, is cut off or damaged, or of another version."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise RidgelineError(f"cannot read {path}: {error.strerror or error}") from None
    if data[: len(MAGIC)] != MAGIC:
        raise RidgelineError(f"{path} is not a flight record")
    if len(data) < _HEAD.size:
        raise RidgelineError(f"{path} is cut off: {len(data)} bytes are not even a header")
    _, version, length, crc = _HEAD.unpack_from(data)
    if version != FORMAT_VERSION:
        raise RidgelineError(f"{path} has format version {version}, and this build reads version {FORMAT_VERSION}")
    payload = memoryview(data)[_HEAD.size :]
    if len(payload) < length:
        raise RidgelineError(f"{path} is cut off: it has {len(payload)} of {length} bytes")
    if len(payload) > length or zlib.crc32(payload) != crc:
        raise RidgelineError(f"{path} is damaged: its checksum is wrong")
    try:
        return msgspec.msgpack.decode(payload, type=FlightRecord)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RidgelineError(f"{path} is damaged: {error}") from None


def ints(data: bytes) -> Int32:
    """Bytes of int32 as an array."""
    return np.frombuffer(data, "<i4").astype(np.int32)


def as_bytes(values: Any, dtype: str = "<i4") -> bytes:
    """An array, or a list, as the bytes of ``dtype``."""
    return np.asarray(values, dtype).tobytes()


def record_slot_start(start: SlotStart) -> SlotStartRecord:
    """A SlotStart for the file."""
    return SlotStartRecord(
        slot=start.slot,
        prompt_len=start.prompt_len,
        tokens=as_bytes(start.tokens),
        repetition_penalty=start.repetition_penalty,
        presence_penalty=start.presence_penalty,
        frequency_penalty=start.frequency_penalty,
        bias_ids=as_bytes(start.bias_ids),
        bias=as_bytes(start.bias, "<f4"),
        min_tokens=start.min_tokens,
        min_tokens_ids=as_bytes(start.min_tokens_ids),
        bad_words=[list(word) for word in start.bad_words],
    )


def slot_start_of(record: SlotStartRecord) -> SlotStart:
    """A SlotStart from the file."""
    return SlotStart(
        slot=record.slot,
        prompt_len=record.prompt_len,
        tokens=ints(record.tokens),
        repetition_penalty=record.repetition_penalty,
        presence_penalty=record.presence_penalty,
        frequency_penalty=record.frequency_penalty,
        bias_ids=ints(record.bias_ids),
        bias=np.frombuffer(record.bias, "<f4").astype(np.float32),
        min_tokens=record.min_tokens,
        min_tokens_ids=ints(record.min_tokens_ids),
        bad_words=tuple(tuple(word) for word in record.bad_words),
    )


def batch_of(step: StepRecord) -> Batch:
    """The Batch of a recorded step."""
    return Batch(
        token_ids=ints(step.token_ids),
        positions=ints(step.positions),
        slots=ints(step.slots),
        query_starts=ints(step.query_starts),
        context_lens=ints(step.context_lens),
        sample_rows=ints(step.sample_rows),
        sampling=np.frombuffer(step.sampling, SAMPLING_DTYPE).copy(),
        block_updates=[ints(u).reshape(-1, 3) for u in step.block_updates],
        block_copies=[ints(c).reshape(-1, 2) for c in step.block_copies],
        slot_starts=[slot_start_of(s) for s in step.slot_starts],
        extras={n: np.frombuffer(x.data, x.dtype).reshape(x.shape).copy() for n, x in step.extras.items()},
    )
