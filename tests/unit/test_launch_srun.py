"""launch/srun.sh chooses the PMI that MPI speaks from what srun offers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.launch_scripts import run_copy, stand_in

OFFERS = {
    "22.05": r"srun: MPI types are...\nsrun: none\nsrun: pmi2\nsrun: pmix\nsrun: pmix_v4",
    "23.11": r"MPI plugin types are...\n\tnone\n\tpmi2\n\tpmix\nspecific versions available: pmix_v4,pmix_v5",
    "only versions": r"MPI plugin types are...\n\tnone\n\tpmix_v4\n\tpmix_v5",
    "without pmix": r"MPI plugin types are...\n\tnone\n\tpmi2",
}
LIBRARIES = {
    "mpich": "MPICH Version: 5.0.2 MPICH configure: --with-device=ch4:ucx",
    "mpich with pmix": "MPICH Version: 5.0.2 MPICH configure: --with-pmi=pmix",
    "openmpi": "Open MPI v5.0.3, package: Open MPI",
    "intel": "Intel(R) MPI Library 2021.12 for Linux* OS",
}


def srun(tmp_path: Path, library: str, offers: str, *arguments: str, **environment: str) -> tuple[int, str]:
    """The exit code, and the command that srun.sh would run or what it says instead."""
    stand_in(tmp_path, "python", f"echo '{LIBRARIES[library]}'" if library else "exit 1")
    stand_in(tmp_path, "srun", f"printf '{OFFERS[offers]}\\n' >&2")
    done = run_copy(tmp_path, "srun.sh", "--dry-run", *arguments, **environment)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("library", "offers", "chosen"),
    [
        ("mpich", "22.05", "pmi2"),
        ("mpich", "23.11", "pmi2"),
        ("mpich with pmix", "23.11", "pmix"),
        ("openmpi", "22.05", "pmix"),
        ("openmpi", "23.11", "pmix"),
        ("openmpi", "only versions", "pmix_v5"),
        ("intel", "22.05", "pmi2"),
    ],
)
def test_every_mpi_gets_its_pmi(tmp_path: Path, library: str, offers: str, chosen: str) -> None:
    code, command = srun(tmp_path, library, offers, "-N", "2", "-n", "4", "true", I_MPI_PMI_LIBRARY="/lib/libpmi2.so")
    assert code == 0, command
    assert f" SLURM_MPI_TYPE={chosen} " in command
    assert command.startswith("OMP_NUM_THREADS=1 ")
    assert command.endswith(" SRUN_CPUS_PER_TASK=1 SLURM_CPU_BIND=cores SLURM_WAIT=25 srun -N 2 -n 4 true\n")


@pytest.mark.parametrize(
    ("library", "offers", "message"),
    [
        ("openmpi", "without pmix", "Open MPI needs pmix, which srun does not offer (see srun --mpi=list)"),
        ("mpich", "only versions", "MPICH needs pmi2, which srun does not offer (see srun --mpi=list)"),
        ("", "22.05", "python has no mpi4py to ask for its MPI: name the PMI, --mpi=pmi2 (MPICH, Intel MPI)"),
    ],
)
def test_a_pmi_that_cannot_be_chosen_gets_one_line(tmp_path: Path, library: str, offers: str, message: str) -> None:
    code, said = srun(tmp_path, library, offers, "-n", "4", "true")
    assert code == 2
    assert said.startswith(f"srun.sh: {message}")
    assert said.count("\n") == 1


def test_what_the_user_chooses_stands(tmp_path: Path) -> None:
    _, command = srun(tmp_path, "", "22.05", "--mpi=pmix", "-n", "4", "true", SLURM_CPU_BIND="none")
    assert "SLURM_MPI_TYPE" not in command
    assert "SLURM_CPU_BIND=none" in command
    _, command = srun(tmp_path, "", "22.05", "-n", "4", "true", SLURM_MPI_TYPE="cray_shasta")
    assert "SLURM_MPI_TYPE=cray_shasta" in command


def test_a_task_has_a_thread_for_each_of_its_cpus(tmp_path: Path) -> None:
    _, command = srun(tmp_path, "mpich", "22.05", "-n", "4", "true", SLURM_CPUS_PER_TASK="3")
    assert command.startswith("OMP_NUM_THREADS=3 ")
    assert "SRUN_CPUS_PER_TASK=3" in command
    _, command = srun(tmp_path, "mpich", "22.05", "-n", "4", "true", OMP_NUM_THREADS="2")
    assert "SRUN_CPUS_PER_TASK=2" in command


def test_nothing_to_run_and_no_srun_get_one_line(tmp_path: Path) -> None:
    assert (
        srun(tmp_path, "mpich", "22.05")[1]
        == "srun.sh: nothing to run: launch/srun.sh -n RANKS PROGRAM [ARGUMENT...]\n"
    )
