"""Samplers of others calibrate a served model through UM-Bridge's own client, unmodified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.integrate import quad

from tests.clients import NOISE, OBSERVED, PRIOR_DEVIATION, PRIOR_MEAN
from tests.conftest import ROOT
from tests.documents import blocks_of
from tests.own_problems import written
from tests.serving import started

pytestmark = pytest.mark.nightly

THIS = "tests/unit/serve/test_clients.py"

# The newest of each that work together: arviz, which tinyDA needs, reads what later matplotlib and xarray lack.
PACKAGES = ("umbridge==1.2.10", "emcee==3.1.6", "tinyDA==0.9.21", "ray", "matplotlib<3.11", "pandas<3", "xarray<2025.1")
_INSTALLATION, _SAMPLING = 900.0, 900.0


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the clients. Skips where they cannot be installed."""
    environment = tmp_path_factory.mktemp("clients")
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    interpreter = environment / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True, env=clean)
    made = subprocess.run(
        [interpreter, "-m", "pip", "install", "--no-input", *PACKAGES],
        env=clean,
        capture_output=True,
        text=True,
        timeout=_INSTALLATION,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"the clients cannot be installed from PyPI: {made.stderr.strip().splitlines()[-1]}")
    return interpreter


def posterior_mean() -> float:
    """The mean by quadrature, of the model in closed form: RK4 on du/dt = -rate u, two steps of 0.125 a lead."""
    initial = np.linspace(1.0, 2.0, 20)[15:].mean()

    def density(rate: float) -> float:
        z = -0.125 * rate
        step = 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24
        misfit = (initial * step ** np.array([2, 6]) - OBSERVED) / NOISE
        return float(np.exp(-0.5 * (misfit @ misfit + ((rate - PRIOR_MEAN) / PRIOR_DEVIATION) ** 2)))

    moments = [quad(lambda rate, power=power: rate**power * density(rate), -1.0, 2.0)[0] for power in (0, 1)]
    return float(moments[1] / moments[0])


@pytest.mark.timeout(_INSTALLATION + 2 * _SAMPLING)
@pytest.mark.parametrize("sampler", ["emcee", "tinyDA"])
def test_the_posterior_mean_is_that_of_quadrature_within_its_error(sampler: str, python: Path, tmp_path: Path) -> None:
    with started(2, tmp_path, written(tmp_path)) as service:
        done = subprocess.run(
            [python, ROOT / "tests" / "clients.py", service.url, sampler],
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            capture_output=True,
            text=True,
            timeout=_SAMPLING,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 < found["error"] < 0.005
    # Three standard errors of a chain whose seed is fixed.
    assert abs(found["mean"] - posterior_mean()) < 3 * found["error"]


def test_the_program_of_the_tutorial_runs(python: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tutorials" / "serve.md").read_text()
    (program,) = (block for block in blocks_of(page) if THIS in block.run_by)
    small = ("--set", "problem.points=8", "--set", "problem.trajectories=4", "--set", "training.batch_size=4")
    with started(2, tmp_path, ROOT / "examples" / "own_problem" / "mine.toml", *small) as service:
        code = program.text.replace("http://127.0.0.1:4242", service.url)
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=_SAMPLING, check=False)
    assert done.returncode == 0, done.stderr
    output, gradient = map(json.loads, done.stdout.splitlines())
    assert [len(vector) for vector in output] == [2]
    assert len(gradient) == 2
