"""The names through which a right-hand side reaches values: all are found, put back, and left as they were."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist.ode.recomputation.bindings import bindings_of

COEFFICIENT: Any = 1.0


def by_global(u: float) -> float:
    return COEFFICIENT * u


def by_helper(u: float) -> float:
    return by_global(u)


def set_global(value: Any) -> None:
    global COEFFICIENT
    COEFFICIENT = value


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c: Any = 1.0
        self.settings = {"c": 1.0, "list": [1.0, SimpleNamespace(c=1.0)]}

    def forward(self, u: float) -> Any:
        return self.c * self.settings["c"] * self.settings["list"][0] * self.settings["list"][1].c * u  # type: ignore


class Scaler:
    def __init__(self) -> None:
        self.c = 1.0

    def __call__(self, u: float) -> float:
        return self.c * u


def cases() -> dict[str, tuple[Callable[..., Any], Callable[[Any], None]]]:
    """A function that multiplies by 1, and how a program makes it multiply by another number."""
    module, outer, plain = Scaled(), nn.Module(), Scaler()
    outer.inner = module
    c = [1.0]
    enclosed: Any = 1.0

    def enclosing(u: float) -> Any:
        return enclosed * u

    def enclose(value: Any) -> None:
        nonlocal enclosed
        enclosed = value

    part = functools.partial(lambda u, c: c * u, c=1.0)
    return {
        "attribute of a module": (module, lambda v: setattr(module, "c", v)),
        "attribute of a module inside a module": (lambda u: outer.inner(u), lambda v: setattr(module, "c", v)),
        "entry of a dictionary": (module, lambda v: module.settings.update(c=v)),
        "entry of a list": (module, lambda v: module.settings["list"].__setitem__(0, v)),  # type: ignore
        "attribute of an object in a list": (module, lambda v: setattr(module.settings["list"][1], "c", v)),  # type: ignore
        "attribute of a callable object": (plain, lambda v: setattr(plain, "c", v)),
        "bound method": (plain.__call__, lambda v: setattr(plain, "c", v)),
        "list in a closure": (lambda u: c[0] * u, lambda v: c.__setitem__(0, v)),
        "closure cell": (enclosing, enclose),
        "global": (by_global, set_global),
        "global of a helper": (by_helper, set_global),
        "global of a function inside": (lambda u: (lambda: by_global(u))(), set_global),
        "keyword of a partial": (part, lambda v: part.keywords.update(c=v)),
    }


@pytest.mark.parametrize("name", cases())
def test_a_value_of_the_capture_is_put_back_for_a_while(name: str) -> None:
    func, change = cases()[name]
    change(1.0)
    captured = bindings_of(func)
    change(3.0)
    assert func(1.0) == 3.0
    with captured.installed():
        assert func(1.0) == 1.0
    assert func(1.0) == 3.0
    change(1.0)


@pytest.mark.parametrize("name", cases())
def test_a_tensor_is_replaced_by_identity(name: str) -> None:
    func, change = cases()[name]
    tensor, other = torch.tensor(2.0), torch.tensor(5.0)
    change(tensor)
    with bindings_of(func).installed({id(tensor): other}):
        assert func(1.0) == 5.0
    assert func(1.0) == 2.0
    change(1.0)


def test_parameters_modes_and_submodules_are_put_back_and_left_as_they_were() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Dropout())
    weight, dropout = net[0].weight, net[1]
    captured = bindings_of(net)
    net.eval()
    net[0].weight = nn.Parameter(torch.zeros(1, 1))
    net[1] = nn.Identity()
    with captured.installed():
        assert net[0].weight is weight
        assert net[1] is dropout
        assert net.training
        assert dropout.training
    assert net[0].weight is not weight
    assert isinstance(net[1], nn.Identity)
    assert not net.training


def test_names_that_f_binds_meanwhile_are_undone_also_after_an_error() -> None:
    module = Scaled()
    captured = bindings_of(module)

    def bind_and_fail() -> None:
        with captured.installed():
            module.c, module.added = 7.0, 1
            module.settings["more"] = 1
            raise KeyError

    with pytest.raises(KeyError):
        bind_and_fail()
    assert module.c == 1.0
    assert not hasattr(module, "added")
    assert "more" not in module.settings


def test_libraries_objects_are_not_entered() -> None:
    captured = bindings_of(lambda u: torch.tanh(u) + COEFFICIENT)
    assert [set(names or ()) for _, names, _ in captured.spaces] == [{"COEFFICIENT"}]


def test_large_containers_are_not_looked_through() -> None:
    module = Scaled()
    module.data = list(range(20_000))  # type: ignore[assignment]
    captured = bindings_of(module)
    assert not any(space is module.data for space, _, _ in captured.spaces)


def test_tensors_are_listed_once() -> None:
    norm = nn.BatchNorm1d(3)
    constant = torch.ones(2)
    captured = bindings_of(lambda u: norm(u) + constant + norm(u))
    assert {id(tensor) for tensor in captured.tensors} == {
        id(tensor) for tensor in (*norm.parameters(), *norm.buffers(), constant)
    }
    assert len(captured.tensors) == 6


@pytest.mark.parametrize("name", cases())
def test_changes_since_the_capture_are_noted_and_made_again(name: str) -> None:
    func, change = cases()[name]
    change(1.0)
    captured = bindings_of(func)
    assert not captured.changes()
    change(3.0)
    noted = captured.changes()
    change(4.0)
    captured.change_to(noted)
    assert func(1.0) == 3.0
    captured.change_to({})
    assert func(1.0) == 1.0


def test_changes_leave_out_tensors_but_buffers() -> None:
    module = nn.BatchNorm1d(3)
    captured = bindings_of(module)
    module.last_output = torch.ones(5)  # type: ignore[assignment]
    module.running_mean = torch.ones(3)
    assert [key for _, key in captured.changes()] == ["running_mean"]
