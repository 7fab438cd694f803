"""The command of inverse problems: invert."""

from __future__ import annotations

import argparse
import json
import sys

from pnode_dist.cli.exit_codes import FAILED, PREEMPTED
from pnode_dist.cli.output import output, show_table
from pnode_dist.cli.parser import PROGRAM, Commands, add_json, add_overrides
from pnode_dist.system.abort import HUNG


def add_commands(commands: Commands) -> None:
    """Add the command."""
    invert = commands.add(
        "invert",
        "fit what a problem inverts for, such as an initial state, to observations",
        _invert,
        "my.toml --set inverse.iterations=50",
        (FAILED, HUNG, PREEMPTED),
    )
    invert.add_argument("config", metavar="CONFIG", help="a TOML file with a table [inverse]")
    invert.add_argument("--run-dir", metavar="DIR", help="where the run's files go, instead of [run] directory")
    invert.add_argument("--overwrite", action="store_true", help="replace the files of an earlier run there")
    invert.add_argument(
        "--resume",
        choices=("auto", "no"),
        metavar="auto|no",
        default="no",
        help="go on from the evaluations in the run directory, if there are any",
    )
    add_overrides(invert)
    add_json(invert)


def _invert(arguments: argparse.Namespace) -> int:
    overrides = list(arguments.overrides)
    if arguments.run_dir is not None:
        overrides.append(f"run.directory={json.dumps(arguments.run_dir)}")
    from pnode_dist.train.configured import configured

    config, found = configured(arguments.config, overrides)
    from mpi4py import MPI

    from pnode_dist.train.inversion import invert

    is_first = MPI.COMM_WORLD.rank == 0
    with output(arguments.json, is_first) as emit:
        outcome = invert(config, found, arguments.resume == "auto", arguments.overwrite)
        emit({**outcome.figures, "seconds": outcome.seconds})
        if is_first and not arguments.json:
            show_table({name: value for name, value in outcome.figures.items() if name != "eigenvalues"})
    minimum = outcome.minimum
    if not minimum.converged and is_first:
        print(f"{PROGRAM}: after {minimum.iterations} iterations {minimum.reason}", file=sys.stderr, flush=True)
    return 0 if minimum.converged or outcome.reached_the_limit else FAILED
