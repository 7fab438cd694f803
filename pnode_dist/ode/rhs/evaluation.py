"""One evaluation of a right-hand side at a state: its value, and its graph for later products with vectors.

Times are those of the caller's problem, also where PETSc integrates backward in time. A state is given by the parts of
its `StateLayout`. This module is independent of PETSc's solvers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.jumps import SmoothInterval
from pnode_dist.ode.recomputation.carried import NOTHING_CARRIED, Carried, Mark
from pnode_dist.ode.recomputation.fingerprint import fingerprint
from pnode_dist.ode.recomputation.guard import Guard
from pnode_dist.ode.rhs import inner_derivatives
from pnode_dist.ode.rhs.compute_dtype import NO_COPIES, ComputeCopies
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.ownership import owned
from pnode_dist.ode.rhs.parameters import Check, Parameters, completeness_check
from pnode_dist.ode.rhs.separable import halves_of
from pnode_dist.petsc import log
from pnode_dist.system.torch_internals import root_edge, set_grad_enabled

Function = Callable[..., Any]
_FIRST_COMPARED, _LARGE = 16, 1024
_COUNTERS = (
    "evaluations",
    "vjps",
    "jvps",
    "newton_iterations",
    "linear_iterations",
    "adjoint_linear_iterations",
)


@dataclass
class BoundFunction:
    """The right-hand side that a solve binds to its stepper: function, extra arguments, parameters and counters.

    `copies` replace the tensors of the function's modules during an evaluation; `parameters` are taken from them.
    `compiled` maps the identity of a function to its compiled version.
    `watched`: no tensor is known to require a gradient, but one may be asked for. Check every evaluation for inputs
    that the search for parameters has missed.
    `needs_time_gradient`: compute the gradient with respect to the evaluation times too.
    `smooth_interval`: f is evaluated inside this interval between jumps; None without jumps.
    `checks_parameters`: check once that a module's graph depends on its named parameters alone. A plain function is
    checked at every evaluation.
    `logs`: PETSc's log is active.
    `differentiates`: f has differentiated with respect to tensors that its state was computed from. This is detected
    where `watches` is true, except during a backward pass (`in_backward`).
    `whole` compiles a function of tensors without breaks, see `Compiler.whole`; None if nothing is compiled.
    `batches`: products of several vectors with f's derivative are taken at once; False where torch cannot.
    `coupled`: samples of the state depend on one another; None if unknown so far (see `BatchedStepper`).
    `needs_graph`: f differentiates inside with respect to its state (see `inner_derivatives`); None if unknown so far.
    `carried` is the state that f carries from one evaluation to the next. `guard` compares recomputed values with
    those of the forward pass. `between` is the map between steps, of the parts of the state; None without one.
    """

    func: Function
    args: tuple[Any, ...]
    parameters: Parameters
    copies: ComputeCopies = NO_COPIES
    compiled: Mapping[int, Function] = field(default_factory=dict)
    watched: bool = False
    needs_time_gradient: bool = False
    checks_parameters: bool = True
    logs: bool = field(default_factory=log.logging)
    differentiates: bool = False
    in_backward: bool = False
    whole: Callable[[Any, Callable[[], Callable[..., Any]]], Callable[..., Any] | None] | None = None
    batches: bool = True
    coupled: bool | None = None
    carried: Carried = NOTHING_CARRIED
    guard: Guard | None = None
    between: Callable[..., Parts] | None = None
    smooth_interval: SmoothInterval | None = None
    evaluations: int = 0
    vjps: int = 0
    jvps: int = 0
    newton_iterations: int = 0
    linear_iterations: int = 0
    adjoint_linear_iterations: int = 0

    def __post_init__(self) -> None:
        self._plain = not self.args and not self.logs
        # Looked up for each solve: a function may call other functions at another time.
        self.needs_graph = inner_derivatives.differentiates(self.func)
        self.checks_left = int(self.checks_parameters) if isinstance(self.func, nn.Module) else -1
        self.watches = self.checks_left != 0
        self._kept = 0

    @cached_property
    def check(self) -> Check:
        """The check that an evaluation depends on its inputs and the parameters alone. Most solves never need it."""
        return completeness_check(self.parameters)

    @cached_property
    def halves(self) -> tuple[Function, Function]:
        """The functions that symplectic methods evaluate for positions and for momenta."""
        # The compiled function is the whole one.
        return (self.func, self.func) if self.compiled else halves_of(self.func)

    def counts(self) -> dict[str, int]:
        """Return all counters, for `count_from`."""
        return {name: getattr(self, name) for name in _COUNTERS}

    def count_from(self, counts: dict[str, int]) -> None:
        """Reset the counters to these values, to leave out evaluations that were made since."""
        for name, count in counts.items():
            setattr(self, name, count)

    @property
    def constants(self) -> Parts:
        """The tensors that exist once for all evaluations: the parameters, and a module's buffers."""
        buffers = tuple(self.func.buffers()) if isinstance(self.func, nn.Module) else ()
        return (*self.parameters.tensors, *buffers)

    def evaluate(self, func: Function, layout: StateLayout, time: float | torch.Tensor, inputs: Parts) -> Parts:
        """Return `func` at `time` and the state `inputs`, part by part. Collective if `func` is.

        Raises `TypeError` or `ValueError` if the result cannot be a time derivative of the state.
        """
        if not isinstance(time, torch.Tensor):
            # Made anew for each step: small tensors that stay would fragment the memory for states.
            time = torch.scalar_tensor(time, dtype=layout.compute_dtype, device=layout.device)
        if self.smooth_interval is not None:
            time = self.smooth_interval.inside(time)
        if self.compiled:
            func = self.compiled.get(id(func), func)
        if self._plain and not layout.is_tuple:
            # A shortcut for the commonest case. The general code below takes longer than a small stage.
            result = func(time, inputs[0])
            if isinstance(result, torch.Tensor) and result.shape == layout.shapes[0]:
                if result.dtype is not layout.compute_dtype:
                    _check_type(result, layout)
                return (result,)
        else:
            with log.event(log.FUNCTION, self.logs):
                result = func(time, layout.as_state(inputs), *self.args)
        # A new tuple: f may hold the one that it returned, and `owned` counts the references to the values.
        outputs = (*result,) if layout.is_tuple and isinstance(result, tuple | list) else (result,)
        if len(outputs) != len(inputs):
            _refuse(result, layout)
        for shape, value in zip(layout.shapes, outputs, strict=True):
            if not isinstance(value, torch.Tensor):
                _refuse(result, layout)
            if value.shape != shape:
                raise ValueError(
                    f"func returned shape {tuple(value.shape)} for a state of shape {shape}: "
                    "du/dt must have the shape of u"
                )
            _check_type(value, layout)
        return outputs

    def value(self, func: Function, layout: StateLayout, time: float, inputs: Parts) -> Parts:
        """Evaluate `func` without a graph, and count the evaluation. Collective if `func` is."""
        self.evaluations += 1
        if self.needs_graph:
            return self._value_of_graph(func, layout, time, inputs)
        begin = inner_derivatives.random_states(layout.device) if self.needs_graph is None else None
        try:
            if not self.watched and not torch.is_grad_enabled():
                outputs = self.evaluate(func, layout, time, inputs)
            else:
                with torch.set_grad_enabled(self.watched):
                    outputs = self.evaluate(func, layout, time, inputs)
        except RuntimeError as error:
            if not inner_derivatives.lacks_graph(error):
                raise
            if begin is not None:
                begin()
            outputs = self._value_of_graph(func, layout, time, inputs)
            self.needs_graph = inner_derivatives.note(self.func, True)
            return outputs
        if begin is not None:
            self.needs_graph = inner_derivatives.note(self.func, False)
        if self.watched:
            self.check(outputs, inputs)
        # Plain loops: a call would take a noticeable part of a small stage.
        for part in inputs:
            if part.requires_grad:
                inner_derivatives.unmark(inputs)
        for value in outputs:
            if value.requires_grad:
                return tuple(value.detach() for value in outputs)
        return outputs

    def _value_of_graph(self, func: Function, layout: StateLayout, time: float, inputs: Parts) -> Parts:
        """Evaluate a func that differentiates inside, and drop its graph. Collective if `func` is."""
        with torch.inference_mode(False), torch.enable_grad():
            leaves = inner_derivatives.leaves_of(inputs)
            outputs = self.evaluate(func, layout, time, leaves)
            if self.watched:
                self.check(outputs, leaves)
        return tuple(value.detach() for value in outputs)

    def graph(self, func: Function, layout: StateLayout, time: float, inputs: Parts) -> StageGraph:
        """Evaluate `func` with its graph, and count the evaluation. Collective if `func` is."""
        self.evaluations += 1
        inputs = tuple(part.detach().requires_grad_() for part in inputs)
        when = None
        if self.needs_time_gradient:
            when = torch.tensor(time, dtype=layout.compute_dtype, device=layout.device, requires_grad=True)
        # The context manager torch.enable_grad() takes five times as long.
        before = torch.is_grad_enabled()
        set_grad_enabled(True)
        try:
            outputs = owned(self.evaluate(func, layout, time if when is None else when, inputs))
        finally:
            set_grad_enabled(before)
        self.check_dependencies(outputs, inputs if when is None else (*inputs, when))
        return StageGraph(inputs, tuple(map(_root, outputs)), outputs, time, when)

    def recomputed_graph(self, stage: StageState, func: Function, layout: StateLayout) -> StageGraph:
        """Recompute an evaluation with its graph from its stored inputs. Collective if `func` is.

        Compares the value with that of the forward pass. Raises `RecomputationError`, see `Guard`.
        """
        self.carried.restore(stage.mark)
        graph = self.graph(func, layout, stage.when, stage.inputs)
        if self.guard is not None:
            self.guard.compare_value(stage.fingerprint, stage.when, graph.values)
        return graph

    def stage_checkpoint(self, time: float, inputs: Parts, mark: Mark | None, values: Parts) -> StageState:
        """Return what recomputes the evaluation that was just made: its inputs, and the fingerprint of its value."""
        if self.guard is None:
            return StageState(time, inputs, mark)
        # Compare one in five of small values, each stage in turn: comparing all would take as long as f.
        self._kept += 1
        compared = self._kept < _FIRST_COMPARED or self._kept % 5 == 0 or inputs[0].numel() >= _LARGE
        return StageState(time, inputs, mark, fingerprint(values) if compared else None)

    def evaluate_on_tape(self, layout: StateLayout, time: float, state: Parts, half: int | None = None) -> Parts:
        """Evaluate f as part of a graph of several stages, and count the evaluation. Collective if `func` is.

        Converts no types. Copies values whose memory f may use again.
        """
        self.evaluations += 1
        return owned(self.evaluate(self.func if half is None else self.halves[half], layout, time, state))

    def mapped(self, layout: StateLayout, time: float | torch.Tensor, inputs: Parts) -> Parts:
        """Return the map between steps at `time` and the state `inputs`, of the caller's type. Collective if it is.

        Raises `TypeError` or `ValueError` for a value that is not like the state, and `ConfigurationError` for a map
        that writes to its argument.
        """
        assert self.between is not None
        if not isinstance(time, torch.Tensor):
            time = torch.scalar_tensor(time, dtype=layout.dtype, device=layout.device)
        if torch.is_inference_mode_enabled():
            # Tensors have no version there, so a write by the map could not be detected.
            return self.between(time, tuple(part.clone() for part in inputs), *self.args)
        versions = [part._version for part in inputs]
        values = self.between(time, inputs, *self.args)
        if versions != [part._version for part in inputs]:
            raise ConfigurationError("between_steps: it writes to the state: must return new tensors")
        return values

    def between_value(self, layout: StateLayout, time: float, inputs: Parts) -> Parts:
        """Return the map between steps without a graph. Collective if it is."""
        with torch.set_grad_enabled(self.watched):
            values = self.mapped(layout, time, inputs)
        if self.watched:
            self.check(values, inputs, "between_steps")
        return tuple(value.detach() for value in values) if self.watched else values

    def between_graph(self, layout: StateLayout, time: float, inputs: Parts) -> tuple[Parts, MapTape]:
        """Return the map between steps with its graph, and its tape. Collective if it is."""
        leaves = tuple(part.detach().requires_grad_() for part in inputs)
        when = None
        if self.needs_time_gradient:
            when = torch.tensor(time, dtype=layout.dtype, device=layout.device, requires_grad=True)
        with torch.enable_grad():
            values = self.mapped(layout, time if when is None else when, leaves)
        self.check(values, leaves if when is None else (*leaves, when), "between_steps")
        return values, MapTape(time, leaves, tuple(map(_root, values)), when)

    def check_dependencies(self, outputs: Sequence[torch.Tensor], inputs: Iterable[torch.Tensor]) -> None:
        """Raise `ValueError` for outputs that depend on more than these inputs and the parameters.

        Checks as often as `checks_parameters` asks for.
        """
        if self.checks_left:
            self.check(outputs, inputs)
            self.checks_left -= 1
            if not self.checks_left:
                del self.check


