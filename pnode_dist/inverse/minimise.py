"""The minimisation of an inverse problem by TAO, on all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.inverse import tao_methods
from pnode_dist.inverse.evaluations import Evaluations
from pnode_dist.inverse.inverse import Inverse
from pnode_dist.inverse.record import Record
from pnode_dist.ode.steppers.base import options_database
from pnode_dist.petsc import vectors
from pnode_dist.petsc.objects import PetscObjects


@dataclass(frozen=True)
class Progress:
    """The state of a minimisation after an iteration of TAO.

    `gradient_norm` is TAO's residual: that of the controls' inner products, and with bounds of the free entries.
    `evaluations` counts the trajectories solved for J, and `products` those for Hessian or Jacobian products.
    """

    iteration: int
    value: float
    gradient_norm: float
    evaluations: int
    products: int


@dataclass(frozen=True, eq=False)
class Minimum:
    """The result of a minimisation: the point `m`, the value J(m), and how it was found.

    `values` are those of the controls in m, one float64 tensor for each: this rank's part of a state, the whole of
    replicated parameters. `reason` says in words why TAO has stopped. `history` holds the progress of each iteration.
    """

    m: PETSc.Vec = field(repr=False)
    values: list[torch.Tensor] = field(repr=False)
    value: float
    gradient_norm: float
    iterations: int
    evaluations: int
    products: int
    converged: bool
    reason: str
    history: tuple[Progress, ...] = field(repr=False)


def minimise(
    problem: Inverse,
    *,
    method: str = "blmvm",
    options: Mapping[str, Any] | None = None,
    hessian: str = "exact",
    first_guess: PETSc.Vec | None = None,
    callback: Callable[[Progress], bool | None] | None = None,
    record: str | Path | None = None,
    resume: bool = False,
) -> Minimum:
    """Minimise J by one of TAO's methods, from the present values of the controls or `first_guess`. Collective.

    - `method`: one of `pnode_dist.inverse.METHODS`, by TAO's names.
    - `options`: PETSc options of TAO by name, such as `{"tao_gatol": 1e-6, "tao_monitor": None}`. An option that TAO
      does not read is an error.
    - `hessian`: "exact" or "gauss_newton", for methods that need products with the Hessian.
    - `callback`: called after each iteration. If it returns True on some rank, TAO stops.
    - `record`: a directory for the results of all evaluations; with `resume` the minimisation goes on from those there.
      The directory is read and written by the first rank. Each file holds one vector of the size of the controls.

    TAO works on the vector x with m = guess + L x, where L L^T is the inverse of the controls' inner product. A solve
    that fails, or a value that is not finite, is a rejected step: trust regions see a very large value, line searches
    one that sends them back to a quarter of the step. The parameters among the controls hold the result afterwards.

    Raises `ConfigurationError` for an unknown method or option, and for bounds that the method or the inner product
    does not allow; the error of the solve if it fails at the first guess.
    """
    bounds = problem.space.bounds()
    chosen = tao_methods.method_of(method, bounds is not None)
    given = {str(name).removeprefix("-"): value for name, value in (options or {}).items()}
    tao_methods.check_names(given)
    if hessian not in tao_methods.HESSIANS:
        raise ConfigurationError(f"hessian = {hessian!r}: must be one of {', '.join(tao_methods.HESSIANS)}")
    if resume and record is None:
        raise ConfigurationError("resume = True: needs record=, the directory of the earlier minimisation")
    guess = problem.space.guess() if first_guess is None else first_guess.copy()
    kept = None
    if record is not None:
        kept = Record(problem.comm, record, _identity(problem, guess, chosen.name, given, hessian), resume)
    evaluations = Evaluations(problem, guess, hessian, kept)
    objects = PetscObjects(problem.comm)
    try:
        tao = _set_up(evaluations, chosen, given, bounds, objects)
        history: list[Progress] = []
        tao.setMonitor(lambda tao: _monitor(tao, evaluations, history, callback))
        try:
            with options_database(given):
                tao.solve()
        except PETSc.Error:
            if evaluations.error is not None:
                raise evaluations.error from None
            raise
        reason = int(tao.getConvergedReason())
        m = evaluations.point(tao.getSolution())
        problem.assign(m)
        return Minimum(
            m,
            problem.space.unpack(m),
            float(tao.getObjectiveValue()),
            float(tao.getSolutionStatus()[2]),
            int(tao.getIterationNumber()),
            evaluations.solves,
            evaluations.products,
            reason > 0 and reason != int(PETSc.TAO.ConvergedReason.CONVERGED_USER),
            tao_methods.reason_in_words(reason),
            tuple(history),
        )
    finally:
        objects.leave()


def _set_up(
    evaluations: Evaluations,
    method: tao_methods.TaoMethod,
    options: Mapping[str, Any],
    bounds: tuple[PETSc.Vec, PETSc.Vec] | None,
    objects: PetscObjects,
) -> PETSc.TAO:
    """Return a TAO with its functions, bounds and options. Raises `ConfigurationError` for options it does not read."""
    comm, space = evaluations.problem.comm, evaluations.problem.space
    tao = PETSc.TAO().create(comm=comm)
    objects.add(tao)
    tao.setType(method.name)
    tao.setSolution(space.create())
    if method.needs == "residual":
        residual = vectors.create_vec(comm, evaluations.residual_size)
        jacobian = _operator(evaluations.jacobian, residual.getSizes(), (space.local_size, space.size), comm, objects)
        tao.setResidual(evaluations.residual, residual)
        tao.setJacobianResidual(evaluations.set_point, jacobian, jacobian)
        # TAO's default adds a term to J, and stops at the minimum of the sum. Priors are residuals here.
        tao.setBRGNRegularizerWeight(0.0)
    else:
        tao.setObjective(evaluations.objective)
        tao.setGradient(evaluations.gradient, space.create())
        tao.setObjectiveGradient(evaluations.objective_and_gradient, space.create())
    if method.needs == "hessian":
        sizes = (space.local_size, space.size)
        operator = _operator(evaluations.hessian, sizes, sizes, comm, objects)
        operator.setOption(PETSc.Mat.Option.SYMMETRIC, True)
        tao.setHessian(evaluations.set_point, operator, operator)
    if bounds is not None:
        tao.setVariableBounds(tuple(evaluations.bound(bound) for bound in bounds))
    unread = set(options)
    with options_database(options, unread):
        tao.setFromOptions()
        tao.setUp()
    if comm.size > 1:
        unread.intersection_update(*comm.allgather(unread))
    tao_methods.check_read(unread)
    return tao


def _operator(context: Any, rows: Any, columns: Any, comm: MPI.Comm, objects: PetscObjects) -> PETSc.Mat:
    matrix = PETSc.Mat().createPython((rows, columns), context, comm=comm)
    matrix.setUp()
    objects.add(matrix)
    return matrix


def _monitor(
    tao: PETSc.TAO,
    evaluations: Evaluations,
    history: list[Progress],
    callback: Callable[[Progress], bool | None] | None,
) -> None:
    iteration, value, norm, *_ = tao.getSolutionStatus()
    progress = Progress(int(iteration), float(value), float(norm), evaluations.solves, evaluations.products)
    history.append(progress)
    if callback is None:
        return
    try:
        stops = bool(callback(progress))
    except BaseException as error:
        evaluations.error = error
        raise
    if evaluations.problem.comm.allreduce(stops, MPI.LOR):
        tao.setConvergedReason(PETSc.TAO.ConvergedReason.CONVERGED_USER)


def _identity(
    problem: Inverse, guess: PETSc.Vec, method: str, options: Mapping[str, Any], hessian: str
) -> dict[str, Any]:
    """Return what must be the same for a record to be resumed. Limits of a minimisation may change. Collective."""
    limits = ("tao_max_it", "tao_max_funcs", "tao_monitor", "tao_view", "tao_converged_reason")
    squares = sum(float(o.data.detach().double().square().sum()) for o in problem.model.observations)
    return {
        "method": method,
        "hessian": hessian,
        "options": {name: repr(value) for name, value in sorted(options.items()) if name not in limits},
        "size": problem.space.size,
        "ranks": problem.comm.size,
        "guess": f"{guess.norm():.12g}",
        "data": f"{problem.comm.allreduce(squares):.12g}",
    }
