"""Mutants that change nothing which can be seen from outside, each with the reason.

The key is (module, function, changed text, new text), so that it holds while lines move.
"""

from __future__ import annotations

Key = tuple[str, str, str, str]

EQUIVALENT: dict[Key, str] = {}
