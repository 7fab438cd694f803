"""The HTTP server on rank 0: one thread for each connection, none of which makes a call of MPI."""

from __future__ import annotations

import contextlib
import pickle
import select
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pnode_dist.errors import ConfigurationError
from pnode_dist.serve import access, protocol, strict_json
from pnode_dist.serve.metrics import CONTENT_TYPE, Metrics
from pnode_dist.serve.protocol import RequestError, invalid_input
from pnode_dist.serve.queue import Job, JobQueue
from pnode_dist.train.served_model import ServedModel

METRICS, HEALTH = "/metrics", "/healthz"
_GET_PATHS = (protocol.INFO, METRICS, HEALTH)
_KNOWN_PATHS = (*_GET_PATHS, *protocol.PATHS)
_SECONDS_BETWEEN_LOOKS = 0.1
_LONGEST_MESSAGE = 500
_JSON = "application/json"
# As nginx counts a client that has closed its connection.
_CLIENT_GONE = 499


@dataclass(frozen=True)
class Limits:
    """Limits of the service: bytes of a request's body, connections, seconds of a request, and of a silent client.

    `deadline` 0 sets no limit to a request.
    """

    body: int = 16 * 2**20
    connections: int = 128
    deadline: float = 600.0
    silence: float = 30.0


class Listener(ThreadingHTTPServer):
    """A server for one service, from its construction to `shut`.

    Raises `ConfigurationError` for an address at which it cannot listen. The system chooses a port for port 0.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        host: str,
        port: int,
        models: Mapping[str, ServedModel],
        queue: JobQueue,
        metrics: Metrics,
        limits: Limits,
        token: str | None = None,
    ) -> None:
        self.models, self.queue, self.metrics, self.limits, self.token = models, queue, metrics, limits, token
        self._slots = threading.BoundedSemaphore(limits.connections)
        self._open = 0
        self._changed = threading.Condition()
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise ConfigurationError(
                f"serve: --host {host} --port {port}: cannot listen there: {error.strerror or error}"
            ) from None
        self._thread = threading.Thread(
            target=self.serve_forever, args=(_SECONDS_BETWEEN_LOOKS,), name="pnode-dist-listener", daemon=True
        )

    @property
    def url(self) -> str:
        """The address as others write it; an address of all interfaces is that of this host."""
        host, port = self.server_address[:2]
        name = str(host)
        if name in ("0.0.0.0", "::"):
            name = socket.gethostname()
        return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"

    def start(self) -> None:
        """Answer requests from now on."""
        self._thread.start()

    def shut(self, patience: float) -> None:
        """Wait for the answers under way, at most so many seconds, and stop."""
        until = time.monotonic() + patience
        with self._changed:
            while self._open and time.monotonic() < until:
                self._changed.wait(until - time.monotonic())
        if self._thread.is_alive():
            self.shutdown()
        self.server_close()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Count an answer under way."""
        with self._changed:
            self._open += 1
        try:
            yield
        finally:
            with self._changed:
                self._open -= 1
                self._changed.notify()

    def server_bind(self) -> None:
        """Bind the address, without the search for its name that may take seconds."""
        socketserver.TCPServer.server_bind(self)

    def server_close(self) -> None:
        """Close the socket, and wait for no idle connection."""
        socketserver.TCPServer.server_close(self)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or close the connection if there are too many."""
        if not self._slots.acquire(blocking=False):
            with contextlib.suppress(OSError):
                request.sendall(_TOO_MANY)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            # No thread has started, which would release it.
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer the requests of a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore a client that has gone; print any other error in one line."""
        error = sys.exception()
        if not isinstance(error, OSError):
            log(f"{client_address[0]} {type(error).__name__}: {error}")


