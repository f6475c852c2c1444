"""Small random Llama models without any file, and a driver that feeds an executor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ridgeline.core.formats import FORMATS
from ridgeline.core.types import SAMPLING_DTYPE, Batch
from ridgeline.graph.ir import Graph
from ridgeline.models import llama
from ridgeline.models.load import Weight, rotary_row_order
from ridgeline.weights.codecs import quantize
from ridgeline.weights.tensor import WeightTensor


def config(**changes) -> llama.LlamaConfig:
    """Grouped queries, tied embeddings, sizes that every format divides."""
    base = dict(
        vocab_size=80,
        hidden_size=64,
        intermediate_size=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        context_length=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tied=True,
    )
    return llama.LlamaConfig(**{**base, **changes})


def random_weights(
    cfg: llama.LlamaConfig, fmt: str, seed: int = 0, override: Mapping[str, str] | None = None
) -> dict[str, Weight]:
    """Matrices in ``fmt`` (or, by the last part of their name, as ``override`` says), norms in f32."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, entry in llama.weight_entries(cfg).items():
        vector = len(entry.shape) == 1
        kind = "f32" if vector else (override or {}).get(name.rsplit(".", 1)[-1], fmt)
        values = 1 + 0.1 * rng.standard_normal(entry.shape) if vector else rng.standard_normal(entry.shape) * 0.2
        data = quantize(FORMATS[kind], values.astype(np.float32))
        order = rotary_row_order(entry.rotary_heads, cfg.head_dim) if entry.rotary_heads else None
        weights[name] = Weight(WeightTensor(entry.tensor, entry.shape, FORMATS[kind], data), order)
    return weights


def graph(cfg: llama.LlamaConfig, weights: Mapping[str, Weight], kv_dtype: str = "f32") -> Graph:
    """The naive graph for up to 64 tokens and 8 sampled rows in a step, blocks of 4."""
    formats = {name: w.tensor.format for name, w in weights.items()}
    return llama.build(cfg, formats, max_tokens=64, max_rows=8, kv_dtype=kv_dtype, block_size=4)


class Driver:
    """Feeds an executor steps made of (slot, tokens) pairs and hands out blocks, scattered on purpose."""

    def __init__(self, executor, num_blocks: int, block_size: int = 4, seed: int = 0) -> None:
        self.executor = executor
        self.block_size = block_size
        self.free = list(np.random.default_rng(seed).permutation(num_blocks))
        self.lengths: dict[int, int] = {}
        self.blocks: dict[int, int] = {}

    def batch(self, work: Sequence[tuple[int, Sequence[int]]], sampling=None) -> Batch:
        """Tokens of several slots, the last of each sampled."""
        tokens, positions, starts, lens, updates = [], [], [0], [], []
        for slot, ids in work:
            old = self.lengths.get(slot, 0)
            self.lengths[slot] = old + len(ids)
            tokens += list(ids)
            positions += range(old, old + len(ids))
            starts.append(len(tokens))
            lens.append(old + len(ids))
            while self.blocks.get(slot, 0) * self.block_size < old + len(ids):
                index = self.blocks.get(slot, 0)
                updates.append((slot, index, self.free.pop()))
                self.blocks[slot] = index + 1
        i32 = np.int32
        rows = np.array(starts[1:], i32) - 1
        if sampling is None:
            sampling = np.zeros(len(rows), SAMPLING_DTYPE)
            sampling["num_logprobs"] = -1
        return Batch(
            np.array(tokens, i32),
            np.array(positions, i32),
            np.array([s for s, _ in work], i32),
            np.array(starts, i32),
            np.array(lens, i32),
            rows,
            sampling,
            [np.array(updates, i32).reshape(-1, 3)],
        )

    def step(self, work: Sequence[tuple[int, Sequence[int]]], sampling=None, masks=None):
        """Runs one step; returns its output and logits [S, vocab]."""
        output = self.executor.finish(self.executor.launch(self.batch(work, sampling)), masks)
        return output, self.executor.last_logits


def random_steps(seed: int, vocab: int, slots: int = 3) -> list[list[tuple[int, list[int]]]]:
    """Mixed prefill chunks and decodes of several requests."""
    rng = np.random.default_rng(seed)
    steps = []
    for _ in range(4):
        chosen = [s for s in range(slots) if rng.random() < 0.8] or [0]
        rng.shuffle(chosen)
        steps.append([(int(s), rng.integers(0, vocab, int(rng.choice([1, 1, 3, 7]))).tolist()) for s in chosen])
    return steps
