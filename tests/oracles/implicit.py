"""Implicit and additive one-step methods in plain torch, with dense Jacobians, differentiable by back-propagation.

Every system of stage equations is solved by Newton's method to rounding, without recording; one more iteration is then
recorded with the Jacobian held fixed, whose derivative is that of the solution (the implicit function theorem). So the
gradient of a loop of steps is the exact gradient of the numbers that the loop computes: with respect to the initial
state, to every tensor that a right-hand side depends on, and to the start and size of the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from tests.oracles.collocation import Collocation
from tests.oracles.implicit_tableaux import ImplicitTableau, Row
from tests.oracles.runge_kutta import steps_between

Field = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_MOST_ITERATIONS = 60


@dataclass(frozen=True)
class Theta:
    """A theta method, in one of the two forms of PETSc's TSTHETA, for M du/dt = f(t, u).

    With `endpoint`: M (v - u) = h theta f(t + h, v) + h (1 - theta) f(t, u), v being the result.
    Without: M (x - u) = theta h f(t + theta h, x), and u + (x - u) / theta is the result.
    """

    theta: float
    endpoint: bool


BACKWARD_EULER = Theta(1.0, endpoint=False)
CRANK_NICOLSON = Theta(0.5, endpoint=True)
MIDPOINT = Theta(0.5, endpoint=False)


def diagonal_mass(diagonal: torch.Tensor) -> torch.Tensor:
    """The mass matrix of a state of the shape of `diagonal`."""
    return torch.diag(diagonal.reshape(-1))


def samplewise_mass(matrix: torch.Tensor, samples: int) -> torch.Tensor:
    """The mass matrix of a state of so many samples, on each of which `matrix` acts."""
    return torch.kron(torch.eye(samples, dtype=matrix.dtype), matrix)


def root(residual: Callable[[torch.Tensor], torch.Tensor], guess: torch.Tensor) -> torch.Tensor:
    """The vector at which `residual` is zero, by Newton's method from `guess`.

    Differentiable, once, in whatever `residual` depends on. Raises `RuntimeError` if Newton's method does not converge.
    """
    x, previous = guess.detach(), float("inf")
    for _ in range(_MOST_ITERATIONS):
        update = torch.linalg.solve(*_linearized(residual, x))
        x = x - update
        change, scale = float(update.abs().max()), float(x.abs().max())
        # To rounding: the updates are that small, or are small and do not get smaller any more.
        if change <= 4e-16 * scale or previous / 2 <= change <= 1e-10 * scale:
            break
        previous = change
    else:
        raise RuntimeError(f"Newton's method has not converged in {_MOST_ITERATIONS} iterations")
    jacobian, _ = _linearized(residual, x)
    solution: torch.Tensor = x - torch.linalg.solve(jacobian, residual(x))
    return solution


def _linearized(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The dense Jacobian of a function from vectors to vectors of the same length, and its value."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        value = function(point)
        identity = torch.eye(x.numel(), dtype=x.dtype)
        (jacobian,) = torch.autograd.grad(value, point, identity, is_grads_batched=True)
    return jacobian, value.detach()


def theta_step(
    f: Field, t: torch.Tensor, u: torch.Tensor, h: torch.Tensor, method: Theta, mass: torch.Tensor
) -> torch.Tensor:
    """The state at t + h from the vector `u` at t by a theta method."""
    theta = method.theta
    if method.endpoint:
        known = (1 - theta) * f(t, u)
        return root(lambda v: mass @ (v - u) - h * (theta * f(t + h, v) + known), u)
    stage = root(lambda x: mass @ (x - u) - theta * h * f(t + theta * h, x), u)
    return u + (stage - u) / theta


def additive_step(
    implicit: Field,
    explicit: Field | None,
    t: torch.Tensor,
    u: torch.Tensor,
    h: torch.Tensor,
    table: ImplicitTableau,
    mass: torch.Tensor,
) -> torch.Tensor:
    """The state at t + h from the vector `u` at t of M du/dt = implicit(t, u) + explicit(t, u).

    A singular mass matrix wants a diagonal of `table` without zeros, and no explicit part.
    """
    slopes: list[torch.Tensor] = []
    explicit_slopes: list[torch.Tensor] = []

    def moved(weights: Row, explicit_weights: Row) -> torch.Tensor:
        # The last weight of an implicit row is that of the slope sought.
        terms = [w * k for w, k in zip(weights, slopes, strict=False)]
        terms += [w * k for w, k in zip(explicit_weights, explicit_slopes, strict=False)]
        return u + h * sum(terms, torch.zeros_like(u))

    for i, row in enumerate(table.implicit):
        time, base, diagonal = (
            t + table.implicit_nodes[i] * h,
            moved(row, table.explicit[i] if explicit else ()),
            row[i],
        )
        if diagonal == 0:
            stage = base
            slopes.append(torch.linalg.solve(mass, implicit(time, stage)))
        else:
            reach = diagonal * h
            stage = _stage(implicit, time, base, reach, mass)
            slopes.append((stage - base) / reach)
        if explicit:
            slope = explicit(t + table.explicit_nodes[i] * h, stage)
            explicit_slopes.append(torch.linalg.solve(mass, slope))
    return moved(table.implicit_weights, table.explicit_weights)


def _stage(f: Field, time: torch.Tensor, base: torch.Tensor, reach: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """The solution x of M (x - base) = reach f(time, x)."""
    return root(lambda x: mass @ (x - base) - reach * f(time, x), base)


def collocation_step(
    f: Field, t: torch.Tensor, u: torch.Tensor, h: torch.Tensor, table: Collocation, mass: torch.Tensor
) -> torch.Tensor:
    """The state at t + h from the vector `u` at t of M du/dt = f(t, u): one system for the slopes of all stages.

    A singular mass matrix wants a method whose matrix has an inverse, see Hairer & Wanner, section VI.1.
    """
    matrix = torch.tensor(table.matrix, dtype=u.dtype)

    def residual(slopes: torch.Tensor) -> torch.Tensor:
        rows = slopes.reshape(len(table.nodes), -1)
        values = [f(t + c * h, u + h * (a @ rows)) for c, a in zip(table.nodes, matrix, strict=True)]
        return (rows @ mass.T - torch.stack(values)).reshape(-1)

    guess = torch.zeros(len(table.nodes) * u.numel(), dtype=u.dtype)
    slopes = root(residual, guess).reshape(len(table.nodes), -1)
    return u + h * (torch.tensor(table.weights, dtype=u.dtype) @ slopes)


def odeint_implicit(
    func: Field,
    u0: torch.Tensor,
    t: Sequence[float] | torch.Tensor,
    method: Theta | ImplicitTableau | Collocation,
    step_size: float | None = None,
    *,
    explicit: Field | None = None,
    mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """The states at the times `t` of M du/dt = func(t, u) + explicit(t, u) from u(t[0]) = u0, `[len(t), *u0.shape]`.

    Each interval is cut into the fewest equal steps that are no longer than `step_size`. `mass` is the dense M of the
    flattened state, the identity by default; `func` and `explicit` take and return tensors of the shape of `u0`.
    """
    assert explicit is None or (isinstance(method, ImplicitTableau) and method.additive)
    times = torch.as_tensor(t, dtype=u0.dtype)
    matrix = torch.eye(u0.numel(), dtype=u0.dtype) if mass is None else mass

    def flat(field: Field) -> Field:
        return lambda time, x: field(time, x.reshape(u0.shape)).reshape(-1)

    implicit_part, explicit_part = flat(func), None if explicit is None else flat(explicit)
    state = u0.reshape(-1)
    outputs = [state]
    for begin, end in pairwise(times):
        count = len(steps_between(float(begin.detach()), float(end.detach()), step_size))
        size = (end - begin) / count
        for k in range(count):
            start = begin + k * size
            if isinstance(method, Theta):
                state = theta_step(implicit_part, start, state, size, method, matrix)
            elif isinstance(method, Collocation):
                state = collocation_step(implicit_part, start, state, size, method, matrix)
            else:
                state = additive_step(implicit_part, explicit_part, start, state, size, method, matrix)
        outputs.append(state)
    return torch.stack(outputs).reshape(-1, *u0.shape)


def consistent_state(func: Field, u0: torch.Tensor, t0: float | torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """The state u with M u = M u0 at which the algebraic equations of M du/dt = func(t, u) hold at `t0`.

    The algebraic equations are the combinations of rows of func that M leaves without a derivative.
    """
    left, singular_values, right = torch.linalg.svd(mass)
    algebraic = singular_values <= 1e-12 * singular_values.max()
    if not algebraic.any():
        return u0
    directions, combinations = right.T[:, algebraic], left[:, algebraic]
    start = u0.reshape(-1)
    time = torch.as_tensor(t0, dtype=u0.dtype)

    def moved(along: torch.Tensor) -> torch.Tensor:
        return torch.add(start, directions @ along)

    def equations(along: torch.Tensor) -> torch.Tensor:
        return torch.mv(combinations.T, func(time, moved(along).reshape(u0.shape)).reshape(-1))

    return moved(root(equations, torch.zeros(int(algebraic.sum()), dtype=u0.dtype))).reshape(u0.shape)
