"""Covariances of priors and observations, and inner products of controls, as operators on this rank's part."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch

from pnode_dist.errors import ConfigurationError
from pnode_dist.exchange.linear_map import linear_map


class Covariance(ABC):
    """A covariance C = L L^T, given by its root L. All methods may be collective, and are called on all ranks alike.

    A method takes this rank's part of a vector as a float64 tensor without a graph, and returns a new tensor of the
    same shape. The vector is a control (the tensor itself, or several tensors of a control as one flat tensor) or the
    values of an observation. Replicated parameters are whole on every rank.

    A derived class defines `root` and `root_solve`. It also defines the transposes unless L is symmetric.
    """

    @abstractmethod
    def root(self, x: torch.Tensor) -> torch.Tensor:
        """Return L x."""

    @abstractmethod
    def root_solve(self, x: torch.Tensor) -> torch.Tensor:
        """Return L^-1 x."""

    def root_transpose(self, x: torch.Tensor) -> torch.Tensor:
        """Return L^T x."""
        return self.root(x)

    def root_solve_transpose(self, x: torch.Tensor) -> torch.Tensor:
        """Return L^-T x."""
        return self.root_solve(x)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """Return C x."""
        return self.root(self.root_transpose(x))

    def solve(self, x: torch.Tensor) -> torch.Tensor:
        """Return C^-1 x."""
        return self.root_solve_transpose(self.root_solve(x))

    def variances(self, like: torch.Tensor) -> torch.Tensor:
        """Return the variance of each entry of a vector of the shape of `like`: the diagonal of C."""
        raise ConfigurationError(f"covariance: {type(self).__name__} does not define variances")


class Diagonal(Covariance):
    """Independent errors of the given variance: a positive number, or a tensor that broadcasts to the vector.

    Raises `ConfigurationError` for a variance that is not positive and finite.
    """

    def __init__(self, variance: float | torch.Tensor) -> None:
        given = torch.as_tensor(variance, dtype=torch.float64).detach()
        wrong = given[~((given > 0) & given.isfinite())].reshape(-1)
        if wrong.numel():
            raise ConfigurationError(f"covariance: variance = {wrong[0].item():g}: must be positive and finite")
        self.deviation = given.sqrt()

    def root(self, x: torch.Tensor) -> torch.Tensor:
        """Return x times the standard deviations."""
        return x * self.deviation

    def root_solve(self, x: torch.Tensor) -> torch.Tensor:
        """Return x divided by the standard deviations."""
        return x / self.deviation

    def variances(self, like: torch.Tensor) -> torch.Tensor:
        """Return the variances."""
        return self.deviation.square().expand(like.shape).clone()


class Dense(Covariance):
    """The covariance `matrix` `[n, n]` of a control or observation with n values on every rank, by its Cholesky factor.

    Raises `ConfigurationError` for a matrix that is not symmetric positive definite.
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        given = matrix.detach().double()
        if given.dim() != 2 or given.shape[0] != given.shape[1]:
            raise ConfigurationError(f"covariance: a matrix of shape {tuple(given.shape)}: must be square")
        self._factor, failure = torch.linalg.cholesky_ex(given)
        if failure.item() or not torch.allclose(given, given.T, rtol=1e-12, atol=0):
            raise ConfigurationError("covariance: the matrix must be symmetric and positive definite")

    def root(self, x: torch.Tensor) -> torch.Tensor:
        """Return the lower factor times x."""
        image: torch.Tensor = self._factor @ x.reshape(-1)
        return image.view(x.shape)

    def root_transpose(self, x: torch.Tensor) -> torch.Tensor:
        """Return the upper factor times x."""
        image: torch.Tensor = self._factor.T @ x.reshape(-1)
        return image.view(x.shape)

    def root_solve(self, x: torch.Tensor) -> torch.Tensor:
        """Solve with the lower factor."""
        image: torch.Tensor = torch.linalg.solve_triangular(self._factor, x.reshape(-1, 1), upper=False)
        return image.view(x.shape)

    def root_solve_transpose(self, x: torch.Tensor) -> torch.Tensor:
        """Solve with the upper factor."""
        image: torch.Tensor = torch.linalg.solve_triangular(self._factor.T, x.reshape(-1, 1), upper=True)
        return image.view(x.shape)

    def variances(self, like: torch.Tensor) -> torch.Tensor:
        """Return the diagonal of the matrix."""
        variances: torch.Tensor = self._factor.square().sum(dim=1).view(like.shape)
        return variances


CovarianceLike = Covariance | float | torch.Tensor
"""A covariance, or the variance of independent errors: a number or a tensor."""


def covariance_of(given: CovarianceLike, name: str) -> Covariance:
    """Return `given` as a covariance. Raises `ConfigurationError` with the argument's `name` for anything else."""
    if isinstance(given, Covariance):
        return given
    if isinstance(given, torch.Tensor) or (isinstance(given, int | float) and not isinstance(given, bool)):
        return Diagonal(given)
    raise ConfigurationError(f"{name} = {given!r}: must be a Covariance, a variance, or a tensor of variances")


def whitened(x: torch.Tensor, covariance: Covariance) -> torch.Tensor:
    """Return L^-1 x as an operation of torch. Collective if the covariance is, and so are its derivatives.

    Half the sum of its squares over all ranks is the misfit x^T C^-1 x / 2.
    """
    return linear_map(x.double(), covariance.root_solve, covariance.root_solve_transpose)


def matern_scale(cells: tuple[float, ...]) -> float:
    """Return the scale s for which s (1 - length^2 laplacian)^-1 has unit variance far from boundaries.

    `cells` is the length in grid spacings along one, two or three axes. The variance of white noise on a grid is one
    over the volume of a cell, and the integral of (1 + k^2)^-2 over all wave numbers k is known in closed form.
    """
    integral = {1: 1 / 4, 2: 1 / (4 * math.pi), 3: 1 / (8 * math.pi)}[len(cells)]
    return math.sqrt(math.prod(cells) / integral)
