"""Overhead of a solver per stage, beyond the evaluations of f and their derivatives, on small states.

Compares RK4 with fixed steps, forward and adjoint, with torchdiffeq and torchode. The time per stage is the slope of
the solve time between two numbers of steps. The intercept is the fixed time of a solve. The overhead is the time per
stage less the unavoidable work: evaluations of f, with or without their tapes, and one `torch.autograd.grad` for each.
That work is measured alone in loops as long as the solves.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from mpi4py import MPI
from torch import nn

from pnode_dist.bench.gradient import Case, RightHandSide
from pnode_dist.bench.report import Check, Report, Row
from pnode_dist.bench.torchode_classical import classical
from pnode_dist.checkpointing.budget import CheckpointBudget
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.odeint import NeuralODE

FORWARD_MICROSECONDS = 5.0
ADJOINT_MICROSECONDS = 15.0
STAGES = 4
STEPS = (20, 100)
REPEATS = 11
STEP_SIZE = 2.0**-10
_BATCH = 16

Turn = tuple[float, float]
"""Processor seconds of a forward and of a backward pass. Processor time excludes other programs."""


@dataclass(frozen=True)
class Subject:
    """A right-hand side and the initial state `[batch, dimension]` of its solves."""

    name: str
    func: nn.Module
    state: torch.Tensor

    @property
    def wanted(self) -> list[torch.Tensor]:
        """Tensors that gradients are taken with respect to."""
        return [self.state, *self.func.parameters()]


class Decay(nn.Module):
    """du/dt = -theta u: two operations."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """du/dt."""
        return -self.theta * u


def subjects() -> list[Subject]:
    """Return the cheapest right-hand side, and a small perceptron with four parameters."""
    torch.manual_seed(0)
    state = torch.randn(_BATCH, 2, dtype=torch.float64, requires_grad=True)
    return [
        Subject(f"decay, {_BATCH}x2", Decay(), state),
        Subject(f"perceptron, {_BATCH}x2x16", RightHandSide(Case(_BATCH, 2, 16, 0)), state),
    ]


@dataclass(frozen=True)
class Variant:
    """One solver: `solve(steps)` returns the final state.

    `graphs` is true if the forward pass records the tape of f. `backward` is the work on f per stage of the backward
    pass: none without a backward pass, a product with the stored tape, or an evaluation and a product.
    """

    solver: str
    keeps: str
    solve: Callable[[int], torch.Tensor]
    graphs: bool
    backward: Literal["none", "product", "evaluation and product"]

    def turn(self, subject: Subject, steps: int) -> Turn:
        """Return the seconds of one solve and of its backward pass."""
        with torch.set_grad_enabled(self.backward != "none"):
            began = time.process_time()
            end = self.solve(steps)
            forward = time.process_time() - began
            if self.backward == "none":
                return forward, 0.0
            loss = end.sum()
        began = time.process_time()
        torch.autograd.grad(loss, subject.wanted)
        return forward, time.process_time() - began


def variants(subject: Subject, odeint: Any, odeint_adjoint: Any) -> list[Variant]:
    """Return the solvers of this project, of torchdiffeq, and of torchode if it is installed."""
    func, state = subject.func, subject.state
    options = {"step_size": STEP_SIZE}

    def ours(**keywords: Any) -> Callable[[int], torch.Tensor]:
        node = NeuralODE(func, method="rk4", step_size=STEP_SIZE, trajectory=CheckpointBudget(ram="1GiB", **keywords))
        return lambda steps: node(state, _times(steps))[-1]

    def theirs(odeint: Any) -> Callable[[int], torch.Tensor]:
        return lambda steps: odeint(func, state, _times(steps), method="rk4", options=options)[-1]

    found = [
        Variant("pnode_dist", "nothing", ours(), False, "none"),
        Variant("pnode_dist", "graph", ours(keep="graph"), True, "product"),
        Variant("pnode_dist", "stages", ours(keep="stages", schedule="all"), False, "evaluation and product"),
        Variant("pnode_dist", "solution", ours(keep="solution", schedule="all"), False, "evaluation and product"),
        Variant("torchdiffeq", "nothing", theirs(odeint), False, "none"),
        Variant("torchdiffeq", "graph", theirs(odeint), True, "product"),
        Variant("torchdiffeq", "nothing (adjoint)", theirs(odeint_adjoint), False, "evaluation and product"),
    ]
    if importlib.util.find_spec("torchode") is not None:
        solve = _torchode(subject)
        found += [
            Variant("torchode", "nothing", solve, False, "none"),
            Variant("torchode", "graph", solve, True, "product"),
        ]
    return found


def _times(steps: int) -> torch.Tensor:
    return torch.tensor([0.0, steps * STEP_SIZE], dtype=torch.float64)


def _torchode(subject: Subject) -> Callable[[int], torch.Tensor]:
    """Return the solve of torchode by the classical method."""
    import torchode

    term = torchode.ODETerm(subject.func, with_stats=False)
    solver = torchode.AutoDiffAdjoint(classical(term), torchode.FixedStepController())
    batch = len(subject.state)
    start, size = torch.zeros(batch, dtype=torch.float64), torch.full((batch,), STEP_SIZE, dtype=torch.float64)

    def solve(steps: int) -> torch.Tensor:
        problem = torchode.InitialValueProblem(subject.state, start, start + steps * STEP_SIZE)
        end: torch.Tensor = solver.solve(problem, dt0=size).ys[:, -1]
        return end

    return solve


def work(subject: Subject) -> dict[str, Callable[[int], Turn]]:
    """Unavoidable work of any solver against the number of steps, forward and backward.

    evaluation: f without gradients. product: f with its tape in the forward pass, all tapes kept, and one autograd.grad
    for each in the backward pass. evaluation and product: both, one stage after the other, as the backward time.
    """
    func, wanted = subject.func, subject.wanted
    parameters = wanted[1:]
    time_zero, state = torch.zeros((), dtype=torch.float64), subject.state.detach()
    cotangent = torch.ones_like(state)

    def evaluations(steps: int) -> Turn:
        began = time.process_time()
        with torch.no_grad():
            for _ in range(STAGES * steps):
                func(time_zero, state)
        return time.process_time() - began, 0.0

    def recorded() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = state.detach().requires_grad_()
        return leaf, func(time_zero, leaf)

    def kept(steps: int) -> Turn:
        began = time.process_time()
        graphs = [recorded() for _ in range(STAGES * steps)]
        forward = time.process_time() - began
        began = time.process_time()
        while graphs:
            leaf, out = graphs.pop()
            torch.autograd.grad(out, [leaf, *parameters], cotangent)
        return forward, time.process_time() - began

    def stage_by_stage(steps: int) -> Turn:
        began = time.process_time()
        for _ in range(STAGES * steps):
            leaf, out = recorded()
            torch.autograd.grad(out, [leaf, *parameters], cotangent)
        return 0.0, time.process_time() - began

    return {"evaluation": evaluations, "product": kept, "evaluation and product": stage_by_stage}


@dataclass(frozen=True)
class Line:
    """Microseconds per stage, and of a solve besides its stages, forward and backward."""

    stage: Turn
    solve: Turn


def line(least: Mapping[int, Turn]) -> Line:
    """Return the straight line through the seconds for two numbers of steps."""
    (few, low), (many, high) = sorted(least.items())
    slopes = [(b - a) / (many - few) for a, b in zip(low, high, strict=True)]
    rests = [a - few * slope for a, slope in zip(low, slopes, strict=True)]
    return Line(
        (1e6 * slopes[0] / STAGES, 1e6 * slopes[1] / STAGES),
        (1e6 * rests[0], 1e6 * rests[1]),
    )


def measure(
    turns: Mapping[str, Callable[[int], Turn]], steps: tuple[int, int] = STEPS, repeats: int = REPEATS
) -> dict[str, Line]:
    """Measure the line of each candidate, through the least seconds of interleaved repeats.

    Other load on the machine can only increase a time, so the least is closest to the program's own.
    """
    least: dict[str, dict[int, Turn]] = {name: {n: (float("inf"), float("inf")) for n in steps} for name in turns}
    for repeat in range(repeats + 1):
        for name, turn in turns.items():
            for n in steps:
                forward, backward = turn(n)
                if repeat > 0:
                    known = least[name][n]
                    least[name][n] = (min(known[0], forward), min(known[1], backward))
    return {name: line(values) for name, values in least.items()}


def row(subject: Subject, variant: Variant, found: Line, alone: Mapping[str, Line]) -> Row:
    """Return a solver's microseconds per stage, and the remainder without the work on f."""
    of_f = alone["product"].stage[0] if variant.graphs else alone["evaluation"].stage[0]
    result: Row = {
        "problem": subject.name,
        "solver": variant.solver,
        "keeps": variant.keeps,
        "forward": found.stage[0],
        "f": of_f,
        "overhead": found.stage[0] - of_f,
    }
    if variant.backward == "none":
        nothing = float("nan")
        result |= {"adjoint": nothing, "f, grad": nothing, "adjoint overhead": nothing}
    else:
        of_grad = alone[variant.backward].stage[1]
        result |= {"adjoint": found.stage[1], "f, grad": of_grad, "adjoint overhead": found.stage[1] - of_grad}
    result["a solve"] = sum(found.solve)
    return result


