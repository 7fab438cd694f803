"""Check of a gradient: the adjoint against finite differences, and a Taylor test.

The Taylor test is that of P. E. Farrell, D. A. Ham, S. W. Funke, M. E. Rognes: Automated derivation of the adjoint
of high-level transient finite element programs, SIAM J. Sci. Comput. 35 (2013), sec. 6: J(x + h d) - J(x) falls
like h, and what the gradient leaves of it, J(x + h d) - J(x) - h <dJ, d>, like h^2 only if the gradient is right.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from pnode_dist.distributed.buffers import bytes_of
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.partition.protocol import Partition

LARGEST_ERROR = 1e-6
LEAST_ORDER = 1.9
_FIRST_STEP = 2.0**-6
_STEPS = 6
_STATE, _PARAMETERS = 1, 2
_ROUNDING = 1e5 * np.finfo(np.float64).eps


@dataclass(frozen=True)
class GradcheckCase:
    """A scalar function of an initial state and the parameters, to be differentiated in both ways.

    `state` is this rank's part of the initial state, a float64 leaf `[..., *partition.local_shape]` with any number
    of leading axes. `loss(state)` is this rank's share: the objective is the sum of the shares over the state ranks,
    and every data replica is given the same case. `loss` is collective on the state ranks, deterministic, and reads
    the current values of `parameters`, which are the same on every rank.
    """

    state: torch.Tensor
    loss: Callable[[torch.Tensor], torch.Tensor]
    parameters: Sequence[nn.Parameter]
    partition: Partition


@dataclass(frozen=True)
class GradcheckResult:
    """The result of the check. All figures are global and the same on every rank.

    `gradient_norm` is over parameters and initial state together. `adjoint_derivative` is the gradient along the
    direction, `finite_difference` the extrapolated central difference with its own estimated error. The Taylor
    remainders belong to `steps`, and their orders to the halvings between them; an order is None where the remainders
    are too near to rounding to have one. `parameter_gradient_sha256` is of the bytes of the parameters' gradient: the
    same for trajectories kept differently.
    """

    loss: float
    gradient_norm: float
    adjoint_derivative: float
    finite_difference: float
    finite_difference_error: float
    relative_error: float
    steps: list[float]
    taylor_remainders_without_gradient: list[float]
    taylor_remainders: list[float]
    taylor_orders_without_gradient: list[float | None]
    taylor_orders: list[float | None]
    parameter_gradient_sha256: str
    parameters: int
    state_size: int
    ranks: int
    state_ranks: int
    data_replicas: int
    seed: int

    def failures(self) -> list[str]:
        """Return the failures of the gradient, one sentence each; empty for a correct gradient."""
        found = []
        if not self.relative_error <= LARGEST_ERROR:
            found.append(f"relative_error = {self.relative_error:.3g} is above {LARGEST_ERROR:g}")
        order = next((order for order in reversed(self.taylor_orders) if order is not None), None)
        if order is not None and not order >= LEAST_ORDER:
            found.append(f"the second Taylor order = {order:.3f} is below {LEAST_ORDER:g}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return the fields and the failures."""
        return {**asdict(self), "failures": self.failures()}


def gradcheck(case: GradcheckCase, mesh: Mesh, seed: int = 0) -> GradcheckResult:
    """Check the gradient of a case along one random direction in state and parameters. Collective on the world.

    The direction depends on the seed and on global indices alone, so that every number of ranks checks the same
    derivative. It perturbs state and parameters in proportion to their own size. Costs one gradient and
    12 further losses.
    """
    share = case.loss(case.state)
    inputs = [case.state, *case.parameters]
    gradients = torch.autograd.grad(share, inputs, allow_unused=True)
    loss = _global(share, mesh)
    state_gradient, *parameter_gradients = (
        torch.zeros_like(value) if gradient is None else gradient
        for value, gradient in zip(inputs, gradients, strict=True)
    )
    # Every replica has the same case. Training takes the mean over replicas too.
    state_gradient = mesh.sum(state_gradient, over="data") / mesh.data_replicas
    parameter_gradients = _summed(parameter_gradients, mesh)
    direction, parameter_directions = _directions(case, mesh, seed)
    adjoint = _dot([state_gradient], [direction], mesh) + _dot(parameter_gradients, parameter_directions)
    norm = math.sqrt(_dot([state_gradient], [state_gradient], mesh) + _dot(parameter_gradients, parameter_gradients))
    steps = [_FIRST_STEP / 2**halving for halving in range(_STEPS)]
    ahead, behind = (
        [_moved(case, mesh, sign * step, direction, parameter_directions) for step in steps] for sign in (1, -1)
    )
    differences = [(plus - minus) / (2 * step) for plus, minus, step in zip(ahead, behind, steps, strict=True)]
    difference, difference_error = extrapolate(differences)
    scale = max(abs(adjoint), abs(difference))
    without = [abs(value - loss) for value in ahead]
    remainders = [abs(value - loss - step * adjoint) for value, step in zip(ahead, steps, strict=True)]
    smallest = _ROUNDING * max(abs(loss), *(abs(value) for value in ahead))
    return GradcheckResult(
        loss=loss,
        gradient_norm=norm,
        adjoint_derivative=adjoint,
        finite_difference=difference,
        finite_difference_error=difference_error,
        relative_error=0.0 if adjoint == difference else abs(adjoint - difference) / scale,
        steps=steps,
        taylor_remainders_without_gradient=without,
        taylor_remainders=remainders,
        taylor_orders_without_gradient=orders(without, smallest),
        taylor_orders=orders(remainders, smallest),
        parameter_gradient_sha256=_sha256(parameter_gradients),
        parameters=sum(value.numel() for value in case.parameters),
        state_size=math.prod(_leading(case)) * math.prod(case.partition.global_shape),
        ranks=mesh.size,
        state_ranks=mesh.state_ranks,
        data_replicas=mesh.data_replicas,
        seed=seed,
    )


