"""Running costs: the integral of r(t, u) along a solve, as a further part of the state.

The quadrature is that of the method: its weights at its stages. PETSc's cost integrand is the same sum (H. Zhang,
E. M. Constantinescu, B. F. Smith: PETSc TSAdjoint, SIAM J. Sci. Comput. 44 (2022)). Error control leaves the integral
out, so the steps are those of the solve without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.call_agreement import preparation
from pnode_dist.ode.kept_solvers import KeptSolvers
from pnode_dist.ode.methods import resolve
from pnode_dist.ode.rhs.between import MapBesideIntegral, Mapped
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import Parts, State, layout_of
from pnode_dist.ode.rhs.observed import Costed, Flattened, Form, Observed, between_of, flattened, separated
from pnode_dist.ode.settings import CallSettings, Times
from pnode_dist.ode.solver import communicator


class WithCost:
    """du/dt and r(t, u) as the rates of the state (u, integral)."""

    holds_values_of_func = True
    """Mark this class as holding values that f reads, see `pnode_dist.ode.recomputation.bindings`."""

    def __init__(self, func: Function, cost: Function, is_tuple: bool, parts: int) -> None:
        self.func, self.cost, self.is_tuple, self.parts = func, cost, is_tuple, parts

    def __call__(self, t: torch.Tensor, state: Parts, *args: Any) -> Parts:
        """Return the rates, part by part. Collective if the functions are."""
        own = state[: self.parts]
        u = own if self.is_tuple else own[0]
        rates = self.func(t, u, *args)
        _, costs = flattened(self.cost(t, u, *args), "integrate")
        return (*(rates if self.is_tuple else (rates,)), *(cost.to(state[0].dtype) for cost in costs))


class _ObservedWithIntegral:
    """An observation of the state (u, integral): that of u, and the integral."""

    holds_values_of_func = True
    """Mark this class as holding values that f reads, see `pnode_dist.ode.recomputation.bindings`."""

    def __init__(self, observe: Callable[..., Parts], parts: int) -> None:
        self.observe, self.parts = observe, parts

    def __call__(self, t: torch.Tensor, state: Parts, *args: Any) -> Parts:
        """Return the tensors that are observed, and the integrals. Collective if the observation is."""
        return (*self.observe(t, state[: self.parts], *args), *state[self.parts :])


@dataclass(frozen=True)
class Posed:
    """A solve with a running cost, posed as one without: `func`, the initial state and the settings.

    Its outputs end with the integrals, which have the `form` of the cost.
    """

    func: Function
    u0: Parts
    settings: CallSettings
    form: Form

    def separated(self, outputs: Parts) -> tuple[Parts, Any]:
        """Return the outputs of the solve without the cost, and the integrals."""
        count = self.form.size
        return outputs[:-count], self.form.rebuilt(outputs[-count:])


def is_separate(settings: CallSettings) -> bool:
    """Return True if the running cost is integrated beside the solve, False if it becomes a part of the state.

    In equations it would change the accuracy of the state. Raises `ConfigurationError` for a method that has neither.
    """
    method = resolve(settings.method or ("rk4" if settings.control() is None else "dopri5"))
    if method.family not in ("rk", "ssp", "theta"):
        raise ConfigurationError(
            f"integrate: method = {method.name!r}: must be an explicit Runge-Kutta or a theta method; or observe the "
            "cost at all steps, observe = r with save = 'steps', and sum it with the weights of choice"
        )
    return method.family == "theta"


def with_separate_cost(func: Function, settings: CallSettings, is_tuple: bool) -> tuple[Costed, CallSettings]:
    """Return `func` with the running cost beside it, and the settings of the solve."""
    cost = Flattened(_checked(settings.integrate), is_tuple, "integrate")
    return Costed(func, cost), replace(settings, integrate=None)


def with_cost(
    solvers: KeptSolvers, func: Function, u0: State, t: Times, settings: CallSettings, args: tuple[Any, ...]
) -> Posed:
    """Return the solve of `func`, which may be `Observed`, and of the running cost of the settings. Collective.

    Evaluates the cost once, for its shape.
    """
    with preparation(communicator(settings.partition)) as preparing:
        plain, observe = separated(func)
        between = between_of(func)
        cost = _checked(settings.integrate)
        layout, parts = layout_of(u0)
        start = torch.as_tensor(t[0]).detach().to(layout.device, layout.dtype)
        with torch.no_grad():
            form, costs = flattened(cost(start, layout.as_state(parts), *args), "integrate")
        if any(one.is_complex() for one in costs):
            raise TypeError("integrate returned complex numbers: must return real ones, see torch.view_as_real")
        zeros = tuple(torch.zeros(one.shape, dtype=layout.dtype, device=layout.device) for one in costs)
        preparing.later()
    key = (id(plain), id(cost), layout.is_tuple)
    made: Function = solvers.once(key, lambda: WithCost(plain, cost, layout.is_tuple, len(parts)))
    if between is not None:
        made = Mapped(made, MapBesideIntegral(between, len(parts)))
    if observe is not None:
        made = Observed(made, _ObservedWithIntegral(observe, len(parts)))
    settings = replace(settings, integrate=None, uncontrolled=len(zeros))
    return Posed(made, (*parts, *zeros), settings, form)


def _checked(cost: Any) -> Function:
    if not callable(cost):
        raise TypeError(f"integrate must be callable as integrate(t, u, *args), got {type(cost).__name__}")
    found: Function = cost
    return found
