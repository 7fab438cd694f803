"""The command bench."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pnode_dist.bench import BENCHMARKS, CONFIGURED, DRAWN, FULL, SELECTED
from pnode_dist.cli.ending import is_first
from pnode_dist.cli.exit_codes import FAILED
from pnode_dist.cli.output import console, output, show_table
from pnode_dist.cli.parser import Commands, add_json, add_overrides
from pnode_dist.errors import ConfigurationError

if TYPE_CHECKING:
    from pnode_dist.bench.report import Report


def add_commands(commands: Commands) -> None:
    """Add the command."""
    bench = commands.add("bench", "measure against peers: " + ", ".join(BENCHMARKS), _bench, "gradient", (FAILED,))
    bench.add_argument("name", metavar="NAME", choices=list(BENCHMARKS), help=" | ".join(BENCHMARKS))
    bench.add_argument("config", metavar="CONFIG", nargs="?", help=f"a TOML file ({', '.join(CONFIGURED)})")
    bench.add_argument("--plot", metavar="FILE", type=Path, help=f"also draw it ({', '.join(DRAWN)})")
    bench.add_argument("--full", action="store_true", help=f"in the sizes of the paper, for hours ({', '.join(FULL)})")
    bench.add_argument(
        "--cases", metavar="CASE,...", help=f"only these cases, separated by commas ({', '.join(SELECTED)})"
    )
    add_overrides(bench)
    add_json(bench)


def _bench(arguments: argparse.Namespace) -> int:
    from mpi4py import MPI

    from pnode_dist.bench import run

    first = is_first(MPI.COMM_WORLD)
    if arguments.plot is not None and arguments.name not in DRAWN:
        raise ConfigurationError(f"bench {arguments.name} --plot: has no picture: must be one of {', '.join(DRAWN)}")
    if arguments.full and arguments.name not in FULL:
        raise ConfigurationError(f"bench {arguments.name} --full: has one size: must be one of {', '.join(FULL)}")
    if arguments.cases is not None and arguments.name not in SELECTED:
        raise ConfigurationError(
            f"bench {arguments.name} --cases: has no cases to choose: must be one of {', '.join(SELECTED)}"
        )
    cases = None if arguments.cases is None else [name.strip() for name in arguments.cases.split(",")]
    is_configured = arguments.name in CONFIGURED
    if is_configured and arguments.config is None:
        raise ConfigurationError(f"bench {arguments.name}: needs a CONFIG")
    if not is_configured and (arguments.config is not None or arguments.overrides):
        raise ConfigurationError(f"bench {arguments.name}: has a problem of its own: takes no CONFIG and no --set")
    with output(arguments.json, first) as emit:
        report = _of_problem(arguments) if is_configured else run(arguments.name, arguments.full, cases)
        result = report.as_dict()
        if arguments.plot is not None:
            result["plot"] = _bench_plot(arguments.plot, report)
        emit(result)
        if first and not arguments.json:
            report.show(console())
            if arguments.plot is not None:
                show_table({"plot": result["plot"]})
    return 0


def _of_problem(arguments: argparse.Namespace) -> Report:
    """The benchmark of the configured problem. Collective on the world."""
    from pnode_dist.bench import training
    from pnode_dist.train.configured import configured

    config, found = configured(arguments.config, arguments.overrides)
    return training.run(config, found)


def _bench_plot(path: Path, report: Report) -> str:
    """Draw a benchmark; what to say of it. Collective on the world."""
    from pnode_dist.distributed.mesh import Mesh
    from pnode_dist.report.picture import draw

    def drawing(path: Path) -> None:
        from pnode_dist.bench.plots import draw_bench

        draw_bench(path, report)

    with Mesh() as mesh:
        return draw(path, drawing, mesh)
