"""One implicit step of many small systems, and its discrete adjoint.

`advance` and `record` hold the formulas of the step, and `pull_back` those of its adjoint. The formulas are those of
`AdditiveTableau`. States are `[sample, component]` in PETSc's scalar type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from pnode_dist.errors import ConvergenceError
from pnode_dist.ode.recomputation.fingerprint import fingerprint
from pnode_dist.ode.rhs import products
from pnode_dist.ode.rhs.evaluation import Function, StageGraph, StageState
from pnode_dist.ode.rhs.products import Cotangents, step_cotangents
from pnode_dist.ode.steppers.batched_newton import Factors, Solution, StageEquations, factored, solve
from pnode_dist.ode.steppers.batched_problem import (
    BatchProblem,
    holds,
    jacobians,
    linearised,
    multiplied,
    multiplied_transposed,
    value,
)
from pnode_dist.ode.steppers.tape import Stage
from pnode_dist.ode.steppers.traced_implicit import ROUNDING

_REFINEMENTS = 20


# One step and its adjoint


def advance(problem: BatchProblem, time: float, size: float, state: torch.Tensor) -> torch.Tensor:
    """Return the state at `time` + `size`. Collective on the problem's ranks. See `AdditiveTableau` for the formulas.

    Raises `ConvergenceError` on all ranks if the equations of a stage cannot be solved.
    """
    return _stages(problem, time, size, state, None)


def record(
    problem: BatchProblem, time: float, size: float, state: torch.Tensor, level: str
) -> tuple[torch.Tensor, list[Stage]]:
    """Return the state at `time` + `size`, and the tape of the step. Collective. Raises like `advance`.

    The tape has the evaluations of f that `pull_back` differentiates: for each stage that of the implicit part, and
    after it that of the explicit part if there is one. At the `level` "stages" they are states, else graphs.
    """
    tape: list[Stage] = []
    return _stages(problem, time, size, state, keeper(problem, tape, level)), tape


Keep = Callable[[Function | None, float, torch.Tensor], None]


def keeper(problem: BatchProblem, tape: list[Stage], level: str) -> Keep:
    """Return the function that appends an evaluation to `tape`: as a state at the `level` "stages", else as a graph."""
    keep = _stage_state if level == "stages" else _stage_graph
    return lambda *place: tape.append(keep(problem, *place))


def _stages(problem: BatchProblem, time: float, size: float, state: torch.Tensor, keep: Keep | None) -> torch.Tensor:
    """Take a step. Call `keep` for each evaluation on the tape: function, time and state; None is one without use."""
    tableau, explicit, mass = problem.additive, problem.explicit, problem.mass
    slopes: list[torch.Tensor | None] = []
    explicit_slopes: list[torch.Tensor | None] = []
    start = multiplied(mass, state)
    stage, factors = state, None
    for i, node in enumerate(tableau.nodes):
        when, diagonal = time + node * size, tableau.implicit[i][i]
        base = _combined(start, size, tableau.implicit[i], slopes)
        if explicit is not None:
            base = _combined(base, size, tableau.explicit[i], explicit_slopes)
        if diagonal == 0:
            stage = base if i else state
            used = tableau.uses_slope[i]
            slopes.append(_slope(problem, problem.implicit, when, stage) if used else None)
        else:
            stage, factors = _solved(problem, time, size, when, diagonal * size, base, stage, factors)
            used = True
            slopes.append((multiplied(mass, stage) - base) / (diagonal * size) if tableau.uses_slope[i] else None)
        if keep is not None:
            keep(problem.implicit if used else None, when, stage)
        if explicit is not None:
            when, used = time + tableau.explicit_nodes[i] * size, tableau.uses_explicit_slope[i]
            explicit_slopes.append(_slope(problem, explicit, when, stage) if used else None)
            if keep is not None:
                keep(explicit if used else None, when, stage)
    if tableau.ends_in_last_stage:
        return stage
    if tableau.stages == 1:
        # The slope itself would need the inverse of M.
        return state + (stage - state) * (tableau.weights[0] / tableau.implicit[0][0])
    result = _combined(state, size, tableau.weights, slopes)
    return result if explicit is None else _combined(result, size, tableau.explicit_weights, explicit_slopes)


def pull_back(
    problem: BatchProblem, time: float, size: float, tape: list[Stage], adjoint: torch.Tensor
) -> tuple[torch.Tensor, list[list[torch.Tensor | None]]]:
    """Return the adjoint of the state before a step from that after it, and products with parameter derivatives.

    Each list of products has one entry for each parameter, and after them those of `step_cotangents` if the gradient
    with respect to times is needed. Their sum is the gradient. Empties `tape`. Collective on the problem's ranks.

    Let y' be the cotangent of stage i through the explicit part and the result, and F' = h (b_i lambda +
    sum_j a_ji B'_j) that of its slope. With g = F' / (h a_ii) the implicit function theorem gives
    (M - h a_ii J)^T nu = y' + M^T g, the parameters' cotangent h a_ii (dg/dtheta)^T nu, and B'_i = nu - g, which is
    y' + h a_ii J^T nu for M = 1. The adjoint before the step is the sum of all M^T B'_i, and of lambda if the result
    is a sum of slopes.
    """
    tableau, explicit, mass = problem.additive, problem.explicit, problem.mass
    found: list[list[torch.Tensor | None]] = []
    bases: list[torch.Tensor | None] = [None] * tableau.stages
    last = tableau.stages - 1
    before: torch.Tensor | None = None
    weights, explicit_weights = tableau.weights, tableau.explicit_weights
    end: torch.Tensor | None = None
    if tableau.ends_in_last_stage:
        weights = explicit_weights = (0.0,) * tableau.stages
        end = adjoint
    elif tableau.stages == 1:
        ratio = weights[0] / tableau.implicit[0][0]
        weights, end, before = (0.0,), ratio * adjoint, (1.0 - ratio) * adjoint
    else:
        before = adjoint

    def differentiated(graph: StageGraph, vector: torch.Tensor, states: bool = True) -> torch.Tensor:
        state, parameters = product_of(problem, graph, vector, time, states)
        found.append(parameters)
        return state

    for i in range(last, -1, -1):
        diagonal = tableau.implicit[i][i]
        stage = end if i == last else None
        if explicit is not None:
            entry = tape.pop()
            side = _cotangent(size, explicit_weights[i], adjoint, tableau.explicit, bases, i)
            if entry is not None and side is not None:
                stage = _sum(stage, differentiated(graph_of(problem, entry, explicit), side))
        entry = tape.pop()
        slope = _cotangent(size, weights[i], adjoint, tableau.implicit, bases, i)
        if entry is None or (stage is None and slope is None):
            bases[i] = stage
            continue
        graph = graph_of(problem, entry, problem.implicit)
        if diagonal == 0:
            if slope is not None:
                stage = _sum(stage, differentiated(graph, slope))
            bases[i] = stage
            continue
        reach = diagonal * size
        scaled = None if slope is None else slope / reach
        side = _sum(stage, None if scaled is None else multiplied_transposed(mass, scaled))
        assert side is not None
        nu, product = _solved_transposed(problem, time, size, graph, reach, side, differentiated)
        if mass is None:
            bases[i] = product if stage is None else stage + product
        else:
            bases[i] = nu if scaled is None else nu - scaled
    for i, base in enumerate(bases):
        if base is not None:
            # The first stage of a method that begins with an explicit one is the state itself.
            at_state = i == 0 and tableau.implicit[0][0] == 0
            before = _sum(before, base if at_state else multiplied_transposed(mass, base))
    tape.clear()
    return (torch.zeros_like(adjoint) if before is None else before), found


# Details of a step


def _solved(
    problem: BatchProblem,
    time: float,
    size: float,
    when: float,
    reach: float,
    base: torch.Tensor,
    guess: torch.Tensor,
    factors: Factors | None,
) -> tuple[torch.Tensor, Factors | None]:
    """Return the state of a stage, and the factors of its equations. Raises `ConvergenceError` on all ranks."""
    equations = StageEquations(
        partial(value, problem, problem.implicit, when),
        partial(linearised, problem, when),
        reach,
        base,
        problem.mass,
    )
    found = solved(problem, time, size, equations, guess, factors)
    return found.states, found.factors


def solved(
    problem: BatchProblem,
    time: float,
    size: float,
    equations: StageEquations,
    guess: torch.Tensor,
    factors: Factors | None = None,
) -> Solution:
    """Solve equations of a step, see `batched_newton.solve`. Raises `ConvergenceError` on all ranks."""
    found = solve(equations, guess, factors, problem.tolerances, problem.comm)
    problem.bound.newton_iterations += found.iterations
    if found.failure is not None:
        residual = found.residual / abs(equations.reach)
        if problem.comm.size > 1:
            residual = float(np.sqrt(problem.comm.allreduce(residual**2)))
        raise ConvergenceError(
            f"at t = {time:.6g}, {size:.3g} long: the nonlinear solve ended with {found.failure} after "
            f"{found.iterations} iterations, residual {residual:.3g}: make step_size smaller, change snes_rtol, "
            "snes_atol, snes_stol or snes_max_it of options, or use newton = 'petsc'"
        )
    return found


def _slope(problem: BatchProblem, func: Function, when: float, states: torch.Tensor) -> torch.Tensor:
    """Return the value of a function in memory that the function does not use again. Collective if it is."""
    return value(problem, func, when, states).clone()


def _stage_graph(problem: BatchProblem, func: Function | None, when: float, states: torch.Tensor) -> Stage:
    return None if func is None else problem.bound.graph(func, problem.layout, when, problem.inputs(states))


def _stage_state(problem: BatchProblem, func: Function | None, when: float, states: torch.Tensor) -> Stage:
    if func is None:
        return None
    bound, inputs, mark = problem.bound, problem.inputs(states), None
    if bound.guard is not None:
        mark = fingerprint(bound.value(func, problem.layout, when, inputs))
    return StageState(when, inputs, fingerprint=mark)


# Details of the adjoint


def graph_of(problem: BatchProblem, stage: Stage, func: Function) -> StageGraph:
    """Return the graph of an evaluation on a tape. Recompute it if the tape has its state. Collective if f is."""
    assert stage is not None
    return stage if isinstance(stage, StageGraph) else problem.bound.recomputed_graph(stage, func, problem.layout)


def product_of(
    problem: BatchProblem, graph: StageGraph, vector: torch.Tensor, start: float, states: bool
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Multiply the transposed derivatives with respect to state and parameters by a vector. Collective if f is.

    Without `states` only those with respect to parameters.
    """
    bound = problem.bound
    found: Cotangents = products.vjp(bound, graph, problem.parts(vector), states=states, keep=True)
    state = problem.joined(found.states) if found.states else torch.zeros_like(vector)
    times = step_cotangents(found, graph.when - start) if bound.needs_time_gradient else []
    return state, [*found.parameters, *times]


def _solved_transposed(
    problem: BatchProblem,
    time: float,
    size: float,
    graph: StageGraph,
    reach: float,
    side: torch.Tensor,
    differentiated: Callable[..., torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve (M - reach J)^T nu = side. Returns nu and reach J^T nu.

    The blocks of J are a preconditioner: the residual is computed with f's own derivative, and the solution refined
    where samples depend on one another. Raises `ConvergenceError` on all ranks if the refinement does not converge.
    """
    factors = factored(jacobians(problem, graph), reach, problem.mass)
    return refined(
        problem, time, size, factors, problem.mass, side, lambda vector: differentiated(graph, reach * vector)
    )


def refined(
    problem: BatchProblem,
    time: float,
    size: float,
    factors: Factors,
    mass: torch.Tensor | None,
    side: torch.Tensor,
    pulled_back: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Solve (`mass` - K)^T nu = side, with `factors` of the blocks. `pulled_back` multiplies by K^T.

    Returns nu and K^T nu. Collective on the problem's ranks. Raises `ConvergenceError` on all of them if the refinement
    does not converge.
    """
    eps = torch.finfo(problem.layout.compute_dtype).eps
    nu = product = None
    residual = side
    for _ in range(_REFINEMENTS):
        change = factors.solve(residual, transposed=True)
        pulled = pulled_back(change)
        moved = multiplied_transposed(mass, change)
        residual = residual - moved + pulled
        nu, product = _sum(nu, change), _sum(product, pulled)
        assert nu is not None
        assert product is not None
        scale = side.abs().amax() + nu.abs().amax() + product.abs().amax() if side.numel() else torch.zeros(())
        largest = residual.abs().amax() if side.numel() else torch.zeros(())
        if holds(bool(largest <= ROUNDING * eps * scale), problem.comm):
            return nu, product
    raise ConvergenceError(
        f"at t = {time:.6g}, {size:.3g} long: a transposed linear system was not solved after {_REFINEMENTS} "
        "refinements, because samples of the state depend on one another or a block is singular: use newton = 'petsc'"
    )


def _cotangent(
    size: float,
    weight: float,
    adjoint: torch.Tensor,
    rows: tuple[tuple[float, ...], ...],
    bases: list[torch.Tensor | None],
    stage: int,
) -> torch.Tensor | None:
    """Return the cotangent of a stage's slope; None for zero."""
    total = adjoint * (size * weight) if weight else None
    for later in range(stage + 1, len(rows)):
        base = bases[later]
        if base is not None and rows[later][stage]:
            term = base * (size * rows[later][stage])
            total = term if total is None else total.add_(term)
    return total


def _combined(
    start: torch.Tensor, size: float, row: Sequence[float], slopes: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    """Return start + size * (the slopes so far, with the weights of `row`)."""
    for weight, slope in zip(row, slopes, strict=False):
        if weight and slope is not None:
            start = torch.add(start, slope, alpha=size * weight)
    return start


def _sum(total: torch.Tensor | None, term: torch.Tensor | None) -> torch.Tensor | None:
    return term if total is None else total if term is None else total + term
