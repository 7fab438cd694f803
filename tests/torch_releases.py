"""Marks of tests that need more of torch than its lowest supported release has."""

from __future__ import annotations

import inspect

import pytest
import torch

from pnode_dist.system.torch_internals import TRACES_OBJECTS, scan_operator

_THIS = f"torch {torch.__version__}"

fully_sharding_on_a_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason=f"fully_shard of {_THIS} does not run on a CPU"
)
tracing_derivatives = pytest.mark.skipif(not TRACES_OBJECTS, reason=f"{_THIS} does not compile torch.autograd.grad")
with_scan = pytest.mark.skipif(
    "reverse" in inspect.signature(scan_operator().__call__).parameters, reason=f"the scan of {_THIS} is another one"
)
