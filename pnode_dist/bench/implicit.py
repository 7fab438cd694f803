"""Newton and Krylov iterations of implicit steps and their adjoints, without and with preconditioners.

On one rank: a batch of stiff systems with the inverse of each system's Jacobian, and reaction and diffusion on a grid
with the assembled Jacobian. On several ranks: the same grid on one rank and on all ranks. A preconditioner that acts on
each rank's part alone degrades with the number of ranks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from mpi4py import MPI

from pnode_dist.bench.report import Check, Report, Row
from pnode_dist.checkpointing.budget import CheckpointBudget
from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.steppers.preconditioner import AssembledJacobian, Preconditioner
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.gray_scott.config import GrayScottParameters
from pnode_dist.problems.gray_scott.physics import GrayScott, initial_state

LARGEST_SHARE = 0.5
LARGEST_GROWTH = 1.5
POINTS = 256
_DOMAIN = 0.25
_STEPS, _STEP = 2, 1.0
_SYSTEMS = 64
_RATES = (0.04, 3.0e7, 1.0e4)
_TOLERANCE = {"snes_rtol": 1e-8, "ksp_gmres_restart": 60}
_GRIDS = {"asm": {"pc_type": "asm"}, "gamg": {"pc_type": "gamg"}}


class Kinetics(torch.nn.Module):
    """Robertson's reactions of concentrations `[system, 3]` scaled by (1, 1e4, 1). The rates are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = torch.nn.Parameter(torch.tensor(_RATES, dtype=torch.float64).log())

    def forward(self, t: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """dw/dt."""
        slow, fast, middle = self.rates.exp()
        a, b, c = w[..., 0], w[..., 1] / 1e4, w[..., 2]
        first, second, third = slow * a, fast * b * b, middle * b * c
        return torch.stack([third - first, 1e4 * (first - second - third), second], dim=-1)


@dataclass(frozen=True)
class Measured:
    """Counts of one loss and gradient, and its seconds on the slowest rank."""

    solve: SolveStatistics
    seconds: float

    def row(self, problem: str, preconditioner: str, ranks: int) -> Row:
        """Return the row of the report. Iterations are summed over all steps."""
        solve = self.solve
        return {
            "problem": problem,
            "preconditioner": preconditioner,
            "ranks": ranks,
            "steps": solve.forward_steps,
            "Newton": solve.newton_iterations,
            "Krylov": solve.linear_iterations,
            "a Newton": solve.linear_iterations / max(solve.newton_iterations, 1),
            "adjoint Krylov": solve.adjoint_linear_iterations,
            "seconds": self.seconds,
        }


def run() -> Report:
    """Count on one rank, or compare one rank with all ranks. Collective on the world."""
    comm = MPI.COMM_WORLD
    return _on_one_rank() if comm.size == 1 else _on_several(comm)


def _on_one_rank() -> Report:
    rows: list[Row] = []
    checks = []
    systems = _systems()
    times = [0.0, *(10.0**power for power in range(-4, 3))]
    kinetics = {name: _measured(_kinetics_solve(name), systems, times) for name in ("none", "block")}
    rows += [found.row(f"kinetics, {_SYSTEMS} systems", name, 1) for name, found in kinetics.items()]
    checks.append(_saving("kinetics, block", kinetics["block"], kinetics["none"]))
    grid = GridPartition(MPI.COMM_SELF, (POINTS, POINTS), 2, ("periodic", "periodic"))
    state, steps = initial_state(grid, seed=0), _grid_times()
    plain = _measured(_grid_solve(grid, None, {}), state, steps)
    rows.append(plain.row(_grid_name(), "none", 1))
    for name, options in _GRIDS.items():
        found = _measured(_grid_solve(grid, AssembledJacobian(1), options), state, steps)
        rows.append(found.row(_grid_name(), name, 1))
        checks.append(_saving(f"{_grid_name()}, {name}", found, plain))
    notes = (
        "One loss and gradient with the Crank-Nicolson method. Krylov: GMRES iterations of all Newton iterations, and "
        "of the transposed systems of the adjoint. kinetics: steps from 0 over 1e-4 to 100, a decade each.",
    )
    return Report("implicit", rows, checks, notes)


def _on_several(comm: MPI.Intracomm) -> Report:
    rows: list[Row] = []
    checks = []
    for name, options in _GRIDS.items():
        found = {}
        for ranks, where in ((1, MPI.COMM_SELF), (comm.size, comm)):
            grid = GridPartition(where, (POINTS, POINTS), 2, ("periodic", "periodic"))
            solve = _grid_solve(grid, AssembledJacobian(1), options)
            # On one rank, rank 0 solves and the others wait.
            if ranks > 1 or comm.rank == 0:
                found[ranks] = _measured(solve, initial_state(grid, seed=0), _grid_times())
            comm.Barrier()
        alone = comm.bcast(found.get(1))
        rows += [alone.row(_grid_name(), name, 1), found[comm.size].row(_grid_name(), name, comm.size)]
        for what in ("linear_iterations", "adjoint_linear_iterations"):
            growth = getattr(found[comm.size].solve, what) / max(getattr(alone.solve, what), 1)
            checks.append(
                Check(f"{what.replace('_', ' ')} on {comm.size} ranks over one, {name}", growth, LARGEST_GROWTH)
            )
    notes = ("One loss and gradient with the Crank-Nicolson method; asm and gamg with PETSc's own settings.",)
    return Report("implicit", rows, checks, notes)


def _systems() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    a = 0.5 + 0.5 * torch.rand(_SYSTEMS, generator=generator, dtype=torch.float64)
    return torch.stack([a, torch.zeros_like(a), 1 - a], dim=-1)


def _grid_name() -> str:
    return f"reaction, diffusion {POINTS}x{POINTS}"


def _grid_times() -> list[float]:
    return [_STEP * number for number in range(_STEPS + 1)]


def _kinetics_solve(preconditioner: str) -> NeuralODE:
    # Without a preconditioner a batch of small systems takes no Krylov iterations by default.
    return NeuralODE(Kinetics(), method="cn", preconditioner=preconditioner, options=_TOLERANCE, newton="petsc")


def _grid_solve(grid: GridPartition, preconditioner: Preconditioner | None, options: dict[str, str]) -> NeuralODE:
    """Solve the Gray-Scott equations on a domain small enough to make diffusion stiff."""
    return NeuralODE(
        GrayScott(grid, GrayScottParameters(domain=(_DOMAIN, _DOMAIN))),
        method="cn",
        partition=grid,
        preconditioner=preconditioner,
        options={**_TOLERANCE, **options},
        trajectory=CheckpointBudget(ram="4GiB", keep="graph"),
    )


def _measured(node: NeuralODE, state: torch.Tensor, times: list[float]) -> Measured:
    began = time.perf_counter()
    initial = state.clone().requires_grad_()
    share = node(initial, times)[-1].square().sum()
    share.backward()
    comm = MPI.COMM_SELF if node.partition is None else node.partition.comm
    seconds = comm.allreduce(time.perf_counter() - began, MPI.MAX)
    return Measured(node.last_solve, seconds)


def _saving(name: str, found: Measured, plain: Measured) -> Check:
    share = found.solve.linear_iterations / max(plain.solve.linear_iterations, 1)
    return Check(f"Krylov iterations over those without, {name}", share, LARGEST_SHARE)
