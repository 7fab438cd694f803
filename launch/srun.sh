#!/usr/bin/env bash
# Runs a program on several MPI ranks under Slurm's srun, with the PMI that the MPI of .venv speaks.
#
#   launch/srun.sh [--dry-run] [srun's own arguments] PROGRAM [ARGUMENT...]
#   launch/srun.sh -N 2 -n 4 pnode-dist doctor
#
# Of what `srun --mpi=list` offers, MPICH and Intel MPI get pmi2 and Open MPI pmix. Every rank gets a CPU for each of its
# threads (OMP_NUM_THREADS, else as many as the job asked for, else 1) and is bound to these cores. Once a rank has ended,
# however, the others have SLURM_WAIT seconds (25 unless set) to do so too. (Killing them at once, as srun's -K does, would
# lose what they have to say and their exit codes.) srun's own arguments and variables stand above all this.
# --dry-run prints the command instead of running it.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

[ $# -gt 0 ] || fail "nothing to run: launch/srun.sh -n RANKS PROGRAM [ARGUMENT...]"
command -v srun >/dev/null || fail "there is no srun on the PATH: use launch/mpirun.sh where there is no Slurm"

# What mpi4py says of its MPI, in one line; asking starts nothing.
library_version() {
    python -c '
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(*MPI.Get_library_version().strip("\0").split())' 2>/dev/null
}

offered() { printf '%s\n' "$types" | grep -x -E "$1" | sort -V | tail -n 1 | grep .; }

choose_pmi() {
    local library types wanted chosen="" mpi
    library=$(library_version) ||
        fail "python has no mpi4py to ask for its MPI: name the PMI, --mpi=pmi2 (MPICH, Intel MPI) or --mpi=pmix (Open MPI)"
    types=$(srun --mpi=list 2>&1 | tr -cs '[:alnum:]_' '\n')
    case $library in
        "Open MPI"*) mpi="Open MPI" wanted=pmix chosen=$(offered pmix || offered 'pmix_v[0-9]+' || true) ;;
        *MPICH*with-pmi*=pmix*) mpi=MPICH wanted=pmix chosen=$(offered pmix || offered 'pmix_v[0-9]+' || true) ;;
        Intel*) mpi="Intel MPI" wanted=pmi2 chosen=$(offered pmi2 || true) ;;
        *) mpi=MPICH wanted=pmi2 chosen=$(offered pmi2 || offered cray_shasta || true) ;;
    esac
    [ -n "$chosen" ] || fail "$mpi needs $wanted, which srun does not offer (see srun --mpi=list): use launch/mpirun.sh in a job"
    export SLURM_MPI_TYPE=$chosen
    if [ "$mpi" = "Intel MPI" ] && [ -z "${I_MPI_PMI_LIBRARY-}" ]; then
        I_MPI_PMI_LIBRARY=$(ldconfig -p | awk '$1 == "libpmi2.so" || $1 == "libpmi2.so.0" {print $NF; exit}')
        [ -n "$I_MPI_PMI_LIBRARY" ] || fail "Intel MPI needs I_MPI_PMI_LIBRARY: the path of Slurm's libpmi2.so"
        export I_MPI_PMI_LIBRARY
    fi
}

# The program's arguments are read too, but it takes more than a stray --mpi there to do harm.
case " $* " in
    *" --mpi="* | *" --mpi "*) ;;
    *) if [ -z "${SLURM_MPI_TYPE-}" ]; then choose_pmi; fi ;;
esac
# srun has taken the first of these instead of the second since Slurm 22.05.
SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-$threads}}
SLURM_CPUS_PER_TASK=$SRUN_CPUS_PER_TASK
export SRUN_CPUS_PER_TASK SLURM_CPUS_PER_TASK
export SLURM_CPU_BIND=${SLURM_CPU_BIND:-cores} SLURM_WAIT=${SLURM_WAIT:-25}
run SLURM_MPI_TYPE I_MPI_PMI_LIBRARY SRUN_CPUS_PER_TASK SLURM_CPU_BIND SLURM_WAIT -- srun "$@"
