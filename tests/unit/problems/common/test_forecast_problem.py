"""The defaults of a forecast, compared with the same sums in plain torch."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray

from pnode_dist import (
    BatchPartition,
    DensePartition,
    ForecastProblem,
    GraphPartition,
    GridPartition,
    Mesh,
    SplitData,
    TrajectoryData,
)
from pnode_dist.config.load import from_tables, validated
from pnode_dist.config.registry import Registered, definition_of
from pnode_dist.problems.common.forecast_data import windows
from pnode_dist.verify.gradcheck import gradcheck

D = torch.float64
RATES = (0.3, 0.7)


class Decay(torch.nn.Module):
    """du/dt = -rate u, or with `driven` -rate u + cos(t)."""

    def __init__(self, driven: bool = False) -> None:
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.5, dtype=D))
        self.driven = driven

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -self.rate * u + (torch.cos(t) if self.driven else 0.0)


def exact(times: np.ndarray, trajectories: int, entries: int) -> np.ndarray:
    """Trajectories `[trajectory, time, entry]` of a decay with the rate 0.3."""
    starts = np.linspace(1.0, 2.0, trajectories * entries).reshape(trajectories, 1, entries)
    return starts * np.exp(-0.3 * times)[:, None]


class Vector(ForecastProblem):
    """A vector that decays."""

    trajectories, entries = 4, 3
    times = 0.25 * np.arange(7)

    def build_partition(self) -> Any:
        return DensePartition(self.mesh, self.entries)

    def load_data(self) -> Any:
        return TrajectoryData(exact(self.times, self.trajectories, self.entries), self.times)

    def build_right_hand_side(self) -> torch.nn.Module:
        return Decay()


def built(kind: type[ForecastProblem], mesh: Mesh, **tables: Any) -> Any:
    """The problem of a class, from tables over small defaults."""
    given = {
        "run": {"name": "own"},
        "training": {"epochs": 1, "batch_size": 3, "dtype": "float64"},
        "solver": {"method": "rk4", "step_size": 0.125},
        **tables,
    }
    found = Registered("own:Own", definition_of(kind, "own:Own"), None)
    config = validated(from_tables(given, "own"), found)
    return found.definition.builder()(config, mesh, D)


def rk4(rate: float, u: torch.Tensor, times: list[float], most: float, driven: bool = False) -> list[torch.Tensor]:
    """The states at the times, by RK4 in plain torch with steps of at most `most`."""

    def f(t: float, u: torch.Tensor) -> torch.Tensor:
        return -rate * u + (math.cos(t) if driven else 0.0)

    found = [u]
    for begin, end in pairwise(times):
        steps = math.ceil((end - begin) / most - 1e-9)
        h = (end - begin) / steps
        for number in range(steps):
            t = begin + number * h
            k1 = f(t, u)
            k2 = f(t + h / 2, u + h / 2 * k1)
            k3 = f(t + h / 2, u + h / 2 * k2)
            k4 = f(t + h, u + h * k3)
            u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        found.append(u)
    return found


def test_the_loss_is_the_mean_square_error_in_standard_deviations(mesh: Mesh) -> None:
    problem = built(Vector, mesh, problem={"type": "own", "window": 2})
    starts = [(0, 0), (2, 3)]
    batch = windows(problem.samples, starts, 2, D)
    values = torch.from_numpy(exact(Vector.times, 4, 3))
    deviation = values[:3].std(correction=0)  # The last fifth, at least one trajectory, is held out.
    expected = []
    for number, first in starts:
        states = rk4(0.5, values[number, first], [0.0, 0.25, 0.5], 0.125)
        expected += [((states[lead] - values[number, first + lead]) / deviation).square() for lead in (1, 2)]
    assert problem.loss(problem.model, batch).item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-13)


def test_validation_and_baselines_are_errors_of_the_trajectories_held_out(mesh: Mesh, tmp_path: Path) -> None:
    problem = built(Vector, mesh, problem={"type": "own", "validation": 2}, evaluation={"leads": [1, 6]})
    held_out = torch.from_numpy(exact(Vector.times, 4, 3))[2:]
    learnt = torch.from_numpy(exact(Vector.times, 4, 3))[:2]
    forecast = torch.stack(rk4(0.5, held_out[:, 0], Vector.times.tolist(), 0.125))[1:]
    truth = held_out[:, 1:].transpose(0, 1)
    with torch.no_grad():
        figures = problem.validation(problem.model)
        result = problem.evaluate(problem.model, tmp_path)
    errors = (forecast - truth).square().mean(dim=(1, 2)).sqrt()
    assert figures["validation_rmse"] == pytest.approx((forecast - truth).square().mean().sqrt().item(), rel=1e-12)
    assert [figures["lead_1"], figures["lead_6"]] == pytest.approx([errors[0].item(), errors[5].item()], rel=1e-12)
    persistence = (held_out[:, :1].transpose(0, 1) - truth).square().mean(dim=(1, 2)).sqrt()
    mean = (learnt.mean() - truth).square().mean(dim=(1, 2)).sqrt()
    assert [row["lead"] for row in result["rmse"]] == [1, 6]
    assert [row["time"] for row in result["rmse"]] == [0.25, 1.5]
    for row, lead in zip(result["rmse"], (1, 6), strict=True):
        assert row["persistence"] == pytest.approx(persistence[lead - 1].item(), rel=1e-12)
        assert row["training_mean"] == pytest.approx(mean[lead - 1].item(), rel=1e-12)


def test_a_single_trajectory_is_split_in_time(mesh: Mesh) -> None:
    class Single(Vector):
        trajectories = 1

    problem = built(Single, mesh, problem={"type": "own", "validation": 3}, evaluation={"leads": [1, 2]})
    assert problem.is_split_in_time
    assert (problem.samples.length, problem.held_out.length) == (4, 4)
    batch = problem.held_out_windows(D)
    # Two forecasts of two samples, the first from the last time that is learnt from.
    assert [times[0] for times in batch.times] == [0.75, 1.0]
    trained = {start for share in problem.batches(1) for _, start in share.starts}
    assert max(trained) + 1 <= 3


def test_irregular_times_are_solved_at_their_own_times(mesh: Mesh) -> None:
    class Irregular(Vector):
        times = np.array([0.0, 0.1, 0.35, 0.4, 0.9, 1.0, 1.6])

    problem = built(Irregular, mesh, problem={"type": "own", "window": 2})
    batch = windows(problem.samples, [(0, 1), (1, 3), (1, 1)], 2, D)
    rollout = problem.model(batch)
    for number, (_, first) in enumerate(batch.starts):
        times = (Irregular.times[first : first + 3] - Irregular.times[first]).tolist()
        expected = rk4(0.5, batch.initial[number], times, 0.125)
        for lead in (1, 2):
            assert torch.allclose(rollout[lead - 1, number], expected[lead], rtol=1e-13)


def test_a_time_dependent_f_is_given_the_times_of_the_data(mesh: Mesh) -> None:
    class Driven(Vector):
        time_dependent = True

        def build_right_hand_side(self) -> torch.nn.Module:
            return Decay(driven=True)

    problem = built(Driven, mesh, problem={"type": "own", "window": 1})
    batch = windows(problem.samples, [(0, 1), (1, 4), (2, 1)], 1, D)
    rollout = problem.model(batch)
    for number, (_, first) in enumerate(batch.starts):
        expected = rk4(0.5, batch.initial[number], Driven.times[first : first + 2].tolist(), 0.125, driven=True)
        assert torch.allclose(rollout[0, number], expected[1], rtol=1e-13)


def test_a_normalised_problem_solves_for_normalised_states(mesh: Mesh) -> None:
    seen = []

    class Watching(Decay):
        def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            seen.append(u.detach().clone())
            return super().forward(t, u)

    class Normalised(Vector):
        normalised = True

        def build_right_hand_side(self) -> torch.nn.Module:
            return Watching()

    problem = built(Normalised, mesh, problem={"type": "own"})
    whole = torch.from_numpy(exact(Vector.times, 4, 3))
    mean, deviation = whole[:3].mean(), whole[:3].std(correction=0)
    batch = windows(problem.samples, [(0, 2)], 1, D)
    assert torch.allclose(batch.initial[0], (whole[0, 2] - mean) / deviation, rtol=1e-12)
    seen.clear()
    rollout = problem.model(batch)
    assert torch.equal(seen[0], batch.initial)
    expected = rk4(0.5, (whole[0, 2] - mean) / deviation, [0.0, 0.25], 0.125)[1]
    assert torch.allclose(rollout[0, 0], expected, rtol=1e-12)
    assert torch.allclose(problem.physical(batch.initial[0]), whole[0, 2], rtol=1e-14)


class Gaps(Vector):
    """One value missing, and one time as a whole."""

    def load_data(self) -> Any:
        values = exact(self.times, self.trajectories, self.entries)
        values[0, 2] = np.nan
        values[1, 4, 1] = np.nan
        return TrajectoryData(values, self.times)


def test_missing_values_are_left_out_of_starts_loss_and_errors(mesh: Mesh) -> None:
    problem = built(Gaps, mesh, problem={"type": "own", "window": 2, "missing": "mask"})
    starts = problem.samples.starts(2)
    assert (0, 2) not in starts
    assert (1, 4) not in starts
    assert (0, 1) in starts
    assert (2, 2) in starts
    batch = windows(problem.samples, [(0, 1), (1, 3)], 2, D)
    values = torch.from_numpy(Gaps.load_data(problem).values)
    known = values[:3][~values[:3].isnan()]
    errors = []
    for number, first in batch.starts:
        states = rk4(0.5, values[number, first], [0.0, 0.25, 0.5], 0.125)
        errors += [(states[lead] - values[number, first + lead]) / known.std(correction=0) for lead in (1, 2)]
    squares = torch.stack(errors).square()
    expected = squares[~squares.isnan()].mean().item()
    assert problem.loss(problem.model, batch).item() == pytest.approx(expected, rel=1e-12)


def test_what_is_never_there_does_not_exclude_a_start(mesh: Mesh) -> None:
    class Land(Vector):
        def load_data(self) -> Any:
            values = exact(self.times, self.trajectories, self.entries)
            values[..., 1] = np.nan
            return TrajectoryData(values, self.times)

    problem = built(Land, mesh, problem={"type": "own", "window": 2, "missing": "mask"})
    assert len(problem.samples.starts(2)) == 3 * 5


def test_a_generator_gives_the_same_as_an_array(mesh: Mesh) -> None:
    class Generated(Vector):
        def load_data(self) -> Any:
            for values in exact(self.times, self.trajectories, self.entries):
                yield TrajectoryData(values, self.times)

    class Bare(Vector):
        def load_data(self) -> Any:
            return exact(self.times, self.trajectories, self.entries)

    whole, generated, bare = (built(kind, mesh, problem={"type": "own"}) for kind in (Vector, Generated, Bare))
    assert torch.equal(whole.samples.values, generated.samples.values)
    assert torch.equal(whole.samples.values, bare.samples.values)
    assert bare.samples.times.tolist() == list(range(7))


def test_trajectories_may_be_split_by_the_problem(mesh: Mesh) -> None:
    class Split(Vector):
        def load_data(self) -> Any:
            values = exact(self.times, 4, self.entries)
            return SplitData(TrajectoryData(values[::2], self.times), TrajectoryData(values[1::2, :4], self.times[:4]))

    problem = built(Split, mesh, problem={"type": "own"}, evaluation={"leads": [3]})
    values = torch.from_numpy(exact(Vector.times, 4, 3))
    assert torch.equal(problem.samples.values, values[::2])
    batch = problem.held_out_windows(D)
    assert torch.equal(batch.targets.transpose(0, 1), values[1::2, 1:4])


def test_default_leads_are_those_that_fit(mesh: Mesh) -> None:
    class Short(Vector):
        times = 0.25 * np.arange(5)

    assert built(Short, mesh, problem={"type": "own"}).leads == (1, 2, 3)


PARTITIONS: dict[str, Any] = {
    "vector": lambda mesh: DensePartition(mesh, 6),
    "line": lambda mesh: GridPartition(mesh, (6,), 1, "periodic"),
    "plane": lambda mesh: GridPartition(mesh, (4, 6), 2),
    "space": lambda mesh: GridPartition(mesh, (3, 4, 5), 1),
    "graph": lambda mesh: GraphPartition(mesh, np.array([[0, 1, 2, 3], [1, 2, 3, 4]]), 5, 2),
    "samples": lambda mesh: BatchPartition(mesh, 5, (3,)),
}


@pytest.mark.parametrize("name", PARTITIONS)
def test_states_lie_on_any_partition_and_the_file_opens_in_xarray(name: str, mesh: Mesh, tmp_path: Path) -> None:
    class Own(Vector):
        def build_partition(self) -> Any:
            return PARTITIONS[name](self.mesh)

        def load_data(self) -> Any:
            shape = self.partition.global_shape
            values = exact(self.times, 4, math.prod(shape)).reshape(4, len(self.times), *shape)
            return TrajectoryData(values, self.times, units="K")

    problem = built(Own, mesh, problem={"type": "own"})
    with torch.no_grad():
        result = problem.evaluate(problem.model, tmp_path)
    with xarray.open_dataset(result["forecast"], engine="h5netcdf") as file:
        assert file["truth"].dims[:2] == ("start", "lead")
        assert file["truth"].shape == (1, 7, *problem.partition.global_shape)
        expected = problem.held_out.values[:1]
        assert np.array_equal(file["truth"].to_numpy(), expected.numpy().astype(np.float32))
        assert file["truth"].attrs["units"] == "K"
        assert file["time"][0].to_numpy().tolist() == Own.times.tolist()
    assert Path(result["report"]).stat().st_size > 10_000
    checked = gradcheck(problem.gradcheck_case(), mesh)
    assert checked.failures() == []
    assert checked.relative_error < 1e-9
    case = problem.solve_case()
    assert case.state.shape[1:] == problem.partition.local_shape


def test_entries_of_different_units_are_judged_in_standard_deviations(mesh: Mesh) -> None:
    class Mixed(Vector):
        def build_partition(self) -> Any:
            return BatchPartition(self.mesh, 2, (2,))

        def load_data(self) -> Any:
            values = exact(self.times, 4, 4).reshape(4, 7, 2, 2) * np.array([1.0, 1000.0])
            return TrajectoryData(values, self.times, names=("a", "b"), units=("m", "kg"))

    class Same(Mixed):
        def load_data(self) -> Any:
            return TrajectoryData(super().load_data().values, self.times, units="m")

    mixed, same = (built(kind, mesh, problem={"type": "own"}) for kind in (Mixed, Same))
    assert (mixed.units, same.units) == ("", "m")
    assert mixed.validation(mixed.model)["lead_1"] < 1 < same.validation(same.model)["lead_1"]
