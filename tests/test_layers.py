"""A package imports only packages to its left; torch and triton stay out of the core. Read with ast."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ridgeline"
ORDER = "core kvcache scheduler graph weights models text comm backends engine perf api".split()
CONTROL_PLANE = {"kvcache", "scheduler"}
HEAVY = {"torch", "triton", "transformers", "gguf"}
HEAVY_ALLOWED = (("backends", "cuda"), ("comm",))


def imported(source: str, parents: tuple[str, ...]) -> Iterator[str]:
    """Dotted names of every import in a module of package ``parents``, those for type checking included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = parents[: len(parents) - node.level + 1] if node.level else ()
            name = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{name}.{alias.name}" for alias in node.names)


def allowed(package: str) -> set[str]:
    """Packages that ``package`` may import, itself included."""
    left = set(ORDER[: ORDER.index(package) + 1])
    compute = ORDER.index("graph") <= ORDER.index(package) < ORDER.index("engine")
    return left - CONTROL_PLANE if compute else left


def violations(source: str, parents: tuple[str, ...]) -> list[str]:
    """What a module of package ``parents`` (such as ("ridgeline", "graph")) imports and may not."""
    wrong = []
    for name in imported(source, parents):
        head, *rest = name.split(".")
        if head == "ridgeline" and len(parents) > 1 and rest and rest[0] in ORDER:
            if rest[0] not in allowed(parents[1]):
                wrong.append(name)
        elif head in HEAVY and not any(parents[1 : 1 + len(a)] == a for a in HEAVY_ALLOWED):
            wrong.append(name)
    return wrong


MODULES = sorted(PACKAGE.rglob("*.py"))


def test_there_are_modules_and_every_package_is_known() -> None:
    assert len(MODULES) > 20
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    assert folders <= set(ORDER), f"not in the order of layers: {folders - set(ORDER)}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_left(path: Path) -> None:
    parents = ("ridgeline", *path.relative_to(PACKAGE).parts[:-1])
    assert not violations(path.read_text(), parents)


@pytest.mark.parametrize(
    ("source", "package", "wrong"),
    [
        ("from ridgeline.engine import engine", "graph", ["ridgeline.engine.engine"]),
        ("from ridgeline.kvcache.block_pool import BlockPool", "backends", ["ridgeline.kvcache.block_pool.BlockPool"]),
        ("from ridgeline.kvcache.block_pool import BlockPool", "engine", []),
        ("from ..api import llm", "perf", ["ridgeline.api.llm"]),
        ("from ..core import types", "perf", []),
        ("if TYPE_CHECKING:\n    import torch.nn", "models", ["torch.nn"]),
        ("def f():\n    import torch", "comm", []),
        ("from ridgeline import graph", "core", ["ridgeline.graph"]),
    ],
)
def test_the_rule_itself(source: str, package: str, wrong: list[str]) -> None:
    assert violations(source, ("ridgeline", package)) == wrong


def test_importing_ridgeline_is_light() -> None:
    """Neither the package nor what a user imports from it first brings in a heavy framework."""
    code = (
        "import sys, ridgeline; early = set(sys.modules); from ridgeline import LLM, SamplingParams;"
        "print(sorted({m.split('.')[0] for m in sys.modules}), sorted(m for m in early if m.startswith('numpy')))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    modules, early = result.stdout.split("] [")
    assert not any(f"'{name}'" in modules for name in (*HEAVY, "pydantic", "fastapi", "huggingface_hub", "typer"))
    assert early.strip() == "]", "importing ridgeline itself must not even import numpy"
