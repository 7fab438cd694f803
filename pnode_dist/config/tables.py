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
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
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


def _device(name: str) -> str:
    kind, _, number = name.partition(":")
    if name not in ("cpu", "cuda", "auto") and not (kind == "cuda" and number.isascii() and number.isdigit()):
        raise ValueError("must be cpu, cuda, cuda:N with the number of a GPU, or auto")
    return name


def _increasing(numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    if list(numbers) != sorted(set(numbers)):
        raise ValueError("must be increasing")
    return numbers


def _examples(*values: str | int) -> Any:
    """Values for the JSON Schema of a key that a validator checks, because the schema itself allows more."""
    return Field(json_schema_extra={"examples": [*values]})


class Table(BaseModel):
    """A table of the file: its keys and no others, fixed once read. The docstring below a key describes it to users."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RunConfig(Table):
    """The table `[run]`: the name of the run, its files, and when it stops."""

    name: Annotated[StrictStr, AfterValidator(_run_name)]
    """The name of the run. Default: the name of the configuration file, without its ending."""
    directory: StrictStr | None = None
    """The run directory. Default: `runs/NAME`."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)] = 0
    """Seed of the initial parameters, the order of the batches and the directions of the gradient check."""
    tensorboard: bool = False
    """Also write the metrics as event files for TensorBoard, into `tensorboard/` in the run directory."""
    hang_limit: NotNegative = 1800.0
    """End the job if a rank completes no time step for this many seconds. 0 disables."""
    stop_before_end: NotNegative = 120.0
    """Stop with a snapshot this many seconds before the end of a Slurm job. 0 disables."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return Path(self.directory or Path("runs") / self.name)


class MeshConfig(Table):
    """The table `[mesh]`: the MPI world as state ranks x data replicas."""

    state: Count | None = None
    """Ranks that share one state. Default: the number of ranks divided by `data`."""
    data: Count = 1
    """Replicas of the state. Each computes its share of every batch."""
    backend: Literal["mpi", "gloo", "nccl"] = "mpi"
    """The library by which torch.distributed communicates."""


class SolverConfig(Table):
    """The table `[solver]`: the time stepping."""

    method: Annotated[StrictStr, AfterValidator(_method), _examples(*methods.METHODS)] = "rk4"
    """The time-stepping method, a name from `pnode-dist methods`."""
    step_size: Positive | None = None
    """The longest step, in the problem's units of time. Default: one step between output times. With error control it
    is another name of `first_step`."""
    rtol: Positive | None = None
    """Relative tolerance of error control. Steps have a fixed size unless `rtol` or `atol` is given."""
    atol: Positive | None = None
    """Absolute tolerance of error control, in the units of the solved state."""
    adaptor: Literal["basic", "dsp", "pid"] = "basic"
    """The controller of the step size, for error control: PETSc's `basic` or `dsp`, or `pid` for explicit methods."""
    pcoeff: Finite | None = None
    """The proportional coefficient of `pid`, in diffrax's meaning. Default: 0."""
    icoeff: Finite | None = None
    """The integral coefficient of `pid`. Default: 1."""
    dcoeff: Finite | None = None
    """The derivative coefficient of `pid`. Default: 0."""
    first_step: Positive | None = None
    """The first step with error control. Default: chosen from the problem."""
    dt_min: Positive | None = None
    """The least size with error control. A step of this size that is rejected ends the solve with an error."""
    dt_max: Positive | None = None
    """The longest step with error control."""
    max_steps: Count | None = None
    """The most steps of a solve, rejected ones included. More are an error."""
    preconditioner: Literal["none", "block", "assembled"] = "none"
    """Preconditioner of the linear systems of implicit methods. `block` inverts the Jacobian of each sample exactly.
    `assembled` builds the sparse Jacobian on a grid for PETSc's own preconditioners, which
    `petsc_options = { pc_type = "gamg" }` chooses."""
    compute_dtype: Literal["float64", "float32", "bfloat16"] | None = None
    """The type in which the right-hand side computes. Parameters and data stay in `[training] dtype`, the default."""
    state_dtype: Literal["auto", "float32", "float64"] = "auto"
    """The type of the solve's state, adjoint and checkpoints. `auto` is the wider one of `[training] dtype` and
    `compute_dtype` for explicit Runge-Kutta methods, and float64 for all others, which allow no other."""
    on_mismatch: Literal["raise", "warn", "ignore"] = "raise"
    """The action if a step recomputed for the gradient differs from the forward pass."""
    newton: Literal["auto", "batch", "petsc"] = "auto"
    """The solver of the equations of implicit methods. `batch` factors the small systems of all samples at once.
    `petsc` uses PETSc's SNES and KSP. `auto` is `batch` where that is possible."""
    jumps: Annotated[tuple[Finite, ...], AfterValidator(_increasing)] = ()
    """Times at which the right-hand side jumps or has a kink, in the problem's units of time. Steps end there, and
    error control starts anew."""
    compile: Literal[False, True, "auto"] = False
    """Run solves as generated code of torch.compile, with other rounding. `true` compiles at the first solve. `"auto"`
    compiles after 20 seconds of solves, and keeps what is faster: runs are then not equal bit for bit."""
    preserve_rng_state: bool = True
    """Draw the same random numbers in recomputed steps. `false` saves time if the model draws none."""
    reach: Count = 1
    """Cells that the right-hand side reads in each direction, for `preconditioner = "assembled"`: 1 for a 3 x 3
    stencil. For a network it is the sum over its layers."""
    petsc_options: Annotated[dict[str, StrictStr | bool | int | float], AfterValidator(_petsc_options)] = {}
    """PETSc options of the solver, by name without the dash. Write `""` for an option without a value."""

    @field_validator("state_dtype")
    @classmethod
    def _suits_method(cls, value: str, others: ValidationInfo) -> str:
        name = others.data.get("method")
        if value == "float32" and name is not None and methods.resolve(name).has_vec_state:
            raise ValueError(f'must be "auto" or "float64" with method = "{name}", whose state is in PETSc\'s vectors')
        return value

    @property
    def options(self) -> dict[str, Any]:
        """The PETSc options as `odeint` takes them: None stands for an option without a value."""
        return {name: None if value == "" else value for name, value in self.petsc_options.items()}


class TrajectoryConfig(Table):
    """The table `[trajectory]`: the memory and disk budget of the adjoint, per rank.

    Sizes are numbers of bytes, or strings such as `"256MiB"`.
    """

    ram: Annotated[StrictInt | StrictStr, AfterValidator(_size_or_auto), _examples("auto", "256MiB", "1.5GB")] = "auto"
    """Memory for checkpoints, stages and tapes. `auto` is half of the memory available on the node, divided by its
    ranks."""
    disk: Annotated[StrictInt | StrictStr, AfterValidator(_size), _examples("256MiB", "1.5GB")] = 0
    """Disk space for checkpoints. 0 disables."""
    directory: StrictStr | None = None
    """The directory of disk checkpoints, best on a disk of the node. Default: SLURM_TMPDIR, TMPDIR, or the system's
    temporary directory."""
    ram_slots: CountOrNone | None = None
    """The number of checkpoints in memory, instead of `ram`."""
    disk_slots: CountOrNone | None = None
    """The number of checkpoints on disk, instead of `disk`."""
    keep: Literal["auto", "solution", "stages", "graph"] = "auto"
    """The part of a step to store. `solution` stores checkpoint states only; each step is recomputed. `stages` also
    stores the stage values. `graph` stores the autograd tape of every step. `auto` is the fastest within `ram`."""
    schedule: Literal["auto", "all", "revolve", "multistage", "h-revolve"] = "auto"
    """The checkpoints to store. `all`: the state before every step. `revolve`: binomial, in memory. `multistage`:
    binomial, in memory and on disk. `h-revolve`: the same, with the measured cost of the disk. `auto`: the schedule
    with the shortest predicted time."""
    checkpoint_dtype: Literal["float64", "float32"] = "float64"
    """The widest type of checkpoints, which are never wider than the state. `float32` halves those of a float64 state,
    and rounds the states that steps are recomputed from."""
    solves: Count = 1
    """The number of solves that share the budget at the same time."""
    on_spill_error: Literal["recompute", "raise"] = "recompute"
    """The action if the disk fails: recompute steps instead, or end the run."""

    def build(self, solves: int = 1) -> Trajectory:
        """The budget as `odeint` takes it, for a model of so many solves."""
        return Trajectory(**self.model_dump() | {"solves": solves * self.solves})


class TrainingConfig(Table):
    """The table `[training]`: the optimiser and the batches."""

    epochs: Count
    """Passes over the training data."""
    optimiser: Annotated[StrictStr, AfterValidator(_choice_or_path("adamw", "sgd")), _examples("adamw", "sgd")] = (
        "adamw"
    )
    """The optimiser: `adamw`, `sgd`, or the import path of a torch optimiser such as `torch.optim.LBFGS`. Its arguments
    are `learning_rate` as `lr`, `weight_decay` unless it is 0, and `optimiser_options`."""
    optimiser_options: dict[str, Any] = {}
    """Further arguments of an optimiser given by its import path, by name."""
    momentum: Annotated[float, Field(ge=0, lt=1, strict=True)] = 0.0
    """Momentum of `sgd`: the share of the previous step that is added to the next one."""
    learning_rate: Positive = 1e-3
    """The learning rate at the first step."""
    schedule: Annotated[
        StrictStr, AfterValidator(_choice_or_path("constant", "cosine")), _examples("constant", "cosine")
    ] = "constant"
    """The learning rate over the run. `constant`; `cosine`, which falls to zero along half a cosine; or the import path
    of a torch scheduler such as `torch.optim.lr_scheduler.OneCycleLR`, with the arguments `schedule_options`."""
    schedule_options: dict[str, Any] = {}
    """Arguments of a scheduler given by its import path, by name."""
    schedule_every: Literal["epoch", "step"] = "epoch"
    """When a scheduler given by its import path advances."""
    weight_decay: NotNegative = 0.0
    """Weight decay. `adamw` subtracts it from the parameters, times the learning rate and the parameters. `sgd` adds it
    to the gradient, times the parameters."""
    batch_size: Count = 1
    """Samples per optimiser step, over all replicas. Training is therefore the same on every mesh."""
    dtype: Literal["float32", "float64"] = "float32"
    """The type of parameters and data."""
    device: Annotated[StrictStr, AfterValidator(_device), _examples("cpu", "cuda", "cuda:0", "auto")] = "cpu"
    """The device on which the model computes. `cuda`: the GPU with the number of the rank on its node. `cuda:N`: this
    GPU for all ranks. `auto`: `cuda` if every rank has a GPU, else `cpu`. Data, losses and the states of PETSc stay in
    the host's memory, and evaluation computes there."""
    gradient_clip: Positive | None = None
    """Scale a gradient with a larger norm, over all ranks, down to this norm. Default: no limit."""
    log_every: Count = 1
    """Epochs between lines of progress, where the output is not a terminal."""
    validate_every: CountOrNone = 0
    """Epochs between validations. 0 validates after the last epoch only."""
    keep: Literal["last", "best"] = "last"
    """The parameters that the run saves: those of the last epoch, or those with the lowest validation error. With
    `best` report errors on a separate test set, because validation data have chosen the parameters."""
    start_from: Annotated[StrictStr, Field(min_length=1)] | None = None
    """The run directory whose trained parameters training starts from, for fine-tuning. Default: parameters drawn from
    `[run] seed`."""

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
    """The table `[snapshot]`: when to write the snapshots from which `--resume` continues a run.

    A run also writes one at its end and when it is stopped.
    """

    every_steps: CountOrNone = 0
    """Optimiser steps between snapshots. 0 disables."""
    every_minutes: NotNegative = 10.0
    """Minutes between snapshots. 0 disables."""
    keep: Count = 2
    """The number of snapshots to keep. Older ones are removed."""


class EvaluationConfig(Table):
    """The table `[evaluation]` of a forecast: what `pnode-dist evaluate` reports."""

    leads: Annotated[tuple[Count, ...], Field(min_length=1), AfterValidator(_increasing)] = (1, 2, 3, 6)
    """Lead times of the reported errors, in samples of the data, in increasing order."""


TaoMethod = Literal[
    "blmvm", "lmvm", "bqnls", "bqnkls", "bqnktr", "bqnktl", "bncg", "cg",
    "bnls", "bntr", "bntl", "nls", "ntr", "ntl", "brgn",
]  # fmt: skip
_NEWTON = ("bnls", "bntr", "bntl", "nls", "ntr", "ntl")


class InverseConfig(Table):
    """The table `[inverse]`: what `pnode-dist invert` minimises with, and the uncertainty that it computes."""

    method: TaoMethod = "blmvm"
    """The method, by TAO's name: quasi-Newton (`blmvm` to `bqnktl`), conjugate gradients (`bncg`, `cg`), Newton-Krylov
    (`bnls` to `ntl`) or Gauss-Newton (`brgn`)."""
    hessian: Literal["exact", "gauss_newton"] | None = None
    """The Hessian of Newton-Krylov methods. Default: `exact`."""
    iterations: Count = 100
    """The largest number of iterations."""
    reduction: Annotated[float, Field(gt=0, lt=1, strict=True)] = 1e-3
    """Stop when the norm of the gradient is this fraction of that at the first guess."""
    eigenvalues: CountOrNone = 0
    """The rank of the Laplace approximation, from which standard deviations follow. 0 computes none."""
    members: CountOrNone = 0
    """Samples of the Laplace approximation from which a forecast with spread is solved. 0 solves none."""
    petsc_options: Annotated[dict[str, StrictStr | bool | int | float], AfterValidator(_petsc_options)] = {}
    """PETSc options of TAO, by name without the dash. Write `""` for an option without a value."""

    @field_validator("hessian")
    @classmethod
    def _has_hessian(cls, value: str | None, others: ValidationInfo) -> str | None:
        method = others.data.get("method")
        if value is not None and method not in _NEWTON:
            raise ValueError(f'must be left out with method = "{method}", which needs no Hessian')
        return value

    @field_validator("members")
    @classmethod
    def _has_samples(cls, value: int, others: ValidationInfo) -> int:
        if value == 1 or (value and not others.data.get("eigenvalues")):
            raise ValueError("must be 0, or at least 2 with eigenvalues above 0")
        return value

    @field_validator("petsc_options")
    @classmethod
    def _has_no_key(cls, value: dict[str, Any]) -> dict[str, Any]:
        for option, key in (("tao_max_it", "iterations"), ("tao_gttol", "reduction")):
            if option in value:
                raise ValueError(f"{option} must be left out: set {key}")
        return value

    @property
    def options(self) -> dict[str, Any]:
        """The options of TAO: None stands for one without a value. Other tests of convergence are off by default."""
        given = {name: None if value == "" else value for name, value in self.petsc_options.items()}
        own = {"tao_max_it": self.iterations, "tao_gttol": self.reduction, "tao_gatol": 0.0, "tao_grtol": 0.0}
        return own | given


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
