"""The images problem at every number of ranks: the training that plain torch does on whole batches."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from mpi4py import MPI

from pnode_dist import Mesh
from pnode_dist.distributed.gradients import parallel
from pnode_dist.problems.images.problem import ImagesProblem
from pnode_dist.train import loop
from tests.mpi.agreement import assert_same_on_all_ranks
from tests.mpi.conftest import SPLITS
from tests.oracles.right_hand_sides import distance
from tests.unit.problems.images.plain_images import config, plain_network, renamed, whole_batches

pytestmark = pytest.mark.mpi

# As one state, and as replicas alone.
MESHES = list(dict.fromkeys((SPLITS[-1], SPLITS[0])))
# 109 images: the last batch leaves one image, and all ranks but one with none.
ONE_LEFT = {"batch_size": 54}
STEEPER = {"epochs": 3, "learning_rate": 0.2}


@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_batch_is_the_whole_batch_of_plain_torch_and_so_are_loss_and_gradient(split: tuple[int, int]) -> None:
    with Mesh(*split) as mesh:
        problem = ImagesProblem(config(training=ONE_LEFT), mesh, torch.float64)
        model, plain = parallel(problem.model, mesh), plain_network(problem)
        for batch, (images, labels) in zip(problem.batches(1), whole_batches(problem, 1), strict=True):
            rows = torch.cat(mesh_gathered(batch.images.flatten(1)))
            assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, images.flatten(1).tolist()))
            problem.model.zero_grad(), plain.zero_grad()
            share = problem.loss(model, batch)
            share.backward()  # type: ignore[no-untyped-call]
            expected = torch.nn.functional.cross_entropy(plain(images), labels)
            expected.backward()  # type: ignore[no-untyped-call]
            assert mesh.sum(share).item() / mesh.data_replicas == pytest.approx(expected.item(), rel=1e-12)
            found = renamed({name: flat(value.grad) for name, value in problem.model.named_parameters()})
            assert found.keys() == dict(plain.named_parameters()).keys()
            wanted = {name: flat(value.grad) for name, value in plain.named_parameters()}
            assert distance(torch.cat([found[name] for name in wanted]), torch.cat(list(wanted.values()))) <= 1e-11
            assert_same_on_all_ranks(value.grad for value in problem.model.parameters())
        assert len(labels) == 1


def mesh_gathered(local: torch.Tensor) -> list[torch.Tensor]:
    return [torch.from_numpy(part) for part in MPI.COMM_WORLD.allgather(local.numpy())]


def flat(gradient: torch.Tensor | None) -> torch.Tensor:
    assert gradient is not None
    return gradient.flatten()


@pytest.mark.parametrize("split", MESHES, ids=str)
def test_training_follows_the_loss_curve_of_plain_torch_on_one_process(split: tuple[int, int], directory: Path) -> None:
    with Mesh(*split) as mesh:
        problem = ImagesProblem(config(training=STEEPER), mesh, torch.float64)
        training, plain = problem.config.training, plain_network(problem)
        loop.train(problem, training, mesh, directory)
        records = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
        losses = [record["loss"] for record in records if record["kind"] == "step"]
        expected = plain_losses(problem, plain)
        assert len(losses) == len(expected) == 18
        assert max(expected) - min(expected) > 0.1
        assert np.abs(np.array(losses) / expected - 1).max() < 1e-9
        found = renamed(problem.model.state_dict())
        for name, value in plain.state_dict().items():
            assert (found[name] - value).abs().max() < 1e-9, name


def plain_losses(problem: object, plain: torch.nn.Module) -> list[float]:
    """The loss of every step, as torch's own optimiser takes them."""
    training = problem.config.training
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    losses = []
    for epoch in range(1, training.epochs + 1):
        for images, labels in whole_batches(problem, epoch):
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(plain(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            losses.append(loss.item())
    return losses


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("split", MESHES, ids=str)
def test_the_evaluation_is_that_of_all_test_images(split: tuple[int, int], directory: Path) -> None:
    with Mesh(*split) as mesh:
        problem = ImagesProblem(config(problem={"test": 0.1}), mesh, torch.float64)
        plain, test = plain_network(problem).eval(), problem.data.test
        problem.model.eval()
        with torch.no_grad():
            table = problem.evaluate(problem.model, directory)
            expected = plain(problem.data.normalised(test.images, torch.float64)).softmax(dim=1).numpy()
        assert all(other == table for other in MPI.COMM_WORLD.allgather(table))
        assert table["accuracy"] == (expected.argmax(axis=1) == test.labels).mean()
        with h5py.File(directory / "forecast.h5") as file:
            np.testing.assert_allclose(file["probability"][:], expected, rtol=1e-10, atol=1e-14)
