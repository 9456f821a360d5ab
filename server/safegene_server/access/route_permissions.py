"""Scope that each route needs, by method and path: vLLM 0.32's own and ours.

A route that is not in the table needs `admin`, so a newer vLLM's routes are denied by default;
`unclassified` names them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from starlette.routing import Mount, WebSocketRoute
from starlette.types import Scope

OURS = "/v1/safegene"
MODELS = "/v1/models"
WEBSOCKET = "WEBSOCKET"
MOUNT = "MOUNT"

Need = Literal["public", "key", "serve", "read", "admin"]


@dataclass(frozen=True)
class Rule:
    """Permission that a route needs; `key` is any valid key, whatever its scopes.

    `model`: its JSON body names a model, which is resolved. `tokens`: its response costs tokens.
    `whole_server`: it shows or changes all tenants at once, so it needs a key for all of them.
    """

    need: Need
    model: bool = False
    tokens: bool = False
    whole_server: bool = False


PUBLIC = Rule("public")
ANY_KEY = Rule("key")
LIST = Rule("serve")
GENERATE = Rule("serve", model=True, tokens=True)
RENDER = Rule("serve", model=True)
WATCH = Rule("read", whole_server=True)
OPERATE = Rule("admin", whole_server=True)
OUR_READ = Rule("read")
OUR_CHANGE = Rule("admin")

_ROUTES: dict[Rule, tuple[str, ...]] = {
    LIST: ("GET /v1/models", "GET /v1/models/{model_id}"),
    GENERATE: (
        "POST /v1/chat/completions",
        "POST /v1/chat/completions/batch",
        "POST /v1/completions",
        "POST /v1/responses",
        "POST /v1/messages",
        "POST /v1/systemone",
        "POST /v1/embeddings",
        "POST /v1/score",
        "POST /v1/rerank",
        "POST /v2/embed",
        "POST /v2/rerank",
        "POST /cohere/v2/chat",
        "POST /classify",
        "POST /generative_scoring",
        "POST /pooling",
        "POST /rerank",
        "POST /score",
    ),
    # Tokenizer and chat template only: no step of the engine.
    RENDER: (
        "POST /tokenize",
        "POST /detokenize",
        "POST /v1/messages/count_tokens",
        "POST /v1/chat/completions/render",
        "POST /v1/chat/completions/derender",
        "POST /v1/completions/render",
        "POST /v1/completions/derender",
        "POST /v1/messages/render",
        "POST /v1/responses/render",
        "POST /cohere/v2/chat/render",
    ),
    # Metrics and states, for probes and scrapers.
    WATCH: (
        "GET /health",
        "GET /ping",
        "GET /metrics",
        "GET /load",
        "GET /version",
        "GET /is_paused",
        "GET /is_sleeping",
        "GET /fault_tolerance/status",
    ),
    OPERATE: (
        # A header may name another adapter (X-Amzn-SageMaker-Adapter-Identifier).
        "POST /invocations",
        "POST /ping",
        "POST /adapters",
        "DELETE /adapters/{adapter_name}",
        "POST /v1/load_lora_adapter",
        "POST /v1/unload_lora_adapter",
        # Responses of all tenants in one store, under ids that a client may choose.
        "GET /v1/responses/{response_id}",
        "POST /v1/responses/{response_id}/cancel",
        # The model is named in a form or in later messages, not in a JSON body.
        "POST /v1/audio/transcriptions",
        "POST /v1/audio/translations",
        f"{WEBSOCKET} /v1/realtime",
        # Between engines: raw sampling parameters, and other clients' requests.
        "POST /inference/v1/generate",
        "POST /inference/v1/abort_requests",
        "POST /abort_requests",
        # Documentation of the whole server, its chat template and its configuration.
        "GET /openapi.json",
        "GET /docs",
        "GET /docs/oauth2-redirect",
        "GET /redoc",
        f"{MOUNT} /static",
        f"{MOUNT} /metrics",
        "GET /tokenizer_info",
        "GET /server_info",
        "GET /kv_event_sources",
        # Scaling, faults, profiles, caches and sleep.
        "POST /scale_elastic_ep",
        "POST /is_scaling_elastic_ep",
        "POST /fault_tolerance/apply",
        "POST /start_profile",
        "POST /stop_profile",
        "POST /reset_prefix_cache",
        "POST /reset_mm_cache",
        "POST /reset_encoder_cache",
        "POST /collective_rpc",
        "POST /sleep",
        "POST /release_kv_cache_memory",
        "POST /wake_up",
        # Weights changed from outside, for reinforcement learning.
        "POST /pause",
        "POST /resume",
        "POST /init_weight_transfer_engine",
        "POST /shutdown_weight_transfer_engine",
        "POST /start_weight_update",
        "POST /start_draft_weight_update",
        "POST /update_weights",
        "POST /finish_weight_update",
        "POST /update_weight_version",
        "GET /weight_info",
        "POST /weight_checker",
        "GET /get_world_size",
    ),
}

RULES: dict[str, Rule] = {route: rule for rule, routes in _ROUTES.items() for route in routes}

_OUR_WATCH = frozenset(f"{OURS}/{name}" for name in ("ready", "receipts", "replicas"))
_FAMILIES = f"{OURS}/families/"


def route_path(scope: Scope) -> str:
    """Return the path that the app's router will match, without the root path."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    inside = root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/")
    return path[len(root) :] if inside else path


