"""One evaluation of a right-hand side at a state: its value, its graph, and its products with vectors.

Nothing here knows of PETSc's solvers. Times are the caller's; states come as the parts of a `StateLayout`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from pnode_dist.ode.recomputation.carried import NOTHING_CARRIED, Carried, Mark
from pnode_dist.ode.recomputation.fingerprint import fingerprint
from pnode_dist.ode.recomputation.guard import Guard
from pnode_dist.ode.rhs import inner_derivatives
from pnode_dist.ode.rhs.compute_dtype import NO_COPIES, ComputeCopies
from pnode_dist.ode.rhs.layout import Parts, StateLayout
from pnode_dist.ode.rhs.ownership import owned
from pnode_dist.ode.rhs.parameters import Parameters, completeness_check
from pnode_dist.petsc import log
from pnode_dist.system.torch_internals import gradients, set_grad_enabled

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
    `checks_parameters`: check once that a module's graph depends on its named parameters alone. A plain function is
    checked at every evaluation.
    `logs`: PETSc's log is active.
    `differentiates`: f has differentiated with respect to tensors that its state was computed from. This is detected
    where `watches` is true, except during a backward pass (`in_backward`).
    `needs_graph`: f differentiates inside with respect to its state (see `inner_derivatives`); None if unknown so far.
    `carried` is the state that f carries from one evaluation to the next. `guard` compares recomputed values with
    those of the forward pass.
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
    carried: Carried = NOTHING_CARRIED
    guard: Guard | None = None
    evaluations: int = 0
    vjps: int = 0
    jvps: int = 0
    newton_iterations: int = 0
    linear_iterations: int = 0
    adjoint_linear_iterations: int = 0

    def __post_init__(self) -> None:
        self._plain = not self.args and not self.logs
        # A function may use others at other times.
        self.needs_graph = inner_derivatives.differentiates(self.func)
        self.checks_left = int(self.checks_parameters) if isinstance(self.func, nn.Module) else -1
        self.watches = self.checks_left != 0
        self._kept = 0

    @cached_property
    def check(self) -> Callable[[Sequence[torch.Tensor], Iterable[torch.Tensor]], None]:
        """What refuses an evaluation that depends on more than the parameters; most solves need none."""
        return completeness_check(self.parameters)

    def counts(self) -> dict[str, int]:
        """All counters, for `count_from`."""
        return {name: getattr(self, name) for name in _COUNTERS}

    def count_from(self, counts: dict[str, int]) -> None:
        """Go on counting from there: what was done since is not to be counted."""
        for name, count in counts.items():
            setattr(self, name, count)

    @property
    def constants(self) -> Parts:
        """What exists once, however often `func` is evaluated: the parameters, and a module's buffers."""
        buffers = tuple(self.func.buffers()) if isinstance(self.func, nn.Module) else ()
        return (*self.parameters.tensors, *buffers)

    def evaluate(self, func: Function, layout: StateLayout, time: float | torch.Tensor, inputs: Parts) -> Parts:
        """`func` at `time` and the state of these parts, part by part. Collective if `func` is.

        Raises `TypeError` or `ValueError` if it does not return what a time derivative of the state must be.
        """
        if not isinstance(time, torch.Tensor):
            # Not kept for other steps: small tensors that stay make the memory between them useless for states.
            time = torch.scalar_tensor(time, dtype=layout.compute_dtype, device=layout.device)
        if self.compiled:
            func = self.compiled.get(id(func), func)
        if self._plain and not layout.is_tuple:
            # All that is below, for the commonest case: it takes longer than a small stage.
            result = func(time, inputs[0])
            if isinstance(result, torch.Tensor) and result.shape == layout.shapes[0]:
                if result.dtype is not layout.compute_dtype:
                    _check_type(result, layout)
                return (result,)
        else:
            with log.event(log.FUNCTION, self.logs):
                result = func(time, layout.as_state(inputs), *self.args)
        # A tuple of its own: f may hold the one that it returned, and the references to its values are counted.
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
        """An evaluation that no gradient is asked of, which is counted. Collective if `func` is."""
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
        # Loops without a call: this is done at every stage.
        for part in inputs:
            if part.requires_grad:
                inner_derivatives.unmark(inputs)
        for value in outputs:
            if value.requires_grad:
                return tuple(value.detach() for value in outputs)
        return outputs

    def _value_of_graph(self, func: Function, layout: StateLayout, time: float, inputs: Parts) -> Parts:
        """An evaluation of a func that differentiates inside, whose graph is dropped. Collective if `func` is."""
        with torch.inference_mode(False), torch.enable_grad():
            leaves = inner_derivatives.leaves_of(inputs)
            outputs = self.evaluate(func, layout, time, leaves)
            if self.watched:
                self.check(outputs, leaves)
        return tuple(value.detach() for value in outputs)

    def graph(self, func: Function, layout: StateLayout, time: float, inputs: Parts) -> StageGraph:
        """An evaluation with its graph, which is counted. Collective if `func` is."""
        self.evaluations += 1
        inputs = tuple(part.detach().requires_grad_() for part in inputs)
        when = None
        if self.needs_time_gradient:
            when = torch.tensor(time, dtype=layout.compute_dtype, device=layout.device, requires_grad=True)
        # torch.enable_grad() as a context takes five times as long.
        before = torch.is_grad_enabled()
        set_grad_enabled(True)
        try:
            outputs = owned(self.evaluate(func, layout, time if when is None else when, inputs))
        finally:
            set_grad_enabled(before)
        self.check_dependencies(outputs, inputs if when is None else (*inputs, when))
        return StageGraph(inputs, tuple(map(_root, outputs)), outputs, time, when)

    def recomputed_graph(self, stage: StageState, func: Function, layout: StateLayout) -> StageGraph:
        """The graph of an evaluation whose inputs were kept, compared with its value in the forward pass.

        Collective if `func` is. Raises `RecomputationError`, see `Guard`.
        """
        self.carried.restore(stage.mark)
        graph = self.graph(func, layout, stage.when, stage.inputs)
        if self.guard is not None:
            self.guard.compare_value(stage.fingerprint, stage.when, graph.values)
        return graph

    def stage_checkpoint(self, time: float, inputs: Parts, mark: Mark | None, values: Parts) -> StageState:
        """The inputs of an evaluation that was just made, to be made again."""
        if self.guard is None:
            return StageState(time, inputs, mark)
        # Of small states one in five is compared, which comes to each stage in turn: more would take as long as f.
        self._kept += 1
        compared = self._kept < _FIRST_COMPARED or self._kept % 5 == 0 or inputs[0].numel() >= _LARGE
        return StageState(time, inputs, mark, fingerprint(values) if compared else None)

    def evaluate_on_tape(self, layout: StateLayout, time: float, state: Parts) -> Parts:
        """An evaluation as part of a graph that is being made, which is counted. Collective if `func` is.

        Nothing is converted. Values whose memory f may use again are copied.
        """
        self.evaluations += 1
        values = owned(self.evaluate(self.func, layout, time, state))
        if len(set(map(id, values))) < len(values):
            # What each part adds to the adjoint is summed up by itself, and then the first part's comes first.
            values = tuple(value.view_as(value) for value in reversed(values))[::-1]
        return values

    def check_dependencies(self, outputs: Sequence[torch.Tensor], inputs: Iterable[torch.Tensor]) -> None:
        """Refuse outputs that depend on more than these inputs and the parameters, as often as there is need to look.

        Raises `ValueError`.
        """
        if self.checks_left:
            self.check(outputs, inputs)
            self.checks_left -= 1
            if not self.checks_left:
                del self.check

    def vjp(
        self,
        graph: StageGraph,
        cotangents: Sequence[torch.Tensor | None],
        *,
        states: bool = True,
        parameters: bool = True,
        keep: bool = False,
        sums: Sequence[torch.Tensor | None] = (),
    ) -> Cotangents:
        """The products of the cotangents of func's value with its derivatives. Collective if `func`'s backward is.

        A cotangent None is zero. `states` and `parameters` say which are wanted, and `keep` that the graph will be used
        again. The products by parameters are added to their `sums`, if given. Raises `ValueError` if the graph leads to
        what was computed, and reversed, before the solve.
        """
        roots, along = [], []
        for root, start, part in zip(graph.roots, graph.inputs, cotangents, strict=True):
            if root is not None and part is not None:
                roots.append(root)
                along.append(part if part.dtype is start.dtype and start.is_cpu else part.to(start))
        stretch = None
        if parameters and self.needs_time_gradient:
            stretch = sum(
                (out.detach().to(part) * part).sum()
                for out, part in zip(graph.values, cotangents, strict=True)
                if part is not None
            )
        times = () if graph.time is None or not parameters else (graph.time,)
        if not roots:
            # Where nothing depends on anything there is only the value itself.
            none = sums or (None,) * len(self.parameters.tensors)
            return Cotangents((None,) * len(graph.inputs) if states else (), none if parameters else (), stretch, None)
        self.vjps += 1
        wanted = (*(graph.inputs if states else ()), *(self.parameters.tensors if parameters else ()), *times)
        if not wanted:
            return Cotangents((), (), stretch, None)
        found = self.pull_back(roots, wanted, along, keep, sums)
        split = len(graph.inputs) if states else 0
        last = len(found) - len(times)
        return Cotangents(found[:split], found[split:last], stretch, found[last] if times else None)

    def pull_back(
        self,
        roots: Sequence[GradientEdge],
        wanted: Sequence[torch.Tensor | GradientEdge],
        along: Sequence[torch.Tensor],
        keep: bool = False,
        sums: Sequence[torch.Tensor | None] = (),
    ) -> Sequence[torch.Tensor | None]:
        """The derivatives of <roots, along> by what is wanted; with `keep` the graph will be used again.

        Those by parameters are added to their `sums`, if given, one contribution after the other: so the result does
        not depend on how many evaluations a graph is made of. Collective if `func`'s backward is. Raises `ValueError`
        if the graph leads to what was computed, and reversed, before the solve.
        """
        begun = [
            (parameter, begin)
            for parameter, begin in zip(self.parameters.tensors, sums, strict=False)
            if begin is not None
        ]
        self.in_backward = True
        try:
            with log.event(log.PRODUCT, self.logs):
                return gradients(
                    (*roots, *(parameter for parameter, _ in begun)),
                    wanted,
                    (*along, *(begin for _, begin in begun)),
                    keep or self.parameters.shares_graph,
                )
        except RuntimeError as error:
            if "through the graph a second time" not in str(error):
                raise
            raise ValueError(
                "func depends on an intermediate result that was computed before the solve and was not found among its "
                "parameters: name it with params=(...)"
            ) from None
        finally:
            self.in_backward = False

    def batched_vjp(self, graph: StageGraph, layout: StateLayout, flats: torch.Tensor) -> torch.Tensor:
        """The products of each row of `flats` with func's derivative by the state, at once. Not for collective funcs.

        Raises `RuntimeError` where an operation has no rule for batches.
        """
        pieces = [
            piece.reshape(-1, *shape).to(layout.device, layout.compute_dtype)
            for piece, shape in zip(torch.split(flats, list(layout.sizes), dim=1), layout.shapes, strict=True)
        ]
        pairs = [(out, piece) for out, piece in zip(graph.values, pieces, strict=True) if out.requires_grad]
        if not pairs:
            return torch.zeros_like(flats)
        outputs, along = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            outputs,
            graph.inputs,
            along,
            allow_unused=True,
            materialize_grads=True,
            retain_graph=True,
            is_grads_batched=True,
        )
        self.vjps += len(flats)
        return torch.cat([value.reshape(len(flats), -1) for value in found], dim=1).to(flats)

    def tangent_map(self, graph: StageGraph) -> TangentMap:
        """The products of func's derivative by the state with vectors, as a map. Collective if func's backward is.

        A vector-Jacobian product J^T w is linear in w: its derivative by w, along v, is J v. Its graph is kept, so that
        every product costs one backward pass. (Forward-mode differentiation evaluates func anew for each, and torch's
        takes a slow path through Python for operands without a tangent.)
        """
        numbers = [number for number, out in enumerate(graph.values) if out.requires_grad]
        probes = tuple(torch.zeros_like(graph.values[number], requires_grad=True) for number in numbers)
        if not numbers:
            return TangentMap(self, graph.values, (), (), ())
        with torch.enable_grad():
            pulled = torch.autograd.grad(
                [graph.values[number] for number in numbers],
                graph.inputs,
                probes,
                create_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        return TangentMap(self, graph.values, tuple(numbers), probes, pulled)


@dataclass(slots=True)
class TangentMap:
    """J v at one state for any v, see `BoundFunction.tangent_map`: `pulled` is J^T `probes`, with its graph."""

    bound: BoundFunction
    outputs: Parts
    numbers: tuple[int, ...]
    probes: Parts
    pulled: Parts

    def __call__(self, tangents: Parts) -> Parts:
        """J v, part by part."""
        self.bound.jvps += 1
        results = [torch.zeros_like(out) for out in self.outputs]
        if not self.numbers:
            return tuple(results)  # f depends on no part of the state.
        pairs = [
            (value, tangent.to(value))
            for value, tangent in zip(self.pulled, tangents, strict=True)
            if value.requires_grad
        ]
        if pairs:
            values, along = zip(*pairs, strict=True)
            pushed = torch.autograd.grad(
                values, self.probes, along, allow_unused=True, materialize_grads=True, retain_graph=True
            )
            for number, value in zip(self.numbers, pushed, strict=True):
                results[number] = value
        return tuple(results)


Root = GradientEdge | None


class StageGraph(NamedTuple):
    """One recorded evaluation: f's inputs (leaves of their own graph), where its values come from, and when it was.

    `roots` are where the graph of each part of f's value ends, None where that depends on nothing. `values` are those
    themselves, left out where only products of the first order with constant times are to be formed: a graph need not
    keep them alive. `time` is a leaf of the graph as well where the gradient by the times is wanted, else None.
    """

    inputs: Parts
    roots: tuple[Root, ...]
    values: Parts
    when: float
    time: torch.Tensor | None = None


class StageState(NamedTuple):
    """The inputs of an evaluation, in f's floating type: its graph is made when it is asked for.

    `mark` is the state that f carried before it, and `fingerprint` that of its value, None where it is not known.
    """

    when: float
    inputs: Parts
    mark: Mark | None = None
    fingerprint: float | None = None


class Cotangents(NamedTuple):
    """Products of a vector v with the derivatives of f: by the parts of the state and by each parameter, None for zero.

    With respect to times: `value` is <f, v>, and `time` <df/dt, v>, None for zero.
    """

    states: Sequence[torch.Tensor | None]
    parameters: Sequence[torch.Tensor | None]
    value: torch.Tensor | int | None
    time: torch.Tensor | None


def step_cotangents(found: Cotangents, offset: float) -> list[torch.Tensor | None]:
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


def _root(value: torch.Tensor) -> Root:
    return get_gradient_edge(value) if value.requires_grad else None


def _check_type(value: torch.Tensor, layout: StateLayout) -> None:
    """Raise `TypeError` for values whose conversion to the state's type loses part of them, or hides a mistake."""
    if not value.dtype.is_floating_point:
        raise TypeError(
            f"func returned {value.dtype} for a state of {layout.dtype}: du/dt must be of a real floating type (write "
            "a complex state as two real parts, see torch.view_as_real)"
        )


def _refuse(result: Any, layout: StateLayout) -> NoReturn:
    wanted = f"a tuple of {len(layout.shapes)} tensors" if layout.is_tuple else "a tensor"
    raise TypeError(f"func must return {wanted} like u, got {_describe(result)}")


def _describe(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
