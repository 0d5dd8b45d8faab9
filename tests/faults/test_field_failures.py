"""Failures that users of such software met, and the tests that would have caught them here.

An index, held to be true: each test that it names is there and part of the default selection. Kinds are those of
the project's list of field failures, under its numbers; what a kind says of things that this code does not do yet
(stored labels, prompts, latents) has no test until there are such.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

KINDS: dict[int, tuple[str, dict[str, list[str]]]] = {
    1: (
        "A term that teaches nothing",
        {
            "engine/test_proof.py": [
                "test_a_term_that_never_reaches_its_player_ends_the_run",
                "test_a_player_without_any_gradient_is_named_at_once",
                "test_a_constant_term_ends_the_run",
            ],
            "test_distiller.py": ["test_kd_of_weight_zero_is_training_without_a_teacher"],
        },
    ),
    2: (
        "Right formula, wrong reduction or input form",
        {
            "losses/test_logit_losses.py": [
                "test_kd_equals_its_slow_twin",
                "test_dkd_equals_its_slow_twin",
                "test_dist_equals_its_slow_twin",
                "test_kd_is_the_sum_of_the_decoupled_parts",
                "test_divergences_vanish_with_their_gradient_at_equality_only",
            ],
            "losses/test_kd_reference.py": ["test_value_and_gradient_equal_official_code"],
            "diffusion/test_diffusion_losses.py": ["test_dmd_gradient_is_the_field_over_numel"],
        },
    ),
    3: (
        "Fine until the input is extreme",
        {
            "losses/test_logit_losses.py": [
                "test_finite_and_exact_at_ten_thousand",
                "test_a_constant_row_is_zero_with_its_true_derivative",
                "test_two_classes_leave_nothing_to_the_non_target_part",
            ],
            "teachers/test_ensemble.py": ["test_extreme_and_half_precision_logits_stay_finite"],
            "diffusion/test_diffusion_losses.py": ["test_dmd_is_finite_where_x_is_the_teachers_prediction"],
            "faults/test_not_finite.py": ["test_nothing_moves_and_the_cause_is_named_and_replayed"],
        },
    ),
    4: (
        "The teacher is not the teacher the user thinks of",
        {
            "test_workbench.py": [
                "test_a_teacher_at_chance_stops_the_run_before_anything_is_written",
                "test_other_classes_than_the_data_are_refused",
            ],
            "test_distiller.py": ["test_a_run_leaves_the_teacher_as_it_was"],
            "engine/test_proof.py": ["test_a_frozen_network_that_moves_ends_the_run"],
            "models/test_network.py": ["test_pixels_are_normalised_by_the_networks_own_statistics"],
        },
    ),
    5: (
        "Loading that forgives",
        {
            "models/test_weights.py": [
                "test_what_does_not_fit_is_named_and_nothing_loaded",
                "test_several_state_dicts_in_one_file_are_refused_by_name",
                "test_a_folder_with_one_file_is_that_file_and_with_more_is_refused",
                "test_wrappers_are_stripped_and_said",
            ],
            "engine/test_checkpoints.py": ["test_init_from_another_network_names_the_tensors"],
            "faults/test_pickles.py": ["test_weights", "test_checkpoints", "test_exported_programs"],
        },
    ),
    6: (
        "Libraries disagree on the same folder",
        {
            "data/test_sources_files.py": [
                "test_classes_and_files_come_in_the_order_of_code_points",
                "test_what_is_listed_and_what_is_not",
                "test_classes_that_differ_between_splits_are_named",
                "test_timm_folders_keep_timms_order_and_our_pixels",
            ]
        },
    ),
    7: (
        "Pixels change on the way in",
        {
            "faults/test_images.py": ["test_odd_ones_are_trained_on_as_they_look_and_bad_ones_never"],
            "data/test_bad_images.py": [
                "test_every_orientation_comes_out_upright",
                "test_sixteen_bits_are_scaled_not_cut",
            ],
            "data/test_sources_files.py": ["test_pixels_are_the_same_in_memory_and_from_the_disk"],
            "export/test_export.py": ["test_timms_transform_prepares_images_as_the_run_did"],
        },
    ),
    8: (
        "Samples silently dropped, doubled or substituted",
        {
            "faults/test_counters.py": [
                "test_every_image_of_an_epoch_once",
                "test_what_is_printed_and_logged_is_what_was_read",
                "test_a_run_of_no_update_is_refused",
                "test_a_run_whose_every_update_was_skipped_is_an_error",
            ],
            "faults/test_images.py": ["test_one_that_breaks_later_ends_the_run_with_its_name"],
            "eval/test_classify.py": ["test_every_image_counts_once_whatever_the_reading"],
        },
    ),
    9: (
        "Targets that belong to another view",
        {
            "augmentors/test_in_a_run.py": ["test_student_and_teacher_get_the_augmented_images"],
            "engine/test_checkpoints.py": ["test_another_run_cannot_be_resumed"],
        },
    ),
    10: (
        "Randomness that repeats or drifts",
        {
            "data/test_samples.py": ["test_a_sample_is_a_function_of_seed_epoch_and_index_alone"],
            "data/test_stream.py": ["test_the_number_of_workers_and_a_resume_change_nothing"],
            "engine/test_two_processes.py": ["test_dropout_differs_between_processes_and_micro_batches"],
            "engine/test_stages.py": ["test_noise_is_new_in_every_stage"],
            "diffusion/test_dmd2.py": ["test_noise_of_the_turns_is_independent"],
        },
    ),
    11: (
        "Looking disturbs training",
        {
            "engine/test_watch.py": ["test_the_run_is_the_same_without_looking"],
            "eval/test_classify.py": ["test_looking_leaves_modes_and_generators_alone"],
            "engine/test_proof.py": ["test_watching_changes_no_bit"],
        },
    ),
    12: (
        "Averages that do not average",
        {
            "faults/test_counters.py": [
                "test_the_average_counts_updates_that_happened",
                "test_an_update_that_overflowed_was_none",
                "test_the_count_goes_on_in_a_run_that_is_continued",
            ],
            "engine/test_precision.py": ["test_the_average_of_a_bf16_network_keeps_what_bf16_cannot"],
            "export/test_export.py": ["test_the_average_is_exported_where_one_was_kept"],
        },
    ),
    13: (
        "A resume that is another run",
        {
            "engine/test_resume.py": ["test_resume_in_mid_cycle", "test_resume_anywhere_in_three_stages"],
            "faults/test_kill.py": ["test_a_kill_at_a_random_time"],
            "engine/test_checkpoints.py": ["test_what_a_method_was_told_is_compared_on_resume"],
        },
    ),
    14: (
        "Saving that loses",
        {
            "engine/test_checkpoints.py": [
                "test_failing_save_leaves_the_previous_checkpoint_and_no_remains",
                "test_damage_is_found_and_the_previous_checkpoint_used",
                "test_retention_keeps_the_newest_and_the_milestones",
            ],
            "faults/test_memory.py": ["test_and_with_more_memory_to_the_bit"],
        },
    ),
    15: (
        "Step counts that mean different things",
        {
            "faults/test_counters.py": [
                "test_the_rate_of_each_update_is_that_of_its_step",
                "test_a_turn_that_comes_rarely_follows_the_schedule_of_the_stage",
                "test_the_average_counts_updates_that_happened",
            ],
            "engine/test_equality.py": ["test_micro_batches_train_alike"],
        },
    ),
    16: (
        "Several processes, another result",
        {
            "engine/test_two_processes.py": [
                "test_two_processes_train_as_one_does",
                "test_equality_would_miss_no_forgotten_collective",
            ],
            "eval/test_shared_evaluation.py": ["test_two_processes_find_what_one_finds"],
        },
    ),
    17: (
        "Conventions unsaid",
        {
            "diffusion/test_process.py": [
                "test_conversion_there_and_back_for_any_prediction",
                "test_timesteps_are_descending_and_end_clean",
            ],
            "diffusion/test_denoiser.py": ["test_guidance_formula", "test_unknown_prediction_types_are_refused"],
        },
    ),
    18: (
        "Sampler and student disagree",
        {
            "diffusion/test_samplers.py": ["test_order_of_convergence"],
            "diffusion/test_dmd2.py": ["test_the_first_image_is_the_teachers_one_step_denoise"],
            "diffusion/test_process.py": ["test_student_times"],
        },
    ),
    19: (
        "Training inputs that inference never sees",
        {
            "diffusion/test_dmd2.py": ["test_a_few_step_student_trains_on_inputs_that_it_made_itself"],
            "export/test_fresh_process.py": ["test_a_fresh_process_answers_as_the_run_did"],
        },
    ),
    20: (
        "Precision lost outside the network",
        {
            "losses/test_logit_losses.py": ["test_half_precision_inputs_are_computed_in_float32"],
            "diffusion/test_process.py": ["test_conversion_works_in_float64_inside"],
            "eval/test_classify.py": ["test_half_precision_answers_are_scored_in_double_precision"],
            "augmentors/test_augment.py": ["test_autocast_does_not_round_the_pixels"],
        },
    ),
    21: (
        "Export that needs us",
        {
            "export/test_fresh_process.py": ["test_a_fresh_process_answers_as_the_run_did"],
            "export/test_export.py": ["test_the_configuration_is_the_runs_not_the_sources"],
        },
    ),
    22: (
        "Text side treated as an afterthought",
        # There is no text yet but the names of classes.
        {"data/test_sources_files.py": ["test_the_order_of_classes_may_be_given_and_is_checked"]},
    ),
    23: (
        "Metrics that flatter or mislead",
        {
            "eval/test_classify.py": ["test_scores_are_those_of_torchmetrics"],
            "eval/test_report.py": [
                "test_calibration_is_never_fitted_on_the_test_data",
                "test_the_hash_is_the_weights_and_nothing_else",
            ],
            "data/test_digits.py": ["test_the_test_set_never_moves_and_validation_moves_with_its_seed"],
        },
    ),
    24: (
        "Settings not obeyed",
        {
            "test_recipes.py": [
                "test_wrong_configs_end_with_2_name_the_key_and_create_nothing",
                "test_numbers_are_numbers",
            ],
            "engine/test_checkpoints.py": ["test_wrong_settings_name_the_culprit"],
        },
    ),
    25: (
        "Side-shows that stop or slow the show",
        {
            "faults/test_trackers.py": [
                "test_a_failing_tracker_costs_one_warning",
                "test_a_hanging_tracker_delays_no_step",
            ],
            "faults/test_host_sync.py": ["test_miniatures", "test_recipes", "test_distillers", "test_the_ring"],
            "engine/test_checkpoints.py": ["test_a_half_written_metrics_line_is_dropped"],
        },
    ),
}


@cache
def collected(path: str) -> frozenset[str]:
    """Names of the tests of a file that run by default."""
    functions = [node for node in ast.parse((TESTS / path).read_text()).body if isinstance(node, ast.FunctionDef)]
    return frozenset(node.name for node in functions if node.name.startswith("test_") and not _left_out(node))


def _left_out(function: ast.FunctionDef) -> bool:
    marks = {ast.unparse(decorator).partition("(")[0] for decorator in function.decorator_list}
    return bool(marks & {"pytest.mark.slow", "pytest.mark.gpu", "pytest.mark.skip"})


@pytest.mark.parametrize("number", KINDS)
def test_each_kind_would_be_caught(number: int) -> None:
    title, tests = KINDS[number]
    missing = [f"{path}::{name}" for path, names in tests.items() for name in names if name not in collected(path)]
    assert tests, title
    assert not missing, f"{number}. {title}: renamed, removed or left out by default"


def test_all_kinds_are_there_under_their_names(shared_dir: Path) -> None:
    text = (shared_dir / "anchors" / "field_failures.md").read_text()
    listed = {int(number): title for number, title in re.findall(r"^(\d+)\. \*\*(.+?)\.\*\*", text, re.MULTILINE)}
    assert {number: title for number, (title, _) in KINDS.items()} == listed


def test_what_is_not_collected_is_noticed() -> None:
    assert "test_no_such_test" not in collected("engine/test_proof.py")
    assert "test_inductor_trains_as_eager_does" not in collected("engine/test_compile.py"), "it is slow"
    assert "test_one_graph_for_each_turn_over_fifty_steps" in collected("engine/test_compile.py")
