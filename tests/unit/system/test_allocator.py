"""What becomes of freed memory, seen by the page faults of a process of its own."""

import os
import subprocess
import sys

import pytest

from pnode_dist import keep_freed_memory

FAULTS = """
import resource, sys
import torch
from pnode_dist import keep_freed_memory

torch.set_num_threads(1)
kept = keep_freed_memory() if sys.argv[1] == "keep" else None

layer = torch.nn.Conv2d(16, 16, 3, padding=1)
start = torch.randn(1, 16, 64, 64)

def graphs():
    # Those of four stages, the last one made being used and freed first.
    found = []
    for _ in range(4):
        state = start.detach().requires_grad_()
        slope = state
        for _ in range(3):
            slope = torch.nn.functional.silu(layer(slope))
        found.append((state, slope))
    while found:
        state, slope = found.pop()
        torch.autograd.grad(slope, [state, *layer.parameters()], start)

for _ in range(3):
    graphs()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    graphs()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(choice: str) -> tuple[str, int]:
    """What `keep_freed_memory` returned, and the faults of 20 times the graphs of a step."""
    environment = {name: value for name, value in os.environ.items() if "MALLOC" not in name}
    done = subprocess.run([sys.executable, "-c", FAULTS, choice], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, count = done.stdout.split()
    return kept, int(count)


def test_memory_that_is_kept_costs_no_page_faults_when_it_is_used_again() -> None:
    kept, count = faults("keep")
    assert kept == "True"
    assert count < 1_000
    assert faults("leave")[1] > 5_000


@pytest.mark.parametrize("setting", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX_", "GLIBC_TUNABLES"])
def test_settings_of_the_environment_come_first(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(setting, "glibc.malloc.arena_max=1" if setting == "GLIBC_TUNABLES" else "200000")
    monkeypatch.setattr("ctypes.CDLL", lambda *_: pytest.fail("the allocator was asked for something"))
    assert keep_freed_memory() is False
