"""Modules that can be imported under their former names for one release."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    ("former", "present"), [("sync", "gradients"), ("sampler", "sampler"), ("sharding", "sharding")]
)
def test_a_former_name_warns_and_gives_the_same_objects(former: str, present: str) -> None:
    sys.modules.pop(f"pnode_dist.{former}", None)
    place = f"pnode_dist.distributed.{present}"
    with pytest.warns(DeprecationWarning, match=f"pnode_dist.{former} is deprecated: import {place}"):
        module = import_module(f"pnode_dist.{former}")
    assert module.__all__
    assert all(getattr(module, name) is getattr(import_module(place), name) for name in module.__all__)
