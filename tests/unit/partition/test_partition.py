"""Partitions on one rank: the whole is one's own, and what is refused."""

from typing import Any

import pytest
import torch

from pnode_dist import BatchPartition, GridPartition, Mesh
from pnode_dist.errors import ConfigurationError
from tests.oracles.right_hand_sides import random


@pytest.fixture(scope="module")
def mesh() -> Any:
    with Mesh() as mesh:
        yield mesh


def test_one_rank_owns_the_whole_grid(mesh: Mesh) -> None:
    partition = GridPartition(mesh, (3, 5), channels=2, boundary=("replicate", "periodic"))
    assert partition.owned == ((0, 3), (0, 5))
    assert partition.local_shape == (3, 5, 2)
    assert partition.processes == (1, 1)
    assert (partition.shape, partition.channels) == ((3, 5), 2)
    assert (partition.boundary, partition.stencil_width) == (("replicate", "periodic"), 1)


def test_axes_have_names_and_one_rule_may_serve_them_all(mesh: Mesh) -> None:
    for shape, axes in (((4,), "x"), ((3, 4), "yx"), ((2, 3, 4), "zyx")):
        partition = GridPartition(mesh, shape, boundary="periodic")
        assert partition.axes == axes
        assert partition.boundary == ("periodic",) * len(shape)
        assert GridPartition(mesh, shape, boundary=1.5).boundary == (1.5,) * len(shape)
        assert GridPartition(mesh, shape).boundary == ("zero",) * len(shape)


@pytest.mark.parametrize("factor", [0, (2, -1), (2,), (2, 2, 2)])
def test_a_factor_that_makes_no_sense_is_refused(factor: Any, mesh: Mesh) -> None:
    partition = GridPartition(mesh, (4, 8))
    for change in (partition.coarsened, partition.refined):
        with pytest.raises(
            ConfigurationError, match=r"factor = .*must (be at least 1|have one entry for each of y, x)"
        ):
            change(factor)


def test_one_rank_owns_the_whole_batch(mesh: Mesh) -> None:
    partition = BatchPartition(mesh, 4, (2, 3))
    assert partition.owned == (0, 4)
    assert partition.local_shape == (4, 2, 3)


def test_a_view_outlives_the_name_of_its_vec(mesh: Mesh) -> None:
    partition = BatchPartition(mesh, 4, (2,))
    vec = partition.create_vec()
    vec.set(3.0)
    views = [partition.view(vec) for _ in range(2)]
    views[0][0, 0] = 5.0
    assert views[1][0, 0] == 5.0
    assert vec.getArray()[0] == 5.0


def test_scatter_copies(mesh: Mesh) -> None:
    partition, whole = BatchPartition(mesh, 4, (2,)), random(4, 2)
    partition.scatter(whole).zero_()
    assert torch.equal(whole, random(4, 2))


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"shape": (0, 4)}, "shape and channels must be at least 1"),
        ({"shape": (4, -1)}, "shape and channels must be at least 1"),
        ({"shape": (4, 4), "channels": 0}, "shape and channels must be at least 1"),
        ({"shape": (4, 4), "stencil_width": -1}, "the width at least 0"),
        ({"shape": (4, 4), "boundary": ("zero", "open")}, "boundary of x = 'open': must be one of periodic"),
        ({"shape": (4, 4), "boundary": ("Zero", "zero")}, "boundary of y = 'Zero': must be one of periodic"),
        ({"shape": (4, 4), "processes": (2, 2)}, "must multiply to 1 ranks"),
        ({"shape": (4, 2), "stencil_width": 3}, "4 x 2 points cannot be split"),
        ({"shape": ()}, "must have one, two or three axes"),
        ({"shape": (2, 2, 2, 2)}, "must have one, two or three axes"),
        ({"shape": (4, 4, 4), "boundary": ("zero", "zero")}, "must have one entry for each of z, y, x"),
        ({"shape": (4,), "boundary": ("zero", "zero")}, "must have one entry for each of x"),
        ({"shape": (4, 4, 4), "boundary": ("zero", "zero", "on")}, "boundary of x = 'on'"),
        ({"shape": (4, 4, 4), "boundary": ("on", "zero", "zero")}, "boundary of z = 'on'"),
        ({"shape": (4,), "processes": (1, 1)}, "processes = (1, 1): must have one entry for each of x"),
        ({"shape": (4, 4), "processes": (-1, -1)}, "must multiply to 1 ranks"),
        ({"shape": (4, 6), "multiple_of": 4}, "multiple_of = (4, 4): must divide the shape (4, 6)"),
        ({"shape": (4, 6), "multiple_of": (4, 0)}, "multiple_of = (4, 0): must divide"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(settings: dict[str, Any], complaint: str, mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match="grid") as caught:
        GridPartition(mesh, **settings)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("samples", [0, -3])
def test_a_batch_of_nothing_is_refused(samples: int, mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match=f"samples = {samples}: must be at least 1"):
        BatchPartition(mesh, samples, (2,))
