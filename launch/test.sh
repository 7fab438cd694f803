#!/usr/bin/env bash
# Checks the code and runs the tests, in one of three tiers:
#
#   launch/test.sh --quick    at each edit, about 2 minutes: ruff, mypy, lint-imports, and the core (steps and their adjoints,
#                             checkpoints, partitions and exchanges) at 1 rank and at 2, of each test up to 3 cases
#   launch/test.sh            before a change is handed in, about 16 minutes on two cores: ruff, mypy, lint-imports, and all
#                             tests but those marked nightly, at 1, 2, 3 and 4 ranks and on a Slurm of two nodes
#   launch/test.sh --nightly  everything: every case at every number of ranks, long tests, and the image, in which the tests
#                             run as well
#
#   launch/test.sh [--quick | --nightly] [--ranks "1 2"] [--no-lint] [--every-case] [--image] [[--] PYTEST ARGUMENT...]
#   launch/test.sh --no-lint --ranks 2 tests/mpi -k halo
#
# --ranks NUMBERS  the numbers of ranks that tests marked mpi run at
# --no-lint        without ruff, mypy and lint-imports
# --every-case     Of a test with many cases up to four run, two of them at 3 ranks and one at 4 ranks, and a test of one case
#                  at 3 ranks or at 4, unless this is given. With it, and with arguments for pytest, all of them run at every
#                  number of ranks
# --image          also build the image of docker/Dockerfile, and check a gradient in it
# Arguments for pytest begin with a path, or stand after --; they select tests in place of the tier's parts. Tests that are
# left out are counted at the end of each part.
#
# The serial tests and those marked mpi at 1 rank are shared by a process for each of up to 4 cores. Beside them, because
# they wait for most of their time, are the checks and the tests marked cluster, in clusters and containers of their own
# where root and apt are there, those that need the image apart from the others.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1

fail() {
    printf 'test.sh: %s\n' "$*" >&2
    exit 2
}

tier=normal rank_counts="" lint=yes every_case=no image=no
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --quick | --nightly)
            [ "$tier" = normal ] || fail "$1: give --quick or --nightly, once"
            tier=${1#--}
            ;;
        --ranks)
            rank_counts=${2-}
            [[ $rank_counts =~ ^\ *[1-9][0-9]*(\ +[1-9][0-9]*)*\ *$ ]] ||
                fail "--ranks '${2-}': must be numbers of ranks, such as --ranks \"1 2\""
            shift
            ;;
        --every-case) every_case=yes ;;
        --no-lint) lint=no ;;
        --image) image=yes ;;
        --)
            shift
            break
            ;;
        -*) fail "unknown option '$1' (known: --quick, --nightly, --ranks, --no-lint, --every-case, --image, --help; \
pytest's own come after a path or after --)" ;;
        *) break ;;
    esac
    shift
done

