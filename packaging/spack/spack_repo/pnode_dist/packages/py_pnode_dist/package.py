"""pnode_dist for Spack. Its version and its dependencies are those of pyproject.toml, which a test compares."""

from pathlib import Path

from spack.package import depends_on, license, variant, version, when
from spack_repo.builtin.build_systems.python import PythonPackage


class PyPnodeDist(PythonPackage):
    """Distributed neural ODEs: PETSc time steppers, exact discrete adjoints, torch right-hand sides."""

    # The checkout that this file lies in.
    git = Path(__file__).resolve().parents[6].as_uri()

    license("BSD-3-Clause", checked_by="the pnode_dist contributors")

    version("0.2.0", branch="main")

    variant("plot", default=True, description="Draw figures and write report.html")

    depends_on("python@3.11:", type=("build", "run"))
    depends_on("py-hatchling@1.25:", type="build")

    depends_on("py-h5py@3.10:", type=("build", "run"))
    depends_on("py-isal@1.7:", type=("build", "run"))
    depends_on("py-mpi4py@4.0:", type=("build", "run"))
    depends_on("py-numpy@1.26:", type=("build", "run"))
    depends_on("py-petsc4py@3.22:3.27", type=("build", "run"))
    depends_on("py-pydantic@2.7:2", type=("build", "run"))
    depends_on("py-rich@13:", type=("build", "run"))
    depends_on("py-shtab@1.7:", type=("build", "run"))
    depends_on("py-tomli-w@1.0:", type=("build", "run"))
    depends_on("py-torch@2.6:2.15", type=("build", "run"))

    with when("+plot"):
        depends_on("py-jinja2@3.1:", type=("build", "run"))
        depends_on("py-matplotlib@3.8:", type=("build", "run"))

    # Real scalars, and the MPI of mpi4py.
    depends_on("petsc+mpi~complex", type=("build", "link", "run"))
