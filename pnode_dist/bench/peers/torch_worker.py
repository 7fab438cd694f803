"""The solvers that are written in torch: `python -m pnode_dist.bench.peers.torch_worker CASE SOLVER CORE`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from mpi4py import MPI
from torch import nn

from pnode_dist.bench.gradient import classical_rk4
from pnode_dist.bench.peers.cases import LENGTH, VORTICITY, Arrays, PeerCase, arrays_of, case_of, solvers_of
from pnode_dist.bench.peers.serving import Solved, serve
from pnode_dist.bench.torchode_classical import classical
from pnode_dist.checkpointing.budget import CheckpointBudget
from pnode_dist.ode.odeint import NeuralODE
from pnode_dist.ode.rhs.split import SplitFunction
from pnode_dist.partition.grid import GridPartition
from pnode_dist.problems.qg.config import QGParameters
from pnode_dist.problems.qg.physics import QGTendency, SmallScaleFilter

Solve = Callable[[nn.Module, torch.Tensor], torch.Tensor]

_DOPRI5 = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""Dormand and Prince's coefficients; the last row are the weights."""


class Perceptron(nn.Module):
    """W2 tanh(W1 u + b1) + b2."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        self.layers = nn.Sequential(_filled(nn.Linear, arrays, 1), nn.Tanh(), _filled(nn.Linear, arrays, 2))

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """du/dt."""
        result: torch.Tensor = self.layers(u)
        return result


class Convolution(nn.Module):
    """Three convolutions with tanh between them, zero padding."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        layers: list[nn.Module] = [_filled(nn.Conv2d, arrays, number) for number in (1, 2, 3)]
        self.layers = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """du/dt."""
        result: torch.Tensor = self.layers(u)
        return result


class Flow(Perceptron):
    """A velocity, and minus the trace of its Jacobian by one vjp for each dimension."""

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """du/dt."""
        with torch.enable_grad():
            x = u[:, :-1]
            if not x.requires_grad:
                x = x.detach().requires_grad_()
            velocity: torch.Tensor = self.layers(x)
            trace = torch.zeros_like(x[:, 0])
            for number in range(x.shape[1]):
                (row,) = torch.autograd.grad(velocity[:, number].sum(), x, create_graph=True)
                trace = trace + row[:, number]
        return torch.cat([velocity, -trace[:, None]], dim=1)


class Kinetics(nn.Module):
    """A -> B, B + C -> A + C, 2 B -> B + C, in each of the systems `[system, 3]`."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        self.log_rates = nn.Parameter(torch.from_numpy(arrays["log_rates"]))

    def slow(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """The first reaction."""
        rate = self.log_rates[0].exp() * u[:, 0]
        return torch.stack([-rate, rate, torch.zeros_like(rate)], dim=1)

    def fast(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """The other two."""
        back = self.log_rates[1].exp() * u[:, 1] * u[:, 2]
        on = self.log_rates[2].exp() * u[:, 1].square()
        return torch.stack([back, -back - on, on], dim=1)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """All three reactions."""
        return self.slow(t, u) + self.fast(t, u)


class Turbulence(nn.Module):
    """Two quasi-geostrophic layers in units of `VORTICITY` and hours, and the filter between the steps."""

    def __init__(self, arrays: Arrays) -> None:
        super().__init__()
        ny, nx, layers = arrays["u0"].shape
        grid = GridPartition(MPI.COMM_SELF, (ny, nx), layers, "periodic", 0)
        parameters = QGParameters(L=LENGTH)
        self.equations, self.small_scales = QGTendency(grid, parameters), SmallScaleFilter(grid, parameters)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """du/dt."""
        rate: torch.Tensor = self.equations(t, u * VORTICITY)
        return rate * (3600 / VORTICITY)


FUNCTIONS: dict[str, type[nn.Module]] = {
    "perceptron": Perceptron,
    "convolution": Convolution,
    "flow": Flow,
    "kinetics": Kinetics,
    "turbulence": Turbulence,
}


def _filled(kind: Any, arrays: Arrays, number: int) -> nn.Module:
    """Return a linear or convolutional layer with the arrays of that number."""
    weight, bias = (torch.from_numpy(arrays[f"{letter}{number}"]) for letter in "wb")
    options = {"kernel_size": 3, "padding": 1} if kind is nn.Conv2d else {}
    layer: nn.Module = kind(weight.shape[1], weight.shape[0], **options)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


def plain_dopri5(func: nn.Module, u: torch.Tensor, steps: int, end: float) -> torch.Tensor:
    """Solve by Dormand and Prince's method in plain torch; the value of f at the end of a step begins the next one."""
    h, first = end / steps, func(torch.zeros(()), u)
    for step in range(steps):
        slopes = [first]
        for number, row in enumerate(_DOPRI5[1:]):
            state = u + h * sum(weight * slope for weight, slope in zip(row, slopes, strict=True) if weight)
            if number < len(_DOPRI5) - 2 or step < steps - 1:
                slopes.append(func(torch.zeros(()), state))
        u, first = state, slopes[-1]
    return u


def plain_turbulence(case: PeerCase, func: nn.Module, u: torch.Tensor) -> torch.Tensor:
    """Solve by classical Runge-Kutta steps in plain torch, with the filter after each."""
    assert isinstance(func, Turbulence)
    for _ in range(case.steps):
        u = func.small_scales(0.0, classical_rk4(lambda t, u: case.size * func(t, u), u, 1))
    return u


