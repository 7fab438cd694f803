"""The checks of launch/gpu_check.sh: `gpu_check.py one|memory|two cuda|cpu`, `two` on two ranks."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mpi4py import MPI
from torch import nn

from pnode_dist import GridPartition, Mesh, NeuralODE, Trajectory
from pnode_dist.exchange import halo
from pnode_dist.nn import Conv2d
from pnode_dist.system.torch_internals import TRACES_OBJECTS

MEBIBYTE = 2**20
CHANNELS, HIDDEN = 8, 16
# States of 1 MiB where time is measured, and of 256 KiB where memory is.
TIMED, MEASURED = (128, 128), (64, 64)
STEPS, BUDGET = 40, 2 * MEBIBYTE
TIMES = torch.tensor([0.0, 1.0], dtype=torch.float64)
# Different devices add in different orders.
ERROR = 1e-10
SLOWER = 3.0

failures = 0


def check(name: str, value: float, most: float, unit: str = "") -> None:
    """Print the line of a check, which holds if `value` is at most `most`."""
    global failures
    holds = value <= most
    failures += not holds
    if MPI.COMM_WORLD.rank == 0:
        print(f"{'ok' if holds else 'FAILED'} {name} {value:.3g}{unit} (at most {most:.3g}{unit})", flush=True)


class Network(nn.Module):
    """du/dt of a field `[y, x, channels]`: two periodic convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {"padding": 1, "padding_mode": "circular", "dtype": torch.float64}
        self.first = nn.Conv2d(CHANNELS, HIDDEN, 3, **options)
        self.last = nn.Conv2d(HIDDEN, CHANNELS, 3, **options)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        x = u.movedim(-1, 0).unsqueeze(0)
        return self.last(torch.tanh(self.first(x))).squeeze(0).movedim(0, -1) - u


