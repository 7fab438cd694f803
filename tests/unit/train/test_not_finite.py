"""A value that is not finite ends the run with the step, the rank and the place that it comes from."""

from __future__ import annotations

import socket

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from pnode_dist.config.tables import SnapshotConfig
from pnode_dist.errors import StepSizeError
from pnode_dist.runs import snapshot_files
from pnode_dist.runs.endings import DivergenceError
from pnode_dist.train import loop

pytestmark = pytest.mark.usefixtures("every_snapshot")

EVERY_STEP = SnapshotConfig(every_steps=1, every_minutes=0)
HERE = rf"rank 0 \({socket.gethostname()}\)"


class Identity(nn.Module):
    """Hands on what it is given, and once it is `armed` something else from the time 0.4 on."""

    def __init__(self, spoil) -> None:
        super().__init__()
        self.spoil, self.armed = spoil, False

    def forward(self, t, u):
        return self.spoil(u) if self.armed and t > 0.4 else u


class Rate(nn.Module):
    """du/dt = rate * u."""

    def __init__(self, spoil) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor([0.2], dtype=torch.float64))
        self.layer = Identity(spoil)

    def forward(self, t, u):
        return self.layer(t, self.rate * u)


def armed_at_loss(decay, number, spoil):
    """The problem with a right-hand side that is spoilt from its loss number `number` on."""
    function = decay.model.func = Rate(spoil)
    honest, calls = decay.loss, []

    def loss(model, batch):
        calls.append(batch)
        function.layer.armed = len(calls) >= number
        return honest(model, batch)

    decay.loss = loss
    return decay


def no_number(u):
    return u * torch.nan


def overflow(u):
    # Of the largest number about a half: steps of 0.25 are too short for the state to overflow, but not its square.
    return 0 * u + 1e308


def no_derivative(u):
    return torch.sqrt(0 * u) + u.detach()


def assert_the_snapshot_of_step_2_is_named_and_whole(error, directory):
    assert str(error).endswith("; the last snapshot is that of step 2")
    path = snapshot_files.path_of(directory, 2)
    snapshot_files.check(path)
    assert all(value.isfinite().all() for value in snapshot_files.load(path).parameters.values())


@pytest.mark.parametrize(
    ("spoil", "what", "place"),
    [
        (no_number, "loss is nan", r"the value of func\.layer \(Identity\) at t = 0\.5"),
        (overflow, "loss is inf", r"the loss"),
        (
            no_derivative,
            "norm of the gradient is nan",
            r"the gradient by the state of func\.layer \(Identity\) at t = 1",
        ),
    ],
)
def test_the_place_in_the_right_hand_side_is_named_and_the_last_snapshot_is_whole(
    decay, mesh, training, tmp_path, spoil, what, place
):
    problem = armed_at_loss(decay, 3, spoil)
    with pytest.raises(
        DivergenceError,
        match=rf"^step 3 \(epoch 2\): the {what}: try a .*; it comes from {HERE}, first seen in {place}; ",
    ) as ended:
        loop.train(problem, training, mesh, tmp_path, EVERY_STEP)

    assert_the_snapshot_of_step_2_is_named_and_whole(ended.value, tmp_path)
    assert torch.isfinite(problem.model.func.rate).all()
    assert not problem.model.func._forward_hooks
    assert not problem.model.func._forward_pre_hooks


def test_a_state_that_overflows_between_two_evaluations_is_named(decay, mesh, training, tmp_path):
    decay.model.step_size, decay.model.method = 2.5, "euler"
    honest = decay.loss
    decay.loss = lambda model, batch: honest(lambda u, t: model(u, 10 * t), batch)
    problem = armed_at_loss(decay, 2, overflow)
    with pytest.raises(DivergenceError, match=r"first seen in the state that func \(Rate\) is given at t = 5; "):
        loop.train(problem, training, mesh, tmp_path)


def test_what_a_batch_holds_is_named_as_an_input(decay, mesh, training, tmp_path):
    honest = decay.batches

    def batches(epoch, done=0):
        for number, batch in enumerate(honest(epoch, done)):
            yield batch * torch.nan if (epoch, number) == (2, 1) else batch

    decay.batches = batches
    with pytest.raises(
        DivergenceError,
        match=r"^step 4 .*first seen in the state that func \(LinearRate\) is given at t = 0; there is no",
    ):
        loop.train(decay, training, mesh, tmp_path)


def test_steps_that_find_no_size_name_the_optimiser_step_and_the_place(decay, mesh, training, tmp_path):
    decay.model.step_size, decay.model.method = None, "dopri5"
    decay.model.rtol, decay.model.atol = 1e-6, 1e-8
    problem = armed_at_loss(decay, 3, no_number)
    with pytest.raises(
        StepSizeError,
        match=rf"^step 3 \(epoch 2\): step \d+ at t = 0\.\d+: its size fell .*; it comes from {HERE}, first seen in "
        r"the value of func\.layer \(Identity\) at t = ",
    ) as ended:
        loop.train(problem, training, mesh, tmp_path, EVERY_STEP)

    assert_the_snapshot_of_step_2_is_named_and_whole(ended.value, tmp_path)


def test_parameters_that_a_step_has_spoilt_are_not_kept(decay, mesh, training, tmp_path):
    settings = training.model_copy(update={"optimiser": "sgd", "learning_rate": 1e-3})
    function, steps = decay.model.func, []

    def too_far(optimiser, *arguments):
        steps.append(optimiser)
        if len(steps) == 3:
            with torch.no_grad():
                function.rate.fill_(torch.inf)

    hook = register_optimizer_step_post_hook(too_far)
    try:
        with pytest.raises(
            DivergenceError, match=r"^step 3: the parameter func\.rate is not finite after it: try a "
        ) as ended:
            loop.train(decay, settings, mesh, tmp_path, EVERY_STEP)
    finally:
        hook.remove()

    assert_the_snapshot_of_step_2_is_named_and_whole(ended.value, tmp_path)
