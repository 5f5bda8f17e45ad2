"""How the findings of all processes become one result, and what people see of it."""

import math

from dash_megatron.doctor.findings import (
    Finding,
    Result,
    merge_equal,
    merge_largest,
    merge_smallest,
    rank_list,
)
from dash_megatron.doctor.runner import result_lines


def test_ranks_are_listed_as_runs() -> None:
    assert rank_list([0]) == "0"
    assert rank_list([9, 1, 2, 3, 5]) == "1-3, 5, 9"


def test_one_failure_fails_all_and_its_message_names_the_ranks() -> None:
    findings = [Finding("skipped", message="no GPU"), Finding(), Finding("failed", message="too hot")]
    merged = merge_largest([*findings, findings[2]])
    assert (merged.status, merged.message) == ("failed", "rank 2-3: too hot")


def test_the_largest_error_counts_and_one_that_is_no_number_most_of_all() -> None:
    findings = [Finding(figures={"error": value}) for value in (0.1, 0.3, 0.2)]
    assert merge_largest(findings).figures == {"error": 0.3}
    for place in range(3):
        broken = [*findings[:place], Finding(figures={"error": math.nan}), *findings[place:]]
        assert math.isnan(float(merge_largest(broken).figures["error"]))


def test_the_slowest_rate_counts_and_names_its_rank() -> None:
    findings = [Finding(figures={"write GB/s": value, "files": 3}) for value in (2.0, 0.5, 1.0)]
    expected = {"write GB/s": 0.5, "write GB/s slowest rank": 1, "files": 3}
    assert merge_smallest(findings).figures == expected


def test_a_figure_that_differs_fails_and_says_who_has_what() -> None:
    findings = [Finding(figures={"torch": version, "gpu": "H200"}) for version in ("2.13", "2.13", "2.12")]
    merged = merge_equal(findings)
    assert merged.status == "failed"
    assert "torch is 2.13 on rank 0-1, but 2.12 on rank 2" in merged.message
    assert "gpu" not in merged.message
    assert merge_equal(findings[:2]).status == "ok"


def test_a_result_is_shown_with_its_time_limit_figures_and_message() -> None:
    text = result_lines(Result("disk", "failed", {"write GB/s": 0.123456}, "it is full", 1.0, 300.0))
    assert text.splitlines()[0].split() == ["disk", "failed", "1.0", "s", "of", "at", "most", "300", "s"]
    assert "write GB/s 0.1235" in text
    assert text.splitlines()[-1] == "    it is full"