def extrapolate(differences: Sequence[float]) -> tuple[float, float]:
    """Return the limit of central differences at steps that halve, and an estimate of its error.

    Richardson's extrapolation, entry of the table by entry, and of all the entries the one that differs least from
    those it was made of: C. J. F. Ridders, Adv. Eng. Softw. 4 (1982). Where steps are too long or too near to
    rounding, their entries are not chosen.
    """
    best, error = differences[-1], math.inf
    row = [differences[0]]
    for number, difference in enumerate(differences[1:], 1):
        previous, row = row, [difference]
        for column in range(1, number + 1):
            factor = 4.0**column
            row.append((factor * row[-1] - previous[column - 1]) / (factor - 1))
            change = max(abs(row[column] - row[column - 1]), abs(row[column] - previous[column - 1]))
            if change < error:
                best, error = row[column], change
    return best, error


def orders(remainders: Sequence[float], smallest: float) -> list[float | None]:
    """Return the orders of remainders at steps that halve: log2 of each over the next, None below `smallest`."""
    return [math.log2(coarse / fine) if min(coarse, fine) > smallest else None for coarse, fine in pairwise(remainders)]


def state_direction(
    partition: Partition, leading: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Return this rank's part `[*leading, *local_shape]` of a normally distributed global array, fixed by the seed.

    Each index of the array's first axis (a row, a sample) has a generator of its own; a rank draws those it owns.
    """
    rows, *others = partition.owned_slices(partition.comm.rank)
    columns: tuple[Any, ...] = (..., *others)
    drawn = torch.empty((*leading, *partition.local_shape), dtype=dtype)
    for number, row in enumerate(np.arange(partition.global_shape[0])[rows]):
        generator = np.random.default_rng([_STATE, seed, row])
        whole = torch.from_numpy(generator.standard_normal((*leading, *partition.global_shape[1:])))
        drawn.select(len(leading), number).copy_(whole[columns])
    return drawn


def _sha256(tensors: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(bytes_of(tensor.contiguous()).data)
    return digest.hexdigest()


def _leading(case: GradcheckCase) -> tuple[int, ...]:
    return tuple(case.state.shape[: case.state.dim() - len(case.partition.local_shape)])


def _directions(case: GradcheckCase, mesh: Mesh, seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return random directions for the state and each parameter, with the root mean square of the values."""
    squares = mesh.sum(torch.stack([case.state.detach().square().sum(), _size(case.state)]), over="state")
    state = state_direction(case.partition, _leading(case), seed) * _scale(squares)
    generator = np.random.default_rng([_PARAMETERS, seed])
    parameters = []
    for value in case.parameters:
        drawn = torch.from_numpy(generator.standard_normal(tuple(value.shape))).to(value.dtype)
        parameters.append(drawn * _scale(torch.stack([value.detach().square().sum(), _size(value)])))
    return state, parameters


def _size(value: torch.Tensor) -> torch.Tensor:
    return torch.tensor(float(value.numel()), dtype=value.dtype)


def _scale(squares: torch.Tensor) -> float:
    """Return the root of a mean square; 0.1 for values that are all zero, such as initial biases."""
    total, count = squares.tolist()
    return math.sqrt(total / count) if total > 0 else 0.1


def _global(share: torch.Tensor, mesh: Mesh) -> float:
    return mesh.sum(share).item() / mesh.data_replicas


def _summed(gradients: Sequence[torch.Tensor], mesh: Mesh) -> list[torch.Tensor]:
    """Sum parameter gradients over state ranks, and average them over replicas."""
    if not gradients:
        return []
    total = mesh.sum(torch.cat([gradient.reshape(-1) for gradient in gradients])) / mesh.data_replicas
    pieces = torch.split(total, [gradient.numel() for gradient in gradients])
    return [piece.view(gradient.shape) for piece, gradient in zip(pieces, gradients, strict=True)]


def _dot(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor], mesh: Mesh | None = None) -> float:
    """Return the inner product of tensors on every rank, or with `mesh` of tensors split over its state ranks."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(left, right, strict=True):
        total += torch.sum(a.double() * b.double())
    return (total if mesh is None else mesh.sum(total, over="state")).item()


def _moved(
    case: GradcheckCase, mesh: Mesh, step: float, direction: torch.Tensor, parameter_directions: Sequence[torch.Tensor]
) -> float:
    """Return the global loss at state and parameters moved by `step` along the direction."""
    with torch.no_grad(), _shifted(case.parameters, step, parameter_directions):
        return _global(case.loss(case.state + step * direction), mesh)


@contextmanager
def _shifted(parameters: Sequence[torch.Tensor], step: float, directions: Sequence[torch.Tensor]) -> Iterator[None]:
    originals = [value.clone() for value in parameters]
    for value, direction in zip(parameters, directions, strict=True):
        value.add_(direction, alpha=step)
    try:
        yield
    finally:
        for value, original in zip(parameters, originals, strict=True):
            value.copy_(original)
