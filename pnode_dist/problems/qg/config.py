"""Configuration of the quasi-geostrophic problem: the equations, the computed trajectories, the closure.

Nothing here imports torch or PETSc, so that a configuration is validated at once.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from pnode_dist.config.definition import ModelTable
from pnode_dist.config.tables import Count, EvaluationConfig, Finite, ForecastRun, NotNegative, Positive
from pnode_dist.problems.common.tables import ComputedTable, Layers

Points = Annotated[int, Field(ge=4, strict=True)]
Operator = Literal["sharp", "gaussian", "diffusion"]
Published = Literal["smagorinsky", "backscatter", "zanna_bolton"]


@dataclass(frozen=True)
class QGParameters:
    """Two layers of fluid on a beta plane with a sheared mean flow, in SI units, with the names of pyqg.

    For the layers i = 1 (upper) and 2, with J the Jacobian, psi the streamfunction and Q_y the mean gradient of q:

        dq_i/dt = -J(psi_i, q_i) - U_i dq_i/dx - Q_y,i dpsi_i/dx - [i = 2] rek lap(psi_2)
        q_1 = lap(psi_1) + F_1 (psi_2 - psi_1)        F_1 = 1 / (rd^2 (1 + delta))
        q_2 = lap(psi_2) + F_2 (psi_1 - psi_2)        F_2 = delta F_1

    `L` is the length of the domain along x, `rd` the deformation radius, `delta` the ratio H1 / H2 of the thicknesses,
    `H1` that of the upper layer (used by averages over the layers alone), `beta` the gradient of the Coriolis
    parameter, `U1` and `U2` the mean flow, `rek` the drag at the bottom, and `filterfac` the strength of the filter of
    small scales. The defaults are the eddy configuration of A. Ross, Z. Li, P. Perezhogin, C. Fernandez-Granda,
    L. Zanna: Benchmarking of machine learning ocean subgrid parameterizations in an idealized model, J. Adv. Model.
    Earth Syst. 15 (2023).
    """

    L: float = 1e6
    rd: float = 15_000.0
    delta: float = 0.25
    H1: float = 500.0
    beta: float = 1.5e-11
    U1: float = 0.025
    U2: float = 0.0
    rek: float = 5.787e-7
    filterfac: float = 23.6

    @property
    def coupling(self) -> tuple[float, float]:
        """F_1 and F_2 in 1/m^2."""
        upper = 1 / (self.rd**2 * (1 + self.delta))
        return upper, self.delta * upper

    @property
    def gradient(self) -> tuple[float, float]:
        """Q_y of both layers in 1/(m s)."""
        upper, lower = self.coupling
        shear = self.U1 - self.U2
        return self.beta + upper * shear, self.beta - lower * shear


EDDY = QGParameters()
"""The published configuration of isotropic eddies."""
JET = QGParameters(rek=7e-8, delta=0.1, beta=1e-11)
"""The published configuration of jets: less drag and beta, and a deeper lower layer."""

_PUBLISHED = {"eddy": EDDY, "jet": JET}
_HOUR = 3600.0
_NEAR = 1e-9


def is_multiple(value: float, unit: float) -> bool:
    """Return True for a whole number of units, up to rounding."""
    return abs(value / unit - round(value / unit)) <= _NEAR * max(1.0, value / unit)


class QGConfig(ComputedTable):
    """The table `[problem]` with `type = "qg"`: quasi-geostrophic turbulence, computed on a fine grid.

    Times are in hours, all else is in SI units. Trajectories are computed on the `fine` grid, filtered to the grid
    `shape` at each sample, and kept in the folder `data`. Time 0 is the end of `spin_up`. A key that is left out has
    its value in the published `configuration`.
    """

    type: Literal["qg"]
    """The name of the problem."""
    configuration: Literal["eddy", "jet"] = "eddy"
    """The published parameters: `eddy`, isotropic turbulence, or `jet`, zonal jets."""
    shape: tuple[Points, Points]
    """Points of the coarse grid along y and x, on which the closure is learnt; even. Cells are squares."""
    fine: tuple[Points, Points]
    """Points of the fine grid along y and x, in the proportion of `shape`, and more."""
    operator: Operator = "sharp"
    """The filter from the fine grid to the coarse one: `sharp` (operator 1 of the benchmark), `gaussian` (2), or
    `diffusion` (3), which needs points of `fine` in whole multiples of `shape`."""
    objective: Literal["online", "offline"] = "online"
    """`online` learns from windows of coarse states through the solve, `offline` by regression on the sub-grid forcing
    of the states at which windows start."""
    curriculum: tuple[tuple[Count, Count], ...] = ()
    """Epochs and window of the first stages of online training: `[[2, 1], [3, 4]]` learns two epochs from windows of
    one sample, three from windows of four, and the others from `window`, which is the longest."""
    data: str = "data/qg"
    """The folder of computed trajectories, relative to the working directory. Each set of the keys that trajectories
    depend on has a folder of its own in it. A run that was cut off goes on from the state that was written last."""
    fine_step: Positive
    """The step on the fine grid, in hours."""
    interval: Positive
    """Time between samples, in hours, a whole number of `fine_step`."""
    spin_up: NotNegative
    """The time on the fine grid before the first sample, in hours, a whole number of `fine_step`."""
    coarse_spin_up: NotNegative = 0.0
    """Time on the coarse grid before `spin_up`, in hours. Its steps are longer, as its cells are. Turbulence that has
    grown there fills the fine grid in a shorter `spin_up`."""
    amplitude: Positive = 1e-6
    """Size of the initial noise in the upper layer's potential vorticity, in 1/s. pyqg's is 1e-6."""
    L: Positive | None = None
    """The length of the domain along x, in m."""
    rd: Positive | None = None
    """The deformation radius, in m."""
    delta: Positive | None = None
    """The thickness of the upper layer, divided by that of the lower one."""
    H1: Positive | None = None
    """The thickness of the upper layer, in m. It has a weight in averages over the layers alone."""
    beta: Finite | None = None
    """The gradient of the Coriolis parameter, in 1/(m s)."""
    U1: Finite | None = None
    """The mean flow of the upper layer, in m/s."""
    U2: Finite | None = None
    """The mean flow of the lower layer, in m/s."""
    rek: NotNegative | None = None
    """The drag at the bottom, in 1/s."""
    filterfac: NotNegative | None = None
    """The strength of the filter of small scales."""

    @field_validator("shape")
    @classmethod
    def _even(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[0] % 2 or value[1] % 2:
            raise ValueError("must be even")
        return value

    @field_validator("fine")
    @classmethod
    def _finer(cls, value: tuple[int, int], others: ValidationInfo) -> tuple[int, int]:
        shape = others.data.get("shape")
        if shape is not None and (value[0] <= shape[0] or value[0] * shape[1] != value[1] * shape[0]):
            raise ValueError(f"must be in the proportion of shape = {list(shape)}, and more points")
        return value

    @field_validator("operator")
    @classmethod
    def _whole_cells(cls, value: Operator, others: ValidationInfo) -> Operator:
        shape, fine = others.data.get("shape"), others.data.get("fine")
        if value == "diffusion" and shape is not None and fine is not None and fine[0] % shape[0]:
            raise ValueError(f"needs fine = {list(fine)} to be a whole multiple of shape = {list(shape)}")
        return value

    @field_validator("curriculum")
    @classmethod
    def _within_window(cls, value: tuple[tuple[int, int], ...], others: ValidationInfo) -> tuple[tuple[int, int], ...]:
        longest = others.data.get("window")
        if longest is not None and any(window > longest for _, window in value):
            raise ValueError(f"must have windows of at most {longest}, which is window")
        if value and others.data.get("objective") == "offline":
            raise ValueError('needs objective = "online"')
        return value

    @field_validator("interval", "spin_up")
    @classmethod
    def _whole_steps(cls, value: float, others: ValidationInfo) -> float:
        step = others.data.get("fine_step")
        if step is not None and not is_multiple(value, step):
            raise ValueError(f"must be a whole number of fine_step = {step:g}")
        return value

    @property
    def parameters(self) -> QGParameters:
        """The parameters of the equations."""
        published = _PUBLISHED[self.configuration]
        given = {field.name: getattr(self, field.name) for field in fields(QGParameters)}
        return replace(published, **{name: value for name, value in given.items() if value is not None})

    @property
    def step_seconds(self) -> float:
        """The step on the fine grid in s."""
        return self.fine_step * _HOUR

    @property
    def steps(self) -> tuple[int, int]:
        """Fine steps before the first sample, and from one sample to the next."""
        return round(self.spin_up / self.fine_step), round(self.interval / self.fine_step)

    @property
    def coarse_steps(self) -> tuple[int, float]:
        """Steps of `coarse_spin_up`, and their size in s: at most `fine_step` times the ratio of the cells."""
        longest = self.fine_step * self.fine[1] / self.shape[1]
        count = math.ceil(self.coarse_spin_up / longest * (1 - _NEAR))
        return count, self.coarse_spin_up / max(count, 1) * _HOUR

    @property
    def recipe(self) -> dict[str, Any]:
        """All that the samples of a trajectory depend on, but its number and the number of samples."""
        names = (
            "shape",
            "fine",
            "operator",
            "interval",
            "fine_step",
            "spin_up",
            "coarse_spin_up",
            "amplitude",
            "seed",
        )
        return {**{name: getattr(self, name) for name in names}, **asdict(self.parameters)}

    def window_of(self, epoch: int) -> int:
        """Return the length of the training windows of an epoch, counted from 1."""
        for epochs, window in self.curriculum:
            if epoch <= epochs:
                return window
            epoch -= epochs
        return self.window


class QGModelConfig(ModelTable):
    """The table `[model]` of a quasi-geostrophic problem: the closure."""

    closure: Literal["cnn", "fcnn"] = "cnn"
    """The network: `cnn`, residual convolutions, or `fcnn`, the fully convolutional network of the benchmark, whose
    sizes are fixed."""
    channels: Count | None = None
    """Channels of each hidden layer of `cnn`. Default: 32."""
    layers: Layers | None = None
    """The number of convolutions of `cnn`, including the first and the last. Default: 4."""
    kernel: Count | None = None
    """Points along each axis of the kernels of `cnn`, odd. Default: 3."""
    applied: Literal["stages", "steps"] = "stages"
    """`stages` adds the forcing to the right-hand side, in each stage of the method. `steps` adds it times the step
    after each step, as a splitting of first order: an evaluation for each step in place of one for each stage. It needs
    steps of one size, `[solver] step_size`, that divides `interval`. The published closures are applied the same
    way."""
    momentum: bool = True
    """The forcing is the divergence of learnt fluxes, so that its mean over the domain is zero."""

    @field_validator("channels", "layers", "kernel")
    @classmethod
    def _of_cnn(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("closure") == "fcnn":
            raise ValueError('must be left out with closure = "fcnn", whose sizes are fixed')
        if value is not None and info.field_name == "kernel" and value % 2 == 0:
            raise ValueError("must be odd")
        return value


class QGEvaluationConfig(EvaluationConfig):
    """The table `[evaluation]` of a quasi-geostrophic problem."""

    free_run: NotNegative = 0.0
    """Length of the runs that go on from the first held-out state with each closure, in hours, rounded down to whole
    intervals. 0: none. They may be longer than the held-out trajectories."""
    compared: tuple[Published, ...] = ("smagorinsky", "backscatter", "zanna_bolton")
    """The published closures that the learnt one is compared with, besides none: `smagorinsky`, `backscatter` and
    `zanna_bolton`."""
    free_run_interval: Positive | None = None
    """Time between the samples of these runs, in hours, a whole number of `[problem] interval`, the default. At most
    `free_run`."""

    @field_validator("free_run_interval")
    @classmethod
    def _is_used(cls, value: float | None, others: ValidationInfo) -> float | None:
        length = others.data.get("free_run")
        if value is not None and length is not None and value > length:
            raise ValueError(f"must be at most free_run = {length:g}")
        return value


class QGRun(ForecastRun):
    """A whole configuration of a quasi-geostrophic problem."""

    problem: QGConfig
    model: QGModelConfig = QGModelConfig()
    evaluation: QGEvaluationConfig = QGEvaluationConfig()

    @field_validator("evaluation")
    @classmethod
    def _whole_intervals(cls, value: QGEvaluationConfig, others: ValidationInfo) -> QGEvaluationConfig:
        problem, given = others.data.get("problem"), value.free_run_interval
        if problem is not None and given is not None and not is_multiple(given, problem.interval):
            raise ValueError(
                f"free_run_interval = {given:g} must be a whole number of [problem] interval = {problem.interval:g}"
            )
        return value
