"""The fault matrix (reliability.md 4.2, 4.3, 4.5): which tests prove which of its rows.

A name is a file of ``tests``, ``::`` and a test in it. The rows of 4.3 are told with what the
client gets, what is owed and how it is counted in the table of ``e2e/test_fault_matrix.py``; each
case there has its row's number. ``CASES`` are the rows that must have some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

ONE = "e2e/test_fault_matrix.py::test_a_fault_of_the_only_upstream"
OTHER = "e2e/test_fault_matrix.py::test_a_fault_where_there_is_another_upstream"
BROKEN_OFF = "e2e/test_endings.py::test_an_upstream_that_breaks_off_is_booked_and_never_asked_twice"
ENDINGS, WAYS, LOAD = "e2e/test_endings.py::", "e2e/test_ways.py::", "e2e/test_load.py::"
PICTURES, STREAMS, STORIES = (
    "e2e/test_generations.py::",
    "e2e/test_streams.py::",
    "e2e/test_fault_stories.py::",
)
WIRE, ACCOUNT = "upstream/test_transport.py::", "upstream/test_account.py::"
PITFALLS = f"{PICTURES}test_a_success_that_is_none_is_a_clean_error"
ODD_BILLS = f"{PICTURES}test_a_picture_with_an_odd_bill_is_delivered_booked_and_flagged"

CASES: Final = frozenset({37, 38, 39, 41, 42, *range(44, 47), *range(50, 61), 62})
"""Rows with cases in the table of faults."""

ROWS: Final[Mapping[int, Sequence[str]]] = {
    # The client leaves.
    31: (f"{ENDINGS}test_a_client_that_leaves_while_it_sends_buys_nothing",),
    32: (f"{ENDINGS}test_a_client_that_leaves_before_the_call_is_sent_gets_its_money_back",),
    33: (
        f"{ENDINGS}"
        "test_a_client_that_leaves_while_the_picture_is_made_pays_for_it_and_may_come_back",
        f"{STORIES}test_an_orphan_is_found_by_the_retry_that_comes_for_it",
    ),
    34: (
        f"{ENDINGS}test_a_client_that_leaves_within_a_large_answer_gives_all_room_back",
        f"{ENDINGS}test_a_client_that_leaves_within_a_stream_does_not_stop_it",
    ),
    35: (
        f"{ENDINGS}test_a_client_that_takes_nothing_is_dropped",
        f"{STORIES}test_a_client_that_reads_a_byte_at_a_time_is_dropped_and_finds_it_kept",
        "e2e/test_slow_readers.py::test_a_paid_picture_does_not_wait_for_a_slow_reader_for_ever",
        "e2e/test_slow_readers.py::test_a_reader_that_is_only_slow_gets_every_byte",
    ),
    36: (f"{ENDINGS}test_a_client_that_closes_only_its_sending_half_is_answered",),
    # The upstream.
    37: (
        ONE,
        OTHER,
        f"{WAYS}test_a_name_that_nobody_knows",
        f"{ACCOUNT}test_a_name_that_is_not_known",
    ),
    38: (
        *(ONE, OTHER, f"{WAYS}test_an_upstream_that_cannot_be_reached"),
        f"{ENDINGS}test_an_upstream_that_cannot_be_reached_costs_nothing",
        *(f"{WIRE}test_a_closed_port", f"{WIRE}test_no_connection_in_time"),
    ),
    39: (
        *(ONE, OTHER, f"{WAYS}test_a_host_that_cannot_be_trusted_is_not_asked_again"),
        f"{WIRE}test_tls_that_cannot_be_trusted",
    ),
    40: (
        f"{STORIES}test_a_full_pool_is_no_fault_of_the_call",
        f"{LOAD}test_beyond_the_queue_a_refusal_says_when_to_come_back",
        f"{ACCOUNT}test_every_connection_is_busy",
    ),
    41: (ONE, OTHER, BROKEN_OFF, f"{WIRE}test_a_reset_while_the_request_is_sent"),
    42: (
        ONE,
        OTHER,
        BROKEN_OFF,
        f"{PICTURES}test_an_upstream_that_is_late_may_have_made_the_picture",
    ),
    43: (
        f"{STORIES}test_a_connection_that_ends_as_it_is_used_again_may_have_cost_a_picture",
        f"{STORIES}test_a_connection_that_ended_between_two_calls_is_not_used",
        f"{WIRE}test_idle_connections_are_closed_in_time",
        f"{WIRE}test_closed_as_a_used_connection_is_written_to",
    ),
    44: (ONE, OTHER, BROKEN_OFF, f"{WIRE}test_a_body_that_drips"),
    45: (ONE, OTHER, BROKEN_OFF, PITFALLS),
    46: (ONE, OTHER, PITFALLS),
    47: (ODD_BILLS, f"{STREAMS}test_a_completed_picture_without_a_bill_costs_the_bound"),
    48: (
        ODD_BILLS,
        f"{STORIES}test_whatever_the_bill_says_the_picture_passes_and_money_is_sane",
        f"{STORIES}test_a_bill_that_cannot_be_is_counted",
        "domain/test_usage.py",
    ),
    49: (
        ODD_BILLS,
        "e2e/test_bound.py::"
        "test_a_bill_over_the_bound_is_posted_counted_and_raises_the_next_bounds",
        "e2e/test_money.py::test_what_cost_more_than_its_bound_is_booked_and_counts",
    ),
    50: (ONE, OTHER, f"{WIRE}test_an_answer_that_is_too_large"),
    51: (
        *(ONE, OTHER, BROKEN_OFF),
        f"{STREAMS}test_an_error_behind_a_partial_picture_is_raised_and_booked",
    ),
    52: (
        *(ONE, OTHER),
        f"{STREAMS}test_the_error_event_has_the_one_form_that_both_sdks_raise",
        "e2e/test_node.py::test_an_error_in_a_stream_is_thrown",
    ),
    53: (
        *(ONE, OTHER, f"{STORIES}test_another_key_is_asked_while_a_limited_one_rests"),
        f"{WAYS}test_a_limited_upstream_is_left_alone_for_as_long_as_it_says",
        f"{WAYS}test_where_all_rest_the_client_is_told_when_to_come_back",
        f"{PICTURES}test_the_providers_rate_limit_says_how_long",
    ),
    54: (
        *(ONE, OTHER),
        f"{STORIES}test_a_limit_without_a_time_rests_a_second_and_twice_as_long_each_time",
    ),
    55: (
        *(ONE, OTHER, f"{WAYS}test_a_refused_key_rests_and_the_next_one_buys"),
        f"{PICTURES}test_an_empty_account_never_looks_like_the_teams",
    ),
    56: (
        *(ONE, OTHER, f"{WAYS}test_a_refused_key_rests_and_the_next_one_buys"),
        f"{PICTURES}test_a_refused_account_is_the_owners_fault",
    ),
    57: (
        *(ONE, OTHER, f"{WAYS}test_what_is_refused_for_what_it_asks_goes_nowhere_else"),
        f"{PICTURES}test_a_refusal_by_the_provider_is_passed_on_unchanged",
    ),
    58: (
        *(ONE, OTHER, f"{WAYS}test_a_failure_of_its_own_is_made_good_by_another"),
        f"{WAYS}test_a_breaker_opens_and_one_real_request_is_its_probe",
    ),
    59: (ONE, OTHER, f"{PICTURES}test_an_edge_that_gave_up_may_have_cost_a_picture"),
    60: (ONE, OTHER, f"{PICTURES}test_a_redirect_is_not_followed"),
    61: (
        f"{STORIES}test_of_an_upstreams_headers_only_a_few_pass",
        f"{PICTURES}test_an_answer_says_what_it_cost_and_nothing_of_the_shared_account",
    ),
    62: (ONE, OTHER, f"{ACCOUNT}test_encodings_are_undone", f"{ACCOUNT}test_an_answer_that_breaks"),
    # The process.
    75: ("e2e/test_drain.py",),
    76: (
        "e2e/test_deaths.py::test_what_a_dead_process_left_is_known_to_the_next",
        "e2e/test_processes.py::test_a_killed_process_loses_no_charge_and_leaves_no_hold",
        "e2e/test_processes.py::test_a_storm_with_kills_at_random_moments",
        "e2e/test_fail_the_nth.py::test_a_process_dies_at_every_call_and_money_is_exact",
    ),
    77: (f"{STORIES}test_a_blocked_loop_is_measured_told_of_and_not_alive", "test_watchdog.py"),
    78: (
        f"{STORIES}test_workers_an_hour_apart_leave_each_others_calls_alone",
        "stores/test_postgres.py::test_leases_and_beats_are_judged_by_the_servers_clock",
        "e2e/test_budgets.py::test_a_call_over_midnight_is_booked_where_it_was_held",
    ),
    79: (f"{LOAD}test_with_few_descriptors_the_doors_are_shut_and_the_ledger_works",),
    80: (
        f"{LOAD}test_a_full_spool_is_a_refusal_with_a_time",
        f"{LOAD}test_many_large_answers_stay_within_the_budget_of_memory",
        f"{STORIES}test_nothing_is_bought_while_the_answers_that_wait_fill_the_disk",
        f"{STORIES}test_a_picture_that_does_not_fit_is_booked_and_told_of",
    ),
    92: ("e2e/test_replicas.py",),
}
