"""The configuration of a run: what each table of the TOML file may hold.

Neither torch nor PETSc is imported here, so that a wrong configuration is answered at once. What needs the data set
or the number of ranks is checked by those who know them, and ends as the same kind of error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    ValidationInfo,
    field_validator,
)

from pnode_dist.checkpointing.budget import Trajectory, parse_size
from pnode_dist.ode import methods

Count = Annotated[int, Field(ge=1, strict=True)]
CountOrNone = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]


def _method(name: str) -> str:
    methods.resolve(name)
    return name


def _size(size: int | str) -> int | str:
    parse_size(size)
    return size


def _size_or_auto(size: int | str) -> int | str:
    return size if size == "auto" else _size(size)


def _run_name(name: str) -> str:
    if not name.strip() or name in (".", "..") or set(name) & set('/\\"\0\n'):
        raise ValueError("must be a plain file name, without slashes or quotes")
    return name


def _petsc_options(options: dict[str, Any]) -> dict[str, Any]:
    for name in options:
        if not name or name.startswith("-") or any(character.isspace() for character in name):
            raise ValueError(f"{name!r} must be the name of a PETSc option without its dash, such as ts_monitor")
    return options


def _choice_or_path(*names: str) -> Callable[[str], str]:
    """A check for one of the names or an import path."""

    def check(value: str) -> str:
        module, _, name = value.replace(":", ".").rpartition(".")
        if value not in names and not (name.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise ValueError(f"must be {', '.join(names)}, or an import path such as torch.optim.Adam")
        return value

    return check


def _leads(leads: tuple[int, ...]) -> tuple[int, ...]:
    if list(leads) != sorted(set(leads)):
        raise ValueError("must be increasing")
    return leads


class Table(BaseModel):
    """A table of the file: its keys and no others, fixed once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RunConfig(Table):
    """`[run]`: what the run is called and where its files go."""

    name: Annotated[StrictStr, AfterValidator(_run_name)]
    """By default the name of the configuration file."""
    directory: StrictStr | None = None
    """The run directory; by default `runs/<name>`."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)] = 0
    """Seeds the parameters, the order of the batches and the directions of the gradient check."""
    tensorboard: bool = False
    """Whether the metrics are also written as event files for TensorBoard, into `tensorboard` in the run directory."""
    hang_limit: NotNegative = 1800.0
    """Seconds in which a rank has to get on by a step of a solve; 0: it may take for ever."""
    stop_before_end: NotNegative = 120.0
    """Seconds before the end of a Slurm job at which a run stops by itself, to be gone on with; 0: it does not."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.directory or Path("runs") / self.name)


class MeshConfig(Table):
    """`[mesh]`: the MPI world as state ranks x data replicas."""

    state: Count | None = None
    """Ranks over which one state is spread; by default all that `data` leaves."""
    data: Count = 1
    """Replicas, each on other training data."""
    backend: Literal["mpi", "gloo", "nccl"] = "mpi"
    """How torch.distributed communicates."""


class SolverConfig(Table):
    """`[solver]`: the time stepping."""

    method: Annotated[StrictStr, AfterValidator(_method)] = "rk4"
    """A name from `pnode-dist methods`."""
    step_size: Positive | None = None
    """The longest step, in the problem's time units; by default one step between output times. With error control the
    first step, by default chosen from the problem."""
    rtol: Positive | None = None
    """Relative tolerance of error control; steps are of fixed size unless this or `atol` is given."""
    atol: Positive | None = None
    """Absolute tolerance, in the units of the state as it is solved for."""
    adaptor: Literal["basic", "dsp"] = "basic"
    """PETSc's control of the step size."""
    preconditioner: Literal["none", "block", "assembled"] = "none"
    """Of the linear systems of implicit methods: the exact inverse of every sample's own, or the sparse Jacobian on a
    grid, for PETSc's own preconditioners (`petsc_options = { pc_type = "gamg" }`)."""
    compute_dtype: Literal["float64", "float32", "bfloat16"] | None = None
    """What the right-hand side computes in, by default `[training] dtype`, in which parameters and data stay."""
    on_mismatch: Literal["raise", "warn", "ignore"] = "raise"
    """Whether to raise, warn or go on where a step recomputed for the gradient differs from the forward pass."""
    preserve_rng_state: bool = True
    """Whether recomputed steps draw the same random numbers; false saves the time where the model draws none."""
    reach: Count = 1
    """How many cells the right-hand side reaches in each direction, for `assembled`: 1 for a 3 x 3 stencil, the sum of
    its layers' for a network."""
    petsc_options: Annotated[dict[str, StrictStr | bool | int | float], AfterValidator(_petsc_options)] = {}
    """PETSc options of the solver, without the dash; an option that takes no value is written `""`."""

    @property
    def options(self) -> dict[str, Any]:
        """The PETSc options as `odeint` takes them: None stands for an option without a value."""
        return {name: None if value == "" else value for name, value in self.petsc_options.items()}


