"""The threads of the BLAS behind PETSc's vectors, in a process of its own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes
import torch
from petsc4py import PETSc
from pnode_dist import odeint

blas = ctypes.CDLL(PETSc.__file__)
if hasattr(blas, "openblas_get_num_threads"):
    blas.openblas_set_num_threads(2)
    odeint(lambda t, u: -u, torch.ones(2), [0.0, 1.0], step_size=0.5)
    print(blas.openblas_get_num_threads())
"""


@pytest.mark.parametrize(
    ("settings", "threads"), [({}, 1), ({"OPENBLAS_NUM_THREADS": "2"}, 2), ({"OMP_NUM_THREADS": "2"}, 2)]
)
@pytest.mark.slow
def test_vectors_use_one_thread_unless_the_environment_says_otherwise(settings: dict[str, str], threads: int) -> None:
    environment = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name} | settings
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if not done.stdout:
        pytest.skip("this PETSc is built on a BLAS other than OpenBLAS")
    assert int(done.stdout) == threads
