# shellcheck shell=bash
# What the launch scripts set for every rank, once: programs, threads, scratch, and --dry-run. To be sourced.
#
# Ranks get OMP_NUM_THREADS threads each: as set, else the CPUs that Slurm gives a task, else 1. Their scratch is
# SLURM_TMPDIR, else TMPDIR, else /tmp; they find it as TMPDIR.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
script=$(basename "$0")

fail() {
    printf '%s: %s\n' "$script" "$*" >&2
    exit 2
}

say() { printf '%s: %s\n' "$script" "$*" >&2; }

# The MPI that .venv was built on, if it is not one of its own, comes before what else is on the PATH.
if [ -f "$root/.venv/.pnode-dist-mpi" ]; then PATH=$(cat "$root/.venv/.pnode-dist-mpi"):$PATH; fi
if [ -d "$root/.venv/bin" ]; then PATH=$root/.venv/bin:$PATH; fi
export PATH
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-$OMP_NUM_THREADS} MKL_NUM_THREADS=${MKL_NUM_THREADS:-$OMP_NUM_THREADS}
export TMPDIR=${SLURM_TMPDIR:-${TMPDIR:-/tmp}}
threads=${OMP_NUM_THREADS%%,*} # later numbers are for nested parallel regions

is_count() { case $1 in '' | *[!0-9]* | 0) return 1 ;; esac }
is_count "$threads" || fail "OMP_NUM_THREADS=$OMP_NUM_THREADS: must be a number of threads, 1 or more"

dry_run=no
if [ "${1-}" = --dry-run ]; then
    dry_run=yes
    shift
fi

# run VARIABLE... -- COMMAND...: becomes the command, or shows it with the threads and these variables before it.
run() {
    local shown=(OMP_NUM_THREADS)
    while [ "$1" != -- ]; do
        shown+=("$1")
        shift
    done
    shift
    if [ "$dry_run" = no ]; then exec "$@"; fi
    local variable text=""
    for variable in "${shown[@]}"; do
        if [ -n "${!variable-}" ]; then text+="$variable=$(printf '%q' "${!variable}") "; fi
    done
    printf '%s' "$text"
    printf '%q ' "${@:1:$#-1}"
    printf '%q\n' "${@: -1}"
    exit 0
}
