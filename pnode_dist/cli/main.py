"""The command `pnode-dist`. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pnode_dist.cli import benchmarks, checking, information, training
from pnode_dist.cli.ending import complain, run_together
from pnode_dist.cli.parser import EPILOG, PROGRAM, WRONG_USAGE, Command, Commands, Parser
from pnode_dist.config.user_code import show_tracebacks
from pnode_dist.distributed.launcher import launched_rank
from pnode_dist.errors import ConfigurationError
from pnode_dist.system.allocator import keep_freed_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 2 for wrong usage or configuration, 1 for a check or run that failed,
    75 (EX_TEMPFAIL) for a run that was stopped and is to be started again."""
    own, petsc_options = _split(list(sys.argv[1:] if argv is None else argv))
    try:
        arguments = parser().parse_args(own)
        _initialise_petsc(petsc_options)
    except ConfigurationError as error:
        if launched_rank() == 0:
            complain(error)
        return WRONG_USAGE
    except SystemExit as end:  # --help and --version
        return int(end.code or 0)
    keep_freed_memory()
    show_tracebacks(getattr(arguments, "traceback", False))
    command: Command = arguments.command
    return command(arguments) if arguments.alone else run_together(command, arguments)


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


def parser() -> Parser:
    """The parser of all commands."""
    from pnode_dist import __version__

    found = Parser(prog=PROGRAM, description="Train and check distributed neural ODEs.", epilog=EPILOG)
    found.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = Commands(found)
    for group in (training, checking, information, benchmarks):
        group.add_commands(commands)
    return found


if __name__ == "__main__":
    sys.exit(main())
