"""The forces of the pendulum, its motion from the equation for the angle, and the states of the motion.

A state is (x, y, vx, vy, tension): the position and velocity of the point, and the pull of the rod per unit of distance
from the pivot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from petsc4py import PETSc

from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.steppers.base import options_database
from pnode_dist.problems.common.reference import NotIntegrableError, integrator, sampled_solve
from pnode_dist.problems.pendulum.config import PendulumParameters

Array = npt.NDArray[np.float64]

COMPONENTS = ("x", "y", "vx", "vy", "tension")
_METHOD = "8vr"
_TOLERANCE = 1e-12
_FIRST_STEP = 1e-3
_MOST_STEPS = 1_000_000
_PREFIX = "pendulum_data_"


def force(velocity: Array, parameters: PendulumParameters) -> Array:
    """Return gravity plus drag `[..., 2]` on a unit mass that moves with `velocity` `[..., 2]`."""
    relative = velocity - np.array([parameters.wind, 0.0])
    linear, quadratic = parameters.drag
    speed = np.linalg.norm(relative, axis=-1, keepdims=True)
    result: Array = np.array([0.0, -parameters.gravity]) - (linear + quadratic * speed) * relative
    return result


def without_air(parameters: PendulumParameters) -> PendulumParameters:
    """Return the parameters of the same pendulum in a vacuum."""
    return dataclasses.replace(parameters, drag=(0.0, 0.0))


def states(angle: Array, angular_velocity: Array, parameters: PendulumParameters) -> Array:
    """Return the states `[..., 5]` for angles from the downward rest and their rates of change, both `[...]`."""
    outward = np.stack([np.sin(angle), -np.cos(angle)], axis=-1)
    position = parameters.length * outward
    velocity = parameters.length * angular_velocity[..., None] * _along(angle)
    # The pull keeps the distance from the pivot constant: the second derivative of |position|^2 / 2 is zero.
    pull = (velocity**2).sum(axis=-1) + (position * force(velocity, parameters)).sum(axis=-1)
    return np.concatenate([position, velocity, (pull / parameters.length**2)[..., None]], axis=-1)


def initial_motion(largest_angle: float, largest_speed: float, length: float, seed: int, number: int) -> Array:
    """Draw the initial angle and its rate of change `[2]` for `seed` and `number`."""
    angle, speed = np.random.default_rng([seed, number]).uniform(-1.0, 1.0, 2) * (largest_angle, largest_speed)
    return np.array([angle, speed / length])


def motion(initial: Array, times: Sequence[float], parameters: PendulumParameters) -> Array:
    """Return the angles and their rates of change `[time, trajectory, 2]` at increasing `times`.

    `initial` `[trajectory, 2]` holds the values at the first time. The integrator is PETSc's TS with Verner's pair of
    order 8(7) and step control at a relative and absolute tolerance of 1e-12. Not collective. Raises
    `ConfigurationError` if step control fails.
    """
    solution = PETSc.Vec().createSeq(initial.size, comm=PETSc.COMM_SELF)

    def slope(ts: Any, t: float, u: PETSc.Vec, result: PETSc.Vec) -> None:
        angle, angular_velocity = u.array_r.reshape(initial.shape).T
        along = _along(angle)
        pushed = force(parameters.length * angular_velocity[:, None] * along, parameters)
        change = (pushed * along).sum(axis=-1) / parameters.length
        result.array[:] = np.stack([angular_velocity, change], axis=-1).reshape(-1)

    ts = integrator(PETSc.COMM_SELF, _PREFIX, PETSc.TS.Type.RK, _MOST_STEPS, min(_FIRST_STEP, *np.diff(times)))
    ts.setRKType(_METHOD)
    ts.setRHSFunction(slope, solution.duplicate())
    ts.setTolerances(rtol=_TOLERANCE, atol=_TOLERANCE)
    ts.setTime(times[0])
    # The tolerance applies to each trajectory, not to their mean.
    with options_database({f"{_PREFIX}ts_adapt_wnormtype": "infinity"}):
        ts.setFromOptions()
    solution.array[:] = initial.reshape(-1)

    def sample() -> Array:
        # PETSc's maximum norm ignores NaN.
        found: Array = solution.array_r.reshape(initial.shape).copy()
        if not np.isfinite(found).all():
            raise NotIntegrableError(ts.getTime())
        return found

    try:
        return np.stack(sampled_solve(ts, solution, times, sample))
    except NotIntegrableError as error:
        raise ConfigurationError(
            f"[problem]: the motion cannot be followed to {times[-1]:g} s, but to {error.reached:g} s: gravity, drag "
            "or wind is too large"
        ) from None


def _along(angle: Array) -> Array:
    """Return the direction `[..., 2]` in which the point moves when the angle grows."""
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1)
