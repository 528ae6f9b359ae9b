"""Small changes of the code, one at a time: comparisons turned, conditions negated, numbers off by one, `and` for `or`.

A change is made in the syntax tree of a module, which is compiled again; the function that changed gives its new code
to the function that is there, so that whoever imported it runs the changed one. Code at module level is left alone: the
table and the transitions have mutants of their own.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from types import CodeType, FunctionType, ModuleType
from typing import Any, Final

MODULES: Final = (
    "crbd.crb.config", "crbd.crb.device", "crbd.crb.interface", "crbd.crb.pages", "crbd.crb.snapshot", "crbd.crb.spec",
    "crbd.crb.states", "crbd.crb.mapping.split", "crbd.crb.mapping.page", "crbd.crb.mapping.served", "crbd.state.crb",
)  # fmt: skip

_TURNED: Final[dict[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


def changes() -> Iterator[tuple[str, Callable[[], None]]]:
    """Each with its name; calling it makes the change, for good."""
    for name in MODULES:
        module = import_module(name)
        tree = ast.parse(inspect.getsource(module))
        for node in _inside_functions(tree):
            for what, undo in _variants(node):
                code = compile(ast.fix_missing_locations(tree), str(module.__file__), "exec", dont_inherit=True)
                undo()
                line = getattr(node, "lineno", 0)
                yield f"{name}:{line} {what}", partial(_install, module, code)


def _inside_functions(tree: ast.Module) -> Iterator[ast.AST]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for statement in function.body:
            yield from _walk(statement)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    # What an error says is nobody's business here, and a slice of a field's annotation neither.
    if isinstance(node, ast.Raise | ast.JoinedStr | ast.AnnAssign):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _walk(child)


def _variants(node: ast.AST) -> Iterator[tuple[str, Callable[[], None]]]:
    """Change `node` in place; the caller undoes it before it asks for the next."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            node.ops[index] = _TURNED[type(operator)]()
            yield f"{ast.unparse(node)}", partial(node.ops.__setitem__, index, operator)
    elif isinstance(node, ast.BoolOp):
        operator_ = node.op
        node.op = ast.Or() if isinstance(operator_, ast.And) else ast.And()
        yield f"{ast.unparse(node)}", partial(setattr, node, "op", operator_)
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        test = node.test
        node.test = ast.UnaryOp(ast.Not(), test)
        yield f"if {ast.unparse(node.test)}", partial(setattr, node, "test", test)
    elif isinstance(node, ast.Constant) and type(node.value) in (int, bool):
        value: Any = node.value
        node.value = not value if isinstance(value, bool) else value + 1
        yield f"{value} becomes {node.value}", partial(setattr, node, "value", value)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        call = node.value
        node.value = ast.Constant(None)
        yield f"without {ast.unparse(call)}", partial(setattr, node, "value", call)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub):
        plus = node.op
        node.op = ast.Sub() if isinstance(plus, ast.Add) else ast.Add()
        yield f"{ast.unparse(node)}", partial(setattr, node, "op", plus)


def _install(module: ModuleType, code: CodeType) -> None:
    """Give every function of `module` the code of the same name."""
    codes = {each.co_qualname: each for each in _codes(code)}
    for function in _functions(module):
        function.__code__ = codes[function.__qualname__]


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    for value in vars(module).values():
        owned = vars(value).values() if isinstance(value, type) and value.__module__ == module.__name__ else (value,)
        for each in owned:
            function = each.fget if isinstance(each, property) else getattr(each, "__func__", each)
            if isinstance(function, FunctionType) and function.__code__.co_filename == module.__file__:
                yield function
