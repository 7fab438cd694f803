"""The names that users of 0.1.0 import can still be imported, and mean the same."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import pnode_dist

OF_0_1_0 = {
    "pnode_dist": (
        "BatchPartition",
        "ConfigurationError",
        "ConvergenceError",
        "DensePartition",
        "GraphPartition",
        "GridPartition",
        "Mesh",
        "NeuralODE",
        "Separable",
        "SpectralPartition",
        "SplitFunction",
        "Trajectory",
        "__version__",
        "consistent",
        "keep_freed_memory",
        "odeint",
    ),
    "pnode_dist.exchange": (
        "fft",
        "fft2",
        "fftn",
        "gather",
        "gather_vector",
        "global_sum",
        "halo",
        "ifft",
        "ifft2",
        "ifftn",
        "irfft",
        "irfft2",
        "irfftn",
        "mesh_sum",
        "neighbour_halo",
        "pad_edges",
        "redistribute",
        "reduce_vector",
        "rfft",
        "rfft2",
        "rfftn",
        "scatter",
        "with_ghosts",
    ),
    "pnode_dist.nn": (
        "AvgPool1d",
        "AvgPool2d",
        "AvgPool3d",
        "BatchNorm1d",
        "BatchNorm2d",
        "BatchNorm3d",
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "GlobalMean",
        "GraphConv",
        "GroupNorm",
        "LayerNorm",
        "Linear",
        "MaxPool1d",
        "MaxPool2d",
        "MaxPool3d",
        "MessagePassing",
        "SpectralConv1d",
        "SpectralConv2d",
        "SpectralConv3d",
        "SpectralFilter",
        "Stack",
        "SyncBatchNorm",
        "Upsample",
        "convert",
    ),
    "pnode_dist.sync": ("broadcast_parameters", "clip_gradient_norm", "parallel", "share_of_mean"),
    "pnode_dist.sampler": ("ReplicaSampler",),
    "pnode_dist.sharding": ("gather_state_dict", "load_whole_state_dict", "shards_of"),
}
NEW = (
    "Callback",
    "CheckpointBudget",
    "DisagreementError",
    "Event",
    "EventError",
    "EventSolution",
    "Forcing",
    "ForecastProblem",
    "ForecastTable",
    "GriddedChoice",
    "Integrated",
    "ModelTable",
    "ProblemDefinition",
    "ProblemTable",
    "RecomputationError",
    "Saved",
    "SolverSettings",
    "SplitData",
    "TrainableProblem",
    "TrajectoryData",
    "evaluate",
    "fit",
    "odeint_spans",
    "open_gridded",
    "solve_dense",
    "solve_events",
    "steady_state",
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in OF_0_1_0.items() for name in names])
def test_a_name_of_0_1_0_can_be_imported(module: str, name: str) -> None:
    assert getattr(import_module(module), name) is not None


def test_the_public_names_are_those_that_are_listed() -> None:
    assert set(pnode_dist.__all__) == {*OF_0_1_0["pnode_dist"], *NEW}
    for name in NEW:
        assert getattr(pnode_dist, name).__name__ in {name, "CheckpointBudget"}


def test_trajectory_is_the_checkpoint_budget_by_its_former_name() -> None:
    assert pnode_dist.Trajectory is pnode_dist.CheckpointBudget


def test_importing_the_package_loads_neither_torch_nor_petsc() -> None:
    heavy = ("torch", "petsc4py.PETSc", "mpi4py.MPI")
    program = f"import sys, pnode_dist; print([name for name in {heavy} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
