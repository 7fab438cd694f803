"""The commands on one rank; wrong ones are in test_wrong_configurations.py, several ranks in test_cli_mpi.py."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pnode_dist import __version__
from pnode_dist.bench.report import Check, Report
from pnode_dist.cli.main import main
from pnode_dist.ode.methods import METHODS


def run_json(capfd, *argv):
    code = main([*map(str, argv), "--json"])
    out, err = capfd.readouterr()
    assert out.count("\n") == 1
    return code, json.loads(out), err


def test_train_then_evaluate_leaves_the_files_of_a_run(config_file, tmp_path, capfd):
    assert main(["train", str(config_file), "--set", "run.tensorboard=true"]) == 0
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
    out, err = capfd.readouterr()
    assert out.splitlines()[-1] == f"next: pnode-dist evaluate {tmp_path / 'run'}"
    assert "epoch 2/2" in err

    code, result, err = run_json(capfd, "evaluate", tmp_path / "run")

    assert (code, err) == (0, "")
    assert [row["lead"] for row in result["rmse"]] == [1, 2, 3]
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "config.toml",
        "versions.json",
        "metrics.jsonl",
        "model.pt",
        "forecast.h5",
    }
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == result
    validations = [
        record
        for record in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        if record["kind"] == "validation"
    ]
    # The model that was saved is the one that was validated last.
    assert validations[-1]["figures"]["lead_3"] == pytest.approx(result["rmse"][2]["model"], rel=1e-12)


def test_report_writes_a_page_of_a_run(config_file, tmp_path, capfd):
    main(["train", str(config_file), "--set", "training.epochs=1"])
    capfd.readouterr()

    assert main(["report", str(tmp_path / "run")]) == 0

    out, _ = capfd.readouterr()
    assert out == f"page: {tmp_path / 'run' / 'report.html'}\n"
    assert "<h2>Training</h2>" in (tmp_path / "run" / "report.html").read_text()


def test_report_refuses_what_is_no_run(tmp_path, capfd):
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run directory" in capfd.readouterr().err


def test_evaluate_prints_a_table_for_people(config_file, tmp_path, capfd):
    main(["train", str(config_file), "--set", "training.epochs=1"])
    capfd.readouterr()

    assert main(["evaluate", str(tmp_path / "run")]) == 0

    out, _ = capfd.readouterr()
    assert "variable: sst" in out
    assert "anomaly persistence" in out


def test_overwrite_trains_again_where_a_run_was(config_file, tmp_path, capfd):
    main(["train", str(config_file), "--set", "training.epochs=1"])
    (tmp_path / "run" / "notes.txt").write_text("mine")

    assert main(["train", str(config_file), "--set", "training.epochs=2", "--overwrite"]) == 0

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(line)["epoch"] for line in lines} == {1, 2}
    assert json.loads(lines[0])["step"] == 1
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_run_dir_is_put_over_the_configured_directory(config_file, tmp_path):
    elsewhere = tmp_path / 'else "where"'
    assert main(["train", str(config_file), "--set", "training.epochs=1", "--run-dir", str(elsewhere)]) == 0

    assert (elsewhere / "model.pt").is_file()
    assert not (tmp_path / "run").exists()


def test_the_gradient_check_of_a_field_passes_and_its_json_is_complete(config_file, capfd):
    code, result, err = run_json(capfd, "gradcheck", config_file)

    assert (code, err) == (0, "")
    assert result.keys() >= {
        "loss",
        "gradient_norm",
        "adjoint_derivative",
        "finite_difference",
        "relative_error",
        "taylor_orders",
        "ranks",
    }
    assert result["relative_error"] <= 1e-7
    assert all(1.9 <= order <= 2.1 for order in result["taylor_orders"])
    assert result["failures"] == []


@pytest.mark.nightly
def test_loss_and_gradient_norm_do_not_depend_on_the_number_of_ranks(config_file, mpirun, capfd):
    _, alone, _ = run_json(capfd, "gradcheck", config_file)

    ran = mpirun(2, sys.executable, "-m", "pnode_dist.cli.main", "gradcheck", str(config_file), "--json")

    assert ran.returncode == 0
    # What the launcher says where there are more ranks than cores is its own affair.
    assert [line for line in ran.stderr.splitlines() if not line.startswith("mpirun.sh: ")] == []
    spread = json.loads(ran.stdout)
    assert (alone["ranks"], spread["ranks"]) == (1, 2)
    for figure in ("loss", "gradient_norm"):
        assert spread[figure] == pytest.approx(alone[figure], rel=1e-12)
    # The direction, too, is the same one.
    assert spread["adjoint_derivative"] == pytest.approx(alone["adjoint_derivative"], rel=1e-9)
    assert spread["relative_error"] <= 1e-7


def test_the_gradient_check_prints_its_taylor_test_as_a_table(config_file, capfd):
    assert main(["gradcheck", str(config_file)]) == 0

    out, err = capfd.readouterr()
    assert "relative error:" in out
    assert "taylor test" in out
    assert err == ""


def test_a_gradient_that_is_wrong_ends_the_check_with_code_1_and_says_why(config_file, capfd, monkeypatch):
    from pnode_dist.problems.field.problem import FieldProblem

    honest = FieldProblem.gradcheck_case

    def spoilt(problem):
        case = honest(problem)

        # The checked loss is another one than the one that is differentiated.
        def loss(state):
            value = case.loss(state)
            return value if value.requires_grad else value * 1.5

        return type(case)(case.state, loss, case.parameters, case.partition)

    monkeypatch.setattr(FieldProblem, "gradcheck_case", spoilt)
    code, result, err = run_json(capfd, "gradcheck", config_file)

    assert code == 1
    assert err.startswith("pnode-dist: the gradient is wrong: relative_error = ")
    assert len(result["failures"]) == len(err.splitlines())


def test_a_loss_that_diverges_ends_with_code_1_and_one_line_naming_the_step(config_file, capfd):
    code = main(["train", str(config_file), "--set", "training.learning_rate=1e20", "--set", "training.dtype=float32"])

    out, err = capfd.readouterr()
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith("pnode-dist: error: step ")
    assert "try a smaller learning_rate" in line


def test_methods_lists_every_method(capfd):
    code, result, _ = run_json(capfd, "methods")

    assert code == 0
    assert [row["name"] for row in result["methods"]] == list(METHODS)
    assert {"petsc_name", "order", "stages"} <= result["methods"][0].keys()


def test_a_benchmark_reports_its_checks_as_json_and_as_a_table(capfd, monkeypatch):
    report = Report("sync", [{"floats": 10, "mpi": 0.5}], [Check("time", 0.5, 1.0), Check("error", 2.0, 1.0)])
    monkeypatch.setattr("pnode_dist.bench.run", lambda name, full, cases: report)

    code, result, _ = run_json(capfd, "bench", "sync")

    assert code == 0
    assert result["checks"] == [
        {"name": "time", "value": 0.5, "target": 1.0, "at_least": False, "holds": True},
        {"name": "error", "value": 2.0, "target": 1.0, "at_least": False, "holds": False},
    ]
    assert main(["bench", "sync"]) == 0
    assert "NO" in capfd.readouterr().out


def test_a_benchmark_is_drawn_where_it_is_asked_to(capfd, monkeypatch, tmp_path):
    report = Report("sync", [{"floats": 10, "mpi": 0.5, "gloo": 0.6}], [])
    monkeypatch.setattr("pnode_dist.bench.run", lambda name, full, cases: report)
    path = tmp_path / "plots" / "sync.png"

    code, result, _ = run_json(capfd, "bench", "sync", "--plot", path)

    assert (code, result["plot"]) == (0, str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_benchmark_runs_in_full_size_or_in_some_cases_where_it_has_them(capfd, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "pnode_dist.bench.run", lambda name, *given: asked.append(given) or Report(name, [{"a": 1}], [])
    )

    assert [main(["bench", "methods", *given]) for given in ([], ["--full"])] == [0, 0]
    assert main(["bench", "peers", "--cases", "tiny, stiff euler"]) == 0
    assert asked == [(False, None), (True, None), (False, ["tiny", "stiff euler"])]
    capfd.readouterr()
    assert main(["bench", "sync", "--full"]) == 2
    assert "bench sync --full: has one size: must be one of methods" in capfd.readouterr().err
    assert main(["bench", "sync", "--cases", "tiny"]) == 2
    assert "bench sync --cases: has no cases to choose: must be one of peers" in capfd.readouterr().err


def test_what_libraries_print_does_not_reach_the_json_output(capfd, monkeypatch):
    import ctypes

    def run(name, full, cases):
        print("from Python")
        ctypes.CDLL(None).puts(b"from C")
        return Report("sync", [{"floats": 10}], [])

    monkeypatch.setattr("pnode_dist.bench.run", run)
    code, result, err = run_json(capfd, "bench", "sync")

    assert (code, result["name"]) == (0, "sync")
    assert sorted(err.splitlines()) == ["from C", "from Python"]


def test_version_and_help_end_with_code_0(capfd):
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"pnode-dist {__version__}\n"
    assert main(["train", "--help"]) == 0
    assert "--overwrite" in capfd.readouterr().out


def said_and_loaded(command, *modules):
    """What a command line prints, and in the last line which of these modules it has loaded when it ends."""
    program = (
        f"import sys; from pnode_dist.cli.main import main; main({command!r});"
        f"print([name for name in {modules!r} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return ran.stdout.splitlines()


def test_help_loads_neither_torch_nor_mpi():
    assert said_and_loaded(["--help"], "torch", "mpi4py.MPI", "petsc4py.PETSc", "pydantic", "rich")[-1] == "[]"


def test_the_status_of_a_run_loads_neither_torch_nor_mpi(tmp_path):
    (tmp_path / "config.toml").touch()
    said = said_and_loaded(["status", str(tmp_path)], "torch", "mpi4py.MPI", "petsc4py.PETSc", "pydantic")
    assert "state: no sign of life" in said
    assert said[-1] == "[]"


def test_arguments_after_two_dashes_reach_petsc(config_file, capfd):
    command = [sys.executable, "-m", "pnode_dist.cli.main", "gradcheck", str(config_file), "--json"]
    ran = subprocess.run([*command, "--", "-ts_rk_type", "2a", "-log_view"], capture_output=True, text=True, check=True)
    _, plain, _ = run_json(capfd, "gradcheck", config_file, "--set", "solver.method=heun")

    assert json.loads(ran.stdout)["loss"] == plain["loss"]
    # PETSc's own report, with the events of a solve, comes when it is finalised, and not between the JSON.
    assert "PETSc Performance Summary" in ran.stderr
    for name in ("pnode f", "pnode vjp", "pnode step", "pnode adjoint", "pnode forward", "pnode backward"):
        assert name in ran.stderr


def test_an_interrupt_ends_with_code_130_and_one_line(config_file, capfd, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("pnode_dist.train.run.build_problem", interrupted)
    assert main(["gradcheck", str(config_file)]) == 130
    assert capfd.readouterr().err == "pnode-dist: interrupted\n"


def test_an_unexpected_error_keeps_its_traceback(config_file, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError("inside")

    monkeypatch.setattr("pnode_dist.train.run.build_problem", broken)
    with pytest.raises(ZeroDivisionError, match="inside"):
        main(["gradcheck", str(config_file)])


def test_mpi_is_loaded_before_petsc_is_given_its_options(tmp_path) -> None:
    program = (
        "import sys, petsc4py\n"
        "petsc4py.init = lambda options: print('mpi4py.MPI' in sys.modules, options)\n"
        "from pnode_dist.cli.main import main\n"
        "main(['problems', '--', '-ts_monitor'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "True ['pnode-dist', '-ts_monitor']"
