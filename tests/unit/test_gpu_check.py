"""launch/gpu_check.sh, which is written for a GPU and runs here on the CPU."""

from __future__ import annotations

import os
import subprocess

import pytest

from pnode_dist.system.torch_internals import TRACES_OBJECTS
from tests.conftest import ROOT


def gpu_check(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PMI_", "PMIX_"))}
    return subprocess.run(
        [str(ROOT / "launch" / "gpu_check.sh"), *arguments],
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.slow
def test_without_a_gpu_the_check_ends_with_one_line_and_code_3() -> None:
    done = gpu_check()
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr == (
        "gpu_check.sh: torch finds no CUDA device: run this on a machine with a GPU, or with --device cpu\n"
    )


def test_a_wrong_device_is_refused_in_one_line() -> None:
    done = gpu_check("--device", "tpu")
    assert (done.returncode, done.stderr) == (2, "gpu_check.sh: --device 'tpu': must be cuda or cpu\n")


@pytest.mark.nightly
def test_all_checks_of_the_gpu_pass_on_the_cpu() -> None:
    done = gpu_check("--device", "cpu", timeout=480)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "all checks passed on cpu"
    checks = [line.split()[1] for line in lines if line.startswith("ok ")]
    assert len(checks) == 13 + TRACES_OBJECTS
    assert {name.split("-")[0] for name in checks} == {"gradient", "time", "bytes", "peak", "halo"}
