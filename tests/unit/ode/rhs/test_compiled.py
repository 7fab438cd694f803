"""f through torch.compile."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from pnode_dist import NeuralODE, SplitFunction
from pnode_dist.errors import ConfigurationError
from tests.oracles.right_hand_sides import Network, distance, gradients, random

pytestmark = pytest.mark.slow  # torch.compile alone takes seconds to load
TIMES = [0.0, 0.5, 1.0]
# Traces as the default backend does, without waiting for a C++ compiler.
BACKEND = "aot_eager"


def test_values_and_gradients_are_those_of_f_as_it_is() -> None:
    network, u0 = Network(), random(2, 3)
    parameters = list(network.parameters())
    found = {
        compile: gradients(lambda u, node=node: node(u, TIMES), u0, parameters)  # type: ignore[misc]
        for compile in (False, BACKEND)
        for node in [NeuralODE(network, step_size=0.25, compile=compile)]
    }
    assert distance(found[BACKEND], found[False]) <= 1e-14


@pytest.mark.nightly
def test_the_default_backend_makes_code_of_f_and_of_its_products() -> None:
    network, u0 = Network(), random(2, 3)
    parameters = list(network.parameters())
    from torch._dynamo.utils import counters

    counters.clear()
    node = NeuralODE(network, step_size=0.25, compile=True, compute_dtype=torch.float32)
    found = gradients(lambda u: node(u, TIMES), u0, parameters)
    gradients(lambda u: node(u, TIMES), u0, parameters)
    # With a gradient; parameters that are converted anew for each solve do not compile it again.
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    wanted = gradients(lambda u: NeuralODE(network, step_size=0.25)(u, TIMES), u0, parameters)
    assert 0 < distance(found, wanted) <= 1e-5


def test_with_petsc_s_newton_the_explicit_part_alone_is_compiled() -> None:
    called = []

    def stiff(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        called.append(torch.compiler.is_compiling())
        return -3.0 * u

    network, u0 = Network(), random(2, 3)
    split = SplitFunction(implicit=stiff, explicit=network)
    parameters = list(network.parameters())
    settings: dict[str, Any] = {"method": "arkimex_3", "step_size": 0.25, "newton": "petsc"}
    compiled = NeuralODE(split, compile=BACKEND, **settings)
    found = gradients(lambda u: compiled(u, TIMES), u0, parameters)
    assert not any(called)
    wanted = gradients(lambda u: NeuralODE(split, **settings)(u, TIMES), u0, parameters)
    assert distance(found, wanted) <= 1e-12


def test_tangents_are_those_of_f_as_it_is() -> None:
    network, u0, direction = Network(), random(2, 3), random(2, 3, seed=2)
    tangents = [
        NeuralODE(network, step_size=0.25, compile=way).jvp(u0, TIMES, direction)[1] for way in (False, BACKEND)
    ]
    assert torch.equal(*tangents)


def test_a_method_that_treats_all_implicitly_is_refused_with_petsc_s_newton() -> None:
    with pytest.raises(ConfigurationError, match="compile: method = 'cn' treats all of f implicitly"):
        NeuralODE(Network(), method="cn", compile=BACKEND, newton="petsc")(random(2, 3), TIMES)


def test_a_backend_that_torch_does_not_know_is_refused() -> None:
    with pytest.raises(
        ConfigurationError, match=r"compile = 'fastest': must be True, False, 'auto' or one of .*inductor"
    ):
        NeuralODE(Network(), compile="fastest")


def test_without_a_compiler_f_is_run_as_it_is_and_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config, cpp_builder

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    cpp_builder.cpp_compiler_search.cache_clear()
    network, u0 = Network(), random(2, 3)
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ compiler was found, f is run as it is"):
        node = NeuralODE(network, step_size=0.25, compile=True)
    assert torch.equal(node(u0, TIMES), NeuralODE(network, step_size=0.25)(u0, TIMES))


def test_torch_s_compiler_is_not_loaded_unless_asked_for() -> None:
    modules = (
        "pnode_dist.nn, pnode_dist.distributed.gradients, pnode_dist.problems.field.problem, pnode_dist.train.loop, "
        "pnode_dist.ode.odeint, pnode_dist.ode.rhs.compiled, pnode_dist.torchdiffeq"
    )
    # Newer releases of torch load torch.export themselves.
    heavy = ("torch.export", "torch._dynamo", "torch._inductor", "sympy")
    script = (
        f"import sys, torch; before = set(sys.modules); import {modules}; "
        f"print([name for name in {heavy} if name in sys.modules and name not in before])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
