"""What solves leave behind is destroyed once all ranks have left it, and not before."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import pytest
import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist import BatchPartition, Mesh, NeuralODE, odeint
from pnode_dist.ode import solver
from pnode_dist.petsc import objects as petsc_objects
from pnode_dist.petsc.objects import PetscObjects, destroy_left

pytestmark = pytest.mark.mpi
TIMES = [0.0, 1.0]
METHODS = [
    {"method": "rk4", "step_size": 0.5},
    {"method": "dopri5", "rtol": 1e-3},
    {"method": "cn", "step_size": 0.5},
    {"method": "arkimex_3", "step_size": 0.5},
    {"method": "arkimex_3", "rtol": 1e-3},
    {"method": "dirk_es213sal", "step_size": 0.5},
    {"method": "radau3", "step_size": 0.5, "newton": "petsc"},
]
EVERY_METHOD = pytest.mark.parametrize("settings", METHODS, ids=lambda settings: "+".join(settings))


def decay(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return -u


class Recorded:
    """Stands for what holds PETSc objects."""

    def __init__(self, name: str, destroyed: list[str]) -> None:
        self.name, self.destroyed = name, destroyed

    def destroy(self) -> None:
        self.destroyed.append(self.name)


def test_what_all_ranks_left_is_destroyed_in_the_order_of_its_making(mesh: Mesh) -> None:
    comm, destroyed = MPI.COMM_WORLD, list[str]()
    made = [PetscObjects(comm) for _ in range(4)]
    for number, objects in enumerate(made):
        objects.add(Recorded(f"stepper {number}", destroyed))
        objects.add(Recorded(f"adaptive {number}", destroyed))
    order = [2, 0, 3] if comm.rank % 2 else [3, 2, 0]
    for number in order[: 2 + comm.rank % 2] if comm.size > 1 else order:
        made[number].leave()
    destroy_left(comm)
    if comm.size > 1:
        # The first rank has left 3 and 2, the second 2, 0 and 3.
        assert destroyed == ["adaptive 2", "stepper 2", "adaptive 3", "stepper 3"]
        made[0].leave()
        destroy_left(comm)
        assert destroyed[4:] == ["adaptive 0", "stepper 0"]
    assert not made[1].are_destroyed
    made[1].leave()
    made[1].keep()
    if comm.size > 1:
        destroy_left(comm)
        assert not made[1].are_destroyed


def partition(mesh: Mesh) -> BatchPartition:
    return BatchPartition(mesh, 3 * MPI.COMM_WORLD.size, (2,))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[PetscObjects]:
    """Those of all solvers that a test makes."""
    found: list[PetscObjects] = []

    class Noted(PetscObjects):
        def __init__(self, comm: MPI.Comm) -> None:
            super().__init__(comm)
            found.append(self)

    monkeypatch.setattr(solver, "PetscObjects", Noted)
    return found


@EVERY_METHOD
def test_the_solvers_of_a_module_that_is_dropped_are_destroyed(
    mesh: Mesh, settings: dict[str, object], made: list[PetscObjects]
) -> None:
    batch = partition(mesh)
    u0 = torch.ones(batch.local_shape, dtype=torch.float64)

    def solve() -> None:
        node = NeuralODE(decay, partition=batch, **settings)  # type: ignore[arg-type]
        node(u0, TIMES)
        assert not made[-1].are_destroyed

    for _ in range(3):
        solve()
        gc.collect()
    destroy_left(batch.comm)
    assert [objects.are_destroyed for objects in made] == [True] * 3


@EVERY_METHOD
@pytest.mark.parametrize("ending", ["dropped", "reversed", "without a gradient", "raised"])
def test_the_solvers_of_odeint_are_destroyed_however_a_solve_ends(
    mesh: Mesh, settings: dict[str, object], ending: str, made: list[PetscObjects]
) -> None:
    batch = partition(mesh)
    rate = torch.full((1,), 0.5, dtype=torch.float64, requires_grad=ending != "without a gradient")
    u0 = torch.ones(batch.local_shape, dtype=torch.float64)
    seen = 0

    def function(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        nonlocal seen
        seen += 1
        if ending == "raised" and seen == 3:
            raise ArithmeticError
        return -rate * u

    for _ in range(3):
        seen = 0
        with pytest.raises(ArithmeticError) if ending == "raised" else nullcontext():
            found = odeint(function, u0, TIMES, partition=batch, **settings)  # type: ignore[call-overload]
            if ending == "reversed":
                found.sum().backward()
            del found
    gc.collect()
    destroy_left(batch.comm)
    assert [objects.are_destroyed for objects in made] == [True] * 3


@EVERY_METHOD
def test_a_graph_dropped_on_one_rank_alone_can_be_reversed_on_the_others_later(
    mesh: Mesh, settings: dict[str, object]
) -> None:
    batch = partition(mesh)
    rate = torch.full((1,), 0.5, dtype=torch.float64, requires_grad=True)
    u0 = torch.ones(batch.local_shape, dtype=torch.float64)

    def solve() -> torch.Tensor:
        found: torch.Tensor = odeint(lambda t, u: -rate * u, u0, TIMES, partition=batch, **settings)  # type: ignore[call-overload]
        return found[-1].sum()

    first, second = solve(), solve()
    (wanted,) = torch.autograd.grad(solve(), [rate])
    if batch.comm.rank == 0:
        held = first
    del first
    # Making another solver destroys what all ranks have left.
    assert torch.equal(torch.autograd.grad(solve(), [rate])[0], wanted)
    assert torch.equal(torch.autograd.grad(second, [rate])[0], wanted)
    if batch.comm.rank == 0:
        del held
    assert torch.equal(torch.autograd.grad(solve(), [rate])[0], wanted)


@EVERY_METHOD
def test_solves_go_on_where_one_rank_alone_still_has_a_petsc_object(mesh: Mesh, settings: dict[str, object]) -> None:
    batch = partition(mesh)
    u0 = torch.ones(batch.local_shape, dtype=torch.float64)

    def solve() -> torch.Tensor:
        found: torch.Tensor = odeint(decay, u0, TIMES, partition=batch, **settings)  # type: ignore[call-overload]
        return found

    wanted = solve()
    vec = PETSc.Vec().createMPI((1, None), comm=batch.comm)
    # As one rank's collector of garbage may come later than another's.
    if batch.comm.rank > 0:
        vec.destroy()
    for _ in range(2):
        assert torch.equal(solve(), wanted)
    if batch.comm.rank == 0:
        vec.destroy()
    assert torch.equal(solve(), wanted)


def test_what_the_solves_of_a_mesh_held_is_given_up_after_its_end(mesh: Mesh) -> None:
    for _ in range(3):
        with Mesh() as other:
            batch = partition(other)
            odeint(decay, torch.ones(batch.local_shape, dtype=torch.float64), TIMES, partition=batch, step_size=0.5)
            ranks = batch.comm.size
        assert len(petsc_objects._freed) == (ranks > 1)
        destroy_left(MPI.COMM_WORLD)
        assert petsc_objects._freed == []
