"""Counts of requests in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import Counter

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "pnode_dist_serve"


class Metrics:
    """Counts and seconds of requests, by path and status."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._lock = threading.Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: Counter[str] = Counter()
        self._computed: Counter[str] = Counter()

    def count(self, path: str, status: int, seconds: float, computed: float) -> None:
        """Count an answered request, and its seconds in the service and on the ranks. `path` is one of a few."""
        with self._lock:
            self._requests[path, status] += 1
            self._seconds[path] += seconds  # type: ignore[assignment]
            self._computed[path] += computed  # type: ignore[assignment]

    def text(self, waiting: int, is_busy: bool) -> str:
        """Return all metrics as text."""
        with self._lock:
            requests, seconds, computed = dict(self._requests), dict(self._seconds), dict(self._computed)
        lines = _family("requests_total", "counter", "Answered requests.")
        lines += [
            f'{_PREFIX}_requests_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(requests.items())
        ]
        lines += _family("request_seconds_total", "counter", "Seconds from receipt to answer.")
        lines += [
            f'{_PREFIX}_request_seconds_total{{path="{path}"}} {value}' for path, value in sorted(seconds.items())
        ]
        lines += _family("computed_seconds_total", "counter", "Seconds in which the ranks computed.")
        lines += [
            f'{_PREFIX}_computed_seconds_total{{path="{path}"}} {value}' for path, value in sorted(computed.items())
        ]
        for name, value, text in (
            ("waiting_requests", waiting, "Requests in the queue."),
            ("busy", int(is_busy), "1 while the ranks compute."),
            ("ranks", self._ranks, "Ranks of the service."),
        ):
            lines += [*_family(name, "gauge", text), f"{_PREFIX}_{name} {value}"]
        return "\n".join(lines) + "\n"


def _family(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {_PREFIX}_{name} {text}", f"# TYPE {_PREFIX}_{name} {kind}"]
