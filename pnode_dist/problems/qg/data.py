"""Trajectories of the quasi-geostrophic problem: fine runs, filtered to the coarse grid, in files that runs share.

Each trajectory has a file, which is replaced as a whole every minute while the trajectory is computed. It holds the
coarse samples and the fine state at its end, so that a run that was cut off, or that needs more samples, goes on there.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pnode_dist.distributed.configuration import agreed
from pnode_dist.distributed.mesh import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.ode.odeint import odeint
from pnode_dist.partition.grid import GridPartition
from pnode_dist.partition.protocol import Partition
from pnode_dist.problems.qg.coarsening import Coarsening, refined, subgrid_forcing
from pnode_dist.problems.qg.config import QGConfig
from pnode_dist.problems.qg.physics import LAYERS, QGTendency, SmallScaleFilter, initial_state
from pnode_dist.report.dataset_file import Variable, write_dataset
from pnode_dist.report.turns import write_failure
from pnode_dist.system.atomic_file import sync

SAVE_SECONDS = 60.0
_FORMAT = 1
Advance = Callable[[int], None]


@dataclass
class Trajectory:
    """This rank's part of a trajectory up to a step of the fine grid.

    `q` and `forcing` are the samples so far, each `[ny_local, nx_local, 2]` of the coarse grid, in 1/s and 1/s^2.
    `state` is the fine q `[ny_local, nx_local, 2]` after `steps` steps. All are float64.
    """

    state: torch.Tensor
    steps: int = 0
    q: list[torch.Tensor] = field(default_factory=list)
    forcing: list[torch.Tensor] = field(default_factory=list)


class FineRuns:
    """The runs on the fine grid of a configuration. Collective on the world, as are its methods.

    `coarse` is the partition of the samples. Each replica computes its share of the trajectories.
    """

    def __init__(self, config: QGConfig, coarse: GridPartition, mesh: Mesh) -> None:
        self.config, self.coarse, self.mesh = config, coarse, mesh
        self.fine = partition_of(mesh, config.fine)
        parameters = config.parameters
        self.equations = QGTendency(self.fine, parameters)
        self.coarse_equations = QGTendency(coarse, parameters)
        self.small_scales = SmallScaleFilter(self.fine, parameters)
        self.coarsening = Coarsening(self.fine, coarse, config.operator, parameters)
        text = json.dumps({"format": _FORMAT, **config.recipe}, sort_keys=True)
        self.recipe = text
        self.folder = Path(config.data) / hashlib.sha256(text.encode()).hexdigest()[:12]

    def trajectories(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return q in 1/s and the sub-grid forcing in 1/s^2 of all trajectories, training trajectories first.

        Both are `[trajectory, time, ny_local, nx_local, 2]`, float64, on the coarse grid. Trajectories that the folder
        lacks are computed first, each by one of the replicas, and written. Runs on other numbers of state ranks differ
        by rounding, which turbulence amplifies; samples that are read are the same on all.

        Raises `ConfigurationError` on all ranks for a folder that cannot be written, a file that cannot be read or was
        computed from other parameters, and a solution that is not finite.
        """
        agreed(self.mesh, self._make_folder)
        numbers = range(self.config.trajectories + self.config.validation)
        found = agreed(self.mesh, lambda: self._begun(numbers) if self.mesh.is_root else None)
        begun: dict[int, tuple[int, int]] = self.mesh.broadcast_object(found)
        missing = [number for number in numbers if number not in begun or begun[number][1] < self.config.times]
        done = sum(min(steps, self._last) for steps, _ in begun.values())
        with _shown(self.mesh, len(numbers) * self._last, done) as advance:
            self._compute(missing, set(begun), advance)
        q, forcing = zip(*agreed(self.mesh, lambda: [self._samples(number) for number in numbers]), strict=True)
        return torch.stack(q), torch.stack(forcing)

    def path(self, number: int) -> Path:
        """Return the file of a trajectory."""
        return self.folder / f"trajectory_{number:04d}.h5"

    @property
    def _last(self) -> int:
        """The step of the last sample."""
        spin_up, every = self.config.steps
        return spin_up + (self.config.times - 1) * every

    def _make_folder(self) -> None:
        if self.mesh.is_root:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigurationError(
                    f"[problem] data = {self.config.data!r}: cannot be written: {error.strerror or error}"
                ) from None

    def _compute(self, missing: list[int], begun: set[int], advance: Advance) -> None:
        """Compute and write the `missing` trajectories. Those in `begun` have a file and go on from its state.

        All ranks meet after each part of the work. An error of one replica is raised on all there, and a replica that
        has finished waits for others no longer than a part takes.
        """
        parts = self._parts(missing[self.mesh.replica :: self.mesh.data_replicas], begun)
        busy = 1
        while busy:
            steps = agreed(self.mesh, lambda: next(parts, None))
            taken = torch.tensor([steps or 0, int(steps is not None)])
            together, busy = self.mesh.sum(taken, over="data").tolist()
            advance(together)

    def _parts(self, numbers: list[int], begun: set[int]) -> Iterator[int]:
        """Compute and write trajectories, and yield the number of fine steps after each part of the work.

        Collective on the state ranks.
        """
        for number in numbers:
            if number in begun:
                one = agreed(self.mesh, partial(self._read, number), over="state")
            else:
                one = Trajectory((yield from self._initial(number)))
            yield from self._complete(one, number)

    def _initial(self, number: int) -> Generator[int, None, torch.Tensor]:
        """Return noise on the fine grid, or what has grown from noise on the coarse one, on the fine grid."""
        count, size = self.config.coarse_steps
        grid = self.coarse if count else self.fine
        q = initial_state(grid, self.config.amplitude, self.config.seed, number)
        if not count:
            return q
        small_scales = SmallScaleFilter(self.coarse, self.config.parameters)
        _, every = self.config.steps
        for first in range(0, count, every):
            q = _solved(self.coarse_equations, small_scales, q, min(every, count - first), size)
            yield 0
        return refined(self.coarsening, q)

    def _complete(self, one: Trajectory, number: int) -> Iterator[int]:
        """Compute and write the samples that are missing, and yield the number of steps after each part."""
        spin_up, every = self.config.steps
        saved = time.monotonic()
        while True:
            if one.steps >= spin_up and len(one.q) == (one.steps - spin_up) // every:
                q, forcing = self._sample(one.state)
                one.q.append(q)
                one.forcing.append(forcing)
            if len(one.q) == self.config.times:
                break
            if self.mesh.broadcast_object(time.monotonic() - saved > SAVE_SECONDS, over="state"):
                self._write(one, number)
                saved = time.monotonic()
            steps = (spin_up - one.steps) % every or every
            one.state = _solved(self.equations, self.small_scales, one.state, steps, self.config.step_seconds)
            one.steps += steps
            self._check_finite(one)
            yield steps
        self._write(one, number)

    @torch.no_grad()
    def _sample(self, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return subgrid_forcing(self.coarsening, self.equations, self.coarse_equations, q)

    def _check_finite(self, one: Trajectory) -> None:
        wrong = not bool(torch.isfinite(one.state).all())
        if self.mesh.max(torch.tensor([int(wrong)]), over="state").item():
            hours = one.steps * self.config.fine_step
            raise ConfigurationError(
                f"[problem] fine_step = {self.config.fine_step:g}: the solution on the fine grid is not finite "
                f"{hours:g} hours after its start: must be shorter"
            )

    @contextmanager
    def _opened(self, number: int) -> Iterator[h5py.File]:
        """Open the file of a trajectory. Not collective, nor are the functions that use it."""
        path = self.path(number)
        try:
            with h5py.File(path, "r") as file:
                if file.attrs["recipe"] != self.recipe:
                    raise ConfigurationError(f"{path}: was computed from other parameters: remove it, or move it away")
                yield file
        except (OSError, KeyError) as error:
            raise ConfigurationError(f"{path}: is no readable trajectory: {error}: remove it") from None

    def _begun(self, numbers: Iterable[int]) -> dict[int, tuple[int, int]]:
        """Return the numbers of steps and of samples of each trajectory that has a file."""
        found = {}
        for number in numbers:
            if self.path(number).exists():
                with self._opened(number) as file:
                    found[number] = int(file.attrs["steps"]), len(file["q"])
        return found

    def _read(self, number: int) -> Trajectory:
        """Return this rank's part of a trajectory as far as its file has it."""
        with self._opened(number) as file:
            q, forcing = (list(_part(file[name], self.coarse)) for name in ("q", "forcing"))
            return Trajectory(_part(file["state"], self.fine), int(file.attrs["steps"]), q, forcing)

    def _samples(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's part of the samples q and forcing of a trajectory, `[time, ny_local, nx_local, 2]`."""
        with self._opened(number) as file:
            q, forcing = (_part(file[name], self.coarse, self.config.times) for name in ("q", "forcing"))
            return q, forcing

    def _write(self, one: Trajectory, number: int) -> None:
        path = self.path(number)
        unfinished = path.with_name(f".{path.name}.{self.mesh.broadcast_object(os.getpid(), over='state')}")
        count, (ny, nx) = len(one.q), self.coarse.shape
        empty = torch.empty(0, *self.coarse.local_shape, dtype=torch.float64)
        axes = ("time", "y", "x", "layer")
        q, forcing = (torch.stack(values) if values else empty for values in (one.q, one.forcing))
        cell = self.config.parameters.L / nx
        hours = {"units": "hours"}
        variables = {
            "time": Variable(("time",), np.arange(count) * self.config.interval, hours),
            "y": Variable(("y",), np.arange(ny) * cell, {"units": "m"}),
            "x": Variable(("x",), np.arange(nx) * cell, {"units": "m"}),
            "layer": Variable(("layer",), np.array(LAYERS)),
            "q": Variable(axes, q, {"units": "1/s"}, np.float64, self.coarse),
            "forcing": Variable(axes, forcing, {"units": "1/s2"}, np.float64, self.coarse),
            "state": Variable(("fine_y", "fine_x", "layer"), one.state, {"units": "1/s"}, np.float64, self.fine),
        }
        attributes = {"recipe": self.recipe, "steps": one.steps, "trajectory": number}
        try:
            write_dataset(unfinished, variables, self.mesh, attributes, over="state")
            agreed(self.mesh, lambda: _replace(unfinished, path) if self.mesh.state_rank == 0 else None, over="state")
        except ConfigurationError:
            if self.mesh.state_rank == 0:
                with suppress(OSError):
                    unfinished.unlink(missing_ok=True)
            raise


def partition_of(mesh: Mesh, shape: tuple[int, int], width: int = 1) -> GridPartition:
    """Return slabs along y of a periodic grid with two layers. Collective on the state ranks.

    Raises `ConfigurationError` on all ranks for fewer than `width` rows on some rank.
    """
    return GridPartition(mesh, shape, len(LAYERS), ("periodic", "periodic"), width, (mesh.state_ranks, 1))


@torch.no_grad()
def _solved(
    equations: QGTendency, small_scales: SmallScaleFilter, q: torch.Tensor, steps: int, size: float
) -> torch.Tensor:
    """Return q after so many classical Runge-Kutta steps of `size` seconds, each followed by the filter. Collective."""
    return odeint(
        equations,
        q,
        [0.0, steps * size],
        method="rk4",
        step_size=size,
        partition=equations.partition,
        between_steps=small_scales,
        last_only=True,
    )


def _part(stored: h5py.Dataset, partition: Partition, entries: int | None = None) -> torch.Tensor:
    """Return this rank's part of a stored array, float64, of its leading axis the first `entries`."""
    owned = partition.owned_slices(partition.comm.rank)
    leading = (slice(entries),) * (stored.ndim - len(owned))
    return torch.from_numpy(np.asarray(stored[(*leading, *owned)], dtype=np.float64))


def _replace(unfinished: Path, path: Path) -> None:
    try:
        sync(unfinished)
        os.replace(unfinished, path)
        sync(path.parent)
    except OSError as error:
        raise write_failure(path, error) from None


@contextmanager
def _shown(mesh: Mesh, total: int, done: int) -> Iterator[Advance]:
    """Show the steps of the fine runs on standard error of rank 0: a bar on a terminal, two lines otherwise."""
    if done >= total or not mesh.is_root:
        yield lambda _: None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        began = time.monotonic()
        console.print(f"computing fine runs: {total - done} of {total} steps", highlight=False)
        yield lambda _: None
        console.print(f"computed fine runs in {time.monotonic() - began:.0f} s", highlight=False)
        return
    text = TextColumn("computing fine runs"), TextColumn("{task.percentage:.0f}%")
    with Progress(*text, BarColumn(), TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield lambda steps: bar.advance(task, steps)
