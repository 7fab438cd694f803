"""Where a state is copied between PETSc's Vecs, the stepper and torch's tensors, and where it is not.

`docs/architecture.md`, "The memory of a state", states these facts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from petsc4py import PETSc
from torch import nn

from pnode_dist import GridPartition, Mesh, NeuralODE, RecomputationError, Trajectory
from pnode_dist.ode.steppers.adaptive import ExplicitAttempts
from pnode_dist.ode.steppers.adaptive_implicit import ImplicitAttempts

pytestmark = pytest.mark.mpi

TIMES = [0.0, 0.2, 0.4]
EXPLICIT, IMPLICIT = "rk4", "cn"
LEVELS = ["graph", "stages"]


def memory_of(vec: PETSc.Vec) -> int:
    address: int = vec.array_r.__array_interface__["data"][0]
    return address


class Looking(nn.Module):
    """A linear f, which notes the memory of its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        self.seen: list[int] = []

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        self.seen.append(u.data_ptr())
        return -self.rate * u


@pytest.fixture
def partition(mesh: Mesh) -> GridPartition:
    return GridPartition(mesh, (6, 7), channels=2)


@pytest.fixture
def vec(partition: GridPartition) -> PETSc.Vec:
    """A state of the program's, in a Vec."""
    vec = partition.create_vec()
    vec.set(2.0)
    return vec


def node_of(partition: GridPartition, method: str, **given: Any) -> NeuralODE:
    return NeuralODE(Looking(), method=method, step_size=0.1, partition=partition, **given)


def stepper_of(node: NeuralODE) -> Any:
    (solver,) = node._solvers._solvers.values()
    return solver.stepper


def test_a_vec_of_a_partition_and_its_tensor_are_the_same_memory(partition: GridPartition, vec: PETSc.Vec) -> None:
    state = partition.view(vec)
    assert state.dtype == torch.float64
    assert state.data_ptr() == memory_of(vec)
    assert vec.getType() in ("mpi", "seq")


@pytest.mark.parametrize("keep", LEVELS)
def test_an_explicit_solve_reads_the_initial_state_in_the_memory_of_a_vec(
    keep: str, partition: GridPartition, vec: PETSc.Vec
) -> None:
    node = node_of(partition, EXPLICIT, trajectory=Trajectory("4MiB", keep=keep))
    solution = node(partition.view(vec).requires_grad_(), TIMES)
    assert node.func.seen[0] == memory_of(vec)  # type: ignore[union-attr, index]
    # The outputs are copies, the first one too, and the Vec keeps its values.
    assert solution.untyped_storage().data_ptr() != memory_of(vec)
    assert vec.norm(PETSc.NormType.NORM_INFINITY) == 2.0


