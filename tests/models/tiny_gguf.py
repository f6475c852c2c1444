"""Writes Llama models as GGUF files with the `gguf` package, which is not ours."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from ridgeline.models.llama import LlamaConfig, weight_entries

HF_NAMES = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "lm_head": "lm_head",
    "attn.norm": "input_layernorm",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.o_proj",
    "mlp.norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """transformers' parameter name of a weight of the graph."""
    if name.startswith("layers."):
        _, layer, rest = name.split(".", 2)
        return f"model.layers.{layer}.{HF_NAMES[rest]}.weight"
    return f"{HF_NAMES[name]}.weight"


def interleaved_rows(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter stores q and k: rotary halves to neighbouring pairs."""
    n, k = matrix.shape
    return matrix.reshape(heads, 2, n // heads // 2, k).swapaxes(1, 2).reshape(n, k)


def metadata(config: LlamaConfig) -> dict[str, object]:
    """The file's ``llama.*`` keys."""
    return {
        "block_count": config.num_layers,
        "context_length": config.context_length,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }


def random_tensors(config: LlamaConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 tensors by their names in the file, q and k rows in the graph's order."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for entry in weight_entries(config).values():
        noise = rng.standard_normal(entry.shape).astype(np.float32)
        tensors[entry.tensor] = 1 + 0.1 * noise if len(entry.shape) == 1 else 0.2 * noise
    return tensors


def write(
    path: Path,
    config: LlamaConfig,
    tensors: dict[str, np.ndarray],
    *,
    arch: str = "llama",
    changes: dict[str, object] | None = None,
) -> Path:
    """A file of these float32 tensors; ``changes`` sets ``llama.*`` keys, None leaves one out."""
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in {**metadata(config), **(changes or {})}.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, type(None): None}[type(value)]
        if add is not None:
            add(f"llama.{key}", value)
    heads = {e.tensor: e.rotary_heads for e in weight_entries(config).values() if e.rotary_heads}
    for name, values in tensors.items():
        values = interleaved_rows(values, heads[name]) if name in heads else values
        writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
