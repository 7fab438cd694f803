"""One solve: its forward pass, what it keeps, and its adjoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from mpi4py import MPI

from pnode_dist.ode.layout import StateLayout
from pnode_dist.ode.methods import Method
from pnode_dist.ode.rhs import Problem, Recording
from pnode_dist.ode.stepper import PetscOptions, Stepper
from pnode_dist.ode.time_grid import TimeGrid
from pnode_dist.partition.protocol import Partition
from pnode_dist.trajectory.budget import Slots, Trajectory
from pnode_dist.trajectory.plan import divide
from pnode_dist.trajectory.replay import run_backward, run_forward
from pnode_dist.trajectory.schedule import Action, Tier, with_graphs
from pnode_dist.trajectory.spill import SpillPool
from pnode_dist.trajectory.statistics import SolveStatistics
from pnode_dist.trajectory.store import Checkpoints, MemoryPool, SlotPool, SpillError
from pnode_dist.trajectory.store import State as FlatState


def communicator(partition: Partition | None) -> MPI.Comm:
    """Over which ranks a state is spread: those of its partition, or none but this one."""
    return MPI.COMM_SELF if partition is None else partition.comm


@dataclass
class Solver:
    """A stepper with the checkpoint slots that its solves share, on the ranks of `partition`.

    `graph_bytes` is the memory of one step's graph on the rank where it is largest, once it has been measured;
    `disk_is_lost` says that the disk failed some rank, and that later solves do without it.
    """

    stepper: Stepper
    pools: dict[Tier, SlotPool]
    partition: Partition | None
    trajectory: Trajectory
    graph_bytes: int | None = None
    disk_is_lost: bool = False

    @classmethod
    def create(
        cls,
        partition: Partition | None,
        layout: StateLayout,
        method: Method,
        parameter_sizes: tuple[int, ...],
        options: PetscOptions,
        trajectory: Trajectory,
    ) -> Solver:
        """A new stepper with empty pools. Collective on the partition's communicator."""
        comm = communicator(partition)
        stepper = Stepper(comm, layout, method, parameter_sizes, options)
        dtype = stepper.state_array.dtype
        pools: dict[Tier, SlotPool] = {
            Tier.RAM: MemoryPool(layout.size, dtype),
            Tier.DISK: SpillPool(layout.size, dtype, trajectory.scratch, comm.rank),
        }
        return cls(stepper, pools, partition, trajectory)


