"""Rates and paired differences: the share is exact, the interval is the bootstrap's."""

from __future__ import annotations

import numpy as np
import pytest

from safegene_vllm.errors import ConfigError
from safegene_vllm.evaluation.statistics import Rate, paired_difference, rate


def test_the_interval_is_that_of_a_plain_bootstrap() -> None:
    values = [True] * 30 + [False] * 70
    found = rate(values)
    plain = np.random.default_rng(1).choice(values, size=(20_000, 100)).mean(axis=1)
    low, high = np.percentile(plain, [2.5, 97.5])
    assert (found.rate, found.n) == (0.3, 100)
    assert abs(found.low - low) <= 0.01 and abs(found.high - high) <= 0.01


def test_the_paired_interval_is_that_of_resampled_pairs() -> None:
    before = [True] * 50 + [False] * 50
    after = [True] * 45 + [False] * 5 + [True] * 20 + [False] * 30
    found = paired_difference(before, after)
    change = np.array(after, float) - np.array(before, float)
    plain = np.random.default_rng(1).choice(change, size=(20_000, 100)).mean(axis=1)
    low, high = np.percentile(plain, [2.5, 97.5])
    assert found.rate == pytest.approx(0.15) and found.n == 100
    assert abs(found.low - low) <= 0.011 and abs(found.high - high) <= 0.011
    assert found.low > 0, "a change in few prompts of many is seen because prompts are paired"


def test_more_prompts_make_a_narrower_interval() -> None:
    few, many = rate([True, False] * 10), rate([True, False] * 1000)
    assert few.high - few.low > 5 * (many.high - many.low)


def test_no_change_and_all_one_outcome() -> None:
    assert paired_difference([True, False], [True, False]) == Rate(0.0, 0.0, 0.0, 2)
    assert rate([True] * 3) == Rate(1.0, 1.0, 1.0, 3)
    assert paired_difference([False], [True]).rate == 1.0
    assert paired_difference([True], [False]).rate == -1.0


def test_the_same_seed_gives_the_same_interval() -> None:
    values = [i % 3 == 0 for i in range(50)]
    assert rate(values, seed=4) == rate(values, seed=4)


def test_nothing_to_count_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no values"):
        rate([])
    with pytest.raises(ConfigError, match="0 values before"):
        paired_difference([], [])
    with pytest.raises(ConfigError, match="1 values before and 2 after"):
        paired_difference([True], [True, True])
