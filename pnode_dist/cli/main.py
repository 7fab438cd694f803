"""The command `pnode-dist`. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import functools
import json
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pnode_dist.bench import BENCHMARKS, DRAWN, FULL
from pnode_dist.cli.output import console, output, show_table
from pnode_dist.distributed.launcher import launched_rank
from pnode_dist.errors import ConfigurationError
from pnode_dist.system.abort import abort
from pnode_dist.system.allocator import keep_freed_memory
from pnode_dist.system.json_lines import json_line

if TYPE_CHECKING:
    from mpi4py import MPI

    from pnode_dist.bench.report import Report
    from pnode_dist.config.tables import Config
    from pnode_dist.distributed.mesh import Mesh
    from pnode_dist.verify.gradcheck import GradcheckResult

PROGRAM = "pnode-dist"
FAILED, WRONG_USAGE, PREEMPTED, INTERRUPTED = 1, 2, 75, 130
_PATIENCE = 10.0
_EPILOG = "Arguments after -- are PETSc options, such as: -- -ts_monitor -log_view"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 2 for wrong usage or configuration, 1 for a check or run that failed,
    75 (EX_TEMPFAIL) for a run that was stopped and is to be started again."""
    own, petsc_options = _split(list(sys.argv[1:] if argv is None else argv))
    try:
        arguments = _parser().parse_args(own)
        _initialise_petsc(petsc_options)
    except ConfigurationError as error:
        if launched_rank() == 0:
            _complain(error)
        return WRONG_USAGE
    except SystemExit as end:  # --help and --version
        return int(end.code or 0)
    keep_freed_memory()
    command: Callable[[argparse.Namespace], int] = arguments.command
    return command(arguments) if arguments.alone else _run_together(command, arguments)


def _split(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """The command line's own arguments, and PETSc's after `--`, None if there is no `--`."""
    if "--" not in argv:
        return argv, None
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


def _initialise_petsc(options: list[str] | None) -> None:
    """Hand the options to PETSc, which reads them when it is first imported."""
    if not options:
        return
    if not options[0].startswith("-"):
        raise ConfigurationError(f"{options[0]!r} after --: must be a PETSc option, such as -ts_monitor")
    import petsc4py

    petsc4py.init([PROGRAM, *options])


class _Parser(argparse.ArgumentParser):
    """argparse that complains in one line, and speaks on the first rank alone."""

    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        if launched_rank() == 0:
            super()._print_message(message, file)


def _parser() -> argparse.ArgumentParser:
    from pnode_dist import __version__

    parser = _Parser(prog=PROGRAM, description="Train and check distributed neural ODEs.", epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, text: str, command: Callable[[argparse.Namespace], int], alone: bool = False) -> _Parser:
        sub: _Parser = commands.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=_EPILOG, allow_abbrev=False
        )
        sub.set_defaults(command=command, alone=alone)
        return sub

    train = add("train", "train the model of a configuration", _train)
    evaluate = add("evaluate", "forecast the validation data with a trained model", _evaluate)
    status = add("status", "say how a run is doing", _status, alone=True)
    status.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the directory of a run")
    status.add_argument("--follow", action="store_true", help="go on until the run ends, a line every few seconds")
    gradcheck = add("gradcheck", "check the gradient of a configuration against finite differences", _gradcheck)
    report = add("report", "write one self-contained page of a run", _report)
    plan = add("plan", "say what a trajectory's budget allows and how long it takes", _plan)
    methods = add("methods", "list the time-stepping methods", _methods, alone=True)
    doctor = add("doctor", "say what is installed and whether the ranks see each other", _doctor)
    bench = add("bench", "measure against peers: " + ", ".join(BENCHMARKS), _bench)
    for sub in (train, plan):
        sub.add_argument("config", metavar="CONFIG", help="a TOML file")
    gradcheck.add_argument("config", metavar="CONFIG", nargs="?", help="a TOML file")
    gradcheck.add_argument("--all-methods", action="store_true", help="check every method on a small problem instead")
    for sub in (evaluate, report):
        sub.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the directory of a trained run")
    report.add_argument("--output", metavar="FILE", type=Path, help="where the page goes, instead of RUN_DIR")
    bench.add_argument("name", metavar="NAME", choices=list(BENCHMARKS), help=" | ".join(BENCHMARKS))
    bench.add_argument("--plot", metavar="FILE", type=Path, help=f"also draw it ({', '.join(DRAWN)})")
    bench.add_argument("--full", action="store_true", help=f"in the sizes of the paper, for hours ({', '.join(FULL)})")
    train.add_argument("--run-dir", metavar="DIR", help="where the run's files go, instead of [run] directory")
    train.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run there")
    train.add_argument(
        "--resume",
        metavar="auto|PATH|no",
        default="no",
        help="go on from the last snapshot in the run directory, if there is one, or from that in PATH",
    )
    plan.add_argument("--ram", metavar="SIZE", help="instead of [trajectory] ram, such as 64MiB or auto")
    plan.add_argument("--disk", metavar="SIZE", help="instead of [trajectory] disk")
    plan.add_argument("--measure", action="store_true", help="also run every candidate and measure it")
    plan.add_argument(
        "--sweep", action="store_true", help="plan for budgets of all sizes, and draw time against memory"
    )
    plan.add_argument("--plot", metavar="FILE", type=Path, default=Path("plan.png"), help="where --sweep draws")
    for sub in (train, evaluate, gradcheck, plan):
        sub.add_argument(
            "--set",
            metavar="SECTION.KEY=VALUE",
            dest="overrides",
            action="append",
            default=[],
            help="put a value over the configuration's; may be repeated",
        )
    for sub in (evaluate, status, report, gradcheck, plan, methods, doctor, bench):
        sub.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


