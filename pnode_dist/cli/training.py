"""The commands of a run: train, evaluate, status and report."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from pnode_dist.cli.exit_codes import FAILED, PREEMPTED
from pnode_dist.cli.output import output, show_table
from pnode_dist.cli.parser import PROGRAM, Commands, add_json, add_overrides
from pnode_dist.errors import ConfigurationError
from pnode_dist.system.abort import HUNG
from pnode_dist.system.json_lines import json_line


def add_commands(commands: Commands) -> None:
    """Add the commands."""
    train = commands.add(
        "train",
        "train the model of a configuration",
        _train,
        "my.toml --resume auto --set training.epochs=10",
        (FAILED, HUNG, PREEMPTED),
    )
    train.add_argument("config", metavar="CONFIG", help="a TOML file")
    train.add_argument("--run-dir", metavar="DIR", help="where the run's files go, instead of [run] directory")
    train.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run there")
    train.add_argument(
        "--resume",
        metavar="auto|PATH|no",
        default="no",
        help="go on from the last snapshot in the run directory, if there is one, or from that in PATH",
    )
    train.add_argument(
        "--accept-changed-problem",
        action="store_true",
        help="resume although the source of a problem of your own has changed since the snapshot",
    )
    add_overrides(train)
    evaluate = commands.add(
        "evaluate", "apply a trained model to the validation data", _evaluate, "runs/my", (FAILED, HUNG)
    )
    evaluate.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the directory of a trained run")
    add_overrides(evaluate)
    status = commands.add(
        "status", "print the state, the progress and the last snapshot of a run", _status, "runs/my", alone=True
    )
    status.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the directory of a run")
    status.add_argument("--follow", action="store_true", help="go on until the run ends, a line every few seconds")
    report = commands.add("report", "write one self-contained page of a run", _report, "runs/my", (FAILED,))
    report.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="the directory of a trained run")
    report.add_argument("--output", metavar="FILE", type=Path, help="where the page goes, instead of RUN_DIR")
    for command in (evaluate, status, report):
        add_json(command)


def _train(arguments: argparse.Namespace) -> int:
    overrides = list(arguments.overrides)
    if arguments.run_dir is not None:
        overrides.append(f"run.directory={json.dumps(arguments.run_dir)}")
    from pnode_dist.train.configured import configured

    config, found = configured(arguments.config, overrides)
    from mpi4py import MPI

    from pnode_dist.runs.directory import MODEL
    from pnode_dist.train.run import RunRequest, run

    request = RunRequest(arguments.resume, arguments.overwrite, arguments.accept_changed_problem)
    outcome, units = run(config, found, request)
    if MPI.COMM_WORLD.rank == 0:
        directory = config.run.path
        figures = ", ".join(
            f"{name.replace('_', ' ')} {value:.4g} {units}".rstrip() for name, value in outcome.figures.items()
        )
        print(f"{outcome.steps} steps in {outcome.seconds:.1f} s, loss {outcome.loss:.6g}; validation: {figures}")
        print(f"kept the parameters after epoch {outcome.kept_epoch} in {directory / MODEL}")
        print(f"next: {PROGRAM} evaluate {directory}", flush=True)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    from pnode_dist.runs import directory as run_directory

    directory: Path = arguments.run_dir
    from pnode_dist.train.configured import configured

    config, found = configured(directory / run_directory.CONFIG, arguments.overrides)
    import torch

    from pnode_dist.train.run import build_problem, mesh_of

    with mesh_of(config) as mesh, output(arguments.json, mesh.is_root) as emit:
        problem = build_problem(config, mesh, found=found)
        run_directory.load_parameters(problem.model, directory / run_directory.MODEL)
        problem.model.eval()
        with torch.no_grad():
            result = problem.evaluate(problem.model, directory)
        run_directory.save_evaluation(directory, result, mesh)
        emit(result)
        if mesh.is_root and not arguments.json:
            show_table(result)
    return 0


def _status(arguments: argparse.Namespace) -> int:
    from pnode_dist.runs.status import follow, in_words, status_of, with_units

    def say(words: str) -> None:
        print(words, flush=True)

    if arguments.follow:
        for status in follow(arguments.run_dir):
            say(json_line(vars(status)) if arguments.json else in_words(status))
        return 0
    found = status_of(arguments.run_dir)
    if arguments.json:
        say(json_line(vars(found)))
    else:
        show_table(with_units(found))
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
