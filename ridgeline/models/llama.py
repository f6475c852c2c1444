"""The Llama architecture (Touvron et al. 2023; Llama 2 for grouped queries): Llama, SmolLM2 and kin."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ridgeline.core.errors import ModelFileError, UnsupportedError
from ridgeline.core.formats import WeightFormat
from ridgeline.graph.builder import GraphBuilder
from ridgeline.graph.ir import CacheSpec, Graph, kv_row_bytes
from ridgeline.models.spec import WeightEntry

ARCHITECTURE = "llama"


@dataclass(frozen=True)
class LlamaConfig:
    """Hyperparameters, with transformers' names where they are clear.

    Attributes:
        context_length: most positions the model was made for.
        rope_freq_factors: divisors of the head_dim / 2 rotary frequencies (Llama 3 scaling), or None.
        tied: whether the LM head is the token embedding.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool
    rope_freq_factors: tuple[float, ...] | None = None


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], freq_factors: tuple[float, ...] | None
) -> LlamaConfig:
    """The configuration a GGUF file states.

    Args:
        metadata: its key-value pairs.
        shapes: its tensors' shapes by name, row-major.
        freq_factors: contents of its ``rope_freqs.weight``, if any.

    Raises:
        ModelFileError: a key is missing or implausible.
        UnsupportedError: the file asks for something this architecture file does not compute.
    """
    read = _Keys(metadata)
    heads = read.count("attention.head_count", 1 << 14)
    hidden = read.count("embedding_length", 1 << 20)
    head_dim = read.count("attention.key_length", 1 << 12, default=hidden // heads if hidden % heads == 0 else None)
    kv_heads = read.count("attention.head_count_kv", 1 << 14, default=heads)
    if heads % kv_heads:
        raise ModelFileError(
            f"llama.attention.head_count {heads} is no multiple of llama.attention.head_count_kv {kv_heads}"
        )
    table = shapes.get("token_embd.weight")
    vocab = read.count("vocab_size", 1 << 24, default=table[0] if table else None)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=read.count("feed_forward_length", 1 << 24),
        num_layers=read.count("block_count", 1 << 12),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=read.count("context_length", 1 << 30),
        rms_norm_eps=read.number("attention.layer_norm_rms_epsilon", 0.0, 1.0),
        rope_theta=read.number("rope.freq_base", 1.0, 1e12, default=10000.0),
        tied="output.weight" not in shapes,
        rope_freq_factors=_frequency_factors(read, head_dim, freq_factors),
    )
    _refuse_unsupported(read, config)
    return config


