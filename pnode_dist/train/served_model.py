"""Interface of a model that `pnode-dist serve` answers requests for, and the base of models written in torch.

The operations and their arguments are those of UM-Bridge's protocol 1.0. A model maps vectors to vectors. The
configuration of a request is a mapping that the model checks, such as the lead times of a forecast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from mpi4py import MPI

from pnode_dist.distributed.failures import failed_anywhere

EVALUATE, GRADIENT, JACOBIAN, HESSIAN = "Evaluate", "Gradient", "ApplyJacobian", "ApplyHessian"
OPERATIONS = (EVALUATE, GRADIENT, JACOBIAN, HESSIAN)

Vectors = Sequence[torch.Tensor]
"""Vectors `[size]`, float64, the same on every rank."""
Settings = Mapping[str, Any]
"""The `config` of a request."""


class ServedModel(Protocol):
    """A function of vectors with its derivatives.

    `refusal`, `input_sizes` and `output_sizes` are called by the threads of rank 0 that receive requests. They are not
    collective, make no call of MPI, and leave the model as it is. They raise `ConfigurationError` for a `config` that
    the model does not have. The four operations are collective on the world. They are given checked arguments, the same
    on every rank, and return the same result on every rank.
    """

    @property
    def name(self) -> str:
        """Name by which a request chooses the model."""
        ...

    def refusal(self, operation: str) -> str | None:
        """Return the reason why one of `OPERATIONS` is not supported, or None."""
        ...

    def input_sizes(self, config: Settings) -> Sequence[int]:
        """Return the length of each input vector."""
        ...

    def output_sizes(self, config: Settings) -> Sequence[int]:
        """Return the length of each output vector."""
        ...

    def evaluate(self, inputs: Vectors, config: Settings) -> Vectors:
        """Compute the output vectors F(inputs)."""
        ...

    def gradient(
        self, out_wrt: int, in_wrt: int, inputs: Vectors, sens: torch.Tensor, config: Settings
    ) -> torch.Tensor:
        """Compute the transposed Jacobian of output `out_wrt` with respect to input `in_wrt`, times `sens`."""
        ...

    def apply_jacobian(
        self, out_wrt: int, in_wrt: int, inputs: Vectors, vec: torch.Tensor, config: Settings
    ) -> torch.Tensor:
        """Compute the Jacobian of output `out_wrt` with respect to input `in_wrt`, times `vec`."""
        ...

    def apply_hessian(
        self,
        out_wrt: int,
        in_wrt1: int,
        in_wrt2: int,
        inputs: Vectors,
        sens: torch.Tensor,
        vec: torch.Tensor,
        config: Settings,
    ) -> torch.Tensor:
        """Compute the derivative along `vec` in input `in_wrt2` of the gradient with respect to input `in_wrt1`."""
        ...


class FailedElsewhere(RuntimeError):  # noqa: N818
    """A share failed on another rank, so that there is no sum."""


class SummedModel:
    """A served model whose outputs are sums of the ranks' shares, which torch differentiates.

    A subclass gives `input_sizes`, `output_sizes` and `shares`. `comm` holds all ranks. `no_gradient` is the reason why
    there are no derivatives, None if there are.
    """

    def __init__(self, name: str, comm: MPI.Comm, no_gradient: str | None = None) -> None:
        self.name, self.comm, self.no_gradient = name, comm, no_gradient

    def refusal(self, operation: str) -> str | None:
        """Return the reason why an operation is not supported: every derivative needs an adjoint."""
        return None if operation == EVALUATE else self.no_gradient

    def input_sizes(self, config: Settings) -> Sequence[int]:
        """Return the length of each input vector."""
        raise NotImplementedError

    def output_sizes(self, config: Settings) -> Sequence[int]:
        """Return the length of each output vector."""
        raise NotImplementedError

    def shares(self, inputs: Vectors, config: Settings) -> Vectors:
        """Compute this rank's share of each output vector, differentiable in `inputs`. Collective on the ranks.

        The output is the sum of the shares over the ranks.
        """
        raise NotImplementedError

    def evaluate(self, inputs: Vectors, config: Settings) -> Vectors:
        """Compute the output vectors. Collective on the ranks."""

        def compute() -> Vectors:
            with torch.no_grad():
                return self.shares(inputs, config)

        return self._sums(compute)

    def gradient(
        self, out_wrt: int, in_wrt: int, inputs: Vectors, sens: torch.Tensor, config: Settings
    ) -> torch.Tensor:
        """Compute the gradient of `sens` times an output by the discrete adjoint. Collective on the ranks."""

        def compute() -> Vectors:
            given = _differentiable(inputs, {in_wrt})
            objective = sens @ self.shares(given, config)[out_wrt]
            return [_gradient(objective, given[in_wrt])]

        return self._sums(compute)[0]

    def apply_jacobian(
        self, out_wrt: int, in_wrt: int, inputs: Vectors, vec: torch.Tensor, config: Settings
    ) -> torch.Tensor:
        """Compute the tangent of an output by forward mode. Collective on the ranks."""

        def output(value: torch.Tensor) -> torch.Tensor:
            return self.shares([*inputs[:in_wrt], value, *inputs[in_wrt + 1 :]], config)[out_wrt]

        def compute() -> Vectors:
            with torch.no_grad():
                return [torch.func.jvp(output, (inputs[in_wrt],), (vec,))[1]]

        return self._sums(compute)[0]

    def apply_hessian(
        self,
        out_wrt: int,
        in_wrt1: int,
        in_wrt2: int,
        inputs: Vectors,
        sens: torch.Tensor,
        vec: torch.Tensor,
        config: Settings,
    ) -> torch.Tensor:
        """Compute a product with the Hessian by differentiating the adjoint. Collective on the ranks."""

        def compute() -> Vectors:
            given = _differentiable(inputs, {in_wrt1, in_wrt2})
            objective = sens @ self.shares(given, config)[out_wrt]
            # The Hessian is symmetric: the gradient in input 1 of the slope along `vec` in input 2.
            slope = vec @ _gradient(objective, given[in_wrt2], create_graph=True)
            return [_gradient(slope, given[in_wrt1])]

        return self._sums(compute)[0]

    def _sums(self, compute: Callable[[], Vectors]) -> list[torch.Tensor]:
        """Sum the shares that each rank computes. Raises `FailedElsewhere` on ranks that have theirs in vain."""
        shares: Vectors = []
        try:
            shares = compute()
        except Exception as error:
            failed_anywhere(self.comm, f"{self.name}: {type(error).__name__}: {error}")
            raise
        if failed_anywhere(self.comm, None):
            raise FailedElsewhere(f"{self.name}: failed on another rank")
        return [torch.from_numpy(self.comm.allreduce(share.detach().double().numpy())) for share in shares]


def _differentiable(inputs: Vectors, chosen: set[int]) -> list[torch.Tensor]:
    return [value.detach().clone().requires_grad_(number in chosen) for number, value in enumerate(inputs)]


def _gradient(objective: torch.Tensor, value: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
    """Return the gradient, zero where the objective does not depend on the value."""
    if not objective.requires_grad:
        return torch.zeros_like(value)
    (found,) = torch.autograd.grad(
        objective, value, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return found
