"""A server whose engine gives completions a known log-probability, a function of the coefficients.

All else is that of `tenant_setup`. Tokens are bytes, so that prompts can be read.
Not a conftest: tests import what they use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tenant_setup import FakeReplica, World

from safegene_server.calibration import CALIBRATE, calibrate
from safegene_server.registry import Revision
from safegene_server.tenants import ONBOARD, CalibrationSettings, GateSettings, Jobs, onboard
from safegene_server.tenants.smoke_prompts import CHAT

NAME = "acme/support"
END = 256
USER, ASSISTANT = 257, 258
BEST = (1.5, 0.5)
"""The minimum of safety + 2 · task, between the two kinds' own optima."""


def losses(kind: str, first: float, last: float) -> float:
    """Safety is best at (2, 1), the task at (1, 0)."""
    best = (2.0, 1.0) if kind == "bad" else (1.0, 0.0)
    weight = 1.0 if kind == "bad" else 0.5
    return 1.0 + weight * ((first - best[0]) ** 2 + (last - best[1]) ** 2)


def examples(**more: Any) -> dict[str, Any]:
    return {
        "safety": [{"prompt": f"bad {n}", "answer": None} for n in range(4)],
        "task": [{"prompt": f"task {n}", "answer": f"label {n % 2}"} for n in range(4)],
        **more,
    }


class LivelyReplica(FakeReplica):
    """`candidates` are loaded now; `begun` has the coefficients of all that ever were."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.candidates: dict[str, tuple[float, ...]] = {}
        self.begun: list[tuple[float, ...]] = []
        self.most_candidates = 0
        self.slots = 4
        self.losses: Callable[[str, float, float], float] = losses
        self.scored: list[tuple[str, str]] = []
        self.on_score: Callable[[], None] = lambda: None
        self.bodies: list[dict[str, Any]] = []
        self.context = 4096
        self.hanging: str | None = None
        self.on_hang: Callable[[], None] = lambda: None

    async def begin_candidate(self, revision: Revision, coefficients: Sequence[float]) -> str:
        self._raise("begin_candidate")
        await self._hang("begin_candidate")
        assert revision.tenant == NAME and len(coefficients) == self.header.num_layers
        name = f"@candidate/{len(self.begun)}"
        self.candidates[name] = tuple(coefficients)
        self.begun.append(tuple(coefficients))
        self.most_candidates = max(self.most_candidates, len(self.candidates))
        return name

    async def end_candidate(self, name: str) -> None:
        await self._hang("end_candidate")
        assert not self._busy, "a candidate that ends has a request in flight"
        del self.candidates[name]

    async def _hang(self, what: str) -> None:
        """Hang for a minute where the engine is set to; a cancelled call takes 50 ms more."""
        if what != self.hanging:
            return
        self.on_hang()
        self._busy += 1
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(0.05)
            raise
        finally:
            self._busy -= 1

    def free_slots(self) -> int:
        return max(0, self.slots - len(self.held) - len(self.candidates))

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response:
        if path == CHAT:
            return await super().call(method, path, body)
        assert method == "POST" and body is not None and body["model"] in self.candidates
        self._raise(path)
        if path == "/tokenize":
            tokens = self._template(body) if "messages" in body else list(body["prompt"].encode())
            return httpx.Response(200, json={"tokens": tokens, "max_model_len": self.context})
        assert path == "/v1/completions"
        await self._hang(path)
        self.bodies.append(body)
        self._busy += 1
        self.busiest = max(self.busiest, self._busy)
        await asyncio.sleep(0)
        self._busy -= 1
        return httpx.Response(200, json={"model": body["model"], "choices": [self._choice(body)]})

    def _template(self, body: dict[str, Any]) -> list[int]:
        tokens = []
        for turn in body["messages"]:
            assistant = turn["role"] == "assistant"
            tokens += [ASSISTANT if assistant else USER, *turn["content"].encode()]
            tokens += [END] if assistant else []
        return [*tokens, ASSISTANT] if body["add_generation_prompt"] else tokens

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = body["prompt"]
        prompt = bytes(ids[1 : ids.index(ASSISTANT)]).decode()
        if "prompt_logprobs" not in body:
            return {"token_ids": [*f"own {prompt[-1]}".encode(), END]}
        self.on_score()
        kind = prompt.split()[0]
        coefficients = self.candidates[body["model"]]
        assert coefficients[1] == 0.0, "no vector there"
        loss = self.losses(kind, coefficients[0], coefficients[2])
        completion = ids[ids.index(ASSISTANT) + 1 :]
        text = bytes(t for t in completion if t < END).decode() + ("." if END in completion else "")
        self.scored.append((prompt, text))
        # Another loss before the completion: only the completion's own tokens may count.
        begin = len(ids) - len(completion)
        given = [
            None if i == 0 else {str(t): {"logprob": -loss if i >= begin else -77.0}}
            for i, t in enumerate(ids)
        ]
        return {"prompt_logprobs": given, "token_ids": [1]}


class CalibrationWorld(World):
    """A published tenant at coefficient 1, and a replica that knows how good others are.

    With `served` False there is no tenant yet."""

    replica: LivelyReplica

    def __init__(
        self, root: Path, *, served: bool = True, gate: bool = False, **settings: Any
    ) -> None:
        chosen = CalibrationSettings(**settings)
        super().__init__(root, calibration=chosen, gate=GateSettings(enabled=gate))
        self.replica = LivelyReplica(self.registry, self.store, self.catalog)
        self.tenancy = replace(self.tenancy, replica=self.replica)
        self.jobs = Jobs(self.tenancy, {ONBOARD: onboard, CALIBRATE: calibrate})
        self.app.state.safegene.tenants = self.tenancy
        asyncio.run(self.replica.apply())
        if served:
            self.serve(NAME)

    def start(self, **more: Any) -> int:
        """Start a calibration; the id of its job."""
        body = {"examples": examples(), **more}
        response = self.json("POST", f"/tenants/{NAME}/calibrate", body)
        assert response["tenant"]["name"] == NAME and response["job"]["kind"] == CALIBRATE
        return int(response["job"]["id"])

    def take_over(self, job: int) -> None:
        """The lease of a job runs out."""
        owner = self.registry.jobs.get(job).owner
        assert owner is not None
        self.registry.jobs.progress(job, owner, 0.0, "", actor="test", lease_s=-1.0)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[CalibrationWorld]:
    made = CalibrationWorld(tmp_path)
    yield made
    made.registry.close()
