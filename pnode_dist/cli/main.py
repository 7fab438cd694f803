"""The command `pnode-dist`. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from pnode_dist.cli import benchmarks, checking, completion, configuration, information, inversion, serve, training
from pnode_dist.cli.ending import is_closed_pipe, leave_output, print_error, run_alone, run_together
from pnode_dist.cli.exit_codes import CLOSED_PIPE, WRONG_USAGE
from pnode_dist.cli.parser import EPILOG, PROGRAM, Command, Commands, Parser, formatter
from pnode_dist.config.user_code import show_tracebacks
from pnode_dist.distributed.launcher import launched_rank
from pnode_dist.errors import ConfigurationError
from pnode_dist.system.allocator import keep_freed_memory
from pnode_dist.system.compatibility import leave_closed_pipes_to_python


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code, one of `pnode_dist.cli.exit_codes`."""
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        if not is_closed_pipe(error):
            raise
        leave_output()
        return CLOSED_PIPE
    return code


def _run(argv: list[str]) -> int:
    own, petsc_options = _split(argv)
    try:
        arguments = parser().parse_args(own)
        _initialise_petsc(petsc_options)
    except ConfigurationError as error:
        if launched_rank() == 0:
            print_error(error)
        return WRONG_USAGE
    except SystemExit as end:  # --help and --version
        return int(end.code or 0)
    keep_freed_memory()
    show_tracebacks(getattr(arguments, "traceback", False))
    command: Command = arguments.command
    return (run_alone if arguments.alone else run_together)(command, arguments)


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
    # The PETSc of a binary wheel finds the MPI library only where mpi4py has loaded it.
    import mpi4py.MPI  # noqa: F401
    import petsc4py

    petsc4py.init([PROGRAM, *options])
    leave_closed_pipes_to_python()


def parser() -> Parser:
    """The parser of all commands."""
    from pnode_dist import __version__

    found = Parser(
        prog=PROGRAM,
        description="Train and check distributed neural ODEs.",
        epilog=f"{PROGRAM} COMMAND --help shows an example and the exit codes of a command.\n{EPILOG}",
        formatter_class=formatter,
    )
    found.set_defaults(parser=found)
    found.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = Commands(found)
    for group in (training, inversion, serve, checking, configuration, information, benchmarks, completion):
        group.add_commands(commands)
    return found


if __name__ == "__main__":
    sys.exit(main())
