#!/usr/bin/env bash
# Runs everything, which takes hours: all tests in every case, the image and clusters included, gradients at 8 to 64 ranks
# (of 180 MB each), the quick tests with every declared Python and torch (launch/matrix.sh), then every command that
# README.md and docs/ show, once, as it is shown there: all trainings in their full length, and all benchmarks.
#
#   launch/nightly.sh [--overwrite] [--no-tests] [--list]
#
# --overwrite  remove what earlier runs have left in runs/, instead of refusing to start
# --no-tests   the commands of the documents alone
# --list       print what would be run, one command a line, and run nothing
# PNODE_DIST_KILLS says how often the training is killed whose parameters are compared with those of an undisturbed one.
#
# What fails does not keep the rest from running. The last lines say what has failed, and what everything took.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1

fail() {
    printf 'nightly.sh: %s\n' "$*" >&2
    exit 2
}

overwrite=no tests=yes list=no
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --overwrite) overwrite=yes ;;
        --no-tests) tests=no ;;
        --list) list=yes ;;
        *) fail "unknown argument '$1' (known: --overwrite, --no-tests, --list, --help)" ;;
    esac
    shift
done

# A page may use the run of a problem, whose own page therefore comes first.
shopt -s nullglob globstar
pages=(README.md docs/problems/*.md docs/**/*.md)
# The blocks of `sh` but those with a mark directly above them (see tests/documents.py), and each command once.
# shellcheck disable=SC2016  # $0 is awk's
shown='
    /^```/ {inside = !inside; run = inside && $0 == "```sh" && !marked; next}
    run && $0 != "" && !seen[$0]++
    !inside && $0 != "" {marked = /^<!-- (run by|not run): /}
    inside {marked = 0}
'
commands=()
if [ "$tests" = yes ]; then
    commands=("launch/test.sh --nightly")
    for ranks in 8 16 27 64; do
        commands+=("timeout -k 10 1800 launch/test.sh --nightly --no-lint --ranks $ranks tests/mpi/test_many_ranks.py")
    done
    commands+=(launch/matrix.sh)
fi
while read -r command; do
    # The first has run all tests, and a training does not begin where another one has left its results.
    case $command in
        "" | launch/test.sh*) continue ;;
        "launch/mpirun.sh -n 2 pnode-dist train launch/configs/sea_surface.toml") command+=" --overwrite" ;;
    esac
    commands+=("$command")
done < <(awk "$shown" "${pages[@]}")

if [ "$list" = yes ]; then
    printf '%s\n' "${commands[@]}"
    exit 0
fi
if [ "$overwrite" = yes ]; then
    rm -rf runs
elif [ -n "$(ls -A runs 2>/dev/null)" ]; then
    fail "runs/ holds the results of earlier runs: move them away, or remove them with --overwrite"
fi
launch/bootstrap.sh || exit 1
export PATH=$root/.venv/bin:$PATH PNODE_DIST_KILLS=${PNODE_DIST_KILLS:-100}
# Every process would compile all modules anew.
unset PYTHONDONTWRITEBYTECODE

summary=() failed=0
for command in "${commands[@]}"; do
    printf '\n== %s\n' "$command"
    read -ra words <<<"$command"
    started=$SECONDS outcome=passed
    "${words[@]}" </dev/null || outcome="FAILED ($?)" failed=$((failed + 1))
    summary+=("$(printf '%-12s %6d s  %s' "$outcome" $((SECONDS - started)) "$command")")
done

printf '\n'
printf '%s\n' "${summary[@]}"
printf '%d of %d commands failed, in %d minutes\n' "$failed" ${#commands[@]} $((SECONDS / 60))
[ "$failed" = 0 ]
