"""Logits of random small models beside transformers, through a GGUF file."""

import numpy as np
import pytest
import torch
from graph.small_llama import Driver, config
from models import tiny_gguf
from transformers import LlamaConfig as HFConfig
from transformers import LlamaForCausalLM

from ridgeline.backends.reference.executor import ReferenceExecutor
from ridgeline.graph.plan import compile
from ridgeline.graph.target import cpu_target, naive_target
from ridgeline.models.llama import weight_entries
from ridgeline.models.load import load_model

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

MODELS = {
    "grouped, tied": (config(vocab_size=96), None, 0.0),
    "every head its own, untied": (config(vocab_size=50, num_kv_heads=4, tied=False), None, 0.0),
    "one KV head, wide heads": (config(num_heads=3, num_kv_heads=1, head_dim=32, hidden_size=96), None, 0.0),
    "narrow heads, odd mlp": (config(num_heads=8, num_kv_heads=2, head_dim=8, intermediate_size=56), None, 0.0),
    "llama 3 frequencies": (config(rope_theta=500000.0, num_layers=3), LLAMA3, 0.0),
    "linear scaling": (config(), {"rope_type": "linear", "factor": 4.0}, 4.0),
}


def torch_model(cfg, rope):
    """A random transformers model with these hyperparameters."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    hf = HFConfig(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_layers,
        num_attention_heads=cfg.num_heads,
        num_key_value_heads=cfg.num_kv_heads,
        head_dim=cfg.head_dim,
        max_position_embeddings=cfg.context_length,
        rms_norm_eps=cfg.rms_norm_eps,
        tie_word_embeddings=cfg.tied,
        rope_parameters={"rope_type": "default", **(rope or {}), "rope_theta": cfg.rope_theta},
        initializer_range=0.2,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(hf).eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def saved(tmp_path, cfg, model, rope, factor):
    """The same model as a GGUF file."""
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    tensors = {e.tensor: state[tiny_gguf.hf_name(n)] for n, e in weight_entries(cfg).items()}
    if rope and rope["rope_type"] == "llama3":
        plain = cfg.rope_theta ** (-np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
        tensors["rope_freqs.weight"] = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    changes = {"rope.scaling.type": "linear", "rope.scaling.factor": factor} if factor else {}
    return tiny_gguf.write(tmp_path / "m.gguf", cfg, tensors, changes=changes)


def close(ours, theirs):
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() <= 1e-4


@pytest.mark.parametrize("case", MODELS)
def test_logits_match_transformers(case, tmp_path):
    cfg, rope, factor = MODELS[case]
    hf = torch_model(cfg, rope)
    model = load_model(saved(tmp_path, cfg, hf, rope, factor))
    assert model.config.rope_freq_factors is not None or rope is None
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, cfg.vocab_size, n).tolist() for n in (40, 7, 1)]
    with torch.no_grad():
        theirs = [hf(torch.tensor([p])).logits[0].numpy() for p in prompts]
    graph = model.graph(64, 8, "f32", 4)
    for plan in (graph, compile(graph, cpu_target("f32"))):
        driver = Driver(
            ReferenceExecutor(plan, model.weights, num_slots=3, num_blocks=[30], max_blocks_per_slot=16), 30
        )
        # Prefill in chunks beside the decode of others, then decode: every sampled row is compared.
        done = [0, 0, 0]
        for counts in [(13, 6, 1), (20, 1, 0), (1, 0, 0), (5, 0, 0), (1, 0, 0)]:
            work = [(s, prompts[s][done[s] : done[s] + n]) for s, n in enumerate(counts) if n]
            _, logits = driver.step(work)
            done = [d + n for d, n in zip(done, counts, strict=True)]
            close(logits, np.stack([theirs[s][done[s] - 1] for s, _ in work]))
        assert done == [len(p) for p in prompts]
    model.file.close()


def test_a_rounded_cache_changes_little(tmp_path):
    cfg = config()
    model = load_model(tiny_gguf.write(tmp_path / "m.gguf", cfg, tiny_gguf.random_tensors(cfg)))
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, 30).tolist()

    def logits(kv_dtype):
        plan = compile(model.graph(64, 8, kv_dtype, 4), naive_target(kv_dtype))
        executor = ReferenceExecutor(plan, model.weights, num_slots=1, num_blocks=[8], max_blocks_per_slot=8)
        return Driver(executor, 8).step([(0, tokens)])[1]

    exact, scale = logits("f32"), np.abs(logits("f32")).max()
    f16, bf16, int8 = (np.abs(logits(d) - exact).max() / scale for d in ("f16", "bf16", "int8"))
    assert 0 < f16 < bf16 < 0.05 and bf16 < int8 < 0.1
