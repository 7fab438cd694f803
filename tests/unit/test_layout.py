"""The package has small files in rooms, and the tests have names that fit a line."""

from __future__ import annotations

import ast
from pathlib import Path

import pnode_dist
from tests.conftest import ROOT

PACKAGE = Path(pnode_dist.__file__).parent
MOST_LINES = 450
LONGEST_NAME = 80
# These are still to be shortened: a name goes from this list with its test, and none may be added.
TO_BE_SHORTENED = frozenset(
    {
        "test_a_loss_that_diverges_ends_training_with_code_1_and_one_line_that_names_the_step",
        "test_a_rank_killed_in_any_phase_ends_the_others_and_the_run_goes_on_to_the_same_end",
        "test_a_right_hand_side_in_lower_precision_leaves_parameters_and_gradients_as_they_are",
        "test_a_run_is_evaluated_from_its_files_with_the_statistics_that_it_was_trained_to",
        "test_a_training_stops_before_its_time_is_up_and_goes_on_in_the_next_run_of_the_job",
        "test_an_epoch_has_every_training_window_once_and_none_that_touches_the_validation",
        "test_clipping_limits_the_gradient_that_the_optimiser_sees_but_not_the_recorded_norm",
        "test_lines_come_as_often_as_asked_and_for_the_first_the_last_and_every_validation",
        "test_loss_and_gradient_are_those_of_a_naive_trapezoidal_rule_over_all_trajectories",
        "test_on_another_mesh_a_run_goes_on_with_the_same_batches_to_the_same_result_but_for_rounding",
        "test_ranks_on_the_nodes_of_a_slurm_job_are_bound_where_each_node_has_enough_cores",
        "test_running_statistics_are_saved_but_no_buffer_that_may_be_one_ranks_part_of_a_field",
        "test_the_algebraic_equation_is_the_second_derivative_of_half_the_square_of_the_distance",
        "test_the_default_network_has_the_paper_s_number_of_parameters_in_its_right_hand_sides",
        "test_the_first_loss_and_gradient_norm_are_those_of_the_gradient_of_the_whole_batch",
        "test_the_recorded_loss_and_gradient_norm_are_those_of_the_parameters_before_the_step",
        "test_the_report_is_drawn_and_the_file_holds_truth_and_rollout_with_their_coordinates",
    }
)


def test_no_file_of_the_package_is_long() -> None:
    lengths = {path.relative_to(PACKAGE): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert len(lengths) > 100
    assert {path: length for path, length in lengths.items() if length > MOST_LINES} == {}


def test_the_root_of_the_package_holds_errors_and_rooms_alone() -> None:
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}
    assert files == {"__init__.py", "errors.py", "py.typed"}


def test_names_of_tests_have_at_most_80_characters() -> None:
    names = [
        (path.relative_to(ROOT), node.name)
        for path in (ROOT / "tests").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert len(names) > 1000
    long = {str(path): name for path, name in names if len(name) > LONGEST_NAME and name not in TO_BE_SHORTENED}
    assert long == {}
