"""Tenant context: the registry, the store and this process's engine.

The engine is known by a protocol only, so this package needs neither vLLM nor a running engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar
from weakref import WeakValueDictionary

import httpx

from safegene_server.artifacts import Store
from safegene_server.error_responses import EngineDownError, plain
from safegene_server.registry import Registry, Revision
from safegene_server.tenants.settings import TenantSettings
from safegene_vllm.errors import SafegeneError
from safegene_vllm.formats.family import FamilyHeader

logger = logging.getLogger("vllm.safegene_server")
_P = ParamSpec("_P")
_T = TypeVar("_T")


class Replica(Protocol):
    """The engine of this process, which follows the registry.

    `load` loads a revision and verifies its receipts without serving it; it does nothing if the
    revision is loaded, and `apply` leaves it there until `unload`, which spares what is served or
    the target of a rollback. `call` sends a request to vLLM's own app, with `model` = `tenant@N`,
    past keys and limits. `begin_candidate` loads a revision's adapter with other coefficients under
    a name that no tenant can have, until `end_candidate`. `in_flight` counts the tenants' own
    requests. `served` lists tenants and the revisions that their names lead to here; a revision
    that is `in_use` is not unloaded meanwhile.
    """

    @property
    def id(self) -> str: ...

    @property
    def header(self) -> FamilyHeader: ...

    async def apply(self) -> None: ...

    async def load(self, revision: Revision, path: Path | None = None) -> None: ...

    async def unload(self, revision: Revision) -> None: ...

    async def begin_candidate(self, revision: Revision, coefficients: Sequence[float]) -> str: ...

    async def end_candidate(self, name: str) -> None: ...

    def free_slots(self) -> int: ...

    def in_flight(self) -> int: ...

    def served(self) -> list[tuple[str, Revision]]: ...

    def in_use(self, served: str) -> AbstractContextManager[None]: ...

    def schedules_by_priority(self) -> bool: ...

    async def call(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> httpx.Response: ...

    def problems(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class TenantContext:
    """Collaborators of every step of a tenant's lifecycle."""

    replica: Replica
    registry: Registry
    store: Store
    settings: TenantSettings
    job_added: asyncio.Event = field(default_factory=asyncio.Event, repr=False, compare=False)
    _locks: WeakValueDictionary[str, asyncio.Lock] = field(
        default_factory=WeakValueDictionary, repr=False, compare=False
    )

    def changing(self, tenant: str) -> asyncio.Lock:
        """Lock of a tenant's changes: those of this process run one after another.

        Only changes of two processes conflict.
        """
        return self._locks.setdefault(tenant, asyncio.Lock())

    async def settle(self) -> None:
        """Follow the registry now.

        A failure is reported by the rollout, not raised: the change is in the registry already.
        """
        await _log_error(self.replica.apply, "this server does not follow the registry yet")

    @asynccontextmanager
    async def unloading_on_error(self, revision: Revision) -> AsyncIterator[None]:
        """Unload the revision on an error or a cancel; what is served or rolled back to stays."""
        try:
            yield
        except BaseException:
            await self.unload(revision)
            raise

    async def unload(self, revision: Revision) -> None:
        """Unload a revision that is not served; an error is logged."""
        await _log_error(
            lambda: self.replica.unload(revision), f"{revision.served_name} stays loaded"
        )


async def aside(call: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Run a blocking call of registry or store in a thread."""
    return await asyncio.to_thread(call, *args, **kwargs)


async def gather(doing: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Run coroutines concurrently; return their results in order. None outlives this call.

    Errors: the first of theirs; the others are cancelled then.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one) for one in doing]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def _log_error(step: Callable[[], Awaitable[None]], what: str) -> None:
    try:
        await step()
    except (SafegeneError, EngineDownError) as error:
        logger.error("SafeGene: %s: %s", what, plain(error))
