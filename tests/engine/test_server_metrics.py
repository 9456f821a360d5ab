"""/metrics of a real server on a registry, after requests by the openai client: exact counts."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from launched_server import end, free_port, start, until_serving
from prometheus_client.parser import text_string_to_metric_families
from registry_server import ADMIN, Running, World
from test_tenants import ACME, GLOBEX, LONG, Server, world  # noqa: F401

from safegene_vllm import __version__, tiny_model
from safegene_vllm.formats.family import load_family

pytestmark = pytest.mark.engine
TOKENS = 8
SUPPORT = {"tenant": "acme/support"}


@pytest.fixture(scope="module")
def server(world: World) -> Iterator[Running]:  # noqa: F811
    world.add("acme/support", "support", [0.6, 0.8])
    world.add("globex", "globex", [1.0, 1.0])
    world.registry.tenants.set_limits("globex", {"requests_per_minute": 1}, actor="test")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEGENE_SERVER_METRICS__PERIOD_S", "1")
        patch.setenv("SAFEGENE_SERVER_ACCESS__RESPONSE_MODEL", "requested")
        running = Server(world)
    yield running
    running.end()


class Scrape:
    """One response of /metrics, by a client with access to it."""

    def __init__(self, http: httpx.Client) -> None:
        response = http.get("/metrics")
        assert response.status_code == 200, response.text
        self.samples = {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        return self.samples.get((f"safegene_{name}", tuple(sorted(labels.items()))))

    def labels(self, name: str) -> list[dict[str, str]]:
        return [
            dict(labels)
            for (full, labels), value in self.samples.items()
            if full == f"safegene_{name}" and value
        ]


def until(server: Running, name: str, value: float, **labels: str) -> Scrape:
    begun_s = time.monotonic()
    while (found := Scrape(server.http(ADMIN))).value(name, **labels) != value:
        assert time.monotonic() - begun_s < 300, found.value(name, **labels)
        time.sleep(0.1)
    return found


def usage_by_tenant(server: Running) -> dict[str, list[int]]:
    """Requests, prompt tokens and completion tokens that the registry has, of all days and keys."""
    response = server.http(ADMIN).get("/v1/safegene/usage")
    assert response.status_code == 200, response.text
    sums: dict[str, list[int]] = {}
    for row in response.json()["data"]:
        counts = [row["requests"], row["prompt_tokens"], row["completion_tokens"]]
        before = sums.get(row["tenant"], [0, 0, 0])
        sums[row["tenant"]] = [a + b for a, b in zip(before, counts, strict=True)]
    return sums


def test_metrics_need_a_key_for_all_tenants(server: Running) -> None:
    assert httpx.get(f"{server.url}/metrics", timeout=60).status_code == 401
    assert server.http(ACME).get("/metrics").status_code == 403


def test_the_served_revisions_are_exported(server: Running, world: World) -> None:  # noqa: F811
    found = until(server, "registry_lag_seconds", 0.0)
    for state in ("expected", "applied"):
        assert found.value("sites", rank="0", state=state) == len(world.header.sites)
    assert found.value("gain_norm", **SUPPORT) == pytest.approx(1.0, abs=1e-6)
    assert found.value("coefficient", stat="min", **SUPPORT) == 0.6
    assert found.value("active_layers", **SUPPORT) == 2
    assert found.value("slots", state="total") == 2
    assert found.value("slots", state="used") == 2
    assert (found.value("vector_bytes", rank="0") or 0) > 0
    assert (found.value("adapter_bytes", rank="0") or 0) > 0
    assert abs((found.value("receipt_timestamp_seconds", rank="0") or 0) - time.time()) < 120
    assert found.value("revisions", state="published") == 2
    assert found.value("registry_up") == 1
    assert found.value("replica_ready") == 1
    assert found.value("replica_faults") == 0
    assert found.value("replicas", state="live") == 1
    assert found.value("unprotected_mode", mode="base_without_profile") == 1
    assert found.value("unprotected_mode", mode="serve_unprotected") == 0
    assert found.value("revision_load_seconds_count") == 2
    assert found.value("revision_apply_seconds_count") == 2
    served = {(one["tenant"], one["revision"]) for one in found.labels("revision_info")}
    assert served == {("acme/support", "acme/support@1"), ("globex", "globex@1")}
    (build,) = found.labels("build_info")
    assert (build["version"], build["apply"]) == (__version__, "gain")


def test_requests_are_counted_exactly(server: Running) -> None:
    begun = Scrape(server.http(ADMIN))
    client = server.client(ACME)
    body = {"model": "acme/support", "prompt": LONG, "max_tokens": TOKENS, "temperature": 0}
    more = {"extra_body": {"ignore_eos": True}}
    response = client.completions.create(**body, **more)
    assert response.usage is not None and response.usage.completion_tokens == TOKENS
    pieces = list(client.completions.create(**body, **more, stream=True))
    assert all(piece.choices for piece in pieces), "a usage that was not requested was shown"
    usage = {"include_usage": True}
    pieces = list(client.completions.create(**body, **more, stream=True, stream_options=usage))
    assert pieces[-1].usage is not None and not pieces[-1].choices
    for call, error in (
        (lambda: client.completions.create(**{**body, "model": "globex"}), openai.NotFoundError),
        (lambda: client.completions.create(**{**body, "max_tokens": -1}), openai.BadRequestError),
    ):
        with pytest.raises(error):
            call()
    globex = server.client(GLOBEX)
    globex.completions.create(**{**body, "model": "globex"}, **more)
    with pytest.raises(openai.RateLimitError):
        globex.completions.create(**{**body, "model": "globex"}, **more)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(
            base_url=f"{server.url}/v1", api_key="wrong", max_retries=0
        ).completions.create(**body)

    found = Scrape(server.http(ADMIN))

    def grown(name: str, **labels: str) -> float:
        return (found.value(name, **labels) or 0.0) - (begun.value(name, **labels) or 0.0)

    assert grown("requests_total", outcome="ok", **SUPPORT) == 3
    assert grown("requests_total", outcome="client_error", **SUPPORT) == 1
    assert grown("rejected_requests_total", reason="body", **SUPPORT) == 1
    assert grown("prompt_tokens_total", **SUPPORT) == 3 * len(LONG)
    assert grown("generation_tokens_total", **SUPPORT) == 3 * TOKENS
    assert grown("time_to_first_token_seconds_count", **SUPPORT) == 2
    assert 1 <= grown("inter_token_latency_seconds_count", **SUPPORT) <= 2 * (TOKENS - 1)
    assert grown("request_duration_seconds_count", **SUPPORT) == 4
    assert grown("requests_total", tenant="globex", outcome="ok") == 1
    assert grown("requests_total", tenant="globex", outcome="client_error") == 1
    limit = "requests_per_minute"
    assert grown("rejected_requests_total", tenant="globex", reason=limit) == 1
    assert grown("rejected_requests_total", tenant="", reason="model") == 1
    assert grown("rejected_requests_total", tenant="", reason="unknown_key") == 1
    assert grown("requests_total", tenant="", outcome="client_error") == 2
    assert grown("unprotected_requests_total", **SUPPORT) == 0

    # The request that the engine rejected is one without tokens.
    expected = {
        "acme/support": [4, 3 * len(LONG), 3 * TOKENS],
        "globex": [1, len(LONG), TOKENS],
    }
    begun_s = time.monotonic()
    while (used := usage_by_tenant(server)) != expected:
        assert time.monotonic() - begun_s < 300, used
        time.sleep(0.5)


def test_responses_name_what_was_requested_and_which_revision_it_was(server: Running) -> None:
    body = {"model": "acme/support", "prompt": LONG[:8], "max_tokens": 4, "temperature": 0}
    client = server.client(ACME)
    raw = client.completions.with_raw_response.create(**body)
    assert raw.headers["x-safegene-revision"] == "acme/support@1"
    assert raw.headers["x-request-id"]
    whole = raw.parse()
    assert whole.model == "acme/support"
    assert (whole.system_fingerprint or "").endswith(":acme/support@1")
    chunks = list(client.completions.create(**body, stream=True))
    assert {chunk.model for chunk in chunks} == {"acme/support"}
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    for headers in ({"Authorization": "Bearer wrong"}, {}):
        error = httpx.post(f"{server.url}/v1/messages", json={}, headers=headers, timeout=60)
        assert error.json()["error"]["type"] == "authentication_error"


def test_a_client_that_disconnects_is_counted_as_cancelled(server: Running) -> None:
    def outcomes() -> tuple[float, float]:
        found = Scrape(server.http(ADMIN))
        cancelled, ok = (
            found.value("requests_total", outcome=outcome, **SUPPORT) or 0.0
            for outcome in ("cancelled", "ok")
        )
        return cancelled, cancelled + ok

    # As many tokens as fit. On a busy machine a response may end before its client disconnects.
    body = {"model": "acme/support", "prompt": LONG[:8], "max_tokens": 240, "stream": True}
    begun_s = time.monotonic()
    before, ended = outcomes()
    while outcomes()[0] == before:
        assert time.monotonic() - begun_s < 300
        with server.http(ACME).stream(
            "POST", "/v1/completions", json={**body, "ignore_eos": True}
        ) as response:
            next(response.iter_lines())
        ended += 1
        while outcomes()[1] < ended:
            assert time.monotonic() - begun_s < 300
            time.sleep(0.1)
    assert outcomes() == (before + 1, ended)


def test_a_change_and_an_eviction_are_exported(server: Running, world: World) -> None:  # noqa: F811
    before = Scrape(server.http(ADMIN))
    world.add("acme/support", "support", [0.3, 0.4])
    server.follows(world.registry)
    # Two slots, and the revision that a rollback would need stays in the engine: one is evicted.
    evicted = (before.value("slot_evictions_total") or 0.0) + 1
    found = until(server, "slot_evictions_total", evicted)
    assert found.value("gain_norm", **SUPPORT) == pytest.approx(0.5, abs=1e-6)
    assert found.value("revision_apply_seconds_count") == 3
    assert found.value("revision_load_seconds_count") == 3
    served = {one["revision"] for one in found.labels("revision_info")}
    assert served == {"acme/support@2", "globex@1"}


def test_a_server_without_a_registry(world: World) -> None:  # noqa: F811
    """Tenants of the command line: distinguished by their served names, with no key but vLLM's."""
    family = load_family(world.d / "f")
    for name, coefficients in (("t0", [0.6, 0.8]), ("t1", [1.0, 1.0])):
        tiny_model.write_tenant(world.d / "m", world.d / name, family, coefficients, seed=7)
    port = free_port()
    process = start(
        *(str(world.d / "m"), "--family", str(world.d / "f"), "--slots", "2"),
        *("--tenant", f"t0={world.d / 't0'}", "--tenant", f"t1={world.d / 't1'}"),
        *("--served-model-name", "base", "--port", str(port)),
        SAFEGENE_SERVER_METRICS__MAX_TENANTS="1",
    )
    lines, drain = until_serving(process)
    url = f"http://127.0.0.1:{port}"
    try:
        assert any(x.startswith("serving at") for x in lines), "\n".join(lines[-60:])
        with (
            httpx.Client(base_url=url, timeout=60) as http,
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ):
            body = {"prompt": LONG, "max_tokens": TOKENS, "extra_body": {"ignore_eos": True}}
            for model in ("t0", "t1", "base"):
                client.completions.create(model=model, **body)
            list(client.completions.create(model="t0", **body, stream=True))
            with pytest.raises(openai.NotFoundError):
                client.completions.create(model="absent", **body)
            found = Scrape(http)
    finally:
        end(process, drain)
    assert found.value("requests_total", tenant="t0", outcome="ok") == 2
    assert found.value("requests_total", tenant="other", outcome="ok") == 1
    assert found.value("requests_total", tenant="", outcome="ok") == 1
    assert found.value("requests_total", tenant="", outcome="client_error") == 1
    assert found.value("rejected_requests_total", tenant="", reason="model") == 1
    assert found.value("unprotected_requests_total", tenant="") == 1
    assert found.value("unprotected_requests_total", tenant="t0") == 0
    assert found.value("prompt_tokens_total", tenant="t0") == len(LONG)
    assert TOKENS < (found.value("generation_tokens_total", tenant="t0") or 0) <= 2 * TOKENS
    assert found.value("gain_norm", tenant="t0") == pytest.approx(1.0, abs=1e-6)
    assert {one["tenant"] for one in found.labels("revision_info")} == {"t0"}
    assert found.value("sites", rank="0", state="applied") == len(world.header.sites)
    assert found.value("unprotected_mode", mode="base_without_profile") == 1
    assert found.value("slots", state="used") == 2
    for name in ("registry_up", "registry_lag_seconds", "replica_ready", "replica_faults"):
        assert found.value(name) is None, "a 0 would say that a registry is down"
