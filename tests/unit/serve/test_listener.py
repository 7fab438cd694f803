"""The HTTP server: methods, paths, limits, tokens, clients that go, and documents that are wrong in any way."""

from __future__ import annotations

import copy
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pnode_dist import Mesh
from pnode_dist.ode import safe_points
from pnode_dist.serve.listener import Limits
from pnode_dist.train.served_model import Settings, SummedModel, Vectors
from tests.serving import COUPLED, DERIVATIVES, Client, Coupled, Failing, refuse, request, while_served
from tests.unit.serve.test_strict_json import JSON

TOKEN = "0123456789abcdef"
EXAMPLES = 40


class Waiting(SummedModel):
    """A model that takes steps until its event is set."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__("waiting", mesh.state_comm)
        self.begun, self.end = threading.Event(), threading.Event()

    def input_sizes(self, config: Settings) -> list[int]:
        return [1]

    def output_sizes(self, config: Settings) -> list[int]:
        return [1]

    def shares(self, inputs: Vectors, config: Settings) -> Vectors:
        self.begun.set()
        while not self.end.wait(0.001):
            safe_points.between_steps(self.comm)
        return [inputs[0]]


WAIT = json.dumps({"name": "waiting", "input": [[1.0]]}).encode()


def raw(url: str, text: bytes) -> bytes:
    """The whole answer to bytes that need not be a request."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(text)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def opened(url: str) -> socket.socket:
    """A connection that has sent a request to `Waiting`."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(b"POST /Evaluate HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(WAIT), WAIT))
    return connection


def test_other_paths_methods_and_bodies_get_an_error_that_says_what_is_right(mesh: Mesh, tmp_path: Path) -> None:
    def ask(url: str) -> None:
        client = Client(url)
        assert client.ask("/healthz") == (200, {"status": "ok"})
        assert client.error("/evaluate", {})[:2] == (404, "NotFound")
        assert client.error("/Info?x=1")[:2] == (404, "NotFound")
        assert client.error("/Info", {})[:2] == (405, "MethodNotAllowed")
        assert client.headers["Allow"] == "GET, HEAD"
        assert client.error("/Evaluate")[:2] == (405, "MethodNotAllowed")
        assert client.error("/Evaluate", {}, Origin="http://a.page")[:2] == (403, "Forbidden")
        assert client.error("/Evaluate", b"x" * 2000)[:2] == (413, "InvalidInput")
        client = Client(url)
        assert client.error("/Evaluate", b"[[inf]]")[:2] == (400, "InvalidInput")
        assert client.error("/Evaluate", b'"x"') == (400, "InvalidInput", "the request must be a JSON object")
        assert client.error("/ModelInfo", {"name": COUPLED, "x": 1})[:2] == (400, "InvalidInput")

    while_served([Coupled(mesh.state_comm)], mesh, tmp_path, ask, {"limits": Limits(body=1000)})


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (b"\r\n\r\n", b""),
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /Info HTTP/9.9\r\n\r\n", b"505"),
        (b"BREW /Info HTTP/1.1\r\n\r\n", b"501"),
        (b"GET /%s HTTP/1.1\r\n\r\n" % (b"x" * 70_000), b"414"),
        (b"GET /Info HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"431"),
        (b"POST /Evaluate HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"400"),
        (b"POST /Evaluate HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"POST /Evaluate HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", b"400"),
        (b"POST /Evaluate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"411"),
        (b"POST /Evaluate HTTP/1.1\r\nContent-Length: 9\r\n\r\nshort", b"408"),
        (b"GET /Info HTTP/1.1\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}", b"400"),
    ],
)
def test_what_is_not_http_is_answered_or_closed_and_does_no_harm(
    text: bytes, status: bytes, mesh: Mesh, tmp_path: Path
) -> None:
    def ask(url: str) -> None:
        head, _, body = raw(url, text).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + status if status else b"")
        if status:
            assert set(json.loads(body)) == {"error"}
        assert Client(url).ask("/healthz")[0] == 200

    while_served([Coupled(mesh.state_comm)], mesh, tmp_path, ask, {"limits": Limits(silence=0.3)})


def test_every_path_but_the_health_check_needs_the_token(mesh: Mesh, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)

    def ask(url: str) -> None:
        client = Client(url)
        assert client.ask("/healthz")[0] == 200
        for path, body in (("/Info", None), ("/metrics", None), ("/Evaluate", request(COUPLED)), ("/nowhere", None)):
            if path != "/metrics":
                assert client.error(path, body)[:2] == (401, "Unauthorized")
            assert client.ask(path, body, Authorization="Bearer wrong")[0] == 401
        assert client.ask("/Evaluate", request(COUPLED), Authorization=f"Bearer {TOKEN}")[0] == 200

    while_served([Coupled(mesh.state_comm)], mesh, tmp_path, ask, {"token_file": token})


def test_a_full_service_answers_503_and_one_that_ends_answers_what_it_has(mesh: Mesh, tmp_path: Path) -> None:
    model = Waiting(mesh)

    def ask(url: str) -> list[socket.socket]:
        first = opened(url)
        assert model.begun.wait(30)
        second = opened(url)
        client = Client(url)
        while "waiting_requests 1\n" not in client.ask("/metrics")[1]:
            pass
        assert client.error("/Evaluate", WAIT)[:2] == (503, "ServiceUnavailable")
        assert int(client.headers["Retry-After"]) >= 1
        threading.Timer(0.3, model.end.set).start()
        # From here on the service gets SIGTERM, and has two requests to answer.
        return [first, second]

    connections = while_served([model], mesh, tmp_path, ask, {"capacity": 1})
    assert connections is not None
    for connection in connections:
        with connection:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_the_call_of_a_client_that_has_gone_is_abandoned(mesh: Mesh, tmp_path: Path) -> None:
    model = Waiting(mesh)

    def ask(url: str) -> None:
        opened(url).close()
        assert model.begun.wait(30)
        # The model itself never ends.
        assert Client(url).output("/Evaluate", request(COUPLED))[1] == [15.0]

    while_served([model, Coupled(mesh.state_comm)], mesh, tmp_path, ask)


def test_too_many_connections_are_closed_with_503(mesh: Mesh, tmp_path: Path) -> None:
    def ask(url: str) -> None:
        client = Client(url)
        assert client.ask("/healthz")[0] == 200
        head, _, body = raw(url, b"GET /healthz HTTP/1.1\r\n\r\n").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503")
        assert f"Content-Length: {len(body)}".encode() in head
        assert json.loads(body)["error"]["type"] == "ServiceUnavailable"
        client.connection.close()
        while not raw(url, b"GET /healthz HTTP/1.1\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 200"):
            pass

    while_served([Coupled(mesh.state_comm)], mesh, tmp_path, ask, {"limits": Limits(connections=1)})


ANYTHING = JSON | st.sampled_from(["NaN", "inf"]).map(float) | st.just(10**400)
KEYS = ["name", "config", "input", "outWrt", "inWrt", "inWrt1", "inWrt2", "sens", "vec", "x"]


@st.composite
def changed_requests(draw: st.DrawFn, valid: dict[str, Any]) -> tuple[str, bytes]:
    """A valid request of which a part is missing, replaced, or of another length; or any bytes."""
    path = draw(st.sampled_from([*valid, "/InputSizes", "/OutputSizes", "/ModelInfo"]))
    if draw(st.integers(0, 4)) == 0:
        return path, draw(st.binary(max_size=200))
    body = copy.deepcopy(valid.get(path, {"name": valid["/Evaluate"]["name"], "config": {}}))
    for key in draw(st.lists(st.sampled_from(KEYS), min_size=1, max_size=3)):
        action = draw(st.integers(0, 3))
        if action == 0:
            body.pop(key, None)
        elif action == 1 and isinstance(body.get(key), list):
            body[key] = body[key][: draw(st.integers(0, 3))] + draw(st.lists(ANYTHING, max_size=3))
        else:
            body[key] = draw(ANYTHING)
    return path, json.dumps(body).encode()


def attack(url: str, examples: int, valid: dict[str, Any]) -> dict[int, int]:
    """Send wrong requests, and check that each is answered in strict JSON; how often each status was the answer.

    `valid` are right ones, by path.
    """
    client, statuses = Client(url), dict[int, int]()

    @settings(max_examples=examples, database=None, derandomize=True)
    @given(changed_requests(valid))
    def send(example: tuple[str, bytes]) -> None:
        status, answer = client.ask(*example)
        statuses[status] = statuses.get(status, 0) + 1
        if status == 200:
            json.loads(example[1], parse_constant=refuse)
            assert set(answer) <= {"output", "inputSizes", "outputSizes", "support"}
        else:
            assert status == 400
            assert answer["error"]["type"] in ("InvalidInput", "ModelNotFound", "UnsupportedFeature")

    send()
    return statuses


def test_malformed_requests_get_errors_and_the_service_lives_on(mesh: Mesh, tmp_path: Path) -> None:
    def ask(url: str) -> None:
        valid = {path: request(COUPLED, **keys) for path, keys in DERIVATIVES.items()}
        statuses = attack(url, EXAMPLES, valid)
        assert statuses[400] > EXAMPLES // 2
        found: Any = Client(url).output("/Evaluate", request(COUPLED))
        assert found == [[50.0, 100.0], [15.0]]

    while_served([Coupled(mesh.state_comm), Failing(mesh.state_comm)], mesh, tmp_path, ask)
