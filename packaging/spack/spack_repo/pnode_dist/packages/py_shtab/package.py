"""A newer release of shtab than Spack's own repository has."""

from spack.package import depends_on, version
from spack_repo.builtin.packages.py_shtab.package import PyShtab as BuiltinPyShtab


class PyShtab(BuiltinPyShtab):
    __doc__ = BuiltinPyShtab.__doc__

    version("1.13.0", sha256="0a5be9d7ab2b4549e9a38252abcd5ecf5ec6813ecd80c6b06fa851bff55a5085")

    depends_on("python@3.9:", when="@1.13:", type=("build", "run"))
    depends_on("py-setuptools@77:", when="@1.13:", type="build")