class TrajectoryConfig(Table):
    """`[trajectory]`: what may be kept for the adjoint, per rank. Sizes are bytes or strings such as `"256MiB"`."""

    ram: Annotated[StrictInt | StrictStr, AfterValidator(_size_or_auto)] = "auto"
    """`auto`: half of the memory that is left to the ranks of a node, divided among them."""
    disk: Annotated[StrictInt | StrictStr, AfterValidator(_size)] = 0
    directory: StrictStr | None = None
    """For disk checkpoints, best local to the node; by default SLURM_TMPDIR or the system's temporary directory."""
    ram_slots: CountOrNone | None = None
    """A number of checkpoints, instead of bytes."""
    disk_slots: CountOrNone | None = None
    keep: Literal["auto", "solution", "stages", "graph"] = "auto"
    """`solution`: only checkpoints. `stages`: the states of the stages. `graph`: the graph of every step. `auto`: what
    is fastest in `ram`."""
    schedule: Literal["auto", "all", "revolve", "multistage", "h-revolve"] = "auto"
    """Which checkpoints to hold: the state before every step, binomially in memory, also on disk, or with the costs of
    the disk weighed in. `auto`: what is predicted to be fastest."""
    checkpoint_dtype: Literal["float64", "float32"] = "float64"
    """`float32` halves the checkpoints and rounds what is run again from them."""
    solves: Count = 1
    """How many solves share the budget at a time."""
    on_spill_error: Literal["recompute", "raise"] = "recompute"
    """When the disk fails: go on without it, or end the run."""

    def build(self, solves: int = 1) -> Trajectory:
        """The budget as `odeint` takes it, for a model of so many solves."""
        return Trajectory(**self.model_dump() | {"solves": solves * self.solves})


class TrainingConfig(Table):
    """`[training]`: an optimiser on the batches of the problem."""

    epochs: Count
    optimiser: Annotated[StrictStr, AfterValidator(_choice_or_path("adamw", "sgd"))] = "adamw"
    """`adamw`, `sgd`, or the import path of a torch optimiser, such as `torch.optim.LBFGS`, which is given
    `learning_rate` as `lr`, a `weight_decay` that is not zero, and `optimiser_options`."""
    optimiser_options: dict[str, Any] = {}
    """Further arguments of the optimiser, by name."""
    momentum: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    """Of `sgd`: what is left of a step in the next one. AdamW has averages of its own."""
    learning_rate: Positive = 1e-3
    schedule: Annotated[StrictStr, AfterValidator(_choice_or_path("constant", "cosine"))] = "constant"
    """`constant`; `cosine`: the learning rate falls to zero over the run along half a cosine; or the import path of a
    torch scheduler, such as `torch.optim.lr_scheduler.OneCycleLR`, which is given `schedule_options`."""
    schedule_options: dict[str, Any] = {}
    """Arguments of the scheduler, by name."""
    schedule_every: Literal["epoch", "step"] = "epoch"
    """Whether the scheduler advances with every epoch or with every optimiser step."""
    weight_decay: NotNegative = 0.0
    """Times the parameters: with `adamw` what the learning rate takes from them in a step, with `sgd` added to their
    gradient."""
    batch_size: Count = 1
    """Samples of a step, of all replicas together, so that the training is the same on every mesh."""
    dtype: Literal["float32", "float64"] = "float32"
    """In what the model computes; PETSc's state is in its own scalar type."""
    gradient_clip: Positive | None = None
    """The largest norm of the gradient, summed over ranks, that a step is taken with."""
    log_every: Count = 1
    """Epochs between progress lines where the output is not a terminal."""
    validate_every: CountOrNone = 0
    """Epochs between validations; 0: only after the last."""
    keep: Literal["last", "best"] = "last"
    """Which parameters the run ends with. `best` chooses them by the validation data, whose errors are then no
    longer those of unseen data: it needs a test set of its own to report on."""

    @field_validator("optimiser_options", "schedule_options")
    @classmethod
    def _are_used(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        name = str(info.field_name).removesuffix("_options")
        if value and "." not in str(info.data.get(name)):
            raise ValueError(f"must be empty unless {name} is an import path")
        return value

    @field_validator("schedule_every")
    @classmethod
    def _is_used(cls, value: str, info: ValidationInfo) -> str:
        if value != "epoch" and "." not in str(info.data.get("schedule")):
            raise ValueError('must be "epoch" unless schedule is an import path')
        return value

    @field_validator("momentum")
    @classmethod
    def _has_momentum(cls, value: float, others: ValidationInfo) -> float:
        optimiser = others.data.get("optimiser")
        if value and optimiser != "sgd":
            raise ValueError(f'must be 0 with optimiser = "{optimiser}"')
        return value


class SnapshotConfig(Table):
    """`[snapshot]`: how often what a run can go on from is written; it also is at its end and when it is stopped."""

    every_steps: CountOrNone = 0
    """Optimiser steps between snapshots; 0: not by steps."""
    every_minutes: NotNegative = 10.0
    """0: not by time."""
    keep: Count = 2
    """How many are kept; older ones are removed."""


class EvaluationConfig(Table):
    """`[evaluation]` of a problem that forecasts: what `pnode-dist evaluate` reports."""

    leads: Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(_leads)] = (1, 2, 3, 6)
    """Forecast lead times, in steps of the data's time axis."""


class Config(Table):
    """A whole configuration. Each problem has a subclass, which says what `[problem]`, `[model]` and `[evaluation]`
    hold, see `pnode_dist.config.definition`."""

    run: RunConfig
    mesh: MeshConfig = MeshConfig()
    problem: BaseModel
    model: BaseModel
    solver: SolverConfig = SolverConfig()
    trajectory: TrajectoryConfig = TrajectoryConfig()
    training: TrainingConfig
    snapshot: SnapshotConfig = SnapshotConfig()
    evaluation: BaseModel

    @property
    def kind(self) -> str:
        """`[problem] type`: the name or place of the problem."""
        return str(self.problem.type)  # type: ignore[attr-defined]

    def to_toml(self) -> str:
        """The configuration with all defaults written out, as `load` reads it."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


class ForecastRun(Config):
    """A whole configuration of a problem whose model forecasts trajectories."""

    evaluation: EvaluationConfig = EvaluationConfig()
