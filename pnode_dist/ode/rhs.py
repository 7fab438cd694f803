"""The right-hand side f(t, u; theta) as PETSc's explicit steppers call it: on Vecs, forward and transposed.

While a step is recorded, f runs with gradients on and the graph of every stage is kept, or the states of the stages
alone, on which f is evaluated again. The step's adjoint then asks for J^T v of the stages, last one first, and each
vector-Jacobian product serves the state and the parameters at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from petsc4py import PETSc

from pnode_dist.ode.evaluation import Cotangents, Problem, Recording, Stage, StageState
from pnode_dist.ode.layout import Parts, StateLayout
from pnode_dist.partition import protocol


class RightHandSide:
    """PETSc's callbacks for one layout. Holds no reference to a TS: PETSc's own references could not be collected.

    `direction` is -1 when time decreases and PETSc integrates -f over -t (see `Stepper.step`). Where the gradient by
    the times is asked for, two more parameters than the problem has come last (see `by_step`).
    `skipped_stage` is the stage that is not evaluated because its weight is zero (see `Method`), or None; `fsal` says
    whether PETSc's adjoint leaves that stage out as well, `last_index` is the last stage's. `last_stage` is the state
    of the last stage that was formed, flat.
    """

    def __init__(self, layout: StateLayout, parameter_sizes: tuple[int, ...]) -> None:
        self._layout = layout
        self._parameter_sizes = list(parameter_sizes)
        self._memory: dict[int, _Memory] = {}
        self._parameter_views: dict[int, list[torch.Tensor]] = {}
        self._parameter_cotangents: Sequence[torch.Tensor | None] = ()
        self._recording: Recording | None = None
        self._level = "graph"
        self._isolate = False
        self._stage = 0
        self._knows_first = False
        self._last_time: float | None = None
        self.last_index = 0
        self._last_stage: _Memory | None = None
        self.direction = 1.0
        self.start = 0.0
        self.skipped_stage: int | None = None
        self.fsal = False
        self.problem: Problem | None = None
        self.error: BaseException | None = None

    def _of(self, vec: PETSc.Vec) -> _Memory:
        # Stage Vecs live as long as the TS, and so do their addresses.
        handle = vec.handle
        memory = self._memory.get(handle)
        if memory is None:
            device = self._layout.vec_device
            flat = protocol.view(vec, (self._layout.size,), device)
            memory = _Memory(flat, self._layout.parts(flat))
            # On a device PETSc has to be asked each time, because it may have newer values in the host's memory.
            if device is protocol.HOST:
                self._memory[handle] = memory
        return memory

    def bind(self, problem: Problem) -> None:
        """Call this problem's function from now on."""
        self.problem = problem
        self._parameter_views.clear()

    def forget_views(self) -> None:
        """Forget all stage Vecs: those of a TS that has been destroyed may have come back as others."""
        self._memory.clear()
        self._last_stage = None

    @property
    def last_stage(self) -> torch.Tensor:
        """The state of the last stage that PETSc formed, flat."""
        assert self._last_stage is not None
        return self._last_stage.flat

    def start_step(self, recording: Recording | None, isolate: bool, level: str) -> None:
        """Say that a step begins, and where to record its stages if at all, as graphs or as states.

        `isolate` copies each stage's state, so that the recording survives further steps of the TS.
        """
        self._stage, self._recording, self._isolate, self._level = 0, recording, isolate, level

    def start_attempt(
        self, recording: Recording | None, first: int, knows_first: bool, last_time: float | None
    ) -> None:
        """Say that a step is attempted, of which PETSc asks for the stages from `first` on.

        `knows_first`: the first stage was evaluated by an attempt before. `last_time`: when the last stage is to be
        evaluated, None: when PETSc says. Graphs go to their places in `recording`.
        """
        self._stage, self._recording, self._isolate, self._level = first, recording, True, "graph"
        self._knows_first, self._last_time = knows_first, last_time

    def start_adjoint(self, recording: Recording, start: float) -> None:
        """Say whose stages the adjoint will ask for, and when the step that they belong to began."""
        self._recording, self.start = recording, start

    def end_step(self) -> None:
        """Say that a step or its adjoint is over: its recording is not kept alive from here."""
        self._recording = None

    def function(self, ts: PETSc.TS, t: float, u: PETSc.Vec, f: PETSc.Vec) -> None:
        """RHSFunction: f = func(t, u)."""
        # PETSc turns an exception into an error code; the stepper raises the one kept here instead.
        try:
            stage = self._stage
            self._stage = stage + 1
            recording = self._recording
            if stage == self.skipped_stage:
                self._last_stage = self._of(u)
                if recording is not None and not self.fsal:
                    recording.append(None)
                return
            kept = self._evaluated(t, u, f)
            if recording is not None:
                recording.append(kept)
        except BaseException as error:
            self.error = error
            raise

    def attempt(self, ts: PETSc.TS, t: float, u: PETSc.Vec, f: PETSc.Vec) -> None:
        """RHSFunction of steps with error control, which need all of their stages."""
        try:
            stage = self._stage
            self._stage = stage + 1
            if stage == 0 and self._knows_first:
                return  # The Vec still holds it.
            if stage == self.last_index and self._last_time is not None:
                t = self._last_time
            graph = self._evaluated(t, u, f)
            self._last_stage = self._of(u)
            if self._recording is not None:
                self._recording[stage] = graph
        except BaseException as error:
            self.error = error
            raise

    def _evaluated(self, t: float, u: PETSc.Vec, f: PETSc.Vec) -> Stage:
        """Evaluate func at `u` into `f`; returns what is to be recorded of it."""
        problem, layout, recording = self.problem, self._layout, self._recording
        assert problem is not None
        inputs = self._of(u).parts
        if layout.converts:
            inputs = layout.inputs(inputs)
        elif recording is not None and self._isolate:
            inputs = tuple(part.clone() for part in inputs)
        time = self.direction * t
        kept: Stage = None
        if recording is None:
            outputs = problem.value(problem.func, layout, time, inputs)
        elif self._level == "graph":
            kept = problem.graph(problem.func, layout, time, inputs)
            outputs = kept.outputs
        else:
            outputs = problem.value(problem.func, layout, time, inputs)
            kept = StageState(time, inputs)
        memory = self._of(f)
        for part, value in zip(memory.parts, outputs, strict=True):
            part.copy_(value)
        if self.direction < 0:
            memory.flat.neg_()
        protocol.wrote(f, layout.vec_device)
        return kept

    def apply_transposed(self, v: PETSc.Vec, result: PETSc.Vec) -> None:
        """result = (df/du)^T v at the next stage back; (df/dtheta)^T v is kept for `apply_parameters_transposed`."""
        recording, problem = self._recording, self.problem
        assert recording is not None
        assert problem is not None
        graph = recording.pop()
        if isinstance(graph, StageState):
            graph = problem.graph(problem.func, self._layout, graph.when, graph.inputs)
        memory = self._of(result)
        if graph is None:
            memory.flat.zero_()
            self._parameter_cotangents = ()
        else:
            cotangents = self._of(v).parts
            if self.direction < 0:
                cotangents = tuple(-part for part in cotangents)
            found = problem.vjp(graph, cotangents)
            for part, value in zip(memory.parts, found.states, strict=True):
                if value is None:
                    part.zero_()
                else:
                    part.copy_(value)
            self._parameter_cotangents = found.parameters
            if problem.by_times:
                self._parameter_cotangents = (*found.parameters, *by_step(found, graph.when - self.start))
        protocol.wrote(result, self._layout.vec_device)

    def apply_parameters_transposed(self, result: PETSc.Vec) -> None:
        """result = (df/dtheta)^T v for the v of the last `apply_transposed`."""
        handle = result.handle
        views = self._parameter_views.get(handle)
        if views is None:
            views = self._views_of_parameters(result)
            if self._layout.vec_device is protocol.HOST:
                self._parameter_views[handle] = views
        cotangents = self._parameter_cotangents
        if cotangents and all(value is not None for value in cotangents):
            torch._foreach_copy_(views, cotangents)  # type: ignore[arg-type]
        else:
            for view, value in zip_longest(views, cotangents):
                if value is None:
                    view.zero_()
                else:
                    view.copy_(value)
        self._parameter_cotangents = ()
        protocol.wrote(result, self._layout.vec_device)

    def _views_of_parameters(self, vec: PETSc.Vec) -> list[torch.Tensor]:
        assert self.problem is not None
        shapes = [tensor.shape for tensor in self.problem.parameters.tensors]
        if self.problem.by_times:
            shapes += [torch.Size(), torch.Size()]
        pieces = torch.split(
            protocol.view(vec, (sum(self._parameter_sizes),), self._layout.vec_device), self._parameter_sizes
        )
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


