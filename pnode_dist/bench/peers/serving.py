"""A worker's side of the comparison: solve on request, one JSON line for each. Imports NumPy alone.

Requests are `forward`, `gradient`, `reset`, `memory` and `save FILE`. The first two answer with processor seconds.
`memory` answers with the largest resident memory since `reset` above that before the first solve. `save` writes the
final state `end` and the gradients by name, of the last gradient.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, "np.typing.NDArray[Any]"]
Solved = tuple[Callable[[], object], Callable[[], Arrays]]
"""`forward()` computes the final state without a gradient; `gradient()` returns `end` and the gradients by name."""


def resident_bytes(key: str = "VmRSS") -> int:
    """Return the resident memory of this process, with `VmHWM` its largest since it was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return 0


def serve(prepare: Callable[[str, str], Solved]) -> None:
    """Answer requests for `sys.argv[1:]`: the name of a case, the name of a solver, and the core to run on.

    `prepare` is called with the two names.
    """
    case, solver, core = sys.argv[1:]
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.sched_setaffinity(0, {int(core)})

    def answer(**values: object) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    try:
        forward, gradient = prepare(case, solver)
        before = resident_bytes()
        last: Arrays = {}
        answer(ready=True)
        for line in sys.stdin:
            request, _, argument = line.strip().partition(" ")
            if request == "reset":
                Path("/proc/self/clear_refs").write_text("5")
                answer(reset=True)
            elif request == "memory":
                answer(bytes=resident_bytes("VmHWM") - before)
            elif request == "save":
                np.savez(argument, **last)  # type: ignore[arg-type]
                answer(saved=argument)
            else:
                began = time.process_time()
                if request == "gradient":
                    last = gradient()
                else:
                    forward()
                answer(seconds=time.process_time() - began)
    except Exception as error:
        traceback.print_exc()
        answer(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
