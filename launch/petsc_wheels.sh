# Sourced by bootstrap.sh and build_wheels.sh, so that what they compile is the same.
# shellcheck shell=bash

# Options that PETSc is configured with.
# shellcheck disable=SC2034  # for the scripts that source this
petsc_options="--with-fc=0 --with-debugging=0 COPTFLAGS=-O3 CXXOPTFLAGS=-O3 --with-x=0 --with-ssl=0"

# Make PETSc's libraries in a site-packages directory look for MPI in the environment that they lie in. A built library
# looks in the environment that it was built in. A BLAS that build_wheels.sh has put into a wheel lies in petsc.libs.
#
#   relocate_petsc SITE_PACKAGES PATCHELF
# shellcheck disable=SC2016  # $ORIGIN is for the loader, not for the shell
relocate_petsc() {
    local site=$1 patchelf=$2 library
    for library in "$site"/petsc/lib/libpetsc.so.*; do
        _look_in "$patchelf" "$library" '$ORIGIN/../../petsc.libs:$ORIGIN/../../../..' || return
    done
    for library in "$site"/petsc4py/lib/PETSc*.so; do
        _look_in "$patchelf" "$library" '$ORIGIN/../../petsc/lib:$ORIGIN/../../../..' || return
    done
}

# Write only where it changes something: programs that run may have the library mapped.
_look_in() {
    local patchelf=$1 library=$2 path=$3
    if [ ! -f "$library" ] || [ -L "$library" ]; then return 0; fi
    [ "$("$patchelf" --print-rpath "$library")" = "$path" ] || "$patchelf" --set-rpath "$path" "$library"
}
