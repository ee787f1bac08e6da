"""The faults that a run of weeks at home meets, each with the tests that show what the program does about it.

    pytest $(python tests/fault_catalogue.py)        all of them, on the CPU

`tests/test_fault_catalogue.py` sees to it that every test is there, and `docs/reliability.md` says the same in words.
"""

END = "tests/test_end_to_end.py::"
HOST = "tests/test_host_faults.py::"
GUARD = "tests/train/guard/test_guarded_runs.py::"
SAVING = "tests/train/test_saving.py::"
CHOICE = "tests/host/test_card_choice.py::"
ALARMS = "tests/host/test_alarms.py::"
KILLED_OR_STOPPED = f"{END}test_a_worker_that_is_killed_or_stopped_costs_the_steps_since_the_last_checkpoint"

CATALOGUE: dict[str, tuple[str, ...]] = {
    "a worker is killed or crashes": (
        KILLED_OR_STOPPED,
        "tests/parallel/test_launch.py::test_segfault_is_named",
    ),
    "a worker hangs": (
        KILLED_OR_STOPPED,
        "tests/parallel/test_launch.py::test_deaf_workers_and_their_children_are_killed_after_the_grace",
    ),
    "workers wait for one another in an exchange": (
        "tests/parallel/test_heartbeat.py::test_of_several_that_wait_the_one_that_moved_least_is_late",
        f"{HOST}test_a_run_that_gives_up_leaves_what_is_needed_to_look_into_it",
    ),
    "a card's memory is full": (
        f"{HOST}test_a_card_that_is_full_in_mid_run_is_told_plainly_and_planned_with_less",
        "tests/parallel/test_heartbeat.py::test_less_memory_is_tried_without_a_pause_and_not_for_ever",
    ),
    "a card reports an XID": (
        f"{CHOICE}test_broken_memory_and_a_lost_card_by_their_xids",
        f"{CHOICE}test_a_halted_card_gets_one_more_start",
        "tests/host/test_watch.py::test_an_xid_is_told_and_kept_for_the_choice_of_cards",
    ),
    "a card falls off the bus": (f"{HOST}test_a_card_falls_off_the_bus_and_the_run_goes_on_with_three",),
    "the disk is full while saving": (
        f"{SAVING}test_a_disk_that_fails_once_costs_one_checkpoint",
        "tests/checkpoint/test_saver.py::test_a_write_that_fails_in_the_middle_leaves_nothing",
        "tests/host/test_disk_room.py::test_what_is_kept_must_fit_and_what_is_there_already_counts",
    ),
    "the disk disappears": (
        f"{SAVING}test_another_disk_stands_in",
        "tests/checkpoint/test_saver.py::test_one_workers_failing_disk_gives_up_for_all_and_leaves_nothing",
    ),
    "a checkpoint is damaged": ("tests/checkpoint/test_resume_way.py::test_a_thousand_harms_are_found",),
    "the power is cut in the middle of a save": (
        "tests/checkpoint/test_save_kills.py::test_power_cuts_at_every_moment_of_a_save",
        "tests/checkpoint/test_save_kills.py::test_kills_in_the_middle_of_saves",
    ),
    "an image, a latent or a caption is damaged": (
        f"{END}test_a_flipped_bit_is_reported_and_workers_stay_in_step",
        f"{END}test_too_many_bad_rows_stop_all_workers_with_one_line",
    ),
    "loss or gradients are not finite": (
        f"{GUARD}test_a_step_with_one_workers_nan_changes_nothing_anywhere",
        f"{GUARD}test_three_bad_steps_in_a_row_are_gone_round",
    ),
    "the loss leaps": (f"{GUARD}test_a_batch_that_is_a_thousand_times_too_large_is_skipped",),
    "weights that are not finite are to be saved": (
        "tests/checkpoint/test_write.py::test_what_is_not_finite_is_not_saved_and_leftovers_go",
    ),
    "a card computes something wrong in silence": (f"{GUARD}test_a_flipped_bit_is_found_and_undone",),
    "the host's memory leaks away": (
        f"{HOST}test_a_worker_that_leaks_is_started_anew_with_the_others_and_nothing_changes",
        "tests/host/test_memory.py::test_a_slow_leak_is_foretold",
    ),
    "a card is hot, or its clocks are held down": (
        f"{ALARMS}test_heat_is_told_once_until_the_card_has_cooled_down",
        f"{ALARMS}test_clocks_that_are_held_down_for_minutes",
    ),
    "a PCIe link gets worse": (
        f"{ALARMS}test_a_link_that_is_narrower_than_before_under_load",
        f"{ALARMS}test_a_burst_of_replays_is_told_and_a_few_are_not",
    ),
    "the power supply trips": (f"{END}test_killed_run_goes_on_from_its_last_checkpoint",),
    "somebody stops the run": (
        f"{END}test_interrupted_run_ends_with_the_same_bits",
        "tests/parallel/test_launch.py::test_signal_lets_workers_save",
        "tests/parallel/test_launch.py::test_second_signal_kills",
    ),
    "/dev/shm is full": ("tests/host/test_disk_room.py::test_shared_memory",),
    "a key of the configuration is wrong": (f"{END}test_a_wrong_config_is_one_line_per_problem",),
    "a model is another one than it should be": ("tests/model_files/examine/test_check.py::test_other_models",),
    "a file was made to do harm": (
        "tests/test_hostile_files.py::test_some_of_every_kind_that_needs_no_networks",
        "tests/test_hostile_files.py::test_every_kind",
        "tests/test_hostile_files.py::test_every_kind_of_data",
    ),
    "a record or a tracker fails": (
        "tests/measure/test_telemetry.py::test_a_full_disk_costs_records_and_nothing_else",
        "tests/train/test_faults_beside.py::test_samples_that_cannot_be_drawn_are_a_warning",
        "tests/measure/test_trackers.py::test_a_tracker_that_fails_is_told_counted_and_tried_again",
        "tests/measure/test_trackers.py::test_a_tracker_that_hangs_stalls_neither_steps_nor_the_end",
        "tests/notify/test_messages.py::test_one_more_try_and_then_a_counted_warning",
    ),
    "two commands want one run": (f"{END}test_two_commands_do_not_share_a_run_directory",),
    "one worker is slower than the others": ("tests/train/test_pace.py::test_a_worker_that_is_slow_is_named",),
}

if __name__ == "__main__":
    print("\n".join(dict.fromkeys(test for tests in CATALOGUE.values() for test in tests)))
