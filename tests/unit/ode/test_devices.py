"""f on another device than PETSc's vectors, and PETSc's vectors on that device as well.

In a process of its own: torch takes no further device after its first backward pass.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from mpi4py import MPI  # noqa: F401  # first: petsc4py may rely on MPI's library being loaded in this new process
from petsc4py import PETSc

from pnode_dist import NeuralODE, Trajectory, odeint
from pnode_dist.petsc import vectors
from tests.conftest import PATIENCE
from tests.oracles.other_device import Hidden, needs_other_device, other_device, transfers
from tests.oracles.right_hand_sides import Network, distance, random

pytestmark = [pytest.mark.slow, needs_other_device]  # in a process of its own
TIMES = [0.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def elsewhere() -> Iterator[Executor]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield process


def solved(device: torch.device, settings: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """The states and the gradients by the initial state and all parameters, with everything on `device`."""
    network = Network()
    for name, value in list(network.named_parameters()):
        setattr(network, name, torch.nn.Parameter(value.detach().to(device)))
    u0 = random(2, 3).to(device).requires_grad_()
    node = NeuralODE(network, **{"step_size": 0.25, "trajectory": Trajectory(ram="1MiB"), **settings})
    states = node(u0, TIMES)
    found = torch.autograd.grad(states.square().sum(), [u0, *network.parameters()])
    assert all(value.device == device for value in (states, *found))
    return states.detach(), *found


def solved_there(settings: dict[str, Any]) -> list[np.ndarray[Any, Any]]:
    found = solved(other_device(), settings)
    assert all(isinstance(value, Hidden) for value in found)
    return [value.cpu().numpy() for value in found]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"compute_dtype": torch.float32},
        {"method": "dopri5", "rtol": 1e-4},
        {"method": "cn"},
        {"method": "cn", "preconditioner": "block"},
    ],
    ids=["explicit", "float32", "adaptive", "implicit", "preconditioned"],
)
def test_values_and_gradients_are_there_and_are_those_of_the_cpu(settings: dict[str, Any], elsewhere: Executor) -> None:
    there = elsewhere.submit(solved_there, settings).result(PATIENCE)
    here = solved(torch.device("cpu"), settings)
    # An explicit step there has a tape by stages: the same numbers are added in another order.
    assert distance([torch.from_numpy(one) for one in there], here) <= 1e-15


def copies(steps: int) -> dict[str, int]:
    """How often a state goes there and back in a solve of so many steps."""
    u0 = random(2, 3).to(other_device())
    before = dict(transfers)
    odeint(lambda t, u: -u, u0, [0.0, 1.0], step_size=1.0 / steps)
    return {way: transfers[way] - before[way] for way in transfers}


def test_each_stage_takes_one_copy_there_and_one_back(elsewhere: Executor) -> None:
    few, many = (elsewhere.submit(copies, steps).result(PATIENCE) for steps in (2, 12))
    assert {way: (many[way] - few[way]) / (10 * 4) for way in few} == {"there": 1.0, "back": 1.0}


VIEW = vectors.view


def view_there(vec: PETSc.Vec, shape: tuple[int, ...], device: torch.device = vectors.HOST) -> torch.Tensor:
    here = VIEW(vec, shape)
    return here if device is vectors.HOST else Hidden(here)


def with_vectors_there(run: Any, argument: Any) -> Any:
    """Run as on a device that PETSc has vectors on: the memory is the host's, but torch knows it as the device's."""
    with (
        mock.patch.object(vectors, "vec_device", lambda device: device),
        mock.patch.object(vectors, "create_vec", lambda comm, size, device: CREATE(comm, size)),
        mock.patch.object(vectors, "view", view_there),
    ):
        return run(argument)


CREATE = vectors.create_vec


@pytest.mark.parametrize(
    "settings",
    [{}, {"compute_dtype": torch.float32}, {"method": "dopri5", "rtol": 1e-4}, {"method": "bosh3"}],
    ids=["explicit", "float32", "adaptive", "first stage is last"],
)
@pytest.mark.parametrize("ram", ["1MiB", "100B"], ids=["graphs", "checkpoints"])
def test_vectors_there_give_the_values_and_gradients_of_the_cpu(
    settings: dict[str, Any], ram: str, elsewhere: Executor
) -> None:
    settings = {**settings, "trajectory": Trajectory(ram=ram)}
    there = elsewhere.submit(with_vectors_there, solved_there, settings).result(PATIENCE)
    here = solved(torch.device("cpu"), settings)
    assert all(np.array_equal(one, other.numpy()) for one, other in zip(there, here, strict=True))


def test_vectors_there_need_no_copies_of_stages(elsewhere: Executor) -> None:
    few, many = (elsewhere.submit(with_vectors_there, copies, steps).result(PATIENCE) for steps in (2, 12))
    assert few == many


def test_a_vec_through_dlpack_is_its_memory_also_where_petsc_lends_it_for_reading() -> None:
    vec = vectors.create_vec(PETSc.COMM_SELF.tompi4py(), 3)
    through = vectors._exchanged(vec)
    through.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert vec.array_r.tolist() == [1.0, 2.0, 3.0]
    seen = []
    ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
    ts.setType(PETSc.TS.Type.RK)

    def function(ts: PETSc.TS, time: float, state: PETSc.Vec, slope: PETSc.Vec) -> None:
        seen.append(vectors._exchanged(state).data_ptr() == VIEW(state, (3,)).data_ptr())
        vectors._exchanged(slope).copy_(-vectors._exchanged(state))

    ts.setRHSFunction(function, vec.duplicate())
    ts.setSolution(vec)
    ts.setTimeStep(0.1)
    ts.setMaxSteps(1)
    ts.setUp()
    ts.step()
    assert seen
    assert all(seen)
    assert vec.array_r[1] == pytest.approx(2 * np.exp(-ts.getTime()), rel=1e-5)


def refused() -> str:
    with pytest.raises(TypeError) as caught:
        odeint(lambda t, u: u, (random(2), random(2).to(other_device())), TIMES)
    return str(caught.value)


def test_a_tuple_on_two_devices_is_refused(elsewhere: Executor) -> None:
    complaint = elsewhere.submit(refused).result(PATIENCE)
    assert complaint == "u0 must be on one device that keeps values, got cpu, elsewhere:0"
