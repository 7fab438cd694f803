"""Training from Python: what `fit` and `evaluate` leave, callbacks, optimisers by import path, and changed problems."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pnode_dist import Callback, ConfigurationError, evaluate, fit
from pnode_dist.cli.main import main
from pnode_dist.runs import snapshot_files
from tests.own_problems import SOURCE, TOML, changed, written


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of a problem of one's own, in the present directory."""
    monkeypatch.chdir(tmp_path)
    return written(tmp_path)


def losses(directory: Path) -> list[float]:
    lines = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "step"]


def parameters(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(directory / "model.pt", weights_only=True)
    return found


def test_fit_does_what_the_command_does(config: Path) -> None:
    assert main(["train", str(config), "--run-dir", "command"]) == 0
    fitted = fit(None, config, overrides=["run.directory=python"])
    assert fitted.directory == Path("python")
    assert losses(Path("python")) == losses(Path("command"))
    assert parameters(Path("python")) == parameters(Path("command"))
    assert fitted.outcome.steps == len(losses(Path("python")))


def test_fine_tuning_goes_on_from_the_parameters_of_another_run(config: Path) -> None:
    fit(None, config)
    still = ["training.learning_rate=1e-300", "training.epochs=1"]
    fit(None, config, overrides=["run.directory=tuned", 'training.start_from="runs/own"', *still])
    fit(None, config, overrides=["run.directory=anew", *still])
    assert parameters(Path("tuned")) == parameters(Path("runs/own"))
    assert parameters(Path("anew")) != parameters(Path("runs/own"))


@pytest.mark.parametrize(
    ("given", "reason"),
    [("runs/none", "there is no such file"), ("other", "holds other parameters than the configured model has")],
)
def test_parameters_that_cannot_be_taken_end_the_run(config: Path, given: str, reason: str) -> None:
    Path("other").mkdir()
    torch.save({"unknown": torch.zeros(1)}, "other/model.pt")
    with pytest.raises(ConfigurationError, match=rf"^\[training\] start_from = '{given}': {given}/model.pt: {reason}"):
        fit(None, config, overrides=[f'training.start_from="{given}"'])
    assert not Path("runs/own").exists()


def test_a_resumed_run_needs_no_parameters_of_another_one(config: Path) -> None:
    fit(None, config, overrides=["run.directory=first", "training.epochs=1"])
    tuned = ["run.directory=tuned", 'training.start_from="first"']
    fit(None, config, overrides=[*tuned, "training.epochs=1"])
    Path("first/model.pt").unlink()
    fitted = fit(None, config, overrides=[*tuned, "training.epochs=2"], resume="auto")
    assert fitted.outcome.steps == len(losses(Path("tuned")))


def test_evaluate_gives_the_figures_that_the_command_prints(config: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fit(None, config)
    result = evaluate("runs/own")
    capfd.readouterr()
    assert main(["evaluate", "runs/own", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == json.loads(json.dumps(result))


def test_a_class_and_tables_take_the_place_of_a_file(config: Path) -> None:
    import importlib.util

    spec = importlib.util.spec_from_file_location("own_module", config.with_name("own.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["own_module"] = module
    spec.loader.exec_module(module)
    tables = {"problem": {"window": 2}, "training": {"epochs": 1}, "run": {"name": "tables"}}
    fitted = fit(module.Own, tables)
    # The run can be evaluated by the command, which imports the class from its file.
    assert main(["evaluate", str(fitted.directory), "--json"]) == 0


class Recorder(Callback):
    """The calls, in their order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_start(self, start: Any) -> None:
        self.calls.append(f"start {start.step} {start.directory} {start.config['training']['epochs']}")

    def on_step(self, record: Any) -> None:
        self.calls.append(f"step {record.step}")

    def on_validation(self, record: Any) -> None:
        self.calls.append(f"validation {sorted(record.figures)}")

    def on_epoch(self, summary: Any) -> None:
        self.calls.append(f"epoch {summary.epoch}")

    def on_snapshot(self, step: int) -> None:
        self.calls.append(f"snapshot {step}")

    def on_end(self, outcome: Any) -> None:
        self.calls.append("end" if outcome is not None else "stopped")


def test_callbacks_are_called_in_the_order_of_training(config: Path) -> None:
    recorder = Recorder()
    fit(None, config, [recorder], overrides=["training.epochs=1", "training.batch_size=8"])
    validation = "validation ['lead_1', 'lead_3', 'validation_rmse']"
    assert recorder.calls == [
        "start 0 runs/own 1", "step 1", "step 2", validation, "epoch 1", "snapshot 2", "end"
    ]  # fmt: skip


def test_a_callback_that_raises_ends_the_run(config: Path) -> None:
    class Broken(Recorder):
        def on_step(self, record: Any) -> None:
            raise RuntimeError("no more")

    recorder = Recorder()
    with pytest.raises(RuntimeError, match="no more"):
        fit(None, config, [recorder, Broken()])
    assert recorder.calls[-1] == "stopped"


def test_what_is_not_a_callback_is_refused(config: Path) -> None:
    with pytest.raises(TypeError, match=r"is not a pnode_dist\.Callback"):
        fit(None, config, [print])  # type: ignore[list-item]
    assert not Path("runs").exists()


LBFGS = """
optimiser = "torch.optim.LBFGS"
optimiser_options = { max_iter = 3, history_size = 5 }
schedule = "torch.optim.lr_scheduler.OneCycleLR"
schedule_options = { max_lr = 0.5, total_steps = 40, cycle_momentum = false }
schedule_every = "step"
"""
LINEAR = changed(
    "self.rate = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))",
    "self.rate = torch.nn.Parameter(torch.linspace(0.1, 0.9, 5, dtype=torch.float64))",
)


@pytest.fixture
def with_lbfgs(config: Path) -> Path:
    """A configuration that trains several parameters by LBFGS under the one-cycle schedule."""
    toml = TOML.replace("learning_rate = 0.05", "learning_rate = 0.1\n" + LBFGS).replace("epochs = 2", "epochs = 3")
    return written(config.parent, LINEAR, toml)


def test_lbfgs_is_that_of_torch(with_lbfgs: Path) -> None:
    """One step on the whole training set, against the same closure in plain torch."""
    fit(None, with_lbfgs, overrides=["training.epochs=1", "training.batch_size=15"])
    import numpy as np

    times = 0.25 * np.arange(7)
    starts = np.linspace(1.0, 2.0, 20).reshape(4, 1, -1)
    values = torch.from_numpy(starts * np.exp(-times)[:, None])[:3]
    rate = torch.linspace(0.1, 0.9, 5, dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.LBFGS([rate], lr=0.1, max_iter=3, history_size=5)
    torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.5, total_steps=40, cycle_momentum=False)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        errors = []
        for first in range(5):
            u = values[:, first]
            for lead in (1, 2):
                for _ in range(2):
                    h, k1 = 0.125, -rate * u
                    k2 = -rate * (u + h / 2 * k1)
                    k3 = -rate * (u + h / 2 * k2)
                    k4 = -rate * (u + h * k3)
                    u = u + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
                errors.append((u - values[:, first + lead]) / values.std(correction=0))
        loss = torch.stack(errors).square().mean()
        loss.backward()
        return loss

    optimiser.step(closure)
    (trained,) = parameters(Path("runs/own")).values()
    assert torch.allclose(trained, rate.detach(), rtol=1e-9)


@pytest.mark.usefixtures("every_snapshot")
def test_lbfgs_and_one_cycle_resume_bit_for_bit(with_lbfgs: Path) -> None:
    fit(None, with_lbfgs, overrides=["run.directory=whole"])

    class Stop(Callback):
        def on_snapshot(self, step: int) -> None:
            if step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(None, with_lbfgs, [Stop()], overrides=["run.directory=cut", "snapshot.every_steps=1"])
    assert snapshot_files.steps_in(Path("cut"))[0] in (3, 4)
    fit(None, with_lbfgs, overrides=["run.directory=cut", "snapshot.every_steps=1"], resume="auto")
    assert losses(Path("cut")) == losses(Path("whole"))
    (cut,), (whole,) = (parameters(Path(name)).values() for name in ("cut", "whole"))
    assert torch.equal(cut, whole)


@pytest.mark.parametrize("accepted", [False, True])
def test_a_changed_problem_is_resumed_only_if_that_is_accepted(
    accepted: bool, config: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Each in a module of its own: Python would not import a file again.
    assert main(["train", str(config)]) == 0
    import sys

    for name in [name for name in sys.modules if name.startswith("pnode_dist_problem_")]:
        del sys.modules[name]
    written(tmp_path, SOURCE + "\n# changed\n")
    capfd.readouterr()
    options = ["--accept-changed-problem"] if accepted else []
    code = main(["train", str(config), "--resume", "auto", "--set", "training.epochs=3", *options])
    said = capfd.readouterr().err
    if accepted:
        assert code == 0
        assert "own.py:Own has changed since" in said
    else:
        assert code == 2
        assert "its source has changed since the snapshot" in said
        assert "--accept-changed-problem" in said


def test_a_plateau_schedule_follows_the_validation(config: Path) -> None:
    written(config.parent, SOURCE, TOML.replace("learning_rate = 0.05", """learning_rate = 0.05
validate_every = 1
schedule = "torch.optim.lr_scheduler.ReduceLROnPlateau"
schedule_options = { patience = 0, threshold = 0.9, factor = 0.5 }""").replace("epochs = 2", "epochs = 4"))  # fmt: skip
    fit(None, config)
    lines = map(json.loads, Path("runs/own/metrics.jsonl").read_text().splitlines())
    rates = [line["learning_rate"] for line in lines if line["kind"] == "step"]
    assert rates[0] == 0.05
    assert rates[-1] < 0.05


def test_a_problem_that_is_no_class_is_refused(config: Path) -> None:
    with pytest.raises(ConfigurationError, match="problem = 5: must be a class, a name, or None"):
        fit(5, config)
