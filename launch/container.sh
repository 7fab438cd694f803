#!/usr/bin/env bash
# Runs a program on several MPI ranks in containers of docker, podman, apptainer or charliecloud.
#
#   launch/container.sh [--dry-run] [--engine ENGINE] --image IMAGE -n RANKS [mpiexec's arguments] PROGRAM [ARGUMENT...]
#   launch/srun.sh -n 4 launch/container.sh [--engine ENGINE] --image IMAGE --per-rank PROGRAM [ARGUMENT...]
#
# The first starts one container on this machine, with the image's mpirun.sh and all ranks in it. With --per-rank it is
# the launcher, srun.sh or mpirun.sh, that starts this script for each rank, on any number of nodes, and each becomes a
# container; the image's MPI has to be that of the launcher.
#
# --dry-run        print the command instead of running it
# --engine ENGINE  docker, podman, apptainer or charliecloud; by default what the image looks like: a directory is
#                  charliecloud's, a .sif file apptainer's, and any other name belongs to podman or docker
# --image IMAGE    by default PNODE_DIST_IMAGE
# The working directory and the scratch directory are there under the names that they have here. Threads and the variables
# of MPI and Slurm are passed on.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

engine="" image=${PNODE_DIST_IMAGE-} per_rank=no
while [ $# -gt 0 ]; do
    case $1 in
        --engine | --image)
            [ $# -gt 1 ] || fail "$1 needs a value"
            if [ "$1" = --engine ]; then engine=$2; else image=$2; fi
            shift 2
            ;;
        --per-rank)
            per_rank=yes
            shift
            ;;
        *) break ;;
    esac
done
[ -n "$image" ] || fail "--image: which image? (or set PNODE_DIST_IMAGE)"
[ $# -gt 0 ] || fail "nothing to run: launch/container.sh --image IMAGE -n RANKS PROGRAM [ARGUMENT...]"

if [ -z "$engine" ]; then
    if [ -d "$image" ]; then
        engine=charliecloud
    elif [[ $image == *.sif ]]; then
        engine=apptainer
    elif command -v podman >/dev/null; then
        engine=podman
    else
        engine=docker
    fi
fi
case $engine in
    docker | podman | apptainer) program=$engine ;;
    charliecloud) program=ch-run ;;
    *) fail "--engine $engine: must be docker, podman, apptainer or charliecloud" ;;
esac
[ "$dry_run" = yes ] || command -v "$program" >/dev/null || fail "--engine $engine: there is no $program on the PATH"

# What a process of a parallel job is told by whoever started it.
told() { compgen -e | grep -E '^(PMI|PMIX|OMPI|PRTE|MPI|HYDI|I_MPI|MPIR|SLURM|UCX|FI|PNODE_DIST)_' || true; }

local_ranks=""
if [ "$per_rank" = yes ]; then
    [ -n "${PMI_RANK-}${PMIX_RANK-}" ] ||
        fail "--per-rank: no launcher has started this as a rank: put launch/srun.sh or launch/mpirun.sh before it"
    # With an equal number on every node Slurm says "2(x3)".
    local_ranks=${MPI_LOCALNRANKS:-${SLURM_STEP_TASKS_PER_NODE-}}
    local_ranks=${local_ranks%%(*}
    command=("$@")
else
    command=(mpirun.sh "$@")
fi

# Those of this machine's packages, which some engines would pass on.
unset PYTHONPATH PYTHONHOME PETSC_DIR PETSC_ARCH MPI4PY_LIBMPI
options=()
case $engine in
    docker | podman)
        options=(run --rm --user "$(id -u):$(id -g)" --env HOME=/tmp --workdir "$PWD" --volume "$PWD:$PWD" --volume "$TMPDIR:$TMPDIR")
        if [ "$engine" = podman ] && [ "$(id -u)" != 0 ]; then options+=(--userns keep-id); fi
        # Without one, a program that leaves SIGTERM alone would not hear it.
        if [ "$engine" = docker ] || command -v catatonit >/dev/null; then options+=(--init); fi
        variables=(OMP_NUM_THREADS OPENBLAS_NUM_THREADS MKL_NUM_THREADS TMPDIR)
        if [ "$per_rank" = yes ]; then
            options+=(--network host --ipc host)
            # Processes in different containers cannot map each other's memory.
            export UCX_TLS=${UCX_TLS:-tcp,self}
            if [ -n "${PMI_FD-}" ] && [ "$engine" = podman ]; then
                # podman hands on the first so many after standard error.
                if [ "$dry_run" = no ] && [ "$PMI_FD" != 3 ]; then eval "exec 3<&$PMI_FD"; fi
                export PMI_FD=3
                options+=(--preserve-fds 1)
            elif [ -n "${PMI_FD-}" ]; then
                fail "docker hands no open connection on, which PMI needs here: use podman, apptainer, charliecloud or mpiexec -pmi-port"
            fi
            if [ -n "${PMIX_SERVER_TMPDIR-}" ]; then options+=(--volume "$PMIX_SERVER_TMPDIR:$PMIX_SERVER_TMPDIR"); fi
            mapfile -t -O ${#variables[@]} variables < <(told)
        else
            options+=(--shm-size 1g)
        fi
        for variable in "${variables[@]}"; do options+=(--env "$variable"); done
        options+=("$image")
        ;;
    apptainer)
        options=(exec --bind "$PWD" --bind "$TMPDIR" --pwd "$PWD" "$image")
        if [ "$per_rank" = yes ]; then export UCX_TLS=${UCX_TLS:-^cma}; fi
        ;;
    charliecloud)
        export USER=${USER:-$(id -un)} # ch-run insists on it
        # It mounts nothing on a directory that the image lacks.
        [ "$dry_run" = yes ] || mkdir -p "$image$PWD" "$image$TMPDIR" || fail "$image: has no directory $PWD or $TMPDIR"
        options=(--set-env --bind "$PWD" --bind "$TMPDIR" --cd "$PWD")
        if is_count "$local_ranks"; then
            # One name space for the ranks of a node.
            options+=("--join-ct=$local_ranks" "--join-tag=${SLURM_JOB_ID-}.${SLURM_STEP_ID-}.$PPID")
        elif [ "$per_rank" = yes ]; then
            export UCX_TLS=${UCX_TLS:-^cma}
        fi
        options+=("$image" --)
        ;;
esac
run UCX_TLS -- "$program" "${options[@]}" "${command[@]}"
