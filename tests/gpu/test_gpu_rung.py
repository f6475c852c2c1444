"""Rung 4 as far as it goes without a GPU: it refuses to time, and makes the tensors it would time."""

from __future__ import annotations

import pytest
import torch

from ridgeline.backends.cuda.kernels import gather, norm
from ridgeline.backends.cuda.ladder import gpu
from ridgeline.backends.cuda.ladder.interpret import run
from ridgeline.core.errors import ConfigError


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_timed() -> None:
    with pytest.raises(ConfigError, match="no GPU here"):
        gpu.timings(["norm"])


@pytest.mark.parametrize("module", [gather, norm])
def test_shapes_become_tensors_that_run(module: object) -> None:
    shape = module.card_shapes("sm_90")[0]
    launches = [gpu.on_device(launch, "cpu") for launch in shape.launches]
    run(launches)
    library = module.library(launches)
    library()
    assert all(t.isfinite().all() for t in launches[0].args.values() if torch.is_tensor(t) and t.is_floating_point())


def test_the_table_names_the_library() -> None:
    rows = [gpu.Timing("norm", "M=1", 10.0, 0.5, 2000.0, 0.6, 25.0), gpu.Timing("x", "M=1", 1.0, 0.0, 1.0, 0.1, None)]
    text = gpu.render(rows, "sm_90")
    assert "| norm | M=1 | 10.0 | 0.5 | 2000 | 60% | 2.50 |" in text and "| x | M=1 | 1.0 | 0.0 | 1 | 10% | - |" in text
