"""What a model is, without its numbers: enough to build its graph, plan it and say what it would cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ridgeline.core.errors import ConfigError, ModelFileError
from ridgeline.core.formats import F32, FORMATS, WeightFormat
from ridgeline.graph.ir import Graph
from ridgeline.models import llama
from ridgeline.models.hf_config import read_config
from ridgeline.models.load import load_model
from ridgeline.models.spec import Architecture, ModelConfig, WeightEntry


@dataclass(frozen=True)
class Description:
    """A model's shape.

    Attributes:
        name: of the file or folder it came from.
        config: hyperparameters.
        formats: how each weight is stored, by the names the graph uses.
        entries: every weight's shape, by the same names.
    """

    name: str
    architecture: Architecture
    config: ModelConfig
    formats: Mapping[str, WeightFormat]
    entries: Mapping[str, WeightEntry]

    def graph(self, max_tokens: int, max_rows: int, kv_dtype: str, block_size: int = 16) -> Graph:
        """The naive graph for steps of at most ``max_tokens`` tokens and ``max_rows`` sampled rows."""
        return self.architecture.build(
            self.config,
            self.formats,
            max_tokens=max_tokens,
            max_rows=max_rows,
            kv_dtype=kv_dtype,
            block_size=block_size,
        )

    def stored_as(self, name: str) -> Description:
        """The same model with its matrices in another format; raises ConfigError for one that is not known."""
        if name not in FORMATS:
            raise ConfigError(f"no weight format is called {name}: {', '.join(FORMATS)}")
        return replace(self, formats=_formats(self.entries, FORMATS[name]))

    @property
    def weight_bytes(self) -> int:
        """Of all weights as they are stored."""
        total = 0
        for name, entry in self.entries.items():
            n, k = (1, *entry.shape)[-2:]
            total += self.formats[name].nbytes(n, k)
        return total


def describe(name: str) -> Description:
    """A GGUF file or an alias of one, a ``config.json``, or a folder with one.

    Raises ModelFileError or UnsupportedError as reading either does.
    """
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise ModelFileError(f"{path.parent} holds no config.json: name a folder that does, or a .gguf file")
    if path.suffix == ".json":
        config, stored = read_config(path)
        entries = llama.weight_entries(config)
        return Description(str(path), llama, config, _formats(entries, stored), entries)
    model = load_model(name)
    formats = {weight: w.tensor.format for weight, w in model.weights.items()}
    entries = model.architecture.weight_entries(model.config)
    return Description(model.file.path.name, model.architecture, model.config, formats, entries)


def _formats(entries: Mapping[str, WeightEntry], stored: WeightFormat) -> dict[str, WeightFormat]:
    """Matrices as ``stored``, vectors in float32."""
    return {name: stored if len(entry.shape) == 2 else F32 for name, entry in entries.items()}
