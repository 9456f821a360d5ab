"""`Client` and `AsyncClient`: a method for every administrative route of a server.

Results are the schemas of the API; errors are ApiError. Waiting for a job or rollout survives a
restart of the server. Both carry out the same exchanges (see connection).
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Concatenate, ParamSpec, Self, TypeVar

import httpx

from safegene_vllm.client import connection, routes
from safegene_vllm.client.connection import (
    ATTEMPTS,
    FIRST_PAUSE_S,
    TIMEOUT_S,
    Connection,
    Exchange,
)
from safegene_vllm.client.routes import Call

P = ParamSpec("P")
T = TypeVar("T")


def _call(route: Callable[P, Call[T]]) -> Callable[Concatenate[Connection, P], Exchange[T]]:
    @functools.wraps(route)
    def exchange(server: Connection, /, *args: P.args, **kwargs: P.kwargs) -> Exchange[T]:
        return server.exchange(route(*args, **kwargs))

    return exchange


def _blocking(
    exchange: Callable[Concatenate[Connection, P], Exchange[T]],
) -> Callable[Concatenate[Client, P], T]:
    @functools.wraps(exchange)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(exchange(self._server, *args, **kwargs))

    return method


def _awaitable(
    exchange: Callable[Concatenate[Connection, P], Exchange[T]],
) -> Callable[Concatenate[AsyncClient, P], Awaitable[T]]:
    @functools.wraps(exchange)
    async def method(self: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await self._run(exchange(self._server, *args, **kwargs))

    return method


class Client:
    """Client of a server at `base_url` (with or without /v1). Close it, or use `with`.

    Errors of every method: ApiError; ConfigError for arguments that cannot be sent.
    """

    def __init__(
        self,
        base_url: str,
        key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        attempts: int = ATTEMPTS,
        first_pause_s: float = FIRST_PAUSE_S,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._server = Connection(base_url, key, attempts=attempts, first_pause_s=first_pause_s)
        self._http = httpx.Client(timeout=timeout_s, transport=transport)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._server.url!r})"

    def _run(self, exchange: Exchange[T]) -> T:
        try:
            step = next(exchange)
            while True:
                if isinstance(step, float):
                    time.sleep(step)
                    step = next(exchange)
                    continue
                try:
                    response = self._http.send(step)
                except httpx.RequestError as error:
                    step = exchange.throw(error)
                else:
                    step = exchange.send(response)
        except StopIteration as end:
            found: T = end.value
            return found

    whoami = _blocking(_call(routes.whoami))
    ready = _blocking(_call(routes.ready))
    receipts = _blocking(_call(routes.receipts))
    tenants = _blocking(_call(routes.tenants))
    tenant = _blocking(_call(routes.tenant))
    add_tenant = _blocking(_call(routes.add_tenant))
    retire_tenant = _blocking(_call(routes.retire_tenant))
    revisions = _blocking(_call(routes.revisions))
    add_revision = _blocking(_call(routes.add_revision))
    change_profile = _blocking(_call(routes.change_profile))
    publish = _blocking(_call(routes.publish))
    rollback = _blocking(_call(routes.rollback))
    freeze_tenant = _blocking(_call(routes.freeze_tenant))
    unfreeze_tenant = _blocking(_call(routes.unfreeze_tenant))
    set_limits = _blocking(_call(routes.set_limits))
    calibrate = _blocking(_call(routes.calibrate))
    probes = _blocking(_call(routes.probes))
    probe = _blocking(_call(routes.probe))
    families = _blocking(_call(routes.families))
    family = _blocking(_call(routes.family))
    set_floor = _blocking(_call(routes.set_floor))
    freeze_family = _blocking(_call(routes.freeze_family))
    unfreeze_family = _blocking(_call(routes.unfreeze_family))
    keys = _blocking(_call(routes.keys))
    add_key = _blocking(_call(routes.add_key))
    rotate_key = _blocking(_call(routes.rotate_key))
    revoke_key = _blocking(_call(routes.revoke_key))
    rollouts = _blocking(_call(routes.rollouts))
    rollout = _blocking(_call(routes.rollout))
    replicas = _blocking(_call(routes.replicas))
    audit = _blocking(_call(routes.audit))
    usage = _blocking(_call(routes.usage))
    jobs = _blocking(_call(routes.jobs))
    job = _blocking(_call(routes.job))
    cancel_job = _blocking(_call(routes.cancel_job))
    wait_job = _blocking(connection.wait_job)
    wait_rollout = _blocking(connection.wait_rollout)


class AsyncClient:
    """As Client, for an event loop: every method is awaited. Close it, or use `async with`."""

    def __init__(
        self,
        base_url: str,
        key: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        attempts: int = ATTEMPTS,
        first_pause_s: float = FIRST_PAUSE_S,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._server = Connection(base_url, key, attempts=attempts, first_pause_s=first_pause_s)
        self._http = httpx.AsyncClient(timeout=timeout_s, transport=transport)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"AsyncClient({self._server.url!r})"

    async def _run(self, exchange: Exchange[T]) -> T:
        try:
            step = next(exchange)
            while True:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                    step = next(exchange)
                    continue
                try:
                    response = await self._http.send(step)
                except httpx.RequestError as error:
                    step = exchange.throw(error)
                else:
                    step = exchange.send(response)
        except StopIteration as end:
            found: T = end.value
            return found

    whoami = _awaitable(_call(routes.whoami))
    ready = _awaitable(_call(routes.ready))
    receipts = _awaitable(_call(routes.receipts))
    tenants = _awaitable(_call(routes.tenants))
    tenant = _awaitable(_call(routes.tenant))
    add_tenant = _awaitable(_call(routes.add_tenant))
    retire_tenant = _awaitable(_call(routes.retire_tenant))
    revisions = _awaitable(_call(routes.revisions))
    add_revision = _awaitable(_call(routes.add_revision))
    change_profile = _awaitable(_call(routes.change_profile))
    publish = _awaitable(_call(routes.publish))
    rollback = _awaitable(_call(routes.rollback))
    freeze_tenant = _awaitable(_call(routes.freeze_tenant))
    unfreeze_tenant = _awaitable(_call(routes.unfreeze_tenant))
    set_limits = _awaitable(_call(routes.set_limits))
    calibrate = _awaitable(_call(routes.calibrate))
    probes = _awaitable(_call(routes.probes))
    probe = _awaitable(_call(routes.probe))
    families = _awaitable(_call(routes.families))
    family = _awaitable(_call(routes.family))
    set_floor = _awaitable(_call(routes.set_floor))
    freeze_family = _awaitable(_call(routes.freeze_family))
    unfreeze_family = _awaitable(_call(routes.unfreeze_family))
    keys = _awaitable(_call(routes.keys))
    add_key = _awaitable(_call(routes.add_key))
    rotate_key = _awaitable(_call(routes.rotate_key))
    revoke_key = _awaitable(_call(routes.revoke_key))
    rollouts = _awaitable(_call(routes.rollouts))
    rollout = _awaitable(_call(routes.rollout))
    replicas = _awaitable(_call(routes.replicas))
    audit = _awaitable(_call(routes.audit))
    usage = _awaitable(_call(routes.usage))
    jobs = _awaitable(_call(routes.jobs))
    job = _awaitable(_call(routes.job))
    cancel_job = _awaitable(_call(routes.cancel_job))
    wait_job = _awaitable(connection.wait_job)
    wait_rollout = _awaitable(connection.wait_rollout)
