"""The queue is bounded, in the order received, and leaves no job without an outcome."""

from __future__ import annotations

import numpy as np
import pytest

from pnode_dist.serve.protocol import Call, RequestError, invalid_output
from pnode_dist.serve.queue import Job, JobQueue


def job(name: str = "model") -> Job:
    return Job(Call("Evaluate", name, {}, [], (), [], (1,)), b"")


def full(capacity: int, seconds: float = 0.0) -> JobQueue:
    """A full queue after one job that took so many seconds."""
    queue = JobQueue(capacity)
    queue.put(job())
    taken = queue.take(0)
    assert taken is not None
    queue.finish(taken, seconds, [])
    for _ in range(capacity):
        queue.put(job())
    return queue


def test_jobs_are_taken_in_the_order_received() -> None:
    queue = JobQueue(3)
    for name in "abc":
        queue.put(job(name))
    assert [found.call.model for _ in range(3) if (found := queue.take(0)) is not None] == ["a", "b", "c"]
    assert queue.take(0.01) is None


def test_a_full_queue_says_when_to_come_back() -> None:
    with pytest.raises(RequestError) as error:
        full(4, seconds=2.5).put(job())
    assert (error.value.status, error.value.headers) == (503, {"Retry-After": "10"})
    with pytest.raises(RequestError) as error:
        full(1).put(job())
    assert error.value.headers == {"Retry-After": "1"}


def test_an_abandoned_job_is_not_taken_and_takes_no_place() -> None:
    queue = JobQueue(2)
    first, second = job("first"), job("second")
    queue.put(first)
    queue.put(second)
    first.abandoned = True
    queue.put(job("third"))
    with pytest.raises(RequestError):
        queue.put(job("fourth"))
    assert queue.take(0) is second


def test_a_closed_queue_hands_out_the_jobs_that_wait_and_takes_no_more() -> None:
    queue = full(2)
    queue.close()
    with pytest.raises(RequestError, match="the service is ending"):
        queue.put(job())
    assert queue.take(0) is not None
    assert queue.take(0) is not None
    assert queue.take(60) is None


def test_at_the_end_every_open_job_gets_the_error() -> None:
    queue = JobQueue(2)
    jobs = [job(), job(), job()]
    queue.put(jobs[0])
    computing = queue.take(0)
    assert computing is jobs[0]
    for other in jobs[1:]:
        queue.put(other)
    queue.fail_all(invalid_output("the end"))
    for each in jobs:
        assert each.wait(0)
        with pytest.raises(RequestError, match="the end"):
            each.result()
    # The outcome of the computation comes too late.
    queue.finish(computing, 1.0, [np.zeros(1)])
    with pytest.raises(RequestError, match="the end"):
        computing.result()
