from __future__ import annotations

import io

from rich.console import Console

from pnode_dist.train.progress import BarReporter, EpochSummary, LineReporter, SilentReporter, reporter


def summary(epoch: int, validation=None) -> EpochSummary:
    return EpochSummary(epoch, 10, 0.5, 2.0, 4.0, validation, "K")


def test_lines_come_as_often_as_asked_at_both_ends_and_at_every_validation():
    stream = io.StringIO()
    lines = LineReporter(stream, every=4)
    for epoch in range(1, 11):
        lines.epoch(summary(epoch, ("rmse", 0.25) if epoch == 6 else None))

    shown = stream.getvalue().splitlines()
    assert [line.split("  ")[0] for line in shown] == [f"epoch {n}/10" for n in (1, 4, 6, 8, 10)]
    assert shown[2] == "epoch 6/10  loss 0.5  rmse 0.25 K  2.00 s/epoch  4 steps/s"


def test_a_bar_counts_epochs_and_keeps_validation_figures_above_it():
    stream = io.StringIO()
    with BarReporter(Console(file=stream, force_terminal=True, width=140), epochs=10) as bar:
        bar.epoch(summary(3, ("rmse_3_months", 0.25)))

    assert "3/10" in stream.getvalue()
    assert "epoch 3/10  loss 0.5  rmse 3 months 0.25 K" in stream.getvalue()


def test_only_the_first_rank_shows_anything(capfd):
    with reporter(shown=False, epochs=10, every=1) as report:
        report.epoch(summary(1))
        assert isinstance(report, SilentReporter)
    assert capfd.readouterr() == ("", "")


def test_output_that_is_no_terminal_gets_plain_lines_on_standard_error(capsys):
    with reporter(shown=True, epochs=10, every=1) as report:
        report.epoch(summary(1))

    out, err = capsys.readouterr()
    assert out == ""
    assert err == "epoch 1/10  loss 0.5  2.00 s/epoch  4 steps/s\n"
