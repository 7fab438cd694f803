"""The backward pass of a solve: the discrete adjoint of its steps, from the last to the first."""

from __future__ import annotations

import time as clock
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from pnode_dist.checkpointing.replay import run_backward
from pnode_dist.ode import safe_points
from pnode_dist.ode.observing import with_further
from pnode_dist.ode.rhs.tangent import hooks_aside
from pnode_dist.ode.solve import Solve
from pnode_dist.ode.time_grid import gradient_wrt_times
from pnode_dist.petsc import log


class Gradients(NamedTuple):
    """This rank's gradient with respect to the parts of the initial state, the parameters and the times.

    `times` is empty unless the gradient with respect to the times was asked for.
    """

    states: tuple[torch.Tensor, ...]
    parameters: tuple[torch.Tensor, ...]
    times: tuple[torch.Tensor, ...]


def backward_pass(solve: Solve, cotangents: Sequence[torch.Tensor | None]) -> Gradients:
    """Pull the cotangents of the outputs back to the inputs of the solve. Collective.

    `cotangents` has one tensor for each part of the state, or of an observation, in the shape of the outputs; None is
    zero.
    """
    began = clock.perf_counter()
    solve.solver.open()
    stepper = solve.solver.stepper
    steps = 0 if solve.grid is None else solve.grid.steps
    segments, observing, costs, between = solve.divided, solve.observing, solve.costs, solve.between
    of_integrals: Sequence[torch.Tensor | None] = ()
    if costs is not None:
        costs.start_adjoint()
        count = len(costs.totals)
        cotangents, of_integrals = cotangents[:-count], cotangents[-count:]
    units = 0 if segments is None else segments.segments
    solve.bind()
    stepper.start_adjoint()
    if observing is not None:
        observing.start_adjoint(cotangents)
    if between is not None:
        between.start_adjoint()
    if observing is not None or steps not in solve.saved:
        stepper.add_to_adjoint([None] * len(stepper.layout.shapes))
    solve.size_gradients, solve.start_gradients = [0.0] * steps, [0.0] * steps

    def reversed_to(unit: int) -> None:
        step = 0 if segments is None else segments.bounds[unit]
        number, only = solve.saved.get(step), solve.saving.only_last
        if costs is not None and number is not None:
            costs.receive([part if part is None or only else part[number] for part in of_integrals])
        if observing is not None:
            # Observations of later states are pulled back just before the step that leads to them.
            if step == 0 and 0 in solve.saved:
                observing.keep(0, solve.times[0], solve.initial)
                solve.pull_back_observation(0)
            return
        if number is not None:
            stepper.add_to_adjoint([part if part is None or only else part[number] for part in cotangents])

    reversed_to(units)
    if steps > 0:
        with hooks_aside(solve.bound.parameters.tensors), log.stage(log.BACKWARD_PASS, solve.logs):
            disk_is_lost = run_backward(
                solve.actions,
                solve,
                solve.checkpoints,
                solve.statistics,
                reversed_to,
                solve.checkpoint_was_lost,
                solve.ram_slots,
            )
        solve.solver.disk_is_lost = solve.solver.disk_is_lost or disk_is_lost
        if solve.guard is not None:
            solve.guard.finish()
            solve.statistics.largest_mismatch = solve.guard.worst
    solve.update_counts()
    solve.release()
    stepper.current.release()
    safe_points.after_solve(stepper.comm)
    adjoint, gradients = stepper.end_adjoint([parameter.shape for parameter in solve.parameters])
    for beside in (observing, costs, between):
        if beside is not None:
            gradients = with_further(gradients, beside.gradient)
    solve.unbind()
    solve.solver.done()
    if solve.took is not None:
        solve.took.seconds += clock.perf_counter() - began
    layout = stepper.layout
    states = tuple(part.to(layout.device, layout.dtype) for part in adjoint)
    parameters = tuple(
        gradient
        if parameter.dtype is gradient.dtype and parameter.device == gradient.device
        else gradient.to(parameter.device, parameter.dtype)
        for gradient, parameter in zip(gradients, solve.parameters, strict=True)
    )
    if not solve.bound.needs_time_gradient:
        return Gradients(states, parameters, ())
    found = [0.0] * len(solve.times)
    by_time = Counter({} if observing is None else observing.by_time)
    if between is not None:
        by_time.update(between.by_time)
    if steps > 0:
        found = gradient_wrt_times(solve.steps, solve.times, solve.size_gradients, solve.start_gradients, by_time)
    elif 0 in by_time:
        found[0] = by_time[0]
    return Gradients(states, parameters, (torch.tensor(found, dtype=solve.time_dtype),))