class _Memory(NamedTuple):
    """This rank's entries of a Vec, sharing its memory: all of them, and the state's parts."""

    flat: torch.Tensor
    parts: Parts


class StateJacobian:
    """Context of the shell Mat df/du."""

    def __init__(self, rhs: RightHandSide) -> None:
        self._rhs = rhs

    def multTranspose(self, mat: PETSc.Mat, v: PETSc.Vec, result: PETSc.Vec) -> None:
        try:
            self._rhs.apply_transposed(v, result)
        except BaseException as error:
            self._rhs.error = error
            raise


class ParameterJacobian:
    """Context of the shell Mat df/dtheta, whose columns are this rank's own: no communication is needed here."""

    def __init__(self, rhs: RightHandSide) -> None:
        self._rhs = rhs

    def multTranspose(self, mat: PETSc.Mat, v: PETSc.Vec, result: PETSc.Vec) -> None:
        self._rhs.apply_parameters_transposed(result)


def by_step(found: Cotangents, offset: float) -> list[torch.Tensor | None]:
    """The cotangents of a step's size and start, as if they were two parameters of f, for one stage `offset` later.

    A step of size h from t_n with alpha f(t_n + alpha (t - t_n) + beta, u) for f is one of size alpha h from
    t_n + beta: the derivative by alpha = 1 is h times that by h, and the one by beta = 0 is that by t_n. So every
    method that has an adjoint with respect to parameters has one with respect to time.
    """
    stretch = found.value if isinstance(found.value, torch.Tensor) else None
    if found.time is None:
        return [stretch, None]
    shift = found.time.double()
    return [shift * offset if stretch is None else stretch + shift * offset, shift]
