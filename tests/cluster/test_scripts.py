"""Every script passes shellcheck."""

from __future__ import annotations

import subprocess

import pytest

from tests.cluster.conftest import install
from tests.conftest import ROOT

pytestmark = pytest.mark.cluster


def test_shellcheck_has_nothing_to_say() -> None:
    install(("shellcheck",), ("shellcheck",))
    scripts = [path.relative_to(ROOT) for path in sorted(ROOT.glob("launch/*.sh")) + sorted(ROOT.glob("docker/*.sh"))]
    scripts += [path.relative_to(ROOT) for path in sorted(ROOT.glob("slurm/*"))]
    assert len(scripts) > 10
    command = ["shellcheck", "--external-sources", "--shell=bash", *map(str, scripts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
