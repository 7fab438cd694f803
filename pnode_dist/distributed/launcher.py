"""How a launcher started this process, as it says in the environment, and whether MPI agrees with it.

Where a launcher and an MPI do not speak the same language, every process comes up as the only rank of a job of its own
and does all of the work. That goes unnoticed unless somebody compares.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

RANKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID", "RANK")
"""Where launchers write which of its tasks a process is: mpiexec and srun, Open MPI, MVAPICH, srun, torchrun."""
_OF_MPICH, _OF_OPEN_MPI = "the mpiexec of MPICH or Intel MPI", "the mpiexec of Open MPI"

_CONNECTIONS = ("PMI_", "PMI2_", "PMIX_", "OMPI_COMM_WORLD_", "OMPI_MCA_orte_", "OMPI_MCA_ess_", "MPI_LOCAL")
"""How the names of the variables begin by which a launcher and its processes find each other."""
_SETTINGS = ("PMIX_MCA_",)


@dataclass(frozen=True)
class Launch:
    """Who started this process, and how many of them."""

    launcher: str
    tasks: int


def launched_rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process' rank as its launcher counts, known before MPI is started; 0 if nothing launched it."""
    return next((int(environment[name]) for name in RANKS if environment.get(name, "").isdigit()), 0)


def launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """The MPI launcher that started this process; None if none did.

    An mpiexec inside a step of srun inherits the step's variables, and its own go before them.
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
    """What is wrong if MPI's world has one rank, None if nothing is. `library` is the name of the MPI."""
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
    """Keep the launcher's variables from processes that this one starts, once MPI has connected it.

    A worker of a DataLoader, started by `spawn` or `forkserver`, imports the main module again and with it MPI. With
    these variables it would pass for this rank, on connections that it does not have, and die. Without them it is a job
    of its own. `os.environ` still has them here.
    """
    for name in environment:
        if name.startswith(_CONNECTIONS) and not name.startswith(_SETTINGS):
            unset(name)
