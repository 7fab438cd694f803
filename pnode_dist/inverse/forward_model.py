"""The residuals of all observations as a function of initial state, parameters and model errors, and their tangents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from pnode_dist.inverse.covariance import CovarianceLike
from pnode_dist.inverse.observation import Observation
from pnode_dist.ode.odeint import NeuralODE

States = dict[float, torch.Tensor]


@dataclass(frozen=True, eq=False)
class ModelError:
    """Errors of the model, added to the state at each of `times`: controls with mean zero and the given covariance.

    The times divide the trajectory into windows (the weak constraint of 4D-Var). An observation at one of them sees the
    state after the addition. `covariance` is that of one addition, or its variance.
    """

    times: Sequence[float]
    covariance: CovarianceLike


class ForwardModel:
    """The observations of a trajectory of `node` that begins at `start`. Collective on the node's partition.

    `jumps` are the times at which errors are added to the state.
    """

    def __init__(
        self, node: NeuralODE, observations: Sequence[Observation], start: float, jumps: Sequence[float]
    ) -> None:
        self.node, self.observations, self.start = node, tuple(observations), start
        observed = {time for observation in observations for time in observation.times}
        last = max(observed)
        self.windows = [
            sorted({begin, end, *(time for time in observed if begin < time < end)})
            for begin, end in pairwise((start, *jumps, last))
            if begin < end
        ]

    def residuals(self, state: torch.Tensor, errors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the whitened residual of each observation, flat, as functions of the state, errors and parameters."""
        states: States = {self.start: state}
        for window, error in zip(self.windows, (*errors, None), strict=False):
            outputs = self.node(states[window[0]], window)
            states.update(zip(window[1:], outputs[1:], strict=True))
            if error is not None:
                states[window[-1]] = states[window[-1]] + error
        return [self._residual(observation, states) for observation in self.observations]

    def forecast(self, state: torch.Tensor, errors: Sequence[torch.Tensor], times: Sequence[float]) -> torch.Tensor:
        """Return the states `[time, *local_shape]` at ascending times, also after the last observation."""
        jumps = [window[0] for window in self.windows[1:]]
        found: list[torch.Tensor] = []
        for begin, end, error in zip((self.start, *jumps), (*jumps, math.inf), (*errors, None), strict=True):
            inside = [time for time in times if begin <= time < end]
            stops = sorted({begin, *inside, *([end] if math.isfinite(end) else [])})
            outputs = self.node(state, stops) if len(stops) > 1 else state[None]
            found += [outputs[stops.index(time)] for time in inside]
            state = outputs[-1] if error is None else outputs[-1] + error
        return torch.stack(found)

    def tangents(
        self,
        state: torch.Tensor,
        errors: Sequence[torch.Tensor],
        state_tangent: torch.Tensor,
        error_tangents: Sequence[torch.Tensor],
        parameter_tangents: Mapping[torch.Tensor, torch.Tensor],
    ) -> tuple[States, States]:
        """Return the states at all times, and their tangents along a direction. Both are differentiable."""
        states: States = {self.start: state}
        tangents: States = {self.start: state_tangent}
        jumps: Any = (*zip(errors, error_tangents, strict=True), None)
        for window, jump in zip(self.windows, jumps, strict=False):
            first = window[0]
            values, moved = self.node.jvp(states[first], window, tangents[first], parameter_tangents)
            states.update(zip(window[1:], values[1:], strict=True))
            tangents.update(zip(window[1:], moved[1:], strict=True))
            if jump is not None:
                last = window[-1]
                states[last], tangents[last] = states[last] + jump[0], tangents[last] + jump[1]
        return states, tangents

    def pushed_residuals(self, states: States, tangents: States) -> list[torch.Tensor]:
        """Return the tangents of the residuals along those of the states, outside of any graph."""
        pushed = []
        for observation in self.observations:
            own = tuple(states[time].detach() for time in observation.times)
            along = tuple(tangents[time].detach() for time in observation.times)
            pushed.append(_pushed(observation, own, along))
        return pushed

    def directional_derivative(self, states: States, tangents: States) -> torch.Tensor:
        """Return this rank's share of the derivative of the misfit along the tangents, differentiable."""
        times = sorted({time for observation in self.observations for time in observation.times})
        # Views: derivatives with respect to a state itself would go through later states too.
        own = {time: states[time].view_as(states[time]) for time in times}
        for state in own.values():
            if not state.requires_grad:
                state.requires_grad_()
        share = half_squares([self._residual(observation, own) for observation in self.observations])
        slopes = torch.autograd.grad(share, list(own.values()), create_graph=True, materialize_grads=True)
        products = [(slope * tangents[time]).double().sum() for slope, time in zip(slopes, times, strict=True)]
        return torch.stack(products).sum()

    def _residual(self, observation: Observation, states: States) -> torch.Tensor:
        return observation.residual(observation.values([states[time] for time in observation.times]))


def half_squares(residuals: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return half the sum of the squares of all residuals of this rank."""
    return torch.stack([residual.square().sum() for residual in residuals]).sum() / 2


def _pushed(
    observation: Observation, states: tuple[torch.Tensor, ...], along: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    def residual(*given: torch.Tensor) -> torch.Tensor:
        return observation.residual(observation.values(given))

    tangent: torch.Tensor = torch.func.jvp(residual, states, along)[1]
    return tangent
