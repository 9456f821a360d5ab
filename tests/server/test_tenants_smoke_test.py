"""Smoke test: thresholds, errors of the engine, and no completion in the record."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from tenant_setup import REFUSAL, Complete, good

from safegene_server.error_responses import EngineDownError
from safegene_server.tenants import GateSettings, Outcome, Prompt, read_prompts, run_smoke_test
from safegene_vllm.errors import AdapterRejectedError, ConfigError, ReceiptError

PROMPTS = read_prompts()
MODEL = "acme@1"


class Engine:
    """Completes prompts by `complete`; records bodies and how many were sent at once."""

    def __init__(self, complete: Complete = good, **changes: Any) -> None:
        self.complete, self.changes = complete, changes
        self.bodies: list[dict[str, Any]] = []
        self.busy = self.busiest = 0

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        assert body is not None and (method, path) == ("POST", "/v1/chat/completions")
        self.bodies.append(body)
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        await asyncio.sleep(self.changes.get("slow_s", 0))
        self.busy -= 1
        text = self.complete(body["messages"][0]["content"])
        found: Any = {
            "model": self.changes.get("model", body["model"]),
            "choices": [{"message": {"content": text}}],
        }
        return httpx.Response(self.changes.get("status", 200), json=self.changes.get("json", found))


def tried(engine: Engine, **settings: Any) -> Outcome:
    return asyncio.run(run_smoke_test(engine, MODEL, PROMPTS, GateSettings(**settings)))


def test_the_shipped_prompts() -> None:
    assert Counter(p.kind for p in PROMPTS) == {"harmful": 12, "lookalike": 12, "benign": 12}
    assert len({p.prompt for p in PROMPTS}) == len(PROMPTS)


def test_a_good_tenant_passes() -> None:
    outcome = tried(engine := Engine())
    assert outcome.passed
    assert outcome.record["refused"]["harmful"] == {"rate": 1.0, "n": 12}
    assert outcome.record["refused"]["lookalike"] == {"rate": 0.0, "n": 12}
    assert outcome.record["coherent"] == {"rate": 1.0, "n": 36}
    requested = [body["messages"][0]["content"] for body in engine.bodies]
    assert sorted(requested) == sorted(p.prompt for p in PROMPTS)
    assert all(b["model"] == MODEL and b["temperature"] == 0.0 for b in engine.bodies)
    assert not any("priority" in body for body in engine.bodies)
    assert engine.busiest == 4


@pytest.mark.parametrize(
    ("complete", "word"),
    [
        (lambda prompt: "Sure, this is how it is done.", "refused 0 of 12 harmful"),
        (lambda prompt: REFUSAL, "refused 12 of 12 harmless"),
        (lambda prompt: "the the the the the the the the", "0 of 36 completions are coherent"),
        (lambda prompt: "", "0 of 36 completions are coherent"),
    ],
)
def test_tenants_that_do_not_pass(complete: Complete, word: str) -> None:
    outcome = tried(Engine(complete))
    assert not outcome.passed and not outcome.record["passed"]
    assert any(word in reason for reason in outcome.reasons), outcome.reasons


def test_thresholds_decide() -> None:
    outcome = tried(Engine(lambda prompt: REFUSAL), lookalike_max_refused=1.0)
    assert outcome.passed
    assert outcome.record["thresholds"]["lookalike_max_refused"] == 1.0


def test_no_completion_and_no_prompt_is_stored() -> None:
    retained = json.dumps(tried(Engine(lambda prompt: f"Sure: {prompt} SECRET")).record)
    assert "SECRET" not in retained
    assert not any(prompt.prompt in retained for prompt in PROMPTS)


def test_requests_have_the_settings() -> None:
    tried(engine := Engine(slow_s=0.001), concurrent=2, max_tokens=7, priority=9)
    assert engine.busiest == 2
    assert {(b["max_tokens"], b["priority"]) for b in engine.bodies} == {(7, 9)}


@pytest.mark.parametrize(
    ("changes", "kind", "word"),
    [
        ({"model": "other@1"}, ReceiptError, "'other@1' responded"),
        (
            {"status": 400, "json": {"error": {"message": "no template"}}},
            AdapterRejectedError,
            "no t",
        ),
        ({"status": 500, "json": "oops"}, EngineDownError, "500"),
        ({"json": {"model": MODEL, "choices": []}}, AdapterRejectedError, "no chat completion"),
        ({"json": ["x"]}, AdapterRejectedError, "no chat completion"),
    ],
)
def test_an_engine_that_does_not_respond(
    changes: dict[str, Any], kind: type[Exception], word: str
) -> None:
    with pytest.raises(kind, match=word):
        tried(Engine(**changes))


def test_a_slow_engine_is_given_up_and_left_alone() -> None:
    engine = Engine(slow_s=30)
    with pytest.raises(AdapterRejectedError, match=r"longer than 0\.05 s"):
        tried(engine, timeout_s=0.05)
    assert len(engine.bodies) == 4


def test_prompts_of_an_operator(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    lines = [{"prompt": f"{kind}?", "kind": kind} for kind in ("harmful", "lookalike", "benign")]
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert read_prompts(path)[0] == Prompt("harmful?", "harmful")
    path.write_text(json.dumps(lines[0]))
    with pytest.raises(ConfigError, match="none of kind lookalike, benign"):
        read_prompts(path)
    path.write_text('{"prompt": "", "kind": "harmful"}\n[]\n{"prompt": "x", "kind": "odd"}\nno')
    with pytest.raises(ConfigError, match="line 1, line 2, line 3, line 4"):
        read_prompts(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "none.jsonl")
