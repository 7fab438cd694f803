"""Minimisation by TAO at every number of ranks: PETSc's own figures, rejected steps, records, and refinement."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pnode_dist import ConfigurationError, ConvergenceError, DensePartition, GridPartition, Mesh, NeuralODE
from pnode_dist.exchange import halo
from pnode_dist.inverse import Control, Inverse, Observation, Progress, minimise
from tests.mpi.grids import block
from tests.oracles import petsc_tao
from tests.tiers import at_night
from tests.unit.inverse.heat_line import heat_line

pytestmark = pytest.mark.mpi


class GrayScottByHalo(nn.Module):
    """The equations of PETSc's example on this rank's block."""

    def __init__(self, partition: GridPartition) -> None:
        super().__init__()
        self.partition = partition

    def forward(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        wide = halo(state, self.partition, 1)
        # The whole field's function rolls a field around: the rows and columns that come around are cut off.
        return petsc_tao.gray_scott(t, wide)[1:-1, 1:-1]


def petsc_4dvar(mesh: Mesh) -> Inverse:
    partition = GridPartition(mesh, (petsc_tao.POINTS, petsc_tao.POINTS), 2, "periodic")
    node = NeuralODE(GrayScottByHalo(partition), method="rk3", step_size=0.5, partition=partition)
    truth, guess = (block(partition, petsc_tao.gray_scott_state(frequency)) for frequency in (1.0, 0.5))
    with torch.no_grad():
        data = node(truth, [0.0, 2.5])[-1]
    # The example minimises the sum of squares, without the half.
    return Inverse(node, [Control(guess)], [Observation(2.5, None, data, 0.5)])


def test_the_lines_of_petsc_4dvar_of_gray_scott_are_those_that_petsc_prints(mesh: Mesh) -> None:
    lines = len(petsc_tao.GRAY_SCOTT)
    found = minimise(petsc_4dvar(mesh), method="blmvm", options={"tao_gatol": 1e-6, "tao_max_it": lines - 1})
    printed = tuple(tuple(map(petsc_tao.to_six_digits, (line.value, line.gradient_norm))) for line in found.history)
    assert printed == petsc_tao.GRAY_SCOTT
    assert not found.converged
    assert found.reason == "not converged: the largest number of iterations is reached"


@pytest.mark.nightly
def test_petsc_4dvar_of_gray_scott_takes_as_many_iterations_as_in_petsc(mesh: Mesh) -> None:
    found = minimise(petsc_4dvar(mesh), method="blmvm", options={"tao_gatol": 1e-6})
    assert found.converged
    assert found.iterations == petsc_tao.GRAY_SCOTT_ITERATIONS
    assert found.gradient_norm <= 1e-6


class Explosive(nn.Module):
    """du/dt = u^3 / 2, which blows up before time 1 where |u| exceeds 1."""

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u**3 / 2


@pytest.mark.parametrize("method", at_night(["blmvm", "lmvm", "bncg", "bntr", "bnls"], but=["blmvm"]))
def test_a_step_into_a_failing_solve_is_rejected_on_all_ranks(method: str, mesh: Mesh) -> None:
    partition = DensePartition(mesh, 6)
    own = slice(*partition.owned)
    node = NeuralODE(Explosive(), step_size=0.1, partition=partition)
    truth = torch.linspace(-0.8, 0.8, 6, dtype=torch.float64)
    with torch.no_grad():
        data = node(truth[own], [0.0, 1.0])[-1]
    # The gradient is so steep that the first step overshoots by far.
    inverse = Inverse(node, [Control(torch.full_like(data, 0.5))], [Observation(1.0, None, data, 1e-3)])
    values: list[float] = []
    evaluate = inverse.__class__.__call__

    class Watched(Inverse):
        def __init__(self) -> None:
            self.__dict__ = inverse.__dict__

        def __call__(self, m: Any) -> float:
            value = evaluate(self, m)
            values.append(value)
            if not math.isfinite(value) and len(values) % 2:
                raise ConvergenceError("the equations of a step are not solved")
            return value

    found = minimise(Watched(), method=method, options={"tao_gatol": 1e-9, "tao_grtol": 0})
    assert not all(map(math.isfinite, values)), "no step has failed"
    assert found.converged
    (state,) = found.values
    assert torch.allclose(state, truth[own], atol=1e-7)


def test_a_solve_that_fails_at_the_first_guess_is_an_error(mesh: Mesh) -> None:
    partition = DensePartition(mesh, 6)
    size = partition.local_shape
    node = NeuralODE(
        Explosive(),
        method="beuler",
        step_size=1.0,
        partition=partition,
        newton="petsc",
        options={"snes_max_it": 1, "snes_rtol": 1e-14},
    )
    guess = torch.full(size, 0.9, dtype=torch.float64)
    inverse = Inverse(node, [Control(guess)], [Observation(1.0, None, torch.zeros(size, dtype=torch.float64))])
    with pytest.raises(ConvergenceError):
        minimise(inverse)


@pytest.mark.parametrize("method", at_night(["blmvm", "bntr"], but=["blmvm"]))
def test_a_resumed_minimisation_is_the_uninterrupted_one(method: str, mesh: Mesh, directory: Path) -> None:
    options = {"tao_gatol": 1e-2}
    whole = minimise(heat_line(mesh), method=method, options=options)
    seen: list[Progress] = []

    def stop(progress: Progress) -> bool:
        # One rank alone asks for the end.
        seen.append(progress)
        return mesh.rank == mesh.size - 1 and progress.iteration == 2

    record = directory / "record"
    first = minimise(heat_line(mesh), method=method, options=options, callback=stop, record=record)
    assert first.reason == "stopped by the callback"
    assert not first.converged
    assert [progress.value for progress in seen] == [progress.value for progress in first.history]
    with pytest.raises(ConfigurationError, match="holds a record: resume it"):
        minimise(heat_line(mesh), method=method, options=options, record=record)
    other = {**options, "tao_gatol": 1e-3}
    with pytest.raises(ConfigurationError, match="has options = "):
        minimise(heat_line(mesh), method=method, options=other, record=record, resume=True)
    resumed = minimise(heat_line(mesh), method=method, options=options, record=record, resume=True)
    assert resumed.converged
    assert resumed.value == whole.value
    assert torch.equal(resumed.values[0], whole.values[0])
    assert [(p.value, p.gradient_norm) for p in resumed.history] == [(p.value, p.gradient_norm) for p in whole.history]
    assert 0 < resumed.evaluations < whole.evaluations
    assert resumed.products < whole.products or method == "blmvm"


def test_bounds_hold_and_the_gradient_points_out_of_them(mesh: Mesh) -> None:
    inverse = heat_line(mesh)
    (control,) = inverse.space.controls
    lower = torch.full_like(control.guess, -0.3)
    bounded = Control(control.tensors[0], bounds=(lower, 0.4), inner_product=1 / 12)
    problem = Inverse(inverse.node, [bounded], inverse.model.observations)
    found = minimise(problem, method="blmvm", options={"tao_gatol": 1e-8})
    assert found.converged
    (state,) = found.values
    problem(found.m)
    (slope,) = problem.space.unpack(problem.derivative())
    low, high = state <= -0.3 + 1e-9, state >= 0.4 - 1e-9
    counts = [mesh.sum(mask.sum()).item() for mask in (low, high, ~(low | high))]
    assert min(counts) > 0, "a bound is not reached, or no entry is free"
    assert state.min() >= -0.3 - 1e-12 if state.numel() else True
    assert state.max() <= 0.4 + 1e-12 if state.numel() else True
    assert (slope[low] >= -1e-6).all()
    assert (slope[high] <= 1e-6).all()
    assert slope[~(low | high)].abs().max() <= 1e-6 if (~(low | high)).any() else True
