#!/usr/bin/env bash
# Checks the code (ruff, mypy) and runs the tests: the serial ones once, those marked mpi at 1, 2, 3 and 4 ranks, and those
# marked cluster in clusters and containers of their own, where root and apt are there. What one rank runs, the serial
# tests and the others at 1 rank, is shared by a process for each of up to 4 cores; beside them, because they wait for
# most of their time, are the checks and the cluster tests, those that need the image apart from the others, unless
# arguments for pytest select tests. Of a test with several cases 3 and 4 ranks take turns: every case runs at 1, 2 and
# one of them. With --every-case, or arguments for pytest, all of them do.
#
#   launch/test.sh [--ranks "1 2"] [--no-lint] [--every-case] [PYTEST ARGUMENT...]
#   launch/test.sh --no-lint --ranks 2 tests/mpi -k halo
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
rank_counts="1 2 3 4" lint=yes every_case=no
while [ $# -gt 0 ]; do
    case $1 in
        --ranks)
            rank_counts=${2:?test.sh: --ranks needs numbers, such as "1 2"}
            shift 2
            ;;
        --every-case)
            every_case=yes
            shift
            ;;
        --no-lint)
            lint=no
            shift
            ;;
        *) break ;;
    esac
done

selection=no
[ $# -eq 0 ] || selection=yes

launch/bootstrap.sh || exit 1
# The MPI that .venv was built on, if it is not one of its own, is not beside python.
if [ -f "$root/.venv/.pnode-dist-mpi" ]; then PATH=$(cat "$root/.venv/.pnode-dist-mpi"):$PATH; fi
export PATH=$root/.venv/bin:$PATH
# Every process would compile all modules anew, and pytest rewrite the tests.
unset PYTHONDONTWRITEBYTECODE
# Ranks that wait leave the cores to what else is at work (MPICH's): in whatever runs beside other parts.
sharing=(env "MPIR_CVAR_ENABLE_HEAVY_YIELD=${MPIR_CVAR_ENABLE_HEAVY_YIELD:-1}")
summary=() failed=no tested=no
declare -A beside=()
no_tests=5 # pytest's exit code
logs=$(mktemp -d) others=$(mktemp -d)
clean_up() {
    local process
    for process in "${beside[@]}"; do kill -- "-$process" 2>/dev/null && wait "$process"; done
    rm -rf "$logs" "$others"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

part() {
    local name=$1 started=$SECONDS outcome=passed status=0
    shift
    printf '\n== %s\n' "$name"
    "$@" || status=$?
    # A selection of tests may well leave nothing for one of the parts.
    if [ "$status" = "$no_tests" ] && [ "$selection" = yes ]; then
        outcome="has none of these tests,"
    elif [ "$status" != 0 ]; then
        outcome=FAILED failed=yes
        [ "$status" != 124 ] || outcome="FAILED (timed out)"
    fi
    if [[ $name == *tests* ]] && [ "$status" != "$no_tests" ]; then tested=yes; fi
    summary+=("$(printf '%-44s %s in %d s' "$name" "$outcome" $((SECONDS - started)))")
}

# Every rank runs its own pytest. Rank 0 speaks; another rank's output is shown when that rank failed.
mpi_tests() {
    local ranks=$1 status
    shift
    rm -rf "${logs:?}"/*
    export PNODE_DIST_TEST_LOGS=$logs
    timeout --foreground --kill-after 10 1500 launch/mpirun.sh -n "$ranks" python tests/mpi/run_rank.py "$@"
    status=$?
    if [ "$status" -ne 0 ] && [ "$status" -ne "$no_tests" ]; then
        for log in "$logs"/rank*.log; do
            if [ -f "$log" ] && ! grep -q -E '^=+ [0-9]+ passed[^=]*=+$' "$log"; then
                printf -- '-- the end of %s at %s ranks\n' "$(basename "$log" .log)" "$ranks"
                tail -n 60 "$log"
            fi
        done
    fi
    return "$status"
}

checks() {
    [ "$lint" = yes ] || return 0
    part "ruff check" ruff check .
    part "ruff format" ruff format --check .
    part "mypy" mypy
}

cluster_tests() {
    local name=$1 marks=$2
    shift 2
    part "$name" "${sharing[@]}" timeout --foreground --kill-after 10 3000 python -m pytest -m "$marks" "$@"
}

# Runs a function in the background, in a process group of its own; `join` shows what it said and takes over its verdict.
fork() {
    set -m
    {
        "$@"
        printf '%s\n' "${summary[@]}" >"$others/$1.summary"
        [ "$failed" = no ]
    } >"$others/$1.said" 2>&1 </dev/null &
    beside[$1]=$!
    set +m
}

join() {
    wait "${beside[$1]}" || failed=yes
    unset "beside[$1]"
    cat "$others/$1.said"
    mapfile -t -O ${#summary[@]} summary <"$others/$1.summary"
}

image_tests() { cluster_tests "cluster tests of the image" "cluster and image" tests/cluster; }

checks_and_slurm_tests() {
    checks
    cluster_tests "cluster tests of Slurm" "cluster and not image" tests/cluster
}

if [ "$selection" = no ]; then
    fork image_tests
    fork checks_and_slurm_tests
else
    checks
fi
# nproc would take OMP_NUM_THREADS for the number of cores.
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
# A process that no launcher started is the only rank of a job of its own.
alone=(-m "not mpi and not cluster") alone_name="serial tests" several=""
for ranks in $rank_counts; do
    if [ "$ranks" = 1 ]; then
        alone=(-m "not cluster" --with-mpi) alone_name="serial tests, and mpi at 1"
    else
        several+=" $ranks"
    fi
done
part "$alone_name" "${sharing[@]}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" timeout --foreground --kill-after 10 2400 \
    python -m pytest "${alone[@]}" --timeout 300 -n $((cores < 4 ? cores : 4)) --dist worksteal \
    --durations 15 --durations-min 5 "$@"
if [ "$selection" = no ]; then
    join checks_and_slurm_tests
    join image_tests
fi
for ranks in $several; do
    if [ "$ranks" -lt 3 ] || [ "$every_case$selection" != nono ]; then
        part "mpi tests at $ranks ranks" mpi_tests "$ranks" "$@"
    else
        part "mpi tests at $ranks ranks, alternate cases" mpi_tests "$ranks" --alternate-cases tests/mpi
    fi
done
if [ "$selection" = yes ]; then cluster_tests "cluster tests" cluster "$@"; fi

printf '\n'
printf '%s\n' "${summary[@]}"
if [ "$tested" = no ]; then
    printf 'no test ran\n'
    exit 1
fi
[ "$failed" = no ]
