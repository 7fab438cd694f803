"""Solves of several threads take turns, and those of one thread go on inside of one another."""

from __future__ import annotations

import _thread
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from pnode_dist import NeuralODE, Trajectory, odeint
from pnode_dist.ode import solve_lock as locks
from tests.oracles.right_hand_sides import Network, distance, random
from tests.oracles.runge_kutta import TABLEAUX, odeint_plain

TIMES = [0.0, 0.5, 1.0]


def solved(solve: Callable[[torch.Tensor], torch.Tensor], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    start = random(4, 3, seed=seed).requires_grad_()
    end = solve(start)[-1]
    (gradient,) = torch.autograd.grad(end.square().sum(), start)
    return end.detach(), gradient


@pytest.mark.parametrize("keep", ["solution", "graph", "auto"])
@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_threads_that_share_a_module_get_what_each_alone_would_get(method: str, keep: str) -> None:
    network = Network()
    # A thread that evaluates f gives way to others, as one does that waits for a device.
    hook = network.register_forward_hook(lambda *_: time.sleep(1e-4))
    node = NeuralODE(network, method=method, step_size=0.1, trajectory=Trajectory(ram="1MiB", keep=keep, solves=8))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: solved(lambda u: node(u, TIMES), seed), range(12)))
    hook.remove()
    for seed, (end, gradient) in enumerate(found):
        alone = NeuralODE(network, method=method, step_size=0.1)
        wanted, gradient_wanted = solved(lambda u, alone=alone: alone(u, TIMES), seed)
        assert distance(end, wanted) <= 1e-14
        assert distance(gradient, gradient_wanted) <= 1e-13
        if method == "rk4":
            plain, gradient_plain = solved(lambda u: odeint_plain(network, u, TIMES, TABLEAUX["4"], 0.1), seed)
            assert distance(end, plain) <= 1e-13
            assert distance(gradient, gradient_plain) <= 1e-12


def test_a_solve_inside_of_f_goes_on_in_its_thread_while_others_wait() -> None:
    inner = NeuralODE(Network(seed=1), step_size=0.5)
    outer = NeuralODE(lambda t, u: -inner(u, [0.0, 0.5])[-1], step_size=0.25, params=tuple(inner.parameters()))

    def plain(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -odeint_plain(inner.func, u, [0.0, 0.5], TABLEAUX["4"], 0.5)[-1]

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda seed: solved(lambda u: outer(u, TIMES), seed), range(6)))
    for seed, (end, gradient) in enumerate(found):
        wanted, gradient_wanted = solved(lambda u: odeint_plain(plain, u, TIMES, TABLEAUX["4"], 0.25), seed)
        assert distance(end, wanted) <= 1e-13
        assert distance(gradient, gradient_wanted) <= 1e-12


def test_f_that_waits_for_a_solve_of_another_thread_is_an_error_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    pool = ThreadPoolExecutor(1, thread_name_prefix="helper")
    start = torch.ones(2, dtype=torch.float64)

    def waits(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return pool.submit(lambda: odeint(lambda t, v: -v, u.clone(), [0.0, 0.1])[-1]).result()

    with pool, torch.no_grad(), pytest.raises(RuntimeError, match=r"waited 0\.3 s for its turn to solve") as caught:
        odeint(waits, start, TIMES)
    assert "helper_0" in str(caught.value)
    assert "MainThread" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert distance(odeint(lambda t, v: -v, start, TIMES)[0], start) == 0


@pytest.mark.parametrize("steps", [True, False])
def test_a_thread_waits_as_long_as_the_other_one_takes_steps(monkeypatch: pytest.MonkeyPatch, steps: bool) -> None:
    clock, begun = count(step=600), count()
    checks_parameters, entered, leave = [0], threading.Event(), threading.Event()

    def monotonic() -> float:
        checks_parameters[0] += 1
        if checks_parameters[0] == 20:
            leave.set()
        return float(next(clock))

    def holds() -> None:
        with locks.solve_lock():
            entered.set()
            leave.wait(30)

    monkeypatch.setattr(locks, "time", SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(locks.safe_points, "steps_begun", lambda: next(begun) if steps else 0)
    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(holds)
        entered.wait(30)
        if steps:
            with locks.solve_lock():
                assert checks_parameters[0] >= 20
        else:
            with pytest.raises(RuntimeError, match="took no step"), locks.solve_lock():
                pass
            leave.set()
        holding.result()


def test_a_thread_of_the_engine_goes_on_while_the_pass_outside_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start, found = torch.ones(1, dtype=torch.float64), []

    def of_engine() -> None:
        found.append(odeint(lambda t, u: -u, start, [0.0, 1.0], method="euler")[-1].item())

    lock = _thread.allocate_lock()

    def engine_call() -> None:
        lock.acquire()

        def run() -> None:
            of_engine()
            lock.release()

        _thread.start_new_thread(run, ())
        lock.acquire()
        lock.release()

    monkeypatch.setattr(locks, "_ENGINE_CALLS", [*locks._ENGINE_CALLS, engine_call.__code__])
    with locks.solve_lock():
        engine_call()
    assert found == [0.0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_that_is_forked_during_the_solve_of_another_thread_may_solve() -> None:
    entered, leave = threading.Event(), threading.Event()

    def holds() -> None:
        with locks.solve_lock():
            entered.set()
            leave.wait(30)

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(holds)
        entered.wait(30)
        child = os.fork()
        if child == 0:  # pragma: no cover
            locks.PATIENCE = 0.2
            try:
                with locks.solve_lock():
                    os._exit(7)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        leave.set()
        holding.result()
    assert code == 7
