"""`odeint` and `NeuralODE`: a solve as one differentiable operation.

C. Zhang, W. Zhao: A memory-efficient neural ordinary differential equation framework based on high-level adjoint
differentiation, IEEE Trans. Artif. Intell. (2022), arXiv 2206.01298 (PNODE): the adjoint of the time integration is
discrete and exact, only f itself is differentiated by the automatic tool.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from pnode_dist.ode import methods
from pnode_dist.ode.layout import State, layout_of
from pnode_dist.ode.parameters import find_parameters, independent
from pnode_dist.ode.rhs import Function, Problem
from pnode_dist.ode.solve import Solve, Solver, communicator
from pnode_dist.ode.stepper import PetscOptions
from pnode_dist.ode.time_grid import time_grid
from pnode_dist.partition.protocol import Partition
from pnode_dist.trajectory.budget import Trajectory, agree_on_slots
from pnode_dist.trajectory.statistics import SolveStatistics

Times = torch.Tensor | Sequence[float]
_KEPT_SOLVERS = 8


class _Differentiable(torch.autograd.Function):
    """The solve as a node of torch's graph: state parts first, then parameters."""

    @staticmethod
    def forward(ctx: Any, solve: Solve, parts: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.solve, ctx.parts, ctx.reversed = solve, parts, False
        ctx.set_materialize_grads(False)
        # Not only for a second backward pass: torch now notices when they are changed in place before the first.
        ctx.save_for_backward(*tensors)
        # A graph that is dropped without a backward pass gives its checkpoints back.
        weakref.finalize(ctx, solve.checkpoints.clear).atexit = False
        return solve.forward(tensors[:parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> Any:
        solve, tensors = ctx.solve, ctx.saved_tensors
        if ctx.reversed:
            # The checkpoints went as they were used: lay the trajectory down again.
            solve.forward(tensors[: ctx.parts])
        ctx.reversed = True
        states, parameters = solve.backward(cotangents)
        return None, None, *states, *parameters


class _Solvers:
    """The solvers that a `NeuralODE` keeps between calls, least recently used ones dropped."""

    def __init__(self) -> None:
        self._solvers: OrderedDict[Any, Solver] = OrderedDict()

    def __reduce__(self) -> tuple[type[_Solvers], tuple[()]]:
        # Copies and pickles of a module make solvers of their own.
        return _Solvers, ()

    def get(self, key: Any, create: Callable[[], Solver]) -> Solver:
        """The solver of `key`, made if it is not there; one of its own for a solve inside a step of that solver."""
        if key in self._solvers and self._solvers[key].stepper.stepping:
            return create()
        if key not in self._solvers or self._solvers[key].stepper.failed:
            self._solvers[key] = create()
            if len(self._solvers) > _KEPT_SOLVERS:
                self._solvers.popitem(last=False)
        self._solvers.move_to_end(key)
        return self._solvers[key]


def _solve(
    solvers: _Solvers,
    func: Function,
    u0: State,
    t: Times,
    method: str,
    step_size: float | None,
    partition: Partition | None,
    trajectory: Trajectory | None,
    args: tuple[Any, ...],
    params: Sequence[torch.Tensor] | None,
    options: PetscOptions | None,
) -> tuple[State, SolveStatistics]:
    layout, parts = layout_of(u0)
    grid = time_grid(t, step_size)
    table = methods.resolve(method)
    comm = communicator(partition)
    trajectory = trajectory or Trajectory()
    parameters = independent(find_parameters(func, (*args, *(params or ()))))
    sizes = tuple(parameter.numel() for parameter in parameters.tensors)
    options = dict(options or {})
    tensors = (*parts, *parameters.tensors)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not callable(func):
        raise TypeError(f"func must be callable as func(t, u), got {type(func).__name__}")
    solver = solvers.get(
        (id(partition), layout, table, sizes, repr(options), trajectory),
        lambda: Solver.create(partition, layout, table, sizes, options, trajectory),
    )
    slots = agree_on_slots(trajectory, solver.stepper.state_array.nbytes, grid.steps, needs_gradient, comm)
    statistics = SolveStatistics()
    problem = Problem(func, args, parameters, watched=torch.is_grad_enabled() and not needs_gradient)
    solve = Solve(solver, grid, problem, statistics, needs_gradient, slots)
    if needs_gradient:
        outputs = _Differentiable.apply(solve, len(parts), *tensors)  # type: ignore[no-untyped-call]
    else:
        with torch.no_grad():
            outputs = solve.forward(parts)
    return layout.as_state(outputs), statistics


@overload
def odeint(
    func: Function,
    u0: torch.Tensor,
    t: Times,
    *,
    method: str = ...,
    step_size: float | None = ...,
    partition: Partition | None = ...,
    trajectory: Trajectory | None = ...,
    args: tuple[Any, ...] = ...,
    params: Sequence[torch.Tensor] | None = ...,
    options: PetscOptions | None = ...,
) -> torch.Tensor: ...


@overload
def odeint(
    func: Function,
    u0: tuple[torch.Tensor, ...],
    t: Times,
    *,
    method: str = ...,
    step_size: float | None = ...,
    partition: Partition | None = ...,
    trajectory: Trajectory | None = ...,
    args: tuple[Any, ...] = ...,
    params: Sequence[torch.Tensor] | None = ...,
    options: PetscOptions | None = ...,
) -> tuple[torch.Tensor, ...]: ...


def odeint(
    func: Function,
    u0: State,
    t: Times,
    *,
    method: str = "rk4",
    step_size: float | None = None,
    partition: Partition | None = None,
    trajectory: Trajectory | None = None,
    args: tuple[Any, ...] = (),
    params: Sequence[torch.Tensor] | None = None,
    options: PetscOptions | None = None,
) -> State:
    """Solve du/dt = func(t, u, *args) from u(t[0]) = u0; differentiable in u0 and in func's parameters.

    Collective on the partition's communicator, and so is the backward pass.

    `func(t, u, *args)` gets a 0-dimensional tensor and this rank's part of the state, and returns du/dt in the same
    shape. It must be deterministic: parts of the solve are run again for the gradient. `u0` is this rank's part of the
    initial state, a tensor or a tuple of tensors; `func` computes in its floating type, while steps, checkpoints
    and adjoints are in PETSc's scalar type. `t` holds the output times, strictly increasing or strictly decreasing.
    Every interval between them is divided into `ceil(|dt| / step_size)` equal steps of `method`, one step if
    `step_size` is None. Returns `[len(t), *u0.shape]`, for a tuple a tuple of such.

    `method` is one of `pnode_dist.ode.methods.METHODS` or PETSc's name of it. `partition` says over which ranks the
    state is spread; None: this rank's state is its own. `trajectory` is the budget for checkpoints. `options` are
    PETSc options for the solver, such as `{"ts_monitor": None}`.

    The gradient is that of the numbers computed (a discrete adjoint), for the objective that is the sum of all ranks'
    losses. Parameter gradients are this rank's contributions: `pnode_dist.sync.parallel` sums them. `func`'s
    parameters are those of a module, and otherwise the tensors requiring a gradient that a function closes over,
    also in `args`; `params` adds those that cannot be found, and an error says when that is needed.

    Raises `ConfigurationError` for an unknown method or a budget too small for one checkpoint, `ValueError` for
    times that are not monotone or require a gradient and for a du/dt of another shape, `TypeError` for a state that
    is not real floating-point CPU tensors.
    """
    outputs, _ = _solve(_Solvers(), func, u0, t, method, step_size, partition, trajectory, args, params, options)
    return outputs


class NeuralODE(nn.Module):
    """`odeint` of a right-hand side as a module that keeps its PETSc solver between calls.

    The arguments are those of `odeint`; `forward(u0, t, *args)` returns `[len(t), *u0.shape]`. Attributes may be
    changed between calls. `last_solve` holds the counts of the last call, and after its backward pass those too.
    """

    def __init__(
        self,
        func: Function,
        *,
        method: str = "rk4",
        step_size: float | None = None,
        partition: Partition | None = None,
        trajectory: Trajectory | None = None,
        params: Sequence[torch.Tensor] | None = None,
        options: PetscOptions | None = None,
    ) -> None:
        super().__init__()
        methods.resolve(method)
        self.func = func
        self.method = method
        self.step_size = step_size
        self.partition = partition
        self.trajectory = trajectory
        self.params = params
        self.options = options
        self.last_solve = SolveStatistics()
        self._solvers = _Solvers()

    @overload
    def forward(self, u0: torch.Tensor, t: Times, *args: Any) -> torch.Tensor: ...

    @overload
    def forward(self, u0: tuple[torch.Tensor, ...], t: Times, *args: Any) -> tuple[torch.Tensor, ...]: ...

    def forward(self, u0: State, t: Times, *args: Any) -> State:
        """The states at the times `t`, starting from `u0` at `t[0]`. Collective on the partition's communicator."""
        outputs, self.last_solve = _solve(
            self._solvers,
            self.func,
            u0,
            t,
            self.method,
            self.step_size,
            self.partition,
            self.trajectory,
            args,
            self.params,
            self.options,
        )
        return outputs

    def extra_repr(self) -> str:
        """Settings, for printing."""
        return f"method={self.method!r}, step_size={self.step_size}"
