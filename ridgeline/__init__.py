"""Ridgeline: an LLM inference engine that runs at memory speed and knows how far it is from the roofline."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

# Public names and where they live: loaded on first use, so that `import ridgeline` stays light.
_EXPORTS = {
    "LLM": "ridgeline.api.llm",
    "AsyncLLM": "ridgeline.api.async_llm",
    "CompletionOutput": "ridgeline.api.outputs",
    "RequestOutput": "ridgeline.api.outputs",
    "StreamDelta": "ridgeline.api.outputs",
    "SamplingParams": "ridgeline.core.types",
    "EngineConfig": "ridgeline.core.config",
    "RidgelineError": "ridgeline.core.errors",
    "ModelFileError": "ridgeline.core.errors",
    "UnsupportedError": "ridgeline.core.errors",
    "RequestError": "ridgeline.core.errors",
    "QueueFullError": "ridgeline.core.errors",
    "EngineDeadError": "ridgeline.core.errors",
    "SlowReaderError": "ridgeline.core.errors",
    "ConfigError": "ridgeline.core.errors",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    """Import a public name from the module that holds it (PEP 562)."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'ridgeline' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