def plain_torch(case: PeerCase) -> Solve:
    """Return plain steps, differentiated by back-propagation."""
    if case.method == "dopri5":
        return lambda func, u0: plain_dopri5(func, u0, case.steps, case.end)
    if case.kind == "turbulence":
        return partial(plain_turbulence, case)
    # The functions do not depend on time, so a longer time is a larger function.
    return lambda func, u0: classical_rk4(lambda t, u: case.end * func(t, u), u0, case.steps)


def ours(case: PeerCase, func: nn.Module, compiled: bool) -> Solve:
    """Return this project's solve."""
    keywords: dict[str, Any] = {"step_size": case.size} if case.steps else {}
    if case.is_implicit:
        options = {"snes_rtol": case.tolerance, "snes_atol": case.tolerance, "snes_stol": case.tolerance}
        keywords |= {"options": options, "newton": "batch"}
    elif not case.steps:
        keywords |= {"rtol": case.tolerance, "atol": case.tolerance}
    if isinstance(func, Turbulence):
        keywords["between_steps"] = func.small_scales
    budget = CheckpointBudget(ram="4GiB")
    if case.checkpoints:
        # The initial state is one more checkpoint.
        budget = CheckpointBudget(ram="4GiB", ram_slots=case.checkpoints - 1, keep="solution")
    right: nn.Module = func
    if case.method == "arkimex_3":
        assert isinstance(func, Kinetics)
        right = SplitFunction(implicit=func.fast, explicit=func.slow)
        keywords["params"] = list(func.parameters())
    node = NeuralODE(right, method=case.method, trajectory=budget, compile=compiled, last_only=True, **keywords)
    times = [0.0, case.end]
    return lambda func, u0: node(u0, times)


def torchdiffeq_of(case: PeerCase, adjoint: bool) -> Solve:
    """Return torchdiffeq's solve. Its `rk4` is Kutta's 3/8 rule, with as many stages."""
    import torchdiffeq

    solve = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint
    keywords: dict[str, Any] = {"method": case.method}
    if case.method == "rk4":
        keywords["options"] = {"step_size": case.size}
    elif case.steps:
        # Any step is accepted, and none is longer.
        keywords |= {"rtol": 1e9, "atol": 1e9, "options": {"first_step": case.size, "max_step": case.size}}
    else:
        keywords |= {"rtol": case.tolerance, "atol": case.tolerance}

    def solved(func: nn.Module, u0: torch.Tensor) -> torch.Tensor:
        end: torch.Tensor = solve(func, u0, torch.tensor([0.0, case.end], dtype=u0.dtype), **keywords)[-1]
        return end

    return solved


def torchode_of(case: PeerCase) -> Solve:
    """Return torchode's solve of a batch of vectors, each with steps of its own under error control."""
    import torchode

    def solved(func: nn.Module, u0: torch.Tensor) -> torch.Tensor:
        term = torchode.ODETerm(func, with_stats=False)
        method: Any = classical(term) if case.method == "rk4" else torchode.Dopri5(term=term)
        control: Any = torchode.FixedStepController()
        if not case.steps:
            control = torchode.IntegralController(atol=case.tolerance, rtol=case.tolerance, term=term)
        start = torch.zeros(len(u0), dtype=u0.dtype)
        problem = torchode.InitialValueProblem(u0, start, start + case.end)
        first = torch.full_like(start, case.size) if case.steps else None
        end: torch.Tensor = torchode.AutoDiffAdjoint(method, control).solve(problem, dt0=first).ys[:, -1]
        return end

    return solved


def solve_of(case: PeerCase, solver: str, func: nn.Module) -> Solve:
    """Return the solve of a solver by its name."""
    if solver.startswith("pnode_dist"):
        return ours(case, func, compiled=solver.endswith("compiled"))
    if solver.startswith("torchdiffeq"):
        return torchdiffeq_of(case, adjoint=solver.endswith("adjoint"))
    return torchode_of(case) if solver == "torchode" else plain_torch(case)


def prepare(case: PeerCase, solver: str, arrays: Arrays | None = None) -> Solved:
    """Return the solve, and the solve with its gradient; of the case's `arrays` unless others are given."""
    if solver not in solvers_of(case):
        raise ValueError(f"{solver} does not compute {case.title}")
    torch.set_num_threads(1)
    arrays = arrays_of(case) if arrays is None else arrays
    func = FUNCTIONS[case.kind](arrays)
    solve = solve_of(case, solver, func)
    u0 = torch.from_numpy(arrays["u0"]).requires_grad_()
    names = ["u0", *sorted(arrays.keys() - {"u0"})]
    wanted = [u0, *_in_order(func, names[1:])]

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return solve(func, u0)

    def gradient() -> Arrays:
        end = solve(func, u0)
        found = torch.autograd.grad(end.square().mean(), wanted)
        values = [end.detach(), *found]
        return {name: value.numpy() for name, value in zip(["end", *names], values, strict=True)}

    return forward, gradient


def _in_order(func: nn.Module, names: Sequence[str]) -> list[torch.Tensor]:
    """Return the parameters in the order of the arrays' names: biases first, then weights, each by layer."""
    if isinstance(func, Kinetics):
        return [func.log_rates]
    layers = [layer for layer in func.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    tensors: dict[str, torch.Tensor] = {}
    for number, layer in enumerate(layers, 1):
        assert layer.bias is not None
        tensors |= {f"w{number}": layer.weight, f"b{number}": layer.bias}
    return [tensors[name] for name in names]


if __name__ == "__main__":
    serve(lambda case, solver: prepare(case_of(case), solver))