def checks(rows: list[Row]) -> list[Check]:
    """Check this project's overheads against their targets."""
    found = []
    for entry in rows:
        if entry["solver"] != "pnode_dist":
            continue
        name = f"{entry['problem']}, keeping {entry['keeps']}"
        found.append(Check(f"microseconds a stage forward, {name}", float(entry["overhead"]), FORWARD_MICROSECONDS))
        if entry["keeps"] != "nothing":
            backward = float(entry["adjoint overhead"])
            found.append(Check(f"microseconds a stage in the adjoint, {name}", backward, ADJOINT_MICROSECONDS))
    return found


def run() -> Report:
    """Measure on one thread of one rank."""
    if MPI.COMM_WORLD.size > 1:
        raise ConfigurationError(f"bench overhead runs on 1 rank, not on {MPI.COMM_WORLD.size}")
    try:
        import torchdiffeq
    except ImportError:
        raise ConfigurationError("bench overhead compares with torchdiffeq, which is not installed") from None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[Row] = []
    try:
        for subject in subjects():
            candidates = variants(subject, torchdiffeq.odeint, torchdiffeq.odeint_adjoint)
            turns: dict[str, Callable[[int], Turn]] = dict(work(subject))
            turns |= {str(n): _turn(variant, subject) for n, variant in enumerate(candidates)}
            found = measure(turns)
            rows += [row(subject, variant, found[str(n)], found) for n, variant in enumerate(candidates)]
    finally:
        torch.set_num_threads(threads)
    notes = [
        "Microseconds by the stage, RK4, float64, 1 thread: the slope between solves of "
        f"{STEPS[0]} and {STEPS[1]} steps, least of {REPEATS} interleaved repeats; a solve: what it takes besides.",
        "f: evaluations alone, with graphs where they are kept. f, grad: one torch.autograd.grad a stage, and "
        "where no graph is kept an evaluation with graph as well. overhead: what is left.",
        "torchdiffeq's rk4 is Kutta's 3/8 rule, with as many stages; torchode got the table of the classical method.",
    ]
    if importlib.util.find_spec("torchode") is None:
        notes.append("torchode is not installed.")
    return Report("overhead", rows, checks(rows), notes)


def _turn(variant: Variant, subject: Subject) -> Callable[[int], Turn]:
    return lambda steps: variant.turn(subject, steps)
