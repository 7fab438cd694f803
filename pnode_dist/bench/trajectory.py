"""Costs of storing, recomputing and spilling a trajectory, against the unavoidable work.

On one rank: tapes against back-propagation, recomputation against its own evaluations of f, executed steps against the
published optimum, spilling against memory, and the planner against all of its candidates. On several ranks: one
gradient through a trajectory far larger than its budget.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import comb
from pathlib import Path

import torch
from mpi4py import MPI
from torch import nn

from pnode_dist.bench.gradient import Case, RightHandSide, classical_rk4
from pnode_dist.bench.report import Check, Report, Row, interleaved
from pnode_dist.checkpointing.budget import CheckpointBudget
from pnode_dist.ode.methods import resolve
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.planning import SolveCase, plan_case, seconds_of
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.gray_scott.model import right_hand_side
from pnode_dist.problems.gray_scott.physics import GrayScott, initial_state
from pnode_dist.system.sizes import format_size

GRAPH_OVER_BACKPROP = 1.10
RECOMPUTATION_OVER_WORK = 1.02
SECONDS_PER_STAGE = 20e-6
SPILLED_OVER_MEMORY = 1.05
CHOICE_OVER_FASTEST = 1.10
PREDICTION_ERROR = 0.25
RANDOM_SCHEDULES = 200
LONG_STEPS = 8_000
_REPEATS = 5
_ROUNDS = 3
_SPILLED_STEPS, _SPILLED_SLOTS, _SPILLED_IN_RAM = 48, 24, 4

_STEP = 0.2
_FEW_STEPS = 4
_LONG_NOTES = (
    "One gradient of the Gray-Scott equations, Euler steps, float64, by the parameters and the initial state.",
    "The peak is the largest growth of any rank's resident memory during the solve and its adjoint, few steps "
    f"that of a solve of {_FEW_STEPS} steps. Three staging buffers and the index of the file come on top.",
)

Section = tuple[list[Row], list[Check]]


@dataclass(frozen=True)
class Subject:
    """A right-hand side, an initial state, a method, and the number and size of its steps."""

    name: str
    func: nn.Module
    state: torch.Tensor
    method: str
    steps: int
    size: float

    def case(self, trajectory: CheckpointBudget) -> SolveCase:
        """Return the solve with a budget."""
        solve = NeuralODE(self.func, method=self.method, step_size=self.size, trajectory=trajectory)
        return SolveCase(solve, self.state, [0.0, self.steps * self.size])

    @property
    def evaluations(self) -> int:
        """Number of evaluations of f in all steps."""
        return self.steps * resolve(self.method).evaluations_per_step


def perceptron(steps: int) -> Subject:
    """Return a multilayer perceptron on a batch, float64: a few milliseconds per evaluation."""
    torch.manual_seed(0)
    case = Case(512, 64, 256, steps)
    return Subject(
        "perceptron", RightHandSide(case), torch.randn(512, 64, dtype=torch.float64), "rk4", steps, 1 / steps
    )


def convolutions(points: int, steps: int) -> Subject:
    """Return the neural right-hand side of the Gray-Scott problem: three convolutions with 16 channels, float32."""
    partition = GridPartition(MPI.COMM_SELF, (points, points), 2, ("periodic", "periodic"))
    return Subject(
        f"convolutions {points}x{points}",
        right_hand_side(partition),
        initial_state(partition, 0).float(),
        "rk4",
        steps,
        1.0,
    )


def reaction(points: int, steps: int) -> Subject:
    """Return the exact Gray-Scott equations, float64: a cheap right-hand side with large states."""
    partition = GridPartition(MPI.COMM_SELF, (points, points), 2, ("periodic", "periodic"))
    return Subject(
        f"reaction {points}x{points}", GrayScott(partition), initial_state(partition, 0), "euler", steps, _STEP
    )


def run() -> Report:
    """Measure on one thread per rank. Collective on the world."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if MPI.COMM_WORLD.size > 1:
            return Report("trajectory", *long_trajectory(LONG_STEPS, 256, "128MiB", "256MiB"), _LONG_NOTES)
        sections = [
            graphs(perceptron(20)),
            graphs(convolutions(64, 20)),
            recomputation(perceptron(20), "solution"),
            recomputation(perceptron(20), "stages"),
            recomputation(convolutions(64, 20), "solution"),
            recomputation(convolutions(64, 20), "stages"),
            executed_steps(RANDOM_SCHEDULES),
            spilling(convolutions(128, _SPILLED_STEPS)),
            *planning(),
        ]
    finally:
        torch.set_num_threads(threads)
    rows = [row for found, _ in sections for row in found]
    checks = [check for _, section in sections for check in section]
    checks += planner_checks(rows)
    notes = (
        f"Seconds for one loss and gradient, 1 thread, medians of {_REPEATS} (planner: {_ROUNDS}) interleaved repeats.",
        "graph: over plain torch's back-propagation through the same steps. solution, stages: over the evaluations and "
        f"products that they need, each measured alone, and {1e6 * SECONDS_PER_STAGE:g} microseconds a stage. For "
        "solution, all graphs of a step are there at once: what that costs, measured alone as well, is in the detail.",
        f"spilling: all but {_SPILLED_IN_RAM} of {_SPILLED_SLOTS} checkpoints on disk, over the same in memory.",
        "planner: over the fastest of all candidates, which were all run; predicted is the choice's.",
    )
    return Report("trajectory", rows, checks, notes)


