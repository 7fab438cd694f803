"""Fields of many files and with missing months at every number of ranks: who reads what, and the same figures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
from mpi4py import MPI

from pnode_dist import Mesh
from pnode_dist.distributed.gradients import parallel
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.field.data import open_source, read_field
from pnode_dist.problems.field.model import windows
from pnode_dist.problems.field.problem import FieldProblem, build_field
from tests.unit.problems.common.files import count_reads
from tests.unit.problems.field.plain_field import PlainField
from tests.unit.problems.field.synthetic_fields import NX, NY, TIMES, VALIDATION, config, dataset, land, values, write

pytestmark = pytest.mark.mpi

TRAINING, GONE, EMPTY = TIMES - VALIDATION, 7, 12
STARTS, LEADS = [4, 5, 17], 3


def holed() -> np.ndarray[Any, Any]:
    field = np.where(land(), np.nan, values())
    field[[GONE, EMPTY]] = np.nan
    return np.asarray(field)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """One directory for all ranks: months in three files, latitudes first, a month absent and one without values."""
    comm = MPI.COMM_WORLD
    shared = Path(comm.bcast(str(tmp_path)))
    if comm.rank == 0:
        whole = dataset(holed(), masked=False).transpose("lat", "lon", "time")
        for name, part in (("b", slice(0, GONE)), ("c", slice(GONE + 1, 20)), ("a", slice(20, None))):
            write(shared / f"{name}.nc", whole.isel(time=part))
        stamps = xarray.date_range("1900-01-16", periods=TIMES, freq="MS", calendar="noleap", use_cftime=True)
        write(shared / "noleap.nc", dataset(values(), stamps.to_numpy()))
    comm.Barrier()
    yield shared
    comm.Barrier()


def build(directory: Path, mesh: Mesh, **tables: Any) -> FieldProblem:
    problem = {"missing": "mask", "path": str(directory / "[abc].nc")} | tables.pop("problem", {})
    return build_field(config("replaced", problem=problem, **tables), mesh, torch.float64)


def leaves(problem: FieldProblem) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("solve.func."): value.detach().clone().requires_grad_()
        for name, value in problem.model.named_parameters()
    }


def test_every_rank_reads_its_own_rows_and_columns_alone(
    directory: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config("replaced", problem={"missing": "mask", "path": str(directory / "[abc].nc")})
    partition = build(directory, mesh).partition
    source = open_source(settings.problem)
    read_values = count_reads(monkeypatch)
    field = read_field(settings.problem, source, partition, mesh)
    (y0, y1), (x0, x1) = partition.owned
    assert read_values() == (TIMES - 1) * (y1 - y0) * (x1 - x0)
    assert MPI.COMM_WORLD.allreduce(read_values()) == (TIMES - 1) * NY * NX
    physical = field.physical(field.values)[..., 0].numpy()
    expected = holed()[:, y0:y1, x0:x1]
    there = ~np.isnan(expected)
    np.testing.assert_allclose(physical[there], expected[there], rtol=1e-14)
    assert not field.values[..., 0].numpy()[~there].any()


def test_loss_and_gradient_do_not_depend_on_the_ranks(directory: Path, mesh: Mesh) -> None:
    problem = build(directory, mesh)
    whole = PlainField(holed()[..., None], problem.field.time.phases, problem.field.time.step, 1.0, (False, True))
    model = parallel(problem.model, mesh)
    share = problem.loss(model, windows(problem.field, STARTS, LEADS, torch.float64))
    share.backward()  # type: ignore[no-untyped-call]
    expected = leaves(problem)
    whole_loss = whole.loss(expected, 2, STARTS, LEADS, 2)
    whole_loss.backward()
    assert mesh.sum(share).item() == pytest.approx(whole_loss.item(), rel=1e-11)
    for name, value in problem.model.named_parameters():
        wanted = expected[name.removeprefix("solve.func.")].grad
        torch.testing.assert_close(value.grad, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("undrawn")
def test_the_evaluation_does_not_depend_on_the_ranks(directory: Path, mesh: Mesh) -> None:
    problem = build(directory, mesh)
    whole = PlainField(holed()[..., None], problem.field.time.phases, problem.field.time.step, 1.0, (False, True))
    with torch.no_grad():
        table = problem.evaluate(problem.model, directory)
    starts = list(range(TRAINING - 1, TIMES - 3))
    mean, deviation = whole.moments()
    forecast = whole.forecast(leaves(problem), 2, starts, 3, 2).detach().numpy() * deviation + mean
    for number, row in enumerate(table["rmse"]):
        truth = holed()[[start + number + 1 for start in starts]]
        assert row["model"] == pytest.approx(np.sqrt(np.nanmean((forecast[number, ..., 0] - truth) ** 2)), rel=1e-10)
    assert all(other == table for other in MPI.COMM_WORLD.allgather(table))
    data = xarray.open_dataset(directory / "forecast.h5", engine="h5netcdf")
    np.testing.assert_allclose(data.forecast[:, 0], np.where(land(), np.nan, forecast[0, ..., 0]), rtol=1e-6)


@pytest.mark.parametrize(
    ("files", "missing", "message"),
    [
        (("[abc].nc",), "refuse", "missing = 'refuse': the file has no 2001-08"),
        (("noleap.nc", "a.nc"), "mask", "differ in the calendar: noleap and proleptic_gregorian"),
    ],
)
def test_what_is_wrong_with_files_is_one_line_on_every_rank(
    directory: Path, mesh: Mesh, files: tuple[str, ...], missing: str, message: str
) -> None:
    problem = {"path": [str(directory / name) for name in files], "missing": missing}
    with pytest.raises(ConfigurationError, match=message) as caught:
        build(directory, mesh, problem=problem)
    assert set(MPI.COMM_WORLD.allgather(str(caught.value))) == {str(caught.value)}
