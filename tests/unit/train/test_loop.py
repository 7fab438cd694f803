from __future__ import annotations

import json
import math

import pytest
import torch

from pnode_dist import Trajectory
from pnode_dist.errors import ConfigurationError
from pnode_dist.runs import directory as run_directory
from pnode_dist.runs.endings import DivergenceError
from pnode_dist.train import loop


def records(directory, kind):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_training_finds_the_rate_that_made_the_data(decay, mesh, training, tmp_path):
    loop.train(decay, training.model_copy(update={"epochs": 200, "schedule": "cosine"}), mesh, tmp_path)

    assert decay.rate == pytest.approx(-0.7, abs=2e-3)


def test_every_step_leaves_one_metrics_record_with_the_costs_of_its_solve(decay, mesh, training, tmp_path):
    loop.train(decay, training, mesh, tmp_path)

    steps = records(tmp_path, "step")
    assert [(record["step"], record["epoch"]) for record in steps] == [(n + 1, n // 2 + 1) for n in range(8)]
    first = steps[0]
    # Four steps of the four stages of RK4.
    assert (first["forward_steps"], first["adjoint_steps"]) == (4, 4)
    assert first["function_evaluations"] == 4 * (4 + first["recomputed_steps"])
    assert first["vjps"] == 16
    assert (first["bytes_written"], first["bytes_read"]) == (0, 0)
    assert first["learning_rate"] == 0.05
    assert first["peak_memory"] > 10 * 2**20
    assert [record["wall_time"] for record in steps] == sorted(record["wall_time"] for record in steps)


def test_traffic_with_disk_checkpoints_is_recorded_in_bytes(decay, mesh, training, tmp_path):
    problem = type(decay)(mesh, trajectory=Trajectory(ram_slots=0, disk_slots=1, directory=tmp_path))

    loop.train(problem, training, mesh, tmp_path)

    first = records(tmp_path, "step")[0]
    checkpoint = 6 * 8
    assert first["bytes_written"] == checkpoint
    # Four steps from the initial state and one checkpoint, before step 1: it is read for step 2 and for step 1.
    assert first["bytes_read"] == checkpoint * 2
    assert first["recomputed_steps"] == 8 - 4


def test_the_recorded_loss_and_gradient_norm_are_those_before_the_step(decay, mesh, training, tmp_path):
    batch = next(decay.batches(1))
    loss = decay.loss(decay.model, batch)
    (gradient,) = torch.autograd.grad(loss, list(decay.model.parameters()))

    loop.train(decay, training, mesh, tmp_path)

    first = records(tmp_path, "step")[0]
    assert first["loss"] == loss.item()
    assert first["gradient_norm"] == pytest.approx(gradient.abs().item(), rel=1e-14)


def test_validation_comes_every_so_many_epochs_and_after_the_last(decay, mesh, training, tmp_path):
    loop.train(decay, training.model_copy(update={"epochs": 5, "validate_every": 2}), mesh, tmp_path)

    validations = records(tmp_path, "validation")
    assert [record["epoch"] for record in validations] == [2, 4, 5]
    assert validations[-1]["figures"]["rate"] == decay.rate
    assert validations[-1]["units"] == "K"


def test_without_being_asked_validation_does_not_choose_the_parameters(decay, mesh, training, tmp_path):
    # A rate of learning that overshoots: the last parameters are not the best ones.
    settings = training.model_copy(update={"epochs": 12, "learning_rate": 0.4, "validate_every": 1})

    outcome = loop.train(decay, settings, mesh, tmp_path)

    assert decay.validations[-1] > min(decay.validations)
    assert outcome.kept_epoch == 12
    assert torch.load(tmp_path / "model.pt", weights_only=True)["func.rate"].item() == decay.rate
    assert abs(decay.rate + 0.7) == decay.validations[-1]


def test_keep_best_ends_with_the_parameters_of_the_least_headline_figure(decay, mesh, training, tmp_path):
    settings = training.model_copy(update={"epochs": 12, "learning_rate": 0.4, "validate_every": 1, "keep": "best"})

    outcome = loop.train(decay, settings, mesh, tmp_path)

    assert outcome.kept_epoch == decay.validations.index(min(decay.validations)) + 1 < 12
    assert outcome.figures["rate_error"] == min(decay.validations) == abs(decay.rate + 0.7)
    assert torch.load(tmp_path / "model.pt", weights_only=True)["func.rate"].item() == decay.rate


def test_stochastic_gradient_descent_takes_steps_with_momentum_and_weight_decay(decay, mesh, training, tmp_path):
    settings = training.model_copy(update={"optimiser": "sgd", "momentum": 0.8, "weight_decay": 0.1, "epochs": 2})
    reference = type(decay)(mesh)
    rate = torch.tensor([reference.rate], dtype=torch.float64)
    velocity = 0.0
    for epoch in (1, 2):
        for batch in reference.batches(epoch):
            with torch.no_grad():
                reference.model.func.rate.copy_(rate)
            (gradient,) = torch.autograd.grad(
                reference.loss(reference.model, batch), list(reference.model.parameters())
            )
            velocity = 0.8 * velocity + gradient + 0.1 * rate
            rate = rate - 0.05 * velocity

    loop.train(decay, settings, mesh, tmp_path)

    assert decay.rate == pytest.approx(rate.item(), rel=1e-12)


def test_the_cosine_schedule_falls_from_the_learning_rate_towards_zero(decay, mesh, training, tmp_path):
    loop.train(decay, training.model_copy(update={"schedule": "cosine"}), mesh, tmp_path)

    rates = [record["learning_rate"] for record in records(tmp_path, "step")[::2]]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)])


