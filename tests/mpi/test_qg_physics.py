"""The quasi-geostrophic equations at every number of ranks: the numbers and gradients of pyqg-jax on the whole grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import GridPartition, Mesh
from pnode_dist.problems.qg.config import EDDY, JET, QGParameters
from pnode_dist.problems.qg.physics import QGTendency, SmallScaleFilter, initial_state
from tests.oracles.right_hand_sides import distance

pytestmark = pytest.mark.mpi

# Written by pyqg_jax_reference.py beside it.
FILE = Path(__file__).parents[1] / "oracles" / "qg_reference.npz"
LENGTH, STEP, STEPS = 5e5, 3600.0, 20
PARAMETERS = {"eddy": EDDY, "jet": JET}
ZERO = torch.tensor(0.0)


@pytest.fixture(scope="module")
def reference() -> dict[str, torch.Tensor]:
    with np.load(FILE) as file:
        return {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files}


@pytest.fixture(params=["slabs", "blocks"])
def partition(request: pytest.FixtureRequest, mesh: Mesh, reference: dict[str, torch.Tensor]) -> GridPartition:
    processes = (mesh.state_ranks, 1) if request.param == "slabs" else None
    return GridPartition(mesh, reference["q"].shape[:2], 2, "periodic", 1, processes)


def own(partition: GridPartition, whole: torch.Tensor) -> torch.Tensor:
    return whole[(..., *partition.owned_slices(partition.comm.rank))].clone()


def on_the_small_domain(name: str) -> QGParameters:
    given = PARAMETERS[name]
    return QGParameters(LENGTH, given.rd, given.delta, beta=given.beta, rek=given.rek)


def relative(found: torch.Tensor, expected: torch.Tensor, partition: GridPartition) -> float:
    """The largest error of this rank, relative to the largest value of the whole grid."""
    return ((found.double() - own(partition, expected)).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", PARAMETERS)
def test_tendencies_and_velocities_are_those_of_pyqg_jax(
    name: str, partition: GridPartition, reference: dict[str, torch.Tensor]
) -> None:
    equations = QGTendency(partition, on_the_small_domain(name))
    q = own(partition, reference["q"])
    u, v = equations.velocities(q)
    assert relative(u, reference[f"{name}_u"], partition) <= 1e-12
    assert relative(v, reference[f"{name}_v"], partition) <= 1e-12
    assert relative(equations(ZERO, q), reference[f"{name}_tendency"], partition) <= 1e-12
    small_scales = SmallScaleFilter(partition, on_the_small_domain(name))
    assert relative(small_scales(ZERO, q), reference[f"{name}_filtered"], partition) <= 1e-12


def test_single_precision_and_several_states_agree_with_double(
    partition: GridPartition, reference: dict[str, torch.Tensor]
) -> None:
    parameters = on_the_small_domain("eddy")
    q = own(partition, reference["q"])
    expected = reference["eddy_tendency"]
    single = QGTendency(partition, parameters, dtype=torch.float32)(ZERO, q.float())
    assert single.dtype == torch.float32
    assert relative(single, expected, partition) <= 1e-5
    both = QGTendency(partition, parameters)(ZERO, torch.stack([q, 2 * q]))
    assert relative(both[0], expected, partition) <= 1e-12
    assert relative(both[1] / 2, expected, partition) > 1e-3


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_gradient_of_twenty_filtered_steps_is_that_of_jax(
    name: str, partition: GridPartition, reference: dict[str, torch.Tensor]
) -> None:
    parameters = on_the_small_domain(name)
    equations, small_scales = QGTendency(partition, parameters), SmallScaleFilter(partition, parameters)
    initial = own(partition, reference["q"]).requires_grad_()
    state: torch.Tensor = initial
    for _ in range(STEPS):
        first = equations(ZERO, state)
        second = equations(ZERO, state + STEP / 2 * first)
        third = equations(ZERO, state + STEP / 2 * second)
        fourth = equations(ZERO, state + STEP * third)
        state = small_scales(ZERO, state + STEP / 6 * (first + 2 * second + 2 * third + fourth))
    share = (own(partition, reference["weights"]) * (state * 1e5) ** 2).sum()
    share.backward()  # type: ignore[no-untyped-call]
    value = partition.comm.allreduce(share.item())
    assert value == pytest.approx(reference[f"{name}_objective"].item(), rel=1e-12)
    assert initial.grad is not None
    assert relative(initial.grad, reference[f"{name}_gradient"], partition) <= 1e-8


def test_a_closure_is_given_fields_in_real_space_and_added(
    partition: GridPartition, reference: dict[str, torch.Tensor]
) -> None:
    parameters = on_the_small_domain("eddy")
    q, u, v = (own(partition, reference[name]) for name in ("q", "eddy_u", "eddy_v"))
    forced = QGTendency(partition, parameters, lambda q, u, v: q * u - 3 * v * q)(ZERO, q)
    added = forced - QGTendency(partition, parameters)(ZERO, q)
    assert distance(added, q * u - 3 * v * q) <= 1e-12


def test_initial_states_have_the_same_bits_at_every_number_of_ranks(mesh: Mesh) -> None:
    shape = (11, 14)
    blocks, whole = (GridPartition(place, shape, 2, "periodic") for place in (mesh, MPI.COMM_SELF))
    first = initial_state(whole, 1e-6, 3, 1)
    assert torch.equal(initial_state(blocks, 1e-6, 3, 1), own(blocks, first))
    assert not torch.equal(first, initial_state(whole, 1e-6, 3, 2))
    assert not torch.equal(first, initial_state(whole, 1e-6, 4, 1))
    upper = first[..., 0]
    assert 0.5e-6 < upper.max() - upper.min() < 1.1e-6
    assert upper.mean(dim=1).abs().max() < 1e-20
    assert bool((first[..., 1] == 0).all())
