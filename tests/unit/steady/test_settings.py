"""Wrong settings of a steady state are one clear line."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest
import torch

from pnode_dist import ConfigurationError, steady_state
from pnode_dist.steady import SteadySettings, find

D = torch.float64


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"solver": "newton"}, "solver = 'newton': must be one of newtonls, newtontr, pseudo"),
        ({"rtol": -1.0}, "rtol = -1.0: must be a number of at least 0"),
        ({"atol": float("nan")}, "atol = nan: must be a number of at least 0"),
        ({"stol": "small"}, "stol = 'small': must be a number of at least 0"),
        ({"t": float("inf")}, "t = inf: must be a number"),
        ({"max_it": 0}, "max_it = 0: must be a whole number of at least 1, or None"),
        ({"max_it": 2.5}, "max_it = 2.5: must be a whole number of at least 1, or None"),
        ({"step_size": 0.1}, "step_size = 0.1: solver = 'newtonls' takes no steps of time"),
        ({"step_size": 0.0, "solver": "pseudo"}, "step_size = 0.0: must be above 0"),
        ({"stol": 1e-9, "solver": "pseudo"}, "stol = 1e-09: solver = 'pseudo' has no such test: use rtol or atol"),
        ({"deflate": torch.ones(2, dtype=D), "solver": "pseudo"}, "deflate: solver = 'pseudo' would follow the same"),
        ({"deflate": torch.zeros(2, dtype=D)}, r"deflate\[0\]: is u0 itself"),
        ({"deflate": (torch.ones(2, dtype=D), 3.0)}, r"deflate\[1\]: has float: must be a state like u0, \(2,\)"),
        ({"deflate": 3.0}, "deflate = 3.0: must be a state like u0, or a sequence of such states"),
        ({"phase": torch.ones(3, dtype=D)}, r"phase\[0\]: has \(3,\): must be a state like u0, \(2,\)"),
        ({"phase": torch.zeros(2, dtype=D)}, r"phase\[0\]: must be finite, not zero"),
        ({"phase": (torch.ones(2, dtype=D),) * 2}, r"phase\[1\]: .*no combination of the vectors before it"),
        ({"preconditioner": "lu"}, "preconditioner = 'lu': must be one of none, block, assembled"),
        ({"preconditioner": "assembled"}, "preconditioner = 'assembled': needs a state that is one tensor"),
        ({"partition": 3}, "partition = 3: must be a partition of pnode_dist, or None"),
        ({"options": {"snes_rtol": 1e-3}}, "options: 'snes_rtol': is an argument of its own: rtol="),
        ({"options": {"snes_type": "ngmres"}}, "options: 'snes_type': is an argument of its own: solver="),
        ({"options": {"ts_dt": 1}, "solver": "pseudo"}, "options: 'ts_dt': is an argument of its own: step_size="),
        ({"options": {"ksp_rtoll": 1e-3}}, "options: 'ksp_rtoll': nothing reads it: did you mean ksp_rtol?"),
        ({"options": {"nonsense": 1}}, "options: 'nonsense': nothing reads it"),
        ({"t": torch.tensor(0.0, requires_grad=True)}, "t: requires a gradient, which is not available"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_wrong_setting_is_one_line(wrong: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigurationError, match=line) as error:
        steady_state(lambda t, u: 1 - u, torch.zeros(2, dtype=D), **wrong)
    assert "\n" not in str(error.value)


def test_the_keywords_of_steady_state_are_the_fields_of_its_settings() -> None:
    keywords = {
        name: parameter.default
        for name, parameter in inspect.signature(steady_state).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "args"
    }
    assert keywords == {field.name: field.default for field in fields(SteadySettings)}


def test_settings_that_are_no_settings_and_functions_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"settings = \{\}: must be a pnode_dist.steady.SteadySettings"):
        find(lambda t, u: 1 - u, torch.zeros(2, dtype=D), {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="func must be callable"):
        steady_state(3, torch.zeros(2, dtype=D))  # type: ignore[arg-type]


def test_options_reach_petsc_s_solvers() -> None:
    settings = SteadySettings(options={"ksp_type": "preonly", "pc_type": "none"}, max_it=3)
    assert find(lambda t, u: 1 - u, torch.zeros(2, dtype=D), settings).iterations == 1
