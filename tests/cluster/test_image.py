"""The image of docker/Dockerfile holds all that it takes to run, for a user without privileges."""

from __future__ import annotations

import json

import pytest

from tests.cluster.image import Image

# The first of them builds the image.
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(2400, method="thread")]


def test_two_ranks_in_it_check_the_gradient(image: Image) -> None:
    done = image.run("mpirun.sh", "-n", "2", "pnode-dist", "gradcheck", "launch/configs/pendulum.toml", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ranks"] == 2
    assert found["failures"] == []


def test_its_user_has_no_privileges_and_all_that_the_tests_and_the_demo_need(image: Image) -> None:
    assert image.run("id", "-u").stdout.strip() == "1000"
    done = image.run("launch/bootstrap.sh")
    assert (done.returncode, done.stdout) == (0, "bootstrap: everything is there\n"), done.stderr


def test_it_is_healthy_if_the_doctor_says_so(image: Image) -> None:
    done = image.run("pnode-dist", "doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["problems"] == []
