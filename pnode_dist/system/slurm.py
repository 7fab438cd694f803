"""The end of the Slurm job of a run."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from datetime import datetime

_PATIENCE = 20.0


def job_end(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return the end of the job in seconds since the epoch. None outside Slurm, without a limit, or without an answer.

    Slurm sets SLURM_JOB_END_TIME since version 22.05 where it is configured to; otherwise `scontrol` is asked.
    """
    job = environment.get("SLURM_JOB_ID", "")
    if not job.isdigit():
        return None
    end = environment.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        return float(end)
    command = ["scontrol", "--oneliner", "show", "job", job]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\bEndTime=(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", asked.stdout)
    # Slurm gives local time here.
    return None if found is None else datetime.fromisoformat(found.group(1)).timestamp()
