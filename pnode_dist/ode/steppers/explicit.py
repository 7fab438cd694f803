"""Explicit Runge-Kutta steps and their discrete adjoints.

The tables are PETSc's (TSRK), and so are its options, monitors and step-size control. The steps are taken here, on
tensors: what f returns goes into the next stage as it is, where TSStep has f copy it into a vector of its own, and
keeps three vectors for each stage, and one of all parameters, as long as it lives. Here nothing is held between solves.
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
from pnode_dist.ode.steppers.base import PetscOptions, Stepper, set_from_options
from pnode_dist.ode.steppers.current_state import TensorState
from pnode_dist.ode.steppers.pruning import prune
from pnode_dist.ode.steppers.tableau import tableau_of
from pnode_dist.ode.steppers.tape import Tape, stages_of
from pnode_dist.ode.steppers.tape_segment import TapeSegment, combined
from pnode_dist.petsc import vectors
from pnode_dist.system.torch_internals import add_in_place, set_grad_enabled

Products = Sequence[torch.Tensor | None]
Slopes = list[Parts]
"""f at the stages of a step so far, in PETSc's scalar type; nothing for a stage on which the result does not depend."""


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
            # All that it says is known now, and a model may have many solvers.
            ts.destroy()
        self.bound: BoundFunction | None = None
        self.error: BaseException | None = None
        self._adjoint: list[torch.Tensor] = []
        self._owns_adjoint: list[bool] = []
        self._gradient: list[torch.Tensor | None] = []
        self._segment: weakref.ref[TapeSegment] | None = None
        self._autograd_sums = self._uses_segments = False
        self._may_use_segments = True
        self._owns_gradient = False
        # Whether another rank finds the same is not known where f communicates.
        self._prunes = comm.size == 1 and len(layout.shapes) > 1
        self._parameters = len(parameter_sizes)

    @property
    def callbacks(self) -> ExplicitStepper:
        """Itself: PETSc calls nothing but attempts of steps, which tell it their errors."""
        return self

    def end_step(self) -> None:
        """See `Callbacks.end_step`: nothing is held between steps."""

    def bind(self, bound: BoundFunction) -> None:
        """Solve this problem from now on."""
        if bound is not self.bound:
            # Autograd sums up in the types of the parameters.
            self._autograd_sums = not (self.layout.converts or bound.needs_time_gradient) and all(
                parameter.dtype is vectors.scalar_dtype() and parameter.device == self.layout.vec_device
                for parameter in bound.parameters.tensors
            )
            # Whether other ranks' graphs lead to the same exchanges is not known.
            self._uses_segments = self._autograd_sums and self._may_use_segments and self.comm.size == 1
        self.bound = bound

    def destroy(self) -> None:
        """See `Stepper.destroy`: there is something to destroy only where PETSc's monitors are asked for."""
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

    def _create_ts(self, method: Method, options: PetscOptions) -> PETSc.TS:
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

        A recording that is not to survive is that of a step which is run again for its adjoint: its result is known,
        and is not formed.
        """
        if tape is not None and level == "graph" and self._uses_segments:
            segment = self._record_on_segment(number, time, size, isolate)
            if segment is not None:
                tape.append(segment)
                return
        if self.fingerprints and tape is not None and not isolate:
            self._store_fingerprint(self.current.parts)
        before = torch.is_grad_enabled()
        # As a context this takes as long as a small stage.
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
                assert self.fingerprint is not None
                for stage, weight in self.tableau.result_terms:
                    self.fingerprint += size * weight * fingerprint(slopes[stage])
            if tape is not None and self._prunes and level != "stages":
                del slopes
                prune(tape, self.tableau)
        finally:
            self.stepping = False
            set_grad_enabled(before)

    def _record_on_segment(self, number: int, time: float, size: float, isolate: bool) -> TapeSegment | None:
        """The graph of the step from the current state, or that of the steps before it, which it is joined to.

        None where f's value would depend on that, now and from now on.
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

    def stage_state(self, stage: int, size: float, slopes: Slopes, isolate: bool) -> Parts:
        """The state at a stage of the step from the current state; with `isolate` nothing will be written into it."""
        terms = self.tableau.stage_terms[stage]
        state = self.current.parts
        if not terms:
            # In inference mode there is no telling whether f writes into the state.
            if torch.is_inference_mode_enabled():
                return tuple(part.clone() for part in state)
            if isolate:
                self.current.share()
            return state
        return combined(state, size, terms, slopes)

    def slope(self, time: float, state: Parts, tape: Tape | None, level: str) -> Parts:
        """f there, in PETSc's scalar type; to `tape`, if given, goes what the adjoint needs of it.

        Raises `RuntimeError` if f writes into the current state, or into one that is recorded.
        """
        bound, layout = self.bound, self.layout
        assert bound is not None
        inputs = layout.inputs(state) if layout.converts else state
        # These are to be used again: the current state, and what is recorded of a stage.
        staying: Parts = state if state is self.current.parts else ()
        if tape is not None and level == "stages":
            staying = inputs
        if staying and torch.is_inference_mode_enabled():
            staying = ()
        versions = [part._version for part in staying]
        if tape is None:
            values = bound.value(bound.func, layout, time, inputs)
        elif level != "stages":
            graph = bound.graph(bound.func, layout, time, inputs)
            values = graph.values
            tape.append(graph if bound.needs_time_gradient else _without_values(graph))
        else:
            mark = bound.carried.mark()
            values = bound.value(bound.func, layout, time, inputs)
            tape.append(bound.stage_checkpoint(time, inputs, mark, values))
        if staying and [part._version for part in staying] != versions:
            raise RuntimeError(
                "func changed its state u by an in-place operation: it must return du/dt and leave u alone"
            )
        if layout.converts:
            values = tuple(map(layout.scalar, values))
        if tape is not None and level != "stages":
            return values
        return owned(values)

    def form_result(self, size: float, slopes: Slopes) -> None:
        """Put the result of the step from the current state in its place."""
        self.current.add([(slopes[stage], size * weight) for stage, weight in self.tableau.result_terms])

    def derivative(self, time: float, direction: float) -> torch.Tensor:
        """See `Stepper.derivative`. Collective on `comm`."""
        with torch.no_grad():
            return torch.cat([part.reshape(-1) for part in self.slope(time, self.current.parts, None, "graph")])

    def start_adjoint(self) -> None:
        """See `Stepper.start_adjoint`."""
        self._adjoint, self._owns_adjoint = [], []
        self._gradient, self._owns_gradient = [None] * self._parameters, False

    def add_to_adjoint(self, parts: Sequence[torch.Tensor | None]) -> None:
        """See `Stepper.add_to_adjoint`. The first are the adjoint from then on, and are not copied."""
        layout = self.layout
        given = [None if part is None else layout.scalar(part) for part in parts]
        if self._adjoint:
            self._add(given)
            return
        dtype, device = vectors.scalar_dtype(), layout.vec_device
        self._adjoint = [
            torch.zeros(shape, dtype=dtype, device=device) if part is None else part
            for part, shape in zip(given, layout.shapes, strict=True)
        ]
        self._owns_adjoint = [part is None for part in given]

    def _add(self, products: Products) -> None:
        for number, product in enumerate(products):
            if product is not None:
                self._add_part(number, product)

    def _add_part(self, number: int, product: torch.Tensor) -> None:
        if self._owns_adjoint[number]:
            self._adjoint[number].add_(product)
        else:
            self._adjoint[number] = self._adjoint[number] + product
            self._owns_adjoint[number] = True

    def end_adjoint(self, shapes: Sequence[torch.Size]) -> tuple[Parts, Sequence[torch.Tensor]]:
        """See `Stepper.end_adjoint`: nothing of them is kept."""
        dtype, device = vectors.scalar_dtype(), self.layout.vec_device
        adjoint = tuple(self._adjoint)
        gradient = [
            torch.zeros(shape, dtype=dtype, device=device) if part is None else part
            for part, shape in zip(self._gradient, shapes, strict=False)
        ]
        self._adjoint, self._gradient = [], []
        return adjoint, gradient

    def take_time_gradients(self) -> tuple[float, float]:
        """See `Stepper.take_time_gradients`."""
        first, second = (0.0 if part is None else part.item() for part in self._gradient[-2:])
        self._gradient[-2:], self._owns_gradient = (None, None), False
        return first, second

    def adjoint_step(self, number: int, time: float, size: float, tape: Tape) -> None:
        """See `Stepper.adjoint_step`. Collective on `comm`.

        With lambda the adjoint of the step's result and J_i the Jacobian of f at stage i, for i = s, ..., 1
        v_i = h (b_i lambda + sum_{j > i} a_ji w_j) and w_i = J_i^T v_i; the adjoint of the state before the step is
        lambda + sum_i w_i, and the gradient by the parameters grows by (df/dtheta)^T v_i: the chain rule, backward
        through the formulas of `Tableau`.
        """
        bound, layout, tableau = self.bound, self.layout, self.tableau
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
                uses = [
                    (products[later], size * weight)
                    for later, weight in reversed(tableau.uses[stage])
                    if later in products
                ]
                cotangents = self._cotangents(size * tableau.b[stage], uses)
                if isinstance(graph, StageState):
                    graph = bound.recomputed_graph(graph, bound.func, layout)
                    graph = graph if bound.needs_time_gradient else _without_values(graph)
                found = vjp(bound, graph, cotangents, sums=self._gradient if self._autograd_sums else ())
                if layout.converts:
                    found = found._replace(states=[None if w is None else layout.scalar(w) for w in found.states])
                products[stage] = found.states
                time_products = step_cotangents(found, graph.when - time) if bound.needs_time_gradient else []
                if self._autograd_sums:
                    self._gradient = list(found.parameters)
                else:
                    self._add_to_gradient([*found.parameters, *time_products])
                # Not to be held while the next stage's are made.
                del graph, cotangents, found, time_products
        finally:
            self.stepping = False
        self._add_products(products)

    def _add_products(self, products: dict[int, Products]) -> None:
        """Add the stages' products to the adjoint, in the order that a pass over the step's graph has.

        There the adjoint of the result arrives once the stages after the first one with a weight are done.
        """
        first = self.tableau.result_terms[0][0]
        for number in range(len(self._adjoint)):
            found = [(stage, product) for stage, parts in products.items() if (product := parts[number]) is not None]
            later = [product for stage, product in found if stage > first]
            if later:
                total = later[0] if len(later) == 1 else later[0] + later[1]
                for product in later[2:]:
                    total.add_(product)
                self._add_part(number, total)
            for stage, product in found:
                if stage <= first:
                    self._add_part(number, product)

    def _adjoint_of_segment(self, number: int, segment: TapeSegment) -> None:
        """Take the adjoint back over the steps that end with this one; those before it are then done."""
        bound = self.bound
        assert bound is not None
        if number != segment.last:
            return
        bound.vjps += segment.evaluations
        self.stepping = True
        try:
            wanted: tuple[torch.Tensor | GradientEdge, ...] = (*segment.start, *bound.parameters.tensors)
            found = pull_back(bound, segment.roots, wanted, self._adjoint, sums=self._gradient)
        finally:
            self.stepping = False
        parts = len(segment.start)
        segment.free()
        self._adjoint, self._owns_adjoint = [part for part in found[:parts] if part is not None], [False] * parts
        self._gradient = list(found[parts:])

    def _cotangents(self, weight: float, uses: list[tuple[Products, float]]) -> list[torch.Tensor | None]:
        """`weight` times the adjoint and what the later stages add, part by part; None where it is known to be zero."""
        cotangents: list[torch.Tensor | None] = []
        for number, part in enumerate(self._adjoint):
            terms = [(product, h) for products, h in uses if (product := products[number]) is not None]
            if weight or not (terms or self._prunes):
                terms.append((part, weight))
            cotangent = None
            for product, coefficient in terms:
                # In one operation the product would not be rounded as autograd rounds it.
                term = torch.mul(product, coefficient)
                cotangent = term if cotangent is None else cotangent.add_(term)
            cotangents.append(cotangent)
        return cotangents

    def _add_to_gradient(self, products: Products) -> None:
        """Add them, one for each parameter. What autograd returned may be in use elsewhere, and is not written into."""
        if not products:
            return
        layout, gradient = self.layout, self._gradient
        every = all(product is not None for product in products)
        if every and self._owns_gradient:
            if layout.device != layout.vec_device:
                products = [layout.scalar(product) for product in products if product is not None]
            add_in_place(gradient, products)  # type: ignore[arg-type]
            return
        # What a sum is put in is ours.
        self._owns_gradient = every and all(old is not None for old in gradient)
        for number, (old, product) in enumerate(zip(gradient, products, strict=True)):
            if product is not None:
                # Parameters may be of a narrower type than the state.
                new = layout.scalar(product)
                gradient[number] = new if old is None else old + new


def _without_values(graph: StageGraph) -> StageGraph:
    """What products of first order need of it."""
    return StageGraph(graph.inputs, graph.roots, (), graph.when)
