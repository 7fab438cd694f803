"""The images, how they are split, and how those to learn from are varied."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from pnode_dist import Mesh
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.images.config import ImagesConfig
from pnode_dist.problems.images.data import LabelledImages, draw_augmentation, load_images, split
from tests.unit.problems.images.plain_images import moved


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    """One rank as one state, for the whole file."""
    with Mesh() as mesh:
        yield mesh


def settings(**changes: object) -> ImagesConfig:
    return ImagesConfig.model_validate({"type": "images", "data": "synthetic", "images": 100, **changes})


def counts(part: LabelledImages) -> list[int]:
    return np.bincount(part.labels, minlength=10).tolist()


def test_the_digits_are_those_of_scikit_learn_each_in_one_part(mesh: Mesh) -> None:
    from sklearn.datasets import load_digits

    data = load_images(ImagesConfig(type="images"), mesh)
    parts = (data.training, data.validation, data.test)
    together = np.concatenate([part.images for part in parts]).reshape(-1, 64)
    published = load_digits()
    assert together.dtype == np.uint8
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, published.data.astype(int).tolist()))
    assert [len(part) for part in parts] == [1295, 143, 359]
    whole = np.bincount(published.target)
    for name, count in enumerate(whole):
        assert counts(data.test)[name] == round(0.2 * count)
        assert counts(data.validation)[name] == round(0.1 * (count - counts(data.test)[name]))
    assert data.classes == tuple("0123456789")


def test_the_split_is_fixed_by_its_seed(mesh: Mesh) -> None:
    first, again, other = (load_images(settings(seed=seed), mesh) for seed in (1, 1, 2))
    assert np.array_equal(first.test.images, again.test.images)
    assert not np.array_equal(first.test.images, other.test.images)


def test_images_are_normalised_by_those_to_learn_from(mesh: Mesh) -> None:
    data = load_images(settings(), mesh)
    whole = data.normalised(data.training.images, torch.float64)
    torch.testing.assert_close(whole.mean((0, 1, 2)), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(whole.std((0, 1, 2), correction=0), torch.ones(3, dtype=torch.float64))
    assert data.normalised(data.test.images, torch.float32).dtype == torch.float32


def test_without_a_validation_part_the_test_part_is_watched(mesh: Mesh) -> None:
    data = load_images(settings(validation=0.0), mesh)
    assert (len(data.training), len(data.test)) == (80, 20)
    assert data.validation is data.test
    assert data.watched == "test"
    assert load_images(settings(), mesh).watched == "validation"


@pytest.mark.parametrize("share", [0.01, 0.999])
def test_a_part_without_images_is_refused(share: float) -> None:
    whole = LabelledImages(np.zeros((20, 2, 2, 1), np.uint8), np.arange(20) % 10)
    with pytest.raises(
        ConfigurationError, match=rf"^\[problem\] test = {share}: leaves a part of 20 images without any"
    ):
        split(whole, share, "test", np.random.default_rng(0))


def test_images_are_moved_and_mirrored_as_drawn() -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 5, 6, 3), dtype=np.uint8)
    moves = draw_augmentation(settings(shift=2, flip=True), 40, seed=7, epoch=3)
    numbers = range(10, 30)
    found = moves.of(images, numbers)
    for image, number, varied in zip(images, numbers, found, strict=True):
        expected = moved(image, *moves.shifts[number])
        mirror = expected[:, ::-1]
        assert np.array_equal(varied, mirror if moves.mirrored[number] else expected)
    assert set(np.unique(moves.shifts)) == {-2, -1, 0, 1, 2}
    assert 8 < moves.mirrored.sum() < 32


def test_each_epoch_varies_images_in_its_own_way_that_the_seed_fixes() -> None:
    def drawn(seed: int, epoch: int) -> np.ndarray:
        return draw_augmentation(settings(shift=2), 50, seed, epoch).shifts

    assert np.array_equal(drawn(0, 1), drawn(0, 1))
    assert not np.array_equal(drawn(0, 1), drawn(0, 2))
    assert not np.array_equal(drawn(0, 1), drawn(1, 1))
    images = np.ones((3, 4, 4, 1), np.uint8)
    assert np.array_equal(draw_augmentation(settings(), 3, 0, 1).of(images, range(3)), images)


def test_synthetic_images_have_the_shape_of_cifar10_and_classes_that_differ(mesh: Mesh) -> None:
    data = load_images(settings(images=200), mesh)
    assert data.training.images.shape[1:] == (32, 32, 3)
    centres = np.stack([data.training.images[data.training.labels == label].mean(axis=0) for label in range(10)])
    distances = ((data.test.images[:, None] - centres) ** 2).sum(axis=(2, 3, 4))
    assert (distances.argmin(axis=1) == data.test.labels).mean() > 0.95


def test_digits_without_scikit_learn_are_refused(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ConfigurationError, match=r"scikit-learn, which is missing: pip install 'pnode-dist\[data\]'$"):
        load_images(ImagesConfig(type="images"), mesh)
