"""The budgets that keep the house readable: sizes, documentation and types."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from ridgeline.core.config import EngineConfig

ROOT = Path(__file__).parent.parent
FILE_LINES, FUNCTION_LINES, KERNEL_LINES, CONFIG_FIELDS = 500, 60, 150, 40
PYTHON = sorted(p for folder in ("ridgeline", "tests", "bench") for p in (ROOT / folder).rglob("*.py"))
NATIVE = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".h", ".hpp", ".cu", ".cuh", ".inc"})
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def is_kernel(node: Function) -> bool:
    """Whether a function is decorated as a Triton kernel."""
    return any("jit" in ast.unparse(d) for d in node.decorator_list)


def too_long(tree: ast.Module) -> list[str]:
    """Functions above their budget, by name."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, Function):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > (KERNEL_LINES if is_kernel(node) else FUNCTION_LINES):
                found.append(f"{node.name} ({length} lines)")
    return found


def public_functions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Function]]:
    """Functions and methods that others may call: no part of the name begins with an underscore."""
    for node in body:
        if isinstance(node, Function) and not node.name.startswith("_"):
            yield prefix + node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body, f"{node.name}.")


def explained_by_class(tree: ast.Module) -> set[str]:
    """Bodiless members of documented protocols: the class says what they are, whoever implements them the rest."""
    return {
        f"{c.name}.{f.name}"
        for c in tree.body
        if isinstance(c, ast.ClassDef) and ast.get_docstring(c) and any("Protocol" in ast.unparse(b) for b in c.bases)
        for f in c.body
        if isinstance(f, Function) and ast.unparse(f.body[-1]) == "..." and len(f.body) == 1
    }


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions without a docstring; an overload or a setter speaks through its first definition."""
    return [
        name
        for name, node in public_functions(tree.body)
        if not ast.get_docstring(node)
        and name not in explained_by_class(tree)
        and not any(ast.unparse(d).split(".")[-1] in {"overload", "setter"} for d in node.decorator_list)
    ]


def untyped(tree: ast.Module) -> list[str]:
    """Public functions with an argument or a result without a type; a GPU kernel's come from what it is called with."""
    found = []
    for name, node in public_functions(tree.body):
        if is_kernel(node):
            continue
        a = node.args
        args = [*a.posonlyargs, *a.args, *a.kwonlyargs, *(x for x in (a.vararg, a.kwarg) if x)]
        missing = [x.arg for x in args if x.annotation is None and x.arg not in {"self", "cls"}]
        if missing or node.returns is None:
            found.append(f"{name}: {', '.join(missing) or 'result'}")
    return found


@pytest.mark.parametrize("path", [*PYTHON, *NATIVE], ids=name_of)
def test_file_length(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= FILE_LINES, f"{lines} lines: split it"


@pytest.mark.parametrize("path", PYTHON, ids=name_of)
def test_function_length(path: Path) -> None:
    assert not too_long(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", [p for p in PYTHON if p.is_relative_to(ROOT / "ridgeline")], ids=name_of)
def test_public_functions_are_typed_and_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree) or not tree.body, "a module says what it is for"
    assert not undocumented(tree)
    assert not untyped(tree)


def test_engine_options_stay_few_and_explained() -> None:
    assert len(fields(EngineConfig)) <= CONFIG_FIELDS
    assert all(f.metadata["help"] for f in fields(EngineConfig))


def test_the_budgets_find_what_breaks_them() -> None:
    lines = "\n".join("    x = 1" for _ in range(FUNCTION_LINES))
    assert too_long(ast.parse(f"def f():\n{lines}")) == ["f (61 lines)"]
    assert not too_long(ast.parse(f"@triton.jit\ndef f():\n{lines}"))
    tree = ast.parse("class A:\n    def f(self, x): ...\n    def _g(self): ...\ndef h() -> int:\n    '''Doc.'''")
    assert undocumented(tree) == ["A.f"]
    protocol = "class P(Protocol):\n    {}def f(self) -> int: ...\n    def g(self) -> int:\n        return 1"
    assert undocumented(ast.parse(protocol.format("'Doc.'\n    "))) == ["P.g"]
    assert undocumented(ast.parse(protocol.format(""))) == ["P.f", "P.g"]
    assert untyped(tree) == ["A.f: x"]
