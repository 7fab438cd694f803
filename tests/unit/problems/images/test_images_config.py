"""What the tables of an images problem refuse, in one line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pnode_dist.config.load import load
from pnode_dist.errors import ConfigurationError
from pnode_dist.problems.images.config import ImagesRun
from tests.conftest import ROOT

SHORTEST = """
[problem]
type = "images"
[training]
epochs = 1
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "c.toml"
    path.write_text(SHORTEST)
    return path


WRONG = {
    "problem.data=mnist": '[problem] data = "mnist": must be one of digits, cifar10, synthetic',
    "problem.data=cifar10": '[problem] path = null: must be the folder of CIFAR-10 with data = "cifar10"',
    "problem.path=images": '[problem] path = "images": must be left out unless data = "cifar10"',
    "problem.images=10": '[problem] images = 10: must be left out unless data = "synthetic"',
    "problem.test=0.0": "[problem] test = 0.0: must be greater than 0",
    "problem.validation=1.0": "[problem] validation = 1.0: must be a number of at least 0 and less than 1",
    "problem.shift=-1": "[problem] shift = -1: must be an integer of at least 0",
    "problem.flip=true": '[problem] flip = true: must be false with data = "digits": a mirrored digit is none',
    "model.widths=[6]": "[model] widths[0] = 6: must be an integer",
    "model.widths=[]": "[model] widths = []: must be a list of at least 1 entry",
    "model.widths=[4, 8]": "[model] strides = [1, 2, 2, 2]: must be a list of 2 entries, one for each of widths",
    "model.strides=[1, 2, 3, 1]": "[model] strides[2] = 3: must be",
    "model.activation=sine": '[model] activation = "sine": must be one of gelu, relu, silu, tanh',
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_key_or_value_is_one_line_that_names_it_and_what_is_allowed(path: Path, override: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(path, [override])
    line = str(caught.value)
    assert WRONG[override] in line
    assert "\n" not in line


def test_a_test_part_of_cifar10_is_not_split_off(path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r'test = 0.1: must be left out with data = "cifar10", which has a test'
    ):
        load(path, ["problem.data=cifar10", "problem.path=there", "problem.test=0.1"])


def test_the_resolved_configuration_reads_back_as_itself(path: Path) -> None:
    config = load(path, ["problem.data=synthetic", "problem.images=40", "model.widths=[8]", "model.strides=[2]"])
    resolved = path.with_name("resolved.toml")
    resolved.write_text(config.to_toml())
    assert load(resolved) == config


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_the_shipped_configurations_are_valid(name: str) -> None:
    shipped = load(ROOT / "launch" / "configs" / f"{name}.toml")
    assert isinstance(shipped, ImagesRun)
    assert (shipped.run.name, shipped.problem.data) == (name, name)


def test_the_shipped_configuration_of_cifar10_is_the_paper_s() -> None:
    training = load(ROOT / "launch" / "configs" / "cifar10.toml").training
    assert (training.batch_size, training.optimiser, training.momentum) == (256, "sgd", 0.9)
    assert (training.learning_rate, training.weight_decay) == (0.1, 5e-4)