def _row(what: str, subject: str, budget: str, seconds: float, reference: float, detail: str) -> Row:
    ratio = seconds / reference if reference else 0.0
    return {
        "what": what,
        "problem": subject,
        "budget": budget,
        "seconds": seconds,
        "reference": reference,
        "ratio": ratio,
        "detail": detail,
    }


def graphs(subject: Subject) -> Section:
    """Compare storage of every tape with back-propagation through plain torch."""
    case = subject.case(CheckpointBudget(ram="4GiB", keep="graph"))
    inputs = [subject.state.clone().requires_grad_(), *subject.func.parameters()]

    def backprop() -> float:
        began = time.perf_counter()
        end = plain_steps(subject, inputs[0])
        torch.autograd.grad(end.square().sum(), inputs)
        return time.perf_counter() - began

    ours, plain = _medians({"graph": lambda: seconds_of(case, None), "backprop": backprop})
    row = _row("graph", subject.name, "ample", ours, plain, f"{case.solve.last_solve.graph_steps} graphs")
    return [row], [Check(f"graph over back-propagation, {subject.name}", ours / plain, GRAPH_OVER_BACKPROP)]


def plain_steps(subject: Subject, state: torch.Tensor) -> torch.Tensor:
    """Take the steps of a subject in plain torch. Supports only the classical method."""
    assert subject.method == "rk4"
    span = subject.steps * subject.size

    def scaled(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        rate: torch.Tensor = span * subject.func(span * t, u)
        return rate

    return classical_rk4(scaled, state, subject.steps)


def recomputation(subject: Subject, keep: str) -> Section:
    """Compare all states or stages in memory with the evaluations of f and its products measured alone."""
    case = subject.case(CheckpointBudget(ram="4GiB", keep=keep, schedule="all" if keep == "solution" else "auto"))
    count = subject.evaluations
    parameters = list(subject.func.parameters())
    time_zero = torch.zeros((), dtype=subject.state.dtype)

    def evaluated() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            for _ in range(count):
                subject.func(time_zero, subject.state)
        return time.perf_counter() - began

    def recorded() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = subject.state.detach().requires_grad_()
        return leaf, subject.func(time_zero, leaf)

    def reversed_(graph: tuple[torch.Tensor, torch.Tensor]) -> None:
        leaf, out = graph
        torch.autograd.grad(out, [leaf, *parameters], out.detach())

    def differentiated() -> float:
        began = time.perf_counter()
        for _ in range(count):
            reversed_(recorded())
        return time.perf_counter() - began

    def held() -> float:
        began = time.perf_counter()
        for _ in range(subject.steps):
            graphs = [recorded() for _ in range(count // subject.steps)]
            while graphs:
                reversed_(graphs.pop())
        return time.perf_counter() - began

    ours, forward, both, together = _medians(
        {keep: lambda: seconds_of(case, None), "forward": evaluated, "stage by stage": differentiated, "held": held}
    )
    allowed = (forward + both) * RECOMPUTATION_OVER_WORK + SECONDS_PER_STAGE * count
    detail = f"{1e6 * (ours - forward - both) / count:.0f} us a stage"
    if keep == "solution":
        detail += f", {1e6 * (together - both) / count:.0f} for graphs held together"
    row = _row(keep, subject.name, "ample", ours, forward + both, detail)
    return [row], [Check(f"{keep} over its evaluations of f, {subject.name}", ours / allowed, 1.0)]


class Decay(nn.Module):
    """du/dt = -theta u, a right-hand side of minimal cost."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """du/dt."""
        return -self.theta * u


def executed_steps(schedules: int) -> Section:
    """Compare the steps executed by solves under random numbers of slots with the published optimum."""
    generator = random.Random(0)
    wrong = 0
    func, state = Decay(), torch.ones(2, dtype=torch.float64, requires_grad=True)
    began = time.perf_counter()
    for _ in range(schedules):
        steps, ram, disk = generator.randint(2, 60), generator.randint(0, 6), generator.randint(0, 4)
        ram += ram + disk == 0
        trajectory = CheckpointBudget(ram_slots=ram, disk_slots=disk, schedule="multistage")
        solve = NeuralODE(func, method="euler", step_size=1 / steps, trajectory=trajectory)
        solve(state, [0.0, 1.0])[-1].sum().backward()
        executed = solve.last_solve.forward_steps + solve.last_solve.recomputed_steps
        wrong += executed != _published_optimum(steps, min(ram + disk + 1, max(steps - 1, 1)))
    row = _row("steps executed", "decay", "random slots", time.perf_counter() - began, 0.0, f"{schedules} schedules")
    return [row], [
        Check(f"schedules of {schedules} that differ from the published optimum in steps", float(wrong), 0.0)
    ]


def _published_optimum(steps: int, slots: int) -> int:
    """Griewank & Walther, ACM Trans. Math. Softw. 26 (2000), eq. (2), implemented independently of the schedules."""
    r = next(r for r in range(steps) if comb(slots + r, slots) >= steps)
    return (r + 1) * steps - comb(slots + r, r - 1)


def spilling(subject: Subject) -> Section:
    """Compare all but a few checkpoints on disk with the same schedule in memory."""
    numbers = {"memory": (_SPILLED_SLOTS, 0), "disk": (_SPILLED_IN_RAM, _SPILLED_SLOTS - _SPILLED_IN_RAM)}
    cases = {
        name: subject.case(CheckpointBudget(ram_slots=ram, disk_slots=disk, schedule="multistage"))
        for name, (ram, disk) in numbers.items()
    }
    # The first solve of each allocates its slots.
    memory, disk = _medians({name: partial(seconds_of, case, None) for name, case in cases.items()})
    solve = cases["disk"].solve.last_solve
    assert solve.recomputed_steps == cases["memory"].solve.last_solve.recomputed_steps
    detail = f"waited {1e3 * solve.seconds_waiting_for_disk:.1f} ms, {format_size(solve.bytes_written)} written"
    row = _row("spilling", subject.name, f"{_SPILLED_IN_RAM} in memory", disk, memory, detail)
    return [row], [Check(f"spilling over memory, {subject.name}", disk / memory, SPILLED_OVER_MEMORY)]


def planning() -> list[Section]:
    """Compare the planner's choice with every candidate, for budgets from two checkpoints to all tapes."""
    found = []
    for subject, budgets in (
        (perceptron(16), ((2, 0.0, 20), (0, 0.3, 0), (0, 0.6, 0), (0, 1.1, 0))),
        (convolutions(64, 16), ((2, 0.0, 20), (0, 0.3, 0), (0, 0.6, 0), (0, 1.1, 0))),
        (reaction(128, 120), ((3, 0.0, 200), (10, 0.0, 30))),
    ):
        probed = plan_case(subject.case(CheckpointBudget(ram="4GiB")))
        assert probed.costs is not None
        graph, checkpoint = probed.costs.levels["graph"].bytes, probed.slots.checkpoint_bytes
        for slots, share, on_disk in budgets:
            ram = slots * checkpoint + int(share * subject.steps * graph)
            found.append(_planned(subject, CheckpointBudget(ram=ram, disk=on_disk * checkpoint)))
    return found


def _planned(subject: Subject, trajectory: CheckpointBudget) -> Section:
    case = subject.case(trajectory)
    plans = plan_case(case)
    candidates = {f"{number} {plan.name}": plan for number, plan in enumerate(plans.candidates)}
    turns = {name: partial(seconds_of, case, plan) for name, plan in candidates.items()}
    interleaved(turns, 1)
    seconds = {name: statistics.median(values) for name, values in interleaved(turns, _ROUNDS).items()}
    chosen = next(name for name, plan in candidates.items() if plan is plans.chosen)
    budget = f"{format_size(trajectory.ram_bytes)} + {format_size(trajectory.disk_bytes)}"
    predicted = plans.chosen.seconds
    assert predicted is not None
    detail = f"predicted {predicted:.3g} s, {len(candidates)} candidates, {plans.chosen.name}"
    row = _row("planner", subject.name, budget, seconds[chosen], min(seconds.values()), detail)
    row["predicted"] = predicted
    return [row], []


def planner_checks(rows: list[Row]) -> list[Check]:
    """Count the planner's choices that were slow or badly predicted, and remove the predictions from the rows."""
    planned = [row for row in rows if row["what"] == "planner"]
    slow = sum(float(row["ratio"]) > CHOICE_OVER_FASTEST for row in planned)
    wrong = sum(abs(float(row.pop("predicted")) / float(row["seconds"]) - 1) > PREDICTION_ERROR for row in planned)
    most = len(planned) // 10
    return [
        Check(f"choices of {len(planned)} more than 10 % over the fastest candidate", float(slow), float(most)),
        Check(f"predictions of {len(planned)} more than 25 % off", float(wrong), float(most)),
    ]


def long_trajectory(steps: int, points: int, ram: int | str, disk: int | str) -> Section:
    """Measure a gradient through `steps` Euler steps of the Gray-Scott equations. Collective on the world."""
    comm = MPI.COMM_WORLD
    partition = GridPartition(comm, (points, points), 2, ("periodic", "periodic"))
    trajectory = CheckpointBudget(ram=ram, disk=disk)
    func = GrayScott(partition)
    solve = NeuralODE(func, method="euler", step_size=_STEP, partition=partition, trajectory=trajectory)
    state = initial_state(partition, 0).requires_grad_()

    def gradient(steps: int) -> list[torch.Tensor]:
        end: torch.Tensor = solve(state, [0.0, _STEP * steps])[-1]
        return list(torch.autograd.grad(end.square().sum(), [state, *func.parameters()]))

    # The first solve includes one-time loading. The second measures the memory of steps and adjoints alone.
    gradient(_FEW_STEPS)
    before = _resident(reset=True)
    gradient(_FEW_STEPS)
    working_set = comm.allreduce(_resident() - before, MPI.MAX)
    before = _resident(reset=True)
    began = time.perf_counter()
    gradients = gradient(steps)
    seconds = comm.allreduce(time.perf_counter() - began, MPI.MAX)
    peak = comm.allreduce(_resident() - before, MPI.MAX)
    count = solve.last_solve
    finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
    size = partition.local_shape[0] * partition.local_shape[1] * 2 * 8
    waited = comm.allreduce(count.seconds_waiting_for_disk, MPI.MAX)
    assert solve.last_plan is not None
    row: Row = {
        "steps": steps,
        "state": f"{points}x{points}x2",
        "plan": solve.last_plan.name,
        "seconds": seconds,
        "recomputed": count.recomputed_steps,
        "all states": format_size(comm.allreduce(steps * size)),
        "written": format_size(comm.allreduce(count.bytes_written)),
        "read": format_size(comm.allreduce(count.bytes_read)),
        "waited s": waited,
        "peak": format_size(peak),
        "few steps": format_size(working_set),
    }
    allowed = trajectory.ram_bytes + working_set
    return [row], [
        Check("peak memory over budget and what a few steps need", peak / allowed, 1.0),
        Check("gradients that are not finite", float(not finite), 0.0),
    ]


def _resident(reset: bool = False) -> int:
    """Return the peak resident size in bytes. With `reset`, restart the peak from the current size."""
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def _medians(candidates: dict[str, Callable[[], float]]) -> list[float]:
    interleaved(candidates, 1)
    return [statistics.median(values) for values in interleaved(candidates, _REPEATS).values()]