def rule_for(method: str, path: str, public: frozenset[str] = frozenset()) -> Rule:
    """Return the rule of a request; HEAD counts as GET, and only a GET can be public."""
    method = "GET" if method == "HEAD" else method
    if path.endswith("\n"):
        # A router's pattern matches it too, so it could reach a route whose rule is not found here.
        return OPERATE
    if method == "GET" and path in public:
        return PUBLIC
    if path == OURS or path.startswith(f"{OURS}/"):
        return _our_rule(method, path)
    if method == "GET" and path.startswith(f"{MODELS}/"):
        return LIST
    return RULES.get(f"{method} {path}", OPERATE)


def needs_of_path(path: str) -> frozenset[Need]:
    """Return the scopes that a path of the table needs, over all of its methods."""
    return frozenset(rule.need for name, rule in RULES.items() if name.partition(" ")[2] == path)


def _our_rule(method: str, path: str) -> Rule:
    """Return the rule of our own route: read or admin by method, some for all tenants only."""
    if method == "GET" and path == f"{OURS}/whoami":
        return ANY_KEY
    if method == "GET":
        return WATCH if path in _OUR_WATCH else OUR_READ
    return OPERATE if path.startswith(_FAMILIES) else OUR_CHANGE


def unclassified(app: Any) -> list[str]:
    """List routes of an app that the table does not name, as `METHOD /path`; they need `admin`."""
    return sorted({name for name in named_routes(app.routes) if not _known(name)})


def _known(name: str) -> bool:
    path = name.partition(" ")[2]
    return name in RULES or path == OURS or path.startswith(f"{OURS}/")


def named_routes(routes: Any, prefix: str = "") -> Iterator[str]:
    """Iterate over routes as `METHOD /path`; a mounted app counts as one, a router as many."""
    for route in routes:
        path = getattr(route, "path", None)
        inner = getattr(route, "routes", None)
        if inner:
            yield from named_routes(inner, prefix + (path or ""))
        elif isinstance(route, Mount):
            yield f"{MOUNT} {prefix}{path}"
        elif isinstance(route, WebSocketRoute):
            yield f"{WEBSOCKET} {prefix}{path}"
        else:
            # A route without a path is never known, and one without methods serves all of them.
            methods = getattr(route, "methods", None) or {"ANY"}
            for method in sorted({*methods} - {"HEAD"} or {"HEAD"}):
                yield f"{method} {prefix}{path or type(route).__name__}"
