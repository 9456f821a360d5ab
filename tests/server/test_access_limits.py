"""Limits against a clock in the test's hand: what is admitted, when again, and what is released."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from safegene_server.access.catalog import Limits
from safegene_server.access.limits import SLACK_S, WINDOW_S, Counters, SlidingWindow
from safegene_server.access.models import Target
from safegene_server.access.rejection import RequestRejectedError


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def target(name: str = "acme", revision: int = 1, **limits: int) -> Target:
    return Target(name, f"{name}@{revision}", Limits(**limits))


def retry_after(counters: Counters, wanted: Target, estimate: int = 1) -> int:
    with pytest.raises(RequestRejectedError) as caught:
        counters.admit(wanted, estimate)
    assert caught.value.status == 429
    assert wanted.account in str(caught.value)
    return int((caught.value.headers or {})["Retry-After"])


def test_without_limits_every_request_is_admitted_and_counted() -> None:
    counters = Counters(Clock())
    slots = [counters.admit(target(), 10**9) for _ in range(100)]
    assert counters.in_flight("acme@1") == 100
    for slot in slots:
        slot.close(10**9)
    assert counters.in_flight("acme@1") == 0
    assert not counters.running


def test_so_many_at_once() -> None:
    counters = Counters(Clock())
    wanted = target(concurrent=2)
    first = counters.admit(wanted, 1)
    counters.admit(wanted, 1)
    assert retry_after(counters, wanted) == 1
    counters.admit(target("other", concurrent=2), 1)
    first.close(0)
    first.close(0)
    counters.admit(wanted, 1)
    assert retry_after(counters, wanted) == 1


def test_a_request_counts_once_per_completion() -> None:
    clock = Clock()
    counters = Counters(clock)
    wanted = target(concurrent=8, requests_per_minute=12)
    slot = counters.admit(wanted, 1, 6)
    with pytest.raises(RequestRejectedError) as caught:
        counters.admit(wanted, 1, 3)
    assert (caught.value.status, caught.value.reason) == (429, "concurrent")
    small = counters.admit(wanted, 1, 2)
    slot.close(0)
    small.close(0)
    assert counters.accounts["acme"].running == 0
    with pytest.raises(RequestRejectedError) as caught:
        counters.admit(wanted, 1, 5)
    assert (caught.value.status, caught.value.reason) == (429, "requests_per_minute")
    assert (caught.value.headers or {})["Retry-After"] == "60"
    counters.admit(wanted, 1, 4).close(0)
    assert counters.in_flight("acme@1") == 0


@pytest.mark.parametrize("limit", ["concurrent", "requests_per_minute"])
def test_a_request_that_can_never_be_admitted_is_a_400(limit: str) -> None:
    with pytest.raises(
        RequestRejectedError, match=r"is for 9 completions.* has a limit of 8"
    ) as caught:
        Counters(Clock()).admit(target(**{limit: 8}), 1, 9)
    assert (caught.value.status, caught.value.headers) == (400, None)
    assert caught.value.reason == limit


def test_one_tenants_revisions_share_its_limits_but_are_counted_apart() -> None:
    counters = Counters(Clock())
    old = counters.admit(target(revision=1, concurrent=2), 1)
    counters.admit(target(revision=2, concurrent=2), 1)
    retry_after(counters, target(revision=2, concurrent=2))
    assert (counters.in_flight("acme@1"), counters.in_flight("acme@2")) == (1, 1)
    old.close(0)
    assert (counters.in_flight("acme@1"), counters.in_flight("acme@2")) == (0, 1)


def test_so_many_in_a_minute() -> None:
    clock = Clock()
    counters = Counters(clock)
    wanted = target(requests_per_minute=2)
    counters.admit(wanted, 1).close(0)
    clock.now_s += 20
    counters.admit(wanted, 1).close(0)
    assert retry_after(counters, wanted) == 40
    clock.now_s += 39.5
    assert retry_after(counters, wanted) == 1
    clock.now_s += 0.5
    counters.admit(wanted, 1)
    assert retry_after(counters, wanted) == 20


@given(st.lists(st.floats(0, 30), max_size=60), st.integers(1, 5))
@example([22.64375978807167, 0.0, 0.0, 0.0, 1.5835693952663519, 1.4898405580884813], 1)
def test_no_minute_exceeds_the_limit_and_retry_after_is_sufficient(
    pauses: list[float], most: int
) -> None:
    clock = Clock()
    counters = Counters(clock)
    admitted: list[float] = []
    for pause in pauses:
        clock.now_s += pause
        try:
            counters.admit(target(requests_per_minute=most), 1).close(0)
        except RequestRejectedError as rejection:
            assert len([at for at in admitted if at > clock.now_s - WINDOW_S + SLACK_S]) == most
            clock.now_s += int((rejection.headers or {})["Retry-After"])
            counters.admit(target(requests_per_minute=most), 1).close(0)
        admitted.append(clock.now_s)
    for start in admitted:
        assert len([at for at in admitted if start <= at < start + WINDOW_S - SLACK_S]) <= most


def test_tokens_are_expected_and_then_settled() -> None:
    clock = Clock()
    counters = Counters(clock)
    wanted = target(tokens_per_minute=100)
    slot = counters.admit(wanted, 60)
    assert retry_after(counters, wanted, 41) == 1
    counters.admit(wanted, 40).close(10)
    slot.close(20)
    counters.admit(wanted, 70).close(70)
    assert retry_after(counters, wanted) == 60
    clock.now_s += 60
    counters.admit(wanted, 100)


def test_the_wait_for_tokens_is_until_enough_of_them_are_a_minute_old() -> None:
    clock = Clock()
    counters = Counters(clock)
    wanted = target(tokens_per_minute=100)
    for used in (30, 30, 40):
        counters.admit(wanted, 1).close(used)
        clock.now_s += 10
    assert retry_after(counters, wanted, 30) == 30
    assert retry_after(counters, wanted, 31) == 40
    assert retry_after(counters, wanted, 500) == 50


def test_a_request_larger_than_the_budget_is_admitted_alone() -> None:
    clock = Clock()
    counters = Counters(clock)
    wanted = target(tokens_per_minute=100)
    slot = counters.admit(wanted, 5000)
    assert retry_after(counters, wanted, 5000) == 1
    slot.close(5000)
    assert retry_after(counters, wanted, 1) == 60
    clock.now_s += 60
    counters.admit(wanted, 5000)


def test_requests_without_tokens_ignore_the_token_limit() -> None:
    counters = Counters(Clock())
    wanted = target(tokens_per_minute=10)
    counters.admit(wanted, 10)
    retry_after(counters, wanted, 1)
    counters.admit(wanted, 0)


def test_rejected_requests_are_not_counted() -> None:
    clock = Clock()
    counters = Counters(clock)
    both = target(requests_per_minute=2, concurrent=1)
    slot = counters.admit(both, 1)
    for _ in range(5):
        retry_after(counters, both)
    slot.close(0)
    counters.admit(both, 1)
    assert counters.in_flight("acme@1") == 1


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50)), max_size=40))
def test_the_window_sums_the_last_minute(entries: list[tuple[float, int]]) -> None:
    minute, now, added = SlidingWindow(), 0.0, []
    for pause, amount in entries:
        now += pause
        minute.add(now, amount)
        added.append((now, amount))
        assert minute.used(now) == sum(a for at, a in added if at > now - WINDOW_S + SLACK_S)
