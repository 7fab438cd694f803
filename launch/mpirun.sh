#!/usr/bin/env bash
# Runs a program on several MPI ranks, with threads and binding set for MPICH, Open MPI or Intel MPI.
#
#   launch/mpirun.sh [mpiexec's own arguments] PROGRAM [ARGUMENT...]
#   launch/mpirun.sh -n 4 pnode-dist doctor
#
# Every rank gets OMP_NUM_THREADS threads (1 unless set) and, where this machine has enough cores for all of them,
# cores of its own. Programs of .venv are found by name. --dry-run prints the command instead of running it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
fail() {
    printf 'mpirun.sh: %s\n' "$*" >&2
    exit 2
}

# The MPI that .venv was built on, if it is not one of its own, comes before what else is on the PATH.
if [ -f "$root/.venv/.pnode-dist-mpi" ]; then PATH=$(cat "$root/.venv/.pnode-dist-mpi"):$PATH; fi
if [ -d "$root/.venv/bin" ]; then PATH=$root/.venv/bin:$PATH; fi
export PATH OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-$OMP_NUM_THREADS} MKL_NUM_THREADS=${MKL_NUM_THREADS:-$OMP_NUM_THREADS}
threads=${OMP_NUM_THREADS%%,*} # later numbers are for nested parallel regions
case $threads in
    '' | *[!0-9]* | 0) fail "OMP_NUM_THREADS=$OMP_NUM_THREADS: must be a number of threads, 1 or more" ;;
esac

dry_run=no
if [ "${1-}" = --dry-run ]; then
    dry_run=yes
    shift
fi
[ $# -gt 0 ] || fail "nothing to run: launch/mpirun.sh -n RANKS PROGRAM [ARGUMENT...]"
launcher=$(command -v mpiexec) || fail "there is no mpiexec on the PATH: run launch/bootstrap.sh first"

ranks=1 binding_chosen=no hosts_chosen=no values=0 previous=""
for argument in "$@"; do
    if [ "$values" -gt 0 ]; then
        values=$((values - 1))
        case $previous in
            -n | -np | --np)
                case $argument in
                    '' | *[!0-9]* | 0) fail "$previous $argument: must be a number of ranks, 1 or more" ;;
                esac
                ranks=$argument
                ;;
        esac
        continue
    fi
    previous=$argument
    case $argument in
        -bind-to | --bind-to | -map-by | --map-by)
            binding_chosen=yes values=1
            ;;
        -f | -hosts | -host | --host | --hostfile | -hostfile | -machinefile | --machinefile)
            hosts_chosen=yes values=1
            ;;
        -env | -genv | -mca | --mca | --prtemca | --pmixmca) values=2 ;;
        -n | -np | --np | -ppn | -wdir | --wdir | -launcher | -bootstrap | -rmk | -iface | -envlist | -genvlist | -x) values=1 ;;
        -*) ;;
        # The program and its arguments are not ours to read.
        *) if command -v -- "$argument" >/dev/null 2>&1; then break; fi ;;
    esac
done

# nproc would take OMP_NUM_THREADS for the number of cores.
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
fits=no
nodes=${SLURM_JOB_NUM_NODES:-1} # a launcher inside a Slurm allocation spreads the ranks over its nodes
ranks_here=$(((ranks + nodes - 1) / nodes))
if [ $((ranks_here * threads)) -le "$cores" ]; then fits=yes; fi
version=$("$launcher" --version 2>&1 | head -n 3) || true
options=()
case $version in
    *Intel*)
        if [ "$fits$hosts_chosen" = nono ]; then export I_MPI_PIN=${I_MPI_PIN:-off}; fi
        export I_MPI_PIN_DOMAIN=${I_MPI_PIN_DOMAIN:-omp}
        ;;
    *HYDRA* | *[Mm][Pp][Ii][Cc][Hh]*)
        if [ "$binding_chosen$fits$hosts_chosen" = noyesno ]; then options=(-bind-to "core:$threads"); fi
        ;;
    *"Open MPI"* | *OpenRTE* | *prterun*)
        if [ "$(id -u)" = 0 ]; then options+=(--allow-run-as-root); fi
        if [ "$binding_chosen" = no ]; then
            if [ "$fits" = yes ]; then
                options+=(--map-by "slot:PE=$threads" --bind-to core)
            else
                options+=(--bind-to none)
                if [ "$hosts_chosen" = no ]; then options+=(--oversubscribe); fi
            fi
        fi
        ;;
esac
if [ "$dry_run" = yes ]; then
    printf 'OMP_NUM_THREADS=%s' "$OMP_NUM_THREADS"
    printf ' %q' "$launcher" "${options[@]}" "$@"
    printf '\n'
    exit 0
fi
exec "$launcher" "${options[@]}" "$@"
