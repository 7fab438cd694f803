"""Served forecasts at every number of ranks: the values of one rank, and derivatives that agree."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pnode_dist import Mesh
from pnode_dist.train.run import build_problem
from pnode_dist.train.served_model import ServedModel
from tests.mpi.test_problem_contract import NEAR, TIGHT
from tests.unit.problems.configurations import FORECASTS, SMALL

pytestmark = pytest.mark.mpi

D = torch.float64


@pytest.fixture(autouse=True)
def few_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest stable step need not be exact here."""
    monkeypatch.setattr("pnode_dist.problems.semilinear.stable_step.STEPS", 60)


def served(name: str, directory: Path, mesh: Mesh) -> tuple[nn.Module, list[ServedModel]]:
    enough = {"training": {"batch_size": max(4, mesh.size)}}
    tables = {**enough, **({"solver": TIGHT} if name in NEAR else {})}
    problem = build_problem(SMALL[name](directory, **tables), mesh, D)
    return problem.model, list(problem.served())


def inputs_of(model: nn.Module, served: ServedModel) -> torch.Tensor:
    """The model's own parameters, or coefficients that are not zero."""
    (size,) = served.input_sizes({})
    if served.name == "forecast_of_parameters":
        values = [value.detach().flatten() for value in model.parameters() if value.requires_grad]
        assert sum(value.numel() for value in values) == size
        return torch.cat(values)
    return torch.linspace(-0.1, 0.1, size, dtype=D)


@pytest.mark.nightly  # test_serve.py serves a problem by day
@pytest.mark.parametrize("name", FORECASTS)
def test_served_forecasts_are_those_of_one_rank_and_their_derivatives_agree(
    name: str, directory: Path, mesh: Mesh
) -> None:
    near = NEAR.get(name, 1e-9)
    model, every = served(name, directory, mesh)
    with Mesh(state=1, data=mesh.size) as replicas:
        alone_model, alone = served(name, directory, replicas)
        assert [one.name for one in every] == ["forecast_of_parameters", "forecast_of_initial_state"]
        for one, other in zip(every, alone, strict=True):
            at, (size,) = [inputs_of(model, one)], one.output_sizes({})
            # The signs and order of principal components are those of rounding where variances are equal.
            if one.name == "forecast_of_parameters":
                torch.testing.assert_close(
                    one.evaluate(at, {})[0],
                    other.evaluate([inputs_of(alone_model, other)], {})[0],
                    rtol=near,
                    atol=near,
                )
            torch.manual_seed(1)
            vec, sens = torch.randn(at[0].numel(), dtype=D), torch.randn(size, dtype=D)
            gradient = one.gradient(0, 0, at, sens, {})
            tangent = one.apply_jacobian(0, 0, at, vec, {})
            assert (gradient @ vec).item() == pytest.approx((sens @ tangent).item(), rel=10 * near, abs=near)
            # The Hessian is symmetric.
            other_vec = torch.randn(at[0].numel(), dtype=D)
            products = [one.apply_hessian(0, 0, 0, at, sens, along, {}) for along in (vec, other_vec)]
            assert (products[0] @ other_vec).item() == pytest.approx(
                (products[1] @ vec).item(), rel=10 * near, abs=10 * near
            )
