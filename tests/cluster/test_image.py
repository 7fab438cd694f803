"""The image of docker/Dockerfile holds all that it takes to run, for a user without privileges."""

from __future__ import annotations

import json
import re

import pytest

from tests.cluster.image import Image

# Solves and their gradients, on one rank and on two.
SOME_TESTS = (
    "tests/unit/ode/test_gradients.py",
    "tests/mpi/test_odeint.py",
)
pytestmark = pytest.mark.cluster


def test_two_ranks_in_it_check_the_gradient(image: Image) -> None:
    done = image.run("mpirun.sh", "-n", "2", "pnode-dist", "gradcheck", "launch/configs/pendulum.toml", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ranks"] == 2
    assert found["failures"] == []


@pytest.mark.timeout(20_000, method="thread")
def test_the_tests_pass_in_it(image: Image, request: pytest.FixtureRequest) -> None:
    everything = request.config.getoption("--all-tests-in-image", default=False)
    ranks, selection = ("1 2 3 4", ()) if everything else ("2", SOME_TESTS)
    options = ("--no-lint", "--ranks", ranks)
    done = image.run("launch/test.sh", *options, *selection, timeout=14_400 if everything else 1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^serial tests.* passed in", done.stdout, re.MULTILINE)
    assert re.search(r"^mpi tests at 2 ranks +passed in", done.stdout, re.MULTILINE)


def test_the_demonstration_runs_in_it(image: Image) -> None:
    done = image.run("launch/demo.sh", "--set", "training.epochs=1", "--set", "problem.window=1", timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "The forecast is in runs/sea_surface/forecast.h5" in done.stdout
    assert image.run("test", "-s", "runs/sea_surface/report.png").returncode == 0


def test_its_user_has_no_privileges_and_all_that_the_tests_and_the_demo_need(image: Image) -> None:
    assert image.run("id", "-u").stdout.strip() == "1000"
    done = image.run("launch/bootstrap.sh")
    assert (done.returncode, done.stdout) == (0, "bootstrap: everything is there\n"), done.stderr


def test_it_is_healthy_if_the_doctor_says_so(image: Image) -> None:
    done = image.run("pnode-dist", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["problems"] == []
