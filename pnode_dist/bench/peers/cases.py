"""The cases of the comparison: sizes, methods, and seeded arrays.

Imports NumPy alone, because diffrax's process imports it too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Arrays = dict[str, "np.typing.NDArray[Any]"]

OURS, COMPILED, PLAIN, DIFFRAX = "pnode_dist", "pnode_dist compiled", "plain torch", "diffrax"
PYQG = "pyqg-jax"
SOLVERS = (OURS, COMPILED, PLAIN, "torchdiffeq", "torchdiffeq adjoint", "torchode", DIFFRAX, "diffrax backsolve")
LENGTH, VORTICITY = 5e5, 1e-5
"""The side of the turbulent domain in m, and the unit of its state in 1/s."""
RATES = (0.5, 100.0, 1000.0)
"""Rates of the three reactions of the kinetics, per unit of time."""


@dataclass(frozen=True)
class PeerCase:
    """A problem to solve from time 0 to `end`, and to differentiate.

    The loss is the mean square of the final state. `kind` names the right-hand side: `perceptron`, `convolution`,
    `flow` (velocity and the exact trace of its Jacobian), `kinetics` or `turbulence` (two quasi-geostrophic layers, in
    hours, with pyqg's filter after each step). `shape` is that of the state, `hidden` the
    width of the hidden layer. `method` is this project's name of the method; `steps` the number of equal steps, 0 with
    error control at `tolerance`. For implicit methods `tolerance` is that of Newton's method. `checkpoints` limits the
    stored states. `rounds` is the number of interleaved repeats.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    hidden: int
    method: str
    steps: int
    dtype: str
    end: float = 1.0
    tolerance: float = 0.0
    checkpoints: int = 0
    rounds: int = 7

    @property
    def is_implicit(self) -> bool:
        """True if each step solves equations."""
        return self.kind == "kinetics"

    @property
    def size(self) -> float:
        """Size of a step."""
        return self.end / self.steps

    @property
    def title(self) -> str:
        """Describe the case in a line."""
        shape = "x".join(map(str, self.shape))
        steps = f"{self.steps} steps" if self.steps else f"rtol {self.tolerance:g}"
        hidden = f", hidden {self.hidden}" if self.hidden else ""
        kept = f", {self.checkpoints} checkpoints" if self.checkpoints else ""
        return f"{self.kind} {shape}{hidden}, {self.method}, {steps}, {self.dtype}{kept}"


CASES = (
    PeerCase("tiny", "perceptron", (64, 2), 32, "rk4", 100, "float64"),
    PeerCase("tiny float32", "perceptron", (64, 2), 32, "rk4", 100, "float32"),
    PeerCase("medium", "perceptron", (512, 64), 256, "dopri5", 40, "float32", rounds=5),
    PeerCase("convolution", "convolution", (1, 2, 128, 128), 16, "rk4", 20, "float32", rounds=3),
    PeerCase("flow", "flow", (512, 3), 64, "rk4", 40, "float32", rounds=5),
    PeerCase("adaptive", "perceptron", (64, 2), 32, "dopri5", 0, "float64", end=10.0, tolerance=1e-5),
    PeerCase("long", "perceptron", (64, 2), 32, "rk4", 10_000, "float64", end=100.0, checkpoints=20, rounds=1),
    PeerCase("stiff euler", "kinetics", (64, 3), 0, "beuler", 20, "float64", tolerance=1e-10),
    PeerCase("stiff esdirk", "kinetics", (64, 3), 0, "dirk_es324sal", 20, "float64", tolerance=1e-10),
    PeerCase("stiff imex", "kinetics", (64, 3), 0, "arkimex_3", 20, "float64", tolerance=1e-10),
    PeerCase("turbulence", "turbulence", (32, 32, 2), 0, "rk4", 24, "float64", end=96.0),
)


def case_of(name: str) -> PeerCase:
    """Return the case of that name."""
    return next(case for case in CASES if case.name == name)


def solvers_of(case: PeerCase) -> tuple[str, ...]:
    """Return the solvers that can compute a case.

    torchdiffeq and torchode have no implicit Runge-Kutta method with adjoint of these tables; torchode takes batches
    of vectors; pyqg-jax has the equations of `turbulence` alone, whose complex numbers take torch minutes to compile;
    only this project and diffrax limit the number of checkpoints, and the continuous adjoints need none.
    """
    if case.is_implicit:
        return (OURS, COMPILED, DIFFRAX)
    if case.kind == "turbulence":
        return (OURS, PLAIN, PYQG)
    if case.checkpoints:
        return (OURS, COMPILED, PLAIN, "torchdiffeq adjoint", DIFFRAX)
    left_out = set()
    if not case.steps:
        left_out.add(PLAIN)
    if len(case.shape) != 2:
        left_out.add("torchode")
    return tuple(solver for solver in SOLVERS if solver not in left_out)


def arrays_of(case: PeerCase) -> Arrays:
    """Return the initial state `u0` and the parameters by name, from a seed.

    A weight `[out, in, ...]` is normal with a variance of 1 / (entries for each output), a bias is 0.1 times normal.
    """
    random = np.random.default_rng(0)
    dtype = np.dtype(case.dtype)

    def layer(number: int, *shape: int) -> Arrays:
        weight = random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        return {
            f"w{number}": weight.astype(dtype),
            f"b{number}": (0.1 * random.standard_normal(shape[0])).astype(dtype),
        }

    if case.kind == "kinetics":
        state = random.uniform(0.5, 1.0, case.shape) * np.array([1.0, 0.01, 0.1])
        return {"u0": state, "log_rates": np.log(np.array(RATES))}
    state = random.standard_normal(case.shape).astype(dtype)
    if case.kind == "turbulence":
        return {"u0": state}
    if case.kind == "convolution":
        channels = case.shape[1]
        layers = layer(1, case.hidden, channels, 3, 3) | layer(2, case.hidden, case.hidden, 3, 3)
        return {"u0": state, **layers, **layer(3, channels, case.hidden, 3, 3)}
    dimension = case.shape[1] - (case.kind == "flow")
    if case.kind == "flow":
        state[:, -1] = 0.0
    return {"u0": state, **layer(1, case.hidden, dimension), **layer(2, dimension, case.hidden)}