def test_clipping_limits_the_optimiser_s_gradient_but_not_the_recorded_norm(decay, mesh, training, tmp_path):
    clipped = training.model_copy(update={"epochs": 1, "gradient_clip": 1e-3})

    loop.train(decay, clipped, mesh, tmp_path)

    assert records(tmp_path, "step")[0]["gradient_norm"] > 1
    assert decay.model.func.rate.grad.abs().item() == pytest.approx(1e-3, rel=1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_training_and_names_the_step(decay, mesh, training, tmp_path, poison):
    honest, calls = decay.loss, []

    def spoilt(model, batch):
        calls.append(batch)
        return honest(model, batch) * (poison if len(calls) == 3 else 1)

    decay.loss = spoilt
    with pytest.raises(
        DivergenceError, match=rf"^step 3 \(epoch 2\): the loss is {poison}: try a smaller .*; it comes from rank 0 "
    ):
        loop.train(decay, training, mesh, tmp_path)
    assert len(records(tmp_path, "step")) == 2
    assert math.isfinite(decay.rate)


def test_a_problem_without_a_training_batch_is_refused_before_training(decay):
    decay.batches_per_epoch = 0
    with pytest.raises(ConfigurationError, match="there is no training batch: make batch_size smaller"):
        loop.check_first_batch(decay)


def test_a_rehearsal_finds_what_only_the_solver_can_find_wrong_and_changes_nothing(decay):
    loop.check_first_batch(decay)
    assert decay.rate == 0.2
    assert decay.model.func.rate.grad is None

    decay.model.options = {"ts_type": "bdf"}
    with pytest.raises(ConfigurationError, match="ts_type"):
        loop.check_first_batch(decay)


def test_a_rehearsal_leaves_running_statistics_alone(decay):
    decay.model.add_module("normalise", torch.nn.BatchNorm1d(1).double())
    honest = decay.loss
    decay.loss = lambda model, batch: honest(model, batch) + 0 * model.normalise(batch).sum()

    loop.check_first_batch(decay)

    assert decay.model.normalise.num_batches_tracked == 0
    assert decay.model.training


def test_two_runs_of_the_same_configuration_give_the_same_bits(mesh, decay, training, tmp_path):
    again = type(decay)(mesh)
    for problem, name in ((decay, "a"), (again, "b")):
        (tmp_path / name).mkdir()
        loop.train(problem, training, mesh, tmp_path / name)

    losses = [[record["loss"] for record in records(tmp_path / name, "step")] for name in ("a", "b")]
    assert losses[0] == losses[1]
    assert decay.rate == again.rate


def test_saved_parameters_come_back_into_a_new_model(decay, mesh, training, tmp_path):
    loop.train(decay, training, mesh, tmp_path)
    new = type(decay)(mesh)
    assert new.rate != decay.rate

    run_directory.load_parameters(new.model, tmp_path / "model.pt")

    assert new.rate == decay.rate