# Ending together


def _run_together(command: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command on all ranks, and let no rank wait for one that has failed. Collective on the world."""
    from mpi4py import MPI

    from pnode_dist.checkpointing.store import PrecisionError, SpillError
    from pnode_dist.errors import ConvergenceError, StepSizeError
    from pnode_dist.runs.endings import DivergenceError, Preempted, RunDirectoryError

    # Of its own, because the other ranks may be anywhere in the program when one fails.
    together = MPI.COMM_WORLD.Dup()
    try:
        code = command(arguments)
    except ConfigurationError as error:
        return _end(error, WRONG_USAGE, together)
    except (
        ConvergenceError,
        DivergenceError,
        PrecisionError,
        RunDirectoryError,
        SpillError,
        StepSizeError,
    ) as error:
        return _end(error, FAILED, together)
    except Preempted as end:
        if _first(together):
            print(f"{PROGRAM}: {end}", file=sys.stderr, flush=True)
        return PREEMPTED
    except KeyboardInterrupt:
        if _first(together):
            print(f"{PROGRAM}: interrupted", file=sys.stderr, flush=True)
        if together.size > 1:
            abort(INTERRUPTED, together)
        return INTERRUPTED
    except Exception:
        if together.size == 1:
            raise
        # The hook of an open mesh names the rank and ends all; without one, this does.
        sys.excepthook(*sys.exc_info())
        abort(FAILED, together)
    together.Free()
    return code


def _end(error: Exception, code: int, together: MPI.Intracomm) -> int:
    """Say what is wrong once if all ranks have come to it; if some have not, end them."""
    everyone = together.Ibarrier()
    patient_until = time.monotonic() + _PATIENCE
    while not everyone.Test():
        if time.monotonic() > patient_until:
            _complain(error, f"[rank {together.rank} on {socket.gethostname()}] ")
            abort(code, together)
        time.sleep(0.005)
    if _first(together):
        _complain(error)
    return code


def _complain(error: Exception, rank: str = "") -> None:
    line = " ".join(str(error).split())
    print(f"{rank}{PROGRAM}: error: {line}", file=sys.stderr, flush=True)


def _first(comm: MPI.Intracomm) -> bool:
    return comm.rank == 0 and (comm.size > 1 or launched_rank() == 0)


# Commands


def _load(path: str | Path, overrides: Sequence[str]) -> Config:
    """The configuration as rank 0 read it, or the error that it met, on every rank. Collective on the world."""
    from mpi4py import MPI

    from pnode_dist.problems.registry import load

    loaded: Config | ConfigurationError | None = None
    if MPI.COMM_WORLD.rank == 0:
        try:
            loaded = load(path, list(overrides))
        except ConfigurationError as error:
            loaded = error
    loaded = MPI.COMM_WORLD.bcast(loaded)
    if isinstance(loaded, ConfigurationError):
        raise loaded
    assert loaded is not None
    return loaded


def _mesh(config: Config) -> Mesh:
    import torch

    from pnode_dist.distributed.mesh import Mesh

    _check_alike()
    torch.manual_seed(config.run.seed)
    return Mesh(config.mesh.state, config.mesh.data, backend=config.mesh.backend)


def _check_alike() -> None:
    """Raise `ConfigurationError` unless all ranks run the same versions and command. Collective on the world."""
    from mpi4py import MPI

    from pnode_dist.system.compatibility import difference, facts_here

    facts, hosts = MPI.COMM_WORLD.gather(facts_here()), MPI.COMM_WORLD.gather(socket.gethostname())
    found = MPI.COMM_WORLD.bcast(difference(facts, hosts) if facts and hosts else None)
    if found is not None:
        raise ConfigurationError(found)


def _train(arguments: argparse.Namespace) -> int:
    overrides = list(arguments.overrides)
    if arguments.run_dir is not None:
        overrides.append(f"run.directory={json.dumps(arguments.run_dir)}")
    config = _load(arguments.config, overrides)
    import torch

    from pnode_dist.ode import safe_points
    from pnode_dist.problems.registry import build
    from pnode_dist.runs import directory as run_directory
    from pnode_dist.runs import heartbeat, resume, tensorboard
    from pnode_dist.system import slurm
    from pnode_dist.train import loop
    from pnode_dist.train.preemption import Preemption
    from pnode_dist.train.watchdog import Watchdog

    if config.run.tensorboard:
        tensorboard.check_available()
    directory, end = config.run.path, slurm.job_end() if config.run.stop_before_end else None
    with _mesh(config) as mesh, Preemption(mesh, end and end - config.run.stop_before_end) as preemption:
        choose = functools.partial(resume.choose_start, arguments.resume, config, arguments.overwrite)
        run_directory.on_root(mesh, choose)
        problem = build(config, mesh, getattr(torch, config.training.dtype))
        loop.rehearse(problem)
        with run_directory.held(directory, mesh) as lock:
            # Nobody else writes there from now on.
            start = run_directory.on_root(mesh, choose)
            snapshot = resume.open_run(start, config, mesh, arguments.overwrite)
            came_to = 0 if snapshot is None else snapshot.position.step
            if mesh.is_root:
                for note in resume.described(start, snapshot, config.training.epochs):
                    print(f"{PROGRAM}: {note}", file=sys.stderr, flush=True)
            with (
                heartbeat.of_run(directory, lock, mesh, config.training.epochs) as beating,
                Watchdog(mesh, config.run.hang_limit) as watchdog,
                safe_points.watched(watchdog),
                tensorboard.of_run(directory, mesh.is_root and config.run.tensorboard, came_to) as events,
            ):
                outcome = loop.train(
                    problem,
                    config.training,
                    mesh,
                    directory,
                    config.snapshot,
                    snapshot,
                    config.to_toml(),
                    preemption,
                    beating,
                    events,
                )
        if mesh.is_root:
            figures = ", ".join(
                f"{name.replace('_', ' ')} {value:.4g} {problem.units}".rstrip()
                for name, value in outcome.figures.items()
            )
            print(f"{outcome.steps} steps in {outcome.seconds:.1f} s, loss {outcome.loss:.6g}; validation: {figures}")
            print(f"kept the parameters after epoch {outcome.kept_epoch} in {directory / run_directory.MODEL}")
            print(f"next: {PROGRAM} evaluate {directory}", flush=True)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from pnode_dist.runs.status import follow, in_words, status_of

    def say(words: str) -> None:
        print(words, flush=True)

    try:
        if arguments.follow:
            for status in follow(arguments.run_dir):
                say(json_line(vars(status)) if arguments.json else in_words(status))
            return 0
        found = vars(status_of(arguments.run_dir))
    except ConfigurationError as error:
        _complain(error)
        return WRONG_USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    if arguments.json:
        say(json_line(found))
    else:
        show_table({name: value for name, value in found.items() if value not in (None, "")})
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from pnode_dist.runs import directory as run_directory

    directory: Path = arguments.run_dir
    config = _load(directory / run_directory.CONFIG, arguments.overrides)
    import torch

    from pnode_dist.problems.registry import build

    with _mesh(config) as mesh, output(arguments.json, mesh.is_root) as emit:
        problem = build(config, mesh, getattr(torch, config.training.dtype))
        run_directory.load_parameters(problem.model, directory / run_directory.MODEL)
        problem.model.eval()
        with torch.no_grad():
            result = problem.evaluate(problem.model, directory)
        run_directory.save_evaluation(directory, result, mesh)
        emit(result)
        if mesh.is_root and not arguments.json:
            show_table(result)
    return 0


def _report(arguments: argparse.Namespace) -> int:
    import importlib.util

    from pnode_dist.distributed.mesh import Mesh
    from pnode_dist.runs.directory import on_root

    def written() -> str:
        if importlib.util.find_spec("matplotlib") is None or importlib.util.find_spec("jinja2") is None:
            raise ConfigurationError("report: needs matplotlib and jinja2: pip install 'pnode-dist[plot]'")
        from pnode_dist.report.run_page import write_page

        return str(write_page(arguments.run_dir, arguments.output))

    with Mesh() as mesh, output(arguments.json, mesh.is_root) as emit:
        result = {"page": on_root(mesh, written)}
        emit(result)
        if mesh.is_root and not arguments.json:
            show_table(result)
    return 0


def _gradcheck(arguments: argparse.Namespace) -> int:
    if arguments.all_methods:
        return _check_methods(arguments)
    if arguments.config is None:
        raise ConfigurationError("gradcheck: needs a CONFIG, or --all-methods")
    config = _load(arguments.config, arguments.overrides)
    import torch

    from pnode_dist.problems.registry import build
    from pnode_dist.verify.gradcheck import gradcheck

    with _mesh(config) as mesh, output(arguments.json, mesh.is_root) as emit:
        # Differences say nothing about a gradient in lower precision.
        solver = config.solver.model_copy(update={"compute_dtype": None})
        problem = build(config.model_copy(update={"solver": solver}), mesh, torch.float64)
        result = gradcheck(problem.gradcheck_case(), mesh, config.run.seed)
        emit({"problem": problem.name, "method": config.solver.method, **result.as_dict()})
        failures = result.failures()
        if mesh.is_root:
            if not arguments.json:
                _show_gradcheck(result)
            for failure in failures:
                print(f"{PROGRAM}: the gradient is wrong: {failure}", file=sys.stderr, flush=True)
    return FAILED if failures else 0


def _check_methods(arguments: argparse.Namespace) -> int:
    if arguments.config is not None or arguments.overrides:
        raise ConfigurationError("gradcheck: --all-methods has a problem of its own: takes no CONFIG and no --set")
    from pnode_dist.distributed.mesh import Mesh
    from pnode_dist.verify.methods import check_methods, failures

    with Mesh() as mesh, output(arguments.json, mesh.is_root) as emit:
        rows = list(check_methods(mesh))
        found = failures(rows)
        emit({"methods": rows, "failures": found, "ranks": mesh.size})
        if mesh.is_root:
            if not arguments.json:
                show_table({"methods": rows, "ranks": mesh.size})
            for failure in found:
                print(f"{PROGRAM}: the gradient is wrong: {failure}", file=sys.stderr, flush=True)
    return FAILED if found else 0


def _show_gradcheck(result: GradcheckResult) -> None:
    columns = (
        "taylor_remainders_without_gradient",
        "taylor_orders_without_gradient",
        "taylor_remainders",
        "taylor_orders",
    )
    shown = {name: value for name, value in result.as_dict().items() if name not in (*columns, "steps", "failures")}
    rows = []
    for number, step in enumerate(result.steps):
        row: dict[str, Any] = {"step": step}
        for name in columns:
            values = getattr(result, name)
            # An order belongs to the halving that led to this step.
            at = number - 1 if "orders" in name else number
            row[name.removeprefix("taylor_")] = values[at] if at >= 0 else None
        rows.append(row)
    show_table({**shown, "taylor_test": rows})


def _plan(arguments: argparse.Namespace) -> int:
    overrides = list(arguments.overrides)
    slots: dict[str, None] = {}
    for key in ("ram", "disk"):
        value = getattr(arguments, key)
        if value is not None:
            overrides.append(f"trajectory.{key}={json.dumps(value)}")
            slots[f"{key}_slots"] = None
    config = _load(arguments.config, overrides)
    # A size on the command line stands above a number of checkpoints in the file.
    config = config.model_copy(update={"trajectory": config.trajectory.model_copy(update=slots)})
    import torch

    from pnode_dist.ode import planning
    from pnode_dist.problems.registry import build
    from pnode_dist.report.picture import draw

    with _mesh(config) as mesh, output(arguments.json, mesh.is_root) as emit:
        case = build(config, mesh, getattr(torch, config.training.dtype)).solve_case()
        plans = planning.plan_case(case)
        measured = planning.measure(case, plans.candidates) if arguments.measure and not arguments.sweep else None
        result: dict[str, Any] = plans.as_dict()
        tables: dict[str, Any] = {"costs": planning.costs_table(plans), "plans": planning.as_table(plans, measured)}
        if measured is not None:
            result["measured_seconds"] = measured
        if arguments.sweep:
            points = planning.sweep(case, arguments.measure)
            rows = [
                {"ram": point.ram, "plan": point.plan.name, "seconds": point.plan.seconds, "measured": point.measured}
                for point in points
            ]
            from pnode_dist.report.plan_plot import draw_sweep

            title = (
                f"{config.run.name}: {plans.chosen.steps} steps of {config.solver.method}, {mesh.state_ranks} rank(s)"
            )
            result["sweep"], result["plot"] = (
                rows,
                draw(arguments.plot, lambda path: draw_sweep(path, points, title), mesh),
            )
            tables |= {"sweep": rows, "plot": result["plot"]}
        emit(result)
        if mesh.is_root and not arguments.json:
            show_table(tables)
    return 0


def _methods(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from pnode_dist.ode.methods import METHODS

    rows = [asdict(method) for method in METHODS.values()]
    if launched_rank() == 0:
        if arguments.json:
            print(json_line({"methods": rows}))
        else:
            show_table({"methods": rows})
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from pnode_dist.cli.doctor import run_doctor

    with output(arguments.json, launched_rank() == 0) as emit:
        return run_doctor(arguments.json, emit)


def _bench(arguments: argparse.Namespace) -> int:
    from mpi4py import MPI

    from pnode_dist.bench import run

    first = _first(MPI.COMM_WORLD)
    if arguments.plot is not None and arguments.name not in DRAWN:
        raise ConfigurationError(f"bench {arguments.name} --plot: has no picture: must be one of {', '.join(DRAWN)}")
    if arguments.full and arguments.name not in FULL:
        raise ConfigurationError(f"bench {arguments.name} --full: has one size: must be one of {', '.join(FULL)}")
    with output(arguments.json, first) as emit:
        report = run(arguments.name, full=arguments.full)
        result = report.as_dict()
        if arguments.plot is not None:
            result["plot"] = _bench_plot(arguments.plot, report)
        emit(result)
        if first and not arguments.json:
            report.show(console())
            if arguments.plot is not None:
                show_table({"plot": result["plot"]})
    return 0


def _bench_plot(path: Path, report: Report) -> str:
    """Draw a benchmark; what to say of it. Collective on the world."""
    from pnode_dist.distributed.mesh import Mesh
    from pnode_dist.report.picture import draw

    def drawing(path: Path) -> None:
        from pnode_dist.bench.plots import draw_bench

        draw_bench(path, report)

    with Mesh() as mesh:
        return draw(path, drawing, mesh)


if __name__ == "__main__":
    sys.exit(main())