@dataclass
class Solve:
    """One solve: its steps on the shared stepper, its checkpoints and graphs, and what it counted."""

    solver: Solver
    grid: TimeGrid
    problem: Problem
    statistics: SolveStatistics
    keeps_trajectory: bool
    slots: Slots
    actions: Iterator[Action] = field(init=False)
    checkpoints: Checkpoints = field(init=False)
    recordings: dict[int, Recording] = field(default_factory=dict)
    # The first step, taken to measure its graph before there was a plan: the state after it, and its recording.
    first_step: tuple[FlatState, Recording] | None = None
    initial: tuple[torch.Tensor, ...] = ()

    def __post_init__(self) -> None:
        array = self.solver.stepper.state_array
        self.checkpoints = Checkpoints(self.solver.pools, array.nbytes, self.statistics)

    @property
    def state(self) -> FlatState:
        return self.solver.stepper.state_array

    def time(self, step: int) -> float:
        return self.grid.starts[step]

    def overwrite(self, write: Callable[[FlatState], None]) -> None:
        write(self.solver.stepper.state_array)
        self.solver.stepper.touched()

    def restart(self) -> None:
        self.solver.stepper.set_state(self.initial)

    def advance(self, step: int) -> None:
        if not self._use_first_step():
            self.solver.stepper.step(step, self.grid.starts[step], self.grid.sizes[step])

    def record(self, step: int, outlives_sweep: bool) -> None:
        recording = self._use_first_step()
        if not recording:
            recording = []
            self.solver.stepper.step(step, self.grid.starts[step], self.grid.sizes[step], recording, outlives_sweep)
        self.recordings[step] = recording

    def adjoint(self, step: int) -> None:
        recording = self.recordings.pop(step)
        self.solver.stepper.adjoint_step(step, self.grid.starts[step], self.grid.sizes[step], recording)

    def _use_first_step(self) -> Recording | None:
        if self.first_step is None:
            return None
        (after, recording), self.first_step = self.first_step, None
        self.overwrite(lambda state: np.copyto(state, after))
        return recording

    def forward(self, initial: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Solve from `initial`; the outputs of each part, `[len(t), *shape]`. Collective."""
        stepper = self.solver.stepper
        layout = stepper.layout
        outputs = tuple(torch.empty((len(self.grid.outputs), *shape), dtype=layout.dtype) for shape in layout.shapes)

        def reached(step: int) -> None:
            number = self.grid.outputs.get(step)
            if number is not None:
                for output, part in zip(outputs, layout.parts(stepper.state), strict=True):
                    output[number].copy_(part)
            last = min(step, self.grid.steps - 1)
            size = self.grid.sizes[last]
            stepper.monitor(step, self.grid.starts[last] + (step - last) * size, size)

        self.release()
        self.initial = tuple(part.detach() for part in initial)
        stepper.bind(self.problem)
        stepper.set_state(initial)
        if self.grid.steps == 0:
            for output, part in zip(outputs, initial, strict=True):
                output[0].copy_(part)
            return outputs
        reached(0)
        if self.keeps_trajectory:
            slots = self.slots = self._plan(initial)
            self.actions = with_graphs(self.grid.steps, slots.graphs, slots.ram, slots.disk)
            run_forward(self.actions, self, self.checkpoints, self.statistics, reached)
            self.statistics.graph_steps = slots.graphs
            self.statistics.graph_bytes = slots.graphs * (self.solver.graph_bytes or 0)
        else:
            for step in range(self.grid.steps):
                self.advance(step)
                self.statistics.forward_steps += 1
                reached(step + 1)
        self._count()
        return outputs

    def _lost(self, error: str | None) -> bool:
        """Whether some rank lost a checkpoint on disk; warns of it, or raises if that was asked for. Collective."""
        comm = self.solver.stepper.comm
        if not comm.allreduce(error is not None, MPI.LOR):
            return False
        errors = [f"rank {rank}: {text}" for rank, text in enumerate(comm.allgather(error)) if text is not None]
        if self.solver.trajectory.on_spill_error == "raise":
            raise SpillError(f"trajectory: {errors[0]}")
        if comm.rank == 0:
            warnings.warn(
                f"trajectory: {errors[0]}; going on without checkpoints on disk", RuntimeWarning, stacklevel=2
            )
        return True

    def _plan(self, initial: tuple[torch.Tensor, ...]) -> Slots:
        """What to keep. The same on all ranks: it follows from figures that they have agreed on. Collective."""
        trajectory, stepper = self.solver.trajectory, self.solver.stepper
        if self.solver.disk_is_lost:
            self.slots = replace(self.slots, disk=0)
        if self.grid.steps == 1 or not trajectory.keeps_graphs:
            return self.slots
        if self.solver.graph_bytes is None:
            recording: Recording = []
            with _saved_bytes(self.problem.constants) as saved:
                stepper.step(0, self.grid.starts[0], self.grid.sizes[0], recording, isolate=True)
            held = (tensor for graph in recording if graph for tensor in (*graph.inputs, *graph.outputs))
            saved.update((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()) for tensor in held)
            self.first_step = (stepper.state_array.copy(), recording)
            self.solver.graph_bytes = stepper.comm.allreduce(sum(saved.values()), MPI.MAX)
            stepper.set_state(initial)
        return divide(trajectory, self.slots, self.grid.steps, self.solver.graph_bytes)

    def backward(
        self, cotangents: Sequence[torch.Tensor | None]
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """The gradient with respect to the initial parts and to the parameters, on this rank. Collective."""
        stepper = self.solver.stepper
        layout = stepper.layout
        stepper.bind(self.problem)
        adjoint = layout.parts(stepper.adjoint)
        stepper.adjoint.zero_()
        stepper.parameter_gradient.zero_()

        def reversed_to(step: int) -> None:
            number = self.grid.outputs.get(step)
            if number is not None:
                for part, cotangent in zip(adjoint, cotangents, strict=True):
                    if cotangent is not None:
                        part.add_(cotangent[number])
                stepper.touched()

        reversed_to(self.grid.steps)
        if self.grid.steps > 0:
            with _hooks_aside(self.problem.parameters.tensors):
                disk_is_lost = run_backward(
                    self.actions, self, self.checkpoints, self.statistics, reversed_to, self._lost, self.slots.ram
                )
            self.solver.disk_is_lost = self.solver.disk_is_lost or disk_is_lost
        self._count()
        states = tuple(part.to(layout.dtype, copy=True) for part in adjoint)
        sizes = [parameter.numel() for parameter in self.problem.parameters.tensors]
        parameters = tuple(
            piece.view(parameter.shape).to(parameter.dtype, copy=True)
            for piece, parameter in zip(
                torch.split(stepper.parameter_gradient, sizes), self.problem.parameters.tensors, strict=True
            )
        )
        return states, parameters

    def release(self) -> None:
        """Give back the checkpoints and drop the graphs."""
        self.checkpoints.clear()
        self.recordings.clear()
        self.first_step = None

    def _count(self) -> None:
        self.statistics.function_evaluations = self.problem.evaluations
        self.statistics.vjps = self.problem.vjps


@contextmanager
def _saved_bytes(constants: Iterable[torch.Tensor]) -> Iterator[dict[int, int]]:
    """Count what autograd saves meanwhile: bytes by address of the storage, those of `constants` left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in constants}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        # Not the tensor itself: an operation that saves its own result would then keep itself alive.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


@contextmanager
def _hooks_aside(tensors: Iterable[torch.Tensor]) -> Iterator[None]:
    """Keep hooks on tensors from running: they are for the gradient of the whole solve, not for that of each stage."""
    hooked = [(tensor, tensor._backward_hooks) for tensor in tensors if tensor._backward_hooks]
    for tensor, _ in hooked:
        tensor._backward_hooks = None
    try:
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks
