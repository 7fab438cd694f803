"""Private functions of torch are called from one module, and functions of PETSc's library from another.

ruff's rule SLF001 refuses access to private members. It sees neither imports of private modules, nor names that end
with an underscore as well, nor ctypes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import pnode_dist

PACKAGE = Path(pnode_dist.__file__).parent
OF_TORCH = PACKAGE / "system" / "torch_internals.py"
OF_PETSC = PACKAGE / "petsc" / "calls.py"
# A base class of torch's for which its own manual gives the private path.
DOCUMENTED = {"torch.utils._python_dispatch"}


def dotted(node: ast.expr) -> str:
    """`torch._C._x` for the node of that attribute, empty for other expressions."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def is_private(name: str) -> bool:
    root, *rest = name.split(".")
    return root == "torch" and any(part.startswith("_") and not part.startswith("__") for part in rest)


def private_names(source: str) -> Iterator[str]:
    """The private names of torch that a module imports or reads."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [] if node.module in DOCUMENTED else names
        elif isinstance(node, ast.Attribute):
            names = [dotted(node)]
        yield from filter(is_private, names)


def modules_of(source: str) -> set[str]:
    """The modules that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from torch._C import x", ["torch._C.x"]),
        ("from torch.utils import _pytree", ["torch.utils._pytree"]),
        ("import torch._dynamo", ["torch._dynamo"]),
        ("torch._foreach_add_(a, b)", ["torch._foreach_add_"]),
        ("x = torch.autograd.grad; __path__.append('')", []),
    ],
)
def test_private_names_of_torch_are_recognised(source: str, found: list[str]) -> None:
    assert list(private_names(source)) == found


def test_one_module_calls_private_functions_of_torch() -> None:
    users = {path: names for path in PACKAGE.rglob("*.py") if (names := sorted(set(private_names(path.read_text()))))}
    assert users.pop(OF_TORCH)
    assert not users


def test_one_module_calls_the_library_of_petsc() -> None:
    users = {path for path in PACKAGE.rglob("*.py") if {"ctypes", "petsc4py"} <= modules_of(path.read_text())}
    assert users == {OF_PETSC}
