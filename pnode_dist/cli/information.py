"""The commands that list what is installed: methods, problems and doctor."""

from __future__ import annotations

import argparse
from pathlib import Path

from pnode_dist.cli.exit_codes import FAILED
from pnode_dist.cli.output import output, show_table
from pnode_dist.cli.parser import Commands, add_json
from pnode_dist.distributed.launcher import launched_rank
from pnode_dist.system.json_lines import json_line


def add_commands(commands: Commands) -> None:
    """Add the commands."""
    methods = commands.add("methods", "list the time-stepping methods", _methods, "--json", alone=True)
    problems = commands.add("problems", "list the problems that are installed", _problems, "--json", alone=True)
    doctor = commands.add(
        "doctor", "check what is installed and whether the ranks see each other", _doctor, "--json", (FAILED,)
    )
    for command in (methods, problems, doctor):
        add_json(command)


def _methods(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from pnode_dist.ode.methods import METHODS, adjoint_here

    rows = [{**asdict(method), "adjoint": adjoint_here(method)} for method in METHODS.values()]
    if launched_rank() == 0:
        if arguments.json:
            print(json_line({"methods": rows}))
        else:
            show_table({"methods": rows})
    return 0


def _problems(arguments: argparse.Namespace) -> int:
    from pnode_dist.config.registry import installed, resolve
    from pnode_dist.errors import ConfigurationError

    rows = []
    for name, entry in installed().items():
        try:
            description = resolve(name, Path()).definition.description
        except ConfigurationError as error:
            description = f"cannot be used: {error}"
        package = entry.dist.name if entry.dist is not None else entry.module.partition(".")[0]
        rows.append({"type": name, "package": package, "description": description})
    if launched_rank() == 0:
        if arguments.json:
            print(json_line({"problems": rows}))
        else:
            show_table({"problems": rows})
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from pnode_dist.cli.doctor import run_doctor

    with output(arguments.json, launched_rank() == 0) as emit:
        return run_doctor(arguments.json, emit)