class Handler(BaseHTTPRequestHandler):
    """The requests of one connection."""

    server: Listener
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    _job: Job | None = None

    def setup(self) -> None:
        """Limit the seconds of a client that sends or reads nothing."""
        super().setup()
        self.connection.settimeout(self.server.limits.silence)

    def version_string(self) -> str:
        """Return the name of the program alone."""
        return "pnode-dist"

    def do_GET(self) -> None:
        """Answer a request for what the service is."""
        self._answer()

    def do_POST(self) -> None:
        """Answer a request to a model."""
        self._answer()

    def do_HEAD(self) -> None:
        """Answer like GET, without a body."""
        self._answer()

    def _answer(self) -> None:
        began = time.monotonic()
        self._job = None
        with self.server.answering():
            try:
                status, content, kind, headers = self._found()
                self._write(status, content, kind, headers)
            except (ConnectionError, TimeoutError):
                status, self.close_connection = _CLIENT_GONE, True
        computed = 0.0 if self._job is None else self._job.seconds
        self._record(status, time.monotonic() - began, computed)

    def _found(self) -> tuple[int, bytes, str, Mapping[str, str]]:
        """Return status, body, type and further headers of the answer. Raises `OSError` if the client is gone."""
        try:
            content = self._content()
        except RequestError as error:
            message = " ".join(error.message.split())[:_LONGEST_MESSAGE]
            return error.status, _error(error.kind, message), _JSON, error.headers
        except (ConnectionError, TimeoutError):
            raise
        except Exception as error:
            # A mistake in this room or in a model must not leave a client without an answer.
            log("".join(traceback.format_exception(error)))
            return 500, _error("InternalError", f"{type(error).__name__}: {error}"[:_LONGEST_MESSAGE]), _JSON, {}
        return (200, content.encode(), CONTENT_TYPE, {}) if isinstance(content, str) else (200, content, _JSON, {})

    def _content(self) -> bytes | str:
        """Return the body of the answer. Raises `RequestError`."""
        body = self._body()
        path, server = self.path, self.server
        if self.headers.get("Origin") is not None:
            raise RequestError(403, "Forbidden", "requests of web pages are refused")
        if path != HEALTH and not access.is_authorised(self.headers.get("Authorization"), server.token):
            raise RequestError(
                401,
                "Unauthorized",
                "needs the service's token, as a bearer token or as a password",
                {"WWW-Authenticate": 'Basic realm="pnode-dist"'},
            )
        if path not in _KNOWN_PATHS:
            raise RequestError(404, "NotFound", f"path {path[:60]!r}: must be one of {', '.join(_KNOWN_PATHS)}")
        allowed = ("GET", "HEAD") if path in _GET_PATHS else ("POST",)
        if self.command not in allowed:
            raise RequestError(
                405,
                "MethodNotAllowed",
                f"{path}: must be {allowed[0]}, not {self.command}",
                {"Allow": ", ".join(allowed)},
            )
        if path in _GET_PATHS:
            if body:
                raise invalid_input(f"{path}: takes no body")
            return self._status(path)
        try:
            asked = strict_json.parsed(body)
        except ValueError as error:
            raise invalid_input(f"the request is not JSON: {error}") from None
        if path in protocol.QUERIES:
            return strict_json.written(protocol.answered_at_once(path, asked, server.models))
        call = protocol.checked_call(path.removeprefix("/"), asked, server.models)
        job = self._job = Job(call, pickle.dumps(call))
        server.queue.put(job)
        return strict_json.written(protocol.answer(call, self._result(job)))

    def _status(self, path: str) -> bytes | str:
        server = self.server
        if path == protocol.INFO:
            return strict_json.written(protocol.information(server.models))
        if path == METRICS:
            return server.metrics.text(server.queue.length, server.queue.is_busy)
        if server.queue.is_closed:
            raise RequestError(503, "ServiceUnavailable", "the service is ending")
        return strict_json.written({"status": "ok"})

    def _body(self) -> bytes:
        """Read the whole body, so that the next request begins where it should. Raises `RequestError`."""
        self.close_connection = True
        if self.headers.get("Transfer-Encoding") is not None:
            raise RequestError(411, "LengthRequired", "Transfer-Encoding: not supported: must have a Content-Length")
        lengths = self.headers.get_all("Content-Length", ["0"])
        if len(set(lengths)) > 1 or not (lengths[0].isascii() and lengths[0].isdigit()) or len(lengths[0]) > 18:
            raise invalid_input(f"Content-Length {lengths[0][:20]!r}: must be the number of bytes of the body")
        length, most = int(lengths[0]), self.server.limits.body
        if length > most:
            raise RequestError(413, "InvalidInput", f"the request has {length} bytes: must have at most {most}")
        try:
            body = self.rfile.read(length)
        except TimeoutError:
            raise RequestError(408, "RequestTimeout", f"the body has {length} bytes, which did not come") from None
        if len(body) < length:
            raise ConnectionAbortedError
        self.close_connection = (
            self.headers.get("Connection", "").lower() == "close" or self.request_version != "HTTP/1.1"
        )
        return body

    def _result(self, job: Job) -> Any:
        """Wait for the outcome of a job, and abandon it if it comes too late or if the client is gone."""
        deadline = self.server.limits.deadline
        until = time.monotonic() + (deadline or float("inf"))
        while True:
            left = until - time.monotonic()
            if job.wait(max(0.0, min(left, _SECONDS_BETWEEN_LOOKS))):
                return job.result()
            if left <= 0:
                job.abandoned = True
                raise RequestError(
                    504, "DeadlineExceeded", f"no result within {deadline:g} s: the request was abandoned"
                )
            if self._client_is_gone():
                job.abandoned = True
                raise ConnectionAbortedError

    def _client_is_gone(self) -> bool:
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        if not poll.poll(0):
            return False
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def _write(self, status: int, content: bytes, kind: str, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _record(self, status: int, seconds: float, computed: float) -> None:
        path = self.path if self.path in _KNOWN_PATHS else "other"
        self.server.metrics.count(path, status, seconds, computed)
        model = "-" if self._job is None else self._job.call.model
        log(
            f'{self.client_address[0]} "{self.command} {_printable(self.path)}" {status} {model} '
            f"{1e3 * seconds:.1f} ms, {1e3 * computed:.1f} ms computed"
        )

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what is not a request of HTTP."""
        self.close_connection = True
        # A request without a version would get an answer without a status.
        self.request_version = self.protocol_version
        text = message or self.responses.get(code, ("error",))[0]
        self._write(code, _error("InvalidInput", text[:_LONGEST_MESSAGE]), _JSON, {})
        self.server.metrics.count("other", code, 0.0, 0.0)
        log(f'{self.client_address[0]} "{_printable(self.requestline)}" {code}')

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing here: each answer has its line."""


def log(text: str) -> None:
    """Print a line with the time on standard error, at once and as a whole."""
    moment = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3]
    sys.stderr.write(f"{moment}Z serve: {text}\n")
    sys.stderr.flush()


def _error(kind: str, message: str) -> bytes:
    return strict_json.written({"error": {"type": kind, "message": message}})


def _refusal(content: bytes) -> bytes:
    """Return a whole answer of HTTP with status 503."""
    head = (
        "HTTP/1.1 503 Service Unavailable",
        f"Content-Type: {_JSON}",
        f"Content-Length: {len(content)}",
        "Retry-After: 1",
        "Connection: close",
    )
    return "\r\n".join((*head, "", "")).encode() + content


_TOO_MANY = _refusal(_error("ServiceUnavailable", "there are too many connections"))


def _printable(text: str) -> str:
    shown = text[:100].encode("ascii", "backslashreplace").decode()
    return "".join(character if character.isprintable() and character != '"' else "?" for character in shown)
