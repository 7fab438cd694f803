"""The uncertainty of a minimum: a Gaussian with the inverse of the Hessian as its covariance, of low rank."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence

import numpy as np
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.inverse.inverse import Inverse
from pnode_dist.inverse.tao_methods import HESSIANS
from pnode_dist.petsc import vectors

_PROBES, _SAMPLES = 1, 2
_DEPENDENT = 1e3 * sys.float_info.epsilon


class Laplace:
    """The normal distribution of the controls around `m`, with the inverse of the Hessian at m as its covariance.

    With the prior's covariance C = L L^T, and the eigenvectors V and `eigenvalues` d (descending) of L^T H L, where H
    is the Hessian of the misfit to observations, the covariance is L (I - V D V^T) L^T with D = d / (1 + d). An
    eigenvalue is the ratio of what the observations say about a direction to what the prior says. Directions that are
    left out have the prior's variance.

    All methods are collective. Their results do not depend on the number of ranks but for rounding.
    """

    def __init__(self, problem: Inverse, m: PETSc.Vec, eigenvalues: Sequence[float], vectors: torch.Tensor) -> None:
        self.problem, self.m, self.eigenvalues = problem, m.copy(), tuple(eigenvalues)
        self._vectors = vectors
        self._values = torch.tensor(self.eigenvalues, dtype=torch.float64)

    def multiply(self, v: PETSc.Vec) -> PETSc.Vec:
        """Return the covariance times v."""
        prior = self.problem.prior
        return prior.root(self._scaled(prior.root_transpose(v), -self._values / (1 + self._values)))

    def solve(self, v: PETSc.Vec) -> PETSc.Vec:
        """Return the inverse of the covariance times v: the Hessian of J, if no eigenvalue is left out."""
        prior = self.problem.prior
        return prior.root_solve_transpose(self._scaled(prior.root_solve(v), self._values))

    def sample(self, seed: int, number: int = 0) -> PETSc.Vec:
        """Return one sample of a series. It depends on seed, number and global indices; bounds do not confine it."""
        drawn = self.problem.space.random(_stream(seed, _SAMPLES, number))
        return self.m + self.problem.prior.root(self._scaled(drawn, (1 + self._values).rsqrt() - 1))

    def variances(self) -> PETSc.Vec:
        """Return the variance of each entry of the controls.

        Raises `ConfigurationError` for a prior whose covariance does not define `variances`.
        """
        problem, space = self.problem, self.problem.space
        found = space.pack(
            [
                covariance.variances(guess)
                for covariance, guess in zip(problem.prior.covariances, space.unpack(self.m), strict=True)
                if covariance is not None
            ]
        )
        for value, column in zip(self.eigenvalues, self._vectors.unbind(1), strict=True):
            direction = problem.prior.root(_vec(problem, column))
            found.axpy(-value / (1 + value), direction * direction)
        return found

    def _scaled(self, v: PETSc.Vec, factors: torch.Tensor) -> PETSc.Vec:
        """Return (I + V diag(factors) V^T) v."""
        local = vectors.view(v, (v.getLocalSize(),))
        products = _summed(self.problem.comm, self._vectors.T @ local)
        return _vec(self.problem, local + self._vectors @ (factors * products))


def laplace(
    problem: Inverse,
    m: PETSc.Vec,
    rank: int,
    *,
    oversampling: int = 10,
    hessian: str = "gauss_newton",
    seed: int = 0,
) -> Laplace:
    """Return the Laplace approximation at m, the minimum of J, from the `rank` largest eigenvalues. Collective.

    The eigenvalues are those of the Hessian of the misfit, "gauss_newton" or "exact", preconditioned by the priors. A
    randomised algorithm of two passes finds them by 2 (rank + oversampling) products with it, from random vectors that
    depend on `seed` and global indices alone. Eigenvalues of zero are left out. Afterwards J is at m.
    N. Halko, P. G. Martinsson, J. A. Tropp, SIAM Review 53 (2011); A. K. Saibaba, J. Lee, P. K. Kitanidis, Numer.
    Linear Algebra Appl. 23 (2016).

    Raises `ConfigurationError` for a control without a prior, a point on a bound, and an exact Hessian that is not
    positive definite, as it is away from a minimum.
    """
    _check(problem, m, rank, oversampling, hessian)
    if not problem.is_at(m):
        problem(m)
    product = problem.gauss_newton if hessian == "gauss_newton" else problem.hessian
    prior = problem.prior

    def preconditioned(column: torch.Tensor) -> torch.Tensor:
        image = prior.root_transpose(product(prior.root(_vec(problem, column)), prior=False))
        return vectors.view(image, (image.getLocalSize(),)).clone()

    count = min(rank + oversampling, problem.space.size)
    probes = (problem.space.random(_stream(seed, _PROBES, number)) for number in range(count))
    images = [preconditioned(vectors.view(probe, (problem.space.local_size,))) for probe in probes]
    basis = _orthonormal(problem.comm, images, problem.space.local_size)
    values, found = _eigenpairs(problem.comm, basis, preconditioned)
    kept = values.abs().argsort(descending=True, stable=True)[:rank]
    kept = kept[values[kept].abs() > _DEPENDENT * values.abs().max()] if len(kept) else kept
    kept = kept[values[kept].argsort(descending=True, stable=True)]
    if len(kept) and values[kept[-1]] <= -1:
        raise ConfigurationError(
            f"m: the Hessian has the eigenvalue {1 + values[kept[-1]].item():g} in units of the prior's: must be "
            'positive, as at a minimum; hessian = "gauss_newton" always is'
        )
    return Laplace(problem, m, values[kept].tolist(), found[:, kept].contiguous())


def _check(problem: Inverse, m: PETSc.Vec, rank: int, oversampling: int, hessian: str) -> None:
    for control, covariance in zip(problem.space.controls, problem.prior.covariances, strict=True):
        if covariance is None:
            raise ConfigurationError(f"{control.name}: prior = None: must be given for a Laplace approximation")
    if rank < 1 or oversampling < 0:
        raise ConfigurationError(
            f"rank = {rank}, oversampling = {oversampling}: rank must be at least 1, oversampling at least 0"
        )
    if hessian not in HESSIANS:
        raise ConfigurationError(f"hessian = {hessian!r}: must be one of {', '.join(HESSIANS)}")
    bounds = problem.space.bounds()
    if bounds is not None:
        lower, upper = bounds
        active = int(((m.array_r <= lower.array_r) | (m.array_r >= upper.array_r)).sum())
        active = problem.comm.allreduce(active)
        if active:
            raise ConfigurationError(
                f"m: {active} of its {problem.space.size} entries are on their bounds: must be inside of them for a "
                "Laplace approximation"
            )


def _stream(seed: int, purpose: int, number: int) -> int:
    """Return a seed for one random vector."""
    return int(np.random.SeedSequence([seed, purpose, number]).generate_state(1, np.uint32)[0])


def _orthonormal(comm: MPI.Comm, columns: Sequence[torch.Tensor], rows: int) -> torch.Tensor:
    """Return an orthonormal basis of distributed columns, without those that depend on earlier ones."""
    basis = torch.empty(rows, 0, dtype=torch.float64)
    for given in columns:
        column = given
        length = _norm(comm, given)
        # A second projection removes what rounding has left of the first.
        for _ in range(2):
            column = column - basis @ _summed(comm, basis.T @ column)
        left = _norm(comm, column)
        if left > _DEPENDENT * length:
            basis = torch.cat([basis, (column / left)[:, None]], dim=1)
    return basis


def _eigenpairs(
    comm: MPI.Comm, basis: torch.Tensor, multiply: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvalues and eigenvectors of a symmetric operator within a basis."""
    if basis.shape[1] == 0:
        return torch.empty(0, dtype=torch.float64), basis
    images = torch.stack([multiply(column.contiguous()) for column in basis.unbind(1)], dim=1)
    projected = _summed(comm, basis.T @ images)
    values, directions = torch.linalg.eigh((projected + projected.T) / 2)
    # The same bits on all ranks, also if their processors differ.
    values, directions = comm.bcast((values, directions))
    return values, basis @ directions


def _vec(problem: Inverse, local: torch.Tensor) -> PETSc.Vec:
    vec = problem.space.create()
    vectors.fill(vec, local)
    return vec


def _summed(comm: MPI.Comm, local: torch.Tensor) -> torch.Tensor:
    total = torch.empty_like(local, memory_format=torch.contiguous_format)
    comm.Allreduce(local.contiguous().numpy(), total.numpy())
    return total


def _norm(comm: MPI.Comm, local: torch.Tensor) -> float:
    return math.sqrt(comm.allreduce(local.square().sum().item()))
