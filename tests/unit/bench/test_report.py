from __future__ import annotations

import io
import json

from rich.console import Console

from pnode_dist.bench.report import Check, Report, interleaved


def test_a_check_holds_up_to_and_at_its_target_and_not_for_what_is_no_number():
    assert Check("time", 1.0, 1.0).holds
    assert not Check("time", 1.0001, 1.0).holds
    assert not Check("time", float("nan"), 1.0).holds


def test_a_lower_bound_holds_at_its_target_and_above_and_never_for_nan():
    assert Check("speed-up", 1.8, 1.8, at_least=True).holds
    assert not Check("speed-up", 1.7999, 1.8, at_least=True).holds
    assert not Check("speed-up", float("nan"), 1.8, at_least=True).holds


def test_a_report_as_json_names_each_check_with_value_target_and_verdict():
    report = Report("speed", [{"case": "a", "seconds": 0.5}], [Check("time", 0.5, 1.0)], ("a note",))

    result = json.loads(json.dumps(report.as_dict()))

    assert result["checks"] == [{"name": "time", "value": 0.5, "target": 1.0, "at_least": False, "holds": True}]
    assert result["rows"] == [{"case": "a", "seconds": 0.5}]
    assert result["notes"] == ["a note"]
    assert {"processor", "cores", "ranks", "mpi_library", "versions"} <= result["machine"].keys()


def test_a_report_as_tables_shows_a_promise_that_was_not_kept():
    stream = io.StringIO()
    report = Report(
        "speed",
        [{"case": "a", "seconds": 0.5}],
        [Check("time", 1.5, 1.0), Check("speed-up", 2.5, 2.0, True)],
        ("a note",),
    )

    report.show(Console(file=stream, width=100))

    shown = stream.getvalue()
    assert "a note" in shown
    (line,) = (line for line in shown.splitlines() if "time" in line)
    assert "1.5" in line
    assert "<= 1" in line
    assert "NO" in line
    (line,) = (line for line in shown.splitlines() if "speed-up" in line)
    assert ">= 2" in line
    assert "yes" in line


def test_further_tables_are_shown_under_their_titles_and_are_in_the_json():
    stream = io.StringIO()
    report = Report("speed", [{"case": "a"}], [], further={"theory": [{"method": "b", "count": 7}], "empty": []})

    report.show(Console(file=stream, width=100))

    shown = stream.getvalue()
    assert "theory" in shown
    assert any("7" in line and "b" in line for line in shown.splitlines())
    assert "empty" not in shown
    assert report.as_dict()["further"] == {"theory": [{"method": "b", "count": 7}], "empty": []}


def test_candidates_are_run_in_turn():
    order = []
    candidates = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}

    assert interleaved(candidates, 3) == {"a": [1.0, 3.0, 5.0], "b": [2.0, 4.0, 6.0]}
    assert order == list("ababab")
