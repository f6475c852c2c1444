# ruff: noqa: E501 (keys are source text)
"""Mutants of the CUDA executor that change nothing which can be seen, each with the reason.

The key is (module, function, changed text, new text), so that it holds while lines move.
"""

from __future__ import annotations

Key = tuple[str, str, str, str]

REASONS: dict[str, list[Key]] = {}

EQUIVALENT: frozenset[Key] = frozenset(
    (f"ridgeline.backends.cuda.{module}", *rest) for keys in REASONS.values() for module, *rest in keys
)
