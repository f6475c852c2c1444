"""``ridgeline explain`` and what it reads: a model's shape from a GGUF file or a config.json alone."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ridgeline.api.commands import make_command
from ridgeline.core.errors import ConfigError, ModelFileError, UnsupportedError
from ridgeline.models.description import describe

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


def explain(*args: str) -> str:
    """Output of the command, as the command line makes it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        make_command()(["explain", *args], prog_name="ridgeline", standalone_mode=False)
    return out.getvalue()


def test_an_8b_llama_on_an_h100_from_its_config_alone(folder: Path) -> None:
    text = explain(str(folder), "--device", "h100", "--batch", "64", "--context", "2048")
    assert "weights 14.96 GiB" in text and "131,072 bytes a token" in text
    assert "261 launches" in text  # 8 a layer, and 5
    decode = next(line for line in text.splitlines() if line.startswith("attention"))
    assert "memory" in decode and f"{64 * 2048 * 131072 / 1e6:.1f}" in decode
    assert "nothing has been timed on a GPU" in text


def test_what_does_not_fit_is_refused_with_the_smallest_change(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"at most \d+ requests \(--batch \d+\)"):
        explain(str(folder), "--device", "h100", "--batch", "900", "--context", "2048")
    with pytest.raises(ConfigError, match=r"at most 1 requests|a context of \d+ tokens"):
        explain(str(folder), "--device", "a100-40gb", "--context", "131072", "--batch", "2", "--max-num-seqs", "2")


def test_weights_in_another_format(folder: Path) -> None:
    whole, quarter = describe(str(folder)), describe(str(folder)).stored_as("q4_0")
    assert quarter.weight_bytes / whole.weight_bytes == pytest.approx(18 / 64, rel=1e-3)
    assert "4 bits" in explain(str(folder), "--device", "a100", "--weights", "q4_0")
    with pytest.raises(ConfigError, match="no weight format is called q3"):
        explain(str(folder), "--device", "a100", "--weights", "q3")


def test_the_embedded_model_on_this_machine(smollm2_path: Path) -> None:
    text = explain(str(smollm2_path))
    assert "fuse_quantize" in text and "roofline:" in text and "linear q+k+v" in text


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        ({"model_type": "mamba"}, UnsupportedError, "model_type"),
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act"),
        ({"num_hidden_layers": 0}, ModelFileError, "num_hidden_layers"),
        ({"vocab_size": "many"}, ModelFileError, "vocab_size"),
        ({"rope_scaling": {"rope_type": "yarn"}}, UnsupportedError, "yarn"),
        ({"quantization_config": {"quant_method": "awq"}}, UnsupportedError, "awq"),
    ],
)
def test_a_config_that_cannot_be(tmp_path: Path, change: dict[str, Any], error: type[Exception], what: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, **change}))
    with pytest.raises(error, match=what):
        describe(str(tmp_path))


def test_frequencies_are_transformers(folder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**LLAMA_8B)).inv_freq.numpy()
    factors = np.array(describe(str(folder)).config.rope_freq_factors)  # type: ignore[attr-defined]
    ours = 500000.0 ** (-np.arange(64) / 64) / factors
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="holds no config.json"):
        describe(str(tmp_path))
