"""Inverse problems: the function of initial state and parameters that is minimised, with its derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.inverse.control import Control, Gaussian, Resolved, resolved
from pnode_dist.inverse.control_space import BlockCovariance, ControlSpace, check_covariance
from pnode_dist.inverse.covariance import covariance_of
from pnode_dist.inverse.forward_model import ForwardModel, ModelError, half_squares
from pnode_dist.inverse.observation import Observation, check_observation
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.settings import refuse_other_outputs
from pnode_dist.ode.solver import communicator
from pnode_dist.petsc import vectors
from pnode_dist.petsc.objects import destroy_left

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Inputs:
    """The tensors that the residuals depend on: the initial state, model errors, and the leaves of each control."""

    state: torch.Tensor
    errors: tuple[torch.Tensor, ...]
    leaves: tuple[tuple[torch.Tensor, ...], ...]


@dataclass(eq=False)
class _Evaluation:
    """An evaluation at `point`: the residuals of this rank with their graph, its share of the misfit, and the value."""

    point: PETSc.Vec
    inputs: _Inputs
    residuals: list[torch.Tensor]
    share: torch.Tensor
    value: float
    derivative: PETSc.Vec | None = None


class Inverse:
    """J(m), the misfit of a trajectory to observations as a function of its controls m, with all its derivatives.

    J(m) is half the sum of squares of all whitened residuals: of the observations, L^-1 (H(u(t)) - data) with the
    covariance R = L L^T of their errors, and of the priors. u solves the equations of `node` from `start` on. This is
    4D-Var with a strong constraint, and with `model_error` its weak constraint.

    - `controls`: what is varied. All are one Vec m of the control space `space`.
    - `observations`: the data, see `Observation`. The steps of the solve end at all of their times.
    - `u0`: this rank's part of the initial state, if that is not a control.

    `J(m)` sets the parameters among the controls to their values in m, and keeps the trajectory as its node does, by
    its budget of checkpoints. The methods below it are those of the last m. All results are the same on all ranks, and
    do not depend on their number but for rounding. All methods are collective on the communicator of the node's
    partition; with replicas of a `Mesh` each replica solves its own problem.

    Raises `ConfigurationError` on all ranks for controls, observations and covariances that do not fit.
    """

    def __init__(
        self,
        node: NeuralODE,
        controls: Iterable[Control],
        observations: Iterable[Observation],
        *,
        start: float = 0.0,
        u0: torch.Tensor | None = None,
        model_error: ModelError | None = None,
    ) -> None:
        self.node = node
        self.comm: MPI.Comm = communicator(node.settings.partition)
        given = tuple(observations)
        found, state, jumps = agreed(self.comm, lambda: _problem(node, controls, given, start, u0, model_error))
        self._fixed = state
        self.model = ForwardModel(node, given, start, jumps)
        self.space = ControlSpace(self.comm, found, node.settings.partition)
        self.prior = BlockCovariance(self.space, [control.prior for control in found], zero=True)
        self.inner_product = BlockCovariance(self.space, [control.inner_product for control in found])
        agreed(self.comm, lambda: self._check(state))
        self._has_prior = any(control.prior is not None for control in found)
        self._mean = self.space.pack([_mean(control) for control in found])
        self._at: _Evaluation | None = None

    def _check(self, state: torch.Tensor) -> None:
        for number, observation in enumerate(self.model.observations):
            name = f"observations[{number}]"
            check_observation(observation, state, self.model.start, name)
            check_covariance(observation.errors, observation.data, f"{name}: covariance")
        for control in self.space.controls:
            check_covariance(control.prior, control.guess, f"{control.name}: prior.covariance")
            check_covariance(control.inner_product, control.guess, f"{control.name}: inner_product")
            for bound in control.given.bounds:
                _expanded(bound, control, "bounds")

    def __call__(self, m: PETSc.Vec) -> float:
        """Return J(m), which is not finite if the solve overflows.

        Raises the errors of `NeuralODE`: `ConvergenceError` and `StepSizeError` on all ranks.
        """
        # Also frees the checkpoints of the last trajectory before the next one.
        self._at = None
        destroy_left(self.comm)
        inputs = self._inputs(m)
        with torch.enable_grad():
            residuals = self.model.residuals(inputs.state, inputs.errors)
            share = half_squares(residuals)
        value: float = self.comm.allreduce(share.item())
        if self._has_prior:
            value += self.prior.root_solve(m - self._mean).norm() ** 2 / 2
        self._at = _Evaluation(m.copy(), inputs, residuals, share, value)
        return value

    def is_at(self, m: PETSc.Vec) -> bool:
        """Return True if m is the point of the last evaluation."""
        return self._at is not None and bool(self._at.point.equal(m))

    def derivative(self, riesz: bool = False) -> PETSc.Vec:
        """Return the gradient of J at the last m, for the sum over entries as the inner product.

        With `riesz` it is the gradient for the controls' inner products.
        """
        at = self._last()
        if at.derivative is None:
            misfit = self._pulled([at.share], None)
            at.derivative = self._plus(misfit, lambda: self.prior.solve(at.point - self._mean))
        gradient = at.derivative.copy()
        return self.inner_product.multiply(gradient) if riesz else gradient

    def hessian(self, v: PETSc.Vec, prior: bool = True) -> PETSc.Vec:
        """Return the product of v with the second derivative of J at the last m, by the adjoint of a tangent solve.

        It is the exact second derivative of the numbers computed, for the sum over entries as the inner product.
        Without `prior` it is that of the misfit to observations alone.
        """
        at = self._last()
        with torch.enable_grad():
            states, tangents = self._tangents(at.inputs, v)
            share = self.model.directional_derivative(states, tangents)
            product = self._pulled([share], None, at.inputs)
        return self._plus(product, lambda: self.prior.solve(v)) if prior else product

    def gauss_newton(self, v: PETSc.Vec, prior: bool = True) -> PETSc.Vec:
        """Return the product of v with the Gauss-Newton matrix at the last m: the Hessian of a linearised model.

        It is positive semidefinite, for the sum over entries as the inner product. Without `prior` it is that of the
        misfit to observations alone.
        """
        pushed = self._pushed(v)
        product = self._pulled(self._last().residuals, pushed)
        return self._plus(product, lambda: self.prior.solve(v)) if prior else product

    def residual(self) -> PETSc.Vec:
        """Return all whitened residuals at the last m: those of observations and of priors. J is half their square."""
        at = self._last()
        return self._stacked(at.residuals, self.prior.root_solve(at.point - self._mean))

    def residual_jvp(self, v: PETSc.Vec) -> PETSc.Vec:
        """Return the derivative of `residual` along v, by a tangent solve."""
        return self._stacked(self._pushed(v), self.prior.root_solve(v))

    def residual_vjp(self, w: PETSc.Vec) -> PETSc.Vec:
        """Return the transpose of `residual_jvp` applied to w, by an adjoint solve."""
        at = self._last()
        sizes = [residual.numel() for residual in at.residuals]
        local = vectors.view(w, (w.getLocalSize(),)).clone()
        ends = list(pairwise((0, *accumulate(sizes))))
        of_prior = self.space.create()
        vectors.fill(of_prior, local[sum(sizes) :])
        product = self._pulled(at.residuals, [local[slice(*own)] for own in ends])
        return self._plus(product, lambda: self.prior.root_solve_transpose(of_prior))

    def forecast(self, m: PETSc.Vec, times: Sequence[float]) -> torch.Tensor:
        """Return this rank's part of the trajectory of m, `[time, *local_shape]`, at ascending times from `start` on.

        The parameters among the controls then have their values in m, and J must be evaluated again before its
        derivatives are. Raises `ConfigurationError` for other times.
        """
        chosen = [float(time) for time in times]
        if not chosen or chosen != sorted(set(chosen)) or not self.model.start <= chosen[0] <= chosen[-1] < math.inf:
            raise ConfigurationError(
                f"times = {chosen}: must be finite, ascending, and from start = {self.model.start:g} on"
            )
        self._at = None
        destroy_left(self.comm)
        inputs = self._inputs(m)
        with torch.no_grad():
            return self.model.forecast(inputs.state, inputs.errors, chosen)

    def assign(self, m: PETSc.Vec) -> None:
        """Set the parameters among the controls to their values in m."""
        self._inputs(m)

    def _last(self) -> _Evaluation:
        if self._at is None:
            raise ConfigurationError("inverse: a derivative needs an evaluation before it: call J(m)")
        return self._at

    def _inputs(self, m: PETSc.Vec) -> _Inputs:
        """Return the tensors of the controls with the values of m. Parameters are changed in place."""
        state, errors, leaves = self._fixed, [], []
        for control, value in zip(self.space.controls, self.space.unpack(m), strict=True):
            if control.kind != "state":
                pieces = separated(value, control.tensors)
                with torch.no_grad():
                    for parameter, piece in zip(control.tensors, pieces, strict=True):
                        parameter.copy_(piece)
                leaves.append(control.tensors)
                continue
            leaf = value.to(self._fixed.device, self._fixed.dtype).requires_grad_()
            leaves.append((leaf,))
            if control.is_model_error:
                errors.append(leaf)
            else:
                state = leaf
        return _Inputs(state, tuple(errors), tuple(leaves))

    def _tangents(self, inputs: _Inputs, v: PETSc.Vec) -> tuple[dict[float, torch.Tensor], dict[float, torch.Tensor]]:
        along: dict[torch.Tensor, torch.Tensor] = {}
        for control, leaves, value in zip(self.space.controls, inputs.leaves, self.space.unpack(v), strict=True):
            pieces = (value,) if control.kind == "state" else separated(value, control.tensors)
            along.update((leaf, piece.to(leaf.device, leaf.dtype)) for leaf, piece in zip(leaves, pieces, strict=True))
        state = along.pop(inputs.state, None)
        errors = [along.pop(error) for error in inputs.errors]
        tangent = torch.zeros_like(inputs.state) if state is None else state
        return self.model.tangents(inputs.state, inputs.errors, tangent, errors, along)

    def _pushed(self, v: PETSc.Vec) -> list[torch.Tensor]:
        with torch.no_grad():
            states, tangents = self._tangents(self._last().inputs, v)
        return self.model.pushed_residuals(states, tangents)

    def _pulled(
        self, outputs: Sequence[torch.Tensor], cotangents: Sequence[torch.Tensor] | None, inputs: _Inputs | None = None
    ) -> PETSc.Vec:
        """Return the gradient of <outputs, cotangents>, summed over ranks, with respect to all controls."""
        leaves = (inputs or self._last().inputs).leaves
        flat = [leaf for group in leaves for leaf in group]
        found = iter(
            torch.autograd.grad(outputs, flat, cotangents, retain_graph=True, allow_unused=True, materialize_grads=True)
        )
        return self.space.pack_sums([torch.cat([next(found).reshape(-1).double() for _ in group]) for group in leaves])

    def _plus(self, product: PETSc.Vec, of_prior: Callable[[], PETSc.Vec]) -> PETSc.Vec:
        if self._has_prior:
            product.axpy(1.0, of_prior())
        return product

    def _stacked(self, residuals: Sequence[torch.Tensor], of_prior: PETSc.Vec) -> PETSc.Vec:
        flat = torch.cat([*(part.detach().double() for part in residuals), vectors.view(of_prior, (-1,))])
        vec = vectors.create_vec(self.comm, flat.numel())
        vectors.fill(vec, flat)
        return vec


def agreed(comm: MPI.Comm, prepare: Callable[[], T]) -> T:
    """Return `prepare()`. If it fails on some rank, raise the first rank's `ConfigurationError` on all. Collective."""
    result: list[T] = []
    failure = None
    try:
        result.append(prepare())
    except ConfigurationError as error:
        failure = str(error)
    first = next((text for text in comm.allgather(failure) if text is not None), None)
    if first is not None:
        raise ConfigurationError(first)
    return result[0]


