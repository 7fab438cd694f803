"""The right-hand side f(t, u; theta) as PETSc calls it: on Vecs, forward and transposed.

While a step is recorded, f runs with gradients on and the graph of every stage is kept, or the states of the stages
alone, on which f is evaluated again. The step's adjoint then asks for J^T v of the stages, last one first, and each
vector-Jacobian product serves the state and the parameters at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from petsc4py import PETSc
from torch import nn

from pnode_dist.ode import events
from pnode_dist.ode.layout import StateLayout
from pnode_dist.ode.parameters import Parameters, completeness_check
from pnode_dist.partition import protocol

Function = Callable[..., Any]


@dataclass
class Problem:
    """What one solve binds to the solver: the function, its extra arguments, its parameters, and counters.

    `watched`: nothing is known to require a gradient, but one may be asked for; evaluations are looked at for what
    the search for parameters has missed. `logs`: PETSc keeps a log.
    """

    func: Function
    args: tuple[Any, ...]
    parameters: Parameters
    watched: bool = False
    logs: bool = False
    evaluations: int = 0
    vjps: int = 0

    def __post_init__(self) -> None:
        self.check = completeness_check(self.parameters)
        # A module says what its parameters are: it is looked at once. A function may use others at other times.
        self.checks_left = 1 if isinstance(self.func, nn.Module) else -1

    @property
    def constants(self) -> tuple[torch.Tensor, ...]:
        """What exists once, however often `func` is evaluated: the parameters, and a module's buffers."""
        buffers = tuple(self.func.buffers()) if isinstance(self.func, nn.Module) else ()
        return (*self.parameters.tensors, *buffers)


@dataclass(frozen=True)
class StageGraph:
    """One recorded evaluation: f's inputs (leaves of their own graph) and its outputs."""

    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class StageState:
    """What an evaluation was given, in PETSc's time and f's floating type: its graph is made when it is asked for."""

    time: float
    inputs: tuple[torch.Tensor, ...]


Recording = list[StageGraph | StageState | None]
Stage = StageGraph | StageState | None


