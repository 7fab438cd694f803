"""A mesh of one rank for the tests of the service."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pnode_dist import Mesh


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh() as mesh:
        yield mesh
