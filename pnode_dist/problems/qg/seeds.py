"""Scores of several evaluated runs together: `python -m pnode_dist.problems.qg.seeds RUN_DIR [RUN_DIR ...]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.qg.scores import DISTRIBUTIONAL, SPECTRAL
from pnode_dist.runs.directory import EVALUATION

_LEARNT, _KEY, _MEAN = "model", "statistic", "mean"


def scores_of(directory: Path) -> Mapping[str, Mapping[str, float]]:
    """Return the scores of an evaluated run by closure and statistic.

    Raises `ConfigurationError` for a directory without an evaluation, and for one without scores.
    """
    try:
        rows = json.loads((directory / EVALUATION).read_text())["scores"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"{directory}: has no scores: evaluate it with [evaluation] free_run: {error}"
        ) from None
    if not rows or _LEARNT not in rows[0]:
        raise ConfigurationError(f"{directory}: has no scores: its free run blew up, or that without a closure did")
    return {name: {row[_KEY]: row[name] for row in rows} for name in rows[0] if name != _KEY}


def together(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Return a row for each statistic, and for the means of all distributions and of all spectra.

    It has the mean, the least and the largest score of the learnt closures, and the score of each published one in the
    first run that has it.
    """
    published: dict[str, Mapping[str, float]] = {}
    for run in runs:
        published = {name: values for name, values in run.items() if name != _LEARNT} | published
    rows = []
    for name, statistics in {
        **{name: (name,) for name in (*DISTRIBUTIONAL, *SPECTRAL)},
        "all distributions": DISTRIBUTIONAL,
        "all spectra": SPECTRAL,
    }.items():
        learnt = [fmean(run[_LEARNT][statistic] for statistic in statistics) for run in runs]
        others = {
            closure: fmean(values[statistic] for statistic in statistics) for closure, values in published.items()
        }
        rows.append({_KEY: name, _MEAN: fmean(learnt), "least": min(learnt), "largest": max(learnt), **others})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table in Markdown, and in how many statistics the mean is above the score of each published closure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dirs", metavar="RUN_DIR", type=Path, nargs="+", help="an evaluated run")
    try:
        rows = together([scores_of(directory) for directory in parser.parse_args(arguments).run_dirs])
    except ConfigurationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    for row in rows:
        print("|", " | ".join(f"{value:.2f}" if isinstance(value, float) else value for value in row.values()), "|")
    single = rows[: len(DISTRIBUTIONAL) + len(SPECTRAL)]
    for name in [name for name in rows[0] if name not in (_KEY, _MEAN, "least", "largest")]:
        better = sum(row[_MEAN] > row[name] for row in single)
        print(f"better than {name} in {better} of {len(single)} statistics")
    return 0


if __name__ == "__main__":
    sys.exit(main())