class RightHandSide:
    """PETSc's callbacks for one layout. Holds no reference to a TS: PETSc's own references could not be collected.

    `direction` is -1 when time decreases and PETSc integrates -f over -t (see `Stepper.step`).
    `skipped_stage` is the stage that is not evaluated because its weight is zero (see `Method`), or None; `fsal` says
    whether PETSc's adjoint leaves that stage out as well, `last_index` is the last stage's. `last_stage` is the state
    of the last stage that was formed, flat.
    """

    def __init__(self, layout: StateLayout, parameter_sizes: tuple[int, ...]) -> None:
        self._layout = layout
        self._parameter_sizes = list(parameter_sizes)
        self._converts = layout.dtype != protocol.scalar_dtype()
        self._views: dict[int, tuple[torch.Tensor, ...]] = {}
        self._parameter_views: dict[int, list[torch.Tensor]] = {}
        self._parameter_cotangents: list[torch.Tensor | None] = []
        self._flat: dict[int, torch.Tensor] = {}
        self._recording: Recording | None = None
        self._level = "graph"
        self._isolate = False
        self._stage = 0
        self._knows_first = False
        self._last_time: float | None = None
        self.last_index = 0
        self._last_handle = 0
        self.direction = 1.0
        self.skipped_stage: int | None = None
        self.fsal = False
        self.problem: Problem | None = None
        self.error: BaseException | None = None

    def _parts(self, vec: PETSc.Vec) -> tuple[torch.Tensor, ...]:
        # Stage Vecs live as long as the TS, and so do their addresses.
        handle = vec.handle
        parts = self._views.get(handle)
        if parts is None:
            flat = self._flat[handle] = protocol.view(vec, (self._layout.size,))
            parts = self._views[handle] = self._layout.parts(flat)
        return parts

    def forget_views(self) -> None:
        """Forget all stage Vecs: those of a TS that has been destroyed may have come back as others."""
        self._views.clear()
        self._flat.clear()

    @property
    def last_stage(self) -> torch.Tensor:
        """The state of the last stage that PETSc formed, flat."""
        return self._flat[self._last_handle]

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

    def start_adjoint(self, recording: Recording) -> None:
        """Say whose stages the adjoint will ask for."""
        self._recording = recording

    def end_step(self) -> None:
        """Say that a step or its adjoint is over: its recording is not kept alive from here."""
        self._recording = None

    def function(self, ts: PETSc.TS, t: float, u: PETSc.Vec, f: PETSc.Vec) -> None:
        """RHSFunction: f = func(t, u)."""
        # PETSc turns an exception into an error code; the stepper raises the one kept here instead.
        try:
            self._function(t, u, f)
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
            self._last_handle = u.handle
            if self._recording is not None:
                self._recording[stage] = graph
        except BaseException as error:
            self.error = error
            raise

    def _function(self, t: float, u: PETSc.Vec, f: PETSc.Vec) -> None:
        stage = self._stage
        self._stage = stage + 1
        recording = self._recording
        if stage == self.skipped_stage:
            self._parts(u)
            self._last_handle = u.handle
            if recording is not None and not self.fsal:
                recording.append(None)
            return
        kept = self._evaluated(t, u, f)
        if recording is not None:
            recording.append(kept)

    def _evaluated(self, t: float, u: PETSc.Vec, f: PETSc.Vec) -> Stage:
        """Evaluate func at `u` into `f`; returns what is to be recorded of it."""
        problem = self.problem
        assert problem is not None
        problem.evaluations += 1
        inputs = self._parts(u)
        if self._converts:
            inputs = tuple(part.to(self._layout.dtype) for part in inputs)
        kept: Stage = None
        if self._recording is not None and self._isolate and not self._converts:
            inputs = tuple(part.clone() for part in inputs)
        if self._recording is not None and self._level == "graph":
            graph = self._graph(problem, t, inputs)
            kept, outputs = graph, graph.outputs
        else:
            with torch.set_grad_enabled(problem.watched):
                outputs = self._evaluate(problem, t, inputs)
            if problem.watched:
                problem.check(outputs, ())
            if self._recording is not None:
                kept = StageState(t, inputs)
        for target, value in zip(self._parts(f), outputs, strict=True):
            target.copy_(value.detach())
            if self.direction < 0:
                target.neg_()
        f.stateIncrease()
        return kept

    def _graph(self, problem: Problem, t: float, inputs: tuple[torch.Tensor, ...]) -> StageGraph:
        inputs = tuple(part.detach().requires_grad_() for part in inputs)
        with torch.enable_grad():
            outputs = self._evaluate(problem, t, inputs)
        if problem.checks_left:
            problem.check(outputs, inputs)
            problem.checks_left -= 1
        return StageGraph(inputs, outputs)

    def _evaluate(self, problem: Problem, t: float, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        time = torch.tensor(self.direction * t, dtype=self._layout.dtype)
        with events.event(events.FUNCTION, problem.logs):
            result = problem.func(time, self._layout.as_state(inputs), *problem.args)
        outputs = tuple(result) if self._layout.is_tuple and isinstance(result, tuple | list) else (result,)
        if len(outputs) != len(inputs) or not all(isinstance(value, torch.Tensor) for value in outputs):
            wanted = f"a tuple of {len(inputs)} tensors" if self._layout.is_tuple else "a tensor"
            raise TypeError(f"func must return {wanted} like u, got {_describe(result)}")
        for part, value in zip(inputs, outputs, strict=True):
            if value.shape != part.shape:
                raise ValueError(
                    f"func returned shape {tuple(value.shape)} for a state of shape {tuple(part.shape)}: "
                    "du/dt must have the shape of u"
                )
        return outputs

    def apply_transposed(self, v: PETSc.Vec, result: PETSc.Vec) -> None:
        """result = (df/du)^T v at the next stage back; (df/dtheta)^T v is kept for `apply_parameters_transposed`."""
        recording = self._recording
        assert recording is not None
        assert self.problem is not None
        graph = recording.pop()
        if isinstance(graph, StageState):
            self.problem.evaluations += 1
            graph = self._graph(self.problem, graph.time, graph.inputs)
        targets = self._parts(result)
        self._parameter_cotangents = []
        pairs = (
            []
            if graph is None
            else [(out, part) for out, part in zip(graph.outputs, self._parts(v), strict=True) if out.requires_grad]
        )
        if graph is None or not pairs:
            for target in targets:
                target.zero_()
        else:
            self.problem.vjps += 1
            with events.event(events.PRODUCT, self.problem.logs):
                cotangents = self._vjp(graph, pairs)
            for target, value in zip(targets, cotangents, strict=False):
                if value is None:
                    target.zero_()
                else:
                    target.copy_(value)
            self._parameter_cotangents = list(cotangents[len(targets) :])
        result.stateIncrease()

    def _vjp(
        self, graph: StageGraph, pairs: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> tuple[torch.Tensor | None, ...]:
        assert self.problem is not None
        parameters = self.problem.parameters
        try:
            return torch.autograd.grad(
                [out for out, _ in pairs],
                [*graph.inputs, *parameters.tensors],
                [(part if self.direction > 0 else -part).to(out.dtype) for out, part in pairs],
                allow_unused=True,
                retain_graph=parameters.shares_graph,
            )
        except RuntimeError as error:
            if "through the graph a second time" not in str(error):
                raise
            raise ValueError(
                "func depends on an intermediate result that was computed before the solve and was not found among its "
                "parameters: name it with params=(...)"
            ) from None

    def apply_parameters_transposed(self, result: PETSc.Vec) -> None:
        """result = (df/dtheta)^T v for the v of the last `apply_transposed`."""
        handle = result.handle
        views = self._parameter_views.get(handle)
        if views is None:
            flat = protocol.view(result, (sum(self._parameter_sizes),))
            views = list(torch.split(flat, self._parameter_sizes))
            self._parameter_views[handle] = views
        cotangents = self._parameter_cotangents
        if cotangents and all(value is not None for value in cotangents):
            torch._foreach_copy_(views, [value.reshape(-1) for value in cotangents])  # type: ignore[union-attr]
        else:
            for view, value in zip_longest(views, cotangents):
                if value is None:
                    view.zero_()
                else:
                    view.copy_(value.reshape(-1))
        self._parameter_cotangents = []
        result.stateIncrease()


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


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