def separated(value: torch.Tensor, like: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return the entries of a control in the shapes of its tensors."""
    pieces = torch.split(value.reshape(-1), [tensor.numel() for tensor in like])
    return tuple(piece.view(tensor.shape) for piece, tensor in zip(pieces, like, strict=True))


def _problem(
    node: NeuralODE,
    controls: Iterable[Control],
    observations: Sequence[Observation],
    start: float,
    u0: torch.Tensor | None,
    model_error: ModelError | None,
) -> tuple[list[Resolved], torch.Tensor, tuple[float, ...]]:
    """Return the controls with those of model errors, the initial state, and the times of the errors."""
    refuse_other_outputs(node.settings, "an inverse problem", takes_steps=False)
    if not observations:
        raise ConfigurationError("observations: must hold at least one")
    found = resolved(controls, node)
    states = [control.tensors[0] for control in found if control.kind == "state"]
    if bool(states) == (u0 is not None):
        raise ConfigurationError("u0: must be given if no control is the initial state, and only then")
    state = states[0] if states else u0
    if not isinstance(state, torch.Tensor):
        raise ConfigurationError(f"u0 = {state!r}: must be a tensor")
    state = state.detach()
    if model_error is None:
        return found, state, ()
    times = tuple(map(float, model_error.times))
    last = max(time for observation in observations for time in observation.times)
    if not times or list(times) != sorted(set(times)) or not start < times[0] or not times[-1] < last:
        raise ConfigurationError(
            f"model_error: times = {list(times)}: must be ascending, after start = {start:g} and before the last "
            f"observation at {last:g}"
        )
    covariance = covariance_of(model_error.covariance, "model_error: covariance")
    for number in range(len(times)):
        control = Control(torch.zeros_like(state, dtype=torch.float64), prior=Gaussian(0.0, covariance))
        name = f"model_error[{number}]"
        error = (torch.zeros_like(state),)
        found.append(Resolved(name, "state", error, control, covariance, None, is_model_error=True))
    return found, state, times


def _mean(control: Resolved) -> torch.Tensor:
    mean = None if control.given.prior is None else control.given.prior.mean
    return control.guess if mean is None else _expanded(mean, control, "prior.mean")


def _expanded(value: float | torch.Tensor | None, control: Resolved, name: str) -> torch.Tensor:
    guess = control.guess
    if value is None:
        return guess
    tensor = torch.as_tensor(value, dtype=torch.float64).detach()
    if tensor.dim() and tensor.numel() != guess.numel():
        raise ConfigurationError(
            f"{control.name}: {name}: shape {tuple(tensor.shape)}: must be a number, or of shape {tuple(guess.shape)}"
        )
    return tensor.expand(guess.shape) if tensor.dim() == 0 else tensor.reshape(guess.shape)