def field(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return a normal random field `[*shape, CHANNELS]`."""
    u = torch.randn(*shape, CHANNELS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return u.to(device)


def gradients(
    solve: Callable[[torch.Tensor], torch.Tensor], u0: torch.Tensor, parameters: list[nn.Parameter]
) -> list[torch.Tensor]:
    """Return the final state and the gradients of its mean square, in the host's memory."""
    u0 = u0.detach().requires_grad_()
    end = solve(u0)
    found = torch.autograd.grad(end.square().mean(), [u0, *parameters])
    return [value.detach().cpu() for value in (end, *found)]


def difference(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Return the largest difference, relative to the largest entry of each tensor."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True))


def plain_rk4(f: Callable[..., torch.Tensor], u: torch.Tensor, steps: int) -> torch.Tensor:
    """Solve with plain torch over [0, 1]."""
    h, t = 1.0 / steps, torch.zeros((), dtype=torch.float64, device=u.device)
    for _ in range(steps):
        k1 = f(t, u)
        k2 = f(t, u + h / 2 * k1)
        k3 = f(t, u + h / 2 * k2)
        k4 = f(t, u + h * k3)
        u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return u


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the least seconds of three calls, after one that warms up."""
    times = []
    for _ in range(4):
        synchronise(device)
        began = time.perf_counter()
        call()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(call: Callable[[], object], device: torch.device) -> int:
    """Return the bytes that `call` allocates at most: on the GPU, or resident memory of the process."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    before = resident("VmRSS")
    # Resets VmHWM, the highest value of VmRSS.
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def check_gradients(device: torch.device) -> None:
    """Compare with the same solve on the CPU, and with plain torch there."""
    small = (32, 32)
    network, host = Network().to(device), Network()
    there, here = list(network.parameters()), list(host.parameters())
    cases = {"rk4": {}, "dopri5": {"rtol": 1e-6, "atol": 1e-8}, "cn": {}}
    for method, settings in cases.items():
        given = {"method": method, "step_size": 0.1, "last_only": True, **settings}
        found = gradients(lambda u, g=given: NeuralODE(network, **g)(u, TIMES), field(small, device), there)
        wanted = gradients(lambda u, g=given: NeuralODE(host, **g)(u, TIMES), field(small, HOST), here)
        # Iterations of linear solvers stop at a tolerance.
        check(f"gradient-{method}", difference(found, wanted), 1e-4 if method == "cn" else ERROR)
    node = NeuralODE(network, method="rk4", step_size=0.1, last_only=True)
    found = gradients(lambda u: node(u, TIMES), field(small, device), there)
    wanted = gradients(lambda u: plain_rk4(host, u, 10), field(small, HOST), here)
    check("gradient-of-plain-torch", difference(found, wanted), ERROR)
    node.trajectory = Trajectory(ram="128KiB", keep="solution")
    check(
        "gradient-with-recomputation",
        difference(gradients(lambda u: node(u, TIMES), field(small, device), there), found),
        ERROR,
    )
    compiled = NeuralODE(network, method="rk4", step_size=0.1, last_only=True, compile=True)
    check(
        "gradient-compiled",
        difference(gradients(lambda u: compiled(u, TIMES), field(small, device), there), wanted),
        ERROR,
    )


def check_times(device: torch.device) -> None:
    """Compare seconds of a solve and its gradient."""
    network, u0 = Network().to(device), field(TIMED, device)
    parameters = list(network.parameters())
    node = NeuralODE(network, method="rk4", step_size=0.1, last_only=True, trajectory=Trajectory(keep="graph"))
    ours = seconds(lambda: gradients(lambda u: node(u, TIMES), u0, parameters), device)
    plain = seconds(lambda: gradients(lambda u: plain_rk4(network, u, 10), u0, parameters), device)
    check(f"time-over-plain-torch-of-{plain:.3g}s", ours / plain, SLOWER)
    if importlib.util.find_spec("torchdiffeq") is None:
        print("torchdiffeq is not installed: not compared", flush=True)
        return
    from torchdiffeq import odeint

    options = {"method": "rk4", "options": {"step_size": 0.1}}
    theirs = seconds(
        lambda: gradients(lambda u: odeint(network, u, TIMES.to(device), **options)[-1], u0, parameters), device
    )
    check(f"time-over-torchdiffeq-of-{theirs:.3g}s", ours / theirs, SLOWER)


def check_memory(device: torch.device) -> None:
    """Compare peak memory with the budget, and with the tape of one step."""
    network, u0 = Network().to(device), field(MEASURED, device)
    parameters = list(network.parameters())

    def solve(steps: int, budget: Trajectory) -> NeuralODE:
        node = NeuralODE(network, method="rk4", step_size=1 / steps, last_only=True, trajectory=budget)
        gradients(lambda u: node(u, TIMES), u0, parameters)
        return node

    solve(1, Trajectory(keep="graph"))  # allocates what later solves share
    tape = peak(lambda: solve(1, Trajectory(keep="graph")), device)
    bounded = Trajectory(ram=BUDGET, keep="solution")
    checkpoints = solve(STEPS, bounded).last_solve.checkpoint_bytes_peak
    check("bytes-of-checkpoints", checkpoints / MEBIBYTE, BUDGET / MEBIBYTE, "MiB")
    most = BUDGET + 2 * tape
    check("peak-memory", peak(lambda: solve(STEPS, bounded), device) / MEBIBYTE, most / MEBIBYTE, "MiB")
    everything = peak(lambda: solve(STEPS, Trajectory(keep="graph")), device)
    # So that the check before it means something.
    check("peak-memory-over-that-of-all-tapes", most / everything, 0.5)


def check_halos(device: torch.device) -> None:
    """Compare a field that two ranks share with the whole field on the CPU."""
    shape = (24, 20)
    with Mesh() as mesh:
        partition = GridPartition(mesh, shape, CHANNELS, "periodic", processes=(mesh.size, 1))
        rows = slice(*partition.owned[0])
        whole = Network()

        class Flow(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = Conv2d(partition, CHANNELS, HIDDEN, dtype=torch.float64)
                self.last = Conv2d(partition, HIDDEN, CHANNELS, dtype=torch.float64)

            def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
                return self.last(torch.tanh(self.first(u))) - u

        flow = Flow()
        flow.load_state_dict(whole.state_dict())
        flow.to(device)
        u0, local = field(shape, HOST), field(shape, HOST)[rows].to(device)
        wanted = gradients(lambda u: plain_rk4(whole, u, 10), u0, list(whole.parameters()))
        wanted[:2] = [value[rows] for value in wanted[:2]]

        def error(solve: Callable[[torch.Tensor], torch.Tensor]) -> float:
            # The mean over a rank's rows is its share of the mean, times the number of ranks.
            end, start, *rest = gradients(solve, local, list(flow.parameters()))
            found = [end, start / mesh.size, *(mesh.sum(value) / mesh.size for value in rest)]
            return mesh.state_comm.allreduce(difference(found, wanted), MPI.MAX)

        node = NeuralODE(flow, method="rk4", step_size=0.1, last_only=True, partition=partition)
        check("halo-gradient-of-two-ranks", error(lambda u: node(u, TIMES)), ERROR)
        if TRACES_OBJECTS:
            step = torch.compile(lambda u: plain_rk4(flow, u, 1), fullgraph=True, dynamic=False)
            eager = gradients(lambda u: plain_rk4(flow, u, 1), local, list(flow.parameters()))
            compiled = gradients(step, local, list(flow.parameters()))
            worst = mesh.state_comm.allreduce(difference(compiled, eager), MPI.MAX)
            check("halo-gradient-of-a-compiled-step", worst, ERROR)
        there = mesh.state_comm.allreduce(seconds(lambda: halo(local, partition), device), MPI.MAX)
        here = mesh.state_comm.allreduce(seconds(lambda: halo(local.cpu(), partition), HOST), MPI.MAX)
        check(f"halo-seconds-where-the-host-takes-{here:.2g}", there, 0.01)


HOST = torch.device("cpu")
PARTS = {"one": (check_gradients, check_times), "memory": (check_memory,), "two": (check_halos,)}


def main() -> int:
    part, name = sys.argv[1:]
    device = torch.device(name)
    stopped = False
    for checks in PARTS[part]:
        try:
            checks(device)
        except Exception as error:
            stopped = True
            print(f"FAILED {checks.__name__} {type(error).__name__}: {error}".splitlines()[0], flush=True)
    return int(stopped or failures > 0)


if __name__ == "__main__":
    sys.exit(main())
