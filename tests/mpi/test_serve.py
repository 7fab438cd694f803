"""The service at every number of ranks: the protocol's answers, exact derivatives, and calls that fail."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pnode_dist import ConfigurationError, Mesh
from pnode_dist.ode import safe_points
from pnode_dist.serve.listener import Limits
from pnode_dist.train.configured import configured
from pnode_dist.train.run import build_problem
from pnode_dist.train.served_model import ServedModel
from tests.mpi.test_agreement import raised_on_all
from tests.own_problems import written as written_problem
from tests.serving import COUPLED, DERIVATIVES, FAILING, PATIENCE, Client, Coupled, Failing, request, while_served

pytestmark = pytest.mark.mpi

OF_RATE, OF_STATE = "forecast_of_parameters", "forecast_of_initial_state"
SIZE, INTERVAL, STEP, START = 5, 0.25, 0.125, 3 * 5


def forecasts(mesh: Mesh, directory: Path, *overrides: str) -> tuple[ServedModel, ...]:
    """The models of du/dt = -rate u, from the last of the four initial states of `tests.own_problems`."""
    if mesh.is_root:
        written_problem(directory)
    mesh.barrier()
    config, found = configured(directory / "own.toml", overrides)
    problem = build_problem(config, mesh, torch.float64, found)
    return tuple(problem.served())


def amplification(rate: torch.Tensor, lead: int) -> torch.Tensor:
    """The factor of the state after some samples, by RK4 on du/dt = -rate u in closed form."""
    z = -rate * STEP
    one: torch.Tensor = 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24
    return one ** int(lead * INTERVAL / STEP)


def initial() -> torch.Tensor:
    """The held-out initial state."""
    return torch.linspace(1.0, 2.0, 4 * SIZE, dtype=torch.float64)[START:]


def near(found: Any, expected: Any) -> bool:
    return np.allclose(np.asarray(found), np.asarray(expected), rtol=1e-12, atol=1e-14)


def test_answers_are_those_of_the_protocol_for_every_operation(mesh: Mesh, directory: Path) -> None:
    def ask(url: str) -> None:
        client = Client(url)
        assert client.ask("/Info") == (200, {"protocolVersion": 1.0, "models": [COUPLED, FAILING]})
        every = {"Evaluate": True, "Gradient": True, "ApplyJacobian": True, "ApplyHessian": True}
        assert client.ask("/ModelInfo", {"name": COUPLED}) == (200, {"support": every})
        assert client.ask("/ModelInfo", {"name": FAILING})[1]["support"]["ApplyHessian"] is False
        assert client.ask("/InputSizes", {"name": COUPLED}) == (200, {"inputSizes": [2, 3]})
        assert client.ask("/OutputSizes", {"name": COUPLED, "config": {}}) == (200, {"outputSizes": [2, 1]})
        # x = (1, 2), y = (3, 4, 5), y . y = 50; all exact in double precision up to the sum over ranks.
        found = {path: client.output(path, request(COUPLED, **keys)) for path, keys in DERIVATIVES.items()}
        assert near(found["/Evaluate"][0], [50.0, 100.0])
        assert near(found["/Evaluate"][1], [15.0])
        assert near(found["/Gradient"], [-6.0, -8.0, -10.0])
        assert near(found["/ApplyJacobian"], [26.0, 52.0])
        assert near(found["/ApplyHessian"], [26.0, -26.0])
        assert near(client.output("/Evaluate", request(COUPLED, config={"scale": 2}))[0], [100.0, 200.0])

    while_served([Coupled(mesh.state_comm), Failing(mesh.state_comm)], mesh, directory, ask)


@pytest.mark.parametrize("path", list(DERIVATIVES))
def test_wrong_requests_get_the_errors_of_the_protocol(path: str, mesh: Mesh, directory: Path) -> None:
    def ask(url: str) -> None:
        client = Client(url)
        good = request(COUPLED, **DERIVATIVES[path])

        def refused(**changed: Any) -> str:
            status, kind, message = client.error(path, {**good, **changed})
            assert (status, kind) == (400, "InvalidInput")
            return message

        assert client.error(path, {"name": "nowhere"})[:2] == (400, "ModelNotFound")
        assert refused(input=[[1.0, 2.0]]).startswith("input: must be a list of 2 vectors")
        assert refused(input=[[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]) == "input[0]: must be a list of 2 numbers, and has 3"
        assert refused(input=[[1.0, True], [3.0, 4.0, 5.0]]) == "input[0]: entry 1 is not a finite number"
        assert refused(config={"scal": 1}) == "config: scal = 1: must be a number called scale"
        assert refused(confg={}).startswith("unknown key 'confg': must be one of name, config, input")
        for key, value in DERIVATIVES[path].items():
            if isinstance(value, int):
                assert refused(**{key: 2}).startswith(f"{key}: must be an integer from 0 to 1")
            else:
                assert refused(**{key: [*value, 0.0]}).startswith(f"{key}: must be a list of {len(value)} numbers")
        assert client.output(path, good)

    while_served([Coupled(mesh.state_comm)], mesh, directory, ask)


def test_a_failed_call_is_an_error_of_its_request_and_the_service_goes_on(mesh: Mesh, directory: Path) -> None:
    def ask(url: str) -> None:
        client = Client(url)

        def failed(operation: str = "/Evaluate", **config: Any) -> tuple[int, str, str]:
            keys = {"outWrt": 0, "inWrt": 0, "sens": [1.0]} if operation == "/Gradient" else {}
            return client.error(operation, request(FAILING, config=config, **keys))

        reason = f"{FAILING}: step 3 has no solution"
        assert failed(action="converge") == (500, "InvalidOutput", reason)
        assert failed("/Gradient", action="converge") == (500, "InvalidOutput", reason)
        assert failed(action="lose") == (500, "InvalidOutput", f"{FAILING}: nan in entry 0 of output 0")
        expected = f"{FAILING}: returned vectors of lengths (2,): must be (1,)"
        assert failed(action="shorten") == (500, "InvalidOutput", expected)
        assert failed(action="break") == (500, "InvalidOutput", f"{FAILING}: RuntimeError: a mistake in f")
        # On one rank alone; the others have computed their shares.
        assert failed(action="converge", rank=mesh.size - 1) == (500, "InvalidOutput", reason)
        assert failed(action="break", rank=0)[:2] == (500, "InvalidOutput")
        status, kind, message = client.error("/ApplyHessian", {"name": FAILING})
        assert (status, kind, message) == (400, "UnsupportedFeature", "ApplyHessian: has no second derivatives")
        assert near(client.output("/Evaluate", request(FAILING)), [[0.5]])

    while_served([Failing(mesh.state_comm)], mesh, directory, ask)


def test_forecasts_and_their_derivatives_are_those_in_closed_form(mesh: Mesh, directory: Path) -> None:
    def ask(url: str) -> None:
        client = Client(url)
        rate, config = torch.tensor(0.7, dtype=torch.float64), {"leads": [1, 3], "output": "state"}
        asked = {"name": OF_RATE, "input": [[rate.item()]], "config": config}
        assert client.ask("/OutputSizes", {"name": OF_RATE, "config": config})[1] == {"outputSizes": [2 * SIZE]}
        (found,) = client.output("/Evaluate", asked)
        for lead, state in zip((1, 3), np.split(np.array(found), 2), strict=True):
            assert near(state, amplification(rate, lead) * initial())
        first, second = (
            torch.func.jacfwd(amplification)(rate, 3),
            torch.func.jacfwd(torch.func.jacfwd(amplification))(rate, 3),
        )
        sens = torch.arange(1.0, 1.0 + SIZE, dtype=torch.float64)
        given = [0.0] * SIZE + sens.tolist()
        wrt = {"outWrt": 0, "inWrt": 0}
        gradient = client.output("/Gradient", {**asked, **wrt, "sens": given})
        assert near(gradient, [first * sens @ initial()])
        tangent = client.output("/ApplyJacobian", {**asked, **wrt, "vec": [2.0]})
        assert near(tangent[SIZE:], 2.0 * first * initial())
        along = {"outWrt": 0, "inWrt1": 0, "inWrt2": 0, "sens": given, "vec": [2.0]}
        assert near(client.output("/ApplyHessian", {**asked, **along}), [2.0 * second * sens @ initial()])
        means = client.output("/Evaluate", {"name": OF_RATE, "input": [[rate.item()]]})
        assert near(means, [[(amplification(rate, lead) * initial().mean()).item() for lead in (1, 3)]])

    while_served(forecasts(mesh, directory), mesh, directory, ask)


def test_coefficients_perturb_the_initial_state_by_the_spread_of_the_data(mesh: Mesh, directory: Path) -> None:
    def ask(url: str) -> None:
        client = Client(url)
        config = {"leads": [1], "output": "state", "modes": 2}
        asked = {"name": OF_STATE, "input": [[0.0, 0.0]], "config": config}
        rate = torch.tensor(0.3, dtype=torch.float64)
        assert near(client.output("/Evaluate", asked), [amplification(rate, 1) * initial()])
        wrt = {"outWrt": 0, "inWrt": 0}
        patterns = np.array(
            [client.output("/ApplyJacobian", {**asked, **wrt, "vec": vec}) for vec in ([1, 0], [0, 1])]
        ) / float(amplification(rate, 1))
        # The three trajectories to learn from, seven samples each.
        starts = np.linspace(1.0, 2.0, 4 * SIZE).reshape(4, SIZE)[:3]
        states = (starts[:, None] * np.exp(-INTERVAL * np.arange(7))[:, None]).reshape(-1, SIZE)
        covariance = np.cov(states.T, bias=True)
        # Its rank is two.
        assert np.allclose(patterns.T @ patterns, covariance, rtol=1e-9, atol=1e-12)
        assert patterns[0] @ patterns[0] > patterns[1] @ patterns[1] > 0

    while_served(forecasts(mesh, directory), mesh, directory, ask)


def test_a_request_past_its_deadline_is_abandoned_on_all_ranks(mesh: Mesh, directory: Path) -> None:
    def ask(url: str) -> None:
        client = Client(url)
        asked = {"name": OF_RATE, "input": [[0.3]], "config": {"leads": [1]}}
        status, kind, _ = client.error("/Evaluate", asked)
        assert (status, kind) == (504, "DeadlineExceeded")
        keys = {"outWrt": 0, "inWrt": 0, "sens": [1.0]}
        assert client.error("/Gradient", {**asked, **keys})[:2] == (504, "DeadlineExceeded")
        # The ranks are free as soon as they have planned the steps of the gradient.
        until = time.monotonic() + PATIENCE
        while (answer := client.ask("/Evaluate", request(COUPLED)))[0] == 504:
            assert time.monotonic() < until
        assert answer[0] == 200

    step_size = 1e-6
    models = (*forecasts(mesh, directory, f"solver.step_size={step_size}"), Coupled(mesh.state_comm))
    before = safe_points.steps_begun()
    while_served(models, mesh, directory, ask, {"limits": Limits(deadline=0.6)})
    assert 0 < safe_points.steps_begun() - before < INTERVAL / step_size


def test_six_clients_at_once_get_their_own_answers(mesh: Mesh, directory: Path) -> None:
    def ask(url: str) -> None:
        wrong: list[Any] = []

        def many(number: int) -> None:
            client = Client(url)
            for count in range(10):
                x = [float(number), float(count)]
                found = client.output("/Evaluate", {"name": COUPLED, "input": [x, [1.0, 0.0, 1.0]]})
                if not near(found[0], [2 * x[0], 2 * x[1]]) or not near(found[1], [x[0] ** 2 + x[1] ** 2]):
                    wrong.append((x, found))

        threads = [threading.Thread(target=many, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        counted = 'pnode_dist_serve_requests_total{path="/Evaluate",status="200"} 60\n'
        # An answer is counted once it is sent, so the client may have it before.
        until = time.monotonic() + PATIENCE
        while counted not in (metrics := Client(url).ask("/metrics")[1]):
            assert time.monotonic() < until, metrics
            time.sleep(0.01)
        assert f"pnode_dist_serve_ranks {mesh.size}\n" in metrics

    while_served([Coupled(mesh.state_comm)], mesh, directory, ask)


def test_a_wrong_address_or_token_is_one_error_on_all_ranks(mesh: Mesh, directory: Path) -> None:
    model = [Coupled(mesh.state_comm)]

    def refused(**options: Any) -> str:
        return raised_on_all(ConfigurationError, lambda: while_served(model, mesh, directory, len, options))

    assert "--host 0.0.0.0: can be reached by others: must have a --token-file" in refused(host="0.0.0.0")
    assert "--token-file nowhere: cannot be read" in refused(token_file=Path("nowhere"))
