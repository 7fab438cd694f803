"""A stepper with the checkpoint slots that its solves share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from mpi4py import MPI

from pnode_dist.checkpointing.budget import CheckpointBudget, Slots
from pnode_dist.checkpointing.costs import Costs
from pnode_dist.checkpointing.plan import Plans, best
from pnode_dist.checkpointing.schedule import Tier
from pnode_dist.checkpointing.spill import SpillPool
from pnode_dist.checkpointing.store import MemoryPool, SlotPool
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode import methods
from pnode_dist.ode.methods import Method
from pnode_dist.ode.recomputation.carried import KnownTensors
from pnode_dist.ode.rhs.layout import StateLayout
from pnode_dist.ode.rhs.mass import Mass, copy_of_tensors, mass_matrix
from pnode_dist.ode.rhs.split import MatrixFunction
from pnode_dist.ode.solver_key import Contents
from pnode_dist.ode.steppers.adaptive import AdaptiveStepper, ExplicitAttempts
from pnode_dist.ode.steppers.adaptive_implicit import ImplicitAttempts
from pnode_dist.ode.steppers.base import PetscOptions, Stepper
from pnode_dist.ode.steppers.batched import BatchedStepper
from pnode_dist.ode.steppers.batched_samples import split_of
from pnode_dist.ode.steppers.embedded import EmbeddedAttempts
from pnode_dist.ode.steppers.explicit import ExplicitStepper
from pnode_dist.ode.steppers.implicit import ImplicitStepper
from pnode_dist.ode.steppers.irk.stepper import IrkStepper
from pnode_dist.ode.steppers.preconditioner import Preconditioner
from pnode_dist.ode.steppers.ssp import SspStepper
from pnode_dist.ode.steppers.symplectic import SymplecticStepper
from pnode_dist.ode.steppers.tolerances import ErrorControl
from pnode_dist.partition.protocol import Partition
from pnode_dist.petsc.objects import PetscObjects, destroy_left


def communicator(partition: Partition | None) -> MPI.Comm:
    """Return the communicator of the ranks that share a state: that of its partition, or this rank alone.

    Raises `ConfigurationError` for anything but a partition.
    """
    if partition is not None and not isinstance(getattr(partition, "comm", None), MPI.Comm):
        raise ConfigurationError(f"partition = {partition!r}: must be a partition of pnode_dist, or None")
    return MPI.COMM_SELF if partition is None else partition.comm


_SOLVES_BETWEEN_CHECKS = 50
_MOST_PLANS = 16


@dataclass
class Solver:
    """A stepper with the checkpoint slots that its solves share, on the ranks of `partition`.

    `tape_bytes` is the memory of one step's tape on the rank with the largest one, and `costs` are the measurements of
    the probe; both are None until they are measured. `disk_is_lost`: the disk has failed on some rank, and later solves
    do not use it. `has_spilt`: the disk worked for an earlier solve. `solves` counts the solves begun. `plans` caches
    the plans that depend on the slots, the number of steps and `tape_bytes` alone. `contents` are those of the objects
    that the solver was made of; None if they have no contents that can change.

    `kept`: a cache keeps the solver for further solves. Otherwise it is closed at the end of a solve, and
    `make_stepper` makes the stepper again for a second backward pass. Collective.
    """

    stepper: Stepper
    options: PetscOptions
    memory: MemoryPool
    pools: dict[Tier, SlotPool]
    partition: Partition | None
    trajectory: CheckpointBudget
    make_stepper: Callable[[], Stepper]
    tape_bytes: int | None = None
    costs: Costs | None = None
    disk_is_lost: bool = False
    has_spilt: bool = False
    solves: int = 0
    known: KnownTensors = field(default_factory=KnownTensors)
    plans: dict[tuple[Slots, int, int, int, int], Plans] = field(default_factory=dict)
    adaptive: dict[str, AdaptiveStepper] = field(default_factory=dict)
    contents: Contents | None = None
    kept: bool = False
    objects: PetscObjects = field(init=False)

    @classmethod
    def create(
        cls,
        partition: Partition | None,
        layout: StateLayout,
        method: Method,
        parameter_sizes: tuple[int, ...],
        options: PetscOptions,
        trajectory: CheckpointBudget,
        mass: Mass | None = None,
        preconditioner: Preconditioner | None = None,
        linear: MatrixFunction | None = None,
        newton: str = "petsc",
        only_batch: bool = False,
    ) -> Solver:
        """Create a stepper with empty pools. Collective on the partition's communicator.

        `newton` is "batch" or "petsc", see `chosen_newton`. `only_batch`: PETSc must not take the place of "batch".
        """
        comm = communicator(partition)
        # A copy: a stepper that is made again for a backward pass needs the mass matrix of the forward pass.
        mass = copy_of_tensors(mass)

        def make_stepper() -> Stepper:
            destroy_left(comm)
            if method.family == "ssp":
                return SspStepper(comm, layout, method, options)
            if method.family == "symplectic":
                return SymplecticStepper(comm, layout, method, parameter_sizes, options)
            if method.family == "rk":
                return ExplicitStepper(comm, layout, method, parameter_sizes, options)
            matrix = mass_matrix(mass, layout)

            def by_petsc() -> ImplicitStepper | IrkStepper:
                if method.family == "irk":
                    return IrkStepper(comm, layout, method, parameter_sizes, options, partition, matrix, preconditioner)
                return ImplicitStepper(
                    comm, layout, method, parameter_sizes, options, partition, matrix, preconditioner, linear
                )

            if newton == "petsc":
                return by_petsc()
            split = split_of(layout, partition)
            return BatchedStepper(comm, layout, method, parameter_sizes, options, split, matrix, by_petsc, only_batch)

        stepper = make_stepper()
        dtype = trajectory.slot_dtype(layout.numpy_dtype)
        memory = MemoryPool(layout.size, dtype)
        trajectory.ledger.pools.add(memory)
        pools: dict[Tier, SlotPool] = {Tier.RAM: memory}
        if trajectory.has_disk:
            pools[Tier.DISK] = SpillPool(layout.size, dtype, trajectory.scratch, comm.rank, layout.shapes)
        return cls(stepper, options, memory, pools, partition, trajectory, make_stepper)

    def __post_init__(self) -> None:
        self.objects = PetscObjects(self.stepper.comm)
        self.objects.add(self.stepper)

    def __del__(self, at_exit: Callable[[], bool] = sys.is_finalizing) -> None:
        """Leave the PETSc objects to be destroyed together with those of the other ranks."""
        if not at_exit() and hasattr(self, "objects"):
            self.objects.leave()

    def open(self) -> None:
        """Make the stepper again if it was destroyed, or ended with an error. Collective."""
        self.objects.keep()
        if self.stepper.failed:
            self.close()
        if self.objects.are_destroyed:
            self.adaptive.clear()
            self.stepper = self.make_stepper()
            self.objects.add(self.stepper)

    def close(self) -> None:
        """Destroy all PETSc objects. `open` makes them again. Collective."""
        self.objects.destroy()

    def done(self) -> None:
        """End the last pass of a solve. Closes the solver unless a cache keeps it. Collective."""
        if not self.kept:
            self.close()

    def abandon(self) -> None:
        """End a solve that raised, or whose graph was dropped. Not collective: other ranks may go on."""
        if not self.kept:
            self.objects.leave()

    def drop(self) -> None:
        """Remove the solver from its cache. A solve that is still running closes it at its end. Collective."""
        self.kept = False
        if not self.stepper.stepping:
            self.close()

    def planned(self, slots: Slots, steps: int, tape_bytes: int, segment: int, units: int) -> Plans:
        """Return the best plan that needs no costs, see `plan.best`. Cached: a model repeats a few solves."""
        key = slots, steps, tape_bytes, segment, units
        if key not in self.plans:
            if len(self.plans) == _MOST_PLANS:
                self.plans.clear()
            self.plans[key] = best(self.trajectory, slots, steps, tape_bytes, None, segment, units)
        return self.plans[key]

    def checks_parameters(self) -> bool:
        """Count a solve. Returns True if it should check a module's graph for unnamed parameters."""
        self.solves += 1
        return self.solves % _SOLVES_BETWEEN_CHECKS == 1

    def gradient_refusal(self) -> str | None:
        """Return the error message for a gradient of the stepper's steps, or None if they have an adjoint."""
        return None if isinstance(self.stepper, BatchedStepper) else methods.gradient_refusal(self.stepper.method)

    @property
    def checkpoint_bytes(self) -> int:
        """The size of a checkpoint on this rank."""
        layout = self.stepper.layout
        return layout.size * self.trajectory.slot_dtype(layout.numpy_dtype).itemsize

    def adaptive_stepper(self, control: ErrorControl) -> AdaptiveStepper:
        """Return the stepper with error control, which is made at the first call. Collective."""
        kind = "rule" if self._chooses_sizes(control) else control.adaptor
        if kind not in self.adaptive:
            self.adaptive[kind] = made = self._attempts(control)
            self.objects.add(made)
        return self.adaptive[kind]

    def _chooses_sizes(self, control: ErrorControl) -> bool:
        """Return True if PETSc's adaptors take no part. Raises `ConfigurationError` if one was asked for that cannot.

        They combine no two error estimates. Fully implicit methods have none.
        """
        stepper = self.stepper
        if stepper.method.family == "irk":
            raise ConfigurationError(
                f"method = {stepper.method.name!r}: has no error estimate to adapt steps to (rtol, atol): give "
                "step_size, or use kvaerno5, kvaerno4 or dirk_es648sa"
            )
        if control.rule is not None and not isinstance(stepper, ExplicitStepper) and control.adaptor == "pid":
            raise ConfigurationError(
                f"adaptor = 'pid': PETSc chooses the steps of method = {stepper.method.name!r}: must be basic or dsp"
            )
        if control.rule is not None:
            return True
        two = isinstance(stepper, ExplicitStepper) and bool(stepper.scheme.second_error_terms)
        if two and control.adaptor == "dsp":
            raise ConfigurationError(
                f"adaptor = 'dsp': method = {stepper.method.name!r} has two error estimates, which PETSc's adaptors "
                "cannot combine: must be basic or pid"
            )
        return two

    def _attempts(self, control: ErrorControl) -> AdaptiveStepper:
        stepper = self.stepper
        if self._chooses_sizes(control):
            return EmbeddedAttempts(stepper, self.options)
        if isinstance(stepper, ImplicitStepper):
            return ImplicitAttempts(stepper, control.adaptor, self.options)
        return ExplicitAttempts(stepper, control.adaptor, self.options)
