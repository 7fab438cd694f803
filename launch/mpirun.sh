#!/usr/bin/env bash
# Runs a program on several MPI ranks, with threads, binding and scratch set for MPICH, Open MPI or Intel MPI.
#
#   launch/mpirun.sh [--dry-run] [--hostfile FILE] [mpiexec's own arguments] PROGRAM [ARGUMENT...]
#   launch/mpirun.sh -n 4 pnode-dist doctor
#
# --dry-run         print the command instead of running it
# --hostfile FILE   run on these hosts: lines "HOST", "HOST:RANKS" or "HOST slots=RANKS", whatever the MPI
# Every rank gets OMP_NUM_THREADS threads (1 unless set) and, where a host has enough cores for all of its ranks, cores
# of its own. (Other hosts are taken to have as many cores as this one.) Programs of .venv are found by name.
set -euo pipefail
# shellcheck source=launch/environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

hostfile="" hosts=()
if [ "${1-}" = --hostfile ]; then
    [ -r "${2-}" ] || fail "--hostfile ${2-}: there is no such file"
    hostfile=$2
    shift 2
    while read -r host slots _; do
        case $host in '' | \#*) continue ;; esac
        case $slots in
            '' | \#*) slots=1 ;;
            slots=*) slots=${slots#slots=} ;;
            *) fail "--hostfile $hostfile: '$host $slots': must be HOST, HOST:RANKS or HOST slots=RANKS" ;;
        esac
        if [[ $host == *:* ]]; then slots=${host##*:} host=${host%:*}; fi
        is_count "$slots" || fail "--hostfile $hostfile: $host: must have a number of ranks, 1 or more, and has '$slots'"
        hosts+=("$host:$slots")
    done <"$hostfile"
    [ ${#hosts[@]} -gt 0 ] || fail "--hostfile $hostfile: names no host"
fi
[ $# -gt 0 ] || fail "nothing to run: launch/mpirun.sh -n RANKS PROGRAM [ARGUMENT...]"
launcher=$(command -v mpiexec) || fail "there is no mpiexec on the PATH: run launch/bootstrap.sh first"

ranks=1 binding_chosen=no hosts_chosen=no values=0 previous=""
for argument in "$@"; do
    if [ "$values" -gt 0 ]; then
        values=$((values - 1))
        case $previous in
            -n | -np | --np)
                is_count "$argument" || fail "$previous $argument: must be a number of ranks, 1 or more"
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
            [ -z "$hostfile" ] || fail "$argument: --hostfile has named the hosts already"
            hosts_chosen=yes values=1
            ;;
        -env | -genv | -mca | --mca | --prtemca | --pmixmca) values=2 ;;
        -n | -np | --np | -ppn | -wdir | --wdir | -launcher | -launcher-exec | -localhost) values=1 ;;
        -bootstrap | -rmk | -iface | -envlist | -genvlist | -x) values=1 ;;
        -*) ;;
        # The program and its arguments are not ours to read.
        *) if command -v -- "$argument" >/dev/null 2>&1; then break; fi ;;
    esac
done

# nproc would take OMP_NUM_THREADS for the number of cores.
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
fits=no
nodes=${SLURM_JOB_NUM_NODES:-1} # a launcher inside a Slurm allocation spreads the ranks over its nodes
if [ -n "$hostfile" ]; then nodes=${#hosts[@]}; fi
ranks_here=$(((ranks + nodes - 1) / nodes))
if [ $((ranks_here * threads)) -le "$cores" ]; then
    fits=yes
elif [ "$nodes$hosts_chosen" = 1no ]; then
    say "$ranks ranks of $threads thread(s) on $cores core(s): they take turns, and nothing is bound"
fi
version=$("$launcher" --version 2>&1 | head -n 3) || true
options=() shown=()
comma_separated=$(IFS=, && printf '%s' "${hosts[*]-}")
case $version in
    *Intel*)
        if [ "$fits$hosts_chosen" = nono ]; then export I_MPI_PIN=${I_MPI_PIN:-off}; fi
        export I_MPI_PIN_DOMAIN=${I_MPI_PIN_DOMAIN:-omp}
        shown=(I_MPI_PIN I_MPI_PIN_DOMAIN)
        if [ -n "$hostfile" ]; then
            if grep -q 'slots=' "$hostfile"; then fail "--hostfile $hostfile: Intel MPI reads HOST:RANKS, not slots="; fi
            options=(-machinefile "$hostfile")
        fi
        ;;
    *HYDRA* | *[Mm][Pp][Ii][Cc][Hh]*)
        if [ -n "$hostfile" ]; then options=(-hosts "$comma_separated"); fi
        if [ "$binding_chosen$fits$hosts_chosen" = noyesno ]; then options+=(-bind-to "core:$threads"); fi
        # Ranks that wait sleep, and leave the cores to those that compute.
        if [ "$fits$hosts_chosen" = nono ]; then export MPIR_CVAR_ENABLE_HEAVY_YIELD=${MPIR_CVAR_ENABLE_HEAVY_YIELD:-1}; fi
        shown=(MPIR_CVAR_ENABLE_HEAVY_YIELD)
        ;;
    *"Open MPI"* | *OpenRTE* | *prterun*)
        if [ "$(id -u)" = 0 ]; then options+=(--allow-run-as-root); fi
        if [ -n "$hostfile" ]; then options+=(--host "$comma_separated"); fi
        if [ "$nodes" -gt 1 ] || [ "$hosts_chosen" = yes ]; then
            # The others pass on the whole environment.
            for variable in PATH TMPDIR OMP_NUM_THREADS OPENBLAS_NUM_THREADS MKL_NUM_THREADS; do options+=(-x "$variable"); done
        fi
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
run "${shown[@]}" -- "$launcher" "${options[@]}" "$@"
