"""`odeint` and `NeuralODE`: solve an ODE as one differentiable operation.

The adjoint of the time integration is discrete and exact. Automatic differentiation is applied to f alone. (H. Zhang,
W. Zhao: A memory-efficient neural ordinary differential equation framework based on high-level adjoint differentiation,
IEEE Trans. Artif. Intell. (2022), arXiv 2206.01298: PNODE.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Unpack, overload

import torch
from torch import nn

from pnode_dist.checkpointing.plan import Plan, Plans
from pnode_dist.checkpointing.statistics import SolveStatistics
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode import methods
from pnode_dist.ode.autograd.differentiable import solution, tangent_call_of
from pnode_dist.ode.autograd.outside_graphs import outside_graphs
from pnode_dist.ode.autograd.transforms import transforming
from pnode_dist.ode.call_agreement import preparation
from pnode_dist.ode.complex_state import Kept, RealCall, real_call
from pnode_dist.ode.differentiable_solve import (
    as_asked,
    differentiable_solve,
    outputs_of,
    transformed_call,
    with_functions,
)
from pnode_dist.ode.kept_solvers import KeptSolvers, NoSolvers
from pnode_dist.ode.prepare import prepared, settings_of_tangents
from pnode_dist.ode.rhs.compiled import Compiler
from pnode_dist.ode.rhs.evaluation import Function
from pnode_dist.ode.rhs.layout import Parts, State, StateLayout, layout_of
from pnode_dist.ode.rhs.parameters import find_parameters, independent
from pnode_dist.ode.rhs.tangent import checked_direction, stacked, with_tangent
from pnode_dist.ode.running_cost import is_separate, with_cost, with_separate_cost
from pnode_dist.ode.settings import (
    KEYWORDS,
    CallSettings,
    SolverKeywords,
    SolverSettings,
    Times,
    lists_settings,
    merged,
)
from pnode_dist.ode.solve import Solve
from pnode_dist.ode.solve_lock import solve_lock
from pnode_dist.ode.solve_plans import compile_steps, measured_plans
from pnode_dist.ode.solver import communicator


@overload
def odeint(
    func: Function,
    u0: torch.Tensor,
    t: Times,
    settings: SolverSettings | None = ...,
    *,
    args: tuple[Any, ...] = ...,
    **keywords: Unpack[SolverKeywords],
) -> torch.Tensor: ...


@overload
def odeint(
    func: Function,
    u0: tuple[torch.Tensor, ...],
    t: Times,
    settings: SolverSettings | None = ...,
    *,
    args: tuple[Any, ...] = ...,
    **keywords: Unpack[SolverKeywords],
) -> tuple[torch.Tensor, ...]: ...


@lists_settings
@outside_graphs
def odeint(
    func: Function,
    u0: State,
    t: Times,
    settings: SolverSettings | None = None,
    *,
    args: tuple[Any, ...] = (),
    **keywords: Unpack[SolverKeywords],
) -> Any:
    """Solve M du/dt = func(t, u, *args) from u(t[0]) = u0; differentiable in u0, in func's parameters and in t.

    Collective on the partition's communicator, and so is the backward pass. Returns `[len(t), *u0.shape]`, or a tuple
    of such tensors if u0 is a tuple. `pnode_dist.torchdiffeq` has this solve with torchdiffeq's arguments and defaults.
    The keyword arguments are the fields of `SolverSettings`. `settings` gives several of them as one object; keyword
    arguments given beside it take precedence.

    Right-hand side
        `func(t, u, *args)` gets a 0-dimensional tensor and this rank's part of the state. It returns du/dt in the shape
        of u. It must be a function of its arguments and its parameters alone, because the backward pass recomputes
        steps. For that the backward pass restores everything that func read in the forward pass: parameters, buffers,
        attributes and the training mode of modules, variables of closures, globals, autocast, the default type, and
        with `preserve_rng_state` torch's random states at every recomputed segment. Tensors and attributes that func
        changes advance once, in the forward pass. A recomputed step that differs by more than rounding raises
        `RecomputationError`; with `on_mismatch` "warn" or "ignore" the solve continues. func may return memory that it
        uses again later: such values are copied.

    State and types
        `u0` is this rank's part of the initial state, a tensor or a tuple of tensors. Complex parts are solved as their
        real views, and `func` gets and returns complex tensors for them; error control takes real and imaginary parts
        as entries of their own, and gradients follow torch's convention. `func` computes in the floating type of `u0`
        unless `compute_dtype` names another one. With `compute_dtype` the parameters and buffers of modules, and
        tensors in `args`, are converted to it once for a solve. Outside they keep their own type, and so do their
        gradients. States, checkpoints and adjoints are of `state_dtype`, for explicit Runge-Kutta methods by default
        the wider type of `u0` and func, but at least float32; all other methods have PETSc's scalar type. Gradients of
        parameters are summed over steps in the wider one of that type and their own. `u0` may be on another device:
        func then computes there. PETSc's vectors are there too for a CUDA device, a PETSc with CUDA and an explicit
        method. Otherwise states are copied back and forth.

    Steps
        `t` holds the output times, strictly increasing or strictly decreasing. Each interval between them is divided
        into `ceil(|dt| / step_size)` equal steps of `method`, or one step if `step_size` is None. With `rtol` or `atol`
        (by default 1e-6 and 1e-9 beside the other one) the step size follows from an estimate of the error, by PETSc's
        `adaptor`, or "pid" with `pcoeff`, `icoeff` and `dcoeff` (see `ErrorControl`, `PidRule`). Then `first_step` or
        `step_size` is the size of the first step, and `dt_min` and `dt_max` are bounds. `max_steps` limits the steps of
        a solve. If `t` has two times and neither `step_size` nor tolerances are given, a warning reports a step that is
        far too long. The first such solve evaluates `func` at two steps of half the size for this check. Steps also end
        at `jumps`, times at which func is not smooth, and func is evaluated on the step's side of them.

        `between_steps` is a map m(t, u, *args) to a state like u, for a filter, a limiter or a projection. Its value
        takes the place of u after each accepted step, t being the end of the step, before outputs are taken there.
        Error control has looked at the step without it, and the next step evaluates func anew. The map has parameters
        and communicates as func does, computes in the type of u0, and is differentiated exactly.

    Method
        `method` is one of `pnode_dist.ode.methods.METHODS`, by default `rk4`, or `dopri5` with error control. Methods
        of the families `theta`, `arkimex`, `dirk` and `irk` solve equations in every step. With `arkimex` the parts of
        a `SplitFunction` are treated implicitly and explicitly. The family `symplectic` takes a state (q, p) with dq/dt
        of p and dp/dt of q alone, best as a `Separable`. `mass` is a constant matrix M for the families `theta` and
        `irk`, which may be singular (see `mass_matrix`). `preconditioner` is that of the linear systems: `block`,
        `assembled`, or an object of `pnode_dist.ode.steppers.preconditioner`. `options` are PETSc options for the
        solver, such as `{"ts_monitor": None, "snes_rtol": 1e-10, "pc_type": "gamg"}`. An option that PETSc does not
        read is an error.
        `newton` chooses the solver of the equations: "petsc", or "batch" for samples (the first axis of the state) of
        at most 48 components that do not depend on one another. Their dense systems are then factored at once. "auto"
        is "batch" where that is possible.

    Outputs
        The outputs are the states at the times `t`. `save` chooses others: `"last"` (short: `last_only`), all accepted
        `"steps"`, every n-th step, or several of these; with steps a `Saved(t, u)` is returned, the times too. With
        `observe` the outputs are h(t, u, *args) in place of u, and take the memory of that: the backward pass
        recomputes the states. `integrate` adds the integrals of a running cost, by the quadrature of an explicit
        or theta method, as `Integrated(u, integral)`. `on_output` takes the time and the value of each output while the
        solve goes on, without a gradient; then nothing is returned. Observations and costs have parameters and
        communicate as `func` does, and must be functions of their arguments and parameters alone.

    Ranks and memory
        `partition` defines the distribution of the state over ranks; with None each rank has a state of its own.
        `trajectory` is the budget for checkpoints. With `last_only` only the state at `t[-1]` is returned, in the shape
        of `u0`, and the others take no memory. Threads take turns, one forward or backward pass at a time.

    Gradient
        The gradient is that of the numbers computed (a discrete adjoint, with each accepted step as a fixed share of
        its interval), for the sum of all ranks' losses as the objective. Gradients with respect to parameters and times
        are this rank's contributions: `pnode_dist.distributed.gradients.parallel` sums those of parameters. The
        parameters of `func` are those of a module, and otherwise the tensors requiring a gradient that a function
        closes over, also in `args`. `params` adds tensors that cannot be found; an error reports if that is needed.

    Raises `ConfigurationError` for an unknown method, a gradient of a method without an adjoint, or a budget too small
    for one checkpoint; `ValueError` for times that are not monotone and for a du/dt of another shape; `TypeError` for a
    state or a du/dt that is not floating-point or complex tensors; `StepSizeError` if no step meets the tolerances;
    `ConvergenceError` if the equations of a step or of its adjoint are not solved; `DisagreementError` if the ranks
    make different calls.
    """
    asked = CallSettings(**vars(merged(settings, keywords, "odeint")))
    with preparation(communicator(asked.partition)) as preparing:
        call = real_call(func, u0, asked)
        preparing.later()
    return call.outputs(differentiable_solve(NoSolvers(), NoSolvers(), call.func, call.u0, t, call.settings, args)[0])


class NeuralODE(nn.Module):
    """`odeint` as a module, which keeps its PETSc solver between calls.

    The keyword arguments are those of `odeint`: the fields of `settings`, a `SolverSettings`. Each is an attribute of
    the module too, and may be changed between calls: `node.method = "dopri5"` replaces `settings` by a changed copy.
    func and `between_steps` are submodules if they are modules.
    `forward(u0, t, *args)` returns the outputs of `odeint`. `last_solve` holds the counts
    of the last call, and after its backward pass also those of that. `last_plan` is the plan of the last call, None
    without gradients or with error control. Set `fixed_plan` to one of the candidates of `plan` to use it for all
    solves.

    With `compile` a solve runs as generated code of torch.compile, by its default backend or the one named: explicit
    steps and small implicit systems with all their operations, else f and its vector-Jacobian products.
    Compilation takes seconds at the first call, or in `precompile`. It pays where f is small or has many small
    operations, and changes results by rounding. With `compile="auto"` solves are compiled once they have taken 20
    seconds, and no longer if that is not faster.
    """

    settings: SolverSettings

    @lists_settings
    def __init__(
        self,
        func: Function,
        settings: SolverSettings | None = None,
        *,
        compile: bool | str = False,
        **keywords: Unpack[SolverKeywords],
    ) -> None:
        super().__init__()
        self.settings = merged(settings, keywords, "NeuralODE")
        if self.settings.method is not None:
            methods.resolve(self.settings.method)
        self.func = func
        self.compiler = None
        if compile is not False:
            backend = "inductor" if compile is True or compile == "auto" else compile
            self.compiler = Compiler(backend, automatic=compile == "auto")
        self.last_solve = SolveStatistics()
        self.last_plan: Plan | None = None
        self.fixed_plan: Plan | None = None
        self._solvers = KeptSolvers()
        self._tangent_solvers = KeptSolvers()
        self._of_real_views: Kept = {}

    @overload
    def forward(self, u0: torch.Tensor, t: Times, *args: Any) -> torch.Tensor: ...

    @overload
    def forward(self, u0: tuple[torch.Tensor, ...], t: Times, *args: Any) -> tuple[torch.Tensor, ...]: ...

    @outside_graphs
    def forward(self, u0: State, t: Times, *args: Any) -> Any:
        """Return the states at the times `t` from `u0` at `t[0]`. Collective on the partition's communicator."""
        call = self._real_call(u0)
        outputs, solve = differentiable_solve(
            self._solvers, self._tangent_solvers, call.func, call.u0, t, call.settings, args
        )
        self.last_solve, self.last_plan = solve.statistics, solve.plan
        return call.outputs(outputs)

    @outside_graphs
    def jvp(
        self,
        u0: State,
        t: Times,
        u0_tangent: State,
        parameter_tangents: Mapping[torch.Tensor, torch.Tensor] | None = None,
        *args: Any,
    ) -> tuple[Any, Any]:
        """Return the states at the times `t`, and their tangents along a direction in initial state and parameters.

        `u0_tangent` has the shape of `u0`. `parameter_tangents` maps parameters to their tangents; the others are zero.
        Both results are differentiable. With error control the steps are those of the solve without tangents.
        Collective on the partition's communicator.
        """
        call = self._real_call(u0)
        func, asked = call.func, call.settings
        with preparation(communicator(self.settings.partition)) as preparing:
            state, is_tuple = stacked(call.u0, call.inputs(u0_tangent))
            direction = checked_direction(parameter_tangents)
            preparing.later()
        whole = with_functions(func, asked, is_tuple)
        if self.settings.on_output is not None:
            raise ConfigurationError("on_output: must be None for tangents, which are returned with the outputs")
        if self.settings.integrate is not None:
            raise ConfigurationError("integrate: must be None for jvp(); torch.func.jvp has the tangents of integrals")
        if transforming():
            return self._transformed_jvp(call, whole, t, state[len(state) // 2 :], direction, args)

        def before() -> Solve:
            with torch.no_grad():
                return differentiable_solve(self._solvers, self._tangent_solvers, func, call.u0, t, asked, args)[1]

        settings = settings_of_tangents(asked, func, is_tuple, before, 2)
        every = independent(find_parameters(whole, (*args, *(self.settings.params or ()))))
        both = with_tangent(whole, is_tuple, direction, every)
        outputs, solve = outputs_of(self._tangent_solvers, self._tangent_solvers, both, state, t, settings, args)
        self.last_solve, self.last_plan = solve.statistics, solve.plan
        return _halves(call, outputs, solve, whole, layout_of(call.u0)[0], t)

    def _transformed_jvp(
        self,
        real: RealCall,
        func: Function,
        t: Times,
        tangents: tuple[torch.Tensor, ...],
        direction: Mapping[torch.Tensor, torch.Tensor],
        args: tuple[Any, ...],
    ) -> tuple[Any, Any]:
        call, layout, tensors = transformed_call(
            self._solvers, self._tangent_solvers, func, real.u0, t, real.settings, args
        )
        found = dict(zip(map(id, call.asked.parameters), range(call.parameters), strict=True))
        along: list[torch.Tensor | None] = [*tangents, *(None,) * (len(tensors) - len(tangents))]
        for parameter, tangent in direction.items():
            along[len(tangents) + found[id(parameter)]] = tangent
        tangent_call, inputs = tangent_call_of(call, tensors, along, True)
        tangent_call.repeats = False
        outputs = solution(tangent_call, inputs)
        solve = tangent_call.latest()
        self.last_solve, self.last_plan = solve.statistics, solve.plan
        return _halves(real, outputs, solve, func, layout, t)

    def plan(self, u0: State, t: Times, *args: Any) -> Plans:
        """Return the candidate plans for this solve within the budget, with predicted times, and the chosen one.

        Measures the first step and its checkpoints. Collective on the partition's communicator. Raises `ValueError` for
        steps with error control, whose number is not known beforehand.
        """
        if transforming():
            raise ConfigurationError("plan: not available under torch's transforms or in forward mode: call it before")
        call = self._real_call(u0)
        with solve_lock():
            func, state, settings = self._posed(call, t, args)
            solve, layout, tensors = prepared(self._solvers, func, state, t, settings, args, "plan")
            if solve.control is not None:
                raise ValueError("steps with error control (rtol, atol) cannot be planned: their number is not known")
            if refusal := solve.solver.gradient_refusal():
                raise ConfigurationError(refusal)
            with torch.no_grad(), solve.bound.copies.in_place():
                return measured_plans(solve, tensors[: len(layout.shapes)])

    def precompile(self, u0: State, t: Times, *args: Any) -> None:
        """Compile the steps of solves like this one, which otherwise happens at the first of them.

        Does nothing without `compile`, or where steps are not compiled.
        f is evaluated, and what it changes is put back. Collective on the partition's communicator.
        """
        if transforming():
            raise ConfigurationError("precompile: not available under torch's transforms: call it before")
        call = self._real_call(u0)
        with solve_lock():
            func, state, settings = self._posed(call, t, args)
            solve, layout, tensors = prepared(self._solvers, func, state, t, settings, args, "precompile")
            with torch.no_grad(), solve.bound.copies.in_place():
                compile_steps(solve, tensors[: len(layout.shapes)])

    def _posed(self, call: RealCall, t: Times, args: tuple[Any, ...]) -> tuple[Function, State, CallSettings]:
        """Return right-hand side, state and settings of a solve, with the observation and the running cost."""
        whole = with_functions(call.func, call.settings, isinstance(call.u0, tuple | list))
        if call.settings.integrate is None:
            return whole, call.u0, call.settings
        if is_separate(call.settings):
            func, settings = with_separate_cost(whole, call.settings, isinstance(call.u0, tuple | list))
            return func, call.u0, settings
        posed = with_cost(self._solvers, whole, call.u0, t, call.settings, args)
        return posed.func, posed.u0, posed.settings

    def _real_call(self, u0: State) -> RealCall:
        asked = CallSettings(**vars(self.settings), fixed_plan=self.fixed_plan, compiler=self.compiler)
        with preparation(communicator(asked.partition)) as preparing:
            call = real_call(self.func, u0, asked, self._of_real_views)
            preparing.later()
        return call

    def __getattr__(self, name: str) -> Any:
        """Return a field of `settings`, or what torch keeps under the name."""
        return getattr(self.settings, name) if name in KEYWORDS else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Replace a field of `settings`, or set an attribute as torch does."""
        if name in KEYWORDS:
            name, value = "settings", replace(self.settings, **{name: value})
        elif name == "settings":
            value = merged(value, {}, "NeuralODE")
        super().__setattr__(name, value)
        if name == "settings":
            self._register(value.between_steps)

    def _register(self, between: Any) -> None:
        """Make the map between steps a submodule if it is a module, so that its parameters are trained with f's."""
        if isinstance(between, nn.Module):
            super().__setattr__("between_steps", between)
        elif "between_steps" in self._modules:
            super().__delattr__("between_steps")

    def __dir__(self) -> list[str]:
        """Return the names of all attributes, the fields of `settings` included."""
        return sorted({*super().__dir__(), *KEYWORDS})  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """Return the settings for `repr`."""
        chosen = self.settings
        control = "" if chosen.rtol is None and chosen.atol is None else f", rtol={chosen.rtol}, atol={chosen.atol}"
        return f"method={chosen.method!r}, step_size={chosen.step_size}{control}"


def _halves(
    call: RealCall, outputs: Parts, solve: Solve, func: Function, layout: StateLayout, t: Times
) -> tuple[Any, Any]:
    """Return the outputs of a solve of tangents: the values, and their tangents."""
    half = len(outputs) // 2
    values, tangents = (as_asked(part, solve, func, layout, t) for part in (outputs[:half], outputs[half:]))
    return call.outputs(values), call.outputs(tangents)
