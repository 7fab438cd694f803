"""The service from its start to its end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.runs.directory import on_root
from pnode_dist.serve import access
from pnode_dist.serve.listener import Limits, Listener, log
from pnode_dist.serve.metrics import Metrics
from pnode_dist.serve.protocol import RequestError
from pnode_dist.serve.queue import JobQueue
from pnode_dist.serve.rank_loop import RankLoop
from pnode_dist.system.abort import before_abort
from pnode_dist.system.atomic_file import write_atomically
from pnode_dist.train.served_model import ServedModel
from pnode_dist.train.watchdog import Watchdog

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 4242
_SECONDS_FOR_ANSWERS = 5.0
_SECONDS_FOR_LAST_WORDS = 0.5
_SWITCH_INTERVAL = 1e-3
_METHODS = ("refusal", "input_sizes", "output_sizes", "evaluate", "gradient", "apply_jacobian", "apply_hessian")


@dataclass(frozen=True)
class ServiceOptions:
    """Options of a service: its address, its token, its limits, and the file for its URL.

    `capacity` is the number of requests that may wait. Port 0 leaves the choice to the system.
    """

    host: str = DEFAULT_HOST
    port: int = DEFAULT_PORT
    token_file: Path | None = None
    insecure: bool = False
    capacity: int = 64
    limits: Limits = field(default_factory=Limits)
    url_file: Path | None = None


def checked_models(models: Any, problem: str) -> list[ServedModel]:
    """Return what a problem's `served()` has returned as a list. Raises `ConfigurationError` if they are not models."""
    found = list(models) if isinstance(models, Iterable) else [models]
    if not found:
        raise ConfigurationError(f"serve: the problem {problem} serves no model: must define served()")
    for model in found:
        lacking = [name for name in _METHODS if not callable(getattr(model, name, None))]
        if lacking:
            raise ConfigurationError(
                f"serve: served() of {problem}: {type(model).__name__} has no {' and no '.join(lacking)}: must have "
                "the methods of pnode_dist.train.served_model.ServedModel"
            )
        if not isinstance(model.name, str) or not model.name:
            raise ConfigurationError(f"serve: served() of {problem}: name = {model.name!r}: must be a text")
    names = [model.name for model in found]
    if len(set(names)) < len(names):
        raise ConfigurationError(f"serve: served() of {problem}: the names {', '.join(names)} must be different")
    return found


def serve(models: Sequence[ServedModel], mesh: Mesh, options: ServiceOptions, hang_limit: float) -> None:
    """Answer requests until a rank gets SIGTERM, and then those that have been received. Collective on the world.

    A job that takes no step of its solve for `hang_limit` seconds while it computes ends as
    `pnode_dist.train.watchdog` describes.
    Raises `ConfigurationError` on all ranks for an address, a token or a file for the URL that cannot be used.
    """
    named = {model.name: model for model in models}
    queue = JobQueue(options.capacity)
    listener: list[Listener] = []
    on_root(mesh, lambda: listener.append(_listener(named, mesh, options, queue)))
    with ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(mesh, hang_limit))
        loop = RankLoop(mesh.state_comm, named, queue if mesh.is_root else None, watchdog)
        stack.enter_context(loop.heeding_signals())
        if listener:
            stack.enter_context(_answering(listener[0], queue, options.url_file))
        loop.run()
        loop.close()


def _listener(named: Mapping[str, ServedModel], mesh: Mesh, options: ServiceOptions, queue: JobQueue) -> Listener:
    """Return the server of rank 0, bound to its address. Raises `ConfigurationError`."""
    token = None if options.token_file is None else access.read_token(options.token_file)
    access.check_address(options.host, token, options.insecure)
    if options.url_file is not None and not options.url_file.parent.is_dir():
        raise ConfigurationError(
            f"serve: --url-file {options.url_file}: there is no directory {options.url_file.parent}"
        )
    return Listener(options.host, options.port, named, queue, Metrics(mesh.size), options.limits, token)


@contextmanager
def _answering(listener: Listener, queue: JobQueue, url_file: Path | None) -> Iterator[None]:
    """Answer requests within the context, on rank 0. Requests that are open at its end get an error."""
    ended = RequestError(500, "ServiceEnded", "the service has ended")

    def last_words() -> None:
        queue.fail_all(ended)
        time.sleep(_SECONDS_FOR_LAST_WORDS)

    before_abort(last_words)
    usual = sys.getswitchinterval()
    # Threads that have a request or an answer wait for the one that computes.
    sys.setswitchinterval(_SWITCH_INTERVAL)
    listener.start()
    try:
        if url_file is not None:
            write_atomically(url_file, f"{listener.url}\n".encode(), durable=False)
        log(f"{', '.join(listener.models)} at {listener.url}")
        yield
        log("ended: every request is answered")
    finally:
        queue.fail_all(ended)
        listener.shut(_SECONDS_FOR_ANSWERS)
        sys.setswitchinterval(usual)
        if url_file is not None:
            url_file.unlink(missing_ok=True)
