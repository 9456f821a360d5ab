"""A tiny server with the shapes of /v1/safegene, on a real port, for the client and the commands.

It records its requests and holds a few tenants in a dictionary. Not a copy of the real rules: it
accepts every request, and fails when a test sets an error.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

KEY = "sg-" + "k" * 43
SECRET = "sg-" + "s" * 43
AT = "2031-05-01T08:00:00.123456Z"
OURS = "/v1/safegene"
FAMILY = "sha256:" + "f" * 64


@dataclass(frozen=True)
class RecordedRequest:
    """One request as received; `path` is raw, after /v1/safegene."""

    method: str
    path: str
    query: dict[str, str]
    body: Any
    key: str | None


@dataclass
class World:
    """State of the server and its requests. `errors` are sent first, one per request."""

    requests: list[RecordedRequest] = field(default_factory=list)
    errors: deque[Response] = field(default_factory=deque)
    tenants: dict[str, dict[str, Any]] = field(default_factory=dict)
    revisions: list[dict[str, Any]] = field(default_factory=list)
    keys: dict[str, dict[str, Any]] = field(default_factory=dict)
    job_states: list[str] = field(default_factory=lambda: ["queued", "running", "done"])
    message: str = "publishing"
    applied: list[int] = field(default_factory=lambda: [1, 2])
    page: int = 2
    url: str = ""
    family: dict[str, Any] = field(default_factory=dict)
    more_families: list[str] = field(default_factory=list)
    usage: list[dict[str, Any]] = field(default_factory=list)

    def families(self) -> list[dict[str, Any]]:
        return [family(digest=d, **self.family) for d in (FAMILY, *self.more_families)]

    def tenant(self, name: str, **more: Any) -> dict[str, Any]:
        made = {
            "name": name,
            "family": FAMILY,
            "source": None,
            "state": "active",
            "limits": {},
            "published": 1,
            "served": f"{name}@1",
            "failure": None,
            "created_at": AT,
        } | more
        self.tenants[name] = made
        return made

    def revision(self, tenant: str, coefficients: list[float], **more: Any) -> dict[str, Any]:
        number = 1 + sum(known["tenant"] == tenant for known in self.revisions)
        made = {
            "name": f"{tenant}@{number}",
            "tenant": tenant,
            "number": number,
            "kind": "adapter",
            "adapter_digest": "sha256:" + "a" * 64,
            "profile_digest": "sha256:" + "b" * 64,
            "coefficients": coefficients,
            "state": "published",
            "reasons": [],
            "gate": {},
            "created_at": AT,
            "created_by": "ops",
        } | more
        self.revisions.append(made)
        return made

    def rollout(self) -> dict[str, Any]:
        """The next look at the one rollout there is; the last stays."""
        applied = self.applied[0] if len(self.applied) == 1 else self.applied.pop(0)
        lagging = [{"replica": "r2", "reason": "not seen for 9 s"}] if applied < 2 else []
        return {
            "id": 12,
            "kind": "publish",
            "tenants": ["acme/support"],
            "revisions": ["acme/support@1"],
            "applied": applied,
            "live": 2,
            "done": not lagging,
            "lagging": lagging,
            "created_at": AT,
            "created_by": "ops",
        }

    def job(self, kind: str = "onboard") -> dict[str, Any]:
        """The next look at the one job there is; the last stays."""
        states = self.job_states
        state = states[0] if len(states) == 1 else states.pop(0)
        return {
            "id": 7,
            "kind": kind,
            "tenant": "acme/support",
            "revision": None,
            "state": state,
            "progress": {"queued": 0.0, "running": 0.5}.get(state, 1.0),
            "message": self.message,
            "result": {"revision": "acme/support@1", "rollout": 12} if state == "done" else None,
            "attempts": 1,
            "created_at": AT,
            "updated_at": AT,
        }

    def listed(self, items: list[dict[str, Any]], query: dict[str, str]) -> dict[str, Any]:
        begin = int(query.get("cursor", 0))
        end = begin + self.page
        return {"data": items[begin:end], "cursor": end if end < len(items) else None}

    def respond(self, recorded: RecordedRequest) -> Any:
        """Body of the response in the shape of the real routes, or None for 404."""
        match recorded.method, *recorded.path.strip("/").split("/"):
            case "GET", "ready":
                return {"ready": True, "tenants": list(self.tenants)}
            case "GET", "receipts":
                return {"ready": True, "faults": [], "receipts": [{"rank": 0}]}
            case "GET", "whoami":
                key = {"name": "ops", "scopes": ["admin"], "tenants": ["*"], "base": True}
                return key | {"default_tenant": None, "expires_at": None}
            case "GET", "tenants":
                return self.listed(list(self.tenants.values()), recorded.query)
            case "POST", "tenants":
                return {"tenant": self.tenant(recorded.body["name"]), "job": self.job()}
            case method, "tenants", *parts:
                return self.of_tenant(method, parts, recorded)
            case "GET", "families":
                return {"data": self.families(), "cursor": None}
            case "GET", "families", _:
                return self.families()[0]
            case "PUT", "families", _, "floor":
                return {"family": family(floor=recorded.body["floor"]), "rollout": self.rollout()}
            case "POST", "families", _, "freeze" | "unfreeze" as word:
                return family(frozen=word == "freeze")
            case "GET", "keys":
                return self.listed(list(self.keys.values()), recorded.query)
            case ("POST", "keys") | ("POST", "keys", _, "rotate"):
                return self.key(recorded)
            case "DELETE", "keys", name:
                return self.keys.pop(name, None)
            case "GET", "rollouts":
                return {"data": [self.rollout()], "cursor": None}
            case "GET", "rollouts", "12":
                return self.rollout()
            case "GET", "jobs":
                return {"data": [self.job()], "cursor": None}
            case ("GET", "jobs", "7") | ("POST", "jobs", "7", "cancel"):
                return self.job()
            case "GET", "replicas":
                one = {"id": "r1", "host": "node-1", "pid": 17, "started_at": AT, "seen_at": AT}
                replica = one | {"applied_version": 4, "faults": ["acme/support@1: no receipt"]}
                return {"data": [replica], "cursor": None}
            case "GET", "probes":
                return {"data": [probe(), probe(tenant="new", result=None)], "cursor": None}
            case "GET", "audit":
                what = {"actor": "ops", "action": "key.add", "target": "acme-app"}
                entry = {"id": 9, "at": AT, **what, "details": {"scopes": ["serve"]}}
                return {"data": [entry], "cursor": 9}
            case "GET", "usage":
                return self.listed(self.usage, recorded.query)
        return None

    def of_tenant(self, method: str, parts: list[str], recorded: RecordedRequest) -> Any:
        action = parts.pop() if "/".join(parts) not in self.tenants else ""
        name = "/".join(parts)
        if name not in self.tenants:
            return None
        tenant = self.tenants[name]
        change = {"revision": (self.revisions or [None])[-1], "rollout": None}
        match method, action:
            case "GET", "":
                return tenant
            case "DELETE", "":
                tenant["state"] = "retired"
                return {"tenant": tenant, "rollout": self.rollout()}
            case "GET", "revisions":
                own = [known for known in self.revisions if known["tenant"] == name]
                return self.listed(own, recorded.query)
            case "POST", "revisions" | "calibrate" | "probe":
                return {"tenant": tenant, "job": self.job(action)}
            case ("PATCH", "profile") | ("POST", "publish" | "rollback"):
                return change | {"rollout": self.rollout()}
            case "POST", "freeze" | "unfreeze":
                tenant["state"] = "frozen" if action == "freeze" else "active"
                return tenant
            case "PUT", "limits":
                tenant["limits"] = recorded.body
                return tenant
        return None

    def key(self, recorded: RecordedRequest) -> dict[str, Any]:
        name = recorded.body.get("name", "acme-app")
        made = {
            "name": name,
            "prefix": SECRET[:8],
            "scopes": recorded.body.get("scopes", ["serve"]),
            "tenants": recorded.body.get("tenants", ["acme/support"]),
            "default_tenant": recorded.body.get("default_tenant"),
            "expires_at": recorded.body.get("expires_at"),
            "revoked_at": None,
            "created_at": AT,
        }
        self.keys[name] = made
        return {**made, "secret": SECRET}


def family(**more: Any) -> dict[str, Any]:
    made = {
        "digest": FAMILY,
        "name": "tiny-family",
        "source": None,
        "num_layers": 2,
        "layers": [0, 1],
    }
    policy = {"floor": {"1": 0.5}, "frozen": False}
    return made | {"bounds": [0.0, 3.0], "created_at": AT} | policy | more


def probe(**more: Any) -> dict[str, Any]:
    rates = {"attack_success": {"rate": 0.25, "n": 12}, "over_refusal": {"rate": 0.125, "n": 24}}
    rates |= {"coherent": {"rate": 1.0, "n": 36}}
    result = {"revision": "acme/support@1", "replica": "r1", "at": AT, "seconds": 2.5, **rates}
    result |= {"refused": {}, "judges": ["coherence"], "max_tokens": 16, "prompts": "sha256:0"}
    made = {"tenant": "acme/support", "served": "acme/support@1", "outcome": "ok", "message": ""}
    return made | {"result": result} | more


def error(status: int, message: str, *, param: str | None = None, **headers: str) -> JSONResponse:
    """An error in OpenAI's shape; `Retry_After="1"` is a header."""
    body = {"error": {"message": message, "type": "Error", "param": param, "code": status}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse(body, status_code=status, headers=named)


def app_of(world: World) -> FastAPI:
    app = FastAPI()

    @app.api_route("/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    async def anything(request: Request) -> Response:
        content = await request.body()
        raw = request.scope["raw_path"].decode()
        key = request.headers.get("authorization")
        recorded = RecordedRequest(
            request.method,
            raw.removeprefix(OURS),
            dict(request.query_params),
            json.loads(content) if content else None,
            key,
        )
        world.requests.append(recorded)
        if world.errors:
            return world.errors.popleft()
        if key != f"Bearer {KEY}":
            return error(401, "this key is not known here")
        found = world.respond(recorded) if raw.startswith(OURS + "/") else None
        return JSONResponse({"detail": "Not Found"}, 404) if found is None else JSONResponse(found)

    return app


@contextmanager
def served(app: Any, port: int = 0) -> Iterator[str]:
    """The address of `app` while it is served on loopback; `port` 0 is any free one."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=port,
        log_level="error",
        lifespan="off",
        # Longer than a client holds a connection open, or both may close it at once.
        timeout_keep_alive=75,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        end = time.monotonic() + 300
        while not server.started:
            assert thread.is_alive() and time.monotonic() < end, "the test's server did not start"
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(300)
    assert not thread.is_alive()
