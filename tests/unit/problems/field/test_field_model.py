"""The field's model on one rank, against the same model in plain torch on the whole field."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pnode_dist import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.field.data import open_source
from pnode_dist.problems.field.model import SeasonalCycle, windows
from pnode_dist.problems.field.problem import FieldProblem, build_field
from tests.unit.problems.field.plain_field import PlainField, fractions_of_year
from tests.unit.problems.field.synthetic_fields import TIMES, config, dataset, field_config, land, months, values, write

STARTS, LEADS = [0, 5, 17], 3


def build(path: Path, mesh: Mesh, dtype: torch.dtype = torch.float64, **tables: Any) -> FieldProblem:
    return build_field(config(path, **tables), mesh, dtype)


def parameters(problem: FieldProblem) -> dict[str, torch.Tensor]:
    return {name.removeprefix("solve.func."): value for name, value in problem.model.named_parameters()}


def masked(field: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    field = field if field.ndim == 4 else field[..., None]
    return np.asarray(np.where(land()[..., None], np.nan, field))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "sst.nc", dataset(values()))


def assert_model_is_plain(problem: FieldProblem, plain: PlainField, harmonics: int, substeps: int) -> None:
    found = problem.model(windows(problem.field, STARTS, LEADS, torch.float64))
    expected = plain.forecast(parameters(problem), harmonics, STARTS, LEADS, substeps)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_monthly_forecasts_are_those_of_plain_torch(path: Path, mesh: Mesh) -> None:
    problem = build(path, mesh)
    step = open_source(field_config(path)).time.step
    plain = PlainField(masked(values()), fractions_of_year(months()), step, 1.0, (False, True))
    assert_model_is_plain(problem, plain, harmonics=2, substeps=2)


def test_forecasts_of_several_channels_on_another_clock_are_those_of_plain_torch(tmp_path: Path, mesh: Mesh) -> None:
    field, times = values(channels=2), 0.25 * np.arange(TIMES)
    data = dataset(field, times)
    # Rows that may be periodic are no latitudes.
    data.lat.attrs.clear()
    problem = build(
        write(tmp_path / "f.nc", data),
        mesh,
        problem={"period": 3.0, "boundary": ("periodic", "replicate")},
        model={"harmonics": 1, "kernel_size": 5, "dilations": (1,)},
        solver={"step_size": None},
    )
    plain = PlainField(masked(field), times / 3.0 % 1.0, 0.25, 3.0, (True, False))
    assert_model_is_plain(problem, plain, harmonics=1, substeps=1)


def test_forecasts_without_a_cycle_are_those_of_plain_torch(tmp_path: Path, mesh: Mesh) -> None:
    path = write(tmp_path / "f.nc", dataset(values(), 10.0 * np.arange(TIMES)))
    problem = build(
        path,
        mesh,
        problem={"boundary": ("replicate", "replicate")},
        model={"harmonics": None},
        solver={"step_size": 4.0},
    )
    plain = PlainField(masked(values()), np.zeros(TIMES), 10.0, None, (False, False))
    assert_model_is_plain(problem, plain, harmonics=0, substeps=3)


def test_the_loss_and_its_gradient_are_those_of_plain_torch(path: Path, mesh: Mesh) -> None:
    problem = build(path, mesh)
    problem.loss(problem.model, windows(problem.field, STARTS, LEADS, torch.float64)).backward()  # type: ignore[no-untyped-call]
    found = {name: value.grad for name, value in parameters(problem).items()}
    leaves = {name: value.detach().clone().requires_grad_() for name, value in parameters(problem).items()}
    step = open_source(field_config(path)).time.step
    plain = PlainField(masked(values()), fractions_of_year(months()), step, 1.0, (False, True))
    plain.loss(leaves, 2, STARTS, LEADS, 2).backward()
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name], leaf.grad, rtol=1e-10, atol=1e-12)


def test_the_cycle_is_found_again_where_there_is_nothing_else(tmp_path: Path, mesh: Mesh) -> None:
    angle = 2 * np.pi * fractions_of_year(months())[:, None, None]
    amplitude = 1 + np.arange(54).reshape(6, 9)
    field = 280 + amplitude * np.cos(angle) - 2 * np.sin(angle) + 0.5 * np.sin(2 * angle)
    problem = build(write(tmp_path / "f.nc", dataset(field)), mesh, problem={"normalisation": "none"})
    cycle = SeasonalCycle(problem.field, harmonics=2)
    phases = torch.from_numpy(fractions_of_year(months()))
    torch.testing.assert_close(cycle(phases), problem.field.values, rtol=1e-11, atol=1e-10)


def test_the_derivative_of_the_cycle_is_its_derivative(path: Path, mesh: Mesh) -> None:
    cycle = SeasonalCycle(build(path, mesh).field, harmonics=3)
    phase = torch.tensor([0.1, 0.7], dtype=torch.float64)
    _, found = torch.autograd.functional.jvp(cycle, (phase,), (torch.ones_like(phase),))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(cycle.derivative(phase), found, rtol=1e-12, atol=1e-12)


def test_nothing_happens_outside_the_mask(path: Path, mesh: Mesh) -> None:
    forecast = build(path, mesh).model(windows(build(path, mesh).field, [0], 3, torch.float64))
    assert not forecast[..., torch.from_numpy(land()), :].any()
    assert forecast[..., torch.from_numpy(~land()), :].all()


def test_windows_hold_consecutive_states_and_the_phase_of_the_first(path: Path, mesh: Mesh) -> None:
    field = build(path, mesh).field
    batch = windows(field, [3, 8], 2, torch.float32)
    assert batch.initial.dtype == batch.phase.dtype == batch.targets.dtype == torch.float32
    torch.testing.assert_close(batch.initial[1], field.values[8].float())
    torch.testing.assert_close(batch.targets[1, 0], field.values[5].float())
    np.testing.assert_allclose(batch.phase, fractions_of_year(months())[[3, 8]], rtol=1e-6)


def test_the_seed_alone_fixes_the_first_parameters_in_both_precisions(path: Path, mesh: Mesh) -> None:
    torch.manual_seed(123)
    double = parameters(build(path, mesh))
    torch.manual_seed(456)
    before = torch.get_rng_state()
    single = parameters(build(path, mesh, torch.float32))
    assert torch.equal(torch.get_rng_state(), before)
    other = parameters(build(path, mesh, run={"seed": 1}))
    for name, value in double.items():
        assert single[name].dtype == torch.float32
        assert torch.equal(single[name], value.float())
    assert not torch.equal(double["output.weight"], other["output.weight"])


@pytest.mark.parametrize(
    ("harmonics", "time", "message"),
    [
        (1, np.arange(TIMES), r"\[model\] harmonics = 1: must be 0, as the times are no dates"),
        (6, None, r"\[model\] harmonics = 6: must be below half of the 12 steps in a cycle"),
    ],
)
def test_harmonics_that_cannot_be_fitted_are_refused(
    tmp_path: Path, mesh: Mesh, harmonics: int, time: Any, message: str
) -> None:
    path = write(tmp_path / "f.nc", dataset(values(), time))
    with pytest.raises(ConfigurationError, match=message):
        build(path, mesh, model={"harmonics": harmonics})


def test_a_training_part_too_short_for_the_harmonics_is_refused(path: Path, mesh: Mesh) -> None:
    with pytest.raises(ConfigurationError, match="harmonics = 3: too many to be told apart by the 5 training times"):
        build(path, mesh, problem={"validation": 25}, model={"harmonics": 3})
