"""The right-hand side f(t, u; theta) as PETSc calls it: on Vecs, forward and transposed.

While a step is recorded, f runs with gradients on and the graph of every stage is kept. The step's adjoint then asks
for J^T v of the stages, last one first, and each vector-Jacobian product serves the state and the parameters at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from petsc4py import PETSc
from torch import nn

from pnode_dist.ode.layout import StateLayout
from pnode_dist.ode.parameters import Parameters, completeness_check
from pnode_dist.partition import protocol

Function = Callable[..., Any]


@dataclass
class Problem:
    """What one solve binds to the solver: the function, its extra arguments, its parameters, and counters.

    `watched`: nothing is known to require a gradient, but one may be asked for; evaluations are looked at for what
    the search for parameters has missed.
    """

    func: Function
    args: tuple[Any, ...]
    parameters: Parameters
    watched: bool = False
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


Recording = list[StageGraph | None]


class RightHandSide:
    """PETSc's callbacks for one TS. Holds no reference to the TS: PETSc's own references could not be collected.

    `direction` is -1 when time decreases and PETSc integrates -f over -t (see `Stepper.step`).
    `skipped_stage` is the stage that is not evaluated because its weight is zero (see `Method`), or None;
    `fsal` says whether PETSc's adjoint leaves that stage out as well.
    """

    def __init__(self, layout: StateLayout, parameter_sizes: tuple[int, ...]) -> None:
        self._layout = layout
        self._parameter_sizes = list(parameter_sizes)
        self._converts = layout.dtype != protocol.scalar_dtype()
        self._views: dict[int, tuple[torch.Tensor, ...]] = {}
        self._parameter_views: dict[int, list[torch.Tensor]] = {}
        self._parameter_cotangents: list[torch.Tensor | None] = []
        self._recording: Recording | None = None
        self._isolate = False
        self._stage = 0
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
            parts = self._layout.parts(protocol.view(vec, (self._layout.size,)))
            self._views[handle] = parts
        return parts

    def start_step(self, recording: Recording | None, isolate: bool) -> None:
        """Say that a step begins, and where to record its stages if at all.

        `isolate` copies each stage's state, so that the recording survives further steps of the TS.
        """
        self._stage, self._recording, self._isolate = 0, recording, isolate

    def start_adjoint(self, recording: Recording) -> None:
        """Say whose stages the adjoint will ask for."""
        self._recording = recording

    def function(self, ts: PETSc.TS, t: float, u: PETSc.Vec, f: PETSc.Vec) -> None:
        """RHSFunction: f = func(t, u)."""
        # PETSc turns an exception into an error code; the stepper raises the one kept here instead.
        try:
            self._function(t, u, f)
        except BaseException as error:
            self.error = error
            raise

    def _function(self, t: float, u: PETSc.Vec, f: PETSc.Vec) -> None:
        stage = self._stage
        self._stage = stage + 1
        recording = self._recording
        if stage == self.skipped_stage:
            if recording is not None and not self.fsal:
                recording.append(None)
            return
        problem = self.problem
        assert problem is not None
        problem.evaluations += 1
        inputs = self._parts(u)
        if self._converts:
            inputs = tuple(part.to(self._layout.dtype) for part in inputs)
        if recording is None:
            with torch.set_grad_enabled(problem.watched):
                outputs = self._evaluate(problem, t, inputs)
            if problem.watched:
                problem.check(outputs, ())
        else:
            copy = self._isolate and not self._converts
            inputs = tuple((part.clone() if copy else part.detach()).requires_grad_() for part in inputs)
            with torch.enable_grad():
                outputs = self._evaluate(problem, t, inputs)
            if problem.checks_left:
                problem.check(outputs, inputs)
                problem.checks_left -= 1
            recording.append(StageGraph(inputs, outputs))
        for target, value in zip(self._parts(f), outputs, strict=True):
            target.copy_(value.detach())
            if self.direction < 0:
                target.neg_()
        f.stateIncrease()

    def _evaluate(self, problem: Problem, t: float, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        time = torch.tensor(self.direction * t, dtype=self._layout.dtype)
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
        if not self._parameter_cotangents:
            for view in views:
                view.zero_()
        for view, value in zip(views, self._parameter_cotangents, strict=False):
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
