"""Distributed neural ODEs: PETSc time steppers, exact discrete adjoints, torch right-hand sides.

The public names are loaded on first use, because PETSc reads its command-line options when it is first imported:
a program that wants to hand options to PETSc calls ``petsc4py.init(options)`` before it touches any of them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pnode_dist.system.compatibility import check_versions

if TYPE_CHECKING:
    __version__: str

    from pnode_dist.checkpointing.budget import CheckpointBudget as CheckpointBudget
    from pnode_dist.checkpointing.budget import Trajectory as Trajectory
    from pnode_dist.config.definition import ModelTable as ModelTable
    from pnode_dist.config.definition import ProblemDefinition as ProblemDefinition
    from pnode_dist.config.definition import ProblemTable as ProblemTable
    from pnode_dist.distributed.mesh import Mesh as Mesh
    from pnode_dist.errors import ConfigurationError as ConfigurationError
    from pnode_dist.errors import ConvergenceError as ConvergenceError
    from pnode_dist.errors import DisagreementError as DisagreementError
    from pnode_dist.errors import EventError as EventError
    from pnode_dist.errors import RecomputationError as RecomputationError
    from pnode_dist.hybrid.dense import solve_dense as solve_dense
    from pnode_dist.hybrid.event import Event as Event
    from pnode_dist.hybrid.event import EventSolution as EventSolution
    from pnode_dist.hybrid.event_solve import solve_events as solve_events
    from pnode_dist.hybrid.forcing import Forcing as Forcing
    from pnode_dist.hybrid.spans import odeint_spans as odeint_spans
    from pnode_dist.ode.consistent import consistent as consistent
    from pnode_dist.ode.odeint import NeuralODE as NeuralODE
    from pnode_dist.ode.odeint import odeint as odeint
    from pnode_dist.ode.rhs.separable import Separable as Separable
    from pnode_dist.ode.rhs.split import SplitFunction as SplitFunction
    from pnode_dist.ode.saving import Integrated as Integrated
    from pnode_dist.ode.saving import Saved as Saved
    from pnode_dist.ode.settings import SolverSettings as SolverSettings
    from pnode_dist.partition.batch import BatchPartition as BatchPartition
    from pnode_dist.partition.dense import DensePartition as DensePartition
    from pnode_dist.partition.graph import GraphPartition as GraphPartition
    from pnode_dist.partition.grid import GridPartition as GridPartition
    from pnode_dist.partition.spectral import SpectralPartition as SpectralPartition
    from pnode_dist.problems.common.forecast_data import SplitData as SplitData
    from pnode_dist.problems.common.forecast_data import TrajectoryData as TrajectoryData
    from pnode_dist.problems.common.forecast_problem import ForecastProblem as ForecastProblem
    from pnode_dist.problems.common.gridded_files import GriddedChoice as GriddedChoice
    from pnode_dist.problems.common.gridded_files import open_gridded as open_gridded
    from pnode_dist.problems.common.tables import ForecastTable as ForecastTable
    from pnode_dist.problems.common.trainable import TrainableProblem as TrainableProblem
    from pnode_dist.steady.interface import steady_state as steady_state
    from pnode_dist.system.allocator import keep_freed_memory as keep_freed_memory
    from pnode_dist.train.callbacks import Callback as Callback
    from pnode_dist.train.fit import evaluate as evaluate
    from pnode_dist.train.fit import fit as fit

# `pnode_dist.sync`, `.sampler` and `.sharding`, which have moved, can still be imported.
__path__.append(str(Path(__file__).with_name("deprecated")))

_PUBLIC = {
    "BatchPartition": "pnode_dist.partition.batch",
    "Callback": "pnode_dist.train.callbacks",
    "CheckpointBudget": "pnode_dist.checkpointing.budget",
    "ConfigurationError": "pnode_dist.errors",
    "ConvergenceError": "pnode_dist.errors",
    "DensePartition": "pnode_dist.partition.dense",
    "DisagreementError": "pnode_dist.errors",
    "Event": "pnode_dist.hybrid.event",
    "EventError": "pnode_dist.errors",
    "EventSolution": "pnode_dist.hybrid.event",
    "Forcing": "pnode_dist.hybrid.forcing",
    "ForecastProblem": "pnode_dist.problems.common.forecast_problem",
    "ForecastTable": "pnode_dist.problems.common.tables",
    "GraphPartition": "pnode_dist.partition.graph",
    "GridPartition": "pnode_dist.partition.grid",
    "GriddedChoice": "pnode_dist.problems.common.gridded_files",
    "Integrated": "pnode_dist.ode.saving",
    "Mesh": "pnode_dist.distributed.mesh",
    "ModelTable": "pnode_dist.config.definition",
    "NeuralODE": "pnode_dist.ode.odeint",
    "ProblemDefinition": "pnode_dist.config.definition",
    "ProblemTable": "pnode_dist.config.definition",
    "RecomputationError": "pnode_dist.errors",
    "Saved": "pnode_dist.ode.saving",
    "Separable": "pnode_dist.ode.rhs.separable",
    "SolverSettings": "pnode_dist.ode.settings",
    "SpectralPartition": "pnode_dist.partition.spectral",
    "SplitData": "pnode_dist.problems.common.forecast_data",
    "SplitFunction": "pnode_dist.ode.rhs.split",
    "TrainableProblem": "pnode_dist.problems.common.trainable",
    "Trajectory": "pnode_dist.checkpointing.budget",
    "TrajectoryData": "pnode_dist.problems.common.forecast_data",
    "consistent": "pnode_dist.ode.consistent",
    "evaluate": "pnode_dist.train.fit",
    "fit": "pnode_dist.train.fit",
    "keep_freed_memory": "pnode_dist.system.allocator",
    "odeint": "pnode_dist.ode.odeint",
    "odeint_spans": "pnode_dist.hybrid.spans",
    "open_gridded": "pnode_dist.problems.common.gridded_files",
    "solve_dense": "pnode_dist.hybrid.dense",
    "solve_events": "pnode_dist.hybrid.event_solve",
    "steady_state": "pnode_dist.steady.interface",
}

__all__ = [*_PUBLIC, "__version__"]

check_versions()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        # Installation imports the checkout before it is installed.
        return version("pnode-dist")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pnode_dist' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
