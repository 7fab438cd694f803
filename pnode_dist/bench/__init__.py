"""Benchmarks against peers. Each measures, compares and reports which of its targets are met."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pnode_dist.bench.report import Report

BENCHMARKS = {
    "gradient": "time and exactness of one gradient, against torchdiffeq (one rank)",
    "fft": "Fourier transforms of a partitioned field against torch's on one core (one or more ranks)",
    "halo": "messages and bytes of halo exchanges against the least (one or more ranks)",
    "implicit": "Newton and Krylov iterations with and without preconditioners (one rank), and on more ranks (several)",
    "semi-implicit": "semi-implicit against explicit steps on a stiff equation: their sizes and an epoch (one rank)",
    "methods": "both of the PNODE paper's experiments with every method they compare (one rank)",
    "trajectory": "cost of keeping and recomputing trajectories (one rank), and of a very long one (several)",
    "overhead": "what a solver takes beyond the work on f, against torchdiffeq and torchode (one rank)",
    "precision": "f in float64, float32 and bfloat16: seconds and gradient errors (one rank)",
    "scaling": "strong and weak scaling of a training step, and a projection to more ranks (one or more ranks)",
    "training": "an optimiser step of CONFIG with each way to keep its trajectory (one or more ranks)",
    "peers": "forward passes and gradients against torchdiffeq, torchode, plain torch and diffrax (one rank)",
    "serve": "a resident service under load, against a job of MPI for each request (one rank, which starts two)",
    "sync": "time to sum gradients over ranks, mpi against gloo (several ranks)",
}
DRAWN = ("halo", "methods", "overhead", "peers", "precision", "scaling", "sync")
"""Benchmarks with a plot."""


CONFIGURED = ("training",)
"""Benchmarks of a configured problem."""


FULL = ("methods",)
"""Benchmarks that can also run at the problem sizes of the paper they reproduce."""


SELECTED = ("peers",)
"""Benchmarks of which some cases can be chosen."""


def module(name: str) -> ModuleType:
    """Import the module whose `run` is the benchmark `name`."""
    place = f"{name}.run" if name in ("methods", "peers") else name.replace("-", "_")
    return import_module(f"pnode_dist.bench.{place}")


def run(name: str, full: bool = False, cases: Sequence[str] | None = None) -> Report:
    """Run a benchmark by name, with `full` in full size (only those in `FULL`), or some `cases` (those in `SELECTED`).

    Collective on the world.
    Raises `ConfigurationError` if the benchmark does not support this number of ranks or a peer is not installed.
    """
    benchmark = module(name)
    choices: dict[str, Any] = {"full": True} if full else {}
    if cases is not None:
        choices["cases"] = cases
    report: Report = benchmark.run(**choices)
    return report
