"""The pictures of benchmarks show what the rows say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from pnode_dist.bench import DRAWN, plots
from pnode_dist.bench.report import Report, Row

NAN = math.nan


def overhead(problem: str, solver: str, keeps: str, forward: float, adjoint: float) -> Row:
    return {
        "problem": problem,
        "solver": solver,
        "keeps": keeps,
        "forward": forward,
        "f": 5.0,
        "overhead": forward - 5.0,
        "adjoint": adjoint,
        "f, grad": NAN if math.isnan(adjoint) else 20.0,
        "adjoint overhead": adjoint - 20.0,
        "a solve": 100.0,
    }


def scaling(what: str, ranks: int, seconds: float, measured: bool = True) -> Row:
    part = seconds / 10 if measured else NAN
    return {
        "what": what,
        "ranks": ranks,
        "grid": "64x64",
        "seconds": seconds,
        "work": 8 * part,
        "halo": part,
        "sum": part,
        "speed-up": 4.0 / seconds,
        "efficiency": 4.0 / seconds / ranks,
        "predicted": seconds,
    }


def gradient(method: str, steps: int, milliseconds: float, mebibytes: float) -> Row:
    cell: Row = {"experiment": "images", "solver": "rk4", "steps": steps}
    return cell | {"method": method, "ms": milliseconds, "MiB": mebibytes}


ROWS: dict[str, list[Row]] = {
    "methods": [
        gradient("NODE-naive", 2, 10.0, 4.0),
        gradient("solution", 2, 14.0, 3.0),
        gradient("NODE-naive", 4, 20.0, 8.0),
        gradient("solution", 4, 28.0, 3.5),
    ],
    "overhead": [
        overhead("decay", "pnode_dist", "nothing", 9.0, NAN),
        overhead("decay", "pnode_dist", "graph", 12.0, 31.0),
        overhead("decay", "torchdiffeq", "graph", 19.0, 15.0),
    ],
    "halo": [
        {"grid": "8x8x2 f64 zero, zero", "width": 1, "ranks": "2x1", "bytes": 2048, "bytes back": 2048, "least": 1024}
        | {"us": 100.0, "us back": 200.0}
    ],
    "scaling": [
        scaling("strong", 1, 4.0),
        scaling("strong", 2, 2.2),
        scaling("weak", 1, 2.0),
        scaling("weak", 2, 2.2),
        scaling("no messages", 2, 2.1, measured=False),
        scaling("projected strong", 4, 1.2),
        scaling("projected strong", 16, 0.5),
        scaling("projected weak", 4, 2.3),
        scaling("projected weak", 16, 2.3),
    ],
    "peers": [
        {"case": "tiny", "solver": "pnode_dist", "forward": 1.0, "gradient": 3.0},
        {"case": "tiny", "solver": "diffrax", "forward": 2.0, "gradient": 4.0},
        {"case": "long", "solver": "pnode_dist", "forward": 5.0, "gradient": 6.0},
    ],
    "precision": [
        {"f in": "float64", "grid": "64x64", "seconds": 9.0, "times as fast": 1.0, "gradient error": 0.0},
        {"f in": "float32", "grid": "64x64", "seconds": 1.0, "times as fast": 9.0, "gradient error": 1e-5},
    ],
    "sync": [{"floats": 1000, "mpi": 1e-4, "gloo": 2e-3, "over_gloo": 0.05}],
}


def lengths(figure: Figure, panel: int) -> list[float]:
    return [bar.get_width() for bar in figure.axes[panel].patches]


def drawn(name: str, rows: list[Row] | None = None) -> Figure:
    figure = Figure()
    plots.DRAWINGS[name][0](figure, Report(name, ROWS[name] if rows is None else rows, []))
    return figure


@pytest.mark.parametrize("name", DRAWN)
def test_every_benchmark_that_is_said_to_have_a_picture_is_drawn(name: str, tmp_path: Path) -> None:
    path = tmp_path / "new" / f"{name}.png"
    plots.draw_bench(path, Report(name, ROWS[name], []))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert set(DRAWN) == set(plots.DRAWINGS)


def test_bars_of_overheads_begin_where_the_work_ends() -> None:
    figure = drawn("overhead")
    assert lengths(figure, 0) == [5.0, 5.0, 5.0, 4.0, 7.0, 14.0]
    assert [bar.get_x() for bar in figure.axes[0].patches[3:]] == [5.0] * 3
    assert lengths(figure, 1) == [20.0, 20.0, 11.0, 0.0]


def test_bars_of_peers_are_gradients_and_forward_passes_a_panel_for_each_case() -> None:
    figure = drawn("peers")
    assert [axis.get_title() for axis in figure.axes] == ["tiny", "long"]
    assert lengths(figure, 0) == [3.0, 4.0, 1.0, 2.0]
    assert lengths(figure, 1) == [6.0, 5.0]


def test_bars_of_halos_are_bytes_and_milliseconds() -> None:
    figure = drawn("halo")
    assert lengths(figure, 0) == [2.0, 2.0, 1.0]
    assert lengths(figure, 1) == [0.1, 0.2]


def test_bars_of_a_training_step_add_up_and_lines_go_through_the_projection() -> None:
    figure = drawn("scaling")
    bars = lengths(figure, 0)
    parts = [sum(bars[number:9:3]) for number in range(3)]
    assert parts == pytest.approx([4.0, 2.2, 0.0])
    assert bars[9:] == [0.0, 0.0, 2.1]
    ideal, model, measured = figure.axes[1].lines
    assert list(ideal.get_ydata()) == [1.0, 2.0, 4.0, 16.0]
    assert list(model.get_ydata()) == pytest.approx([1.0, 4.0 / 2.2, 4.0 / 1.2, 8.0])
    assert list(measured.get_ydata()) == pytest.approx([1.0, 4.0 / 2.2])


def test_a_training_step_on_one_rank_has_no_projection() -> None:
    assert len(drawn("scaling", [scaling("strong", 1, 4.0), scaling("weak", 1, 4.0)]).axes) == 1


def test_bars_of_precisions_and_sums_are_those_of_the_rows() -> None:
    assert lengths(drawn("precision"), 0) == [9.0, 1.0]
    assert lengths(drawn("precision"), 1) == [0.0, 1e-5]
    assert lengths(drawn("sync"), 0) == [0.1, 2.0]


def test_lines_of_methods_are_memory_and_time_against_steps() -> None:
    memory, time = drawn("methods").axes
    (naive, ours), (slow, slower) = memory.lines, time.lines
    assert [list(line.get_xdata()) for line in (naive, ours, slow, slower)] == [[2, 4]] * 4
    assert [list(line.get_ydata()) for line in (naive, ours)] == [[4.0, 8.0], [3.0, 3.5]]
    assert [list(line.get_ydata()) for line in (slow, slower)] == [[10.0, 20.0], [14.0, 28.0]]