class _Keys:
    """Typed, checked reading of ``llama.*`` metadata."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"{ARCHITECTURE}.{key}", default)

    def count(self, key: str, most: int, default: int | None = None) -> int:
        """A whole number from 1 to ``most``."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise ModelFileError(f"metadata key {ARCHITECTURE}.{key} must be from 1 to {most}, {_found(value)}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number from ``low`` to ``high``."""
        value = self.get(key, default)
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not real or not math.isfinite(value) or not low <= value <= high:
            raise ModelFileError(f"metadata key {ARCHITECTURE}.{key} must be from {low:g} to {high:g}, {_found(value)}")
        return float(value)


def _found(value: object) -> str:
    return "but it is missing" if value is None else f"found {value!r}"


def _frequency_factors(read: _Keys, head_dim: int, stored: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Divisors of the rotary frequencies, from the tensor or from linear scaling."""
    if head_dim % 2:
        raise ModelFileError(f"a head of {head_dim} cannot be rotated in pairs")
    kind = read.get("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise UnsupportedError(f"rope scaling {kind!r} (llama.rope.scaling.type) is not supported; linear is")
    factor = read.number("rope.scaling.factor", 1e-6, 1e6, default=1.0) if kind == "linear" else 1.0
    if stored is not None and (len(stored) != head_dim // 2 or not all(f > 0 for f in stored)):
        raise ModelFileError(f"rope_freqs.weight must hold {head_dim // 2} positive numbers, found {len(stored)}")
    if stored is None:
        return None if factor == 1.0 else (factor,) * (head_dim // 2)
    return tuple(f * factor for f in stored)


def _refuse_unsupported(read: _Keys, config: LlamaConfig) -> None:
    experts = read.get("expert_count", 0)
    if experts:
        raise UnsupportedError(f"mixtures of experts are not supported (llama.expert_count = {experts})")
    if read.get("attention.sliding_window", 0):
        raise UnsupportedError("sliding-window attention is not supported (llama.attention.sliding_window)")
    rotated = read.get("rope.dimension_count", config.head_dim)
    if rotated != config.head_dim:
        raise UnsupportedError(
            f"rotating {rotated} of {config.head_dim} dimensions is not supported (llama.rope.dimension_count)"
        )
    if read.get("attention.value_length", config.head_dim) != config.head_dim:
        raise UnsupportedError("values of another length than keys are not supported (llama.attention.value_length)")


def weight_entries(config: LlamaConfig) -> dict[str, WeightEntry]:
    """Every weight of the graph by name."""
    return dict(_entries(config))


def _entries(c: LlamaConfig) -> Iterator[tuple[str, WeightEntry]]:
    hidden, mlp, queries, keys = c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads
    yield "embed", WeightEntry("token_embd.weight", (c.vocab_size, hidden))
    for i in range(c.num_layers):
        to, file = f"layers.{i}", f"blk.{i}"
        yield f"{to}.attn.norm", WeightEntry(f"{file}.attn_norm.weight", (hidden,))
        yield f"{to}.attn.q", WeightEntry(f"{file}.attn_q.weight", (queries * c.head_dim, hidden), queries)
        yield f"{to}.attn.k", WeightEntry(f"{file}.attn_k.weight", (keys * c.head_dim, hidden), keys)
        yield f"{to}.attn.v", WeightEntry(f"{file}.attn_v.weight", (keys * c.head_dim, hidden))
        yield f"{to}.attn.o", WeightEntry(f"{file}.attn_output.weight", (hidden, queries * c.head_dim))
        yield f"{to}.mlp.norm", WeightEntry(f"{file}.ffn_norm.weight", (hidden,))
        yield f"{to}.mlp.gate", WeightEntry(f"{file}.ffn_gate.weight", (mlp, hidden))
        yield f"{to}.mlp.up", WeightEntry(f"{file}.ffn_up.weight", (mlp, hidden))
        yield f"{to}.mlp.down", WeightEntry(f"{file}.ffn_down.weight", (hidden, mlp))
    yield "norm", WeightEntry("output_norm.weight", (hidden,))
    if not c.tied:
        yield "lm_head", WeightEntry("output.weight", (c.vocab_size, hidden))


def build(
    config: LlamaConfig,
    formats: Mapping[str, WeightFormat],
    *,
    max_tokens: int,
    max_rows: int,
    kv_dtype: str,
    block_size: int,
) -> Graph:
    """The model as the paper writes it.

    Args:
        config: hyperparameters.
        formats: storage format of each of ``weight_entries``.
        max_tokens, max_rows: most tokens, and sampled rows, in a step.
        kv_dtype: "bf16", "f16", "f32", "int8" or "fp8".
        block_size: tokens in a block of the cache.

    Returns:
        A graph whose output "logits" is [S, vocab_size] float32.
    """
    c = config
    g = GraphBuilder(max_tokens, max_rows)
    w = {name: g.weight(name, e.shape, formats[name]) for name, e in weight_entries(c).items()}
    layers = tuple(range(c.num_layers))
    per_token = 2 * c.num_kv_heads * kv_row_bytes(kv_dtype, c.head_dim) * c.num_layers
    caches = g.cache_group(CacheSpec(layers, "full", per_token, block_size, kv_dtype, c.num_kv_heads, c.head_dim))
    rope = {"head_dim": c.head_dim, "theta": c.rope_theta, "freq_factors": c.rope_freq_factors}
    heads = {"num_heads": c.num_heads, "num_kv_heads": c.num_kv_heads, "head_dim": c.head_dim}

    x = g.embed(g.token_ids, w["embed"])
    for i in layers:
        p = f"layers.{i}"
        h = g.rms_norm(x, w[f"{p}.attn.norm"], c.rms_norm_eps)
        q, k, v = g.linear(h, w[f"{p}.attn.q"]), g.linear(h, w[f"{p}.attn.k"]), g.linear(h, w[f"{p}.attn.v"])
        q = g.rope(q, g.positions, num_heads=c.num_heads, **rope)
        k = g.rope(k, g.positions, num_heads=c.num_kv_heads, **rope)
        cache = g.kv_write(caches[i], k, v)
        x = x + g.linear(g.attention(q, cache, scale=c.head_dim**-0.5, **heads), w[f"{p}.attn.o"])
        h = g.rms_norm(x, w[f"{p}.mlp.norm"], c.rms_norm_eps)
        gate, up = g.linear(h, w[f"{p}.mlp.gate"]), g.linear(h, w[f"{p}.mlp.up"])
        x = x + g.linear(g.silu(gate) * up, w[f"{p}.mlp.down"])
    logits = g.linear(g.rms_norm(x, w["norm"], c.rms_norm_eps), w["embed" if c.tied else "lm_head"])
    return g.build(logits=g.select_rows(logits, g.sample_rows))
