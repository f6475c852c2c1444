"""Types of the extension built from ``csrc/cpu``."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.core.types import SlotStart

_Place = tuple[int, int]

class PackedMatrix:
    n: int
    k: int

class FileMatrix:
    def __init__(
        self,
        parts: Sequence[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64] | None]],
        format: str,
        k: int,
        interleave: int,
        tiles: bool,
    ) -> None: ...

class Executor:
    def __init__(self, config: dict[str, Any]) -> None: ...
    def pack(
        self, matrices: Sequence[FileMatrix], mapped: npt.NDArray[np.uint8] | None = ...
    ) -> tuple[list[PackedMatrix], int, str | None]: ...
    def set_logits(self, place: _Place) -> None: ...
    def set_head(self, first_op: int) -> None: ...
    def launch(
        self,
        token_ids: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        query_starts: npt.NDArray[np.int32],
        context_lens: npt.NDArray[np.int32],
        sample_rows: npt.NDArray[np.int32],
        sampling: npt.NDArray[np.void],
        block_updates: npt.NDArray[np.int32],
        block_copies: npt.NDArray[np.int32],
        slot_starts: Sequence[SlotStart],
    ) -> None: ...
    def finish(
        self, masks: npt.NDArray[np.uint32] | None
    ) -> tuple[
        npt.NDArray[np.int32],
        npt.NDArray[np.int32],
        npt.NDArray[np.float32],
        npt.NDArray[np.int32],
        npt.NDArray[np.float32],
        npt.NDArray[np.float32],
    ]: ...
    def logits(self) -> npt.NDArray[np.float32]: ...
    def set_profiling(self, on: bool) -> None: ...
    def op_names(self) -> list[str]: ...
    def reset_profile(self) -> None: ...
    def profile(self) -> tuple[int, float, list[tuple[str, int, float, float, float]]]: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    def add_embed(self, name: str, out: _Place, table: PackedMatrix) -> None: ...
    def add_norm(
        self,
        name: str,
        x: _Place,
        delta: _Place | None,
        sum: _Place | None,
        out: _Place,
        weight: npt.NDArray[np.float32],
        eps: float,
        dtype: str,
        rows: str,
        per_thread: bool,
        x_per_thread: bool,
        is_final: bool,
    ) -> None: ...
    def add_quantize(self, name: str, x: _Place, out: _Place, k: int, dtype: str, rows: str) -> None: ...
    def add_linear(
        self,
        name: str,
        x: _Place,
        out: _Place,
        w: PackedMatrix,
        silu_mul: bool,
        dtype: str,
        rows: str,
        per_thread: bool,
    ) -> None: ...
    def add_rope_kv(self, name: str, qkv: _Place, q: _Place, layer: int) -> None: ...
    def add_attention(
        self, name: str, qkv: _Place, q: _Place, out: _Place, layer: int, scale: float, dtype: str
    ) -> None: ...
    def add_select(self, name: str, x: _Place, out: _Place) -> None: ...
    def add_elementwise(
        self, name: str, op: str, x: _Place, y: _Place, out: _Place, k: int, dtype: str, rows: str
    ) -> None: ...
    def add_concat(self, name: str, parts: Sequence[tuple[_Place, int]], out: _Place, rows: str) -> None: ...

def packed_bytes(format: str, n: int, k: int, tiles: bool) -> int: ...
def available_threads() -> int: ...
def available_isas() -> list[str]: ...
def measure_bandwidth(bytes: int = ..., threads: int = ..., seconds: float = ..., isa: str = ...) -> float: ...
def measure_peaks(threads: int = ..., isa: str = ...) -> dict[str, float]: ...
