"""`compile="auto"`: the decision follows from measured times alone, and the gradient from it by rounding alone."""

from __future__ import annotations

import pytest
from mpi4py import MPI

from pnode_dist import NeuralODE
from pnode_dist.ode.rhs.automatic_compilation import COMPILATION, AutomaticCompilation
from pnode_dist.ode.rhs.compiled import Compiler
from tests.oracles.right_hand_sides import Network, distance, gradients, random


def take(automatic: AutomaticCompilation, seconds: float) -> bool:
    """A solve of ten steps. Returns True if it is compiled."""
    took = automatic.next_solve(MPI.COMM_SELF)
    took.seconds += seconds
    took.steps += 10
    return automatic.compiles


def test_solves_are_compiled_once_they_have_taken_the_time_of_a_compilation() -> None:
    automatic = AutomaticCompilation()
    assert [take(automatic, COMPILATION / 4) for _ in range(6)] == [False] * 4 + [True] * 2


@pytest.mark.parametrize(("seconds", "stays"), [(0.5, True), (1.5, False)], ids=["faster", "slower"])
def test_after_three_compiled_solves_the_faster_way_is_kept(seconds: float, stays: bool) -> None:
    automatic = AutomaticCompilation(compilation=1.0)
    assert [take(automatic, 1.0), take(automatic, COMPILATION)] == [False, True]
    found = [take(automatic, seconds) for _ in range(6)]
    assert found == [True] * 3 + [stays] * 3
    assert automatic.is_final


def test_the_gradient_is_that_of_uncompiled_solves_before_and_after() -> None:
    network, u0, times = Network(), random(2, 3), [0.0, 1.0]
    plain, node = NeuralODE(network, step_size=0.1), NeuralODE(network, step_size=0.1, compile="auto")
    # Neither the generated code nor the time of its compilation is under test.
    node.compiler = Compiler("aot_eager", automatic=True)
    automatic = node.compiler.automatic[True]
    automatic.compilation = 1e-9
    wanted = gradients(lambda u: plain(u, times), u0, list(network.parameters()))
    for compiled in (False, True, True, True):
        found = gradients(lambda u: node(u, times), u0, list(network.parameters()))
        assert distance(found, wanted) <= 1e-13
        assert automatic.compiles is compiled
    assert automatic.compiled.steps == 2 * 10
    assert not node.compiler.automatic[False].compiles


def test_a_method_that_cannot_be_compiled_is_solved_as_it_is() -> None:
    node = NeuralODE(Network(), method="cn", step_size=0.5, newton="petsc", compile="auto")
    assert node(random(2, 3), [0.0, 1.0]).isfinite().all()
