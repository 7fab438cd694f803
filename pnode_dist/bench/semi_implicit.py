"""Semi-implicit against explicit steps for the Kuramoto-Sivashinsky equation on 512 points.

Bisection finds the largest stable step of each method. Comparison with the integrator of the data gives its error. Both
use the equation itself. A training epoch is that of the problem `kuramoto_sivashinsky`: loss and gradient of its model,
over the same batches of windows for every method.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from mpi4py import MPI

from pnode_dist.bench.report import Check, Report, Row, interleaved
from pnode_dist.checkpointing.budget import CheckpointBudget
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.methods import Method, resolve
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.rhs.split import SplitFunction
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.common.forecast_data import Samples, Windows, windows
from pnode_dist.problems.semilinear.config import LineEquation, SemilinearModelConfig
from pnode_dist.problems.semilinear.data import reference
from pnode_dist.problems.semilinear.equation import Convection, initial_state, linear_stencil
from pnode_dist.problems.semilinear.model import learnt_convection
from pnode_dist.problems.semilinear.periodic_line import line, operator, shortest_wave
from pnode_dist.problems.semilinear.stable_step import STEPS, largest_stable_step

SEMI_IMPLICIT, STEP = ("arkimex_3", "arkimex_4"), 0.2
EXPLICIT = ("euler", "heun", "rk3", "bosh3", "rk4", "fehlberg5", "dopri5")
LARGEST_STEP_RATIO = 0.1
LARGEST_TIME_RATIO = 1.0
LARGEST_ERROR_RATIO = 2.0
KURAMOTO_SIVASHINSKY = LineEquation("Kuramoto-Sivashinsky", 176.0, -1.0, -1.0, 28)
_POINTS, _SPIN_UP = 512, 50.0
_BATCH, _BATCHES = 8, 2
_REPEATS = 3
_KEEPS = ("graph", "solution")
_OPTIONS = {"snes_type": "ksponly", "ksp_type": "preonly", "pc_type": "lu"}


@dataclass(frozen=True)
class Subject:
    """The equation on a line, samples of a trajectory, and a network for its convection.

    The samples are one time unit apart, in units of `scale`.
    """

    equation: LineEquation
    partition: GridPartition
    data: Samples
    scale: float
    network: torch.nn.Module

    def function(self, term: torch.nn.Module, samples: int) -> SplitFunction:
        """Return the linear part and `term` as a split function of `samples` states."""
        stencil = linear_stencil(self.equation, self.partition.shape[0])
        return SplitFunction(implicit=operator(self.partition, stencil, samples), explicit=term)

    @property
    def convection(self) -> torch.nn.Module:
        """Exact convection term of the equation."""
        return Convection(self.partition, self.equation.length, self.scale)

    def batches(self, dtype: torch.dtype) -> list[Windows]:
        """Return all windows of one time unit, in batches."""
        starts = self.data.starts(1)
        return [windows(self.data, starts[at : at + _BATCH], 1, dtype) for at in range(0, len(starts), _BATCH)]


@dataclass(frozen=True)
class Measured:
    """Steps of a method: evaluations of the explicit term per time unit, and relative error after one time unit."""

    method: Method
    step: float
    evaluations: float
    error: float


def subject(equation: LineEquation = KURAMOTO_SIVASHINSKY, points: int = _POINTS, spin_up: float = _SPIN_UP) -> Subject:
    """Return a trajectory from a developed state, and the untrained network in float32. Not collective."""
    partition = line(MPI.COMM_SELF, points)
    initial = torch.from_numpy(initial_state(equation, points, 0))
    samples = reference(equation, initial, _BATCH * _BATCHES + 1, 1.0, spin_up)
    scale = float(samples.square().mean().sqrt())
    data = Samples(partition, samples[None, :, :, None] / scale, torch.arange(len(samples), dtype=torch.float64))
    network = learnt_convection(partition, equation.length, scale, SemilinearModelConfig())
    return Subject(equation, partition, data, scale, network)


def run() -> Report:
    """Measure on one thread of one rank."""
    if MPI.COMM_WORLD.size > 1:
        raise ConfigurationError(f"bench semi-implicit runs on 1 rank, not on {MPI.COMM_WORLD.size}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        chosen = subject()
        semi_implicit = [measure(chosen, name, STEP) for name in SEMI_IMPLICIT]
        explicit = [measure(chosen, name) for name in EXPLICIT]
        rival = best(explicit, semi_implicit[0].error)
        seconds = epochs(chosen, [*semi_implicit, rival])
    finally:
        torch.set_num_threads(threads)
    rows = [_row(measured, seconds) for measured in (*semi_implicit, *explicit)]
    notes = (
        f"The equation on {_POINTS} points of a line of length {KURAMOTO_SIVASHINSKY.length:g}, 1 thread. step: "
        f"of explicit methods the largest that is stable, by bisection: {STEPS} of them do not double a perturbation.",
        "evaluations: of the explicit term in one time unit. error: relative, after one time unit, with the equation's "
        f"own term, against the data's integrator; over {_BATCH} states.",
        f"epoch: seconds for loss and gradient of {_BATCHES} batches of {_BATCH} windows of one time unit with the "
        f"problem's network in float32, median of {_REPEATS}, with graphs kept or steps run again, whichever was "
        "faster in a first turn. The best explicit method is the one with the fewest "
        f"evaluations of those no less exact than {SEMI_IMPLICIT[0]}; {SEMI_IMPLICIT[1]} is about as exact as it.",
    )
    return Report("semi-implicit", rows, checks(semi_implicit, explicit, rival, seconds), notes)


def measure(subject: Subject, name: str, step: float | None = None) -> Measured:
    """Measure the cost and the error of steps of this size, by default the largest stable size."""
    method = resolve(name)
    batch = subject.batches(torch.float64)[0]
    if step is None:
        pair = subject.function(subject.convection, 2)
        guess = -1 / shortest_wave(linear_stencil(subject.equation, subject.partition.shape[0]))
        step = largest_stable_step(pair, batch.initial[:1], name, subject.partition, guess)
    func = subject.function(subject.convection, len(batch.starts))
    solve = NeuralODE(func, method=name, step_size=step, partition=subject.partition, options=_options(method))
    with torch.no_grad():
        difference = solve(batch.initial, [0.0, 1.0])[1:] - batch.targets
    error = float(difference.norm() / batch.targets.norm())
    per_step = method.stages if method.implicit else method.evaluations_per_step
    return Measured(method, step, per_step / step, error)


def _options(method: Method) -> dict[str, str]:
    return _OPTIONS if method.implicit else {}


def best(explicit: Sequence[Measured], error: float) -> Measured:
    """Return the method with the fewest evaluations per time unit among those with at most `error`.

    Chooses among all methods if none is accurate enough.
    """
    exact = [measured for measured in explicit if measured.error <= error]
    return min(exact or explicit, key=lambda measured: measured.evaluations)


def epochs(subject: Subject, methods: Sequence[Measured]) -> dict[str, float]:
    """Measure the seconds of an epoch with each method: loss and gradient of every batch in sequence.

    An unmeasured first round decides for each method if tapes are kept or steps recomputed, by the shorter time.
    """
    parameters = list(subject.network.parameters())
    batches = subject.batches(torch.float32)
    func = subject.function(subject.network, _BATCH)

    def epoch(solve: NeuralODE) -> float:
        began = time.perf_counter()
        for batch in batches:
            loss = (solve(batch.initial, [0.0, 1.0])[1:] - batch.targets).square().mean()
            torch.autograd.grad(loss, parameters)
        return time.perf_counter() - began

    def solve(measured: Measured, keep: str) -> NeuralODE:
        return NeuralODE(
            func,
            method=measured.method.name,
            step_size=measured.step,
            partition=subject.partition,
            trajectory=CheckpointBudget(ram="1GiB", keep=keep),
            options=_options(measured.method),
        )

    ways = {
        measured.method.name: {keep: partial(epoch, solve(measured, keep)) for keep in _KEEPS} for measured in methods
    }
    first = {name: interleaved(both, 1) for name, both in ways.items()}
    faster = {name: ways[name][min(_KEEPS, key=lambda keep: first[name][keep])] for name in ways}
    return {name: statistics.median(values) for name, values in interleaved(faster, _REPEATS).items()}


def checks(
    semi_implicit: Sequence[Measured], explicit: Sequence[Measured], rival: Measured, seconds: dict[str, float]
) -> list[Check]:
    """Check steps, epochs and errors against the explicit methods.

    Steps are compared with the largest explicit step, epochs with the epoch of `rival`, and the error of the most
    accurate semi-implicit method with the error of `rival`.
    """
    largest = max(measured.step for measured in explicit)
    name = rival.method.name
    exact = min(semi_implicit, key=lambda measured: measured.error)
    return [
        Check("largest stable explicit step over the semi-implicit one", largest / STEP, LARGEST_STEP_RATIO),
        *(
            Check(f"epoch of {own} over that of {name}", seconds[own] / seconds[name], LARGEST_TIME_RATIO)
            for own in (measured.method.name for measured in semi_implicit)
        ),
        Check(f"error of {exact.method.name} over that of {name}", exact.error / rival.error, LARGEST_ERROR_RATIO),
    ]


def _row(measured: Measured, seconds: dict[str, float]) -> Row:
    timed = seconds.get(measured.method.name)
    return {
        "method": measured.method.name,
        "order": measured.method.order,
        "step": measured.step,
        "evaluations": measured.evaluations,
        "error": measured.error,
        "epoch": "not timed" if timed is None else timed,
    }
