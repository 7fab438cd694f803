"""The launcher of this process, from the environment, and a check that MPI agrees with it.

If a launcher and an MPI library do not match, every process becomes the only rank of a separate job, and does all of
the work. This module detects that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

RANKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID", "RANK")
"""The variables with the rank of a process: mpiexec and srun, Open MPI, MVAPICH, srun, torchrun."""
_OF_MPICH, _OF_OPEN_MPI = "the mpiexec of MPICH or Intel MPI", "the mpiexec of Open MPI"

_CONNECTIONS = ("PMI_", "PMI2_", "PMIX_", "OMPI_COMM_WORLD_", "OMPI_MCA_orte_", "OMPI_MCA_ess_", "MPI_LOCAL")
"""The prefixes of the variables by which a launcher and its processes connect."""
_SETTINGS = ("PMIX_MCA_",)


@dataclass(frozen=True)
class Launch:
    """The launcher of this process, and the number of processes it started."""

    launcher: str
    tasks: int


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the rank of this process from its launcher, before MPI is started; 0 without a launcher."""
    return next((int(environment[name]) for name in RANKS if environment.get(name, "").isdigit()), 0)


def launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Return the MPI launcher that started this process, or None.

    An mpiexec inside a step of srun inherits the step's variables. Its own variables have precedence.
    """
    by_srun = "SLURM_STEP_ID" in environment
    counts = (
        ("OMPI_COMM_WORLD_SIZE", _OF_OPEN_MPI),
        ("PMI_SIZE", "srun" if by_srun and "MPI_LOCALNRANKS" not in environment else _OF_MPICH),
        *((name, "srun") for name in ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS") if by_srun),
    )
    for name, launcher in counts:
        if environment.get(name, "").isdigit():
            return Launch(launcher, int(environment[name]))
    return None


def singleton_problem(library: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Describe the error if MPI's world has one rank, or return None. `library` is the name of the MPI library."""
    started = launch(environment)
    if started is None or started.tasks < 2:
        return None
    openly = library == "Open MPI"
    if started.launcher == "srun":
        advice = f"start with launch/srun.sh, or add --mpi={'pmix' if openly else 'pmi2'} to srun"
    elif (started.launcher == _OF_OPEN_MPI) != openly:
        advice = f"two MPIs are mixed: start with launch/mpirun.sh, or use the mpiexec of {library}"
    else:
        advice = "start with launch/mpirun.sh, or use the mpiexec of the very MPI that mpi4py was built on"
    return f"{started.launcher} started {started.tasks} tasks but {library} connects only 1: {advice}"


def hide_from_children(environment: Iterable[str] = os.environ, unset: Callable[[str], None] = os.unsetenv) -> None:
    """Hide the launcher's variables from child processes, once MPI has connected this process.

    A DataLoader worker, started by `spawn` or `forkserver`, imports the main module again and with it MPI. With these
    variables it would try to be this rank, without its connections, and fail. Without them it is a separate job.
    `os.environ` of this process keeps them.
    """
    for name in environment:
        if name.startswith(_CONNECTIONS) and not name.startswith(_SETTINGS):
            unset(name)
