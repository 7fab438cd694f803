"""One self-contained HTML page of a run: key values, curves, the evaluation, the configuration and the versions.

The page loads no external resources and escapes all content of the run's files, so it can be mailed and archived.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pnode_dist.errors import ConfigurationError
from pnode_dist.report.run_curves import as_svg, pictures
from pnode_dist.report.turns import write_failure
from pnode_dist.runs import directory as run_directory
from pnode_dist.runs import metrics

_MEBIBYTE = 2**20


def write_page(directory: Path, page: Path | None = None) -> Path:
    """Write the page of the run in `directory`, by default as its `report.html`, and return the path of the page.

    Works also on a run in training, and on a run without an evaluation.

    Raises `ConfigurationError` for a directory that is not a run's, and for a page that cannot be written. Call on one
    process.
    """
    page = page or directory / run_directory.PAGE
    html = _html(directory)
    try:
        page.write_text(html, encoding="utf-8")
    except OSError as error:
        raise write_failure(page, error) from None
    return page


def _html(directory: Path) -> str:
    config = _text(directory / run_directory.CONFIG)
    if config is None:
        raise ConfigurationError(f"{directory}: is not a run directory: there is no {run_directory.CONFIG} in it")
    versions = json.loads(_text(directory / run_directory.VERSIONS) or "{}")
    evaluation = json.loads(_text(directory / run_directory.EVALUATION) or "{}")
    metrics_file = directory / run_directory.METRICS
    records = list(metrics.read(metrics_file)) if metrics_file.exists() else []
    picture = directory / run_directory.FORECAST_PICTURE
    environment = Environment(
        loader=PackageLoader("pnode_dist.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["figure"] = figure
    return environment.get_template("run_page.html").render(
        name=directory.resolve().name,
        summary=summary(records, versions),
        curves=[_data_url(as_svg(found), "svg+xml") for found in pictures(records)],
        forecast=_data_url(picture.read_bytes(), "png") if picture.exists() else None,
        figures={key: value for key, value in evaluation.items() if not _is_table(value)},
        tables={key: value for key, value in evaluation.items() if _is_table(value)},
        config=config,
        packages=versions.pop("packages", {}),
        versions=versions,
    )


def summary(records: Sequence[dict[str, Any]], versions: dict[str, Any]) -> dict[str, Any]:
    """Return the values at the head of the page, by name."""
    steps = [record for record in records if record["kind"] == "step"]
    checks = [record for record in records if record["kind"] == "validation"]
    found: dict[str, Any] = {}
    if versions:
        found["started"] = versions["started"]
        found["ranks"] = f"{versions['ranks']} on {len(set(versions['hosts']))} host(s)"
    if steps:
        last = steps[-1]
        found |= {"steps": last["step"], "epochs": last["epoch"], "training took": f"{last['wall_time']:.1f} s"}
        found["last loss"] = last["loss"]
        found["memory of the largest rank"] = f"{last['peak_memory'] / _MEBIBYTE:.0f} MiB"
        found["spilt to disk"] = f"{sum(step['bytes_written'] for step in steps) / _MEBIBYTE:.0f} MiB"
    if checks:
        name, value = next(iter(checks[-1]["figures"].items()))
        found[name.replace("_", " ")] = f"{figure(value)} {checks[-1]['units']}".rstrip()
    return found


def figure(value: Any) -> str:
    """Return a value as text for the page."""
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')}: {figure(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(figure(entry) for entry in value)
    return "-" if value is None else str(value)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from None


def _data_url(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
