"""One step of a fully implicit method for many small systems, and its discrete adjoint.

Like `pnode_dist.ode.steppers.batched_step`, with all stages of a sample as one system `[sample, stage * component]`.
With W = A^-1 it is (W (x) M) Y - h g(Y) = (W (x) M) u for `IrkTableau`, and its blocks are factored in a batch.
"""

from __future__ import annotations

from functools import partial

import torch

from pnode_dist.ode.rhs.evaluation import StageGraph
from pnode_dist.ode.steppers.batched_newton import StageEquations, factored
from pnode_dist.ode.steppers.batched_problem import (
    BatchProblem,
    jacobians,
    linearised,
    multiplied,
    multiplied_transposed,
    value,
)
from pnode_dist.ode.steppers.batched_step import Keep, graph_of, keeper, product_of, refined, solved
from pnode_dist.ode.steppers.tape import Stage


def advance(problem: BatchProblem, time: float, size: float, state: torch.Tensor) -> torch.Tensor:
    """Return the state at `time` + `size`. Collective on the problem's ranks.

    Raises `ConvergenceError` on all ranks if the equations of the stages cannot be solved.
    """
    return _step(problem, time, size, state, None)


def record(
    problem: BatchProblem, time: float, size: float, state: torch.Tensor, level: str
) -> tuple[torch.Tensor, list[Stage]]:
    """Return the state at `time` + `size`, and the tape of the step: one entry for each stage.

    Collective. Raises like `advance`. At the `level` "stages" the entries are states, else graphs.
    """
    tape: list[Stage] = []
    return _step(problem, time, size, state, keeper(problem, tape, level)), tape


def pull_back(
    problem: BatchProblem, time: float, size: float, tape: list[Stage], adjoint: torch.Tensor
) -> tuple[torch.Tensor, list[list[torch.Tensor | None]]]:
    """Return the adjoint of the state before a step from that after it, and products with parameter derivatives.

    See `batched_step.pull_back` for the products. Empties `tape`. Collective on the problem's ranks. The stages have
    the cotangents d_j lambda, d being `IrkTableau.ends`. With (W (x) M - h J)^T nu = d lambda the parameters' cotangent
    is h (dg/dtheta)^T nu, and the adjoint before the step is (1 - sum_j d_j) lambda + sum_ij W_ij M^T nu_i.
    """
    tableau, samples = problem.irk, problem.samples
    graphs = [graph_of(problem, stage, problem.implicit) for stage in tape]
    tape.clear()
    found: list[list[torch.Tensor | None]] = []

    def pulled_back(vector: torch.Tensor) -> torch.Tensor:
        pieces = []
        for graph, piece in zip(graphs, vector.chunk(tableau.stages, dim=1), strict=True):
            product, parameters = product_of(problem, graph, size * piece, time, states=True)
            pieces.append(product)
            found.append(parameters)
        return torch.cat(pieces, dim=1)

    factors = factored(_diagonal(problem, graphs), size, problem.mass_of_stages)
    side = torch.einsum("j,sa->sja", tableau.ends, adjoint).flatten(1)
    nu, _ = refined(problem, time, size, factors, problem.mass_of_stages, side, pulled_back)
    summed = torch.einsum("i,sia->sa", tableau.row_sums, nu.view(samples, tableau.stages, problem.components))
    before = multiplied_transposed(problem.mass, summed)
    if not tableau.ends_in_last_stage:
        before = before + (1.0 - tableau.ends.sum()) * adjoint
    return before, found


def _step(problem: BatchProblem, time: float, size: float, state: torch.Tensor, keep: Keep | None) -> torch.Tensor:
    """Take a step. Call `keep` for each stage: function, time and state."""
    tableau, samples = problem.irk, problem.samples
    times = [time + node * size for node in tableau.nodes]
    base = torch.einsum("i,sa->sia", tableau.row_sums, multiplied(problem.mass, state)).flatten(1)
    equations = StageEquations(
        partial(_value, problem, times), partial(_linearised, problem, times), size, base, problem.mass_of_stages
    )
    found = solved(problem, time, size, equations, state.repeat(1, tableau.stages)).states
    stages = found.view(samples, tableau.stages, problem.components).transpose(0, 1)
    if keep is not None:
        for when, stage in zip(times, stages, strict=True):
            keep(problem.implicit, when, stage)
    return tableau.result(state, stages)


def _value(problem: BatchProblem, times: list[float], states: torch.Tensor) -> torch.Tensor:
    """Return g at all stages. Collective if it is."""
    pieces = zip(times, states.chunk(len(times), dim=1), strict=True)
    # f may return memory that it uses again.
    return torch.cat([value(problem, problem.implicit, when, piece).clone() for when, piece in pieces], dim=1)


def _linearised(problem: BatchProblem, times: list[float], states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return g at all stages, and the block diagonal of its Jacobians. Collective if g is."""
    found = [
        linearised(problem, when, piece) for when, piece in zip(times, states.chunk(len(times), dim=1), strict=True)
    ]
    return torch.cat([values for values, _ in found], dim=1), _block_diagonal([blocks for _, blocks in found])


def _diagonal(problem: BatchProblem, graphs: list[StageGraph]) -> torch.Tensor:
    return _block_diagonal([jacobians(problem, graph) for graph in graphs])


def _block_diagonal(blocks: list[torch.Tensor]) -> torch.Tensor:
    """Return blocks `[sample, row, column]` as the diagonal of one larger block for each sample."""
    samples, size = blocks[0].shape[:2]
    result = blocks[0].new_zeros(samples, len(blocks), size, len(blocks), size)
    for number, block in enumerate(blocks):
        result[:, number, :, number, :] = block
    return result.view(samples, len(blocks) * size, len(blocks) * size)
