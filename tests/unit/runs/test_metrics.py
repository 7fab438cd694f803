from __future__ import annotations

import json
import math

import numpy as np

from pnode_dist.runs.metrics import MetricsFile, ValidationRecord, peak_memory, read


def validation(figure: float) -> ValidationRecord:
    return ValidationRecord(step=3, epoch=1, wall_time=0.5, units="K", figures={"rmse": figure})


def test_a_record_can_be_read_before_the_file_is_closed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path) as metrics:
        metrics.write(validation(0.25))
        assert json.loads(path.read_text()) == {
            "kind": "validation",
            "step": 3,
            "epoch": 1,
            "wall_time": 0.5,
            "units": "K",
            "figures": {"rmse": 0.25},
        }


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
        metrics.write(validation(math.nan))

    (record,) = read(tmp_path / "metrics.jsonl")
    assert record["figures"] == {"rmse": None}


def test_a_line_that_was_cut_off_is_left_out_when_reading(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')

    assert [record["step"] for record in read(path)] == [1, 2]


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with MetricsFile(None) as metrics:
        metrics.write(validation(1.0))

    assert list(tmp_path.iterdir()) == []


def test_peak_memory_counts_bytes_that_were_touched():
    before = peak_memory()
    # More than the peak so far, wherever that came from.
    block = np.ones(before + 64 * 2**20, dtype=np.uint8)

    assert peak_memory() - before >= 60 * 2**20
    assert block[-1] == 1
