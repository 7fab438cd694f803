"""The Python environment of diffrax, apart from this project's: JAX and torch need not agree on their packages.

It is made once in the user's cache, from pinned versions. `PNODE_DIST_PEERS_PYTHON` names an interpreter to use
instead.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pnode_dist.errors import ConfigurationError

PINS = (
    *("diffrax==0.7.2", "equinox==0.13.8", "jax==0.10.2", "jaxlib==0.10.2", "lineax==0.1.1", "optimistix==0.1.0"),
    "pyqg-jax==0.8.1",
)
VARIABLE = "PNODE_DIST_PEERS_PYTHON"
_TIMEOUT = 1200.0


def python_with_diffrax() -> Path:
    """Return an interpreter that imports diffrax; makes the environment if it is not there yet.

    Raises `ConfigurationError` with pip's last line if the packages cannot be installed.
    """
    if named := os.environ.get(VARIABLE):
        python = Path(named)
        found = subprocess.run([python, "-c", "import diffrax"], capture_output=True, text=True, check=False)
        if found.returncode:
            raise ConfigurationError(f"{VARIABLE} = {named}: {_last_line(found.stderr) or 'cannot import diffrax'}")
        return python
    key = hashlib.sha256("\n".join((*PINS, sys.version)).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pnode_dist"
    environment = cache / f"peers-{key}"
    if not (environment / "complete").exists():
        cache.mkdir(parents=True, exist_ok=True)
        _make(environment)
    return environment / "bin" / "python"


def _make(environment: Path) -> None:
    """Make the environment. A marker file is written last, so that one that was interrupted is made again."""
    shutil.rmtree(environment, ignore_errors=True)
    # The packages of an activated environment must not shine through.
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_CONSTRAINT")}
    python = environment / "bin" / "python"
    commands: list[list[str]] = [
        [sys.executable, "-m", "venv", str(environment)],
        [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--no-input", *PINS],
    ]
    with tempfile.TemporaryFile("w+") as said:
        for command in commands:
            made = subprocess.run(command, stdout=said, stderr=said, env=clean, timeout=_TIMEOUT, check=False)
            if made.returncode:
                said.seek(0)
                raise ConfigurationError(f"cannot install {', '.join(PINS)}: {_last_line(said.read())}")
    (environment / "complete").touch()


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
