"""`config init`: a configuration with all keys of a problem, which trains as it is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from pnode_dist.cli.main import main
from pnode_dist.config.load import load
from pnode_dist.config.reference import reference
from pnode_dist.config.registry import installed, resolve
from pnode_dist.config.template import example, template
from tests.conftest import ROOT
from tests.tiers import at_night
from tests.unit.config.own_problems import FORECAST, written

KINDS = list(installed())
SMALL = {
    "burgers": ("points=32", "trajectories=2", "validation=1", "times=2"),
    "field": (),
    "flows": ("samples=250", "validation=50", "test=50"),
    "graph_diffusion": ("nodes=40", "trajectories=2", "validation=1", "times=3"),
    "gray_scott": ("shape=[8, 8]", "trajectories=1", "validation=1", "times=4"),
    "images": (),
    "kuramoto_sivashinsky": ("points=64", "length=22.0", "trajectories=1", "validation=1", "times=2", "spin_up=1.0"),
    "pendulum": ("trajectories=1", "validation=1", "times=5"),
    "robertson": ("trajectories=1", "validation=1"),
}
"""Settings of `[problem]` with which an epoch is short."""
LEADS = ("burgers", "graph_diffusion", "gray_scott", "kuramoto_sivashinsky", "pendulum")


def with_defaults(text: str) -> str:
    """The configuration with every default that it shows as a comment set."""
    return re.sub(r"^#(\w+ = )", r"\1", text, flags=re.MULTILINE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_that_a_template_shows_are_those_of_the_configuration(kind: str, tmp_path: Path) -> None:
    text = template(kind, resolve(kind, tmp_path).definition.run)
    path = written(tmp_path / "my.toml", text)
    every = written(tmp_path / "every" / "my.toml", with_defaults(text))

    assert every.read_text() != text
    assert load(every).model_dump() == load(path).model_dump()
    assert load(path).run.name == "my"


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_has_every_key_once(kind: str, tmp_path: Path) -> None:
    run = resolve(kind, tmp_path).definition.run
    text = template(kind, run)
    for table in reference(run):
        (part,) = re.findall(rf"^\[{table.name}\]\n(.*?)(?=^\[|\Z)", text, re.MULTILINE | re.DOTALL)
        assert re.findall(r"^#?(\w+) =", part, re.MULTILINE) == [key.name for key in table.keys]


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_has_the_values_of_the_shipped_configuration(kind: str, tmp_path: Path) -> None:
    shipped = example(kind)
    assert shipped is not None
    expected = load(written(tmp_path / "my.toml", shipped), ["run.name=my"])

    path = written(tmp_path / "init.toml", template(kind, resolve(kind, tmp_path).definition.run))
    assert load(path, ["run.name=my"]).model_dump() == expected.model_dump()


def test_the_shipped_configurations_are_those_that_the_readme_names() -> None:
    assert (ROOT / "launch" / "configs").resolve() == ROOT / "pnode_dist" / "configs"


def test_a_template_of_an_own_problem_fills_in_what_is_required(tmp_path: Path) -> None:
    written(tmp_path / "mine.py", FORECAST)
    path = tmp_path / "my.toml"
    path.write_text(template("./mine.py:Decay", resolve("./mine.py:Decay", tmp_path).definition.run))
    config = load(path)

    assert config.kind == f"{tmp_path / 'mine.py'}:Decay"
    assert tomllib.loads(path.read_text())["model"] == {"width": 1}
    assert (config.training.epochs, config.problem.points) == (1, 4)  # type: ignore[attr-defined]
    assert "# Points of the state. (an integer)\n#points = 4\n" in path.read_text()


def test_a_kind_that_is_not_registered_has_no_example() -> None:
    assert example("./mine.py:Decay") is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", at_night(KINDS, ["flows", "graph_diffusion"]))
def test_a_template_trains_in_an_empty_directory(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [*(f"problem.{setting}" for setting in SMALL[kind]), "training.epochs=1"]
    # A month of the sea surface is too large for a thousand of them in the budget.
    settings += [] if kind == "field" else ["training.batch_size=1000"]
    settings += ["evaluation.leads=[1]"] if kind in LEADS else []
    options = [option for setting in settings for option in ("--set", setting)]

    assert main(["config", "init", kind]) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    (tmp_path / "my.toml").write_text(shown.out)

    assert main(["train", "my.toml", *options]) == 0
    assert (tmp_path / "runs" / "my" / "model.pt").is_file()
