"""The stepper of explicit Runge-Kutta methods: its set-up, and the choice of the tape of a segment.

`explicit_step` has the formulas of a step and of its adjoint.

The coefficients are those of PETSc's TSRK, and PETSc's options, monitors and step-size control apply. The steps
themselves are taken here, on tensors. TSStep copies each value of f into a Vec, and holds three Vecs for each stage and
one for the parameters during its whole life. Here a value of f enters the next stage as it is, and nothing is held
between solves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from mpi4py import MPI
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.given_options import check_read, read_at_set_up
from pnode_dist.ode.methods import Method, by_petsc_name
from pnode_dist.ode.rhs.evaluation import BoundFunction, StageGraph, StageState
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.segments import Segment
from pnode_dist.ode.steppers.adjoint_sums import AdjointSums
from pnode_dist.ode.steppers.base import PetscOptions, Stepper, set_from_options
from pnode_dist.ode.steppers.compiled_segment import CompiledSegments, CompiledTape
from pnode_dist.ode.steppers.current_state import TensorState
from pnode_dist.ode.steppers.explicit_step import Scheme, take_step
from pnode_dist.ode.steppers.graph_tape import CannotJoinError, GraphTape, pull_back_graph, record_graph
from pnode_dist.ode.steppers.own_tables import register_own_tables
from pnode_dist.ode.steppers.stage_tape import ByStage, pull_back_stages, record_stages
from pnode_dist.ode.steppers.tableau import Tableau, tableau_of
from pnode_dist.ode.steppers.tape import Tape
from pnode_dist.petsc import vectors
from pnode_dist.system.torch_internals import set_grad_enabled


class ExplicitStepper(Stepper):
    """A stepper of the family `rk`. Collective on `comm`.

    `options` are PETSc options (without the leading dash) for this solver, on top of those on the command line.
    Raises `ConfigurationError` if they choose a type other than an explicit Runge-Kutta method of the table.
    """

    current: TensorState

    def __init__(
        self,
        comm: MPI.Comm,
        layout: StateLayout,
        method: Method,
        parameter_sizes: tuple[int, ...],
        options: PetscOptions,
    ) -> None:
        super().__init__(comm, layout)
        self.current = TensorState(layout)
        ts = self._create_ts(method, options)
        self.method, self.scheme = self._scheme(ts, method)
        self._ts: PETSc.TS | None = None
        self._vec: PETSc.Vec | None = None
        if self.monitored:
            self._ts, self._vec = ts, vectors.create_vec(comm, layout.size, layout.vec_device)
        else:
            # The TS has served its purpose, and a model may have many solvers.
            ts.destroy()
        self.bound: BoundFunction | None = None
        self.error: BaseException | None = None
        self.compiled: CompiledSegments | None = None
        self._sums = AdjointSums(layout, len(parameter_sizes))
        self._can_join, self._may_join = False, True

    def _create_ts(self, method: Method, options: PetscOptions) -> PETSc.TS:
        register_own_tables()
        ts = PETSc.TS().create(comm=self.comm)
        ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
        ts.setType(PETSc.TS.Type.RK)
        if method.petsc_name:
            ts.setRKType(method.petsc_name)
        unread = read_at_set_up(options)
        self.monitored = set_from_options(ts, options, unread)
        check_read(unread)
        if ts.getType() != PETSc.TS.Type.RK:
            raise ConfigurationError(
                f"ts_type = {ts.getType()!r}: must be 'rk' (choose the method by name, or its table by ts_rk_type)"
            )
        return ts

    def _scheme(self, ts: PETSc.TS, method: Method) -> tuple[Method, Scheme]:
        """Return the method and its coefficients after the options of `ts` were set: they may choose another table."""
        return by_petsc_name(ts.getRKType()), tableau_of(ts)

    @property
    def tableau(self) -> Tableau:
        """The coefficients of a Runge-Kutta method."""
        assert isinstance(self.scheme, Tableau)
        return self.scheme

    def bind(self, bound: BoundFunction) -> None:
        """See `Stepper.bind`."""
        if bound is not self.bound:
            # Autograd sums in the types of the parameters, which must be that of the state. On several ranks the graph
            # of several stages could lead to different exchanges.
            self._can_join = (
                self.comm.size == 1
                and not (self.layout.converts or bound.needs_time_gradient)
                and all(
                    parameter.dtype is self.layout.state_dtype and parameter.device == self.layout.vec_device
                    for parameter in bound.parameters.tensors
                )
            )
        self.bound = bound

    def runs_compiled(self, segment: Segment) -> bool:
        """Return True if compiled code may take these steps: it evaluates f at jumps too, on no certain side."""
        interval, dtype = self.bound_function.smooth_interval, self.layout.compute_dtype
        end = segment.starts[-1] + segment.sizes[-1]
        return interval is None or (interval.holds(segment.starts[0], dtype) and interval.holds(end, dtype))

    def maps(self, segment: Segment) -> bool:
        """See `Stepper.maps`: compiled segments contain the map, compiled attempts do not."""
        return self.compiled is not None and self.compiled.maps and self.runs_compiled(segment)

    @property
    def joins(self) -> bool:
        """True if the steps of a segment are recorded as one graph, False if each of their stages is."""
        return self._may_join and self._can_join

    def stop_joining(self) -> None:
        """Record by stages from now on, because f differentiates through its state (`CannotJoinError`)."""
        self._may_join = False

    def advance(self, segment: Segment) -> None:
        """See `Stepper.advance`."""
        state = self.current.parts
        self.stepping = True
        try:
            if self.compiled is not None and self.runs_compiled(segment):
                state = self.compiled.advance(self.bound_function, segment, state)
            else:
                state = self._without_tape(segment, state)
        finally:
            self.stepping = False
        self.current.replace(state, shared=False)
        self._store_fingerprint(state)

    def _without_tape(self, segment: Segment, state: Parts) -> Parts:
        evaluate, before = ByStage(self.bound_function, self.layout, None), torch.is_grad_enabled()
        # The context manager torch.no_grad() takes as long as a small stage.
        set_grad_enabled(False)
        try:
            for time, size in zip(segment.starts, segment.sizes, strict=True):
                state = take_step(self.scheme, time, size, state, evaluate)
        finally:
            set_grad_enabled(before)
        return state

    def record(self, segment: Segment, level: str) -> Tape:
        """See `Stepper.record`. A compiled segment at the level "stages" has the state before it for a tape."""
        self.stepping = True
        try:
            after, tape = self._with_tape(segment, self.current.parts, level)
        finally:
            self.stepping = False
        self.current.replace(after, shared=True)
        self._store_fingerprint(after)
        return tape

    def _with_tape(self, segment: Segment, before: Parts, level: str) -> tuple[Parts, Tape]:
        bound, layout = self.bound_function, self.layout
        if self.compiled is not None and self.runs_compiled(segment):
            if level == "stages":
                return self.compiled.advance(bound, segment, before), [CompiledTape(before)]
            after, compiled = self.compiled.record(bound, segment, before)
            return after, [compiled]
        if level == "graph" and self.joins:
            evaluations, mark = bound.evaluations, bound.carried.mark()
            try:
                after, graph = record_graph(bound, layout, self.scheme, segment, before)
            except CannotJoinError:
                bound.evaluations = evaluations
                bound.carried.restore(mark)
                self.stop_joining()
            else:
                return after, [graph]
        after, stages = record_stages(bound, layout, self.scheme, segment, before, level)
        return after, [*stages]

    def pull_back(self, segment: Segment, tape: Tape) -> list[tuple[float, float]]:
        """See `Stepper.pull_back`."""
        bound, sums, recorded = self.bound_function, self._sums, tape[0]
        self.stepping = True
        try:
            stages = [stage for stage in tape if isinstance(stage, StageGraph | StageState)]
            tape.clear()
            if isinstance(recorded, GraphTape):
                pull_back_graph(bound, recorded, sums)
                return []
            if isinstance(recorded, CompiledTape):
                return self._pull_back_compiled(segment, recorded)
            return pull_back_stages(bound, self.layout, self.scheme, segment, stages, sums)
        finally:
            self.stepping = False

    def _pull_back_compiled(self, segment: Segment, tape: CompiledTape) -> list[tuple[float, float]]:
        bound, sums, compiled = self.bound_function, self._sums, self.compiled
        assert compiled is not None
        if not tape.roots:
            tape = compiled.record(bound, segment, tape.start)[1]
        states, parameters, by_times = compiled.pull_back(bound, tape, sums.adjoint)
        sums.adjoint = [
            torch.zeros_like(old) if new is None else new for old, new in zip(sums.adjoint, states, strict=True)
        ]
        sums.add_to_gradient([*parameters, *((None, None) if bound.needs_time_gradient else ())])
        return by_times

    @property
    def bound_function(self) -> BoundFunction:
        """The right-hand side of the present solve."""
        assert self.bound is not None
        return self.bound

    # The rest of the interface of `Stepper`

    @property
    def callbacks(self) -> ExplicitStepper:
        """The stepper itself. PETSc calls f only in attempts of steps, which store its errors here."""
        return self

    def end_step(self) -> None:
        """See `Callbacks.end_step`: nothing is held between steps."""

    def start_adjoint(self) -> None:
        """See `Stepper.start_adjoint`."""
        self._sums.start()

    def add_to_adjoint(self, parts: Sequence[torch.Tensor | None]) -> None:
        """See `Stepper.add_to_adjoint`. The first parts become the adjoint without a copy."""
        self._sums.add_to_adjoint(parts)

    def change_adjoint(self, change: Callable[[Sequence[torch.Tensor]], Parts]) -> None:
        """See `Stepper.change_adjoint`."""
        self._sums.adjoint = list(change(self._sums.adjoint))

    def end_adjoint(self, shapes: Sequence[torch.Size]) -> tuple[Parts, Sequence[torch.Tensor]]:
        """See `Stepper.end_adjoint`."""
        return self._sums.end(shapes)

    def derivative(self, time: float, direction: float) -> torch.Tensor:
        """See `Stepper.derivative`. Collective on `comm`."""
        with torch.no_grad():
            return torch.cat([part.reshape(-1) for part in self.evaluate(time, self.current.parts)])

    def evaluate(self, time: float, state: Parts) -> Parts:
        """Return f at `time` and `state`, in the type of the state, without a graph. Collective on `comm`."""
        return ByStage(self.bound_function, self.layout, None)(time, state)

    def destroy(self) -> None:
        """See `Stepper.destroy`. PETSc objects exist only if PETSc's monitors are used."""
        for thing in (self._ts, self._vec):
            if thing is not None:
                thing.destroy()

    @property
    def _petsc(self) -> PETSc.TS:
        assert self._ts is not None
        return self._ts

    def _solution(self) -> PETSc.Vec:
        assert self._vec is not None
        vectors.fill(self._vec, self.current.flat, self.layout.vec_device)
        return self._vec
