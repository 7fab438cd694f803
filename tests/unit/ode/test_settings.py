"""The settings of a solve: one list of names, as keywords, as an object, and as attributes of a module."""

from __future__ import annotations

import inspect
import io
import pydoc
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from pnode_dist import ConfigurationError, NeuralODE, SolverSettings, Trajectory, odeint
from pnode_dist.ode.settings import KEYWORDS, SolverKeywords
from tests.conftest import ROOT
from tests.oracles.right_hand_sides import Network, random

U0 = random(2, 3)
TIMES = [0.0, 0.4, 1.0]


def test_the_keywords_of_type_checkers_are_the_fields_of_the_settings() -> None:
    assert get_type_hints(SolverKeywords) == get_type_hints(SolverSettings)
    assert not SolverKeywords.__required_keys__


@pytest.mark.parametrize("function", [odeint, NeuralODE, NeuralODE.__init__], ids=["odeint", "NeuralODE", "__init__"])
def test_the_signature_lists_every_keyword_with_its_default(function: Any) -> None:
    parameters = inspect.signature(function).parameters
    defaults = {field.name: field.default for field in fields(SolverSettings)}
    assert {name: parameters[name].default for name in KEYWORDS} == defaults
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in KEYWORDS)
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


def test_help_of_odeint_documents_every_keyword() -> None:
    shown = pydoc.plain(pydoc.render_doc(odeint))
    assert all(f"{name}:" in shown.split("\n\n")[1] for name in KEYWORDS)
    assert [name for name in KEYWORDS if f"`{name}`" not in shown] == []


def test_every_setting_has_a_docstring() -> None:
    # mkdocstrings shows it below the name.
    source = inspect.getsource(SolverSettings)
    for name in KEYWORDS:
        definition = source.index(f"\n    {name}: ")
        assert source[source.index("\n", definition + 1) + 1 :].startswith('    """'), name


def test_an_object_of_settings_is_the_same_as_its_keywords() -> None:
    settings = SolverSettings(method="bosh3", step_size=0.1)
    network = Network()
    wanted = odeint(network, U0, TIMES, method="bosh3", step_size=0.1)
    assert torch.equal(odeint(network, U0, TIMES, settings), wanted)
    assert torch.equal(NeuralODE(network, settings)(U0, TIMES), wanted)
    assert not torch.equal(odeint(network, U0, TIMES), wanted)


def test_a_keyword_takes_precedence_over_the_object_beside_it() -> None:
    settings = SolverSettings(method="bosh3", step_size=0.1)
    network = Network()
    wanted = odeint(network, U0, TIMES, method="bosh3", step_size=0.05)
    assert torch.equal(odeint(network, U0, TIMES, settings, step_size=0.05), wanted)
    node = NeuralODE(network, settings, step_size=0.05)
    assert (node.settings.step_size, settings.step_size) == (0.05, 0.1)
    assert torch.equal(node(U0, TIMES), wanted)


@pytest.mark.parametrize("name", KEYWORDS)
def test_an_attribute_of_a_module_is_a_field_of_its_settings(name: str) -> None:
    node = NeuralODE(Network())
    before, marker = node.settings, object()
    assert getattr(node, name) is getattr(before, name)
    setattr(node, name, marker)
    assert getattr(node, name) is getattr(node.settings, name) is marker
    assert getattr(before, name) is not marker
    assert name not in vars(node)
    node.settings = before
    assert getattr(node, name) is getattr(before, name)
    assert dir(node).count(name) == 1


def test_settings_cannot_be_changed_in_place() -> None:
    settings = SolverSettings()
    with pytest.raises(FrozenInstanceError):
        settings.method = "euler"  # type: ignore[misc]
    assert replace(settings, method="euler").method == "euler"


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("stepsize", r"did you mean step_size\?"),
        ("budget", "must be one of method, step_size, .*preserve_rng_state, .*"),
        ("dtype", r"did you mean state_dtype\?"),
        ("events", r"pnode_dist\.solve_events\(func, u0, t, events\) solves with events"),
    ],
)
@pytest.mark.parametrize("call", ["odeint", "NeuralODE"])
def test_an_unknown_keyword_is_refused_with_the_likely_one(call: str, name: str, advice: str) -> None:
    arguments: Any = (Network(), U0, TIMES) if call == "odeint" else (Network(),)
    with pytest.raises(TypeError, match=rf"^{call}\(\) got an unexpected keyword argument '{name}': {advice}$"):
        {"odeint": odeint, "NeuralODE": NeuralODE}[call](*arguments, **{name: 0.1})


def test_settings_of_another_type_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"settings = 'rk4': must be a pnode_dist.SolverSettings, or None"):
        odeint(Network(), U0, TIMES, "rk4")  # type: ignore[call-overload]
    with pytest.raises(ConfigurationError, match=r"settings = \{'method': 'rk4'\}: must be a pnode_dist"):
        NeuralODE(Network(), {"method": "rk4"})  # type: ignore[arg-type]
    node = NeuralODE(Network())
    with pytest.raises(ConfigurationError, match="settings = 'rk4': must be a pnode_dist"):
        node.settings = "rk4"


def test_a_module_saved_whole_has_its_settings_again() -> None:
    node = NeuralODE(Network(), SolverSettings(step_size=0.1), trajectory=Trajectory(ram_slots=2))
    wanted, file = node(U0, TIMES), io.BytesIO()
    torch.save(node, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert vars(loaded.settings) == vars(node.settings)
    assert torch.equal(loaded(U0, TIMES), wanted)


def test_an_attribute_that_no_module_has_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'NeuralODE' object has no attribute 'stepsize'"):
        NeuralODE(Network()).stepsize  # noqa: B018


@pytest.mark.nightly
def test_a_type_checker_finds_wrong_names_and_types_of_keywords(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import torch\n"
        "from pnode_dist import NeuralODE, odeint\n"
        "u0, func = torch.ones(1), torch.nn.Identity()\n"
        "reveal_type(odeint(func, u0, [0.0, 1.0], method='rk4', step_size=0.1))\n"
        "odeint(func, u0, [0.0, 1.0], stepsize=0.1)\n"
        "NeuralODE(func, step_size='0.1')\n"
        "NeuralODE(func, rtol=1e-3, compile=True)\n"
    )
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(program)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    lines = re.findall(r"program\.py:(\d+): (note: Revealed|error: .*)", run.stdout)
    found = {number: " ".join(text for other, text in lines if other == number) for number, _ in lines}
    assert found.keys() == {"4", "5", "6"}
    assert "note: Revealed" in found["4"]
    assert "stepsize" in found["5"]
    assert '"step_size"' in found["6"]
