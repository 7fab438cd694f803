"""The benchmark of overheads takes from a solve the work on f that its variant needs, and its checks can fail."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
import torchdiffeq

from pnode_dist.bench import overhead as bench

PEERS = (torchdiffeq.odeint, torchdiffeq.odeint_adjoint)


@pytest.mark.parametrize("subject", bench.subjects(), ids=lambda subject: subject.name)
def test_all_ways_solve_the_same_problem_to_the_same_gradient(subject: bench.Subject) -> None:
    variants = bench.variants(subject, *PEERS)
    assert {variant.solver for variant in variants} == {"pnode_dist", "torchdiffeq", "torchode"}
    ends = [variant.solve(3).detach() for variant in variants]
    assert (ends[0] - subject.state).abs().max() > 1e-4
    # Two methods of fourth order differ by the fifth power of a step of 2^-10.
    assert all(torch.allclose(one, other, rtol=0, atol=1e-14) for one, other in pairwise(ends))
    gradients = [
        torch.autograd.grad(variant.solve(3).square().sum(), subject.wanted)
        for variant in variants
        if variant.backward != "none"
    ]
    assert len(gradients) == 6
    for one, other in pairwise(gradients):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


def test_each_way_does_the_work_on_f_that_is_taken_from_it() -> None:
    subject = bench.subjects()[0]
    evaluations: Counter[bool] = Counter()
    subject.func.register_forward_hook(lambda *_: evaluations.update([torch.is_grad_enabled()]))
    for variant in bench.variants(subject, *PEERS):
        variant.turn(subject, 2)  # The first solve also measures.
        evaluations.clear()
        variant.turn(subject, 5)
        stages = 5 * bench.STAGES
        again = variant.backward == "evaluation and product"
        assert evaluations[True] == stages * (variant.graphs + again), variant
        # The last step is not run again: once in a solve, its graphs are kept.
        last = bench.STAGES if variant.keeps == "solution" else 0
        assert evaluations[False] == stages * (not variant.graphs) - last, variant


def test_the_work_alone_is_as_many_evaluations_as_there_are_stages() -> None:
    subject = bench.subjects()[0]
    calls: list[bool] = []
    subject.func.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    for name, turn in bench.work(subject).items():
        calls.clear()
        turn(3)
        assert calls == [name != "evaluation"] * 3 * bench.STAGES


def test_a_stage_is_the_slope_and_a_solve_the_rest() -> None:
    found = bench.line({10: (50e-6, 130e-6), 20: (90e-6, 250e-6)})
    assert found.stage == pytest.approx((1.0, 3.0))
    assert found.solve == pytest.approx((10.0, 10.0))


def test_the_least_of_all_repeats_but_the_first_counts() -> None:
    seconds = iter([(0.0, 0.0), (0.0, 0.0), (3e-6, 9e-6), (11e-6, 21e-6), (5e-6, 5e-6), (9e-6, 25e-6)])
    found = bench.measure({"one": lambda steps: next(seconds)}, (1, 2), 2)
    assert found["one"].stage == pytest.approx((6 / 4, 16 / 4))


def test_the_checks_fail_for_what_takes_longer() -> None:
    subject = bench.subjects()[0]
    variants = [
        variant for variant in bench.variants(subject, *PEERS) if variant.keeps in ("nothing", "graph", "solution")
    ]
    alone = {
        "evaluation": bench.Line((5.0, 0.0), (0.0, 0.0)),
        "product": bench.Line((9.0, 20.0), (0.0, 0.0)),
        "evaluation and product": bench.Line((0.0, 29.0), (0.0, 0.0)),
    }

    def verdicts(forward: float, adjoint: float) -> list[bool]:
        lines = {
            "nothing": bench.Line((5.0 + forward, 0.0), (100.0, 0.0)),
            "graph": bench.Line((9.0 + forward, 20.0 + adjoint), (100.0, 200.0)),
            "solution": bench.Line((5.0 + forward, 29.0 + adjoint), (100.0, 200.0)),
        }
        rows = [bench.row(subject, variant, lines[variant.keeps], alone) for variant in variants]
        return [check.holds for check in bench.checks(rows)]

    assert verdicts(4.9, 14.9) == [True] * 5
    assert verdicts(5.1, 14.9) == [False, False, True, False, True]
    assert verdicts(4.9, 15.1) == [True, True, False, True, False]
