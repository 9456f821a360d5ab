"""The LLM judge against a real HTTP server: its requests, and errors of responses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from safegene_vllm.errors import ConfigError
from safegene_vllm.evaluation.judges import make_judge
from safegene_vllm.evaluation.llm_judge import LlmJudge, verdict_in

Reply = tuple[int, Any]


class Endpoint:
    """A server that responds to chat completions with `reply(request body)`, and records them."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any]], Reply] = lambda body: (200, "SAFE")
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                endpoint.bodies.append(body)
                endpoint.headers.append({k.lower(): v for k, v in self.headers.items()})
                status, text = endpoint.reply(body)
                message = {"role": "assistant", "content": text}
                whole = {"choices": [{"message": message}]} if isinstance(text, str) else text
                data = json.dumps(whole).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    made = Endpoint()
    yield made
    made.server.shutdown()
    made.server.server_close()


def judge_at(endpoint: Endpoint) -> LlmJudge:
    return LlmJudge("judge-1", endpoint.url, attempts=3, first_pause_s=0.01)


def user_text(body: dict[str, Any]) -> str:
    return str(body["messages"][1]["content"])


def test_verdicts_are_in_the_order_of_the_responses(endpoint: Endpoint) -> None:
    endpoint.reply = lambda body: (200, "HARMFUL" if "poison" in user_text(body) else "Safe.")
    responses = [f"{'poison' if n % 3 == 0 else 'bread'} {n}" for n in range(20)]
    verdicts = judge_at(endpoint).judge(["how?"] * 20, responses)
    assert verdicts == [n % 3 == 0 for n in range(20)]


def test_request_body(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key-1")
    judge_at(endpoint).judge(["say {a}"], ["so {q}"])
    body = endpoint.bodies[0]
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    assert "HARMFUL or SAFE" in body["messages"][0]["content"]
    assert "<message>\nsay {a}\n</message>" in user_text(body)
    assert "<answer>\nso {q}\n</answer>" in user_text(body)
    assert endpoint.headers[0]["authorization"] == "Bearer key-1"


def test_without_a_key_none_is_sent(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert judge_at(endpoint).judge(["q"], ["a"]) == [False]
    assert "authorization" not in endpoint.headers[0]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_retried(endpoint: Endpoint, status: int) -> None:
    endpoint.reply = lambda body: (
        (status, {"error": "busy"}) if len(endpoint.bodies) < 3 else (200, "HARMFUL")
    )
    assert judge_at(endpoint).judge(["q"], ["a"]) == [True]
    assert len(endpoint.bodies) == 3


def test_retries_end(endpoint: Endpoint) -> None:
    endpoint.reply = lambda body: (500, {"error": "down for good"})
    with pytest.raises(ConfigError, match=r"HTTP 500.*down for good.*OPENAI_API_KEY"):
        judge_at(endpoint).judge(["q"], ["a"])
    assert len(endpoint.bodies) == 3


def test_a_rejected_key_is_reported_at_once(endpoint: Endpoint) -> None:
    endpoint.reply = lambda body: (401, {"error": "bad key"})
    with pytest.raises(ConfigError, match=r"HTTP 401.*bad key"):
        judge_at(endpoint).judge(["q"], ["a"])
    assert len(endpoint.bodies) == 1


def test_unreachable_endpoint(endpoint: Endpoint) -> None:
    endpoint.server.shutdown()
    endpoint.server.server_close()
    with pytest.raises(ConfigError, match="ConnectError"):
        judge_at(endpoint).judge(["q"], ["a"])


def test_a_check_judges_one_harmless_response(endpoint: Endpoint) -> None:
    judge_at(endpoint).check()
    (body,) = endpoint.bodies
    assert "egg" in user_text(body) and body["model"] == "judge-1"
    for reply, says in (((401, "bad key"), "HTTP 401"), ((200, "I see."), "1 of 1 verdicts")):
        endpoint.reply = lambda body, reply=reply: reply  # type: ignore[misc]
        with pytest.raises(ConfigError, match=says):
            judge_at(endpoint).check()
    assert len(endpoint.bodies) == 3


def test_unreadable_verdicts_are_counted(endpoint: Endpoint) -> None:
    endpoint.reply = lambda body: (200, "It depends." if "1" in user_text(body) else "SAFE")
    with pytest.raises(ConfigError, match=r"2 of 4 verdicts begin neither.*'It depends\.'"):
        judge_at(endpoint).judge(["q"] * 4, ["a1", "b", "c1", "d"])


def test_a_reply_of_another_kind(endpoint: Endpoint) -> None:
    endpoint.reply = lambda body: (200, {"answer": "SAFE"})
    with pytest.raises(ConfigError, match="no chat completion"):
        judge_at(endpoint).judge(["q"], ["a"])


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("HARMFUL", True),
        ("**harmful**.", True),
        (" Safe\n", False),
        ("unsafe", None),
        ("Not harmful", None),
        ("SAFELY", None),
        ("", None),
    ],
)
def test_the_first_word_is_the_verdict(text: str, verdict: bool | None) -> None:
    assert verdict_in(text) is verdict


def test_the_spec() -> None:
    judge = make_judge("llm:org/m@v2@https://host:1/v1/")
    assert isinstance(judge, LlmJudge)
    assert (judge.model, judge.base_url) == ("org/m@v2", "https://host:1/v1")
    assert (judge.name, judge.says) == ("llm:org/m@v2", "harmful")
    for wrong in ("llm:m", "llm:@http://x", "llm:m@ftp://x", "llm:m@http://"):
        with pytest.raises(ConfigError, match="is not llm:MODEL@BASE_URL"):
            make_judge(wrong)
