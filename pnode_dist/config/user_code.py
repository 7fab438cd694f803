"""Errors in a user's own module, as one line with file and line number.

`show_tracebacks` keeps the whole traceback, for `--traceback`.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pnode_dist.errors import ConfigurationError

_OWN = Path(__file__).parents[1]
_STANDARD = Path(sysconfig.get_paths()["stdlib"])
_INSTALLED = {"site-packages", "dist-packages"}
_shown = False


def show_tracebacks(shown: bool = True) -> None:
    """Let errors in a user's code pass with their tracebacks from now on."""
    global _shown
    _shown = shown


@contextmanager
def user_code(action: str, file: Path | None = None, name: str = "") -> Iterator[None]:
    """Turn an error in a user's code into a `ConfigurationError` of one line, which begins with file and line number.

    `file` is the user's module, where that is known: files beside it are the user's too, also among installed packages.
    An error that does not come through a file of the user's begins with `name` instead, and is not changed without one.
    """
    try:
        yield
    except (ConfigurationError, KeyboardInterrupt, SystemExit):
        raise
    except SyntaxError as error:
        if _shown:
            raise
        raise ConfigurationError(f"{error.filename}:{error.lineno}: SyntaxError: {error.msg} ({action})") from None
    except Exception as error:
        where = _place_of(error, file) or name
        if _shown or not where:
            raise
        text = " ".join(str(error).split())
        raise ConfigurationError(
            f"{where}: {type(error).__name__}{': ' if text else ''}{text} ({action}; --traceback shows the calls)"
        ) from None


def _place_of(error: BaseException, file: Path | None) -> str | None:
    """`file:line` of the innermost call in a user's file; None if there is none."""
    frames = [frame for frame in reversed(traceback.extract_tb(error.__traceback__)) if frame.filename[0] != "<"]
    for frame in frames:
        path = Path(frame.filename)
        is_beside = file is not None and path.is_relative_to(file.parent) and file.parent.name not in _INSTALLED
        if path == file or is_beside:
            return f"{frame.filename}:{frame.lineno}"
    for frame in frames:
        path = Path(frame.filename)
        # Environments may be nested, so libraries may lie in folders that are not this interpreter's.
        is_library = path.is_relative_to(_OWN) or path.is_relative_to(_STANDARD) or _INSTALLED & {*path.parts}
        if not is_library:
            return f"{frame.filename}:{frame.lineno}"
    return None
