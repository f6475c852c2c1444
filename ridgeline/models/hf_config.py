"""A model's shape from a Hugging Face ``config.json``: enough to plan and explain it, with no weights.

Field names and defaults are those of transformers' LlamaConfig; what this build does not compute is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ridgeline.core.errors import ModelFileError, UnsupportedError
from ridgeline.core.formats import FORMATS, WeightFormat
from ridgeline.models.llama import LlamaConfig

_STORED = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def read_config(path: Path) -> tuple[LlamaConfig, WeightFormat]:
    """The configuration and the format that the weights are stored in.

    Raises:
        ModelFileError: no readable file, or a field that is missing or cannot be.
        UnsupportedError: an architecture or a feature that this build does not compute.
    """
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ModelFileError(f"{path}: no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelFileError(f"{path}: not an object of settings")
    try:
        return llama_config(found), _stored(found)
    except (ModelFileError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from None


def _stored(found: Mapping[str, Any]) -> WeightFormat:
    name = str(found.get("dtype") or found.get("torch_dtype") or "bfloat16")
    if name not in _STORED:
        raise UnsupportedError(f"weights of {name} (torch_dtype)")
    return FORMATS[_STORED[name]]


def llama_config(found: Mapping[str, Any]) -> LlamaConfig:
    """The hyperparameters of a ``config.json`` of model_type llama."""
    if found.get("model_type") != "llama":
        raise UnsupportedError(f"model_type {found.get('model_type')!r} (supported: llama)")
    for name, only in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if found.get(name, only) != only:
            raise UnsupportedError(f"{name} = {found[name]!r}")
    if found.get("quantization_config"):
        method = found["quantization_config"].get("quant_method")
        raise UnsupportedError(f"weights quantized by {method!r}: give --weights to plan for another format")
    heads, hidden = _count(found, "num_attention_heads"), _count(found, "hidden_size")
    head_dim = _count(found, "head_dim", hidden // heads)
    theta = float(found.get("rope_theta", 10000.0))
    return LlamaConfig(
        vocab_size=_count(found, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_count(found, "intermediate_size"),
        num_layers=_count(found, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_count(found, "num_key_value_heads", heads),
        head_dim=head_dim,
        context_length=_count(found, "max_position_embeddings", 2048),
        rms_norm_eps=float(found.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_freq_factors=_frequency_factors(found.get("rope_scaling"), head_dim, theta),
        tied=bool(found.get("tie_word_embeddings", False)),
    )


def _count(found: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = found.get(name)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
        raise ModelFileError(f"{name} must be a positive integer, but it is {value!r}")
    return value


def _frequency_factors(scaling: Any, head_dim: int, theta: float) -> tuple[float, ...] | None:
    """Divisors of the rotary frequencies: linear scaling, or that of Llama 3.1 (Meta, 2024)."""
    if not scaling:
        return None
    kind = scaling.get("rope_type") or scaling.get("type")
    if kind == "default":
        return None
    if kind == "linear":
        return (float(scaling["factor"]),) * (head_dim // 2)
    if kind != "llama3":
        raise UnsupportedError(f"rope scaling {kind!r}")
    factor, low, high = (float(scaling[n]) for n in ("factor", "low_freq_factor", "high_freq_factor"))
    trained = float(scaling["original_max_position_embeddings"])

    def divisor(i: int) -> float:
        turns: float = trained * theta ** (-2 * i / head_dim) / (2 * math.pi)  # over the context it was trained on
        if turns > high:
            return 1.0
        if turns < low:
            return factor
        kept = (turns - low) / (high - low)
        return float(1.0 / ((1 - kept) / factor + kept))

    return tuple(divisor(i) for i in range(head_dim // 2))
