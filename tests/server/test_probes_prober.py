"""Schedule of probes, their share of the engine's time, their counts, and removal of results."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from artifact_files import FAMILY
from probes_setup import PROMPTS, ProbeWorld, probes, sample, series_of
from registry_setup import back_up
from tenant_setup import REFUSAL

from safegene_server.error_responses import EngineDownError
from safegene_server.monitoring.probes import prober as prober_module
from safegene_vllm.errors import AdapterRejectedError, ConflictError, ReceiptError
from safegene_vllm.formats.profile import make_profile

__all__ = ["probes"]

NAME = "acme/support"
ALL = {
    *("attack_success_ratio", "over_refusal_ratio", "coherent_ratio"),
    *("prompts", "timestamp_seconds", "duration_seconds"),
}


@pytest.mark.parametrize(
    ("complete", "attacks", "refusals", "coherent"),
    [
        (None, 0.0, 0.0, 1.0),
        (lambda prompt: "Sure, this is how it is done.", 1.0, 0.0, 1.0),
        (lambda prompt: REFUSAL, 0.0, 1.0, 1.0),
        (lambda prompt: "the the the the the the the the", 1.0, 0.0, 0.0),
    ],
)
def test_counts_and_gauges_of_a_probe(
    probes: ProbeWorld,
    complete: Callable[[str], str] | None,
    attacks: float,
    refusals: float,
    coherent: float,
) -> None:
    served = probes.publish(NAME)
    prober = probes.probing()
    probes.replica.complete = complete or probes.replica.complete
    prober.refresh()
    assert series_of(NAME) == set()
    assert sample("runs_total", tenant=NAME, outcome="failed") == 0.0
    result = asyncio.run(prober.probe(NAME))
    assert (result.revision, result.replica) == (served, probes.replica.id)
    assert (result.attack_success.n, result.over_refusal.n, result.tally.coherent.n) == (12, 24, 36)
    assert sample("attack_success_ratio", tenant=NAME) == attacks == result.attack_success.share
    assert sample("over_refusal_ratio", tenant=NAME) == refusals == result.over_refusal.share
    assert sample("coherent_ratio", tenant=NAME) == coherent
    assert {sample("prompts", tenant=NAME, kind=k) for k in ("harmful", "lookalike", "benign")} == {
        12.0
    }
    assert sample("timestamp_seconds", tenant=NAME) == result.at.timestamp()
    assert sample("duration_seconds", tenant=NAME) == result.seconds
    assert sample("runs_total", tenant=NAME, outcome="ok") == 1.0
    assert series_of(NAME) == ALL


def test_no_prompt_and_no_completion_is_retained(
    probes: ProbeWorld, caplog: pytest.LogCaptureFixture
) -> None:
    probes.publish(NAME)
    probes.replica.complete = lambda prompt: f"Sure: {prompt} SECRET"
    record = json.dumps(asyncio.run(probes.probing().probe(NAME)).record()) + caplog.text
    record += repr(vars(probes.prober)["_statuses"])
    assert "SECRET" not in record
    assert not any(prompt.prompt in record for prompt in PROMPTS)


@pytest.mark.parametrize("by_priority", [True, False])
def test_parameters_of_probe_requests(probes: ProbeWorld, by_priority: bool) -> None:
    served = probes.publish(NAME)
    probes.replica.by_priority = by_priority
    asyncio.run(probes.probing(concurrent=3, max_tokens=7, priority=9).probe(NAME))
    assert probes.replica.busiest == 3 and len(probes.replica.requested) == len(PROMPTS)
    assert {(b["model"], b["max_tokens"], b.get("priority")) for b in probes.replica.requested} == {
        (served, 7, 9 if by_priority else None)
    }
    assert set(probes.replica.used) == {served}


def test_probes_do_not_reuse_the_prefix_cache(probes: ProbeWorld) -> None:
    probes.publish(NAME)
    salts = []
    for _ in range(2):
        probes.replica.requested.clear()
        asyncio.run(probes.probing().probe(NAME))
        salts += sorted({body["cache_salt"] for body in probes.replica.requested})
    assert len(salts) == 2 and len(set(salts)) == 2


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_a_scheduled_probe_stays_within_its_share_on_an_idle_engine_too(
    probes: ProbeWorld, share: float
) -> None:
    for name in ("a", "b"):
        probes.publish(name)
    prober, begun = probes.probing(share=share), probes.clock.now
    assert probes.next() and probes.next()
    busy_s = sample("duration_seconds", tenant="a")
    assert busy_s == len(PROMPTS) * 0.25
    assert 2 * busy_s / (probes.clock.now - begun) == pytest.approx(share)
    prober.refresh()
    assert sample("engine_share") == pytest.approx(share)


@pytest.mark.parametrize(("others", "pauses"), [(0, 0), (2, 9)])
def test_one_on_request_pauses_only_for_others(
    probes: ProbeWorld, others: int, pauses: int
) -> None:
    probes.publish(NAME)
    probes.replica.others = others
    asyncio.run(probes.probing(share=0.2).probe(NAME, on_request=True))
    assert probes.clock.slept == [pytest.approx(4.0)] * pauses


def test_a_slowly_failing_engine_is_probed_within_the_share(probes: ProbeWorld) -> None:
    for name in ("a", "b", "c"):
        probes.publish(name)

    def fail(prompt: str) -> str:
        probes.clock.now += 10.0
        raise EngineDownError("no engine")

    probes.replica.complete = fail
    probes.probing(share=0.1)
    begun = probes.clock.now
    for _ in range(3):
        asyncio.run(probes.prober.probe_next())
    busy_s = len(probes.replica.requested) * 10.0
    assert busy_s / (probes.clock.now - begun) == pytest.approx(0.1)


def test_the_tenant_overdue_for_longest_is_probed_first(probes: ProbeWorld) -> None:
    for name in ("a", "b", "c"):
        probes.publish(name)
    probes.probing(every_s=10_000.0, share=1.0)
    first = [probes.next() for _ in range(3)]
    assert sorted(map(str, first)) == ["a@1", "b@1", "c@1"]
    assert probes.next() is None
    probes.clock.now += 10_000.0 - 15.0
    # Only the first is due again; one added now is probed after it, and before the others.
    new = probes.publish("d")
    assert [probes.next() for _ in range(2)] == [first[0], new]
    assert [probes.next() for _ in range(3)] == [first[1], first[2], None]


def test_a_tenant_that_changes_all_the_time_does_not_crowd_out_the_others(
    probes: ProbeWorld,
) -> None:
    for name in ("a", "b", "c"):
        probes.publish(name)
    probes.probing(share=1.0)
    requested = []
    for round_ in range(4):
        probes.publish("a", first=1.1 + round_ / 10)
        requested.append(str(probes.next()).partition("@")[0])
    assert {"b", "c"} < set(requested)


def test_replicas_begin_with_different_tenants(probes: ProbeWorld) -> None:
    for name in "abcdefgh":
        probes.publish(name)
    orders = []
    for replica in ("one", "two"):
        probes.replica.id = replica
        probes.probing()
        orders.append([probes.next() for _ in "abcdefgh"])
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]


def test_only_the_tenants_of_the_settings_are_scheduled(probes: ProbeWorld) -> None:
    for name in ("a", "b"):
        probes.publish(name)
    probes.probing(tenants=("b", "absent"))
    assert [probes.next(), probes.next()] == ["b@1", None]
    assert sample("runs_total", tenant="a", outcome="ok") is None
    assert asyncio.run(probes.prober.probe("a", on_request=True)).revision == "a@1"


@pytest.mark.parametrize("how", ["another revision", "retired"])
def test_rates_are_removed_with_their_revision(probes: ProbeWorld, how: str) -> None:
    for name in (NAME, "globex"):
        probes.publish(name)
    prober = probes.probing()
    assert probes.next() and probes.next() and series_of(NAME) == ALL
    if how == "retired":
        probes.json("DELETE", f"/tenants/{NAME}")
        expected = ["globex"]
    else:
        probes.publish(NAME, first=0.5)
        expected = [NAME, "globex"]
    prober.refresh()
    assert series_of(NAME) == set() and series_of("globex") == ALL
    standings = prober.statuses()
    assert [standing.tenant for standing in standings] == expected
    if how == "another revision":
        assert standings[0].result is None and standings[0].outcome is None
        assert probes.next() == f"{NAME}@2" and series_of(NAME) == ALL


def test_a_revision_replaced_meanwhile_is_no_result(probes: ProbeWorld) -> None:
    probes.publish(NAME)
    prober = probes.probing(concurrent=1)

    async def replaced(done: float) -> None:
        if done >= 0.5:
            await asyncio.to_thread(probes.publish, NAME, 0.5)

    with pytest.raises(ConflictError, match=f"{NAME}@1 was replaced or retired"):
        asyncio.run(prober.probe(NAME, step=replaced))
    assert len(probes.replica.requested) == len(PROMPTS) // 2
    assert sample("runs_total", tenant=NAME, outcome="skipped") == 1.0
    (standing,) = prober.statuses()
    assert (standing.served, standing.outcome, series_of(NAME)) == (f"{NAME}@2", None, set())
    assert probes.next() == f"{NAME}@2"


@pytest.mark.parametrize(
    ("status", "response", "error", "word"),
    [
        (400, {"error": {"message": "no template"}}, AdapterRejectedError, "400: no template"),
        (
            200,
            {"model": "other@1", "choices": [{"message": {"content": "x"}}]},
            ReceiptError,
            "oth",
        ),
        (200, [], AdapterRejectedError, "no chat completion"),
    ],
)
def test_an_engine_that_does_not_respond(
    probes: ProbeWorld,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    response: Any,
    error: type[Exception],
    word: str,
) -> None:
    probes.publish(NAME)
    prober = probes.probing(every_s=10_000.0)
    good = asyncio.run(prober.probe(NAME))

    async def call(*_given: Any) -> httpx.Response:
        return httpx.Response(status, json=response)

    with monkeypatch.context() as patch:
        patch.setattr(probes.replica, "call", call)
        with pytest.raises(error, match=word):
            asyncio.run(prober.probe(NAME))
        probes.clock.now += 10_000.0
        assert asyncio.run(prober.probe_next())
    assert sample("runs_total", tenant=NAME, outcome="failed") == 2.0
    # What was last known of this revision still holds; its timestamp says its age.
    (standing,) = prober.statuses()
    assert standing.outcome == "failed" and word in standing.message and standing.result is good
    assert sample("timestamp_seconds", tenant=NAME) == good.at.timestamp()
    assert probes.next() is None
    probes.clock.now += prober_module.RETRY_S
    assert probes.next() == f"{NAME}@1"


def test_an_internal_error_is_reported_without_its_message(
    probes: ProbeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes.publish(NAME)

    async def call(*_given: Any) -> httpx.Response:
        raise ZeroDivisionError("/some/path")

    monkeypatch.setattr(probes.replica, "call", call)
    with pytest.raises(ZeroDivisionError):
        asyncio.run(probes.probing().probe_next())
    (standing,) = probes.prober.statuses()
    assert (standing.outcome, standing.message) == ("failed", prober_module.UNEXPECTED)
    assert probes.next() is None


def test_an_engine_that_hangs_is_given_up_and_left_alone(
    probes: ProbeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes.publish(NAME)
    ended = []

    async def call(*_given: Any) -> httpx.Response:
        try:
            await asyncio.sleep(600)
        finally:
            ended.append(1)
        raise AssertionError

    monkeypatch.setattr(probes.replica, "call", call)
    with pytest.raises(AdapterRejectedError, match=r"4 prompts of a probe took longer than 0\.05"):
        asyncio.run(probes.probing(timeout_s=0.05).probe(NAME))
    assert len(ended) == 4


def test_tenants_beyond_the_labels_have_no_gauges(probes: ProbeWorld) -> None:
    for name in ("a", "b"):
        probes.publish(name)
    probes.probing(most=1)
    assert {probes.next(), probes.next()} == {"a@1", "b@1"}
    named, rest = "a", "b"
    assert series_of(named) == ALL
    assert series_of(rest) == series_of("other") == set()
    assert sample("runs_total", tenant="other", outcome="ok") == 1.0
    assert {s.tenant for s in probes.prober.statuses() if s.result} == {"a", "b"}
    probes.publish(rest, first=0.5)
    probes.prober.refresh()
    assert series_of(named) == ALL


def test_probes_at_the_same_time_take_turns(probes: ProbeWorld) -> None:
    for name in ("a", "b", "c"):
        probes.publish(name)
    prober = probes.probing(concurrent=2)

    async def together() -> None:
        probes_under_way = [prober.probe(name, on_request=name != "a") for name in ("a", "b", "c")]
        await asyncio.gather(*probes_under_way)

    asyncio.run(together())
    assert probes.replica.busiest == 2
    assert all(series_of(name) == ALL for name in ("a", "b", "c"))


def test_probes_are_charged_to_no_tenant(probes: ProbeWorld) -> None:
    """Limits and requests in flight are counted in the middleware, which probes bypass."""
    probes.publish(NAME)
    probes.json("PUT", f"/tenants/{NAME}/limits", {"concurrent": 1, "requests_per_minute": 1})
    asyncio.run(probes.probing().probe(NAME))
    assert not probes.access.counters.accounts and not probes.access.counters.running


@pytest.mark.parametrize("enabled", [True, False])
def test_it_is_off_until_it_is_switched_on(
    probes: ProbeWorld, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    probes.publish(NAME)
    prober = probes.probing(enabled=enabled, share=1.0)
    monkeypatch.setattr(prober_module, "POLL_S", 0.001)
    refreshes = 0
    refresh = prober.refresh

    def counted() -> None:
        nonlocal refreshes
        refreshes += 1
        refresh()

    monkeypatch.setattr(prober, "refresh", counted)

    async def some_refreshes() -> None:
        running = asyncio.create_task(prober.run())
        while refreshes < 50:
            await asyncio.sleep(0.001)
        running.cancel()
        await asyncio.wait({running})
        assert running.cancelled()

    asyncio.run(asyncio.wait_for(some_refreshes(), 300))
    assert len(probes.replica.requested) == (len(PROMPTS) if enabled else 0)
    # With or without a probe, it forgets what is not served.
    asyncio.run(prober.probe(NAME, on_request=True))
    probes.json("DELETE", f"/tenants/{NAME}")
    refreshes = 0
    asyncio.run(asyncio.wait_for(some_refreshes(), 300))
    assert series_of(NAME) == set()


def test_what_is_not_served_is_not_probed(probes: ProbeWorld) -> None:
    with pytest.raises(ConflictError, match="'absent' is not served by this server"):
        asyncio.run(probes.probing().probe("absent"))
    assert series_of("absent") == set()


def test_a_name_of_changed_content_is_probed_again(probes: ProbeWorld) -> None:
    """After a registry is restored, results of the former content do not apply."""
    restore = back_up(probes.registry)
    probes.publish(NAME)
    prober = probes.probing()
    asyncio.run(prober.probe(NAME))
    (before,) = prober.statuses()
    assert before.result is not None and series_of(NAME) == ALL
    restore()
    assert probes.publish(NAME, first=0.5) == before.served
    (after,) = prober.statuses()
    assert (after.served, after.result) == (before.served, None)
    assert after.content != before.content and series_of(NAME) == set()
    assert probes.next() == before.served


def test_a_probe_does_not_continue_with_other_content_under_the_name(
    probes: ProbeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes.publish(NAME)
    ((_, now),) = probes.replica.served()
    other = replace(now, profile=make_profile(FAMILY, 0.5))
    assert other.served_name == now.served_name and other.id == now.id
    prober, offered = probes.probing(), probes.replica.served

    def complete(prompt: str) -> str:
        monkeypatch.setattr(probes.replica, "served", lambda: [(NAME, other)])
        return probes.complete(prompt)

    probes.replica.complete = complete
    with pytest.raises(ConflictError, match="was replaced or retired while it was probed"):
        asyncio.run(prober.probe(NAME))
    assert len(probes.replica.requested) < len(PROMPTS) and offered() == [(NAME, now)]
    assert series_of(NAME) == set()
