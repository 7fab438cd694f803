"""Checks that MPI, PETSc and petsc4py fit together, at import, with an error of one line."""

from __future__ import annotations

import importlib
import platform
import re
import signal
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

PETSC4PY_FLOOR = (3, 22)
DEBIAN_DIRECTORIES = Path("/usr/lib/petscdir")
_INSTALL = "launch/bootstrap.sh installs one that fits"


def check_versions() -> None:
    """Raise `ImportError` if petsc4py or mpi4py is missing or petsc4py is too old. Loads neither PETSc nor MPI."""
    for package in ("petsc4py", "mpi4py"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            elsewhere = debian_problem(DEBIAN_DIRECTORIES) if package == "petsc4py" else None
            missing = f"pnode_dist needs {package}, which is not installed: {_INSTALL}"
            raise ImportError(elsewhere or missing) from None
    problem = petsc4py_problem(petsc4py_version())
    if problem:
        raise ImportError(problem)


def petsc4py_version() -> str:
    """Return the version of petsc4py. Does not load PETSc.

    Read from the module, because a wheel that carries petsc4py inside has no metadata of that name.
    """
    import petsc4py

    return str(petsc4py.__version__)


def petsc_release() -> tuple[int, int]:
    """Return the major and minor number of PETSc, which are those of petsc4py. Does not load PETSc."""
    return _release(petsc4py_version())


def _release(version: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def debian_problem(directories: Path) -> str | None:
    """Name the petsc4py in Debian's `directories` of PETSc that Python does not find, or return None.

    Debian's python3-petsc4py points Python at a link that only the development package of PETSc makes.
    """
    found = sorted(directories.glob("*/*-real/lib/python3/dist-packages/petsc4py"))
    if not found:
        return None
    return (
        f"pnode_dist needs petsc4py, which is in {found[-1].parent}, where Python does not look: add this directory to "
        "PYTHONPATH, or install Debian's libpetsc-real-dev"
    )


def petsc4py_problem(version: str) -> str | None:
    """Describe the error in a petsc4py version, or return None."""
    if _release(version) >= PETSC4PY_FLOOR:
        return None
    floor = ".".join(map(str, PETSC4PY_FLOOR))
    return f"pnode_dist needs petsc4py {floor} or newer and found {version}: {_INSTALL}"


def facts_here() -> dict[str, str]:
    """Return the facts that must be the same on all ranks: versions of packages and MPI, and the command line."""
    from mpi4py import MPI

    versions = {name: metadata.version(name) for name in ("torch", "numpy", "mpi4py")}
    return {
        "pnode_dist": metadata.version("pnode-dist"),
        "Python": platform.python_version(),
        **versions,
        "petsc4py": petsc4py_version(),
        "the MPI library": MPI.Get_library_version().split("\0")[0].splitlines()[0].strip(),
        "the command line": " ".join(sys.argv[1:]),
    }


def difference(facts: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> str | None:
    """Describe a difference between the facts of the ranks, or return None."""
    for name, first in facts[0].items():
        for rank, other in enumerate(facts):
            if other.get(name) != first:
                there = f"{other.get(name)!r} on rank {rank} ({hosts[rank]})"
                return f"{name} is {first!r} on rank 0 ({hosts[0]}), {there}: must be the same on all ranks"
    return None


def check_mpi() -> None:
    """Load mpi4py and PETSc, and raise `ImportError` if they do not fit each other or this package."""
    # Load mpi4py first: PETSc then finds its MPI library loaded already.
    import mpi4py.MPI

    try:
        from petsc4py import PETSc
    except ImportError as error:
        library = mpi4py.MPI.Get_library_version().splitlines()[0].strip("\0 ")
        raise ImportError(
            f"petsc4py cannot be loaded beside mpi4py, which uses {library}: {error}: build both on the same MPI "
            f"({_INSTALL})"
        ) from None
    leave_closed_pipes_to_python()
    maps = Path("/proc/self/maps")
    mapped = maps.read_text().splitlines() if maps.exists() else []
    header = petsc_header("petscconf.h")
    problem = (
        scalar_problem(str(PETSc.ScalarType().dtype))
        or uniprocessor_problem("" if header is None else header.read_text())
        or mpi_problem(mapped)
    )
    if problem:
        raise ImportError(problem)


def petsc_header(name: str) -> Path | None:
    """Return the path of a header of the configured PETSc, or None where the headers are not installed."""
    import petsc4py

    config = petsc4py.get_config()
    # A binary wheel names no directory.
    header = Path(config["PETSC_DIR"], config["PETSC_ARCH"], "include", name)
    return header if header.is_absolute() and header.is_file() else None


def leave_closed_pipes_to_python() -> None:
    """Put back Python's handling of SIGPIPE, in whose place PETSc reports a crash and aborts all ranks."""
    if threading.current_thread() is threading.main_thread():
        handler = signal.getsignal(signal.SIGPIPE)
        if handler is not None:
            signal.signal(signal.SIGPIPE, handler)


def scalar_problem(scalar: str) -> str | None:
    """Describe the error in a PETSc build with this scalar type, a NumPy name, or return None."""
    if scalar in ("float64", "float32"):
        return None
    return f"pnode_dist needs a PETSc with real scalars and found {scalar}: configure it with --with-scalar-type=real"


def uniprocessor_problem(petscconf: str) -> str | None:
    """Describe the error in a PETSc build with this petscconf.h, or return None."""
    if not re.search(r"^#define PETSC_HAVE_MPIUNI\b", petscconf, re.MULTILINE):
        return None
    return f"pnode_dist needs a PETSc with MPI and found one configured without: {_INSTALL}"


def mpi_problem(mapped: Iterable[str]) -> str | None:
    """Describe the error in a process with mpi4py and PETSc from its lines of /proc/PID/maps, or return None.

    Two MPI libraries in one process do not share communicators: ranks would be singletons, or crash.
    """
    libraries = set()
    for line in mapped:
        path = line.split(maxsplit=5)[-1] if line.count(" ") >= 5 else ""
        if re.fullmatch(r"libmpi(ch|_abi)?\.so(\.\d+)*", Path(path).name):
            libraries.add(str(Path(path).resolve()))
    if len(libraries) < 2:
        return None
    return (
        f"mpi4py and petsc4py use different MPI libraries, {' and '.join(sorted(libraries))}: build both on the same "
        f"one ({_INSTALL})"
    )
