"""Generated code is kept for the next process, and only for the same right-hand side."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, sys, torch
from torch import nn
from torch._dynamo.utils import counters
from pnode_dist import NeuralODE

class Field(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 3, dtype=torch.float64)
    def forward(self, t, u):
        return float(sys.argv[2]) * getattr(torch, sys.argv[1])(self.layer(u))

field, found = Field(), []
for compile in (False, True):
    u0 = torch.linspace(0, 1, 6, dtype=torch.float64).reshape(2, 3).requires_grad_()
    end = NeuralODE(field, step_size=0.1, compile=compile, last_only=True)(u0, [0.0, 1.0])
    found.append(torch.cat([g.flatten() for g in torch.autograd.grad(end.sum(), [u0, *field.parameters()])]))
error = float((found[1] - found[0]).abs().max())
print(json.dumps({"error": error, "hits": counters["aot_autograd"]["autograd_cache_hit"]}))
"""


def run_program(cache: Path, function: str, factor: float) -> dict[str, Any]:
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, function, str(factor)],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert found.returncode == 0, found.stderr
    result: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return result


@pytest.mark.nightly
def test_another_process_finds_the_code_of_the_same_field_and_of_no_other(tmp_path: Path) -> None:
    # Outside the loop over the steps the graphs of all three are the same.
    for function, factor in (("tanh", 1.0), ("sin", 1.0), ("tanh", 2.0)):
        found = run_program(tmp_path, function, factor)
        assert found["hits"] == 0
        assert found["error"] <= 1e-13
    again = run_program(tmp_path, "tanh", 1.0)
    assert again["hits"] > 0
    assert again["error"] <= 1e-13
