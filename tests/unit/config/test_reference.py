"""The configuration describes itself: descriptions, the reference and the JSON Schema."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from pnode_dist.config.reference import DRAFT, in_words, json_schema, reference, toml_key, toml_value
from pnode_dist.config.registry import installed, resolve
from pnode_dist.config.tables import Config
from tests.conftest import ROOT
from tests.oracles.json_schema import check_schema, refused
from tests.unit.config.own_problems import FORECAST, written

KINDS = list(installed())
SHIPPED = sorted((ROOT / "launch" / "configs").glob("*.toml"))


def run_of(kind: str) -> type[Config]:
    return resolve(kind, Path()).definition.run


@pytest.mark.parametrize("kind", KINDS)
def test_every_table_and_key_of_every_problem_has_a_description(kind: str) -> None:
    tables = reference(run_of(kind))
    assert {"run", "problem", "model", "training", "evaluation"} <= {table.name for table in tables}
    for table in tables:
        assert table.description, table.name
        for key in table.keys:
            assert key.description, f"[{table.name}] {key.name}"
            assert key.description[0].isupper() or key.description[0] == "`", f"[{table.name}] {key.name}"
            assert key.description.endswith("."), f"[{table.name}] {key.name}"


def test_the_keys_of_a_problem_are_those_that_it_reads() -> None:
    run = run_of("robertson")
    assert {table.name: {key.name for key in table.keys} for table in reference(run)} == {
        name: set(field.annotation.model_fields)  # type: ignore[union-attr]
        for name, field in run.model_fields.items()
    }


def test_without_a_problem_the_tables_of_all_problems_are_listed() -> None:
    assert [table.name for table in reference()] == ["run", "mesh", "solver", "trajectory", "training", "snapshot"]


def test_a_key_has_its_type_default_and_allowed_values() -> None:
    keys = {(table.name, key.name): key for table in reference(run_of("field")) for key in table.keys}

    epochs, boundary = keys["training", "epochs"], keys["problem", "boundary"]
    assert (epochs.required, epochs.type, epochs.allowed) == (True, "integer", "an integer of at least 1")
    assert (boundary.type, boundary.default) == ("list", ["replicate", "replicate"])
    assert boundary.allowed == "a list of 2 entries, each one of replicate, periodic, zero"
    assert keys["mesh", "backend"].choices == ["mpi", "gloo", "nccl"]
    assert keys["solver", "compute_dtype"].choices == ["float64", "float32", "bfloat16"]
    assert keys["trajectory", "ram"].type == "integer or string"
    # The name of the file is its default.
    assert not keys["run", "name"].required


def test_the_type_of_a_problem_comes_first() -> None:
    (problem,) = [table for table in reference(run_of("burgers")) if table.name == "problem"]

    assert problem.keys[0].name == "type"


@pytest.mark.parametrize("width", [60, 100])
def test_the_reference_fits_a_terminal_and_names_every_key(width: int) -> None:
    tables = reference(run_of("images"))
    text = in_words(tables, width)

    assert max(map(len, text.splitlines())) <= width
    for table in tables:
        assert f"[{table.name}]" in text.splitlines()
        for key in table.keys:
            assert f"\n  {key.name}: " in text
    assert "\n  epochs: an integer of at least 1; required\n" in text


def test_the_keys_of_an_own_problem_have_their_docstrings(tmp_path: Path) -> None:
    written(tmp_path / "mine.py", FORECAST)
    tables = reference(resolve("mine.py:Decay", tmp_path).definition.run)
    keys = {(table.name, key.name): key for table in tables for key in table.keys}

    assert keys["problem", "points"].description == "Points of the state."
    assert keys["model", "width"].required
    assert keys["problem", "type"].description


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_is_one_of_the_draft_that_it_names(kind: str) -> None:
    schema = json_schema(run_of(kind), kind)

    assert schema["$schema"] == DRAFT == "https://json-schema.org/draft/2020-12/schema"
    check_schema(schema)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_schema_accepts_the_shipped_configurations(path: Path) -> None:
    tables = tomllib.loads(path.read_text())
    del tables["run"]
    kind = tables["problem"]["type"]

    assert list(refused(tables, json_schema(run_of(kind), kind))) == []


@pytest.mark.parametrize(
    ("table", "key", "value", "at"),
    [
        ("training", "epocs", 3, "/training/epocs false"),
        ("training", "epochs", 0, "/training/epochs minimum"),
        ("training", "dtype", "float16", "/training/dtype enum"),
        ("solver", "step_size", "long", "/solver/step_size anyOf"),
        ("problem", "type", "field", "/problem/type const"),
        ("evaluation", "leads", [], "/evaluation/leads length"),
        ("model", "hidden", [16, 0.5], "/model/hidden/1 type"),
    ],
)
def test_the_schema_refuses_what_reading_refuses(table: str, key: str, value: Any, at: str) -> None:
    tables = tomllib.loads((ROOT / "launch" / "configs" / "graph_diffusion.toml").read_text())
    tables[table][key] = value

    assert list(refused(tables, json_schema(run_of("graph_diffusion"), "graph_diffusion"))) == [at]


def test_a_schema_that_is_none_is_noticed() -> None:
    for wrong in ({"type": "int"}, {"properties": {"a": 3}}, {"required": ["a", "a"]}, {"anyOf": []}, {"minItems": -1}):
        with pytest.raises(AssertionError):
            check_schema(wrong)
    with pytest.raises(KeyError):
        check_schema({"minimun": 3})
    with pytest.raises(KeyError):
        check_schema({"$ref": "#/$defs/A"})


@pytest.mark.parametrize(
    "value",
    [True, 3, -1.5e-7, 1e30, 'a"b\\c\n\té\x00\x7f', [], [[1.0, 2.0], [3.0]], {"a": 1, "b c": [True]}, {}, ""],
)
def test_a_value_in_toml_reads_back_as_itself(value: Any) -> None:
    text = f"{toml_key('a key')} = {toml_value(value)}"

    assert "\n" not in text
    assert tomllib.loads(text) == {"a key": value}


def test_a_key_in_toml_has_quotes_where_it_needs_them() -> None:
    assert [toml_key(key) for key in ("ts_monitor", "pc-type", "a b", "é")] == ["ts_monitor", "pc-type", '"a b"', '"é"']
