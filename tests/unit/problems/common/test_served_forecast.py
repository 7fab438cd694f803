"""The configuration of a served forecast, missing values, and the components that perturb an initial state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import ConfigurationError, DensePartition, Mesh
from pnode_dist.problems.common.served_forecast import (
    MOST_NUMBERS,
    ForecastOfInitialState,
    ForecastSource,
    principal_components,
    served_forecasts,
)
from pnode_dist.train.configured import configured
from pnode_dist.train.run import build_problem
from tests.own_problems import changed, written

D = torch.float64


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    config, found = configured(written(tmp_path_factory.mktemp("own")), ())
    with Mesh() as mesh:
        yield build_problem(config, mesh, D, found).served()


PARAMETERS, STATE = 0, 1


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (PARAMETERS, {"lead": [1]}, "unknown key 'lead': must be one of start, leads, output, parameters"),
        (PARAMETERS, {"modes": 1}, "unknown key 'modes'"),
        (PARAMETERS, {"start": 1}, "start = 1: must be an integer from 0 to 0"),
        (PARAMETERS, {"start": True}, "start = True: must be an integer"),
        (PARAMETERS, {"leads": []}, r"leads = \[\]: must be a list of integers from 1 to 6"),
        (PARAMETERS, {"leads": [1, 7]}, r"leads = \[1, 7\]: must be a list of integers from 1 to 6"),
        (PARAMETERS, {"output": "mean"}, "output = 'mean': must be one of means, state"),
        (PARAMETERS, {"leads": [1] * 20_001, "output": "state"}, "has 100005 numbers: must have at most 100000"),
        (PARAMETERS, {"parameters": ["rate"]}, "unknown name 'rate': must be one of solve.func.rate"),
        (PARAMETERS, {"parameters": []}, r"parameters = \[\]: must be a list of different names"),
        (PARAMETERS, {"parameters": ["solve.func.rate"] * 2}, "must be a list of different names"),
        (PARAMETERS, {"parameters": [{}]}, "unknown name {}"),
        (STATE, {"modes": 0}, "modes = 0: must be an integer from 1 to 2"),
        (STATE, {"modes": 3}, "modes = 3: must be an integer from 1 to 2"),
    ],
)
def test_a_wrong_config_is_refused_by_key_and_value(model: int, config: Any, message: str, models: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"^config: .*{message}"):
        models[model].input_sizes(config)


def test_a_model_of_too_many_parameters_names_the_way_out(tmp_path: Path) -> None:
    many = changed(
        "self.rate = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))",
        f"self.rate = torch.nn.Parameter(torch.zeros(())); self.rest = torch.nn.Parameter(torch.zeros({MOST_NUMBERS}))",
    )
    config, found = configured(written(tmp_path, many), ())
    with Mesh() as mesh:
        model = build_problem(config, mesh, D, found).served()[0]
        with pytest.raises(ConfigurationError, match="has 100001 parameters: must be at most 100000: choose some"):
            model.input_sizes({})
        assert list(model.input_sizes({"parameters": ["solve.func.rate"]})) == [1]


def test_a_method_without_adjoint_refuses_derivatives_and_evaluates(tmp_path: Path) -> None:
    config, found = configured(written(tmp_path), ["solver.method=ssp_rks2"])
    with Mesh() as mesh:
        for model in build_problem(config, mesh, D, found).served():
            assert model.refusal("Evaluate") is None
            for operation in ("Gradient", "ApplyJacobian", "ApplyHessian"):
                assert "PETSc has no discrete adjoint of it" in str(model.refusal(operation))
            at = [torch.full((size,), 0.3, dtype=D) for size in model.input_sizes({})]
            assert model.evaluate(at, {})[0].isfinite().all()


@pytest.mark.parametrize("output", ["means", "state"])
def test_an_evaluation_has_the_outputs_of_the_whole_forecast_lead_by_lead(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, found = configured(written(tmp_path), ())
    with Mesh() as mesh:
        problem: Any = build_problem(config, mesh, D, found)
        for model in problem.served():
            asked = {"leads": [3, 1, 3], "output": output}
            at = [torch.full((size,), 0.3, dtype=D) for size in model.input_sizes(asked)]
            # With gradients the forecast is held whole.
            expected = model.shares(at, asked)[0].detach()
            assert len(expected) == model.output_sizes(asked)[0]
            with monkeypatch.context() as patched:
                patched.setattr(problem.model, "stream", None)
                with pytest.raises(TypeError):
                    model.evaluate(at, asked)
            assert torch.equal(model.evaluate(at, asked)[0], expected)
            if model.name == "forecast_of_parameters":
                # At the parameter that the model has.
                whole = problem.physical(problem.model(problem.held_out_windows(D)))
                chosen = whole[[2, 0, 2], 0]
                wanted = chosen.mean(dim=-1, keepdim=True) if output == "means" else chosen
                torch.testing.assert_close(expected, wanted.flatten(), rtol=1e-12, atol=0)


def test_the_size_of_components_is_the_variance_of_the_states() -> None:
    torch.manual_seed(0)
    states = torch.randn(40, 2, 3, dtype=D) * torch.tensor([3.0, 1.0, 0.2], dtype=D)
    modes = principal_components(states, MPI.COMM_SELF).flatten(1).numpy()
    covariance = np.cov(states.flatten(1).numpy().T, bias=True)
    np.testing.assert_allclose(modes.T @ modes, covariance, rtol=1e-9, atol=1e-12)
    variances = (modes**2).sum(axis=1)
    np.testing.assert_allclose(variances, np.linalg.eigvalsh(covariance)[::-1], rtol=1e-9)
    few = principal_components(states, MPI.COMM_SELF, most=2).flatten(1).numpy()
    np.testing.assert_array_equal(few, modes[:2])


def test_states_that_do_not_vary_have_one_component_of_zeros() -> None:
    modes = principal_components(torch.ones(5, 4, dtype=D), MPI.COMM_SELF)
    assert modes.shape == (1, 4)
    assert not modes.any()


class _Still(torch.nn.Module):
    """The initial state at every lead, with a value that is not a number where there never is one."""

    def forward(self, batch: Any) -> torch.Tensor:
        state: torch.Tensor = batch.initial.clone()
        state[:, 1] = torch.nan
        return state[None]


@dataclass(frozen=True)
class _Batch:
    initial: torch.Tensor


def test_means_leave_out_what_is_never_there() -> None:
    values = torch.tensor([[1.0, 0.0, 5.0]], dtype=D)
    weights = torch.tensor([1.0, 0.0, 1.0], dtype=D)
    with Mesh() as mesh:
        partition = DensePartition(mesh, 3)
        source = ForecastSource(lambda start, leads: _Batch(values), 1, (1,), 1, partition, weights, lambda: values)
        (_, model) = served_forecasts(_Still(), source, lambda states: 10 * states)
        assert isinstance(model, ForecastOfInitialState)
        (means,) = model.evaluate([torch.zeros(1, dtype=D)], {})
        assert means.tolist() == [30.0]
        gradient = model.gradient(0, 0, [torch.zeros(1, dtype=D)], torch.ones(1, dtype=D), {})
        assert gradient.tolist() == [0.0]
