#!/usr/bin/env bash
# Runs the quick tests (launch/test.sh --quick --no-lint) with each Python and each end of the range of torch that
# pyproject.toml declares, and prints a table of what passed, failed and was skipped.
#
#   launch/matrix.sh [--directory DIRECTORY] [PYTHON:TORCH...]
#   launch/matrix.sh 3.11:lowest 3.13:pinned
#
# PYTHON:TORCH           one row: a version of Python, and which torch: the lowest or newest release of the declared
#                        range, or the one that launch/constraints.txt pins. By default every declared Python with the
#                        pinned torch, and the lowest Python with the lowest and newest
# --directory DIRECTORY  where the environments are made and kept; by default build/matrix. Each has a clone of the last
#                        commit, its own .venv, and the output of its tests in a file beside it
#
# A Python is looked for on the PATH, then where pyenv and uv install theirs. One that is not there is a row "not run"
# with the reason. Fails if a test fails or no row was run. Wheels of torch come from where pip is told to look
# (PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS); those for CUDA take 6 GB for each row. A new row takes 5 minutes on two cores, and
# as much again to compile petsc4py for a Python for which pip has no wheel.
set -uo pipefail

called_in=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1

fail() {
    printf 'matrix.sh: %s\n' "$*" >&2
    exit 2
}

declared=$(sed -n 's/^ *"torch\(>=[^"]*\)",$/\1/p' pyproject.toml)
mapfile -t pythons < <(sed -n 's/^ *"Programming Language :: Python :: \(3\.[0-9]*\)",$/\1/p' pyproject.toml)
if [ -z "$declared" ] || [ ${#pythons[@]} -eq 0 ]; then fail "pyproject.toml declares no range of torch, or no Python"; fi
directory=$root/build/matrix rows=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --directory)
            [ -n "${2-}" ] || fail "--directory needs a value"
            directory=$(cd "$called_in" && realpath -ms -- "$2")
            shift
            ;;
        -*) fail "unknown option '$1' (known: --directory, --help)" ;;
        *)
            [[ " ${pythons[*]} " == *" ${1%%:*} "* && $1 =~ :(lowest|newest|pinned)$ ]] ||
                fail "'$1': must be PYTHON:TORCH, a Python of ${pythons[*]} and lowest, newest or pinned"
            rows+=("$1")
            ;;
    esac
    shift
done
if [ ${#rows[@]} -eq 0 ]; then
    rows=("${pythons[0]}:lowest" "${pythons[0]}:newest")
    for version in "${pythons[@]}"; do rows+=("$version:pinned"); done
fi

# The path of an interpreter of this version that runs: a shim of pyenv is there for versions that are not active, too.
find_python() {
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python \
        "$(uv python find --no-python-downloads "$1" 2>/dev/null)"; do
        "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2>/dev/null || continue
        "$candidate" -c 'import sys; print(sys.executable)'
        return
    done
    return 1
}

# Put the last commit into a clone; what bootstrap.sh has made there stays.
update_clone() {
    [ -d "$1/.git" ] || git clone --quiet --no-checkout "$root" "$1" || return
    git -C "$1" fetch --quiet "$root" HEAD && git -C "$1" checkout --quiet --force --detach FETCH_HEAD
}

# Pin another torch, and let torch choose the packages that it pins itself.
choose_torch() {
    local clone=$1 python=$2 which=$3 constraints=$1/launch/constraints.txt version
    [ "$which" != pinned ] || return 0
    sed -i -e '/^torch==/d' -e '/^sympy==/d' "$constraints" || return
    if [ "$which" = lowest ]; then
        version=${declared%%,*} version=${version#>=}
    else
        # A relative path, because pip splits these at blanks.
        version=$(cd "$clone" && PIP_CONSTRAINT=launch/constraints.txt "$python" -m pip install --quiet --disable-pip-version-check --dry-run \
            --ignore-installed --no-deps --only-binary :all: --report - "torch$declared" |
            "$python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])') || return
    fi
    printf 'torch==%s\n' "$version" >>"$constraints"
}

# The sums over the last lines of all runs of pytest in a log: passed, failed and skipped.
count() {
    awk '/^=+ .* in [0-9.]+s.* =+$/ || /^[0-9]+ (passed|failed|skipped|error).* in [0-9.]+s/ {
            for (i = 2; i <= NF; i++) {
                if ($i ~ /^passed/) passed += $(i - 1)
                if ($i ~ /^(failed|error)/) failed += $(i - 1)
                if ($i ~ /^skipped/) skipped += $(i - 1)
            }
        }
        END {printf "%d %d %d", passed, failed, skipped}' "$1"
}

mkdir -p "$directory/wheels" || exit 1
# PETSc's own wheel serves every Python.
export PIP_FIND_LINKS="${PIP_FIND_LINKS-} file://${directory// /%20}/wheels"
unset PYTHONPATH
table=() failures=0 ran=0
add_row() { table+=("$(printf '%-7s %-8s %-14s %7s %7s %8s %8s  %s' "$@")"); }
add_row Python torch "" passed failed skipped seconds ""
for row in "${rows[@]}"; do
    version=${row%:*} which=${row#*:} clone=$directory/${row/:/-} log=$directory/${row/:/-}.log started=$SECONDS
    printf '\n== Python %s, torch %s (output in %s)\n' "$version" "$which" "$log"
    if ! python=$(find_python "$version"); then
        add_row "$version" "$which" "" "" "" "" "" "not run: no python$version on the PATH, of pyenv or of uv"
        continue
    fi
    cp "$root"/.venv/.pnode-dist-wheels/petsc-[0-9]*.whl "$directory/wheels" 2>/dev/null
    ran=$((ran + 1)) status=0
    {
        update_clone "$clone" && choose_torch "$clone" "$python" "$which" &&
            "$clone/launch/bootstrap.sh" --python "$python" && "$clone/launch/test.sh" --quick --no-lint
    } >"$log" 2>&1 </dev/null || status=$?
    cp "$clone"/.venv/.pnode-dist-wheels/petsc-[0-9]*.whl "$directory/wheels" 2>/dev/null
    read -r passed failed skipped < <(count "$log")
    torch=$("$clone/.venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null) || torch=""
    verdict=""
    if [ "$status" != 0 ]; then
        failures=$((failures + 1)) verdict="FAILED ($status)"
        tail -n 25 "$log"
    fi
    add_row "$version" "$which" "$torch" "$passed" "$failed" "$skipped" $((SECONDS - started)) "$verdict"
done

printf '\n'
printf '%s\n' "${table[@]}"
[ "$ran" -gt 0 ] && [ "$failures" = 0 ]
