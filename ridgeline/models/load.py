"""From a file to a model: its configuration, its graph and lazy views of its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.core.errors import ModelFileError, UnsupportedError
from ridgeline.graph.ir import Graph
from ridgeline.models.registry import architecture, resolve
from ridgeline.models.spec import Architecture, ModelConfig
from ridgeline.weights.codecs import bf16_terms, dequantize
from ridgeline.weights.gguf import GGUFFile, open_gguf
from ridgeline.weights.tensor import WeightTensor


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight of the graph as it lies in the file.

    Attributes:
        tensor: its bytes, shape and format.
        row_order: row ``i`` of the graph's weight is row ``row_order[i]`` of the file's; None: the same.
    """

    tensor: WeightTensor
    row_order: npt.NDArray[np.int64] | None = None

    def values(self) -> npt.NDArray[np.float32]:
        """The weight dequantized, rows in the graph's order: [N, K] or [N]."""
        stored = dequantize(self.tensor.format, self.tensor.data, self.tensor.shape)
        return stored if self.row_order is None else stored[self.row_order]

    def bf16_terms(self) -> npt.NDArray[np.float32]:
        """A quantized matrix as bf16 products take it (``weights.codecs.bf16_terms``), rows in the graph's order."""
        n, k = self.tensor.shape
        terms = bf16_terms(self.tensor.format, self.tensor.data, (n, k))
        return terms if self.row_order is None else terms[self.row_order]


@dataclass(frozen=True, eq=False)
class Model:
    """A model ready to be compiled.

    Attributes:
        architecture: the module that builds its graph.
        config: hyperparameters (``context_length``, ``vocab_size``, ``num_layers``, ...).
        weights: by the names the graph uses; nothing is dequantized.
        metadata: the file's key-value pairs (tokenizer, chat template).
        file: the open file the weights are views of; keep it open while they are used.
    """

    architecture: Architecture
    config: ModelConfig
    weights: Mapping[str, Weight]
    metadata: Mapping[str, Any]
    file: GGUFFile

    def graph(self, max_tokens: int, max_rows: int, kv_dtype: str = "f32", block_size: int = 16) -> Graph:
        """The naive graph for steps of at most ``max_tokens`` tokens and ``max_rows`` sampled rows."""
        formats = {name: w.tensor.format for name, w in self.weights.items()}
        return self.architecture.build(
            self.config, formats, max_tokens=max_tokens, max_rows=max_rows, kv_dtype=kv_dtype, block_size=block_size
        )


def load_model(name_or_path: str | os.PathLike[str]) -> Model:
    """Opens a GGUF file (or an alias of one) and matches its tensors with the graph's weights.

    Raises:
        ModelFileError: missing, broken, or with a missing, misshapen or non-finite tensor.
        UnsupportedError: an architecture, tensor type or tensor this build does not compute with.
    """
    file = open_gguf(resolve(name_or_path))
    try:
        arch = architecture(file.metadata.get("general.architecture"))
        factors = _vector(file.tensors["rope_freqs.weight"]) if "rope_freqs.weight" in file.tensors else None
        shapes = {name: t.shape for name, t in file.tensors.items()}
        config = arch.config_from_gguf(file.metadata, shapes, factors)
        weights = _match(file, arch, config)
    except (ModelFileError, UnsupportedError) as error:
        file.close()
        raise type(error)(f"{file.path}: {error}") from None
    return Model(arch, config, weights, file.metadata, file)


def _match(file: GGUFFile, arch: Architecture, config: ModelConfig) -> dict[str, Weight]:
    entries = arch.weight_entries(config)
    weights: dict[str, Weight] = {}
    for name, entry in entries.items():
        tensor = file.tensors.get(entry.tensor)
        if tensor is None:
            raise ModelFileError(f"tensor {entry.tensor} is missing")
        if tensor.shape != entry.shape:
            raise ModelFileError(f"tensor {entry.tensor} is {tensor.shape}, the metadata says {entry.shape}")
        if len(entry.shape) == 1:
            _vector(tensor)
        order = rotary_row_order(entry.rotary_heads, config.head_dim) if entry.rotary_heads else None
        weights[name] = Weight(tensor, order)
    used = {entry.tensor for entry in entries.values()} | {"rope_freqs.weight"}
    for name in file.tensors:
        if name not in used:
            raise UnsupportedError(f"tensor {name} is not part of the architecture as this build computes it")
    return weights


def _vector(tensor: WeightTensor) -> tuple[float, ...]:
    """A small float tensor's values; raises ModelFileError when one is NaN or infinite."""
    if tensor.format.kind != "float":
        raise UnsupportedError(f"tensor {tensor.name} is stored as {tensor.format.name}; a vector must be float")
    values = dequantize(tensor.format, tensor.data, tensor.shape)
    if not np.isfinite(values).all():
        raise ModelFileError(f"tensor {tensor.name} holds NaN or infinity; the file is damaged")
    return tuple(float(v) for v in values)


def rotary_row_order(num_heads: int, head_dim: int) -> npt.NDArray[np.int64]:
    """Rows of a GGUF llama q or k matrix in the order of rotary halves.

    GGUF stores each head's rows so that rotary pairs are neighbours, (0, half, 1, half + 1, ...), as
    llama.cpp's converter permutes them; the graph rotates pairs (i, i + half), as transformers does.
    """
    within = np.arange(head_dim).reshape(head_dim // 2, 2).T.reshape(-1)
    return (np.arange(num_heads)[:, None] * head_dim + within[None, :]).reshape(-1)
