"""Small changes of a Python source, one at a time: what scripts/mutants.py runs the tests against."""

from __future__ import annotations

import ast
import copy
import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
_COMPARISON = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_NEGATION = {**_COMPARISON, ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt}
_TWINS = {"min": "max", "max": "min", "any": "all", "all": "any"}
#: Functions and methods of a tensor whose result the tensor itself can stand in for.
_METHODS = {
    "abs", "bool", "clamp", "clamp_max", "clamp_min", "clone", "detach", "double", "exp", "flip", "float", "log", "rsqrt",
    "sign", "sqrt", "square", "tanh", "to", "view", "view_as", "zeros_like",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change: the bytes `start` to `end` of the source become `after`."""

    id: str
    line: int
    column: int
    scope: str
    operator: str
    before: str
    after: str
    start: int
    end: int

    def apply(self, source: str) -> str:
        """The changed source."""
        data = source.encode()
        return (data[: self.start] + self.after.encode() + data[self.end :]).decode()


def mutants_of(source: str, module: str = "") -> list[Mutant]:
    """All mutants of a module, in the order of its source. An id outlives changes of the source elsewhere."""
    data, starts = source.encode(), [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found: dict[tuple[int, int, str], Mutant] = {}
    repeated: Counter[tuple[str, ...]] = Counter()
    for node, scope, operator, after in _changes(ast.parse(source), "", None):
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        change = (scope, operator, data[start:end].decode(), after)
        if (start, end, after) not in found and change[2] != after:
            repeated[change] += 1
            name = hashlib.sha256(repr((module, change, repeated[change])).encode()).hexdigest()[:8]
            found[start, end, after] = Mutant(name, node.lineno, node.col_offset, *change, start, end)
    return sorted(found.values(), key=lambda mutant: (mutant.start, mutant.end))


def sample(mutants: list[Mutant], size: int, seed: int) -> list[Mutant]:
    """`size` of them, by a hash of seed and id: a change of the source elsewhere moves few into the sample or out of it."""
    chosen = sorted(mutants, key=lambda mutant: hashlib.sha256(f"{seed} {mutant.id}".encode()).digest())[:size]
    return sorted(chosen, key=lambda mutant: (mutant.start, mutant.end))


def _changes(node: Any, scope: str, parent: Any) -> Iterator[tuple[Any, str, str, str]]:
    """(node, scope, operator, its new text) below a node; not in annotations, decorators, messages and logging."""
    match node:
        case ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.Subscript(value=ast.Name(id="Callable")):
            return
        case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.keyword(arg="strict"):  # strict= is an assertion
            return
        case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id="logger")))):
            return
        case ast.stmt():
            yield from ((node, scope, operator, text) for operator, text in _of_statement(node))
        case ast.expr():
            yield from ((node, scope, operator, _text(new)) for operator, new in _of_expression(node, parent))
        case ast.Slice(lower=lower, upper=upper):
            for bound in (lower, upper):
                if bound is not None and not isinstance(bound, ast.Constant | ast.UnaryOp):
                    yield bound, scope, "slice", f"{_text(bound)} + 1"
    for test in [node.test] if isinstance(node, ast.If | ast.IfExp | ast.While) else getattr(node, "ifs", []):
        yield test, scope, "condition", _text(_negated(test))
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        scope = f"{scope}.{node.name}".strip(".")
    for name, value in [] if isinstance(node, ast.Raise) else ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _changes(child, scope, node)


def _of_statement(node: ast.stmt) -> Iterator[tuple[str, str]]:
    match node:
        case ast.Expr(value=ast.Call()) | ast.Raise() | ast.AugAssign() | ast.Break() | ast.Continue():
            yield "statement", "pass"
        case ast.Assign(targets=[target]) | ast.AnnAssign(target=target, value=ast.expr()):
            if any(isinstance(part, ast.Attribute | ast.Subscript) for part in getattr(target, "elts", [target])):
                yield "statement", "pass"
        case ast.Return(value=ast.expr()):
            yield "return", "return None"
    if isinstance(node, ast.AugAssign):
        yield "assignment", f"{ast.unparse(node.target)} = {ast.unparse(node.value)}"
        if type(node.op) in _ARITHMETIC:
            yield "arithmetic", ast.unparse(_with(node, op=_ARITHMETIC[type(node.op)]()))


def _of_expression(node: ast.expr, parent: Any) -> Iterator[tuple[str, ast.expr]]:
    match node:
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC:
            yield "arithmetic", _with(node, op=_ARITHMETIC[type(op)]())
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield "comparison", _with(node, ops=[*ops[:i], _COMPARISON[type(op)](), *ops[i + 1 :]])
        case ast.BoolOp(op=op):
            yield "boolean", _with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield "unary", operand
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            others = (value + 1, value - 1, type(value)(0))
            yield from (("constant", ast.Constant(other)) for other in others if other != value)
        case ast.Constant(value=str(value)) if _is_key(node, parent):
            yield "string", ast.Constant(f"{value}?")
        case ast.Call(func=function, args=args, keywords=keywords):
            for word in keywords:
                if word.arg not in (None, "strict"):
                    yield "keyword", _with(node, keywords=[other for other in keywords if other is not word])
            match function:
                case ast.Attribute(attr=name, value=owner) if name in _METHODS:
                    yield "method", args[0] if isinstance(owner, ast.Name) and owner.id == "torch" else owner
                case ast.Name(id="abs"):
                    yield "method", args[0]
                case ast.Name(id=name) if name in _TWINS:
                    yield "twin", _with(node, func=ast.Name(_TWINS[name]))


def _is_key(node: ast.expr, parent: Any) -> bool:
    """Whether a string is compared, looked up or passed on, rather than shown."""
    if isinstance(parent, ast.Dict):
        return node in parent.keys
    return isinstance(parent, ast.Compare | ast.Subscript | ast.Tuple | ast.List | ast.Call)


def _negated(test: ast.expr) -> ast.expr:
    match test:
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return operand
        case ast.Compare(ops=[op]):
            return _with(test, ops=[_NEGATION[type(op)]()])
    return ast.UnaryOp(ast.Not(), test)


def _text(node: ast.expr) -> str:
    """An expression's source, in brackets where it could come apart."""
    text = ast.unparse(node)
    whole = isinstance(node, ast.Name | ast.Call | ast.Attribute | ast.Subscript) or text.isalnum() or text[0] in "'\""
    return text if whole else f"({text})"


def _with(node: Any, **fields: Any) -> Any:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new
