"""The installed stack is checked, and what is wrong is said in one line."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import petsc4py
import pytest
from mpi4py import MPI

from pnode_dist.system import compatibility

MAPPED = "7f0000000000-7f0000001000 r-xp 00000000 fe:00 1234 {}"


def test_the_installed_stack_fits() -> None:
    compatibility.check_versions()
    compatibility.check_mpi()


@pytest.mark.parametrize("version", ["3.22.0", "3.22.4", "3.25.5", "3.26.1", "4.0"])
def test_petsc4py_from_the_floor_on_is_accepted(version: str) -> None:
    assert compatibility.petsc4py_problem(version) is None


def test_an_old_petsc4py_is_refused_at_import_naming_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(petsc4py, "__version__", "3.21.6")
    with pytest.raises(ImportError, match=r"needs petsc4py 3\.22 or newer and found 3\.21\.6: launch/bootstrap\.sh"):
        compatibility.check_versions()


def test_a_petsc4py_without_metadata_of_its_own_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(package: str) -> str:
        if package == "petsc4py":
            raise metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(metadata, "version", unknown)
    compatibility.check_versions()
    assert compatibility.facts_here()["petsc4py"] == petsc4py.__version__


def test_a_missing_petsc4py_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "petsc4py", None)  # importing it fails
    monkeypatch.setattr(compatibility, "DEBIAN_DIRECTORIES", Path("/nowhere"))
    with pytest.raises(ImportError, match=r"needs petsc4py, which is not installed: launch/bootstrap\.sh"):
        compatibility.check_versions()


def test_a_petsc4py_of_debian_that_python_does_not_find_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "petsc3.22" / "x86_64-linux-gnu-real" / "lib" / "python3" / "dist-packages"
    (place / "petsc4py").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "petsc4py", None)
    monkeypatch.setattr(compatibility, "DEBIAN_DIRECTORIES", tmp_path)
    with pytest.raises(ImportError, match=f"which is in {place}, where Python does not look: add this directory to "):
        compatibility.check_versions()


@pytest.mark.parametrize("directory", ["", "/nowhere"])
def test_a_petsc_without_headers_has_none_to_read(
    directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "petscconf.h").write_text("#define PETSC_HAVE_MPIUNI 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(petsc4py, "get_config", lambda: {"PETSC_DIR": directory, "PETSC_ARCH": ""})
    assert compatibility.petsc_header("petscconf.h") is None
    compatibility.check_mpi()


def test_complex_scalars_are_refused() -> None:
    assert compatibility.scalar_problem("float64") is None
    assert "real scalars and found complex128" in str(compatibility.scalar_problem("complex128"))


def test_a_petsc_without_mpi_is_refused() -> None:
    assert compatibility.uniprocessor_problem("#define PETSC_HAVE_MPICH 1\n") is None
    problem = compatibility.uniprocessor_problem("#define PETSC_HAVE_MPIIO 1\n#define PETSC_HAVE_MPIUNI 1\n")
    assert "a PETSc with MPI and found one configured without" in str(problem)


def test_a_petsc4py_that_does_not_load_beside_mpi4py_is_refused_naming_the_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(petsc4py, "PETSc", raising=False)
    monkeypatch.setitem(sys.modules, "petsc4py.PETSc", None)  # importing it fails
    library = MPI.Get_library_version().split()[0]
    with pytest.raises(
        ImportError, match=rf"petsc4py cannot be loaded beside mpi4py, which uses {library}.*: build both"
    ):
        compatibility.check_mpi()


def test_two_mpi_libraries_in_one_process_are_refused_naming_both() -> None:
    problem = compatibility.mpi_problem([MAPPED.format("/a/lib/libmpi.so.12"), MAPPED.format("/b/lib/libmpi.so.40")])
    assert problem is not None
    assert "/a/lib/libmpi.so.12 and /b/lib/libmpi.so.40" in problem


def test_one_mpi_library_mapped_in_several_pieces_is_one() -> None:
    lines = [MAPPED.format("/a/lib/libmpi.so.12")] * 4 + [
        MAPPED.format("/a/lib/libmpifort.so.12"),
        "7f00-7f01 rw-p 0 0 0",
    ]
    assert compatibility.mpi_problem(lines) is None


def test_ranks_that_differ_are_named_with_their_hosts() -> None:
    here = compatibility.facts_here()
    assert compatibility.difference([here, here], ["a", "b"]) is None
    other = {**here, "torch": "1.0"}
    said = compatibility.difference([here, here, other], ["a", "b", "c"])
    assert said == f"torch is {here['torch']!r} on rank 0 (a), '1.0' on rank 2 (c): must be the same on all ranks"
