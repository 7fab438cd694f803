"""Private functions of torch are called from one module, and functions of PETSc's library from another.

ruff's rule SLF001 refuses access to private members. It sees neither imports of private modules, nor names that end
with an underscore as well, nor names in strings, nor ctypes; and it cannot say why an attribute is allowed where.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import pnode_dist

PACKAGE = Path(pnode_dist.__file__).parent
OF_TORCH = PACKAGE / "system" / "torch_internals.py"
OF_PETSC = PACKAGE / "petsc" / "calls.py"
# A base class of torch's for which its own manual gives the private path.
DOCUMENTED = {"torch.utils._python_dispatch"}

OBJECTS = (torch.Tensor, torch.UntypedStorage, nn.Module(), torch.optim.SGD([torch.zeros(1)]), torch.futures.Future)
ATTRIBUTES = {name for thing in OBJECTS for name in dir(thing) if name.startswith("_") and not name.startswith("__")}
WRITES = "the version of a tensor: nothing public tells that it was written to in place"
OWNERS = "the tensor that a view is of, to count its references: nothing public returns it"
REGISTRIES = "read at every call of a model: parameters(recurse=False) takes 3 microseconds a module longer"
NAMESPACES = "the dictionaries themselves, to find and undo what f binds to a module: nothing public returns them"
ALLOWED = {
    "ode/autograd/call.py": {"_version": WRITES},
    "ode/observing.py": {"_version": WRITES},
    "ode/probe.py": {"_version": WRITES},
    "ode/recomputation/bindings.py": dict.fromkeys(("_buffers", "_modules", "_parameters"), NAMESPACES),
    "ode/recomputation/carried.py": {"_version": WRITES},
    "ode/recomputation/surroundings.py": {"_version": WRITES},
    "ode/rhs/compute_dtype.py": {
        "_buffers": "the registry that a copy is put into: setattr would check and convert it",
        "_parameters": "the registry that a copy is put into: setattr refuses a tensor that is no Parameter",
        "_version": WRITES,
    },
    "ode/rhs/ownership.py": {"_base": OWNERS, "_is_view": OWNERS},
    "ode/rhs/parameters.py": dict.fromkeys(("_buffers", "_modules", "_parameters"), REGISTRIES),
    "ode/step_costs.py": {"_version": WRITES},
    "ode/rhs/evaluation.py": {"_version": WRITES},
    "ode/steppers/traced_explicit.py": {"_version": WRITES},
    "ode/steppers/graph_tape.py": {"_version": WRITES},
    "ode/steppers/stage_tape.py": {"_version": WRITES},
    "runs/rank_state.py": {"_version": WRITES},
    "train/device.py": {"_version": WRITES},
}
"""The private attributes of torch's objects that a file reads, with the reason why it must."""


def names_of_imports(tree: ast.AST) -> dict[str, str]:
    """The full name of each name that an import binds: `nn` is `torch.nn`."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def dotted(node: ast.expr, bound: dict[str, str]) -> str:
    """`torch._C._x` for the node of that attribute, empty for other expressions."""
    if isinstance(node, ast.Name):
        return bound.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value, bound)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def is_private(name: str) -> bool:
    root, *rest = name.split(".")
    return root == "torch" and any(part.startswith("_") and not part.startswith("__") for part in rest)


def private_names(source: str) -> Iterator[str]:
    """The private names of torch that a module imports, reads, or names in a string."""
    tree = ast.parse(source)
    bound = names_of_imports(tree)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [] if node.module in DOCUMENTED else names
        elif isinstance(node, ast.Attribute):
            names = [dotted(node, bound)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = re.findall(r"torch(?:\.\w+)+", node.value)
        elif isinstance(node, ast.Call) and dotted(node.func, bound) in ("getattr", "hasattr", "setattr"):
            thing, name = dotted(node.args[0], bound), node.args[1]
            names = [f"{thing}.{name.value}"] if isinstance(name, ast.Constant) else []
        yield from filter(is_private, names)


def private_attributes(source: str) -> set[str]:
    """The private attributes of torch's objects that a module reads, but of `self`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            found |= set() if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") else {node.attr}
    return found


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
        ("import torch as t; t._inductor", ["torch._inductor"]),
        ("from torch import nn; nn.modules.batchnorm._BatchNorm", ["torch.nn.modules.batchnorm._BatchNorm"]),
        ("torch._foreach_add_(a, b)", ["torch._foreach_add_"]),
        ("'torch._dynamo' in sys.modules", ["torch._dynamo"]),
        ("getattr(torch, '_functorch')", ["torch._functorch"]),
        ("x = torch.autograd.grad; __path__.append('')", []),
    ],
)
def test_private_names_of_torch_are_recognised(source: str, found: list[str]) -> None:
    assert list(private_names(source)) == found


def test_private_attributes_of_tensors_and_modules_are_recognised() -> None:
    assert {"_version", "_base", "_cdata", "_backward_hooks", "_parameters"} <= ATTRIBUTES
    assert private_attributes("x()._version, module._buffers, self._modules, x._other") == {"_version", "_buffers"}


def test_one_module_calls_private_functions_of_torch() -> None:
    users = {path: names for path in PACKAGE.rglob("*.py") if (names := sorted(set(private_names(path.read_text()))))}
    assert users.pop(OF_TORCH)
    assert not users


def test_private_attributes_are_read_where_a_reason_is_given_and_nowhere_else() -> None:
    found = {path: names for path in PACKAGE.rglob("*.py") if (names := private_attributes(path.read_text()))}
    assert found.pop(OF_TORCH)
    users = {path.relative_to(PACKAGE).as_posix(): names for path, names in found.items()}
    assert users == {path: set(reasons) for path, reasons in ALLOWED.items()}


def test_one_module_calls_the_library_of_petsc() -> None:
    users = {path for path in PACKAGE.rglob("*.py") if {"ctypes", "petsc4py"} <= modules_of(path.read_text())}
    assert users == {OF_PETSC}
