"""The GPU sampler's noise has the CPU's bits: among scores that are equal but for rounding both choose one token."""

from __future__ import annotations

import numpy as np
import torch
from ops.sampling_rows import rows_of
from ops.test_sampling import Sampler

from ridgeline.backends.cuda.kernels.sample import sample
from ridgeline.backends.cuda.ladder.interpret import run
from ridgeline.backends.reference.sampling import gumbel_noise

VOCAB, ROWS, FIRST = 4000, 24, 17


def test_noise_has_the_cpus_bits() -> None:
    """Each row's logits are its noise with the sign turned, so that every score is a rounding error from 0."""
    rows = rows_of(ROWS, seed=np.arange(ROWS, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    positions = np.arange(FIRST + 1, FIRST + 1 + ROWS, dtype=np.int32)
    noise = [gumbel_noise(int(row["seed"]), int(p), 0, VOCAB) for row, p in zip(rows, positions, strict=True)]
    logits = -np.stack(noise).astype(np.float32)
    tokens, logprobs = torch.zeros(ROWS, dtype=torch.int32), torch.zeros(ROWS)
    seeds = np.stack([rows["seed"] & 0xFFFFFFFF, rows["seed"] >> 32], axis=1).astype(np.uint32).view(np.int32)
    zeros = torch.zeros(ROWS, dtype=torch.int32)
    params = {name: zeros for name in ("sample_indices", "top_ks", "targets")}
    params |= {"seeds": torch.from_numpy(seeds), "positions": torch.from_numpy(positions)}
    params |= {"temperatures": torch.ones(ROWS), "top_ps": torch.ones(ROWS), "floors": torch.full((ROWS,), -np.inf)}
    run(sample(torch.from_numpy(logits), params, tokens, logprobs, slots=zeros, filters=False))
    native, *_ = Sampler(logits, "generic", 1)(rows, FIRST)
    assert len(set(tokens.tolist())) > ROWS // 2
    np.testing.assert_array_equal(tokens.numpy(), native)
