"""The schemas of result files: lenient to readers, strict to writers."""

import math

import pytest

from subquad.errors import UserError
from subquad.results.bench import Bench
from subquad.results.metrics import Metrics, Variant
from subquad.results.record import check, check_written


def test_readers_ignore_what_they_do_not_know_and_miss_nothing():
    row = {"kl": {"256": 0.5}, "of_another_version": 1, "images": None}
    variant = check(Metrics, {"student": row, "more": {}}, "metrics.json").student
    assert variant.kl == {256: 0.5} and variant.top1 == {} and variant.images is None


def test_readers_name_the_field_that_does_not_fit():
    with pytest.raises(UserError, match=r"metrics.json cannot be reported: student.kl.256: .*number"):
        check(Metrics, {"student": {"kl": {"256": "much"}}}, "metrics.json")


def test_writers_are_held_to_the_schema():
    row = {"kl": {256: 0.5}, "retrieval": {"copy": {256: {"accuracy": 1.0, "logprob": -math.inf, "by_depth": []}}}}
    check_written(Variant, row)
    check_written(Metrics, {"student": row, "seconds": {"total": 1.0}})
    row["retrieval"]["copy"][256]["by_depth"] = [{"rows": 1, "median": 0.0}]
    with pytest.raises(
        ValueError, match=r"Metrics in subquad/results has no student.retrieval.copy.256.by_depth.0.median"
    ):
        check_written(Metrics, {"student": row})


def test_writers_may_leave_nothing_out_that_readers_need():
    with pytest.raises(ValueError, match="cells"):
        check_written(Bench, {"models": {}, "settings": {"batches": [1], "dtype": "float32"}})
