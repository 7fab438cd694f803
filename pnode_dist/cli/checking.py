"""The commands that check and plan: gradcheck and plan."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pnode_dist.cli.exit_codes import FAILED
from pnode_dist.cli.output import output, show_table
from pnode_dist.cli.parser import PROGRAM, Commands, add_json, add_overrides
from pnode_dist.errors import ConfigurationError
from pnode_dist.system.abort import HUNG

if TYPE_CHECKING:
    from pnode_dist.verify.gradcheck import GradcheckResult


def add_commands(commands: Commands) -> None:
    """Add the commands."""
    gradcheck = commands.add(
        "gradcheck",
        "check the gradient of a configuration against finite differences",
        _gradcheck,
        "my.toml --set mesh.data=2",
        (FAILED, HUNG),
    )
    gradcheck.add_argument("config", metavar="CONFIG", nargs="?", help="a TOML file")
    gradcheck.add_argument("--all-methods", action="store_true", help="check every method on a small problem instead")
    plan = commands.add(
        "plan",
        "predict the time and memory of a solve and its adjoint",
        _plan,
        "my.toml --ram 64MiB --disk 1GiB",
        (FAILED, HUNG),
    )
    plan.add_argument("config", metavar="CONFIG", help="a TOML file")
    plan.add_argument("--ram", metavar="SIZE", help="instead of [trajectory] ram, such as 64MiB or auto")
    plan.add_argument("--disk", metavar="SIZE", help="instead of [trajectory] disk")
    plan.add_argument("--measure", action="store_true", help="also run every candidate and measure it")
    plan.add_argument(
        "--sweep", action="store_true", help="plan for budgets of all sizes, and draw time against memory"
    )
    plan.add_argument("--plot", metavar="FILE", type=Path, default=Path("plan.png"), help="where --sweep draws")
    for command in (gradcheck, plan):
        add_overrides(command)
        add_json(command)


def _gradcheck(arguments: argparse.Namespace) -> int:
    if arguments.all_methods:
        return _check_methods(arguments)
    if arguments.config is None:
        raise ConfigurationError("gradcheck: needs a CONFIG, or --all-methods")
    from pnode_dist.train.configured import configured

    config, found = configured(arguments.config, arguments.overrides)
    import torch

    from pnode_dist.train.run import build_problem, mesh_of
    from pnode_dist.verify.gradcheck import gradcheck

    with mesh_of(config) as mesh, output(arguments.json, mesh.is_root) as emit:
        # Differences say nothing about a gradient in lower precision.
        solver = config.solver.model_copy(update={"compute_dtype": None, "state_dtype": "auto"})
        problem = build_problem(config.model_copy(update={"solver": solver}), mesh, torch.float64, found)
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
    from pnode_dist.train.configured import configured

    config, found = configured(arguments.config, overrides)
    # A size on the command line stands above a number of checkpoints in the file.
    config = config.model_copy(update={"trajectory": config.trajectory.model_copy(update=slots)})

    from pnode_dist.ode import planning
    from pnode_dist.report.picture import draw
    from pnode_dist.train.run import build_problem, mesh_of

    with mesh_of(config) as mesh, output(arguments.json, mesh.is_root) as emit:
        case = build_problem(config, mesh, found=found, planned=True).solve_case()
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
