"""Explicit Runge-Kutta steps and their discrete adjoints.

The section "One step and its adjoint" of `ExplicitStepper` holds the formulas.

The coefficients are those of PETSc's TSRK, and PETSc's options, monitors and step-size control apply. The steps
themselves are taken here, on tensors. TSStep copies each value of f into a Vec, and holds three Vecs for each stage and
one for the parameters during its whole life. Here a value of f enters the next stage as it is, and nothing is held
between solves.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch
from mpi4py import MPI
from petsc4py import PETSc
from torch.autograd.graph import GradientEdge

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.given_options import check_read, read_at_set_up
from pnode_dist.ode.methods import Method, by_petsc_name
from pnode_dist.ode.recomputation.fingerprint import fingerprint
from pnode_dist.ode.rhs.evaluation import BoundFunction, StageGraph, StageState
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.ownership import owned
from pnode_dist.ode.rhs.products import pull_back, step_cotangents, vjp
from pnode_dist.ode.segments import Segment
from pnode_dist.ode.steppers.adjoint_sums import AdjointSums, Products
from pnode_dist.ode.steppers.base import PetscOptions, Stepper, set_from_options
from pnode_dist.ode.steppers.compiled_segment import CompiledSegments, CompiledTape
from pnode_dist.ode.steppers.current_state import TensorState
from pnode_dist.ode.steppers.own_tables import register_own_tables
from pnode_dist.ode.steppers.pruning import prune
from pnode_dist.ode.steppers.tableau import tableau_of
from pnode_dist.ode.steppers.tape import Tape, stages_of
from pnode_dist.ode.steppers.tape_segment import STATE_WAS_WRITTEN, TapeSegment, combined
from pnode_dist.petsc import vectors
from pnode_dist.system.torch_internals import set_grad_enabled

Slopes = list[Parts]
"""f at the stages of a step so far, in the type of the state; empty for a stage on which the result does not depend."""


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
        self.method = by_petsc_name(ts.getRKType())
        self.tableau = tableau_of(ts)
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
        self._segment: weakref.ref[TapeSegment] | None = None
        self._autograd_sums = self._uses_segments = False
        self._may_use_segments = True
        # Pruning could differ between ranks, and then an f that communicates would deadlock.
        self._prunes = comm.size == 1 and len(layout.shapes) > 1

    def _create_ts(self, method: Method, options: PetscOptions) -> PETSc.TS:
        register_own_tables()
        ts = PETSc.TS().create(comm=self.comm)
        ts.setProblemType(PETSc.TS.ProblemType.NONLINEAR)
        ts.setType(PETSc.TS.Type.RK)
        ts.setRKType(method.petsc_name)
        unread = read_at_set_up(options)
        self.monitored = set_from_options(ts, options, unread)
        check_read(unread)
        if ts.getType() != PETSc.TS.Type.RK:
            raise ConfigurationError(
                f"ts_type = {ts.getType()!r}: must be 'rk' (choose the method by name, or its table by ts_rk_type)"
            )
        return ts

    def bind(self, bound: BoundFunction) -> None:
        """See `Stepper.bind`."""
        if bound is not self.bound:
            # Autograd sums in the types of the parameters, which must be that of the state.
            self._autograd_sums = not (self.layout.converts or bound.needs_time_gradient) and all(
                parameter.dtype is self.layout.state_dtype and parameter.device == self.layout.vec_device
                for parameter in bound.parameters.tensors
            )
            # On several ranks the graphs of a segment could lead to different exchanges.
            self._uses_segments = self._autograd_sums and self._may_use_segments and self.comm.size == 1
        self.bound = bound

    # Compiled segments

    def advance(self, segment: Segment) -> None:
        """See `Stepper.advance`."""
        if self.compiled is None:
            super().advance(segment)
            return
        self._take(self.compiled.advance(self._bound, segment, self.current.parts))

    def record(self, segment: Segment, isolate: bool, level: str) -> Tape:
        """See `Stepper.record`. A compiled segment at the level "stages" has the state before it for a tape."""
        if self.compiled is None:
            return super().record(segment, isolate, level)
        before = self.current.parts
        if level == "stages":
            self.current.share()
            self._take(self.compiled.advance(self._bound, segment, before))
            return [CompiledTape(before)]
        after, tape = self.compiled.record(self._bound, segment, before)
        self._take(after)
        return [tape]

    def pull_back(self, segment: Segment, tape: Tape) -> list[tuple[float, float]]:
        """See `Stepper.pull_back`."""
        recorded = tape[0]
        if self.compiled is None or not isinstance(recorded, CompiledTape):
            return super().pull_back(segment, tape)
        tape.clear()
        if not recorded.roots:
            recorded = self.compiled.record(self._bound, segment, recorded.start)[1]
        sums = self._sums
        states, parameters, by_times = self.compiled.pull_back(self._bound, recorded, sums.adjoint)
        sums.replace(
            [torch.zeros_like(old) if new is None else new for old, new in zip(sums.adjoint, states, strict=True)]
        )
        sums.add_to_gradient([*parameters, *((None, None) if self._bound.needs_time_gradient else ())])
        return by_times

    def _take(self, after: Parts) -> None:
        """Make the result of a segment the current state."""
        self.current.set_shared(after)
        self._store_fingerprint(after)

    @property
    def _bound(self) -> BoundFunction:
        assert self.bound is not None
        return self.bound

    # One step and its adjoint

    def step(
        self,
        number: int,
        time: float,
        size: float,
        tape: Tape | None = None,
        isolate: bool = False,
        level: str = "graph",
    ) -> None:
        """See `Stepper.step`. Collective on `comm`.

        Stage i evaluates k_i = f(t + c_i h, u + h sum_j a_ij k_j). The result is u + h sum_i b_i k_i.
        A step with a tape but without `isolate` is recomputed for its adjoint. Its result is known, and is not formed.
        """
        if tape is not None and level == "graph" and self._uses_segments:
            segment = self._record_on_segment(number, time, size, isolate)
            if segment is not None:
                tape.append(segment)
                return
        if self.fingerprints and tape is not None and not isolate:
            self._store_fingerprint(self.current.parts)
        before = torch.is_grad_enabled()
        # The context manager torch.no_grad() takes as long as a small stage.
        set_grad_enabled(False)
        self.stepping = True
        try:
            slopes: Slopes = []
            for stage, node in enumerate(self.tableau.c):
                if self.tableau.counts[stage]:
                    state = self.stage_state(stage, size, slopes, isolate)
                    slopes.append(self.slope(time + node * size, state, tape, level))
                else:
                    slopes.append(())
                    if tape is not None:
                        tape.append(None)
            if tape is None or isolate:
                self.form_result(size, slopes)
                self._store_fingerprint(self.current.parts)
            elif self.fingerprints:
                self._add_fingerprints(size, slopes)
            if tape is not None and self._prunes and level != "stages":
                del slopes
                prune(tape, self.tableau)
        finally:
            self.stepping = False
            set_grad_enabled(before)

    def stage_state(self, stage: int, size: float, slopes: Slopes, isolate: bool) -> Parts:
        """Return u + h sum_j a_ij k_j for a stage. With `isolate` no later step writes into it."""
        terms = self.tableau.stage_terms[stage]
        state = self.current.parts
        if not terms:
            # In inference mode tensors have no version, so a write by f into the state could not be detected.
            if torch.is_inference_mode_enabled():
                return tuple(part.clone() for part in state)
            if isolate:
                self.current.share()
            return state
        return combined(state, size, terms, slopes)

    def slope(self, time: float, state: Parts, tape: Tape | None, level: str) -> Parts:
        """Return f at `time` and `state`, in the type of the state. Append the stage to `tape`, if given.

        Raises `RuntimeError` if f writes into the current state, or into a state on the tape.
        """
        bound, layout = self.bound, self.layout
        assert bound is not None
        inputs = layout.inputs(state) if layout.converts else state
        reused = self._reused(state, inputs, tape is not None and level == "stages")
        versions = [part._version for part in reused]
        if tape is None:
            values = bound.value(bound.func, layout, time, inputs)
        elif level != "stages":
            graph = bound.graph(bound.func, layout, time, inputs)
            values = graph.values
            tape.append(graph if bound.needs_time_gradient else _without_values(graph))
        else:
            mark = bound.carried.mark()
            values = bound.value(bound.func, layout, time, inputs)
            # Before the fingerprint, which lends the memory to NumPy: after that every value counts as shared.
            values = values if layout.converts else owned(values)
            tape.append(bound.stage_checkpoint(time, inputs, mark, values))
        if reused and [part._version for part in reused] != versions:
            raise RuntimeError(STATE_WAS_WRITTEN)
        if layout.converts:
            values = tuple(map(layout.scalar, values))
        is_owned = tape is not None and (level != "stages" or not layout.converts)
        return values if is_owned else owned(values)

    def form_result(self, size: float, slopes: Slopes) -> None:
        """Replace the current state by the result of the step from it."""
        self.current.add([(slopes[stage], size * weight) for stage, weight in self.tableau.result_terms])

    def adjoint_step(self, number: int, time: float, size: float, tape: Tape) -> None:
        """See `Stepper.adjoint_step`. Collective on `comm`.

        Let lambda be the adjoint of the step's result and J_i the Jacobian of f at stage i. For i = s, ..., 1,
        v_i = h (b_i lambda + sum_{j > i} a_ji w_j) and w_i = J_i^T v_i. The adjoint of the state before the step is
        lambda + sum_i w_i, and (df/dtheta)^T v_i is added to the gradient with respect to the parameters. This is the
        chain rule, backward through the formulas of `step`.
        """
        bound, layout, tableau, sums = self.bound, self.layout, self.tableau, self._sums
        assert bound is not None
        if isinstance(tape[0], TapeSegment):
            self._adjoint_of_segment(number, tape[0])
            tape.clear()
            return
        stages = stages_of(tape)
        tape.clear()
        products: dict[int, Products] = {}
        self.stepping = True
        try:
            for stage in reversed(range(len(tableau.b))):
                graph = stages.pop()
                if graph is None:
                    continue
                uses = [(products[j], size * a_ji) for j, a_ji in reversed(tableau.uses[stage]) if j in products]
                cotangents = self._stage_cotangents(size * tableau.b[stage], uses)
                if isinstance(graph, StageState):
                    graph = bound.recomputed_graph(graph, bound.func, layout)
                    graph = graph if bound.needs_time_gradient else _without_values(graph)
                found = vjp(bound, graph, cotangents, sums=sums.gradient if self._autograd_sums else ())
                if layout.converts:
                    found = found._replace(states=[None if w is None else layout.scalar(w) for w in found.states])
                products[stage] = found.states
                time_products = step_cotangents(found, graph.when - time) if bound.needs_time_gradient else []
                if self._autograd_sums:
                    sums.gradient = list(found.parameters)
                else:
                    sums.add_to_gradient([*found.parameters, *time_products])
                # Free this stage's tensors before the next stage's are made.
                del graph, cotangents, found, time_products
        finally:
            self.stepping = False
        sums.add_stages(products, tableau.result_terms[0][0])

    def _stage_cotangents(self, weight: float, uses: list[tuple[Products, float]]) -> list[torch.Tensor | None]:
        """Return v_i, part by part: `weight` times the adjoint, plus the weighted products of the later stages `uses`.

        None is a part that is known to be zero.
        """
        cotangents: list[torch.Tensor | None] = []
        for number, part in enumerate(self._sums.adjoint):
            terms = [(product, h) for products, h in uses if (product := products[number]) is not None]
            if weight or not (terms or self._prunes):
                terms.append((part, weight))
            cotangent = None
            for product, coefficient in terms:
                # A fused multiply-add would round differently from autograd.
                term = torch.mul(product, coefficient)
                cotangent = term if cotangent is None else cotangent.add_(term)
            cotangents.append(cotangent)
        return cotangents

    # Details of a step

    def _add_fingerprints(self, size: float, slopes: Slopes) -> None:
        """Turn the fingerprint of the state before a step into that of its result, which is not formed."""
        assert self.fingerprint is not None
        for stage, weight in self.tableau.result_terms:
            self.fingerprint += size * weight * fingerprint(slopes[stage])

    def _reused(self, state: Parts, inputs: Parts, keeps_stage: bool) -> Parts:
        """Return the tensors that are used again after an evaluation of f, and that f must not write into.

        They are those of the current state, or of a stage that is kept on the tape.
        """
        if torch.is_inference_mode_enabled():
            return ()
        return inputs if keeps_stage else state if state is self.current.parts else ()

    # Tape segments

    def _record_on_segment(self, number: int, time: float, size: float, isolate: bool) -> TapeSegment | None:
        """Take the step from the current state on a tape segment: that of the steps before it, or a new one.

        Returns None if f's value would depend on being in one graph with earlier steps. No segments are used then, now
        and later.
        """
        bound, segment = self.bound, None if self._segment is None else self._segment()
        assert bound is not None
        if segment is None or not (isolate and segment.can_extend(number, self.current.parts)):
            self.close_segment()
            segment = TapeSegment(number, self.current.parts)
        if isolate:
            self.current.share()
        evaluations, mark = bound.evaluations, bound.carried.mark()
        self.stepping = True
        try:
            after = segment.record_step(bound, self.layout, self.tableau, time, size)
        finally:
            self.stepping = False
        if after is None:
            bound.evaluations = evaluations
            bound.carried.restore(mark)
            self.close_segment()
            self._uses_segments = self._may_use_segments = False
            return None
        self._store_fingerprint(after)
        if isolate:
            self.current.set_shared(after)
            self._segment = weakref.ref(segment)
        else:
            segment.close()
        return segment

    def close_segment(self) -> None:
        """See `Stepper.close_segment`."""
        segment, self._segment = None if self._segment is None else self._segment(), None
        if segment is not None:
            if segment.after is self.current.parts:
                self.current.unshare()
            segment.close()

    def _adjoint_of_segment(self, number: int, segment: TapeSegment) -> None:
        """Take the adjoint back over all steps of a segment at once, when its last step is reversed."""
        bound, sums = self.bound, self._sums
        assert bound is not None
        if number != segment.last:
            return
        bound.vjps += segment.evaluations
        self.stepping = True
        try:
            wanted: tuple[torch.Tensor | GradientEdge, ...] = (*segment.start, *bound.parameters.tensors)
            found = pull_back(bound, segment.roots, wanted, sums.adjoint, sums=sums.gradient)
        finally:
            self.stepping = False
        parts = len(segment.start)
        segment.free()
        sums.replace([part for part in found[:parts] if part is not None])
        sums.gradient = list(found[parts:])

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

    def end_adjoint(self, shapes: Sequence[torch.Size]) -> tuple[Parts, Sequence[torch.Tensor]]:
        """See `Stepper.end_adjoint`."""
        return self._sums.end(shapes)

    def take_time_gradients(self) -> tuple[float, float]:
        """See `Stepper.take_time_gradients`."""
        return self._sums.take_time_gradients()

    def derivative(self, time: float, direction: float) -> torch.Tensor:
        """See `Stepper.derivative`. Collective on `comm`."""
        with torch.no_grad():
            return torch.cat([part.reshape(-1) for part in self.slope(time, self.current.parts, None, "graph")])

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


def _without_values(graph: StageGraph) -> StageGraph:
    """Return the graph without its values, which first-order products do not need."""
    return StageGraph(graph.inputs, graph.roots, (), graph.when)
