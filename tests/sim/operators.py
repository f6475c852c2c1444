"""Ways to break a module: every one changes one place of its syntax tree.

``mutants`` walks a whole module and yields each change as source text; nothing here knows what the code is for.
Left out are what no behaviour depends on: docstrings, type annotations, default values, exceptions, imports, and
functions that only check (``check``, ``_check_*`` and assertions), which are themselves oracles.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        module: dotted name; ``line``: where.
        scope: the function it is in, with its class.
        before, after: the changed expression or statement as text, which with ``scope`` names it for good.
        source: the whole module, changed.
    """

    module: str
    line: int
    scope: str
    before: str
    after: str
    source: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What names it, whatever its line."""
        return self.module, self.scope, self.before, self.after


FLIPS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
SWAPS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "append": "remove", "push": "pop"}
Change = Callable[[], ast.AST]


def _compare(node: ast.Compare) -> Iterator[ast.AST]:
    for i, op in enumerate(node.ops):
        for flip in FLIPS[type(op)]:
            new = copy.deepcopy(node)
            new.ops[i] = flip()
            yield new


def _arithmetic(node: ast.BinOp | ast.AugAssign) -> Iterator[ast.AST]:
    if type(node.op) in SWAPS:
        new = copy.deepcopy(node)
        new.op = SWAPS[type(node.op)]()
        yield new


def _constant(node: ast.Constant) -> Iterator[ast.AST]:
    if node.value is True or node.value is False:
        yield ast.Constant(not node.value)
    elif isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
        if node.value:
            yield ast.Constant(node.value - 1)
    elif node.value is None:
        return


def _logic(node: ast.BoolOp) -> Iterator[ast.AST]:
    yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    for i in range(len(node.values)):
        rest = node.values[:i] + node.values[i + 1 :]
        yield rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)


def _condition(node: ast.If | ast.While | ast.IfExp) -> Iterator[ast.AST]:
    if isinstance(node, ast.While):
        return
    new = copy.copy(node)
    new.test = ast.UnaryOp(ast.Not(), node.test)
    yield new


def _call(node: ast.Call) -> Iterator[ast.AST]:
    new = copy.deepcopy(node)
    if isinstance(new.func, ast.Name) and new.func.id in NAMES:
        new.func.id = NAMES[new.func.id]
        yield new
    commutes = ast.unparse(node.func).split(".")[-1] in ("min", "max", "minimum", "maximum")
    for i in range(0 if commutes else len(node.args) - 1):
        swapped = copy.deepcopy(node)
        swapped.args[i], swapped.args[i + 1] = swapped.args[i + 1], swapped.args[i]
        yield swapped
    if isinstance(node.func, ast.Name) and node.func.id in ("sorted", "reversed", "list") and len(node.args) == 1:
        yield node.args[0]


def _slice(node: ast.Slice) -> Iterator[ast.AST]:
    for name in ("lower", "upper"):
        bound = getattr(node, name)
        if bound is not None:
            for op in (ast.Add(), ast.Sub()):
                new = copy.copy(node)
                setattr(new, name, ast.BinOp(bound, op, ast.Constant(1)))
                yield new


def _statement(node: ast.stmt) -> Iterator[ast.AST]:
    """Leave a statement out; return at once instead of a result."""
    if isinstance(node, ast.Assign) and _names_slots(node):
        return
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.Delete, ast.Break, ast.Continue)):
        yield ast.Pass()
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield ast.Pass()
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, (ast.If, ast.For, ast.While)):
        yield ast.Pass()


OPERATORS: list[tuple[tuple[type[ast.AST], ...], Callable[[ast.AST], Iterator[ast.AST]]]] = [
    ((ast.Compare,), _compare),  # type: ignore[list-item]
    ((ast.BinOp, ast.AugAssign), _arithmetic),  # type: ignore[list-item]
    ((ast.Constant,), _constant),  # type: ignore[list-item]
    ((ast.BoolOp,), _logic),  # type: ignore[list-item]
    ((ast.If, ast.While, ast.IfExp), _condition),  # type: ignore[list-item]
    ((ast.Call,), _call),  # type: ignore[list-item]
    ((ast.Slice,), _slice),  # type: ignore[list-item]
    ((ast.stmt,), _statement),  # type: ignore[list-item]
]


def _names_slots(node: ast.Assign) -> bool:
    return any(getattr(t, "id", "") in ("__slots__", "__all__") for t in node.targets)


def _is_check(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and (node.name == "check" or node.name.startswith("_check"))


def _skipped(parent: ast.AST, name: str) -> bool:
    """Whether no behaviour depends on this part of a node."""
    return (
        name in ("annotation", "returns", "decorator_list", "bases", "type_params")
        or isinstance(parent, (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom, ast.JoinedStr, ast.arguments))
        or (isinstance(parent, ast.Assign) and _names_slots(parent))
    )


Place = tuple[ast.AST, str, int | None, str]


def _places(node: ast.AST, scope: str, only: frozenset[str] | None) -> Iterator[Place]:
    """(parent, field, index, scope) of everything that may be changed."""
    for name, value in ast.iter_fields(node):
        if _skipped(node, name):
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or _is_check(child):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue  # a docstring
            inner = scope
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                inner = f"{scope}.{child.name}" if scope else child.name
            if only is None or inner in only or isinstance(child, ast.ClassDef):
                yield node, name, i if isinstance(value, list) else None, scope
                yield from _places(child, inner, only)


def _text(node: ast.AST) -> str:
    lines = ast.unparse(ast.fix_missing_locations(node)).splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0]} ... ({len(lines)} lines)"


def mutants(module: str, source: str, only: frozenset[str] | None = None) -> Iterator[Mutant]:
    """Every change of a module, or of the functions named in ``only`` (with their class)."""
    tree = ast.parse(source)
    seen = {ast.unparse(tree)}
    for parent, name, index, scope in list(_places(tree, "", only)):
        value = getattr(parent, name)
        child = value if index is None else value[index]
        for kinds, operator in OPERATORS:
            if not isinstance(child, kinds):
                continue
            for new in operator(child):
                ast.copy_location(new, child)
                _put(parent, name, index, new)
                text = ast.unparse(ast.fix_missing_locations(tree))
                _put(parent, name, index, child)
                if text not in seen:
                    seen.add(text)
                    line = getattr(child, "lineno", getattr(parent, "lineno", 0))
                    yield Mutant(module, line, scope, _context(parent, child), _text(new), text)


def _context(parent: ast.AST, child: ast.AST) -> str:
    """The changed part, with what it is a part of where it is a mere number or name."""
    small = isinstance(child, (ast.Constant, ast.Slice)) and isinstance(parent, ast.AST)
    return f"{_text(child)} in {_text(parent)}" if small else _text(child)


def _put(parent: ast.AST, name: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, name, node)
    else:
        getattr(parent, name)[index] = node
