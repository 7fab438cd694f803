"""The configuration that the classes of a problem's tables make."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from pnode_dist.config.definition import ModelTable, ProblemDefinition, ProblemTable, run_type
from pnode_dist.config.load import from_tables, validated
from pnode_dist.config.registry import Registered
from pnode_dist.config.tables import EvaluationConfig, Table
from pnode_dist.errors import ConfigurationError


class Plain(BaseModel):
    points: int = 4


class Demanding(ModelTable):
    width: int


def build(config: object, mesh: object, dtype: object) -> str:
    return "built"


TABLES = {"problem": {"type": "mine"}, "training": {"epochs": 1}}


def test_tables_with_defaults_may_be_left_out_and_others_not() -> None:
    config = run_type("Mine", Plain, ModelTable, EvaluationConfig)
    assert config.model_validate(TABLES | {"run": {"name": "a"}}).evaluation.leads == (1, 2, 3, 6)

    with pytest.raises(ValidationError, match="model"):
        run_type("Mine", Plain, Demanding, Table).model_validate(TABLES | {"run": {"name": "a"}})


def test_the_table_of_the_problem_is_always_required_and_has_a_type() -> None:
    fields = run_type("Mine", Plain, ModelTable, Table).model_fields

    assert fields["problem"].is_required()
    assert fields["problem"].annotation.model_fields["type"].description  # type: ignore[union-attr]
    assert "type" in ProblemTable.model_fields


def test_further_tables_are_tables_of_the_file() -> None:
    config = run_type("Mine", Plain, ModelTable, Table, {"rival": Demanding})

    assert config.model_fields["rival"].is_required()


@pytest.mark.parametrize("key", ["point", "width"])
def test_a_plain_pydantic_class_refuses_keys_that_it_does_not_have(key: str) -> None:
    run = run_type("Mine", Plain, ModelTable, Table)
    found = Registered("mine", ProblemDefinition(run, build), None)
    tables = TABLES | {"problem": {"type": "mine", key: 3}}

    with pytest.raises(ConfigurationError, match=rf"\[problem\] unknown key {key}.*: must be one of points, type"):
        validated(from_tables(tables, "a"), found)


def test_a_configuration_cannot_be_changed() -> None:
    config = run_type("Mine", Plain, ModelTable, Table).model_validate(TABLES | {"run": {"name": "a"}})

    with pytest.raises(ValidationError, match="frozen"):
        config.problem.points = 5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("given", "table", "said"),
    [
        (int, "problem", "Mine: the class for [problem] is int: must be a pydantic model, such as a subclass of "),
        (3, "problem", "Mine: the class for [problem] is 3: must be a pydantic model"),
        (int, "model", "must be a pydantic model, such as a subclass of pnode_dist.ModelTable"),
        (Plain(), "evaluation", "Mine: the class for [evaluation] is Plain(points=4): must be a pydantic model"),
    ],
)
def test_a_class_that_is_not_pydantic_s_is_named_with_its_table(given: object, table: str, said: str) -> None:
    classes: dict[str, object] = {"problem": Plain, "model": ModelTable, "evaluation": Table, table: given}

    with pytest.raises(ConfigurationError) as caught:
        run_type("Mine", *classes.values())  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_a_builder_is_a_function_or_imported_by_its_name() -> None:
    run = run_type("Mine", Plain, ModelTable, Table)

    assert ProblemDefinition(run, build).builder() is build
    assert ProblemDefinition(run, f"{__name__}:build").builder()(None, None, None) == "built"
