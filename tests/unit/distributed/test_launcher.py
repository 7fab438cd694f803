"""Who started a process is read from the environment, and compared with what MPI makes of it."""

from __future__ import annotations

import pytest

from pnode_dist.distributed.launcher import Launch, launch, launched_rank, singleton_problem

SRUN = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}
HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "2", "MPI_LOCALNRANKS": "4"}
PRTE = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "PMIX_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "rank"), [({}, 0), (SRUN, 3), (HYDRA, 2), (PRTE, 1), ({"RANK": "5"}, 5), ({"PMI_RANK": "x"}, 0)]
)
def test_the_rank_is_what_the_launcher_says(environment: dict[str, str], rank: int) -> None:
    assert launched_rank(environment) == rank


def test_an_mpiexec_inside_a_step_of_srun_is_the_one_that_counts() -> None:
    assert launch({**SRUN, **HYDRA, "PMI_SIZE": "2"}) == Launch("the mpiexec of MPICH or Intel MPI", 2)
    assert launch({**SRUN, "PMI_SIZE": "4"}) == Launch("srun", 4)


def test_a_batch_script_is_no_task_of_srun() -> None:
    assert launch({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}) is None


@pytest.mark.parametrize("environment", [{}, {**HYDRA, "PMI_SIZE": "1"}, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}])
def test_one_rank_that_was_meant_to_be_one_is_no_problem(environment: dict[str, str]) -> None:
    assert singleton_problem("MPICH", environment) is None


@pytest.mark.parametrize(
    ("library", "environment", "problem"),
    [
        (
            "MPICH",
            SRUN,
            "srun started 4 tasks but MPICH connects only 1: start with launch/srun.sh, or add --mpi=pmi2 to srun",
        ),
        (
            "Open MPI",
            SRUN,
            "srun started 4 tasks but Open MPI connects only 1: start with launch/srun.sh, or add --mpi=pmix to srun",
        ),
        (
            "Open MPI",
            HYDRA,
            "the mpiexec of MPICH or Intel MPI started 4 tasks but Open MPI connects only 1: two MPIs are mixed: "
            "start with launch/mpirun.sh, or use the mpiexec of Open MPI",
        ),
        (
            "MPICH",
            PRTE,
            "the mpiexec of Open MPI started 4 tasks but MPICH connects only 1: two MPIs are mixed: "
            "start with launch/mpirun.sh, or use the mpiexec of MPICH",
        ),
        (
            "MPICH",
            HYDRA,
            "the mpiexec of MPICH or Intel MPI started 4 tasks but MPICH connects only 1: "
            "start with launch/mpirun.sh, or use the mpiexec of the very MPI that mpi4py was built on",
        ),
    ],
)
def test_singletons_are_told_what_was_mixed_up(library: str, environment: dict[str, str], problem: str) -> None:
    assert singleton_problem(library, environment) == problem
