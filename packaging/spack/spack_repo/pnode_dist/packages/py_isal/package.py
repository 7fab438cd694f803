"""A newer release of python-isal than Spack's own repository has."""

from spack.package import depends_on, version
from spack_repo.builtin.packages.py_isal.package import PyIsal as BuiltinPyIsal


class PyIsal(BuiltinPyIsal):
    __doc__ = BuiltinPyIsal.__doc__

    version("1.9.1", sha256="d210dca02a689ef2af709d2c62d2daac2e36b5d2fa06e6dc0d023c83fee77e91")

    depends_on("python@3.9:", when="@1.9:", type=("build", "run"))
    depends_on("py-setuptools@77:", when="@1.9:", type="build")
    depends_on("py-setuptools-scm@8:", when="@1.9:", type="build")
