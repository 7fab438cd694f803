"""The command serve."""

from __future__ import annotations

import argparse
from pathlib import Path

from pnode_dist.cli.exit_codes import FAILED
from pnode_dist.cli.parser import Commands, add_overrides
from pnode_dist.errors import ConfigurationError
from pnode_dist.system.abort import HUNG

_MIB = 2**20


def add_commands(commands: Commands) -> None:
    """Add the command."""
    serve = commands.add(
        "serve",
        "answer requests of UM-Bridge's clients for the models of a run, until SIGTERM",
        _serve,
        "runs/my --port 4242",
        (FAILED, HUNG),
    )
    serve.add_argument(
        "source", metavar="RUN_DIR|CONFIG", type=Path, help="a trained run, or a TOML file with its initial parameters"
    )
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen at (127.0.0.1)")
    serve.add_argument("--port", type=int, default=4242, help="the port to listen at (4242); 0: any that is free")
    serve.add_argument("--token-file", metavar="FILE", type=Path, help="a file with the token that requests must carry")
    serve.add_argument(
        "--insecure", action="store_true", help="let everybody who reaches the address send requests, without a token"
    )
    serve.add_argument("--waiting", metavar="N", type=int, default=64, help="how many requests may wait (64)")
    serve.add_argument(
        "--deadline", metavar="SECONDS", type=float, default=600.0, help="for one request (600); 0: none"
    )
    serve.add_argument("--max-body", metavar="MIB", type=int, default=16, help="the longest request (16)")
    serve.add_argument(
        "--url-file", metavar="FILE", type=Path, help="where the URL is written while requests are answered"
    )
    add_overrides(serve)


def _serve(arguments: argparse.Namespace) -> int:
    _check(arguments)
    import torch

    from pnode_dist.config.user_code import user_code
    from pnode_dist.runs.directory import CONFIG, MODEL, load_parameters
    from pnode_dist.train.configured import configured

    source: Path = arguments.source
    is_run = source.is_dir()
    config, found = configured(source / CONFIG if is_run else source, arguments.overrides)
    if config.mesh.data != 1:
        raise ConfigurationError(f"[mesh] data = {config.mesh.data}: must be 1: a service has no replicas")
    from pnode_dist.serve.listener import Limits
    from pnode_dist.serve.service import ServiceOptions, checked_models, serve
    from pnode_dist.train.run import build_problem, mesh_of

    options = ServiceOptions(
        arguments.host,
        arguments.port,
        arguments.token_file,
        arguments.insecure,
        arguments.waiting,
        Limits(body=arguments.max_body * _MIB, deadline=arguments.deadline),
        arguments.url_file,
    )
    with mesh_of(config) as mesh:
        # Inverse problems are posed in double precision.
        dtype = None if getattr(config, "inverse", None) is None else torch.float64
        problem = build_problem(config, mesh, dtype, found)
        if is_run:
            load_parameters(problem.model, source / MODEL)
        problem.model.eval()
        with user_code("in served()", found.file, "" if found.file is None else found.name):
            models = checked_models(problem.served(), problem.name)
        serve(models, mesh, options, config.run.hang_limit)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise `ConfigurationError` for a number that is out of its range."""
    for option, value, least, most in (
        ("--port", arguments.port, 0, 65535),
        ("--waiting", arguments.waiting, 1, 100_000),
        ("--deadline", arguments.deadline, 0, 10**7),
        ("--max-body", arguments.max_body, 1, 4096),
    ):
        # Written so that NaN is refused too.
        if not least <= value <= most:
            raise ConfigurationError(f"serve: {option} {value}: must be from {least} to {most}")
    if arguments.insecure and arguments.token_file is not None:
        raise ConfigurationError("serve: --insecure and --token-file: must be one of them")