def test_an_implicit_solve_copies_the_initial_state_and_f_reads_vecs_of_stages(
    partition: GridPartition, vec: PETSc.Vec, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = node_of(partition, IMPLICIT)
    node(partition.view(vec), TIMES)
    stepper, seen = stepper_of(node), node.func.seen  # type: ignore[union-attr]
    asked: list[int] = []
    inputs = stepper.function.inputs
    monkeypatch.setattr(stepper.function, "inputs", lambda u: asked.append(memory_of(u)) or inputs(u))
    seen.clear()  # type: ignore[union-attr, operator]
    node(partition.view(vec), TIMES)
    assert memory_of(vec) not in seen  # type: ignore[operator]
    assert asked
    assert set(asked) <= set(seen)  # type: ignore[arg-type]
    assert stepper.current.flat.data_ptr() == memory_of(stepper.current.vec)


@pytest.mark.parametrize(("method", "copied"), [(EXPLICIT, True), (IMPLICIT, False), ("ssp_rks2", False)])
def test_monitors_see_the_state_of_petsc_s_own_steps_and_a_copy_of_an_explicit_one(
    method: str, copied: bool, partition: GridPartition, vec: PETSc.Vec
) -> None:
    node = node_of(partition, method, options={"ts_monitor": "ascii:/dev/null"})
    state = partition.view(vec)
    found = []
    with torch.no_grad():
        node(state, TIMES)
        stepper = stepper_of(node)

        def monitor(ts: PETSc.TS, number: int, time: float, u: PETSc.Vec) -> None:
            current = stepper.current.flat
            found.append((memory_of(u) != current.data_ptr(), bool((u.array_r == current.numpy()).all())))

        stepper._petsc.setMonitor(monitor)
        node(state, TIMES)
    assert found == [(copied, True)] * 5


def test_adaptors_get_copies_of_explicit_states_and_implicit_states_themselves(
    partition: GridPartition, vec: PETSc.Vec
) -> None:
    state = partition.view(vec)
    for method, copied in (("dopri5", True), (IMPLICIT, False)):
        options = {} if copied else {"ts_theta_endpoint": True}
        node = node_of(partition, method, rtol=1e-4, options=options)
        with torch.no_grad():
            node(state, TIMES)
        (solver,) = node._solvers._solvers.values()
        (attempts,) = solver.adaptive.values()
        assert isinstance(attempts, ExplicitAttempts if copied else ImplicitAttempts)
        solution = attempts._ts.getSolution()
        if copied:
            # f at the first stage of a step sees the current state.
            assert memory_of(solution) not in node.func.seen  # type: ignore[union-attr, operator]
        else:
            assert solution.handle == solver.stepper.current.vec.handle


@pytest.mark.parametrize("method", [EXPLICIT, IMPLICIT])
def test_checkpoints_are_copied_from_the_memory_of_the_state(
    method: str, partition: GridPartition, vec: PETSc.Vec
) -> None:
    node = node_of(partition, method)
    node(partition.view(vec), TIMES)
    current = stepper_of(node).current
    current.set((partition.view(vec),))
    assert current.array.__array_interface__["data"][0] == current.flat.data_ptr()
    assert (current.flat.data_ptr() == memory_of(vec)) == (method == EXPLICIT)


@pytest.mark.parametrize(("method", "handed_over"), [(EXPLICIT, True), (IMPLICIT, False)])
def test_the_last_state_alone_is_handed_over_where_petsc_does_not_keep_it(
    method: str, handed_over: bool, partition: GridPartition, vec: PETSc.Vec
) -> None:
    node = node_of(partition, method, last_only=True)
    state = partition.view(vec)
    with torch.no_grad():
        node(state, TIMES)
        current = stepper_of(node).current
        places = []
        take = current.take

        def taken() -> Any:
            places.append(current.parts[0].data_ptr())
            return take()

        current.take = taken
        end = node(state, TIMES)
    assert (end.data_ptr() == places[0]) == handed_over
    assert end.data_ptr() != memory_of(vec)


def test_the_adjoint_of_an_implicit_solve_is_the_memory_of_a_vec(partition: GridPartition, vec: PETSc.Vec) -> None:
    node = node_of(partition, IMPLICIT)
    start = partition.view(vec).requires_grad_()
    (gradient,) = torch.autograd.grad(node(start, TIMES)[-1].sum(), [start])
    stepper = stepper_of(node)
    assert stepper._adjoint.data_ptr() == memory_of(stepper._lambda)
    # The gradient is a copy, which the next solve does not overwrite.
    assert gradient.untyped_storage().data_ptr() != memory_of(stepper._lambda)


@pytest.mark.parametrize(("method", "dtype"), [(EXPLICIT, torch.float32), (IMPLICIT, torch.float64)])
def test_implicit_steps_alone_convert_a_state_in_float32(
    method: str, dtype: torch.dtype, partition: GridPartition
) -> None:
    node = node_of(partition, method)
    state = torch.ones(partition.local_shape, dtype=torch.float32)
    with torch.no_grad():
        node(state, TIMES)
        stepper_of(node).current.set((state,))
    assert stepper_of(node).current.flat.dtype == dtype
    assert (state.data_ptr() in node.func.seen) == (dtype == torch.float32)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("keep", ["graph", "stages", "solution"])
def test_a_write_of_torch_s_into_the_initial_state_is_refused_by_the_backward_pass(
    keep: str, partition: GridPartition, vec: PETSc.Vec
) -> None:
    node = node_of(partition, EXPLICIT, trajectory=Trajectory("4MiB", keep=keep))
    start = partition.view(vec)
    loss = node(start, TIMES).sum()
    start.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_write_through_the_vec_of_the_initial_state_is_found_in_a_recomputed_step(
    partition: GridPartition, vec: PETSc.Vec
) -> None:
    node = node_of(partition, EXPLICIT, trajectory=Trajectory(ram_slots=1))
    loss = node(partition.view(vec), TIMES).sum()
    vec.shift(1.0)
    with pytest.raises(RecomputationError, match="step 0 from t = 0, recomputed for the gradient, differs"):
        loss.backward()
