"""Runs a command of pnode-dist in small: benchmarks with one repeat, few points and steps, some methods of all.

    launch/mpirun.sh -n 2 python tests/in_short.py bench sync

Whether it runs is what is looked at: no figure of time in its table says anything.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pnode_dist import bench
from pnode_dist.cli.main import main
from pnode_dist.verify import methods as method_check


def a_quarter(subject: Callable[..., Any]) -> Callable[..., Any]:
    """A subject with a quarter of the points and steps."""
    return lambda *sizes: subject(*(size // 4 for size in sizes))


SMALL: dict[str, dict[str, Any]] = {
    "fft": {"POINTS": 64, "ROUNDS": 1},
    "halo": {"REPEATS": 1},
    "implicit": {"POINTS": 64, "_SYSTEMS": 8},
    "overhead": {"REPEATS": 1, "STEPS": (5, 10)},
    "precision": {
        "POINTS": 64,
        "REPEATS": 1,
        "PROBLEMS": lambda problems: [replace(problem, steps=4, rounds=1) for problem in problems[:2]],
    },
    "scaling": {"POINTS": 64, "SPECTRAL_POINTS": 32, "ROUNDS": 1, "SMALL": (6,)},
    "semi-implicit": {"_REPEATS": 1, "_BATCHES": 1, "_SPIN_UP": 5.0, "EXPLICIT": ("euler", "rk4")},
    "serve": {"CLIENTS": 2, "REQUESTS": 5, "LAUNCHES": 1},
    "sync": {"_ROUNDS": 1, "SIZES": {1_000: 2, 100_000: 1}},
    "trajectory": {
        "_REPEATS": 1,
        "_ROUNDS": 1,
        "RANDOM_SCHEDULES": 20,
        "LONG_STEPS": 400,
        "perceptron": a_quarter,
        "convolutions": a_quarter,
        "reaction": a_quarter,
    },
}
"""By the benchmark's name, the constants of its module that make it short, and functions that change others of it."""


def shorten(name: str) -> None:
    """Set a benchmark's constants, also where they are the defaults of its functions."""
    module = bench.module(name)
    for constant, value in SMALL[name].items():
        before = getattr(module, constant)
        if callable(value):
            setattr(module, constant, value(before))
            continue
        setattr(module, constant, value)
        for function in vars(module).values():
            if inspect.isfunction(function) and function.__module__ == module.__name__ and function.__defaults__:
                function.__defaults__ = tuple(value if given is before else given for given in function.__defaults__)


if __name__ == "__main__":
    if sys.argv[1] == "bench":
        shorten(sys.argv[2])
    # Of those of --all-methods, some of each family.
    method_check.METHODS = dict(list(method_check.METHODS.items())[::5])
    sys.exit(main(sys.argv[1:]))