Root = GradientEdge | None


class StageGraph(NamedTuple):
    """One evaluation with its graph: the inputs of f, which are the leaves of the graph, and its roots.

    `roots` has the end of the graph of each part of f's value, None for a part that depends on nothing. `values` are
    these parts themselves. They are empty if only first-order products at constant times are needed, to free their
    memory. `when` is the time. `time` is a leaf of the graph too if the gradient with respect to times is needed, else
    None.
    """

    inputs: Parts
    roots: tuple[Root, ...]
    values: Parts
    when: float
    time: torch.Tensor | None = None


class StageState(NamedTuple):
    """The inputs of one evaluation, in f's floating type, from which the adjoint recomputes its graph.

    `mark` is the state that f carried before the evaluation. `fingerprint` is that of its value; None if not compared.
    """

    when: float
    inputs: Parts
    mark: Mark | None = None
    fingerprint: float | None = None


class MapTape(NamedTuple):
    """The map between steps at one state: the leaves and the roots of its graph, or the `inputs` alone without roots.

    `when` is the time as a leaf of the graph, None if the gradient with respect to times is not needed. `mark` is the
    state that was carried before the evaluation. `fingerprint` is that of its value; None if not compared.
    """

    time: float
    inputs: Parts
    roots: tuple[Root, ...] | None
    when: torch.Tensor | None = None
    mark: Mark | None = None
    fingerprint: float | None = None


def _root(value: torch.Tensor) -> Root:
    return root_edge(value) if value.requires_grad else None


def _check_type(value: torch.Tensor, layout: StateLayout) -> None:
    """Raise `TypeError` for values that cannot be converted to the state's type without loss, or only by mistake."""
    if not value.dtype.is_floating_point:
        raise TypeError(
            f"func returned {value.dtype} for a state of {layout.dtype}: du/dt must be of a real floating type (for a "
            "complex state u0 must be complex)"
        )


def _refuse(result: Any, layout: StateLayout) -> NoReturn:
    wanted = f"a tuple of {len(layout.shapes)} tensors" if layout.is_tuple else "a tensor"
    raise TypeError(f"func must return {wanted} like u, got {_describe(result)}")


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
