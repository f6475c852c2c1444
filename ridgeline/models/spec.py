"""What every architecture file provides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ridgeline.core.formats import WeightFormat
from ridgeline.graph.ir import Graph


@dataclass(frozen=True)
class WeightEntry:
    """Where a weight of the graph lies in a GGUF file.

    Attributes:
        tensor: its name there.
        shape: row-major, what it must be.
        rotary_heads: heads whose rows the file stores for interleaved rotary pairs (0: none).
    """

    tensor: str
    shape: tuple[int, ...]
    rotary_heads: int = 0


class ModelConfig(Protocol):
    """Hyperparameters that the rest of the engine asks for, whatever the architecture."""

    @property
    def vocab_size(self) -> int:
        """Rows of the token embedding and of the logits."""
        ...

    @property
    def context_length(self) -> int:
        """Most positions."""
        ...

    @property
    def num_layers(self) -> int:
        """Transformer blocks."""
        ...

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        ...


class Architecture(Protocol):
    """An architecture's module."""

    def config_from_gguf(
        self,
        metadata: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        freq_factors: tuple[float, ...] | None,
    ) -> Any:
        """The configuration a file states, checked."""
        ...

    def weight_entries(self, config: Any) -> dict[str, WeightEntry]:
        """Every weight of the graph by name."""
        ...

    def build(
        self,
        config: Any,
        formats: Mapping[str, WeightFormat],
        *,
        max_tokens: int,
        max_rows: int,
        kv_dtype: str,
        block_size: int,
    ) -> Graph:
        """The naive graph."""
        ...