selection=no
[ $# -eq 0 ] || selection=yes
if [ -z "$rank_counts" ]; then
    if [ "$tier" = quick ]; then rank_counts="1 2"; else rank_counts="1 2 3 4"; fi
fi
# What the quick tier runs.
core=(tests/unit/ode tests/unit/checkpointing tests/unit/partition tests/unit/nn)
core_at_ranks=(tests/mpi/test_{adaptive,conv,exchange,graph,implicit,linear,odeint,partition,sync,trajectory}.py)
tiers=()
if [ "$tier" != normal ]; then
    tiers=("--$tier")
elif [ "$every_case$selection" = nono ]; then
    tiers=(--some-cases)
fi
if [ "$tier" = nightly ]; then
    every_case=yes
    # How many impure right-hand sides tests/mpi/test_recomputation.py draws.
    export PNODE_DIST_EXAMPLES=${PNODE_DIST_EXAMPLES:-500}
fi

launch/bootstrap.sh || exit 1
# The MPI that .venv was built on, if it is not one of its own, is not beside python.
if [ -f "$root/.venv/.pnode-dist-mpi" ]; then PATH=$(cat "$root/.venv/.pnode-dist-mpi"):$PATH; fi
export PATH=$root/.venv/bin:$PATH
# Every process would compile all modules anew, and pytest rewrite the tests.
unset PYTHONDONTWRITEBYTECODE
# Ranks that wait leave the cores to what else is at work (MPICH's): in whatever runs beside other parts.
sharing=(env "MPIR_CVAR_ENABLE_HEAVY_YIELD=${MPIR_CVAR_ENABLE_HEAVY_YIELD:-1}")
# A part that takes longer hangs.
limit=3600
[ "$tier" != nightly ] || limit=28800
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

# Sets `spent` to the seconds of processor time of all processes that this shell has waited for.
spent=0
count_processor_time() {
    local user system
    times >"$others/times.$BASHPID"
    { read -r && read -r user system; } <"$others/times.$BASHPID"
    spent=$(awk -F '[ms ]+' '{printf "%d", 60 * ($1 + $3) + $2 + $4}' <<<"$user $system")
}

part() {
    local name=$1 started=$SECONDS outcome=passed status=0 before
    shift
    count_processor_time
    before=$spent
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
    count_processor_time
    summary+=("$(printf '%-44s %s in %d s (%d s of processor time)' \
        "$name" "$outcome" $((SECONDS - started)) $((spent - before)))")
}

# Every rank runs its own pytest. Rank 0 speaks; another rank's output is shown when that rank failed.
mpi_tests() {
    local ranks=$1 status
    shift
    rm -rf "${logs:?}"/*
    export PNODE_DIST_TEST_LOGS=$logs
    timeout --foreground --kill-after 10 "$limit" launch/mpirun.sh -n "$ranks" python tests/mpi/run_rank.py "${tiers[@]}" "$@"
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
    part "imports" lint-imports --no-logo
}

cluster_tests() {
    local name=$1 marks=$2
    shift 2
    part "$name" "${sharing[@]}" timeout --foreground --kill-after 10 "$limit" \
        python -m pytest "${tiers[@]}" -m "$marks" "$@"
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

image_tests() { cluster_tests "cluster tests of the image" "cluster and image" tests/cluster --all-tests-in-image; }

one_image_test() {
    cluster_tests "cluster tests, one of the image" cluster \
        tests/cluster/test_image.py::test_two_ranks_in_it_check_the_gradient
}

checks_and_slurm_tests() {
    checks
    cluster_tests "cluster tests of Slurm" "cluster and not image" tests/cluster
}

# What runs beside the serial tests, and which tests those are.
forks=() serial=("$@") at_ranks=("$@")
if [ "$selection" = yes ]; then
    checks
elif [ "$tier" = quick ]; then
    forks=(checks)
    serial=("${core[@]}" "${core_at_ranks[@]}") at_ranks=("${core_at_ranks[@]}")
elif [ "$tier" = normal ]; then
    forks=(checks_and_slurm_tests)
else
    forks=(checks_and_slurm_tests image_tests)
fi
if [ "$image" = yes ] && [ "$tier" != nightly ]; then forks+=(one_image_test); fi
for name in "${forks[@]}"; do fork "$name"; done
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
part "$alone_name" "${sharing[@]}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" timeout --foreground --kill-after 10 "$limit" \
    python -m pytest "${tiers[@]}" "${alone[@]}" -n $((cores < 4 ? cores : 4)) --dist worksteal \
    --processor-times 15 "${serial[@]}"
for name in "${forks[@]}"; do join "$name"; done
for ranks in $several; do
    if [ "$ranks" -lt 3 ] || [ "$every_case$selection" != nono ]; then
        part "mpi tests at $ranks ranks" mpi_tests "$ranks" "${at_ranks[@]}"
    else
        part "mpi tests at $ranks ranks, some cases" mpi_tests "$ranks" --alternate-cases tests/mpi
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
